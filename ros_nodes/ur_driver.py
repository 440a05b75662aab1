"""A UR arm over the topics of its stock ROS 2 driver, as an ArmPort.

Invariant: what is read was checked in full and mapped by joint name into base_link; what is sent is a trajectory of
positions that begins when it is received and ends at rest. A stamp of its own would be compared with the scaled
controller's time, which stands still whenever the speed scaling does.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from builtin_interfaces.msg import Duration
from geometry_msgs.msg import PoseStamped
from rclpy.node import Node
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool, Float64, Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from arm.port import JOINT_NAMES, ArmState, JointMotion, Joints
from ros_nodes.guard import Complaints, guarded
from ros_nodes.parameters import parameter
from ros_nodes.qos import COMMAND, SENSOR, STATUS
from steer_runtime.errors import SteerError

_HALT_S = 0.2


@dataclass(frozen=True)
class UrDriverParameters:
    """Names of the driver's topics, and its gripper."""

    joint_states: str = parameter("/joint_states", "sensor_msgs/JointState, joints in any order")
    program_running: str = parameter("/io_and_status_controller/robot_program_running", "std_msgs/Bool, latched")
    speed_scaling: str = parameter("/speed_scaling_state_broadcaster/speed_scaling", "std_msgs/Float64, percent")
    tcp_pose: str = parameter("/tcp_pose_broadcaster/pose", "geometry_msgs/PoseStamped in `base` or `base_link`")
    trajectory: str = parameter(
        "/scaled_joint_trajectory_controller/joint_trajectory",
        "trajectory_msgs/JointTrajectory; from Lyrical on another",
    )
    gripper: str = parameter(
        "topic",
        "how the gripper is told: a topic, an action (needs control_msgs), or none",
        choices=("topic", "action", "none"),
    )
    gripper_topic: str = parameter(
        "/gripper_position_controller/commands", "std_msgs/Float64MultiArray, one joint (rad)"
    )
    gripper_action: str = parameter(
        "/robotiq_gripper_controller/gripper_cmd", "control_msgs/action/GripperCommand (rad)"
    )
    gripper_joint: str = parameter("robotiq_85_left_knuckle_joint", "the gripper's joint in joint_states")
    gripper_open_rad: float = parameter(0.0, "its position when open", low=-10.0, high=10.0)
    gripper_closed_rad: float = parameter(0.8, "its position when closed", low=-10.0, high=10.0)
    tf_prefix: str = parameter("", "tf_prefix of the driver: what stands before its joints' names")


class UrDriver:
    """See the module. node: whose executor hears the driver; it must have `complaints`."""

    def __init__(self, node: Node, settings: UrDriverParameters, complaints: Complaints) -> None:
        """Raises SteerError('no_control_msgs' | 'bad_parameter')."""
        if settings.gripper_open_rad == settings.gripper_closed_rad:
            raise SteerError(
                "bad_parameter", "gripper_open_rad and gripper_closed_rad are the same: give both positions"
            )
        self.complaints = complaints
        self._settings, self._node = settings, node
        self._names = tuple(f"{settings.tf_prefix}{name}" for name in JOINT_NAMES)
        self._lock = threading.Lock()
        self._joints: tuple[float, Joints, Joints] | None = None
        self._tcp: tuple[np.ndarray, np.ndarray] | None = None
        self._running: bool | None = None
        self._stopped = False  # since the last read: a short stop must not be overlooked
        self._scaling: float | None = None
        self._opening: float | None = None
        hear = node.create_subscription
        self._subscriptions = [
            hear(JointState, settings.joint_states, self._on_joints, SENSOR),
            hear(Bool, settings.program_running, self._on_running, STATUS),
            hear(Float64, settings.speed_scaling, self._on_scaling, SENSOR),
            hear(PoseStamped, settings.tcp_pose, self._on_pose, SENSOR),
        ]
        self._trajectories = node.create_publisher(JointTrajectory, settings.trajectory, COMMAND)
        self._gripper_topic: Any = None
        self._gripper_action: Any = None
        if settings.gripper == "topic":
            self._gripper_topic = node.create_publisher(Float64MultiArray, settings.gripper_topic, COMMAND)
        elif settings.gripper == "action":
            self._gripper_action = _gripper_action(node, settings.gripper_action)

    # -- the port -----------------------------------------------------------------------------------------------------

    def read(self) -> ArmState | None:
        """See ArmPort."""
        with self._lock:
            if self._joints is None or self._tcp is None or self._running is None or self._scaling is None:
                return None
            running, self._stopped = self._running and not self._stopped, False
            stamp_s, positions, velocities = self._joints
            return ArmState(stamp_s, positions, velocities, *self._tcp, running, self._scaling, self._opening)

    @property
    def missing(self) -> tuple[str, ...]:
        """Topics that have told nothing yet."""
        with self._lock:
            told = {
                self._settings.joint_states: self._joints,
                self._settings.tcp_pose: self._tcp,
                self._settings.program_running: self._running,
                self._settings.speed_scaling: self._scaling,
            }
            return tuple(topic for topic, value in told.items() if value is None)

    def send(self, motion: JointMotion) -> None:
        """See ArmPort."""
        self._trajectories.publish(trajectory_to_msg(motion, self._names))

    def grip(self, opening: float) -> None:
        """See ArmPort."""
        open_rad, closed_rad = self._settings.gripper_open_rad, self._settings.gripper_closed_rad
        position = closed_rad + opening * (open_rad - closed_rad)
        if self._gripper_topic is not None:
            self._gripper_topic.publish(Float64MultiArray(data=[position]))
        elif self._gripper_action is not None:
            client, goal = self._gripper_action
            goal.command.position = position
            client.send_goal_async(goal)

    def halt(self) -> None:
        """See ArmPort. The driver's trajectory controller refuses empty trajectories, so it is told to brake."""
        with self._lock:
            joints = self._joints
        if joints is None:
            return
        _, positions, velocities = joints
        end = positions + velocities * (_HALT_S / 2)
        self.send(JointMotion(np.array([_HALT_S, 1.5 * _HALT_S]), np.stack([end, end])))

    def close(self) -> None:
        """See ArmPort."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()
        self._node.destroy_publisher(self._trajectories)
        if self._gripper_topic is not None:
            self._node.destroy_publisher(self._gripper_topic)
        if self._gripper_action is not None:
            self._gripper_action[0].destroy()

    # -- the driver ---------------------------------------------------------------------------------------------------

    @guarded
    def _on_joints(self, message: JointState) -> None:
        found = dict(zip(message.name, range(len(message.name)), strict=True))
        self._hear_gripper(message, found)
        present = [name for name in self._names if name in found]
        if not present:
            return  # of another broadcaster, such as the gripper's own
        if len(present) < len(self._names) or len(message.position) != len(message.name):
            missing = [name for name in self._names if name not in found] or ["positions"]
            raise SteerError("missing_joint", f"joint state lacks {', '.join(missing)}; it is dropped")
        order = [found[name] for name in self._names]
        positions = np.array([message.position[index] for index in order])
        now_s = time.monotonic()
        with self._lock:
            if len(message.velocity) == len(message.name):
                velocities = np.array([message.velocity[index] for index in order])
            elif self._joints is not None and now_s > self._joints[0]:
                velocities = (positions - self._joints[1]) / (now_s - self._joints[0])
            else:
                velocities = np.zeros(len(order))
            if not (np.isfinite(positions).all() and np.isfinite(velocities).all()):
                raise SteerError("not_finite", "joint state holds NaN or infinite numbers; it is dropped")
            self._joints = now_s, positions, velocities

    def _hear_gripper(self, message: JointState, found: dict[str, int]) -> None:
        index = found.get(self._settings.gripper_joint)
        if index is None or index >= len(message.position) or not math.isfinite(message.position[index]):
            return
        open_rad, closed_rad = self._settings.gripper_open_rad, self._settings.gripper_closed_rad
        opening = (message.position[index] - closed_rad) / (open_rad - closed_rad)
        with self._lock:
            self._opening = min(max(opening, 0.0), 1.0)

    @guarded
    def _on_running(self, message: Bool) -> None:
        with self._lock:
            self._running = message.data
            self._stopped = self._stopped or not message.data

    @guarded
    def _on_scaling(self, message: Float64) -> None:
        if not 0.0 <= message.data <= 200.0:
            raise SteerError(
                "bad_scaling", f"speed scaling is {message.data} percent: expected 0 to 100; it is dropped"
            )
        with self._lock:
            self._scaling = min(message.data / 100.0, 1.0)

    @guarded
    def _on_pose(self, message: PoseStamped) -> None:
        pose = tcp_from_msg(message, self._settings.tf_prefix)
        with self._lock:
            self._tcp = pose


def tcp_from_msg(message: PoseStamped, prefix: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Position [3] m and quaternion [4] (x, y, z, w) of the TCP in base_link.

    The controller's frame `base` is base_link turned by 180 degrees about z: (x, y, z) -> (-x, -y, z), and with q_z =
    (0, 0, 1, 0) the turn is q_z q = (-y, x, w, -z). Raises SteerError('bad_pose' | 'bad_frame').
    """
    p, o = message.pose.position, message.pose.orientation
    position, (x, y, z, w) = np.array([p.x, p.y, p.z]), (o.x, o.y, o.z, o.w)
    quaternion = np.array([x, y, z, w])
    norm = float(np.linalg.norm(quaternion))
    if not (np.isfinite(position).all() and np.isfinite(quaternion).all() and abs(norm - 1.0) < 1e-2):
        raise SteerError("bad_pose", "the driver's TCP pose is not finite or no rotation; it is dropped")
    frame = message.header.frame_id.removeprefix(prefix)
    if frame == "base_link":
        return position, quaternion / norm
    if frame != "base":
        raise SteerError(
            "bad_frame", f"the driver's TCP pose is in {frame[:40]!r}: expected 'base' or 'base_link'; it is dropped"
        )
    return position * [-1.0, -1.0, 1.0], np.array([-y, x, w, -z]) / norm


def trajectory_to_msg(motion: JointMotion, names: tuple[str, ...] = JOINT_NAMES) -> JointTrajectory:
    """A motion as a trajectory that begins when it is received."""
    message = JointTrajectory(joint_names=list(names))
    for seconds, row in zip(motion.times_s.tolist(), motion.positions.tolist(), strict=True):
        nanoseconds = round(seconds * 1e9)
        duration = Duration(sec=nanoseconds // 1_000_000_000, nanosec=nanoseconds % 1_000_000_000)
        message.points.append(JointTrajectoryPoint(positions=row, time_from_start=duration))
    return message


def _gripper_action(node: Node, name: str) -> tuple[Any, Any]:
    try:
        from control_msgs.action import GripperCommand
        from rclpy.action import ActionClient
    except ImportError as error:
        raise SteerError(
            "no_control_msgs", "gripper is 'action' and control_msgs is not installed: install it, or use the topic"
        ) from error
    return ActionClient(node, GripperCommand, name), GripperCommand.Goal()
