"""What came of an episode, told from the simulator's state at every step.

Invariant: everything here is computed from snapshots; nothing asks the policy or the expert.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from sim.rollout import middle_height
from sim.scene import Snapshot

RATE_HZ = 20.0
LIFTED = 0.02
"""Height above its start from which an object in the closed hand counts as lifted, m."""
NEAR = 0.10
"""Distance from the target's centre under which the hand counts as near it, m: the expert's careful range."""
STILL = 5
"""Steps for which a placed object must stay so, untouched, to count as released."""


@dataclass(frozen=True)
class Motion:
    """Measures of one episode; None where there was nothing to measure.

    speed: mean speed of the grip site from the start until the target is let go (all of it when it never was carried),
    m/s. near_speed: the same over the steps within NEAR of the target before it is first held. height: mean height of
    the target's underside above where it stood, while carried through the middle half of its way, m.
    lifted, placed: the first object that was lifted, and for which LIBERO's predicate held. done: it held for the target
    at some step. released: it held for STILL steps on end with the robot off the target.
    """

    steps: int
    done: bool
    released: bool
    lifted: str | None
    placed: str | None
    speed: float | None
    near_speed: float | None
    height: float | None


class Watch:
    """Follows one episode: `add` after every step, `motion` at its end. objects: those that may be lifted."""

    def __init__(self, first: Snapshot, target: str, objects: Sequence[str]) -> None:
        self._target, self._objects = target, tuple(objects)
        self._ground = {name: float(first.boxes[name].low[2]) for name in self._objects}
        self._eef = [first.eef]
        self._near: list[float] = []
        self._carried: list[tuple[int, np.ndarray, float]] = []
        self._still = 0
        self._was_held = False
        self.done, self.released = False, False
        self.lifted: str | None = None
        self.placed: str | None = None

    def add(self, snapshot: Snapshot, placed: Collection[str]) -> None:
        """One more step; placed: the objects for which LIBERO's predicate holds now."""
        distance = float(np.linalg.norm(self._eef[-1] - snapshot.boxes[self._target].centre))
        step = float(np.linalg.norm(snapshot.eef - self._eef[-1])) * RATE_HZ
        self._eef.append(snapshot.eef)
        held = snapshot.squeezed(self._target)
        self._was_held = self._was_held or held
        if distance < NEAR and not self._was_held:
            self._near.append(step)
        if held and snapshot.airborne(self._target):
            boxes = snapshot.boxes[self._target]
            height = float(boxes.low[2]) - self._ground[self._target]
            self._carried.append((len(self._eef) - 1, boxes.centre[:2], height))
        if self.lifted is None:
            self.lifted = next((name for name in self._objects if self._is_lifted(snapshot, name)), None)
        if self.placed is None:
            self.placed = next((name for name in self._objects if name in placed), None)
        self.done = self.done or self._target in placed
        free = not snapshot.touching[self._target] & {"left_finger", "right_finger", "robot"}
        self._still = self._still + 1 if self._target in placed and free else 0
        self.released = self.released or self._still >= STILL

    def motion(self) -> Motion:
        """The measures so far."""
        end = self._carried[-1][0] if self._carried else len(self._eef) - 1
        path = np.array(self._eef[: end + 1])
        speeds = np.linalg.norm(np.diff(path, axis=0), axis=1) * RATE_HZ
        return Motion(
            steps=len(self._eef) - 1,
            done=self.done,
            released=self.released,
            lifted=self.lifted,
            placed=self.placed,
            speed=float(speeds.mean()) if len(speeds) else None,
            near_speed=float(np.mean(self._near)) if self._near else None,
            height=middle_height([(place, height) for _, place, height in self._carried]),
        )

    def _is_lifted(self, snapshot: Snapshot, name: str) -> bool:
        if not (snapshot.squeezed(name) and snapshot.airborne(name)):
            return False
        return float(snapshot.boxes[name].low[2]) > self._ground[name] + LIFTED
