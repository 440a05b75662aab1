"""A policy at the wheel of a `Scene`: what it is shown, when it is asked, how its chunks are executed.

Invariant: the policy sees what the policy node hands it from `sim.libero_robot`: both cameras turned by 180 degrees and
LIBERO's proprioception, without a flip of the quaternion. Pictures are drawn when an inference is due and never else:
they are nearly all that a step costs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sim.benchmark import load_module
from sim.demonstrations import as_seen
from sim.expert import Decision
from sim.scene import Scene, Snapshot, TaskScene
from steer_runtime.types import ActionChunk, Observation, Policy

CAMERA_SIZE = 256
"""Pixels of both sides of both cameras, as the benchmark renders them; the policy makes them smaller itself."""
_CAMERAS = {"agentview": "agentview", "wrist": "eye_in_hand"}
_STEP_NS = 50_000_000  # one control period at 20 Hz


class PolicyActor:
    """An `Actor` of `sim.rollout`: one inference a chunk, every action of the chunk executed before the next one.

    infer: how an observation becomes a chunk, by default `policy.infer`; a steered one latches the engine first.
    seed: of what the policy draws in this episode, None draws anew. inferences: how many there were. said: the words of each of them, for policies that say how they move.
    """

    def __init__(
        self,
        policy: Policy,
        scene: Scene,
        instruction: str,
        *,
        size: int = CAMERA_SIZE,
        infer: Callable[[Observation], ActionChunk] | None = None,
        seed: int | None = None,
    ) -> None:
        self._policy, self._scene, self._instruction, self._size = policy, scene, instruction, size
        self._infer = infer or policy.infer
        self._ahead: list[np.ndarray] = []
        self._step = 0
        self.inferences = 0
        self.said: list[tuple[str, ...]] = []
        policy.reset(seed)

    def __call__(self, snapshot: Snapshot | None = None, advice: Decision | None = None) -> np.ndarray:
        """float64 [7] in [-1, 1] to execute now; what others see and advise is not looked at."""
        if not self._ahead:
            self._ahead = list(self._infer(self.observe()).actions)
            self.inferences += 1
            self.said.append(tuple(getattr(self._policy, "said", ())))
        self._step += 1
        # As the robot clips what it is sent.
        return np.clip(np.asarray(self._ahead.pop(0), dtype=np.float64), -1.0, 1.0)

    def overruled(self, action: np.ndarray) -> None:
        """Somebody else executes `action` [7] now: the rest of the chunk is void, and the gripper was told this."""
        self._ahead.clear()
        self._step += 1
        tell_gripper(self._policy, float(action[6]))

    def observe(self) -> Observation:
        """What the policy would be shown now; draws two pictures."""
        return observation_of(self._scene, self._instruction, self._size, self._step)


def observation_of(scene: TaskScene, instruction: str, size: int, step: int = 0) -> Observation:
    """The scene's present state as policies see it, size: pixels of both sides of both cameras."""
    transform = load_module("robosuite.utils.transform_utils")
    raw = scene.proprioception()
    # The function writes into its input.
    turn = transform.quat2axisangle(np.array(raw["robot0_eef_quat"], dtype=np.float64))
    state = np.concatenate([raw["robot0_eef_pos"], turn, raw["robot0_gripper_qpos"]]).astype(np.float64)
    images = {ours: np.ascontiguousarray(as_seen(scene.render(theirs, size))) for ours, theirs in _CAMERAS.items()}
    return Observation(images, state, instruction, stamp_ns=step * _STEP_NS, frame_id=step)


def tell_gripper(policy: Policy, command: float) -> None:
    """Let a policy that remembers its last gripper command (-1 open, +1 close) know one that it did not give itself."""
    tell = getattr(policy, "told_gripper", None)
    if tell is not None:
        tell(command)


class SharedActor:
    """An `Actor` for DAgger (Ross et al. 2011, arXiv 1011.0686): blocks of `block` steps belong to the expert with
    probability `expert_share`, else to the policy; the expert labels them all.

    The expert's actions void the rest of the policy's chunk, and the policy learns what the gripper was told.
    """

    def __init__(self, policy: PolicyActor, *, expert_share: float = 0.5, block: int = 16, seed: int = 0) -> None:
        self._policy, self._share, self._block = policy, expert_share, block
        self._rng = np.random.default_rng([seed, 0xDA66])
        self._step, self._expert_acts = 0, False

    def __call__(self, snapshot: Snapshot, advice: Decision) -> np.ndarray:
        """float64 [7] to execute."""
        if self._step % self._block == 0:
            self._expert_acts = bool(self._rng.random() < self._share)
        self._step += 1
        if self._expert_acts:
            self._policy.overruled(advice.action)
            return advice.action
        return self._policy(snapshot, advice)
