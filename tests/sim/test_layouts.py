"""Layouts in the real simulator: valid, settled, fixed by their seed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from sim import grasp, layouts
from sim.scene import Scene
from steer_runtime.errors import SteerError

SOUP = "alphabet_soup_1"


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with Scene("libero_object", 0) as scene:
        yield scene


@pytest.mark.parametrize("tilt", [0.0, 0.5])
def test_a_turn_about_the_vertical_is_told_as_it_is_whatever_the_tilt(scene: Scene, tilt: float) -> None:
    scene.begin(scene.task.initial_states[0])
    rest = scene.state()
    before = scene.turns()
    state, here = rest.copy(), scene.pose_slice(SOUP)
    pose = Rotation.from_quat(rest[here][[4, 5, 6, 3]])
    axis = [np.cos(before[scene.objects.index(SOUP)]), np.sin(before[scene.objects.index(SOUP)]), 0.0]
    turned = Rotation.from_euler("z", 0.7) * Rotation.from_rotvec(np.multiply(tilt, axis)) * pose
    state[here.start + 3 : here.stop] = turned.as_quat()[[3, 0, 1, 2]]
    scene.show(state)
    change = np.angle(np.exp(1j * (scene.turns() - before)))
    expected = [0.7 if name == SOUP else 0.0 for name in scene.objects]
    np.testing.assert_allclose(change, expected, atol=1e-3)


def test_same_seed_same_layout_whatever_was_before(scene: Scene) -> None:
    first = layouts.make(scene, "random", SOUP, 3)
    other = layouts.make(scene, "random", SOUP, 4)
    again = layouts.make(scene, "random", SOUP, 3)
    assert np.array_equal(first.state, again.state)
    assert not np.array_equal(first.state, other.state)


def test_every_graspable_object_is_a_target_and_the_basket_is_not(scene: Scene) -> None:
    assert layouts.targets(scene)[0] == SOUP
    assert set(layouts.targets(scene)) == set(scene.objects) - {"basket_1"}


@pytest.mark.parametrize("seed", range(4))
def test_random_objects_rest_upright_apart_and_the_target_can_be_taken(scene: Scene, seed: int) -> None:
    layout = layouts.make(scene, "random", "milk_1", seed)
    scene.begin(layout.state, settle=0)
    for _ in range(5):
        scene.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    snapshot = scene.snapshot()
    height = {n: snapshot.boxes[n].high[2] - snapshot.boxes[n].low[2] for n in scene.objects}
    upright = scene.begin(scene.task.initial_states[0]).boxes
    for name in scene.objects:
        assert snapshot.speed[name] < 0.05
        assert height[name] == pytest.approx(upright[name].high[2] - upright[name].low[2], abs=0.01)
        assert snapshot.touching[name] - {"robot"} == {"ground"}
    assert grasp.plan(snapshot, "milk_1").clear


def test_random_layouts_spread_over_the_ground_and_turn(scene: Scene) -> None:
    spots = []
    for seed in range(12):
        scene.begin(layouts.make(scene, "random", SOUP, seed).state, settle=0)
        spots.append(scene.snapshot().boxes[SOUP].centre[:2])
    assert np.std(spots, axis=0).min() > 0.05


def test_official_layouts_are_the_benchmarks(scene: Scene) -> None:
    layout = layouts.make(scene, "official", SOUP, 0)
    starts = [scene.begin(s).boxes[SOUP].centre for s in scene.task.initial_states[:3]]
    scene.begin(layout.state, settle=0)
    assert np.abs(scene.snapshot().boxes[SOUP].centre - np.mean(starts, axis=0)).max() < 0.03


@pytest.mark.parametrize(
    ("kind", "target", "code"), [("random", "teapot_1", "unknown_target"), ("tidy", SOUP, "unknown_layout")]
)
def test_unknown_names_are_refused(scene: Scene, kind: str, target: str, code: str) -> None:
    with pytest.raises(SteerError) as e:
        layouts.make(scene, kind, target, 0)  # type: ignore[arg-type]
    assert e.value.code == code
