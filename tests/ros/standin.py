"""The stand-in UR5e in a process of its own, and whoever talks to a UR driver, in the hands of a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from driver import PATIENCE_S, Listener, NodeProcess
from geometry_msgs.msg import PoseStamped
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Bool, Float64, Float64MultiArray, Header
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from ros_nodes.convert import time_from_ns
from ros_nodes.qos import LATCHED, SENSOR
from sim.ur5.names import CONTROLLERS, JOINTS, POSITION, TRAJECTORY, VELOCITY

START_S = 300.0
"""For nodes to come up on a busy machine."""
_RELIABLE = QoSProfile(depth=10)


class StandinProcess(NodeProcess):
    """`ur5_standin` as launched by a user, drawn as capsules and without cameras unless asked for."""

    def __init__(self, domain: int | None = None, **parameters: Any) -> None:
        chosen = {"meshes": False, "camera_size": 0, "unlock_delay_s": 0.0, **parameters}
        super().__init__(["-m", "ros_nodes.ur5_standin_node"], chosen, domain)


class UrClient(Listener):
    """The other side of the driver's topics; every list holds (arrival on the steady clock, message)."""

    def __init__(self, domain: int | None = None) -> None:
        super().__init__("ur_client", domain)
        self.joints: list[tuple[float, JointState]] = []
        self.running: list[tuple[float, Bool]] = []
        self.scaling: list[tuple[float, Float64]] = []
        self.poses: list[tuple[float, PoseStamped]] = []
        self.peaks_seen: list[tuple[float, Float64MultiArray]] = []
        self.images: dict[str, list[tuple[float, Image]]] = {"agentview": [], "wrist": []}
        hear, make = self.node.create_subscription, self.node.create_publisher
        hear(JointState, "/joint_states", self.keep(self.joints), _RELIABLE)
        hear(Bool, "/io_and_status_controller/robot_program_running", self.keep(self.running), LATCHED)
        hear(Float64, "/speed_scaling_state_broadcaster/speed_scaling", self.keep(self.scaling), _RELIABLE)
        hear(PoseStamped, "/tcp_pose_broadcaster/pose", self.keep(self.poses), _RELIABLE)
        hear(Float64MultiArray, "/ur5_standin/peaks", self.keep(self.peaks_seen), LATCHED)
        for name, images in self.images.items():
            hear(Image, f"/{name}/image_raw", self.keep(images), SENSOR)
        self._trajectory = make(JointTrajectory, f"/{TRAJECTORY}/joint_trajectory", _RELIABLE)
        self._forward = {
            name: make(Float64MultiArray, f"/{name}/commands", _RELIABLE)
            for name in (POSITION, VELOCITY, "gripper_position_controller")
        }
        self._slider = make(Float64, "/ur5_standin/speed_slider", _RELIABLE)

    def wait_up(self) -> None:
        """Until the stand-in is heard and hears."""
        publishers = (self._trajectory, *self._forward.values(), self._slider)
        self.wait(lambda: self.joints and self.running, START_S, "the stand-in's joint states")
        self.wait(lambda: all(p.get_subscription_count() for p in publishers), START_S, "the stand-in's subscriptions")

    # -- out of the arm -----------------------------------------------------------------------------------------------

    @property
    def positions(self) -> np.ndarray:
        """Newest joint positions, rad [6], kinematic order."""
        return self._newest("position")

    @property
    def velocities(self) -> np.ndarray:
        """Newest joint velocities, rad/s [6], kinematic order."""
        return self._newest("velocity")

    def _newest(self, part: str) -> np.ndarray:
        message = self.joints[-1][1]
        told = dict(zip(message.name, getattr(message, part), strict=True))
        return np.array([told[name] for name in JOINTS])

    def wait_rest(self, timeout: float = PATIENCE_S) -> None:
        """Until the arm stands still."""
        self.wait(lambda: np.abs(self.velocities).max() < 5e-3, timeout, "the arm to stand still")

    def wait_moving(self, speed: float = 0.02, timeout: float = PATIENCE_S) -> None:
        """Until a joint is faster than this, rad/s."""
        self.wait(lambda: np.abs(self.velocities).max() > speed, timeout, "the arm to move")

    def peaks(self) -> np.ndarray:
        """The stand-in's own peaks [13], told after this call; see sim.ur5.truth.Peaks."""
        self.peaks_seen.clear()
        self.wait(lambda: len(self.peaks_seen) > 1, what="the stand-in's peaks")
        return np.array(self.peaks_seen[-1][1].data)

    # -- into the arm -------------------------------------------------------------------------------------------------

    def follow(
        self,
        times_s: Sequence[float],
        positions: np.ndarray,
        *,
        names: Sequence[str] = JOINTS,
        stamp_ns: int = 0,
        **parts: np.ndarray,
    ) -> None:
        """Publish a trajectory: positions [n, 6] in the order of `names`; parts: velocities, accelerations."""
        points = []
        for index, seconds in enumerate(times_s):
            point = JointTrajectoryPoint(positions=[float(value) for value in positions[index]])
            for name, rows in parts.items():
                setattr(point, name, [float(value) for value in rows[index]])
            point.time_from_start.sec = int(seconds)
            point.time_from_start.nanosec = round((seconds % 1) * 1e9)
            points.append(point)
        header = Header(stamp=time_from_ns(stamp_ns))
        self._trajectory.publish(JointTrajectory(header=header, joint_names=list(names), points=points))

    def forward(self, controller: str, values: Sequence[float]) -> None:
        """Publish to one of the controllers that take numbers."""
        self._forward[controller].publish(Float64MultiArray(data=[float(value) for value in values]))

    def grip(self, knuckle: float) -> None:
        """rad: 0 open, 0.8 closed."""
        self.forward("gripper_position_controller", [knuckle])

    def slide(self, percent: float) -> None:
        """Move the speed slider."""
        self._slider.publish(Float64(data=percent))

    def call(self, service: str) -> Trigger.Response:
        """Answer of a Trigger service."""
        client = self.node.create_client(Trigger, service)
        try:
            self.wait(client.service_is_ready, what=service)
            future = client.call_async(Trigger.Request())
            self.wait(future.done, what=f"the answer of {service}")
            return future.result()
        finally:
            self.node.destroy_client(client)

    def activate(self, controller: str) -> None:
        """Switch the stand-in's controller."""
        assert controller in CONTROLLERS
        from rcl_interfaces.srv import SetParameters

        client = self.node.create_client(SetParameters, "/ur5_standin/set_parameters")
        try:
            self.wait(client.service_is_ready, what="the stand-in's parameters")
            wanted = Parameter("controller", value=controller).to_parameter_msg()
            future = client.call_async(SetParameters.Request(parameters=[wanted]))
            self.wait(future.done, what="the switch of controllers")
            assert future.result().results[0].successful, future.result().results[0].reason
        finally:
            self.node.destroy_client(client)

    def recover(self) -> None:
        """Program running, slider at 100 %, trajectory controller active, gripper open, arm at rest, peaks forgotten."""
        self.call("/dashboard_client/unlock_protective_stop")
        assert self.call("/dashboard_client/play").success
        self.slide(100.0)
        # Switching away and back drops what is left of a trajectory.
        self.activate(POSITION)
        self.activate(TRAJECTORY)
        self.grip(0.0)
        self.wait(lambda: self.scaling[-1][1].data > 99.0, what="full speed")
        self.wait_rest()
        assert self.call("/ur5_standin/reset_peaks").success
