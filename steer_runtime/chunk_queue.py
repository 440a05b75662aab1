"""Chunks in real time: which action belongs to which control tick while the next inference already runs.

An inference sees the observation of one tick and its chunk arrives some ticks later; row i of that chunk is meant for the
i-th tick after the observation, so the rows of the ticks that passed meanwhile are trimmed and the rest takes over from
the chunk that was being executed (as in the asynchronous inference of SmolVLA, Shukor et al. 2025, arXiv 2506.01844).

Invariants: a tick gets exactly one action, and that action names its chunk, its row and its steering, or says why it
holds; no row is ever executed at another tick than its own, nor after its chunk was replaced or flushed. Time is the
count of ticks: no clock is read here. Not thread-safe: the control thread owns it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from steer_runtime.errors import SteerError
from steer_runtime.types import ActionChunk, ActionSpace, SteeringStamp

OnSteering = Literal["wait", "replan", "flush"]
ON_STEERING: tuple[OnSteering, ...] = ("wait", "replan", "flush")
Hold = Literal["", "nothing yet", "no answer", "used up", "stale", "flushed"]
NO_STEERING = SteeringStamp(0, 0)


@dataclass(frozen=True)
class QueueSettings:
    """replan_every: ticks from the observation of one chunk to that of the next; 1 is as often as inference can.

    Without holds a chunk must have rows for `replan_every` ticks and one inference, or for two inferences.

    on_steering: what a change of steering does. "wait": it shows with the next replan. "replan": an inference is due at
    once, and the old rows go on until its chunk is there. "flush": so, and the old rows are dropped: the robot holds;
    at most once in `replan_every` ticks, lest a stream of commands keeps it still.
    horizon: rows of a chunk that may be executed, None for all; older ones are stale. patience: ticks after which an
    inference that has not answered is given up.
    """

    replan_every: int
    on_steering: OnSteering = "wait"
    horizon: int | None = None
    patience: int = 200

    def __post_init__(self) -> None:
        for name in ("replan_every", "horizon", "patience"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise SteerError("bad_queue", f"{name} is {value!r}: expected a whole number of ticks, 1 or more")
        if self.horizon is not None and self.horizon < self.replan_every:
            raise SteerError(
                "bad_queue",
                f"horizon {self.horizon} ends before the replan after {self.replan_every} ticks: the robot would hold in "
                "every chunk; make it larger",
            )
        if self.on_steering not in ON_STEERING:
            raise SteerError(
                "bad_queue", f"on_steering is {self.on_steering!r}: expected one of {', '.join(ON_STEERING)}"
            )


@dataclass(frozen=True)
class Tick:
    """What to execute at one tick. action float32 [dims] in the space's units.

    hold: why it is no row of a chunk, "" when it is one; then `row`, `inference_id` and `steering` say which and under
    which steering it was made, delay how many ticks after its observation the chunk came.
    """

    tick: int
    action: np.ndarray
    hold: Hold
    row: int = -1
    inference_id: int = 0
    steering: SteeringStamp = NO_STEERING
    delay: int = 0


@dataclass(frozen=True)
class Arrival:
    """What became of a chunk. delay: ticks since its observation, trimmed from its front; used: rows that may still run."""

    delay: int
    used: int
    refused: Literal["", "late", "outdated", "not asked for"] = ""


class ChunkQueue:
    """See the module. space: of every action; resting: what to hold before the first action (joint_abs must give it).

    A tick is: `due` (and `begin` with an observation of now), `offer` what has arrived, `next`.
    """

    def __init__(self, space: ActionSpace, settings: QueueSettings, resting: np.ndarray | None = None) -> None:
        if resting is None and space.kind == "joint_abs":
            raise SteerError(
                "bad_queue", "absolute joints cannot hold without a pose: give the pose at rest as `resting`"
            )
        self.space = space
        self.settings = settings
        self._rest = np.zeros(space.dims, np.float32) if resting is None else np.asarray(resting, np.float32)
        if self._rest.shape != (space.dims,):
            raise SteerError("bad_queue", f"resting is {list(self._rest.shape)}: expected [{space.dims}]")
        if resting is None:
            self._rest[-1] = space.gripper_open
        self._tick = 0
        self._chunk: ActionChunk | None = None
        self._first = 0  # tick of the chunk's row 0
        self._delay = 0  # ticks from there to its arrival
        self._asked: int | None = None  # tick of the observation that is being inferred on
        self._newest = NO_STEERING
        self._asked_under = self._newest  # newest steering when that inference began
        self._flushed_at: int | None = None
        self._wanted: SteeringStamp | None = None  # steering that chunks must have, after a flush
        self._why: Hold = "nothing yet"
        self._counters: Counter[str] = Counter(
            dict.fromkeys(
                (
                    "chunks",
                    "late_chunks",
                    "outdated_chunks",
                    "trimmed_rows",
                    "replaced_rows",
                    "flushed_rows",
                    "holds",
                    "given_up",
                ),
                0,
            )
        )

    @property
    def tick(self) -> int:
        """The tick that `next` will answer."""
        return self._tick

    @property
    def counters(self) -> Mapping[str, int]:
        """Copy of what happened so far."""
        return dict(self._counters)

    @property
    def in_flight(self) -> bool:
        """Whether an inference is awaited."""
        return self._asked is not None

    @property
    def cancel_wanted(self) -> bool:
        """Whether the awaited inference began before a change of steering that is not to wait: a policy may stop it."""
        late = _older(self._asked_under, self._newest)
        return self._asked is not None and self.settings.on_steering != "wait" and late

    def due(self) -> bool:
        """Whether an inference should begin on an observation of this tick."""
        if self._asked is not None and self._tick - self._asked >= self.settings.patience:
            self._counters["given_up"] += 1
            self._asked = None
        if self._asked is not None:
            return False
        self._flush_outdated()
        planned = self._tick - self._first >= self.settings.replan_every
        return planned or self._row() is None or self._outdated()

    def begin(self) -> int:
        """An observation of this tick is being inferred on: returns its tick, which `offer` wants back."""
        self._asked, self._asked_under = self._tick, self._newest
        return self._tick

    def fail(self) -> None:
        """The inference ended without a chunk; another one is due."""
        self._asked = None

    def steering_changed(self, stamp: SteeringStamp) -> None:
        """The newest steering that commands have asked for; older ones are ignored."""
        if (stamp.epoch, stamp.sequence) > (self._newest.epoch, self._newest.sequence):
            self._newest = stamp
            self._flush_outdated()

    def offer(self, chunk: ActionChunk, observed: int) -> Arrival:
        """A chunk made from the observation of tick `observed`. Raises SteerError for another action space or shape."""
        if chunk.space != self.space or chunk.actions.ndim != 2 or chunk.actions.shape[1] != self.space.dims:
            raise SteerError(
                "action_space_mismatch",
                f"a chunk of {list(chunk.actions.shape)} in {chunk.space.kind} arrived: expected [T, {self.space.dims}] in "
                f"{self.space.kind}, as the queue was made for",
            )
        delay = self._tick - observed
        rows = len(chunk.actions) if self.settings.horizon is None else min(len(chunk.actions), self.settings.horizon)
        if observed != self._asked:
            return Arrival(delay, 0, "not asked for")
        self._asked = None
        self._counters["chunks"] += 1
        if self._wanted is not None and _older(chunk.steering, self._wanted):
            self._counters["outdated_chunks"] += 1
            return Arrival(delay, 0, "outdated")
        if delay >= rows:
            self._counters["late_chunks"] += 1
            return Arrival(delay, 0, "late")
        self._wanted = None
        self._counters["trimmed_rows"] += delay
        self._counters["replaced_rows"] += self._left()
        self._chunk, self._first, self._delay = chunk, observed, delay
        return Arrival(delay, rows - delay)

    def next(self) -> Tick:
        """The action of this tick; the following call is the next tick's."""
        self._flush_outdated()
        row, tick = self._row(), self._tick
        self._tick += 1
        if row is None or self._chunk is None:
            self._counters["holds"] += 1
            return Tick(tick, self._rest.copy(), self._why)
        action = np.asarray(self._chunk.actions[row], np.float32)
        # What a delta action leaves behind is the gripper; an absolute one is a pose to stay at.
        if self.space.kind == "joint_abs":
            self._rest = action.copy()
        else:
            self._rest[-1] = action[-1]
        return Tick(tick, action, "", row, self._chunk.inference_id, self._chunk.steering, self._delay)

    def reset(self) -> None:
        """A new episode: nothing is queued, awaited or flushed, and the gripper opens; counters and ticks go on."""
        self._chunk = self._asked = self._wanted = None
        self._why = "nothing yet"
        if self.space.kind != "joint_abs":
            self._rest[-1] = self.space.gripper_open

    def _rows(self) -> int:
        if self._chunk is None:
            return 0
        return min(len(self._chunk.actions), self.settings.horizon or len(self._chunk.actions))

    def _row(self) -> int | None:
        """Row of the present chunk that belongs to this tick."""
        if self._chunk is None:
            return None
        row = self._tick - self._first
        if row < self._rows():
            return row
        self._why = "used up" if row >= len(self._chunk.actions) else "stale"
        return None

    def _left(self) -> int:
        return max(0, self._first + self._rows() - self._tick) if self._chunk is not None else 0

    def _outdated(self) -> bool:
        """Whether the present rows were made under older steering than commands have asked for, and that matters."""
        if self._chunk is None or self.settings.on_steering == "wait":
            return False
        return _older(self._chunk.steering, self._newest)

    def _flush_outdated(self) -> None:
        if self.settings.on_steering != "flush" or not self._outdated():
            return
        if self._flushed_at is not None and self._tick - self._flushed_at < self.settings.replan_every:
            return
        self._counters["flushed_rows"] += self._left()
        self._flushed_at, self._wanted = self._tick, self._newest
        self._chunk, self._why = None, "flushed"


def _older(one: SteeringStamp, other: SteeringStamp) -> bool:
    return (one.epoch, one.sequence) < (other.epoch, other.sequence)
