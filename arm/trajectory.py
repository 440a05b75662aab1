"""One short trajectory: on at one velocity for the lead time, then braking on the same line until at rest.

Invariant: it is a straight line in joint space whose speed never rises, so where it ends and how fast it is anywhere
follow from its beginning; braking earlier stays on that line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arm.port import JointMotion, Joints
from arm.settings import Motion


@dataclass(frozen=True)
class Stopping:
    """See the module. start [6] rad, velocity [6] rad/s; motion: its points after the start."""

    start: Joints
    velocity: Joints
    motion: JointMotion

    @property
    def end(self) -> Joints:
        """[6] rad: where it comes to rest."""
        return self.motion.positions[-1]

    def at(self, seconds: float) -> tuple[Joints, Joints]:
        """Position [6] and velocity [6] so long after it began, as a controller that joins the points by lines moves."""
        times, points = self.motion.times_s, self.motion.positions
        if seconds >= times[-1]:
            return points[-1], np.zeros_like(self.velocity)
        index = int(np.searchsorted(times, seconds, side="right"))
        begin_s, begin = (times[index - 1], points[index - 1]) if index else (0.0, self.start)
        speed = (points[index] - begin) / (times[index] - begin_s)
        return begin + speed * (max(seconds, 0.0) - begin_s), speed

    def since_step(self, seconds: float) -> float:
        """How long ago the speed last changed, so long after it began."""
        steps = self.motion.times_s[self.motion.times_s <= seconds]
        return seconds - float(steps[-1]) if len(steps) else seconds


def stopping(start: Joints, velocity: Joints, acceleration: Joints, motion: Motion) -> Stopping:
    """On from `start` at `velocity` for the lead, then by equal steps of speed to rest.

    n = ceil(max_i |v_i| / (a_i knot)) steps, each of v / n: no joint brakes harder than `acceleration` (rad/s^2 [6]).
    """
    steps = max(1, math.ceil(float(np.max(np.abs(velocity) / acceleration)) / motion.knot_s - 1e-9))
    parts = 1.0 - np.arange(1, steps + 1) / steps  # of the velocity, in each knot after the lead; the last one is 0
    times = motion.lead_s + motion.knot_s * np.arange(steps + 1, dtype=np.float64)
    way = np.concatenate([[motion.lead_s], motion.lead_s + motion.knot_s * np.cumsum(parts)])
    positions = start + way[:, None] * velocity
    # Floating-point: the last step has speed 0 and must not move by a rounding.
    positions[-1] = positions[-2]
    return Stopping(start, velocity, JointMotion(times, positions))


def approach(way: Joints, acceleration: Joints, motion: Motion) -> Joints:
    """Highest velocity [6] along a way [6] rad from which `stopping` ends at the way's end at the latest.

    With v = k way it runs k (lead + k m / 2) of the way, m = max_i |way_i| / a_i; set to 1 that is
    k = (sqrt(lead^2 + 2 m) - lead) / m, and 1 / lead as m goes to 0.
    """
    longest = float(np.max(np.abs(way) / acceleration))
    if longest < 1e-12:
        return np.zeros_like(way)
    lead = motion.lead_s
    # The same root in the form that loses no digits when m is small.
    return way * (2.0 / (math.sqrt(lead * lead + 2.0 * longest) + lead))


def towards(velocity: Joints, wanted: Joints, acceleration: Joints, seconds: float) -> NDArray[np.float64]:
    """The velocity after `seconds` of going over from one to another: along the straight line between them, no joint
    faster than its acceleration."""
    change = wanted - velocity
    needed = float(np.max(np.abs(change) / acceleration))
    return wanted if needed <= seconds else velocity + change * (seconds / needed)
