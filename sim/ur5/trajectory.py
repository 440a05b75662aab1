"""A joint trajectory as ros2_control's joint_trajectory_controller executes it.

Invariant: after the last point the arm is told to hold it, and never anything else until the next trajectory.

Between two points the position is the lowest polynomial that fits what both of them state (positions: linear, with
velocities: cubic, with accelerations: quintic), as the controller's `interpolation_method: splines` does. A new trajectory begins at the
measured state. A trajectory with a start time in the past is entered at the point where it would be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import BPoly

from steer_runtime.errors import SteerError

DIMS = 6


@dataclass(frozen=True)
class Trajectory:
    """times_s [n], from its start, increasing; positions [n, 6] rad; velocities, accelerations [n, 6] or None.

    Raises SteerError('bad_trajectory') for what the controller refuses: nothing, NaN, other shapes, times that do not
    increase, and a last point that still moves.
    """

    times_s: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray | None = None
    accelerations: np.ndarray | None = None

    def __post_init__(self) -> None:
        count = len(self.times_s)
        parts = [part for part in (self.positions, self.velocities, self.accelerations) if part is not None]
        if count == 0 or any(part.shape != (count, DIMS) for part in parts):
            raise SteerError(
                "bad_trajectory",
                f"trajectory has {count} times and parts of shapes {[part.shape for part in parts]}: expected at least one "
                f"time and [{max(count, 1)}, {DIMS}] each",
            )
        if not all(np.isfinite(part).all() for part in (self.times_s, *parts)):
            raise SteerError("bad_trajectory", "trajectory holds NaN or infinite numbers; it is not executed")
        if self.times_s[0] < 0 or (np.diff(self.times_s) <= 0).any():
            raise SteerError("bad_trajectory", "times of the trajectory's points do not increase from zero; order them")
        if self.velocities is not None and (np.abs(self.velocities[-1]) > 1e-6).any():
            raise SteerError("bad_trajectory", "the trajectory's last point still moves: let it end at rest")

    def derivatives(self, index: int) -> list[np.ndarray]:
        """Position, and velocity and acceleration where stated, of one point."""
        parts = [self.positions[index]]
        if self.velocities is not None:
            parts.append(self.velocities[index])
            if self.accelerations is not None:
                parts.append(self.accelerations[index])
        return parts


class TrajectoryController:
    """Follows one trajectory at a time, in its own time: half of the speed scaling makes it last twice as long."""

    def __init__(self, positions: np.ndarray) -> None:
        """positions [6] rad: what to hold until there is a trajectory."""
        self.hold(positions)

    def hold(self, positions: np.ndarray) -> None:
        """Drop the trajectory and hold these positions."""
        self._trajectory: Trajectory | None = None
        self._end = np.array(positions, np.float64)

    @property
    def done(self) -> bool:
        """Whether the last point is reached (or there was none)."""
        return self._trajectory is None

    def replace(
        self, trajectory: Trajectory, positions: np.ndarray, velocities: np.ndarray, begun_s: float = 0.0
    ) -> None:
        """Begin a trajectory at this measured state, whatever ran before.

        begun_s: how long ago it was to start, negative for one that is to start later.
        Raises SteerError('bad_trajectory') for one that would be over.
        """
        if trajectory.times_s[-1] < begun_s:
            raise SteerError(
                "bad_trajectory",
                f"the trajectory ended {begun_s - trajectory.times_s[-1]:.3f} s ago; send it sooner, or let it start now",
            )
        self._trajectory, self._time = trajectory, begun_s
        self._before = begun_s, [np.array(positions, np.float64), np.array(velocities, np.float64)]
        self._index = -2  # no segment yet: -1 is the one before the first point

    def sample(self, period_s: float, pace: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Go on by a period of the arm, `pace` times as much of the trajectory's; returns positions and velocities, [6]."""
        trajectory = self._trajectory
        if trajectory is None:
            return self._end, np.zeros(DIMS)
        self._time += pace * period_s
        if self._time >= trajectory.times_s[-1]:
            self.hold(trajectory.positions[-1])
            return self._end, np.zeros(DIMS)
        index = int(np.searchsorted(trajectory.times_s, self._time, side="right")) - 1
        if index != self._index:
            self._index = index
            self._segment, self._slope = self._between(trajectory, index)
        return self._segment(self._time), pace * self._slope(self._time)

    def _between(self, trajectory: Trajectory, index: int) -> tuple[BPoly, BPoly]:
        end_s, end = trajectory.times_s[index + 1], trajectory.derivatives(index + 1)
        if index >= 0:
            begin_s, begin = trajectory.times_s[index], trajectory.derivatives(index)
        else:
            begin_s, begin = self._before
            begin = [*begin, np.zeros(DIMS)]
        count = min(len(begin), len(end))
        segment = BPoly.from_derivatives([begin_s, end_s], [begin[:count], end[:count]])
        return segment, segment.derivative()
