"""The emergency stop of a node: anybody can pull it, by topic or service; only its own service lets go.

Invariant: whatever a publisher's quality of service, a `true` on `estop` is heard, also one latched before this node
started; `false` releases nothing; a node that was stopped stays so, through any change of its lifecycle, until
`reset_estop` is called.
"""

from __future__ import annotations

from collections.abc import Callable

from rclpy.node import Node
from std_msgs.msg import Bool
from std_srvs.srv import Trigger

from ros_nodes.qos import COMMAND, LATCHED, SENSOR


class Estop:
    """Topic `estop` and the services `<prefix>estop` and `<prefix>reset_estop` of a node.

    on_stop: called with who stopped, once until the reset, within the callback that heard of it. prefix: "~/" in a node
    whose namespace has another one with these services.
    """

    def __init__(self, node: Node, on_stop: Callable[[str], None], *, prefix: str = "") -> None:
        self._node = node
        self._on_stop = on_stop
        self._by = ""
        self._told = node.create_publisher(Bool, "estop", LATCHED)
        # The first hears what is latched, the second loses nothing that is sent reliably (`ros2 topic pub`), and only the
        # third hears publishers of best effort.
        for profile in (LATCHED, COMMAND, SENSOR):
            node.create_subscription(Bool, "estop", self._heard, profile)
        node.create_service(Trigger, f"{prefix}estop", self._asked)
        node.create_service(Trigger, f"{prefix}reset_estop", self._reset)
        self._told.publish(Bool(data=False))

    @property
    def on(self) -> bool:
        """Whether the node is stopped; any thread."""
        return bool(self._by)

    @property
    def sentence(self) -> str:
        """Who stopped and how to go on."""
        return f"emergency stop by {self._by}: nothing is steered and no action goes out until `reset_estop` is called"

    def stop(self, by: str) -> None:
        """Stop, and tell everybody on the topic."""
        if self._by:
            return
        self._by = by
        self._on_stop(by)
        self._told.publish(Bool(data=True))
        self._node.get_logger().error(self.sentence)

    def _heard(self, message: Bool) -> None:
        if message.data:
            self.stop("topic")

    def _asked(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self.stop("service")
        response.success, response.message = True, self.sentence
        return response

    def _reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        was, self._by = self.on, ""
        self._told.publish(Bool(data=False))
        response.success = True
        response.message = "the emergency stop is released; what was steered stays off" if was else "it was not stopped"
        if was:
            self._node.get_logger().warning(response.message)
        return response
