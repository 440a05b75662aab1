"""Limits between a controller and the policy: range, slew and dose of the strength.

Invariant: no strength leaves here outside its range or above the dose limit as far as doses are known, and none moves
faster than the slew limit, except towards zero to get back under a limit that has become tighter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from steer_runtime.errors import SteerError

LEAST = 0.01
"""A dose at less strength than this says nothing of the dose at strength 1: it is rounding."""


@dataclass(frozen=True)
class StrengthLimits:
    """low, high: range of the strength, around 0: the calibrated range of the axis's two ends. slew_per_s: most change a second.

    dose: largest relative change of the residual stream; None: no limit. dose_per_strength: dose at strength 1 of the
    negative and the positive end as far as known beforehand; 0 for unknown, and then the strength stays within `trial`
    (at least LEAST) until a dose was seen. Doses are taken to grow in proportion to the strength (exact for `add`, and for `override`
    as long as the activations stay).
    """

    low: float = -1.0
    high: float = 1.0
    slew_per_s: float = 2.0
    dose: float | None = None
    dose_per_strength: tuple[float, float] = (0.0, 0.0)
    trial: float = 0.1

    def __post_init__(self) -> None:
        if not (
            math.isfinite(self.low) and math.isfinite(self.high) and self.low <= 0 <= self.high and self.low < self.high
        ):
            raise SteerError(
                "bad_range",
                f"a range of strength from {self.low:g} to {self.high:g} is not usable: expected finite numbers around 0",
            )
        if not (math.isfinite(self.slew_per_s) and self.slew_per_s > 0):
            raise SteerError(
                "bad_slew", f"a slew limit of {self.slew_per_s:g} a second is not usable: expected above 0"
            )
        if self.dose is not None and not (math.isfinite(self.dose) and self.dose > 0):
            raise SteerError(
                "bad_dose", f"a dose limit of {self.dose:g} is not usable: expected a finite number above 0"
            )
        if not all(math.isfinite(d) and d >= 0 for d in self.dose_per_strength) or not LEAST <= self.trial <= 1:
            raise SteerError(
                "bad_dose",
                f"doses {self.dose_per_strength} at strength 1 and trial strength {self.trial:g} are not usable: expected "
                f"doses of at least 0 and a trial in [{LEAST:g}, 1]",
            )


class Limiter:
    """Applies `StrengthLimits`; counts which of them acted."""

    def __init__(self, limits: StrengthLimits) -> None:
        self._limits = limits
        self._per_strength = dict(zip((-1, 1), limits.dose_per_strength, strict=True))
        self._counters: Counter[str] = Counter()
        self.strength = 0.0

    @property
    def counters(self) -> Mapping[str, int]:
        """limit ("range", "slew", "dose", "dose_exceeded") -> how often it acted."""
        return dict(self._counters)

    def reset(self) -> None:
        """Back to strength 0, as for another episode; doses seen stay known."""
        self.strength = 0.0

    def apply(self, wanted: float, dt: float) -> float:
        """The strength to apply now, dt seconds after the last. Raises SteerError('not_finite')."""
        if not (math.isfinite(wanted) and math.isfinite(dt) and dt >= 0):
            raise SteerError("not_finite", f"strength {wanted} after {dt} s was wanted: expected finite numbers")
        limits = self._limits
        strength = min(max(wanted, limits.low), limits.high)
        self._counters["range"] += int(strength != wanted)
        low, high = -self._most(-1), self._most(1)
        self._counters["dose"] += not low <= strength <= high
        strength = min(max(strength, low), high)
        step = limits.slew_per_s * dt
        slewed = min(max(strength, self.strength - step), self.strength + step)
        self._counters["slew"] += slewed != strength
        # A limit that has become tighter holds at once.
        self.strength = min(max(slewed, low), high)
        return self.strength

    def saw(self, strength: float, dose: float) -> None:
        """A dose that was measured at a strength; the largest one a strength counts."""
        if not math.isfinite(dose) or dose < 0:
            raise SteerError("not_finite", f"a dose of {dose} was measured: expected a finite number of at least 0")
        if abs(strength) >= LEAST:
            end = -1 if strength < 0 else 1
            self._per_strength[end] = max(self._per_strength[end], dose / abs(strength))
        if self._limits.dose is not None and dose > self._limits.dose * (1 + 1e-6):
            self._counters["dose_exceeded"] += 1

    def _most(self, end: int) -> float:
        """Largest strength of one end that the dose limit allows."""
        limits, known = self._limits, self._per_strength[end]
        if limits.dose is None:
            return math.inf
        return limits.dose / known if known > 0 else limits.trial
