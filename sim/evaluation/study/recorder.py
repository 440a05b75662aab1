"""What is written down of one episode while it runs: a row a control step, and how much of the clock went where.

Invariant: a row is read from the simulator after its step; row 0 is the settled start.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sim.scene import TaskScene

_NOTHING = np.full(7, np.nan)
_NOWHERE = np.full(3, np.nan)
FINGERS = frozenset({"left_finger", "right_finger"})
ROBOT = FINGERS | {"robot"}


class Stopwatch:
    """Seconds by part of the work; `of` is a context."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"simulation": 0.0, "rendering": 0.0, "policy": 0.0, "scene": 0.0, "all": 0.0}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - began


@dataclass(frozen=True)
class Inference:
    """One inference of an episode. actions float64 [T, 7] as the policy gave them; entropy [T], NaN where there is none.

    strength: signed, that the engine wrote with; dose: NaN where it was not measured. said: the policy's words.
    """

    number: int
    actions: np.ndarray
    entropy: np.ndarray
    strength: float
    dose: float
    firings: int
    writes: int
    said: str | None
    image: np.ndarray


@dataclass(frozen=True)
class Seen:
    """What the loop needs to know of a step. free: the robot touches nothing that the task's goals name first."""

    success: bool
    free: bool


@dataclass
class Recorder:
    """Columns of `records.STEPS`, grown by `add`. target: whose place and grip are recorded, None for none."""

    scene: TaskScene
    target: str | None
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def start(self) -> Seen:
        """Row 0."""
        return self._add(_NOTHING, _NOTHING, None, -1)

    def add(self, action: np.ndarray, executed: np.ndarray, inference: Inference, row: int) -> Seen:
        """The row of a step that has just been taken."""
        return self._add(action, executed, inference, row)

    @property
    def arrays(self) -> dict[str, Any]:
        """The columns, vectors stacked."""
        return {
            name: np.stack(values) if isinstance(values[0], np.ndarray) else values
            for name, values in self.columns.items()
        }

    def _add(self, action: np.ndarray, executed: np.ndarray, inference: Inference | None, row: int) -> Seen:
        scene = self.scene
        hand, touching, success = scene.hand(), scene.contacts(), scene.success()
        held = None
        if self.target is not None:
            by = touching[self.target]
            held = by >= FINGERS and not by - ROBOT
        values: Mapping[str, Any] = {
            "step": len(self.columns.get("step", ())),
            "eef_pos": hand.position,
            "eef_quat": hand.quaternion,
            "gripper_qpos": hand.fingers,
            "action": np.asarray(action, np.float64),
            "executed": np.asarray(executed, np.float64),
            "target_pos": _NOWHERE if self.target is None else scene.position(self.target),
            "held": held,
            "success": success,
            "strength": 0.0 if inference is None else inference.strength,
            "dose": np.nan if inference is None else inference.dose,
            "entropy": np.nan if inference is None else float(inference.entropy[row]),
            "inference": -1 if inference is None else inference.number,
            "row": row,
            "said": None if inference is None else inference.said,
        }
        for name, value in values.items():
            self.columns.setdefault(name, []).append(value)
        return Seen(success, not any(touching[name] & ROBOT for name in scene.handled if name in touching))
