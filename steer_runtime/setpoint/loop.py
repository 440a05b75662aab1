"""The closed loop: samples in, strengths out; meter, controller and limits put together.

Invariant: the strength moves only on a measurement; when there is none it stays as it is, and that is counted under the
reason. The same class runs offline in the simulator and beside a robot.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from steer_runtime.setpoint.controller import Controller
from steer_runtime.setpoint.limits import Limiter, StrengthLimits
from steer_runtime.setpoint.meter import Meter, Reading, Sample


@dataclass(frozen=True)
class Step:
    """What one update did. held: why the strength stayed as it was; "" when the controller moved it."""

    strength: float
    reading: Reading
    held: str


class SetPointLoop:
    """`see` every sample of the robot's state; `act` whenever a strength can be commanded."""

    def __init__(self, meter: Meter, controller: Controller, limits: StrengthLimits) -> None:
        self._meter, self._controller, self._limiter = meter, controller, Limiter(limits)
        self._counters: Counter[str] = Counter()
        self._begin()

    def _begin(self) -> None:
        self._reading = Reading(None, "nothing yet")
        self._seen_s: float | None = None
        self._acted_s: float | None = None

    @property
    def strength(self) -> float:
        """The strength in force."""
        return self._limiter.strength

    @property
    def counters(self) -> Mapping[str, int]:
        """updates, "held: <why>" and "limit: <which>" -> how often, since the loop was made."""
        return {**self._counters, **{f"limit: {name}": n for name, n in self._limiter.counters.items() if n}}

    @property
    def state(self) -> Mapping[str, float]:
        """The controller's memory."""
        return self._controller.state

    def reset(self) -> None:
        """Begin another episode: strength 0, nothing measured; counters go on."""
        self._meter.reset()
        self._controller.reset()
        self._limiter.reset()
        self._begin()

    def see(self, sample: Sample) -> Reading:
        """Measure one more state; the newest reading is what `act` uses."""
        reading = self._meter.add(sample)
        if reading.value is not None and not math.isfinite(reading.value):
            reading = replace(reading, value=None, why="not finite")
        self._reading = reading
        if math.isfinite(sample.time_s):
            self._seen_s = sample.time_s
        return reading

    def act(self) -> Step:
        """The strength from now on. Time is that of the samples; without a newer one nothing moves."""
        reading, now = self._reading, self._seen_s
        dt = 0.0 if now is None or self._acted_s is None else now - self._acted_s
        self._counters["updates"] += 1
        why = reading.why
        if reading.value is not None and dt <= 0:
            why = "first sample" if self._acted_s is None else "no newer sample"
        if now is not None:
            self._acted_s = now
        if why or reading.value is None:
            self._counters[f"held: {why}"] += 1
            if dt > 0:
                self._controller.update(None, dt)
            # No move, but a dose limit that has become tighter still holds.
            return Step(self._limiter.apply(self.strength, 0.0), reading, why)
        wanted = self._controller.update(reading.value, dt)
        strength = self._limiter.apply(wanted, dt)
        self._controller.applied(strength)
        return Step(strength, reading, "")

    def saw_dose(self, strength: float, dose: float) -> None:
        """Tell the dose limit what a strength did."""
        self._limiter.saw(strength, dose)
