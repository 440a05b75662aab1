"""Shadow inference: how far steering moves the actions, measured beside the run and bounded.

Invariant: the shadow sees the same observation, memory and noise as the steered inference and nothing of it reaches the
robot, the trace or the policy's memory; while it is off, or nothing is steered, it costs and changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from steer_runtime.errors import SteerError
from steer_runtime.steering.engine import SteeringEngine
from steer_runtime.types import ActionChunk, Memory, Observation, Policy, Remembering


@dataclass(frozen=True)
class ShadowSettings:
    """every: one shadow in so many inferences; 0 is none. bound: how far steering may move an action, in its own units."""

    every: int = 0
    bound: float = math.inf


@dataclass(frozen=True)
class Moved:
    """How far steering moved one chunk. most: largest |steered - unsteered| of all rows and of every component but the
    gripper; gripper: rows whose gripper was turned the other way (to the other side of the middle between open and close).
    """

    most: float
    gripper: int


class Shadow:
    """Runs the shadow of steered inferences of one policy under its engine; inference thread only.

    Raises SteerError('no_shadow') for a policy whose memory cannot be put back.
    """

    def __init__(self, policy: Policy, engine: SteeringEngine, settings: ShadowSettings) -> None:
        if settings.every and not isinstance(policy, Remembering):
            raise SteerError(
                "no_shadow",
                f"policy {policy.name!r} has no `memory` and `remember`, so that an inference cannot be repeated without "
                "steering; leave the shadow off",
            )
        self._policy: Any = policy
        self._engine = engine
        self.settings = settings
        self.last: Moved | None = None
        self._count = 0
        self._memory: Memory | None = None

    def before(self) -> None:
        """Called before an inference: keep what it starts from, if its shadow is due."""
        self._memory = None
        if not self.settings.every or not self._engine.steers:
            return
        self._count += 1
        if self._count % self.settings.every == 0:
            self._memory = self._policy.memory()

    @property
    def due(self) -> bool:
        """Whether the inference that has just run has a shadow."""
        return self._memory is not None

    def run(self, observation: Observation, steered: ActionChunk) -> Moved:
        """Infer again without steering and compare; past the bound every strength falls in proportion.

        Raises what the policy raises; its memory is as the steered inference left it.
        """
        after = self._policy.memory()
        self._engine.unsteered()
        self._policy.remember(self._memory)
        self._memory = None
        try:
            unsteered = self._policy.infer(observation)
        finally:
            self._policy.remember(after)
        self.last = moved = compare(steered, unsteered)
        if not moved.most <= self.settings.bound:
            share = self.settings.bound / moved.most if math.isfinite(moved.most) else 0.0
            self._engine.back_off(
                share,
                "shadow_backed_off",
                f"steering moved an action by {moved.most:.3g}, expected at most {self.settings.bound:g}: strengths fall to "
                f"{share:.2f} of what they were; send a lower strength",
            )
        return moved


def compare(steered: ActionChunk, unsteered: ActionChunk) -> Moved:
    """How far two chunks of one inference lie apart."""
    difference = np.abs(steered.actions.astype(np.float64) - unsteered.actions.astype(np.float64))[:, :-1]
    middle = (steered.space.gripper_open + steered.space.gripper_close) / 2
    turned = (steered.actions[:, -1] > middle) != (unsteered.actions[:, -1] > middle)
    return Moved(float(difference.max(initial=0.0)), int(turned.sum()))
