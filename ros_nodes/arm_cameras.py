"""The newest pictures of a robot's cameras, from whatever topics they come on.

Invariant: a picture that is handed out is fresh, of the size of the first one of its camera, and was taken together with
the others; a camera that stalls hands out nothing.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping

import numpy as np
from rclpy.node import Node
from sensor_msgs.msg import Image

from ros_nodes.convert import MAX_IMAGE_SIDE, Camera, image_from_msg, ns_from_time
from ros_nodes.guard import Complaints, guarded
from ros_nodes.qos import SENSOR
from steer_runtime.errors import SteerError


class ArmCameras:
    """See the module. topics: name -> topic. timeout_s: oldest picture; skew_s: between the stamps of two cameras."""

    def __init__(
        self,
        node: Node,
        topics: Mapping[str, str],
        complaints: Complaints,
        *,
        timeout_s: float,
        skew_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.complaints = complaints
        self._node, self._clock = node, clock
        self._timeout_s, self._skew_ns = timeout_s, round(skew_s * 1e9)
        self._cameras: dict[str, Camera] = {}
        self._newest: dict[str, tuple[float, int, np.ndarray]] = {}
        self.names = tuple(topics)
        self._subscriptions = [
            node.create_subscription(Image, topic, functools.partial(self._hear, name), SENSOR)
            for name, topic in topics.items()
        ]

    def fresh(self) -> dict[str, np.ndarray]:
        """Pictures uint8 RGB [H, W, 3] of all cameras; empty where one is too old or taken apart from the others."""
        now = self._clock()
        if any(name not in self._newest or now - self._newest[name][0] > self._timeout_s for name in self.names):
            return {}
        stamps = [self._newest[name][1] for name in self.names]
        if max(stamps) - min(stamps) > self._skew_ns:
            self.complaints.count("camera_skew")
            return {}
        return {name: self._newest[name][2] for name in self.names}

    def stale(self) -> tuple[str, ...]:
        """Cameras without a fresh picture."""
        now = self._clock()
        return tuple(n for n in self.names if n not in self._newest or now - self._newest[n][0] > self._timeout_s)

    def close(self) -> None:
        """Hear nothing more."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def _hear(self, name: str, message: Image) -> None:
        self._take(name, message)

    @guarded
    def _take(self, name: str, message: Image) -> None:
        camera = self._cameras.get(name) or Camera(name, int(message.width), int(message.height))
        if not (1 <= camera.width <= MAX_IMAGE_SIDE and 1 <= camera.height <= MAX_IMAGE_SIDE):
            raise SteerError(
                "bad_image", f"image of camera {name!r} has {camera.width}x{camera.height} pixels; it is dropped"
            )
        image = image_from_msg(message, camera)
        self._cameras[name] = camera
        self._newest[name] = self._clock(), ns_from_time(message.header.stamp), image


def camera_topics(entries: tuple[str, ...]) -> dict[str, str]:
    """name -> topic of entries "name:topic". Raises SteerError('bad_parameter')."""
    topics: dict[str, str] = {}
    for entry in entries:
        name, _, topic = entry.partition(":")
        if not name.isidentifier() or not topic or name in topics:
            raise SteerError(
                "bad_parameter",
                f"cameras has {entry!r}: expected name:topic, each name once, as agentview:/agentview/image_raw",
            )
        topics[name] = topic
    if not topics:
        raise SteerError("bad_parameter", "cameras is empty: a policy needs one at least; give name:topic")
    return topics
