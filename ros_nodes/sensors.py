"""Subscriptions to everything that a robot's description promises, joined into observations.

Invariant: whoever listens to a robot listens to all parts of its frames, or no frame would ever be whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from geometry_msgs.msg import PoseStamped
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from steer_msgs.msg import GripperCommand

from ros_nodes.assembler import ObservationAssembler
from ros_nodes.qos import LATCHED, SENSOR
from steer_runtime.types import Observation

Take = Callable[[], Observation | None]
"""Puts one message into the assembler: an observation when it completes one; raises SteerError for one it refuses."""


class RobotSensors:
    """The sensors of the assembler's robot, on a node. take: hears of each message, on the node's executor."""

    def __init__(
        self, node: Node, assembler: ObservationAssembler, take: Callable[[Take], None], qos: QoSProfile = SENSOR
    ) -> None:
        self.assembler = assembler
        self._node = node
        description = assembler.description

        def listen(kind: type, topic: str, put: Callable[[Any], Observation | None], profile: QoSProfile = qos) -> Any:
            return node.create_subscription(kind, topic, lambda message: take(functools.partial(put, message)), profile)

        self._subscriptions = [
            listen(Image, f"camera/{camera.name}/image", functools.partial(assembler.image, camera.name))
            for camera in description.cameras
        ]
        self._subscriptions.append(listen(JointState, "joint_states", assembler.joints))
        if description.tells_gripper:
            self._subscriptions.append(listen(GripperCommand, "gripper_command", assembler.gripper))
        self._subscriptions.append(listen(PoseStamped, "eef_pose", assembler.pose))
        self._subscriptions.append(
            listen(String, "instruction", lambda message: assembler.instruction(message.data), LATCHED)
        )

    def close(self) -> None:
        """Hear nothing more."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()
