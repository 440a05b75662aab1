"""Controllers: from a measured quantity to the strength that should bring it to its target.

Invariant: a controller never invents a measurement: without one it returns the strength it had; NaN is refused. What was
really applied, after every limit on the way to the policy, is told back to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from steer_runtime.errors import SteerError


class Controller(Protocol):
    """What moves a strength. Anything with these four can take the place of `PID` (see docs/hold.md)."""

    @property
    def state(self) -> Mapping[str, float]:
        """What it remembers, by name, for people and traces."""

    def update(self, measured: float | None, dt: float) -> float:
        """The strength wanted now. measured: SI units, None when nothing is measurable. dt: seconds since the last call."""

    def applied(self, strength: float) -> None:
        """The strength that was applied after `update`, when limits made another one of it."""

    def reset(self) -> None:
        """Begin anew, as for another episode."""


@dataclass(frozen=True)
class Gains:
    """proportional: strength a unit of error; integral: the same a second; derivative: times seconds.

    A unit is SI (m/s or m). Negative gains are for an axis whose positive end lowers the quantity.
    derivative_filter_s: time constant of the low-pass on the derivative. tracking_s: time constant with which the
    integral follows what was applied (anti-windup); infinite: none.
    """

    proportional: float
    integral: float
    derivative: float = 0.0
    derivative_filter_s: float = 0.5
    tracking_s: float = 0.5

    def __post_init__(self) -> None:
        numbers = (self.proportional, self.integral, self.derivative)
        if not all(math.isfinite(g) for g in numbers) or not any(numbers):
            raise SteerError(
                "bad_gains", f"gains {numbers} are not usable: expected finite numbers, not all of them zero"
            )
        # NaN fails as well.
        if not self.derivative_filter_s >= 0 or not self.tracking_s > 0:
            raise SteerError(
                "bad_gains",
                f"time constants {self.derivative_filter_s:g} and {self.tracking_s:g} s are not usable: expected at least 0, "
                "and above 0 for tracking",
            )


class PID:
    """Discrete PID in position form with derivative on the measurement and back-calculation against windup.

    With error e = target - y, at every update (Astrom and Haegglund, Advanced PID Control, 2006, chapter 13; windup:
    section 3.5; Astrom and Murray, Feedback Systems, section 11.4):

        I += ki e dt                                       (backward Euler)
        d += dt / (Tf + dt) ((y - y_last) / dt - d)        (filtered; of y, so that a new target does not kick)
        wanted = rest + kp e + I - kd d
        I += min(1, dt / Tt) (applied - wanted)            (back-calculation, whichever limit it was: range, slew, dose)

    deadband: errors up to it count as none, so that the strength rests there. rest: the strength without any error.
    """

    def __init__(self, target: float, gains: Gains, *, rest: float = 0.0, deadband: float = 0.0) -> None:
        if not (math.isfinite(target) and math.isfinite(rest) and deadband >= 0 and math.isfinite(deadband)):
            raise SteerError(
                "not_finite",
                f"target {target}, rest {rest} and deadband {deadband} are not usable: expected finite numbers, the deadband "
                "at least 0",
            )
        self._target, self._gains, self._rest, self._deadband = target, gains, rest, deadband
        self.reset()

    def reset(self) -> None:
        """Begin anew at rest."""
        self._integral = self._rate = self._error = 0.0
        self._last: float | None = None
        self._wanted = self._applied = self._rest
        self._tracked_dt: float | None = None

    @property
    def state(self) -> Mapping[str, float]:
        """error, integral, rate (of the measurement a second), wanted and applied strength."""
        return {
            "error": self._error,
            "integral": self._integral,
            "rate": self._rate,
            "wanted": self._wanted,
            "applied": self._applied,
        }

    def update(self, measured: float | None, dt: float) -> float:
        """See the class. Raises SteerError('not_finite') for NaN or infinity, ('bad_dt') for a dt that is not above 0."""
        require_usable(measured, dt)
        if measured is None:
            # The next measurement is of another moment: their difference is no derivative.
            self._last, self._rate, self._tracked_dt = None, 0.0, None
            return self._applied
        gains = self._gains
        error = self._target - measured
        self._error = 0.0 if abs(error) <= self._deadband else error
        if self._last is not None:
            self._rate += dt / (gains.derivative_filter_s + dt) * ((measured - self._last) / dt - self._rate)
        self._last = measured
        self._integral += gains.integral * self._error * dt
        self._wanted = self._rest + gains.proportional * self._error + self._integral - gains.derivative * self._rate
        self._applied, self._tracked_dt = self._wanted, dt
        return self._wanted

    def applied(self, strength: float) -> None:
        """Draw the integral to what was applied; only once an update."""
        self._applied = strength
        if self._tracked_dt is None or math.isinf(self._gains.tracking_s):
            return
        self._integral += min(1.0, self._tracked_dt / self._gains.tracking_s) * (strength - self._wanted)
        self._tracked_dt = None


class Dithered:
    """Another controller with a triangle wave on its strength, against a plant that acts in steps.

    A policy that acts by the words it says climbs a stair as the strength rises. Dither that is faster than the plant and
    as wide as a tread makes the mean response follow the strength again: the mean of a step function over evenly spread
    inputs is a ramp (Zames and Shneydor 1976, Dither in nonlinear systems). amplitude: half its width, in strength.
    The wave stands still while nothing is measurable.
    """

    def __init__(self, inner: Controller, amplitude: float, period_s: float) -> None:
        if not (math.isfinite(amplitude) and amplitude >= 0 and math.isfinite(period_s) and period_s > 0):
            raise SteerError(
                "bad_dither",
                f"a dither of {amplitude:g} every {period_s:g} s is not usable: expected finite numbers, the period above 0",
            )
        self._inner, self._amplitude, self._period_s = inner, amplitude, period_s
        self._phase_s = self._added = 0.0

    def reset(self) -> None:
        """Begin anew, in phase."""
        self._inner.reset()
        self._phase_s = self._added = 0.0

    @property
    def state(self) -> Mapping[str, float]:
        """That of the inner controller, and the dither added last."""
        return {**self._inner.state, "dither": self._added}

    def update(self, measured: float | None, dt: float) -> float:
        """The inner strength plus the wave."""
        wanted = self._inner.update(measured, dt)
        if measured is not None:
            self._phase_s = math.fmod(self._phase_s + dt, self._period_s)
            turn = self._phase_s / self._period_s
            self._added = self._amplitude * (1.0 - 4.0 * abs(turn - 0.5))
        return wanted + self._added

    def applied(self, strength: float) -> None:
        """What was applied without the wave is what the inner controller is told."""
        self._inner.applied(strength - self._added)


def require_usable(measured: float | None, dt: float) -> None:
    """Refuse what no controller can use. Raises SteerError('not_finite'), ('bad_dt')."""
    if not (math.isfinite(dt) and dt > 0):
        raise SteerError("bad_dt", f"{dt} s passed since the last update: expected a finite time above 0")
    if measured is not None and not math.isfinite(measured):
        raise SteerError(
            "not_finite", f"the measurement is {measured}: expected a finite number, or None when nothing is measurable"
        )
