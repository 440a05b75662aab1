"""How much of a wanted motion is allowed: one share for all joints, and the name of what took the rest.

Invariant: a motion is only ever shrunk as a whole, so its direction in joint space is what was asked for.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from arm.kinematics import Kinematics, Pose
from arm.port import Joints
from arm.settings import ArmSettings

Code = Literal[
    "",
    "joint_speed",
    "tcp_speed",
    "tcp_turn",
    "joint_range",
    "workspace",
    "singularity_slow",
    "singularity_stop",
    "self_collision",
    "table",
]
"""What limited a motion; "" nothing did."""

_WHOLE = 1.0 - 1e-9


class SpeedLimits:
    """Ceilings that motion is planned with: shares of the settings', so that late messages do not take the arm past those."""

    def __init__(self, settings: ArmSettings) -> None:
        limits, motion = settings.limits, settings.motion
        share = motion.headroom
        self.joint_speed = np.array(limits.joint_speed_rad_s) * share
        self.joint_acceleration = np.array(limits.joint_acceleration_rad_s2) * motion.acceleration_share
        self.tcp_speed = limits.tcp_speed_m_s * share
        self.tcp_turn = limits.tcp_turn_rad_s * share

    def share(self, velocity: Joints, jacobian: NDArray[np.float64]) -> tuple[float, Code]:
        """Largest s in (0, 1] so that s * velocity (rad/s [6]) keeps every speed limit at a pose's Jacobian [6, 6]."""
        twist = jacobian @ velocity
        wanted: tuple[tuple[float, Code], ...] = (
            (float(np.max(np.abs(velocity) / self.joint_speed)), "joint_speed"),
            (float(np.linalg.norm(twist[:3])) / self.tcp_speed, "tcp_speed"),
            (float(np.linalg.norm(twist[3:])) / self.tcp_turn, "tcp_turn"),
        )
        excess, code = max(wanted)
        return (1.0, "") if excess <= 1.0 else (1.0 / excess, code)


class PlaceLimits:
    """Where joints and tool may be."""

    def __init__(self, settings: ArmSettings, kinematics: Kinematics) -> None:
        limits = settings.limits
        self._kinematics = kinematics
        self.lowest = np.array(limits.joint_lowest_rad) + limits.joint_margin_rad
        self.highest = np.array(limits.joint_highest_rad) - limits.joint_margin_rad
        self.box = np.array(settings.workspace.lowest_m), np.array(settings.workspace.highest_m)
        self._slow, self._stop = limits.condition_slow, limits.condition_stop
        self._clearance = limits.clearance_m

    def broken(self, joints: Joints, coming_from: NDArray[np.float64] | None = None) -> Code:
        """The first limit that a standing arm would break at these joints [6] rad.

        coming_from [3] m: where the TCP is. From outside the workspace it may go anywhere that is no further out.
        """
        if (joints < self.lowest).any() or (joints > self.highest).any():
            return "joint_range"
        position = self._kinematics.pose(joints).position
        lowest, highest = self.box
        if coming_from is not None:
            lowest, highest = np.minimum(lowest, coming_from), np.maximum(highest, coming_from)
        if (position < lowest).any() or (position > highest).any():
            return "workspace"
        links, table = self._kinematics.clearance(joints)
        if links < self._clearance:
            return "self_collision"
        return "table" if table < self._clearance else ""

    def outside(self, position: NDArray[np.float64]) -> float:
        """How far a position [3] m of the TCP is outside the workspace, along the axis where it is furthest; 0 inside."""
        return float(max(0.0, (self.box[0] - position).max(), (position - self.box[1]).max()))

    def share_of_way(self, start: Pose, end: Pose) -> tuple[float, Code]:
        """Largest part of the straight way of the TCP that stays in the workspace."""
        part = _part_inside(start.position, end.position, *self.box)
        return (part, "workspace") if part < _WHOLE else (1.0, "")

    def share_of_turn(self, start: Joints, end: Joints) -> tuple[float, Code]:
        """Largest part of a straight way of the joints that stays in their ranges."""
        part = _part_inside(start, end, self.lowest, self.highest)
        return (part, "joint_range") if part < _WHOLE else (1.0, "")

    def share_of_condition(self, start: Joints, end: Joints) -> tuple[float, Code]:
        """Part of a step towards a singularity: 1 up to the slow-down, falling to 0 at the stop; 1 away from it.

        (stop - c) / (stop - slow), with c the condition number at the step's end.
        """
        after = self._kinematics.condition(end)
        if after <= self._slow or after <= self._kinematics.condition(start):
            return 1.0, ""
        if after >= self._stop:
            return 0.0, "singularity_stop"
        return (self._stop - after) / (self._stop - self._slow), "singularity_slow"


def _part_inside(
    start: NDArray[np.float64], end: NDArray[np.float64], lowest: NDArray[np.float64], highest: NDArray[np.float64]
) -> float:
    """Largest part of the way from start to end that stays in a box; from outside it may only lead inwards."""
    way = end - start
    with np.errstate(divide="ignore", invalid="ignore"):
        up = np.where(way > 0, np.maximum(highest - start, 0.0) / way, np.inf)
        down = np.where(way < 0, np.maximum(start - lowest, 0.0) / -way, np.inf)
    return float(min(1.0, up.min(), down.min()))
