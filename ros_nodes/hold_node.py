"""The hold node: reads what the robot tells of itself and moves the strength of an axis so that a set point is held.

Invariants: every command it sends expires by itself, so the strength falls back to rest when this process dies or the robot
falls silent; the strength moves only on a measurement; it commands nothing but its own axis.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from geometry_msgs.msg import PoseStamped
from rclpy.clock import Clock, ClockType
from rclpy.duration import Duration
from rclpy.node import Node
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from steer_msgs.msg import EpisodeStatus, GripperCommand
from steer_msgs.msg import RobotDescription as RobotDescriptionMsg
from steer_msgs.msg import SteeringCommand as SteeringCommandMsg
from steer_msgs.msg import SteeringState as SteeringStateMsg
from steer_msgs.msg import SteeringVerdict as SteeringVerdictMsg

from ros_nodes.convert import (
    RobotDescription,
    command_to_msg,
    description_from_msg,
    gripper_from_msg,
    joints_from_msg,
    ns_from_time,
    pose_from_msg,
    verdict_from_msg,
)
from ros_nodes.guard import Complaints, guarded
from ros_nodes.parameters import declare, parameter
from ros_nodes.process import serve
from ros_nodes.qos import COMMAND, LATCHED, SENSOR, STATUS, VERDICT
from ros_nodes.status import RobotStatus, status_from_msg
from steer_runtime.errors import SteerError, nearest
from steer_runtime.setpoint.controller import Gains
from steer_runtime.setpoint.limits import StrengthLimits
from steer_runtime.setpoint.loop import SetPointLoop, Step
from steer_runtime.setpoint.meter import Sample
from steer_runtime.setpoint.presets import CONTROLLERS, GAINS, make_loop, tuning
from steer_runtime.setpoint.target import QUANTITIES, Target, parse_target
from steer_runtime.steering.command import CommandOp, SteeringCommand

EXIT_NO_NODE = 3
_KEPT = 16
"""Frames whose parts are waited for at the same time."""


@dataclass(frozen=True)
class HoldParameters:
    """Parameters of the node. Gains of 0 in all three places are those of the quantity."""

    quantity: str = parameter("speed", "what is held", choices=tuple(QUANTITIES))
    target: str = parameter("0.12 m/s", "its value, a number and a unit")
    axis: str = parameter("speed-word", "axis of the policy node whose strength is moved; its positive end raises it")
    controller: str = parameter("pid", "how the strength is moved", choices=tuple(CONTROLLERS))
    kp: float = parameter(
        0.0, "strength a unit (m/s or m) of error; negative for an axis that lowers", low=-1e4, high=1e4
    )
    ki: float = parameter(0.0, "strength a unit of error a second", low=-1e4, high=1e4)
    kd: float = parameter(0.0, "strength a unit a second of the measurement", low=-1e4, high=1e4)
    strength_low: float = parameter(-1.0, "lowest strength; the axis's own limit holds as well", low=-1.0, high=0.0)
    strength_high: float = parameter(1.0, "highest strength; the axis's own limit holds as well", low=0.0, high=1.0)
    slew_per_s: float = parameter(2.0, "largest change of the strength in a second of the robot", low=0.01, high=100.0)
    dose_limit: float = parameter(
        0.0, "largest relative change of the residual stream, by dose_per_strength; 0: none", low=0.0, high=100.0
    )
    dose_per_strength: float = parameter(
        0.0,
        "dose at strength 1, as a score or `steer eval hold` measured it; needed with dose_limit",
        low=0.0,
        high=100.0,
    )
    expiry_s: float = parameter(
        1.0, "wall seconds after which a command is released when no other follows", low=0.05, high=60.0
    )
    keepalive_s: float = parameter(0.25, "wall seconds between repetitions of the strength", low=0.01, high=10.0)
    silence_s: float = parameter(
        10.0, "wall seconds without a frame of the robot until the strength is let go", low=0.1, high=600.0
    )
    priority: int = parameter(0, "of the commands; the higher one owns the axis", low=-128, high=127)


@dataclass
class _Parts:
    """What has arrived of one frame, by its stamp."""

    position: np.ndarray | None = None
    opening: float | None = None
    told: float | None = None
    status: RobotStatus | None = None
    used: bool = field(default=False)


class HoldNode(Node):
    """See the module. on_step hears every update; patience_s: how long a policy node is waited for, None forever."""

    def __init__(
        self,
        *,
        on_step: Callable[[float, Step, Target, Mapping[str, int]], None] | None = None,
        patience_s: float | None = None,
        **node_options: Any,
    ) -> None:
        """Declare parameters and topics. Raises SteerError: bad_parameter, and what target, gains and limits refuse."""
        super().__init__("hold", **{"namespace": "/steer", **node_options})
        self.exit_code: int | None = None
        self.interruptible = True
        self.complaints = Complaints(self)
        self._settings = settings = declare(self, HoldParameters)
        self._target = parse_target(settings.quantity, settings.target.split())
        self._require_usable()
        self._gains = self._chosen_gains()
        self._on_step, self._patience_s = on_step, patience_s
        self._started_s = time.monotonic()
        self._source = f"hold:{socket.gethostname()}:{os.getpid()}"[:128]
        self._epoch, self._sequence = time.time_ns(), 0
        self._description: RobotDescription | None = None
        self._loop: SetPointLoop | None = None
        self._frames: OrderedDict[int, _Parts] = OrderedDict()
        self._episode: tuple[str, int] | None = None
        self._heard_s = -math.inf
        self._sent = 0.0

        self._command_pub = self.create_publisher(SteeringCommandMsg, "command", COMMAND)
        self._told_pub = self.create_publisher(String, "hold", LATCHED)
        self.create_subscription(PoseStamped, "eef_pose", self._on_pose, SENSOR)
        self.create_subscription(JointState, "gripper_state", self._on_gripper, SENSOR)
        self.create_subscription(GripperCommand, "gripper_command", self._on_told, SENSOR)
        self.create_subscription(EpisodeStatus, "episode", self._on_episode, STATUS)
        self.create_subscription(RobotDescriptionMsg, "robot_description", self._on_description, LATCHED)
        self.create_subscription(SteeringVerdictMsg, "verdict", self._on_verdict, VERDICT)
        self.create_subscription(SteeringStateMsg, "state", self._on_state, LATCHED)
        self.create_timer(settings.keepalive_s, self._keep_alive, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def close(self) -> None:
        """Let the axis go and wait until that is heard, half a second at most."""
        if self._sent:
            self._send("clear", 0.0)
            self._command_pub.wait_for_all_acked(Duration(seconds=0.5))

    # -- what it is made of -------------------------------------------------------------------------------------------

    def _require_usable(self) -> None:
        settings = self._settings
        if settings.expiry_s < 2 * settings.keepalive_s:
            raise SteerError(
                "bad_parameter",
                f"commands expire after {settings.expiry_s:g} s and are repeated every {settings.keepalive_s:g} s: expected an "
                "expiry_s of at least twice keepalive_s, or one late repetition lets the strength go",
            )
        if settings.dose_limit and not settings.dose_per_strength:
            raise SteerError(
                "bad_parameter",
                "dose_limit is set and dose_per_strength is not: no topic tells doses, so give the dose at strength 1",
            )

    def _chosen_gains(self) -> Gains:
        settings = self._settings
        given = (settings.kp, settings.ki, settings.kd)
        return Gains(*given) if any(given) else GAINS[settings.quantity]

    def _make_loop(self, low: float, high: float) -> SetPointLoop:
        settings = self._settings
        doses = (settings.dose_per_strength, settings.dose_per_strength)
        limits = StrengthLimits(
            max(low, settings.strength_low),
            min(high, settings.strength_high),
            settings.slew_per_s,
            dose=settings.dose_limit or None,
            dose_per_strength=doses,
        )
        return make_loop(self._target, tuning(settings.controller, settings.quantity, self._gains), limits)

    @guarded
    def _on_state(self, message: SteeringStateMsg) -> None:
        if self._loop is not None:
            return
        axes = dict(
            zip(message.axis_names, zip(message.axis_negatives, message.axis_positives, strict=True), strict=True)
        )
        limits = dict(zip(message.direction_names, message.direction_limits, strict=True))
        wanted = self._settings.axis
        if wanted not in axes:
            if message.lifecycle != "active":
                return
            self.get_logger().error(f"the policy node has no axis {wanted[:80]!r}: {nearest(wanted, axes)}")
            self.exit_code = 1
            return
        negative, positive = axes[wanted]
        self._loop = self._make_loop(-limits[negative], limits[positive])
        self.get_logger().info(f"holding {self._settings.quantity} at {self._target.shown} by axis {wanted}")

    @guarded
    def _on_description(self, message: RobotDescriptionMsg) -> None:
        self._description = description_from_msg(message)

    # -- what the robot tells -----------------------------------------------------------------------------------------

    def _part(self, stamp_ns: int) -> _Parts:
        parts = self._frames.setdefault(stamp_ns, _Parts())
        while len(self._frames) > _KEPT:
            _, old = self._frames.popitem(last=False)
            self.complaints.count("incomplete_frames", int(not old.used))
        return parts

    @guarded
    def _on_pose(self, message: PoseStamped) -> None:
        stamp = ns_from_time(message.header.stamp)
        self._part(stamp).position = np.asarray(pose_from_msg(message)[:3], dtype=np.float64)
        self._complete(stamp)

    @guarded
    def _on_gripper(self, message: JointState) -> None:
        if self._description is None:
            return
        stamp = ns_from_time(message.header.stamp)
        one, other = self._description.gripper_joints
        found = joints_from_msg(message, (one, other))
        self._part(stamp).opening = found[one] - found[other]
        self._complete(stamp)

    @guarded
    def _on_told(self, message: GripperCommand) -> None:
        stamp = ns_from_time(message.header.stamp)
        self._part(stamp).told = gripper_from_msg(message)
        self._complete(stamp)

    @guarded
    def _on_episode(self, message: EpisodeStatus) -> None:
        status = status_from_msg(message)
        if self._episode != (status.session_id, status.episode) or status.done:
            self._episode = (status.session_id, status.episode)
            self._let_go()
            if status.done:
                return
        if status.stamp_ns in self._frames or not self._frames or status.stamp_ns > next(reversed(self._frames)):
            parts = self._part(status.stamp_ns)
            # The steps between two frames are told under the stamp of the first: only its own step is of that frame.
            parts.status = parts.status or status
            self._complete(status.stamp_ns)

    def _complete(self, stamp_ns: int) -> None:
        """Use a frame once all of it is there."""
        parts, description = self._frames.get(stamp_ns), self._description
        if parts is None or parts.used or description is None:
            return
        if parts.position is None or parts.opening is None or parts.status is None:
            return
        if description.tells_gripper and parts.told is None:
            return
        parts.used = True
        self._heard_s = time.monotonic()
        if self._loop is None:
            return
        # Control steps count the robot's own time: in lockstep the wall clock waits for the policy.
        sample = Sample(
            parts.status.step / description.space.rate_hz,
            parts.position,
            parts.opening,
            _closed(parts.told, description),
        )
        self._loop.see(sample)
        step = self._loop.act()
        if step.strength or self._sent:
            self._send("set", step.strength)
        self._tell(sample.time_s, step)

    # -- what it says -------------------------------------------------------------------------------------------------

    @guarded
    def _keep_alive(self) -> None:
        if self._loop is None:
            waited = time.monotonic() - self._started_s
            if self._patience_s is not None and waited > self._patience_s:
                self.get_logger().error(
                    f"no policy node told its axes in namespace {self.get_namespace()!r} within {self._patience_s:g} s; start "
                    "one or give its namespace"
                )
                self.exit_code = EXIT_NO_NODE
            return
        if not self._sent:
            return
        if time.monotonic() - self._heard_s > self._settings.silence_s:
            self.complaints.refuse(
                SteerError("silent_robot", f"no frame came for {self._settings.silence_s:g} s: the strength is let go")
            )
            self._let_go()
            return
        self._send("set", self._sent)

    def _let_go(self) -> None:
        """Rest, and begin anew with the next frame."""
        if self._loop is not None:
            self._loop.reset()
        if self._sent:
            self._send("clear", 0.0)

    def _send(self, op: CommandOp, strength: float) -> None:
        self._sequence += 1
        self._sent = strength
        settings = self._settings
        command = SteeringCommand(
            source=self._source,
            epoch=self._epoch,
            sequence=self._sequence,
            stamp_ns=time.time_ns(),
            op=op,
            target=settings.axis,
            strength=strength,
            hold_s=settings.expiry_s if op == "set" else None,
            priority=settings.priority,
        )
        self._command_pub.publish(command_to_msg(command))

    @guarded
    def _on_verdict(self, message: SteeringVerdictMsg) -> None:
        verdict = verdict_from_msg(message)
        if verdict.source != self._source or verdict.accepted:
            return
        # What is refused does not act; an integral that goes on believing it would wind up.
        if self._loop is not None:
            self._loop.reset()
        self._sent = 0.0
        self.complaints.refuse(SteerError(verdict.code, f"the policy node refused a strength: {verdict.sentence}"))

    def _tell(self, time_s: float, step: Step) -> None:
        assert self._loop is not None
        counters = {**self._loop.counters, **self.complaints.counters}
        told = {
            "quantity": self._settings.quantity, "target": self._target.value, "axis": self._settings.axis,
            "time_s": time_s, "measured": step.reading.value, "strength": step.strength, "held": step.held,
            "controller": dict(self._loop.state), "counters": counters,
        }  # fmt: skip
        self._told_pub.publish(String(data=json.dumps(told, allow_nan=False)))
        if self._on_step is not None:
            self._on_step(time_s, step, self._target, counters)


def _closed(told: float | None, description: RobotDescription) -> bool | None:
    if told is None:
        return None
    space = description.space
    return abs(told - space.gripper_close) < abs(told - space.gripper_open)


def main(args: list[str] | None = None) -> NoReturn:
    """Entry point of the process."""
    serve(HoldNode, args)


if __name__ == "__main__":
    main()
