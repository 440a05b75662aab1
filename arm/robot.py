"""An arm as a robot in function calls, for whatever asks robots to reset and step: action rows in, frames out.

Invariant: a step hands one row, or a hold, to the motion core and returns at once with the newest measurement; it is the
core's own tick that moves the arm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arm.motion import MotionCore
from arm.port import JOINT_NAMES, ArmPort, ArmState
from steer_runtime.errors import SteerError
from steer_runtime.types import ActionSpace

FINGER_NAMES = ("gripper_left_finger", "gripper_right_finger")
FINGER_M = 0.0425
"""Of a 2F-85: how far each finger is from the middle when open (85 mm between them)."""


@dataclass(frozen=True)
class ArmFrame:
    """One moment of the arm.

    images: camera name -> uint8 RGB [H, W, 3]; a camera that has nothing fresh is missing. joint_positions [8]: six
    joints (rad), two fingers (m, from the middle, the right one negative). eef_position [3] m, eef_quaternion [4]
    (x, y, z, w): of the TCP in base_link, or as the StateFrame says. gripper_qpos [2]: the fingers.
    """

    images: Mapping[str, np.ndarray]
    joint_positions: np.ndarray
    eef_position: np.ndarray
    eef_quaternion: np.ndarray
    gripper_qpos: np.ndarray
    instruction: str
    step: int
    joint_names: tuple[str, ...] = (*JOINT_NAMES, *FINGER_NAMES)
    success: bool = False
    done: bool = False


@dataclass(frozen=True)
class StateFrame:
    """How the state that a policy was trained with names the tool's pose; axes are parallel to base_link's.

    offset_m [3]: where base_link is in the policy's frame. tool_yaw_rad: turn from the TCP's axes to those of the
    policy's hand, about the TCP's z.
    """

    offset_m: tuple[float, float, float] = (0.0, 0.0, 0.0)
    tool_yaw_rad: float = 0.0

    def pose(
        self, position: NDArray[np.float64], quaternion: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Position [3] and quaternion [4] (x, y, z, w) in base_link -> the same of the policy: q q_z(yaw).

        Of q and -q the one whose largest number is positive: a policy that reads axis times angle tells them apart.
        """
        x, y, z, w = quaternion
        sine, cosine = np.sin(self.tool_yaw_rad / 2), np.cos(self.tool_yaw_rad / 2)
        turned = np.array(
            [x * cosine + y * sine, y * cosine - x * sine, z * cosine + w * sine, w * cosine - z * sine], np.float64
        )
        sign = 1.0 if turned[np.abs(turned).argmax()] > 0 else -1.0
        return position + np.array(self.offset_m), sign * turned


class ArmRobot:
    """See the module. cameras: the newest fresh pictures, by name."""

    def __init__(
        self,
        core: MotionCore,
        port: ArmPort,
        cameras: Callable[[], Mapping[str, np.ndarray]],
        instruction: str,
        clock: Callable[[], float] = time.monotonic,
        state_frame: StateFrame = StateFrame(),
    ) -> None:
        self._state_frame = state_frame
        self._core, self._port, self._cameras = core, port, cameras
        self._instruction, self._clock = instruction, clock
        self._step = 0

    @property
    def action_space(self) -> ActionSpace:
        """Of the rows that it is stepped with."""
        return self._core.reader.space

    def resting(self) -> np.ndarray:
        """Float32 [dims]: the row that stays where the arm is; deltas of zero, or its joints."""
        space = self.action_space
        row = np.zeros(space.dims, np.float32)
        state = self._port.read()
        if space.kind == "joint_abs" and state is not None:
            row[:-1] = state.positions / space.rotation_scale_rad
        row[-1] = space.gripper_open
        return row

    def reset(self) -> ArmFrame:
        """Begin anew where the arm is. Raises SteerError('no_state')."""
        self._step = 0
        return self._frame(self._core.hold)

    def step(self, action: np.ndarray, /, *, draw: bool = True) -> ArmFrame:
        """One control step. A row that the core drops is a hold. Raises SteerError as the core does."""
        self._step += 1
        return self._frame(lambda now_s: self._core.accept(action, now_s), draw)

    def hold(self, *, draw: bool = True) -> ArmFrame:
        """One control step without an action."""
        self._step += 1
        return self._frame(self._core.hold, draw)

    def close(self) -> None:
        """Come to rest."""
        self._core.disarm(self._clock())

    def _frame(self, act: Callable[[float], None], draw: bool = True) -> ArmFrame:
        act(self._clock())
        state = self._port.read()
        if state is None:
            raise SteerError("no_state", "the arm has not told its whole state yet: is the driver running?")
        return self._shown(state, self._cameras() if draw else {})

    def _shown(self, state: ArmState, images: Mapping[str, np.ndarray]) -> ArmFrame:
        opening = 1.0 if state.gripper is None else state.gripper
        fingers = np.array([FINGER_M * opening, -FINGER_M * opening])
        position, quaternion = self._state_frame.pose(state.tcp_position, state.tcp_quaternion)
        return ArmFrame(
            images=images,
            joint_positions=np.concatenate([state.positions, fingers]),
            eef_position=position,
            eef_quaternion=quaternion,
            gripper_qpos=fingers,
            instruction=self._instruction,
            step=self._step,
        )
