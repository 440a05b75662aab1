"""DAgger (Ross et al. 2011, arXiv 1011.0686): the policy drives, the expert says what it would have done.

Invariant: `sim.rollout.run` asks the expert in every step whoever acts, so an episode driven by `PolicyActor` carries
clean labels for the states that the policy gets itself into.
"""

from __future__ import annotations

import numpy as np

from sim.benchmark import load_module
from sim.demonstrations import as_seen
from sim.expert import Decision
from sim.scene import Scene, Snapshot
from steer_runtime.types import Observation, Policy

_STEP_NS = 50_000_000  # one control period at 20 Hz


class PolicyActor:
    """An `Actor`: blocks of steps belong to the expert with probability `expert_share`, else to the policy.

    The policy sees what it sees when it is evaluated: both cameras as rendered, turned, and the proprioception of
    LIBERO's observation. A chunk is executed to its end before the next inference.
    """

    def __init__(
        self,
        policy: Policy,
        scene: Scene,
        instruction: str,
        *,
        size: int = 128,
        expert_share: float = 0.5,
        block: int = 16,
        seed: int = 0,
    ) -> None:
        self._policy, self._scene, self._instruction = policy, scene, instruction
        self._size, self._share, self._block = size, expert_share, block
        self._rng = np.random.default_rng([seed, 0xDA66])
        self._transform = load_module("robosuite.utils.transform_utils")
        self._ahead: list[np.ndarray] = []
        self._step, self._expert_acts = 0, False
        policy.reset()

    def __call__(self, snapshot: Snapshot, advice: Decision) -> np.ndarray:
        """float64 [7] to execute."""
        if self._step % self._block == 0:
            self._expert_acts = bool(self._rng.random() < self._share)
            self._ahead.clear()
        if self._expert_acts:
            self._step += 1
            return advice.action
        if not self._ahead:
            self._ahead = list(self._policy.infer(self._observe()).actions)
        self._step += 1
        return np.asarray(self._ahead.pop(0), dtype=np.float64)

    def _observe(self) -> Observation:
        raw = self._scene.proprioception()
        # The function writes into its input.
        turn = self._transform.quat2axisangle(np.array(raw["robot0_eef_quat"], dtype=np.float64))
        state = np.concatenate([raw["robot0_eef_pos"], turn, raw["robot0_gripper_qpos"]]).astype(np.float64)
        cameras = {"agentview": "agentview", "wrist": "eye_in_hand"}
        images = {
            ours: np.ascontiguousarray(as_seen(self._scene.render(theirs, self._size)))
            for ours, theirs in cameras.items()
        }
        return Observation(images, state, self._instruction, stamp_ns=self._step * _STEP_NS, frame_id=self._step)
