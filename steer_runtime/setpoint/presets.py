"""Controllers by name with gains that suit a quantity, for the command lines.

Invariant: a preset is a function of the target alone; every number in it can be given on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from steer_runtime.errors import SteerError, nearest
from steer_runtime.setpoint.controller import PID, Controller, Dithered, Gains
from steer_runtime.setpoint.limits import StrengthLimits
from steer_runtime.setpoint.loop import SetPointLoop
from steer_runtime.setpoint.meter import HeightMeter, Meter, MeterSettings, SpeedMeter
from steer_runtime.setpoint.target import Target


@dataclass(frozen=True)
class Tuning:
    """All of a controller but its target. deadband: as a share of the target. dither: half its width, in strength."""

    gains: Gains
    deadband: float = 0.0
    dither: float = 0.0
    dither_period_s: float = 0.8
    meter: MeterSettings = field(default_factory=MeterSettings)


GAINS: Mapping[str, Gains] = {
    "speed": Gains(proportional=4.0, integral=8.0, derivative=0.5),
    "height": Gains(proportional=2.0, integral=6.0, derivative=0.0),
}
"""Quantity -> gains. A strength of 1 moves the hand of pocket-libero by 0.04 to 0.06 m/s, and what it carries by up to
0.15 m, so the loop gain of the integral is 0.3 to 0.9 a second: slower than the meter's average."""
CONTROLLERS: Mapping[str, str] = {
    "pid": "PID as it stands",
    "deadband": "PID that rests while the error is within a tenth of the target",
    "dither": "PID with a triangle wave of 0.3 on the strength, for policies that act in steps",
}


def tuning(kind: str, quantity: str, gains: Gains | None = None) -> Tuning:
    """The tuning of a named controller. Raises SteerError('unknown_controller')."""
    if kind not in CONTROLLERS:
        raise SteerError("unknown_controller", f"controller {kind[:40]!r} is not known: {nearest(kind, CONTROLLERS)}")
    chosen = gains or GAINS[quantity]
    return Tuning(chosen, deadband=0.1 if kind == "deadband" else 0.0, dither=0.3 if kind == "dither" else 0.0)


def make_meter(target: Target, settings: MeterSettings | None = None) -> Meter:
    """The meter of a target: a hand counts as standing below a quarter of it at the most."""
    chosen = settings or MeterSettings()
    if target.quantity.name == "height":
        return HeightMeter(chosen)
    return SpeedMeter(replace(chosen, still=min(chosen.still, target.value / 4)))


def make_controller(target: Target, chosen: Tuning) -> Controller:
    """The controller of a tuning for a target."""
    pid = PID(target.value, chosen.gains, deadband=chosen.deadband * target.value)
    return Dithered(pid, chosen.dither, chosen.dither_period_s) if chosen.dither else pid


def make_loop(target: Target, chosen: Tuning, limits: StrengthLimits) -> SetPointLoop:
    """The loop that the command lines run."""
    return SetPointLoop(make_meter(target, chosen.meter), make_controller(target, chosen), limits)
