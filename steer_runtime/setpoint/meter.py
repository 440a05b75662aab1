"""Measured quantities from what any robot tells of itself: where its hand is, how far its gripper is open.

Invariant: a reading is a finite number or says why there is none; nothing here looks at a simulator's objects, so the
same meter runs beside a robot. Times are the robot's own clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Sample:
    """One state of the robot. position: float [3] of the hand, m. opening: between the fingers, m.

    closed: whether the gripper was last told to close; None when nobody knows.
    """

    time_s: float
    position: np.ndarray
    opening: float
    closed: bool | None = None

    @property
    def finite(self) -> bool:
        return bool(math.isfinite(self.time_s) and math.isfinite(self.opening) and np.isfinite(self.position).all())


@dataclass(frozen=True)
class Reading:
    """value: filtered, SI; None when nothing is measurable, and then `why` says so. raw: of this sample alone."""

    value: float | None
    why: str = ""
    raw: float | None = None


class Meter(Protocol):
    """Turns samples into readings of one quantity."""

    def add(self, sample: Sample) -> Reading: ...
    def reset(self) -> None: ...


@dataclass(frozen=True)
class MeterSettings:
    """time_constant_s: of the exponential average (a first-order low-pass: y += (1 - exp(-dt / T)) (raw - y)), which evens
    out the steps between chunks; about one fifth of the fastest change that should be followed.

    gripper_rate: of the opening, m/s, from which the gripper counts as moving. settle_s: for so long after it moved the
    hand is not measured: it stands still to grip. gap_s: samples further apart say nothing of what was between.
    lifted: height from which something gripped counts as carried, m. sideways: a carried thing's height counts while the
    hand's horizontal speed is at least this share of its speed, so lifting and lowering do not. still: speed below which
    the hand stands, by decision, which says nothing of its pace, m/s.
    """

    time_constant_s: float = 0.5
    gripper_rate: float = 0.03
    settle_s: float = 0.25
    gap_s: float = 1.0
    lifted: float = 0.02
    sideways: float = 0.7
    still: float = 0.02


class _Between:
    """What changed from the last good sample to this one, and whether the gripper rests; shared by the meters."""

    def __init__(self, settings: MeterSettings) -> None:
        self._settings = settings
        self.reset()

    def reset(self) -> None:
        self._last: Sample | None = None
        self._moved_s = -math.inf

    def take(self, sample: Sample) -> tuple[str, float, np.ndarray]:
        """(why nothing can be told or "", seconds, displacement [3])."""
        nothing = np.zeros(3)
        if not sample.finite:
            return "not finite", 0.0, nothing
        last, self._last = self._last, sample
        if last is None:
            return "first sample", 0.0, nothing
        dt = sample.time_s - last.time_s
        if dt <= 0:
            if dt < 0:
                self._moved_s = -math.inf
            return "clock does not advance", 0.0, nothing
        if abs(sample.opening - last.opening) / dt > self._settings.gripper_rate or (
            None not in (last.closed, sample.closed) and last.closed != sample.closed
        ):
            self._moved_s = sample.time_s
        if dt > self._settings.gap_s:
            return "gap between samples", dt, nothing
        if sample.time_s - self._moved_s < self._settings.settle_s:
            return "gripper moves", dt, sample.position - last.position
        return "", dt, sample.position - last.position


class _Average:
    """First-order low-pass over the measurable time: what is not measured leaves it as it is."""

    def __init__(self, time_constant_s: float) -> None:
        self._time_constant_s = time_constant_s
        self.value: float | None = None

    def add(self, raw: float, dt: float) -> float:
        share = 1.0 - math.exp(-dt / self._time_constant_s) if self._time_constant_s > 0 else 1.0
        self.value = raw if self.value is None else self.value + share * (raw - self.value)
        return self.value


class SpeedMeter:
    """Speed of the hand, m/s: way over time between samples, averaged; not while the gripper moves or the hand stands."""

    def __init__(self, settings: MeterSettings | None = None) -> None:
        self._settings = settings or MeterSettings()
        self._between = _Between(self._settings)
        self.reset()

    def reset(self) -> None:
        """Forget everything: another episode."""
        self._between.reset()
        self._average = _Average(self._settings.time_constant_s)

    def add(self, sample: Sample) -> Reading:
        """Take one more sample."""
        why, dt, way = self._between.take(sample)
        if why:
            return Reading(None, why)
        raw = float(np.linalg.norm(way)) / dt
        if raw < self._settings.still:
            return Reading(None, "hand stands still", raw)
        return Reading(self._average.add(raw, dt), raw=raw)


class HeightMeter:
    """Height of what is carried above where it was gripped, m: the hand's rise since the gripper closed on it.

    What is gripped moves with the hand, so nobody needs to see it. Measurable while something is between the closed
    fingers, off the ground, and goes sideways.
    """

    EMPTY = 0.003
    """Opening up to which closed fingers hold nothing, m."""

    def __init__(self, settings: MeterSettings | None = None) -> None:
        self._settings = settings or MeterSettings()
        self._between = _Between(self._settings)
        self.reset()

    def reset(self) -> None:
        """Forget everything: another episode."""
        self._between.reset()
        self._forget()
        self._was_closed = False

    def _forget(self) -> None:
        self._ground: float | None = None
        self._average = _Average(self._settings.time_constant_s)

    def add(self, sample: Sample) -> Reading:
        """Take one more sample."""
        why, dt, way = self._between.take(sample)
        if why == "not finite":
            return Reading(None, why)
        closed = bool(sample.closed)
        if not closed:
            self._forget()
        elif not self._was_closed or self._ground is None:
            self._ground = float(sample.position[2])
        self._was_closed = closed
        if sample.closed is None:
            return Reading(None, "gripper command unknown")
        if why and why != "gripper moves":
            return Reading(None, why)
        if not closed or self._ground is None or sample.opening <= self.EMPTY:
            return Reading(None, "nothing carried")
        if why:
            return Reading(None, why)
        raw = float(sample.position[2]) - self._ground
        if raw < self._settings.lifted:
            return Reading(None, "nothing carried", raw)
        moved = float(np.linalg.norm(way))
        if moved <= 0 or float(np.linalg.norm(way[:2])) < self._settings.sideways * moved:
            return Reading(None, "lifting or lowering", raw)
        return Reading(self._average.add(raw, dt), raw=raw)
