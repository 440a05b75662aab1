"""Sensor messages of one robot session to observations, joined by equal header stamps.

Invariant: an observation is complete, of one moment, and newer than the one before; anything else is refused with a
reason or waits in a bounded number of unfinished frames.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from geometry_msgs.msg import PoseStamped
from sensor_msgs.msg import Image, JointState
from steer_msgs.msg import GripperCommand

from ros_nodes.convert import (
    RobotDescription,
    clean_text,
    gripper_from_msg,
    image_from_msg,
    joints_from_msg,
    ns_from_time,
    pose_from_msg,
)
from steer_runtime.errors import SteerError
from steer_runtime.types import Observation

MAX_UNFINISHED = 8
"""Frames that may be incomplete at once: more than a robot's sensors ever lag each other."""


class ObservationAssembler:
    """Joins images, joint states, the end-effector pose and, of a robot that tells them, gripper commands of one session.

    freeze_timeout_s: a camera whose bytes stay the same for longer is taken for frozen; 0 switches that off, as a
    renderer without noise repeats itself legitimately. Not thread-safe.
    """

    def __init__(
        self,
        description: RobotDescription,
        *,
        freeze_timeout_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description = description
        self.incomplete_frames = 0
        self._cameras = {camera.name: camera for camera in description.cameras}
        self._wanted = {*self._cameras, "joints", "pose", *(("gripper",) if description.tells_gripper else ())}
        self._freeze_timeout_s = freeze_timeout_s
        self._clock = clock
        self._instruction: str | None = None
        self._frame_id = 0
        self._frames: dict[int, dict[str, Any]] = {}
        self._newest: dict[str, int] = {}
        self._unchanged_since: dict[str, tuple[np.ndarray, float]] = {}

    def forget_stamps(self) -> None:
        """Accept the robot's clock anew, after it was set back."""
        self._newest.clear()
        self._frames.clear()

    def instruction(self, text: str) -> Observation | None:
        """What the robot is to do, for the observations from now on.

        Returns the newest frame that was whole but for it: a robot in lockstep shows no other before that is answered, and
        its repetitions are refused.
        """
        self._instruction = clean_text(text)
        whole = [stamp for stamp, frame in self._frames.items() if len(frame) == len(self._wanted)]
        return self._complete(max(whole), self._instruction) if whole else None

    def image(self, camera: str, message: Image) -> Observation | None:
        """Take an image. Returns an observation when it completes one. Raises SteerError for one that is refused."""
        stamp = self._fresh(camera, message)
        image = image_from_msg(message, self._cameras[camera])
        self._refuse_frozen(camera, image)
        return self._add(camera, stamp, image)

    def joints(self, message: JointState) -> Observation | None:
        """Take joint positions; as `image`."""
        stamp = self._fresh("joints", message)
        return self._add("joints", stamp, joints_from_msg(message, self.description.joint_names))

    def pose(self, message: PoseStamped) -> Observation | None:
        """Take the end-effector pose; as `image`."""
        stamp = self._fresh("pose", message)
        return self._add("pose", stamp, pose_from_msg(message))

    def gripper(self, message: GripperCommand) -> Observation | None:
        """Take the last gripper command of a robot whose description promises it; as `image`."""
        stamp = self._fresh("gripper", message)
        return self._add("gripper", stamp, gripper_from_msg(message))

    def _fresh(self, part: str, message: Any) -> int:
        stamp = ns_from_time(message.header.stamp)
        newest = self._newest.get(part, -1)
        if stamp == newest:
            raise SteerError("repeated_frame", f"{part} of stamp {stamp} came again; it is dropped")
        if stamp < newest:
            raise SteerError(
                "stamp_jumped_back",
                f"{part} is stamped {(newest - stamp) / 1e9:.3f} s before the one that came earlier; it is dropped",
            )
        self._newest[part] = stamp
        return stamp

    def _refuse_frozen(self, camera: str, image: np.ndarray) -> None:
        if self._freeze_timeout_s <= 0:
            return
        now = self._clock()
        last = self._unchanged_since.get(camera)
        if last is None or not np.array_equal(last[0], image):
            self._unchanged_since[camera] = (image, now)
        elif now - last[1] > self._freeze_timeout_s:
            raise SteerError(
                "frozen_camera",
                f"camera {camera!r} has shown the same picture for {now - last[1]:.1f} s; its frames are dropped",
            )

    def _add(self, part: str, stamp: int, value: Any) -> Observation | None:
        frame = self._frames.setdefault(stamp, {})
        frame[part] = value
        if len(frame) == len(self._wanted) and self._instruction is not None:
            return self._complete(stamp, self._instruction)
        while len(self._frames) > MAX_UNFINISHED:
            del self._frames[min(self._frames)]
            self.incomplete_frames += 1
        return None

    def _complete(self, stamp: int, instruction: str) -> Observation:
        older = [other for other in self._frames if other < stamp]
        self.incomplete_frames += len(older)
        frame = self._frames[stamp]
        for done in (*older, stamp):
            del self._frames[done]
        return self._observation(frame, stamp, instruction)

    def _observation(self, frame: dict[str, Any], stamp: int, instruction: str) -> Observation:
        self._frame_id += 1
        fingers = [frame["joints"][name] for name in self.description.gripper_joints]
        return Observation(
            images={name: frame[name] for name in self._cameras},
            state=np.concatenate([frame["pose"], fingers]),
            instruction=instruction,
            stamp_ns=stamp,
            frame_id=self._frame_id,
            gripper_command=frame.get("gripper"),
        )
