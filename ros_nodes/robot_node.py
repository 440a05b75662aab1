"""A robot that is stepped by function calls, as a ROS node: frames out, actions of one policy in.

Invariants: nothing moves except by a row of a chunk that was checked in full and came from the one policy that holds
the lease; without one the robot gets zero motion, its gripper as it was, and the hold is counted; the status names the
chunk, row and steering of every step. The robot is made, stepped and ended in the thread that spins the node.
"""

from __future__ import annotations

import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from geometry_msgs.msg import PoseStamped
from rclpy.clock import Clock, ClockType
from rclpy.duration import Duration
from rclpy.node import Node
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Header, String
from steer_msgs.msg import ActionChunk as ActionChunkMsg
from steer_msgs.msg import EpisodeStatus
from steer_msgs.msg import GripperCommand as GripperCommandMsg
from steer_msgs.msg import RobotDescription as RobotDescriptionMsg
from steer_msgs.msg import SteeringVerdict as SteeringVerdictMsg

from ros_nodes.convert import (
    Camera,
    RobotDescription,
    chunk_from_msg,
    clean_text,
    description_to_msg,
    image_to_msg,
    joints_to_msg,
    ns_from_time,
    pose_to_msg,
    time_from_ns,
)
from ros_nodes.diagnosis import OK, WARN, Diagnosis, Health
from ros_nodes.guard import Complaints, guarded
from ros_nodes.parameters import declare, parameter
from ros_nodes.qos import ACTION, LATCHED, SENSOR, STATUS, VERDICT
from ros_nodes.status import Executed, RobotStatus, status_to_msg
from steer_runtime.chunk_queue import ON_STEERING, ChunkQueue, Hold, QueueSettings, Tick
from steer_runtime.errors import SteerError
from steer_runtime.types import ActionChunk, ActionSpace, SteeringStamp

WAIT_TICK_S = 0.02
"""How often the lockstep robot looks at its timeout; actions wake it by themselves."""
REPEAT_S = 1.0
"""A first frame nobody has answered is published again, for a policy that comes late."""


class Frame(Protocol):
    """What a robot shows after a control step; see sim.libero_robot.RobotFrame for shapes and units."""

    @property
    def images(self) -> Mapping[str, np.ndarray]: ...
    @property
    def joint_names(self) -> tuple[str, ...]: ...
    @property
    def joint_positions(self) -> np.ndarray: ...
    @property
    def eef_position(self) -> np.ndarray: ...
    @property
    def eef_quaternion(self) -> np.ndarray: ...
    @property
    def gripper_qpos(self) -> np.ndarray: ...
    @property
    def instruction(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def success(self) -> bool: ...
    @property
    def done(self) -> bool: ...


class Robot(Protocol):
    """A robot in function calls."""

    @property
    def action_space(self) -> ActionSpace: ...
    def reset(self) -> Frame: ...
    def step(self, action: np.ndarray, /, *, draw: bool = True) -> Frame:
        """draw: False allows a frame without images; nobody is shown it."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class RobotParameters:
    """Parameters of every robot node."""

    mode: str = parameter(
        "lockstep",
        "lockstep: wait for the answer to each frame; free: run on the wall clock",
        choices=("lockstep", "free"),
    )
    replan_steps: int = parameter(
        0,
        "lockstep: rows of a chunk to execute before the next frame, 0 is the whole chunk; free: control steps from the "
        "frame of one chunk to that of the next, while the rows of the last one go on, each at its own step; 0 shows a "
        "frame in every step, and a chunk begins with its first row whenever it comes",
        low=0,
        high=100,
    )
    on_steering: str = parameter(
        "wait",
        "what an accepted command does to the rows that wait (free, with replan_steps): wait: nothing; replan: the next "
        "frame is shown at once; flush: so, and they are dropped",
        choices=ON_STEERING,
    )
    rate_hz: float = parameter(20.0, "control steps a second on the wall clock (free)", low=0.1, high=1000.0)
    action_timeout_s: float = parameter(
        10.0, "wait for the answer to a frame, then hold (lockstep)", low=0.01, high=600.0
    )
    max_action_age_s: float = parameter(2.0, "a chunk made from an older frame is refused (free)", low=0.01, high=60.0)
    owner_timeout_s: float = parameter(
        10.0, "silence after which another policy may act; more than its longest inference", low=0.1, high=600.0
    )
    episodes: int = parameter(
        0, "episodes to run before the process ends; 0 runs until it is ended", low=0, high=100000
    )


@dataclass
class _Chunk:
    """A chunk being executed row by row."""

    chunk: ActionChunk
    received_s: float
    delay: int
    next_row: int = 0


class RobotNode(Node):
    """See the module. `make` builds the robot once, in the spinning thread; name and robot name the node and its kind."""

    parameters: type[RobotParameters] = RobotParameters
    pose_frame = "world"
    """Frame of `eef_pose`."""

    def __init__(self, name: str, robot: str, make: Callable[[], Robot], **node_options: Any) -> None:
        """Declare parameters and topics. Raises SteerError('bad_parameter')."""
        super().__init__(name, **{"namespace": "/steer", **node_options})
        self.exit_code: int | None = None
        self.interruptible = True
        self.complaints = Complaints(self)
        self.session_id = uuid.uuid4().hex
        self._settings = declare(self, self.parameters)
        self._kind, self._make = robot, make
        self._robot: Robot | None = None
        self._frame: Frame | None = None
        self._stamp_ns = 0
        self._published_s = 0.0
        self._episode = 0
        self._hold_steps = self._steps = 0
        self._started = False
        self._owner: tuple[str, float] | None = None
        self._chunk: _Chunk | None = None
        self._queue: ChunkQueue | None = None
        self._asked: tuple[int, int] | None = None  # stamp and tick of the frame that the queue waits for
        self._steering_epoch: int | None = None  # engine session that the last chunk came from
        self._gripper = 0.0
        self._last = Executed("nothing yet")
        # A chunk for a frame shown longer ago than this is refused for its age.
        self._shown: deque[int] = deque(maxlen=4096)

        self._image_pubs: dict[str, Any] = {}
        self._joints_pub = self.create_publisher(JointState, "joint_states", SENSOR)
        self._gripper_pub = self.create_publisher(JointState, "gripper_state", SENSOR)
        self._command_pub = self.create_publisher(GripperCommandMsg, "gripper_command", SENSOR)
        self._pose_pub = self.create_publisher(PoseStamped, "eef_pose", SENSOR)
        self._instruction_pub = self.create_publisher(String, "instruction", LATCHED)
        self._description_pub = self.create_publisher(RobotDescriptionMsg, "robot_description", LATCHED)
        self._episode_pub = self.create_publisher(EpisodeStatus, "episode", STATUS)
        self.create_subscription(ActionChunkMsg, "actions", self._on_actions, ACTION)
        free = self._settings.mode == "free"
        if free and self._settings.replan_steps and self._settings.on_steering != "wait":
            self.create_subscription(SteeringVerdictMsg, "verdict", self._on_verdict, VERDICT)
        # Not simulated time, which may stand still or jump under a robot that moves.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(1.0 / self._settings.rate_hz if free else WAIT_TICK_S, self._tick, clock=steady)
        Diagnosis(self, self.complaints, "robot", self.health)

    def health(self) -> Health:
        """How it does, for /diagnostics; robots with more to tell add to it."""
        now = time.monotonic()
        step = 0 if self._frame is None else self._frame.step
        values = {
            "mode": self._settings.mode,
            "session": self.session_id,
            "episode": self._episode + 1,
            "step": step,
            "held": self._last.held,
            "inference": self._last.inference_id,
            "steering_sequence": self._last.steering.sequence,
            "frame_age_s": now - self._published_s if self._published_s else math.inf,
            "policy": "" if self._owner is None else self._owner[0],
            "action_age_s": math.inf if self._owner is None else now - self._owner[1],
        }
        if self._queue is not None:
            values |= {f"queue_{name}": count for name, count in self._queue.counters.items()}
        rates = {"steps": self._steps, "hold_steps": self._hold_steps}
        if self._robot is None or not self._started:
            return Health(WARN, "waiting for a policy's actions", values, rates, self._kind)
        if self._last.held and self._last.held != "nothing yet":
            return Health(WARN, f"holding: {self._last.held}", values, rates, self._kind)
        return Health(OK, "acting", values, rates, self._kind)

    def close(self) -> None:
        """End the robot, once whoever listens has heard how its episode ended."""
        self._episode_pub.wait_for_all_acked(Duration(seconds=0.5))
        if self._robot is not None:
            self._robot.close()
            self._robot = None

    # -- stepping -----------------------------------------------------------------------------------------------------

    @guarded
    def _tick(self) -> None:
        if self.exit_code is not None:
            return
        if self._frame is None:
            self._begin()
        elif self._settings.mode == "free":
            self._run_freely()
        else:
            self._wait_for_answer()

    def _drive(self, robot: Robot, now: Tick, draw: bool) -> Frame:
        """One control step of the robot: a row or, with a reason, zero motion. For robots whose hold is more than that."""
        return robot.step(now.action, draw=draw)

    def _resting(self, robot: Robot) -> np.ndarray | None:
        """What a robot of absolute joints is held with, float32 [dims]; None: zeros and an open gripper."""
        return None

    def _begin(self) -> None:
        self.interruptible = True
        try:
            if self._robot is None:
                self._robot = self._make()
            frame = self._robot.reset()
            self._begin_queue(self._robot.action_space)
        except SteerError as error:
            self.get_logger().error(f"cannot start: {error.sentence}")
            self.exit_code = 1
            return
        finally:
            self.interruptible = False
        if self._episode == 0:
            self._describe(self._robot, frame)
        self._gripper = self._robot.action_space.gripper_open
        self._chunk, self._last = None, Executed("nothing yet")
        self._show(frame)

    def _begin_queue(self, space: ActionSpace) -> None:
        settings = self._settings
        if settings.mode != "free" or not settings.replan_steps:
            return
        self._asked = None
        if self._queue is not None:
            self._queue.reset()
            return
        patience = max(1, round(settings.action_timeout_s * settings.rate_hz))
        wanted = QueueSettings(settings.replan_steps, settings.on_steering, patience=patience)  # type: ignore[arg-type]
        resting = self._resting(self._robot) if self._robot is not None else None
        self._queue = ChunkQueue(space, wanted, resting)

    def _describe(self, robot: Robot, frame: Frame) -> None:
        cameras = tuple(Camera(name, image.shape[1], image.shape[0]) for name, image in frame.images.items())
        for camera in cameras:
            if camera.name not in self._image_pubs:
                topic = f"camera/{camera.name}/image"
                self._image_pubs[camera.name] = self.create_publisher(Image, topic, SENSOR)
        description = RobotDescription(
            session_id=self.session_id,
            robot=self._kind,
            lockstep=self._settings.mode == "lockstep",
            space=robot.action_space,
            cameras=cameras,
            joint_names=frame.joint_names,
            gripper_joints=(frame.joint_names[-2], frame.joint_names[-1]),
            tells_gripper=True,
        )
        self._instruction_pub.publish(String(data=clean_text(frame.instruction)))
        self._description_pub.publish(description_to_msg(description, time.time_ns()))

    def _wait_for_answer(self) -> None:
        waited = time.monotonic() - self._published_s
        if not self._started:
            if waited > REPEAT_S:
                self._publish_frame()
            return
        if waited > self._settings.action_timeout_s:
            self.complaints.warn(
                "no_action",
                f"no action for frame {self._stamp_ns} within {self._settings.action_timeout_s:g} s: holding",
            )
            self._hold("no answer")

    def _run_queued(self, queue: ChunkQueue) -> None:
        """One control step: what belongs to it, and a frame after it when the next inference is due."""
        now = queue.next()
        if now.hold:
            self._hold_steps += 1
            if self._started:
                self.complaints.warn("no_action", f"no action for this step ({now.hold}): holding")
            elif self._asked is not None and queue.tick - self._asked[1] >= REPEAT_S * self._settings.rate_hz:
                queue.fail()  # nobody listened yet: the frame is shown again
        self._execute(now, show=queue.due())

    def _run_freely(self) -> None:
        if self._queue is not None:
            self._run_queued(self._queue)
            return
        running = self._chunk
        why: Hold = "nothing yet" if running is None else ""
        if running is not None:
            horizon_s = (len(running.chunk.actions) + 1) / self._settings.rate_hz
            if running.next_row >= len(running.chunk.actions):
                why = "used up"
            elif time.monotonic() - running.received_s > horizon_s:
                why = "stale"
        if running is None or why:
            if self._started:
                self.complaints.warn("no_action", f"no action for this step ({why}): holding")
            self._hold(why)
            return
        self._execute(_tick(running.chunk, running.next_row, running.delay))
        running.next_row += 1

    def _hold(self, why: Hold) -> None:
        """One control step of zero motion with the gripper as last commanded."""
        if self._robot is None:
            return
        resting = self._resting(self._robot)
        action = np.zeros(self._robot.action_space.dims, dtype=np.float32) if resting is None else resting
        action[-1] = self._gripper
        self._hold_steps += 1
        self._execute(Tick(0, action, why))

    def _execute(self, now: Tick, *, show: bool = True) -> None:
        assert self._robot is not None
        try:
            frame = self._drive(self._robot, now, show)
        except SteerError as error:
            self.complaints.refuse(error)
            return
        self._gripper, self._last = float(now.action[-1]), Executed.of(now)
        self._steps += 1
        if show or frame.done:
            self._show(frame)
        else:
            self._frame = frame
            self._publish_status()

    def _show(self, frame: Frame) -> None:
        self._frame = frame
        # Two frames never share a stamp: it names the frame that a chunk answers.
        self._stamp_ns = max(self._stamp_ns + 1, time.time_ns())
        self._shown.append(self._stamp_ns)
        if frame.done:
            self._publish_status()
            self._end_episode(frame)
        else:
            self._publish_frame()
            self._publish_status()

    def _end_episode(self, frame: Frame) -> None:
        self._episode += 1
        outcome = "succeeded" if frame.success else "ended without success"
        self.get_logger().info(
            f"episode {self._episode} {outcome} after {frame.step} steps; {self._hold_steps} were held so far"
        )
        if self._settings.episodes and self._episode >= self._settings.episodes:
            self.exit_code = 0
        self._frame = self._chunk = None

    # -- actions ------------------------------------------------------------------------------------------------------

    @guarded
    def _on_actions(self, message: ActionChunkMsg) -> None:
        if self._robot is None or self._frame is None:
            self.complaints.count("early_chunks")
            return
        self._require_owner(message)
        chunk = chunk_from_msg(message, self._robot.action_space)
        lockstep = self._settings.mode == "lockstep"
        if lockstep and ns_from_time(message.observation_stamp) != self._stamp_ns:
            raise SteerError("late_chunk", "an action chunk answers another frame than the present one; it is dropped")
        age_s = (time.time_ns() - ns_from_time(message.observation_stamp)) / 1e9
        if not lockstep and not -1.0 < age_s < self._settings.max_action_age_s:
            raise SteerError(
                "stale_chunk",
                f"an action chunk was made from a frame {age_s:.2f} s old: expected at most "
                f"{self._settings.max_action_age_s:g} s; it is dropped",
            )
        self._owner = (message.instance_id, time.monotonic())
        self._started = True
        self._steering_epoch = chunk.steering.epoch
        if self._queue is not None:
            self._enqueue(self._queue, chunk)
            return
        if not lockstep:
            # A frame is shown in every step, so frames count steps.
            delay = sum(stamp > chunk.observation_stamp_ns for stamp in self._shown)
            self._chunk = _Chunk(chunk, time.monotonic(), delay)
            return
        count = len(chunk.actions[: self._settings.replan_steps or None])
        for row in range(count):
            self._execute(_tick(chunk, row), show=row == count - 1)
            if self._frame is None:
                return

    def _enqueue(self, queue: ChunkQueue, chunk: ActionChunk) -> None:
        if self._asked is None or chunk.observation_stamp_ns != self._asked[0]:
            raise SteerError("late_chunk", "an action chunk answers another frame than the awaited one; it is dropped")
        arrival = queue.offer(chunk, self._asked[1])
        self._asked = None
        if arrival.refused:
            raise SteerError(
                f"{arrival.refused}_chunk",
                f"an action chunk came {arrival.delay} steps after its frame and is {arrival.refused}; it is dropped",
            )

    @guarded
    def _on_verdict(self, message: SteeringVerdictMsg) -> None:
        if message.accepted and self._queue is not None and message.steering_epoch == self._steering_epoch:
            self._queue.steering_changed(SteeringStamp(message.steering_epoch, message.steering_sequence))

    def _require_owner(self, message: ActionChunkMsg) -> None:
        """One policy at a time: another one is heard only after the first has been silent for the lease."""
        if message.session_id != self.session_id:
            raise SteerError("other_session", "an action chunk is for another session of the robot; it is dropped")
        if self._owner is None or self._owner[0] == message.instance_id:
            return
        if time.monotonic() - self._owner[1] < self._settings.owner_timeout_s:
            raise SteerError(
                "second_policy",
                f"policy node {message.instance_id[:8]} sends actions while {self._owner[0][:8]} controls the robot; "
                "they are refused: stop one of the two",
            )

    # -- telling ------------------------------------------------------------------------------------------------------

    def _publish_frame(self) -> None:
        frame = self._frame
        if frame is None:
            return
        stamp = time_from_ns(self._stamp_ns)
        for name, image in frame.images.items():
            self._image_pubs[name].publish(image_to_msg(image, stamp, f"{name}_optical_frame"))
        self._joints_pub.publish(joints_to_msg(frame.joint_names, frame.joint_positions, stamp))
        self._gripper_pub.publish(joints_to_msg(frame.joint_names[-2:], frame.gripper_qpos, stamp))
        self._command_pub.publish(GripperCommandMsg(header=Header(stamp=stamp), command=self._gripper))
        self._pose_pub.publish(pose_to_msg(frame.eef_position, frame.eef_quaternion, stamp, self.pose_frame))
        self._published_s = time.monotonic()
        if self._queue is not None:
            self._asked = (self._stamp_ns, self._queue.begin())

    def _publish_status(self) -> None:
        frame = self._frame
        if frame is None:
            return
        queued = {} if self._queue is None else self._queue.counters
        status = RobotStatus(
            stamp_ns=self._stamp_ns,
            session_id=self.session_id,
            task=frame.instruction,
            episode=self._episode,
            step=frame.step,
            done=frame.done,
            success=frame.success,
            mode=self._settings.mode,
            hold_steps=self._hold_steps,
            trimmed_rows=queued.get("trimmed_rows", 0),
            last=self._last,
            counters={**self.complaints.counters, **{f"queue_{name}": count for name, count in queued.items()}},
        )
        self._episode_pub.publish(status_to_msg(status))


def _tick(chunk: ActionChunk, row: int, delay: int = 0) -> Tick:
    """A row of a chunk as what one control step executes."""
    action = np.asarray(chunk.actions[row], np.float32)
    return Tick(0, action, "", row, chunk.inference_id, chunk.steering, delay)
