"""What the numbers of an action row ask of this arm.

Invariant: an action space that this arm would read differently from the checkpoint, or that is too fast for it, is
refused when the bridge is configured, before any motion.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from arm.kinematics import Pose, turn_by_angles, turn_by_vector
from arm.port import JOINT_NAMES, Joints
from arm.settings import ArmSettings
from steer_runtime.errors import SteerError
from steer_runtime.types import ActionSpace

FRAMES_YAW_RAD = {"base_link": 0.0, "base": 0.0, "ur_base": math.pi}
"""Frames of ee_delta, by their yaw in base_link. `base` is what robosuite and LIBERO call theirs: x forward, as ROS's
base_link. UR's controller gives the same name to a frame turned by 180 degrees: a checkpoint in that one says `ur_base`."""
TOOL_FRAME = "tool0"
"""Frame of ee_delta that moves with the tool."""

_HIGHEST_RATE_HZ = 100.0


class ActionReader:
    """Reads rows of one action space, float [dims], whose last number is the gripper's.

    motion_scale: the part of each delta that is executed. A LIBERO unit step is 0.05 m in 0.05 s, 1 m/s: with 0.2 of it
    the same motion takes five times as long. Absolute joints cannot be scaled.
    Raises SteerError('action_space_unfit').
    """

    def __init__(self, space: ActionSpace, settings: ArmSettings, motion_scale: float) -> None:
        self.space = space
        self.motion_scale = motion_scale
        _require_fit(space, settings, motion_scale)
        self.period_s = 1.0 / space.rate_hz
        yaw = FRAMES_YAW_RAD.get(space.frame, 0.0)
        self._frame = np.array([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])

    def check(self, row: NDArray[np.floating]) -> NDArray[np.float64]:
        """The row as float64 [dims]. Raises SteerError('bad_row') unless it is of that shape and finite."""
        values = np.asarray(row, np.float64)
        if values.shape != (self.space.dims,):
            raise SteerError(
                "bad_row", f"action row has shape {list(values.shape)}: expected [{self.space.dims}]; it is dropped"
            )
        if not np.isfinite(values).all():
            raise SteerError("bad_row", "action row holds NaN or infinite values; it is dropped")
        return values

    def clipped(self, row: NDArray[np.float64]) -> tuple[NDArray[np.float64], bool]:
        """A row of deltas shrunk as a whole into [-1, 1], and whether it had to be; absolute joints stay as they are."""
        largest = float(np.abs(row[:-1]).max())
        if self.space.kind == "joint_abs" or largest <= 1.0:
            return row, False
        return np.concatenate([row[:-1] / largest, row[-1:]]), True

    def pose(self, row: NDArray[np.float64], base: Pose, share: float = 1.0) -> Pose:
        """Of ee_delta: where `share` of the row leads from a pose."""
        space, part = self.space, share * self.motion_scale
        way = self._frame @ (row[:3] * space.position_scale_m * part)
        if space.rotation == "none":
            turn = np.array([1.0, 0.0, 0.0, 0.0])
        else:
            angles = row[3:6] * space.rotation_scale_rad * part
            # rpy of a part of a step is the part of each angle: for the small steps of an action that is the part of the turn.
            turn = turn_by_vector(self._frame @ angles) if space.rotation == "axis_angle" else self._rpy(angles)
        return base.moved(way, turn, in_tool=space.frame == TOOL_FRAME)

    def joints(self, row: NDArray[np.float64], base: Joints, share: float = 1.0) -> Joints:
        """Of joint_delta: where `share` of the row leads from joints [6] rad. Of joint_abs: the joints it names."""
        if self.space.kind == "joint_abs":
            return row[:-1] * self.space.rotation_scale_rad
        return base + row[:-1] * (self.space.rotation_scale_rad * self.motion_scale * share)

    def opening(self, row: NDArray[np.float64]) -> float:
        """Of the gripper, 0 closed to 1 open: (g - close) / (open - close), cut at both ends."""
        space = self.space
        return float(np.clip((row[-1] - space.gripper_close) / (space.gripper_open - space.gripper_close), 0.0, 1.0))

    def _rpy(self, angles: NDArray[np.float64]) -> NDArray[np.float64]:
        turn = turn_by_angles(angles)
        turn[1:] = self._frame @ turn[1:]
        return turn


def _require_fit(space: ActionSpace, settings: ArmSettings, motion_scale: float) -> None:
    def refuse(what: str) -> SteerError:
        return SteerError("action_space_unfit", f"the action space {what}")

    numbers = (
        space.position_scale_m,
        space.rotation_scale_rad,
        space.rate_hz,
        space.gripper_open,
        space.gripper_close,
        motion_scale,
    )
    if not all(math.isfinite(number) for number in numbers):
        raise refuse(f"has a number that is not finite: {numbers}; declare it anew")
    if not 0 < space.rate_hz <= _HIGHEST_RATE_HZ:
        raise refuse(f"has {space.rate_hz:g} rows a second: expected above 0 and at most {_HIGHEST_RATE_HZ:g}")
    if space.gripper_open == space.gripper_close:
        raise refuse(f"gives the open and the closed gripper the same number {space.gripper_open:g}")
    if not 0 < motion_scale <= 1:
        raise refuse(f"would be executed at motion_scale {motion_scale:g}: expected above 0 and at most 1")
    joints = len(JOINT_NAMES)
    if space.kind == "ee_delta":
        dims = 4 if space.rotation == "none" else 7
        known = (*FRAMES_YAW_RAD, TOOL_FRAME)
        if space.frame not in known:
            raise refuse(f"is in frame {space.frame!r}: this arm knows {', '.join(known)}")
        if not (space.position_scale_m > 0 and (space.rotation == "none" or space.rotation_scale_rad > 0)):
            raise refuse("has a position or rotation scale that is not above 0")
        speed = space.position_scale_m * motion_scale * space.rate_hz
        limit = settings.limits.tcp_speed_m_s
        what = "m/s"
    else:
        dims = joints + 1
        if space.rotation != "none":
            raise refuse(f"is of joints and has rotation {space.rotation!r}: expected 'none'")
        if not space.rotation_scale_rad > 0:
            raise refuse("has a rotation_scale_rad (rad of a joint at 1.0) that is not above 0")
        speed = space.rotation_scale_rad * motion_scale * space.rate_hz
        limit = max(settings.limits.joint_speed_rad_s)
        what = "rad/s"
    if space.dims != dims:
        raise refuse(
            f"has {space.dims} numbers a row: {space.kind} with rotation {space.rotation!r} on this arm has {dims}"
        )
    if space.kind == "joint_abs":
        if motion_scale != 1:
            raise refuse(f"is of absolute joints, which motion_scale {motion_scale:g} cannot slow down; set it to 1")
    elif speed > limit * (1 + 1e-9):
        raise refuse(
            f"moves at {speed:.3g} {what} with a row of 1.0 (motion_scale {motion_scale:g}), and this arm may at "
            f"{limit:g}; set motion_scale to {motion_scale * limit / speed:.3g} or less"
        )
