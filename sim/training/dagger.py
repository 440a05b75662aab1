"""DAgger (Ross et al. 2011, arXiv 1011.0686): the policy drives, the expert says what it would have done.

Invariant: `sim.rollout.run` asks the expert in every step whoever acts, so an episode driven by `SharedActor` carries
clean labels for the states that the policy gets itself into.
"""

from __future__ import annotations

import numpy as np

from sim.expert import Decision
from sim.policy_actor import PolicyActor
from sim.scene import Snapshot


class SharedActor:
    """An `Actor`: blocks of `block` steps belong to the expert with probability `expert_share`, else to the policy.

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
