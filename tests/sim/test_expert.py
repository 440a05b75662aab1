"""The expert in the real simulator, without rendering: Markov, able to recover, modulated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from sim import grasp, layouts
from sim.expert import NEAR, Decision, Style, decide
from sim.rollout import STYLES, Assignment, Noise, follow, run, scatter_arm
from sim.scene import Scene, Snapshot
from steer_runtime.errors import SteerError

SOUP = "alphabet_soup_1"


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with Scene("libero_object", 0) as scene:
        yield scene


@pytest.fixture(scope="module")
def layout(scene: Scene) -> layouts.Layout:
    return layouts.make(scene, "random", SOUP, 5)


def _until(scene: Scene, layout: layouts.Layout, phase: str, style: Style | None = None) -> Snapshot:
    snapshot = scene.begin(layout.state, settle=0)
    for _ in range(300):
        advice = decide(snapshot, SOUP, scene.goal, style or Style())
        if advice.phase == phase:
            return snapshot
        scene.step(advice.action)
        snapshot = scene.snapshot()
    raise AssertionError(f"never came to {phase}")


def test_same_start_and_actions_give_bit_identical_states(scene: Scene, layout: layouts.Layout) -> None:
    ends = []
    for _ in range(2):
        run(scene, layout, Assignment(SOUP, "quickly"), step_limit=60)
        ends.append(scene.state())
    assert np.array_equal(*ends)


def test_action_depends_on_the_snapshot_alone(scene: Scene, layout: layouts.Layout) -> None:
    snapshots: list[Snapshot] = []
    actions: list[np.ndarray] = []

    def actor(snapshot: Snapshot, advice: Decision) -> np.ndarray:
        snapshots.append(snapshot)
        actions.append(advice.action)
        return advice.action

    run(scene, layout, Assignment(SOUP, "quickly"), actor=actor)
    order = np.random.default_rng(0).permutation(len(snapshots))
    for i in order:
        again = decide(snapshots[i], SOUP, scene.goal, STYLES["quickly"].style())
        assert np.array_equal(again.action, actions[i])


def test_phases_come_in_order_and_closing_looks_different_from_descending(scene: Scene, layout: layouts.Layout) -> None:
    seen: list[tuple[str, float]] = []
    run(scene, layout, Assignment(SOUP), on_step=lambda s: seen.append((s.expert.phase, s.snapshot.opening)))
    order = list(dict.fromkeys(phase for phase, _ in seen))
    wanted = ["approach", "descend", "squeeze", "lift", "carry", "lower", "release", "retreat", "rest"]
    assert [p for p in order if p != "falling"] == wanted
    closing = [opening for phase, opening in seen if phase == "squeeze"]
    assert len(closing) >= 4
    assert closing[0] > 0.075
    assert closing[-1] < 0.068


@pytest.mark.parametrize("style", ["plain", "careful"])
def test_object_is_in_the_basket_and_let_go(scene: Scene, layout: layouts.Layout, style: str) -> None:
    outcome = run(scene, layout, Assignment(SOUP, style))
    assert outcome.released
    assert outcome.drops == 0


def test_another_object_of_the_scene_is_delivered_when_it_is_the_target(scene: Scene) -> None:
    layout = layouts.make(scene, "random", "butter_1", 2)
    assert run(scene, layout, Assignment("butter_1", "quickly")).released
    assert scene.satisfied("butter_1")
    assert not scene.satisfied(SOUP)


def test_quick_is_faster_than_slow_and_high_is_higher(scene: Scene, layout: layouts.Layout) -> None:
    quick, slow, high = (run(scene, layout, Assignment(SOUP, s)) for s in ("quickly", "slowly", "quickly-high"))
    assert quick.released
    assert slow.released
    assert high.released
    assert quick.speed / slow.speed > 1.8
    assert high.height - quick.height > 0.12


def test_care_slows_the_last_centimetres_not_the_way_down_from_carrying_height(
    scene: Scene, layout: layouts.Layout
) -> None:
    style = Style(speed=1.25, height=0.35, near_speed=0.2)
    turned = _until(scene, layout, "descend", style)
    spot = grasp.plan(turned, SOUP).position
    for up, cap in ((NEAR + 0.01, 1.0), (NEAR - 0.01, 0.2)):
        above = replace(turned, eef=spot + np.array([0.0, 0.0, up]))
        move = decide(above, SOUP, scene.goal, style).action[:3]
        assert np.linalg.norm(move) == pytest.approx(cap, abs=0.01)
    lowering = _until(scene, layout, "lower", style)
    assert np.linalg.norm(decide(lowering, SOUP, scene.goal, style).action[:3]) > 0.9


def test_it_delivers_in_spite_of_noise(scene: Scene, layout: layouts.Layout) -> None:
    noise = Noise(position=0.3, rotation=0.15, gripper=0.01)
    assert run(scene, layout, Assignment(SOUP), actor=follow(noise, 1)).released


def test_it_starts_again_when_the_object_is_pulled_out_of_the_closing_fingers(
    scene: Scene, layout: layouts.Layout
) -> None:
    _until(scene, layout, "squeeze")
    state = scene.state()
    state[scene.pose_slice(SOUP)][:3] += [-0.02, -0.10, 0.0]
    moved = layouts.Layout(state, "random", 0, SOUP, 0)
    assert run(scene, moved, Assignment(SOUP)).released


def test_it_picks_up_what_was_dropped_on_the_way(scene: Scene, layout: layouts.Layout) -> None:
    opened = 0

    def clumsy(snapshot: Snapshot, advice: Decision) -> np.ndarray:
        nonlocal opened
        if opened < 12 and (advice.phase == "carry" or opened > 0):
            opened += 1
            return np.array([*advice.action[:6] * 0.2, -1.0])
        return advice.action

    outcome = run(scene, layout, Assignment(SOUP), actor=clumsy)
    assert outcome.drops >= 1
    assert outcome.released


@pytest.mark.parametrize("seed", [0, 1])
def test_it_delivers_from_wherever_the_arm_was_driven(scene: Scene, layout: layouts.Layout, seed: int) -> None:
    assert run(scene, scatter_arm(scene, layout, seed), Assignment(SOUP, "quickly")).released


def test_state_of_another_scene_is_refused(scene: Scene) -> None:
    with pytest.raises(SteerError, match="expected 110 finite numbers") as e:
        scene.begin(np.zeros(9))
    assert e.value.code == "bad_state"


def test_task_that_is_not_pick_and_place_is_refused() -> None:
    with pytest.raises(SteerError, match="open the middle drawer") as e:
        Scene("libero_goal", 0)
    assert e.value.code == "not_pick_and_place"


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("suite", "layout_kind", "least"),
    [("libero_object", "random", 0.95), ("libero_object", "official", 0.95), ("libero_spatial", "official", 0.85)],
)
def test_released_success_of_a_suite(suite: str, layout_kind: layouts.Kind, least: float) -> None:
    from sim.plan import episodes
    from sim.score import score

    plan = episodes(suite, layout_kind, ("plain", "quickly", "slowly", "high"), 80, 11)
    assert np.mean([s.outcome.released for s in score(plan)]) >= least
