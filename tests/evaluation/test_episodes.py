"""A real scene, a tiny random policy of the real classes: what it is shown, when it is asked, what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fabricate
import fabricate_pi0
import numpy as np
import pytest

from sim import layouts
from sim.benchmark import use_software_rendering
from sim.evaluation import grounding
from sim.evaluation.axis_video import Shot, film
from sim.evaluation.episodes import Setting, configuration, identity, official, run_trial, run_trials
from sim.libero_robot import LiberoRobot
from sim.policy_actor import PolicyActor, SharedActor
from sim.rollout import Assignment, run
from sim.scene import Scene
from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.results import results
from steer_runtime.types import ActionChunk, Observation

CHUNK = 4
SETTING = Setting(meshes="thin", size=32, limit=6)


@pytest.fixture(scope="module", autouse=True)
def _renderer() -> None:
    use_software_rendering()


@pytest.fixture(scope="module")
def policy() -> OpenVLAPolicy:
    return fabricate.tiny_policy(fabricate.tiny_config(chunk=CHUNK))


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with Scene("libero_object", 6, render=True) as open_scene:
        yield open_scene


class Seen:
    """Passes observations on to a policy and keeps them, and the chunks."""

    def __init__(self, policy: OpenVLAPolicy) -> None:
        self._policy = policy
        self.observations: list[Observation] = []
        self.chunks: list[ActionChunk] = []

    def __call__(self, observation: Observation) -> ActionChunk:
        self.observations.append(observation)
        self.chunks.append(self._policy.infer(observation))
        return self.chunks[-1]


def test_policy_sees_what_the_robot_sends(scene: Scene, policy: OpenVLAPolicy) -> None:
    scene.begin(scene.task.initial_states[0])
    ours = PolicyActor(policy, scene, scene.task.instruction, size=48).observe()
    with LiberoRobot("libero_object", 6, 0, camera_size=48) as robot:
        theirs = robot.reset().observation(0, 0)
    assert ours.images.keys() == theirs.images.keys()
    for camera, image in theirs.images.items():
        # The robot's pictures are drawn one substep of 2 ms before the step ends: an edge may cross a pixel.
        difference = np.abs(ours.images[camera].astype(int) - image)
        assert (difference > 2).mean() < 0.005
        assert (np.abs(ours.images[camera][::-1].astype(int) - image) > 2).mean() > 0.3
    np.testing.assert_allclose(ours.state, theirs.state, atol=1e-4)
    assert ours.instruction == theirs.instruction


def test_chunk_is_executed_to_its_end_and_pictures_are_drawn_once_a_chunk(scene: Scene, policy: OpenVLAPolicy) -> None:
    scene.begin(scene.task.initial_states[0])
    seen = Seen(policy)
    actor = PolicyActor(policy, scene, "pick up the soup", size=32, infer=seen)
    executed = []
    for _ in range(2 * CHUNK + 1):
        executed.append(actor())
        scene.step(executed[-1])
    assert [o.frame_id for o in seen.observations] == [0, CHUNK, 2 * CHUNK]
    wanted = np.concatenate([chunk.actions for chunk in seen.chunks])[: len(executed)]
    np.testing.assert_array_equal(np.array(executed), np.clip(wanted, -1, 1).astype(np.float64))
    assert actor.inferences == 3


def test_expert_that_takes_over_voids_the_rest_of_the_chunk(scene: Scene, policy: OpenVLAPolicy) -> None:
    target = scene.task_target
    layout = layouts.make(scene, "official", target, 0)
    seen = Seen(policy)
    actor = PolicyActor(policy, scene, "pick up the soup", size=32, infer=seen)
    shared = SharedActor(actor, expert_share=0.5, block=6, seed=2)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    run(
        scene, layout, Assignment(target), actor=shared, step_limit=24,
        on_step=lambda step: steps.append((step.executed, step.expert.action)),
    )  # fmt: skip
    expert = [bool((executed == advice).all()) for executed, advice in steps]
    blocks = [expert[at : at + 6] for at in range(0, 24, 6)]
    # Both drive, in whole blocks; the policy is asked anew at the start of its block and once more after four steps,
    # since a chunk has four.
    assert [all(block) or not any(block) for block in blocks] == [True] * 4
    assert {block[0] for block in blocks} == {True, False}
    asked = {o.frame_id for o in seen.observations}
    assert {6 * n for n, block in enumerate(blocks) if not block[0] and (n == 0 or blocks[n - 1][0])} <= asked
    assert not asked & {6 * n + k for n, block in enumerate(blocks) if block[0] for k in range(6)}


def test_episodes_are_kept_and_not_run_again(policy: OpenVLAPolicy, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    seen = Seen(policy)
    first, both = official((6,), 1), official((6,), 2)
    for trials, asked in ((first, 2), (both, 4)):
        with results(path, configuration(policy, "success", SETTING)) as file:
            rows = run_trials(policy, trials, SETTING, file, infer_for=lambda _: seen)
        assert len(seen.observations) == asked
    assert [row["key"] for row in rows] == ["task6-state0", "task6-state1"]
    assert all(row["steps"] == SETTING.limit and row["inferences"] == 2 for row in rows)
    assert rows[0]["instruction"] == "pick up the butter and place it in the basket"


def test_results_are_tied_to_the_options_of_the_policy(tmp_path: Path) -> None:
    one = fabricate_pi0.tiny_policy(action_steps=1, euler_steps=1)
    other = fabricate_pi0.tiny_policy(action_steps=2, euler_steps=4, delta=True)
    assert identity(one)["sha256"] == identity(other)["sha256"]
    path = tmp_path / "results.jsonl"
    for _ in range(2):
        with results(path, configuration(one, "success", SETTING)):
            pass
        one.reset(seed=7)  # an episode was run in between
    tied = configuration(other, "success", SETTING)
    with pytest.raises(SteerError, match=r"policy\.options\.delta False \(now True\)"), results(path, tied):
        pass


def test_same_layout_is_asked_for_another_object(scene: Scene, policy: OpenVLAPolicy) -> None:
    targets = layouts.targets(scene)
    seen = Seen(policy)
    own, other = (
        run_trial(policy, scene, targets, trial, Setting(size=16, limit=1), seen)
        for trial in grounding.trials((6,), 2, 1, 2)
    )
    assert own["target"] != other["target"]
    assert scene.label(other["target"]) in other["instruction"]
    one, two = seen.observations
    np.testing.assert_array_equal(one.images["agentview"], two.images["agentview"])
    np.testing.assert_array_equal(one.state, two.state)


def test_initial_state_out_of_range_is_refused(scene: Scene, policy: OpenVLAPolicy) -> None:
    trial = official((6,), 51)[-1]
    with pytest.raises(SteerError, match="0 to 49"):
        run_trial(policy, scene, layouts.targets(scene), trial, SETTING, policy.infer)


def test_a_film_shows_every_second_step_and_the_end(scene: Scene, policy: OpenVLAPolicy) -> None:
    targets = tuple(layouts.targets(scene))
    shot = Shot(scene.task.initial_states[0], 0, targets[0], targets, "pick up the soup", limit=5, size=32)
    seen = Seen(policy)
    filmed = film(policy, scene, shot, "not steered", seen)
    assert (filmed.motion.steps, filmed.panel.images.shape) == (5, (4, 32, 32, 3))
    assert [caption[0] for caption in filmed.panel.captions] == ["says nothing"] * 4
    assert [caption[1][:5] for caption in filmed.panel.captions] == ["0.0 s", "0.1 s", "0.2 s", "0.2 s"]
    assert np.array_equal(filmed.panel.images[0], seen.observations[0].images["agentview"])
    assert not np.array_equal(filmed.panel.images[0], filmed.panel.images[-1])
