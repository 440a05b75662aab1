"""Plants whose answers are known, and a loop around them without meters or limits of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from steer_runtime.setpoint.controller import Controller
from steer_runtime.setpoint.limits import Limiter

DT = 0.2


@dataclass
class FirstOrder:
    """y' = (gain u - y) / time_constant, exactly sampled; `static` turns the strength into what drives it."""

    gain: float = 0.05
    time_constant: float = 0.5
    rest: float = 0.14
    static: Callable[[float], float] = field(default=lambda u: u)
    y: float = 0.14

    def step(self, strength: float, dt: float) -> float:
        towards = self.rest + self.gain * self.static(strength)
        self.y += (1 - math.exp(-dt / self.time_constant)) * (towards - self.y)
        return self.y


def stair(strength: float) -> float:
    """Five words along the strength, as a policy that says its pace has them: thresholds at +-0.3 and +-0.7."""
    return float(
        np.select([strength < -0.7, strength < -0.3, strength <= 0.3, strength <= 0.7], [-1, -0.6, 0, 0.6], 1.0)
    )


def run(
    plant: FirstOrder,
    controller: Controller,
    limiter: Limiter,
    seconds: float,
    *,
    filter_s: float = 0.0,
    delay: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """(what the plant did, strength), float [seconds / DT] each.

    filter_s: time constant of the meter's average. delay: updates until a strength acts, as of chunks under way.
    """
    measured, strengths = [], []
    seen, waiting = plant.y, [limiter.strength] * delay
    for _ in range(round(seconds / DT)):
        strength = limiter.apply(controller.update(seen, DT), DT)
        controller.applied(strength)
        strengths.append(strength)
        waiting.append(strength)
        y = plant.step(waiting.pop(0), DT)
        seen += (1 - math.exp(-DT / filter_s) if filter_s else 1.0) * (y - seen)
        measured.append(y)
    return np.array(measured), np.array(strengths)
