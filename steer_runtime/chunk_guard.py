"""A guard on whole chunks: how large an action may be, how far it may step from row to row, and how sharply.

Invariant: what leaves the guard is within bounds and step limits in every row, and is the input itself, the same array,
where that was already so; every intervention is said. Nothing here knows of steering: an unsteered policy is held to the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from steer_runtime.errors import SteerError
from steer_runtime.types import ActionChunk, ActionSpace

OnExcess = Literal["clamp", "veto"]
ROUNDING = 1e-6
"""Differences of float32 actions of order 1 that were clamped exactly may come out larger by this."""


@dataclass(frozen=True)
class ChunkLimits:
    """Limits in units of the action, of its motion (every component but the last, the gripper); infinite: not checked.

    bound: |a_t|. step: |a_t - a_(t-1)|. jerk: the difference one order further: |a_t - 2 a_(t-1) +
    a_(t-2)|. Where an action is a displacement (`ee_delta`, `joint_delta`) they limit velocity, acceleration and jerk, each
    times its power of the control period; where it is a position (`joint_abs`) position, velocity and acceleration.
    on_excess: "clamp" brings a chunk within them, "veto" refuses it whole.
    """

    bound: float = math.inf
    step: float = math.inf
    jerk: float = math.inf
    on_excess: OnExcess = "clamp"

    def __post_init__(self) -> None:
        """Raises SteerError('bad_limit')."""
        for name in ("bound", "step", "jerk"):
            if not getattr(self, name) > 0:
                raise SteerError("bad_limit", f"the {name} of a chunk is {getattr(self, name)}: expected above 0")

    @property
    def any(self) -> bool:
        """Whether anything is limited at all."""
        return min(self.bound, self.step, self.jerk) < math.inf


@dataclass(frozen=True)
class Excess:
    """What a chunk exceeded: limit -> how far at most, as a multiple of it; sentence: for people."""

    limits: dict[str, float]
    sentence: str


class ChunkGuard:
    """Checks the chunks of one robot session in order. Not thread-safe: the inference thread owns it.

    The first row is compared with the row of the last chunk that is nearest to it: which rows a robot has executed before it
    replans is the robot's to know, so the check between chunks is exact for rows executed whole and lenient otherwise.
    """

    def __init__(self, limits: ChunkLimits) -> None:
        self._limits = limits
        self._before: np.ndarray | None = None  # rows of the last chunk that was let through

    @property
    def limits(self) -> ChunkLimits:
        return self._limits

    def reset(self) -> None:
        """Forget what came before: another session, or a pause in which the robot came to rest."""
        self._before = None

    def check(self, chunk: ActionChunk) -> tuple[ActionChunk, Excess | None]:
        """The chunk to hand on, and what was wrong with the one given. Raises SteerError('chunk_vetoed')."""
        actions = chunk.actions
        excess = self._excess(actions, chunk.space)
        if excess is not None:
            if self._limits.on_excess == "veto":
                self.reset()
                raise SteerError("chunk_vetoed", f"{excess.sentence}; the chunk is refused")
            chunk = chunk.stamped(actions=self._clamped(actions))
        self._before = chunk.actions
        return chunk, excess

    def _history(self, actions: np.ndarray) -> np.ndarray:
        """Motion rows before the first, at most two [0..2, dims - 1]."""
        before = self._before
        if before is None:
            return np.empty((0, actions.shape[1] - 1))
        motion = before[:, :-1].astype(np.float64)
        nearest = int(np.abs(motion - actions[0, :-1]).max(axis=1).argmin())
        return motion[max(0, nearest - 1) : nearest + 1]

    def _excess(self, actions: np.ndarray, space: ActionSpace) -> Excess | None:
        limits = self._limits
        history = self._history(actions)
        rows = np.concatenate([history, actions[:, :-1].astype(np.float64)])
        new = len(history)
        largest = {"bound": float(np.abs(rows[new:]).max())}
        for order, name in ((1, "step"), (2, "jerk")):
            # The first differences lie within what was let through already.
            differences = np.abs(np.diff(rows, n=order, axis=0))[max(0, new - order) :]
            largest[name] = float(differences.max(initial=0.0))
        over = {name: value for name, value in largest.items() if value > getattr(limits, name) + ROUNDING}
        if not over:
            return None
        said = ", ".join(
            f"{name} {value:.3g} (expected at most {getattr(limits, name):g})" for name, value in over.items()
        )
        return Excess(
            {name: value / getattr(limits, name) for name, value in over.items()},
            f"a chunk of {len(actions)} {space.kind} actions has {said}",
        )

    def _clamped(self, actions: np.ndarray) -> np.ndarray:
        """float32 [T, dims] nearest to `actions` row by row: jerk first, then step, then bounds, which win over jerk."""
        limits = self._limits
        out = actions.astype(np.float64)
        rows = list(self._history(actions))
        for row in out:
            wanted = np.clip(row[:-1], -limits.bound, limits.bound)
            if rows:
                change = wanted - rows[-1]
                if len(rows) > 1:
                    last = rows[-1] - rows[-2]
                    change = np.clip(change, last - limits.jerk, last + limits.jerk)
                change = np.clip(change, -limits.step, limits.step)
                wanted = np.clip(rows[-1] + change, -limits.bound, limits.bound)
            row[:-1] = wanted
            rows.append(wanted)
        return out.astype(np.float32)
