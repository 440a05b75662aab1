"""The UR bridge in a process of its own, and whoever arms and watches it, in the hands of a test."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from driver import PATIENCE_S, NodeProcess, PolicyDriver
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from sensor_msgs.msg import Image
from standin import START_S
from std_msgs.msg import Bool, String
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import JointTrajectory

from ros_nodes.convert import image_to_msg
from ros_nodes.qos import COMMAND, LATCHED, SENSOR

CAMERAS = ("agentview", "wrist")
FORWARD = np.array([[0, 1, 0, 0, 0, 0, -1]], np.float32)
"""Half the allowed speed and more, to the arm's left, gripper open."""


class BridgeProcess(NodeProcess):
    """`ur5_bridge` as launched by a user; by another name it is a second one."""

    def __init__(self, domain: int | None = None, name: str = "ur5_bridge", **parameters: Any) -> None:
        chosen = {"instruction": "reach left", **parameters}
        module = ["-m", "ros_nodes.ur5_bridge_node", "--ros-args", "-r", f"__node:={name}", "--"]
        super().__init__(module, chosen, domain)


class BridgeClient(PolicyDriver):
    """A policy's side and an operator's, with two cameras of noise that run while `filming`."""

    def __init__(self, domain: int | None = None) -> None:
        super().__init__(domain)
        self.told: list[tuple[float, String]] = []
        self.planned: list[tuple[float, JointTrajectory]] = []
        self.sent: list[tuple[float, JointTrajectory]] = []
        self.filming = set(CAMERAS)
        node = self.node
        node.create_subscription(String, "arm_state", self.keep(self.told), LATCHED)
        node.create_subscription(JointTrajectory, "ur5_bridge/planned", self.keep(self.planned), SENSOR)
        trajectories = "/scaled_joint_trajectory_controller/joint_trajectory"
        node.create_subscription(JointTrajectory, trajectories, self.keep(self.sent), COMMAND)
        self._films = {name: node.create_publisher(Image, f"/{name}/image_raw", SENSOR) for name in CAMERAS}
        self._estop = node.create_publisher(Bool, "estop", LATCHED)
        self._noise = np.random.default_rng(0)
        node.create_timer(0.05, self._film)

    def _film(self) -> None:
        stamp = self.node.get_clock().now().to_msg()
        for name in tuple(self.filming):
            picture = self._noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            self._films[name].publish(image_to_msg(picture, stamp, name))

    def state(self) -> dict[str, Any]:
        """The newest arm state."""
        return json.loads(self.told[-1][1].data) if self.told else {}

    def wait_state(self, timeout: float = PATIENCE_S, **wanted: Any) -> dict[str, Any]:
        """The first arm state in which these fields have these values."""
        self.wait(
            lambda: all(self.state().get(name) == value for name, value in wanted.items()),
            timeout,
            f"{wanted} (now {self.state()})",
        )
        return self.state()

    def wait_acting(self) -> None:
        """Until the bridge is active, shows frames and hears this policy."""
        self.wait_state(START_S, lifecycle="active")
        self.wait(lambda: self.frames and self.actions.get_subscription_count(), START_S, "a frame")

    def arm(self, on: bool = True) -> SetBool.Response:
        """Answer of `~/arm`."""
        return self.ask(SetBool, "ur5_bridge/arm", SetBool.Request(data=on))

    def must_arm(self) -> None:
        """Arm, once the arm has come to rest."""
        self.wait(lambda: self.arm().success, START_S, "the arming")

    def reset_estop(self) -> None:
        """Let go of the bridge's emergency stop; the latched message would stop the next bridge."""
        self._estop.publish(Bool(data=False))
        assert self.ask(Trigger, "ur5_bridge/reset_estop", Trigger.Request()).success

    def change(self, transition: int) -> None:
        """A transition of the bridge's lifecycle."""
        request = ChangeState.Request(transition=Transition(id=transition))
        assert self.ask(ChangeState, "ur5_bridge/change_state", request).success

    def press(self) -> None:
        """The emergency stop, on its topic."""
        self._estop.publish(Bool(data=True))

    def move(self, row: np.ndarray = FORWARD, seconds: float = 2.0, **chunk: Any) -> None:
        """Send a chunk of equal rows that lasts so long."""
        self.act(np.repeat(row, round(20 * seconds), axis=0), **chunk)

    def ask(self, kind: Any, name: str, request: Any) -> Any:
        """Answer of a service."""
        client = self.node.create_client(kind, name)
        try:
            self.wait(client.service_is_ready, START_S, name)
            future = client.call_async(request)
            self.wait(future.done, what=f"the answer of {name}")
            return future.result()
        finally:
            self.node.destroy_client(client)
