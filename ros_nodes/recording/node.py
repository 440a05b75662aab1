"""The recorder: everything that goes over the topics of one namespace, to a file.

Invariant: it only listens, so whatever becomes of it or of its disk, nothing that steers notices; every message that was
published and is not in the file is counted, where the middleware tells of it.
"""

from __future__ import annotations

import importlib
import json
import platform
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from rclpy.subscription import Subscription
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from steer_msgs.msg import (
    ActionChunk,
    EpisodeStatus,
    GripperCommand,
    RobotDescription,
    SteeringCommand,
    SteeringState,
    SteeringTrace,
    SteeringVerdict,
)

from ros_nodes.diagnosis import ERROR, OK, WARN, Diagnosis, Health
from ros_nodes.guard import Complaints, guarded
from ros_nodes.parameters import declare, parameter
from ros_nodes.process import serve
from ros_nodes.recording.definitions import definition_of, message_store
from ros_nodes.recording.file import RecordingWriter
from steer_runtime.errors import SteerError

DEPTH = 1000
"""Messages that may wait in the middleware: a recorder wants every one."""
LOOK_S = 0.25
"""How often new topics are looked for."""
TOLD_S = 10.0
"""How often the log says how far it is."""
SILENT_S = 5.0
"""Without a word of anybody while others are there; each of our nodes tells its health once a second."""
HEALTH_TOPIC = "/diagnostics"

RELIABLE = {
    "command": SteeringCommand,
    "command_json": String,
    "verdict": SteeringVerdict,
    "rejected": SteeringVerdict,
    "actions": ActionChunk,
    "trace": SteeringTrace,
}
LATCHED = {
    "robot_description": RobotDescription,
    "instruction": String,
    "provenance": String,
    "state": SteeringState,
    "episode": EpisodeStatus,
}
SENSED = {"gripper_command": GripperCommand, "joint_states": JointState, "eef_pose": PoseStamped}
PICTURES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
TOLD_INFO = hasattr(Subscription, "CallbackType")
"""From Iron on callbacks hear the sequence number of a message; before, gaps cannot be counted."""
LEFT_OUT = ("parameter_events", "rosout")


@dataclass(frozen=True)
class RecorderParameters:
    """Parameters of the recorder."""

    path: str = parameter("", "file to write; it must not exist")
    frames: bool = parameter(True, "record pictures too: without them inferences cannot be run again")
    cameras: tuple[str, ...] = parameter(
        ("agentview", "wrist"),
        "cameras to listen to before a robot has named its own: what it shows at once is not missed",
    )
    topics: tuple[str, ...] = parameter((), "further topics, with their full names, beside those of the namespace")
    flush_period_s: float = parameter(
        1.0, "how often everything heard is put on disk, and so what a crash costs", low=0.05, high=60.0
    )
    waiting_mb: int = parameter(64, "megabytes that may wait for a disk that takes nothing", low=1, high=4096)


@dataclass(frozen=True)
class _Heard:
    topic: int
    data: bytes
    log_ns: int
    publish_ns: int
    sequence: int


class RecorderNode(Node):
    """See the module. Records from its construction on; `close` ends the file."""

    def __init__(self, **node_options: Any) -> None:
        """Raises SteerError('bad_parameter' | 'cannot_record' | 'no_messages')."""
        super().__init__("recorder", **{"namespace": "/steer", **node_options})
        self.exit_code: int | None = None
        self.interruptible = True
        self.complaints = Complaints(self)
        self._settings = settings = declare(self, RecorderParameters)
        if not settings.path:
            raise SteerError("bad_parameter", "parameter 'path' is empty; give the file to write")
        self.path = Path(settings.path)
        self._store = message_store()
        self._writer = RecordingWriter(self.path, self._about(), waiting_bytes=settings.waiting_mb << 20)
        self._mine = str(self.path).encode()  # nobody else's diagnosis names this file
        self._numbers: dict[str, int] = {}
        self._unknown: set[str] = set()
        self._last: dict[tuple[str, Any], int] = {}
        self._newest_s = time.monotonic()  # of what others said
        self._told_s = time.monotonic()
        self._disk = ""
        self._missing_before = 0
        self.missed: Counter[str] = Counter()
        self._heard: deque[_Heard] = deque()
        self._heard_bytes = 0
        self._changed = threading.Condition()
        self._writing = threading.Lock()  # of the file, so that a slow disk holds up nobody who listens
        self._ending = False
        for topics, durability in ((RELIABLE, False), (LATCHED, True)):
            for name, kind in topics.items():
                self._listen(self._full(name), kind, reliable=True, latched=durability)
        for name, kind in SENSED.items():
            self._listen(self._full(name), kind, reliable=False, latched=False)
        self._listen_to_cameras(settings.cameras)
        self._listen(HEALTH_TOPIC, DiagnosticArray, reliable=True, latched=False)
        self._thread = threading.Thread(target=self._write, name="recording", daemon=True)
        self._thread.start()
        self.create_timer(LOOK_S, self._look)
        self._diagnosis = Diagnosis(self, self.complaints, "recording", self._health)
        self._look()

    def close(self) -> None:
        """Put everything heard on disk and end the file. Safe to call twice."""
        with self._changed:
            if self._ending:
                return
            self._ending = True
            self._changed.notify_all()
        self._thread.join()
        self.get_logger().info(f"recorded {self.summary()}")

    def missing(self) -> Counter[str]:
        """Messages by topic that were published and are not in the file, as far as the middleware tells."""
        return self.missed + Counter(dict(list(self._writer.dropped.items())))

    def summary(self) -> str:
        """How much was recorded, and how much was not."""
        missing = sum(self.missing().values())
        lost = f", {missing} messages are missing" if missing else ""
        return f"{sum(list(self._writer.messages.values()))} messages in {self.path} ({self._writer.size / 1e6:.1f} MB){lost}"

    # -- listening ----------------------------------------------------------------------------------------------------

    def _full(self, name: str) -> str:
        return f"{self.get_namespace().rstrip('/')}/{name}"

    def _about(self) -> dict[str, dict[str, str]]:
        return {
            "recording": {
                "namespace": self.get_namespace(),
                "started_ns": str(time.time_ns()),
                "frames": json.dumps(self._settings.frames),
                "steer_runtime": version("steer-runtime"),
                "python": platform.python_version(),
            }
        }

    @guarded
    def _look(self) -> None:
        """Listen to what has appeared in the namespace, in the way it is published."""
        inside = self.get_namespace().rstrip("/") + "/"
        for name, kinds in self.get_topic_names_and_types():
            wanted = name in self._settings.topics or (name.startswith(inside) and name.split("/")[-1] not in LEFT_OUT)
            if not wanted or name in self._numbers or name in self._unknown:
                continue
            if kinds[0] in PICTURES and not self._settings.frames:
                self._unknown.add(name)
                continue
            offered = [info.qos_profile for info in self.get_publishers_info_by_topic(name)]
            if not offered:
                continue
            kind = _message_type(kinds[0])
            if kind is None or len(kinds) != 1:
                self._unknown.add(name)
                self.complaints.refuse(
                    SteerError(
                        "unknown_type", f"{name} is of type {', '.join(kinds)}, unknown here: it is not recorded"
                    )
                )
                continue
            reliable = all(q.reliability == ReliabilityPolicy.RELIABLE for q in offered)
            latched = reliable and all(q.durability == DurabilityPolicy.TRANSIENT_LOCAL for q in offered)
            self._listen(name, kind, reliable=reliable, latched=latched)

    def _listen(self, name: str, kind: type, *, reliable: bool, latched: bool) -> None:
        if name in self._numbers:
            return
        package = kind.__module__.split(".")[0]
        typename = f"{package}/msg/{kind.__name__}"
        definition = definition_of(self._store, typename)
        if definition is None:
            self._unknown.add(name)
            self.complaints.refuse(
                SteerError(
                    "unknown_type", f"{name} is of type {typename}, whose definition is unknown: it is not recorded"
                )
            )
            return
        with self._writing:
            self._numbers[name] = number = self._writer.topic(name, typename, definition)
        described = name == self._full("robot_description")
        profile = QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=DEPTH,
            reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
        )

        def take(data: bytes, info: Mapping[str, Any]) -> None:
            self._take(name, number, bytes(data), info)
            if described:
                self._listen_to_robot(bytes(data))

        callback = take if TOLD_INFO else lambda data: take(data, {})
        self.create_subscription(kind, name, callback, profile, raw=True)

    @guarded
    def _listen_to_robot(self, data: bytes) -> None:
        """The cameras that a description names, before anybody has had time to look for them."""
        self._listen_to_cameras(deserialize_message(data, RobotDescription).camera_names)

    def _listen_to_cameras(self, names: Sequence[str]) -> None:
        if self._settings.frames:
            for name in names:
                self._listen(self._full(f"camera/{name}/image"), Image, reliable=False, latched=False)

    @guarded
    def _take(self, name: str, number: int, data: bytes, info: Mapping[str, Any]) -> None:
        sequence = int(info.get("publication_sequence_number") or 0)
        self._count_gap(name, info.get("publisher_gid"), sequence)
        heard = _Heard(number, data, time.time_ns(), int(info.get("source_timestamp") or 0), sequence)
        if not (name == HEALTH_TOPIC and self._mine in data):
            self._newest_s = time.monotonic()
        with self._changed:
            if self._heard_bytes + len(data) > self._settings.waiting_mb << 20:
                self.missed[name] += 1
                return
            self._heard.append(heard)
            self._heard_bytes += len(data)
            self._changed.notify_all()

    def _count_gap(self, name: str, publisher: Any, sequence: int) -> None:
        """Messages that a publisher sent between two that were heard."""
        if not sequence or publisher is None:
            return
        key = (name, str(publisher))
        before = self._last.get(key)
        self._last[key] = sequence
        if before is not None and sequence > before + 1:
            self.missed[name] += sequence - before - 1

    # -- writing (its own thread) -------------------------------------------------------------------------------------

    def _write(self) -> None:
        flushed_s = time.monotonic()
        while True:
            due_s = flushed_s + self._settings.flush_period_s
            with self._changed:
                self._changed.wait_for(lambda: self._heard or self._ending, max(0.0, due_s - time.monotonic()))
                ending = self._ending
                heard = list(self._heard)
                self._heard.clear()
                self._heard_bytes = 0
            with self._writing:
                for item in heard:
                    self._writer.add(item.topic, item.data, item.log_ns, item.publish_ns, item.sequence)
            if ending:
                break
            if time.monotonic() >= due_s:
                flushed_s = time.monotonic()
                self._on_disk(self._writer.flush)
        self._on_disk(self._writer.close)

    def _on_disk(self, put: Callable[[], None]) -> None:
        try:
            with self._writing:
                put()
        except OSError as error:
            self._disk = f"{self.path} takes nothing: {error.strerror}; {self._writer.waiting / 1e6:.1f} MB wait"
            self.complaints.refuse(SteerError("disk_refused", self._disk))
            return
        self._disk = ""

    # -- telling ------------------------------------------------------------------------------------------------------

    def _health(self) -> Health:
        missing = self.missing()
        age_s = time.monotonic() - self._newest_s
        messages = sum(list(self._writer.messages.values()))
        values = {
            "path": self.path,
            "messages": messages,
            "bytes": self._writer.size,
            "waiting_bytes": self._writer.waiting,
            "missing": sum(missing.values()),
            "newest_age_s": age_s,
            **{f"missing {name}": count for name, count in missing.items()},
        }
        rates = {"messages": messages, "bytes": self._writer.size}
        if time.monotonic() - self._told_s > TOLD_S:
            self._told_s = time.monotonic()
            self.get_logger().info(self.summary())
        fresh, self._missing_before = sum(missing.values()) - self._missing_before, sum(missing.values())
        if self._disk:
            return Health(ERROR if fresh else WARN, self._disk, values, rates)
        if fresh:
            return Health(WARN, f"{fresh} messages were missed in the last second", values, rates)
        # Fast DDS was seen to deliver nothing more to one process when another one was killed with -9.
        others = [info.node_namespace for info in self.get_publishers_info_by_topic(HEALTH_TOPIC)].count(
            self.get_namespace()
        ) - 1
        if age_s > SILENT_S and others > 0:
            sentence = (
                f"nothing is heard for {age_s:.0f} s, though other nodes are in {self.get_namespace()} ({others}): one was "
                "killed, or messages do not arrive any more; if it stays, start the recorder again"
            )
            return Health(WARN, sentence, values, rates)
        return Health(OK, f"recording to {self.path}", values, rates)


def _message_type(name: str) -> type | None:
    """Class of "package/msg/Name", None where it is not installed or no message."""
    parts = name.split("/")
    if len(parts) != 3 or parts[1] != "msg":
        return None
    try:
        found = getattr(importlib.import_module(f"{parts[0]}.msg"), parts[2], None)
    except ImportError:
        return None
    return found if isinstance(found, type) else None


def main(args: list[str] | None = None) -> NoReturn:
    """Entry point of the process."""
    serve(RecorderNode, args)


if __name__ == "__main__":
    main()
