"""What the ROS tests drive nodes with: processes that always end, and the robot's side of the topics."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Header, String
from steer_msgs.msg import ActionChunk as ActionChunkMsg
from steer_msgs.msg import EpisodeStatus, GripperCommand
from steer_msgs.msg import RobotDescription as RobotDescriptionMsg
from steer_msgs.msg import SteeringVerdict as SteeringVerdictMsg

from ros_nodes.convert import (
    Camera,
    RobotDescription,
    description_from_msg,
    description_to_msg,
    image_to_msg,
    joints_to_msg,
    ns_from_time,
    pose_to_msg,
    time_from_ns,
)
from ros_nodes.qos import ACTION, COMMAND, DIAGNOSTICS, LATCHED, SENSOR, VERDICT
from steer_runtime.types import LIBERO_ACTION_SPACE, ActionSpace

JOINTS = (*(f"robot0_joint{i}" for i in range(1, 8)), "finger_left", "finger_right")
SIZE = 64
PATIENCE_S = 20.0


class NodeProcess:
    """A node in a process of its own; its output goes to a file that failures can show."""

    def __init__(self, module: list[str], parameters: dict[str, Any], domain: int | None = None) -> None:
        arguments = [word for name, value in parameters.items() for word in ("-p", f"{name}:={_yaml(value)}")]
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, *module, "--ros-args", *arguments],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1", **({} if domain is None else {"ROS_DOMAIN_ID": str(domain)})},
        )

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5.0)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5.0)
        self._log.close()

    def log(self) -> str:
        """All output so far."""
        return Path(self._log.name).read_text()

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(5.0)


class PolicyProcess(NodeProcess):
    """`policy_node` as launched by a user."""

    def __init__(self, policy: Path | str, store: Path | None, *, domain: int | None = None, **parameters: Any) -> None:
        chosen = {"policy": str(policy), "autostart": True, "torch_threads": 1, **parameters}
        if store is not None:
            chosen["direction_store"] = str(store)
        super().__init__(["-m", "ros_nodes.policy_node"], chosen, domain)


class Listener:
    """A node of the test process with a context and a spinning thread of its own."""

    def __init__(self, name: str, domain: int | None = None) -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain, signal_handler_options=SignalHandlerOptions.NO)
        self.node = rclpy.create_node(f"{name}_{os.getpid()}", context=self.context, namespace="/steer")
        self.changed = threading.Condition()
        self.executor = SingleThreadedExecutor(context=self.context)

    def __enter__(self) -> Any:
        self.executor.add_node(self.node)
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.executor.shutdown()
        self._thread.join()
        self.node.destroy_node()
        self.context.try_shutdown()

    def _spin(self) -> None:
        try:
            self.executor.spin()
        except ExternalShutdownException:
            return

    def wait(self, ready: Callable[[], Any], timeout: float = PATIENCE_S, what: str = "it") -> Any:
        """First truthy value of `ready`, looked at on every message and every 20 ms."""
        deadline = time.monotonic() + timeout
        with self.changed:
            while not (found := ready()):
                left = deadline - time.monotonic()
                assert left > 0, f"waited {timeout} s for {what}"
                self.changed.wait(min(left, 0.02))
            return found

    def keep(self, into: list[Any], limit: int = 20000) -> Callable[[Any], None]:
        """A callback that appends (arrival on the steady clock, message)."""

        def callback(message: Any) -> None:
            with self.changed:
                into.append((time.monotonic(), message))
                del into[:-limit]
                self.changed.notify_all()

        return callback


class SensorDriver(Listener):
    """The robot's topics, so that a test can send any frame; collects actions, verdicts and diagnostics."""

    def __init__(self, *, lockstep: bool = False, domain: int | None = None) -> None:
        super().__init__("driver", domain)
        self.session = "session-1"
        self.lockstep = lockstep
        self.image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        self.chunks: list[tuple[float, ActionChunkMsg]] = []
        self.verdicts: list[tuple[float, SteeringVerdictMsg]] = []
        self.diagnostics: list[tuple[float, DiagnosticArray]] = []
        node = self.node
        self.cameras = {
            name: node.create_publisher(Image, f"camera/{name}/image", SENSOR) for name in ("agentview", "wrist")
        }
        self.joints = node.create_publisher(JointState, "joint_states", SENSOR)
        self.pose = node.create_publisher(PoseStamped, "eef_pose", SENSOR)
        self.gripper = node.create_publisher(GripperCommand, "gripper_command", SENSOR)
        self.instruction = node.create_publisher(String, "instruction", LATCHED)
        self.description = node.create_publisher(RobotDescriptionMsg, "robot_description", LATCHED)
        self.json = node.create_publisher(String, "command_json", COMMAND)
        node.create_subscription(ActionChunkMsg, "actions", self.keep(self.chunks), ACTION)
        node.create_subscription(SteeringVerdictMsg, "verdict", self.keep(self.verdicts), VERDICT)
        node.create_subscription(DiagnosticArray, "/diagnostics", self.keep(self.diagnostics), DIAGNOSTICS)

    def describe(self, space: ActionSpace = LIBERO_ACTION_SPACE, *, tells_gripper: bool = False) -> None:
        """Say what this robot is."""
        cameras = tuple(Camera(name, SIZE, SIZE) for name in self.cameras)
        fingers = JOINTS[-2:]
        told = RobotDescription(
            self.session, "driver", self.lockstep, space, cameras, JOINTS, fingers, tells_gripper=tells_gripper
        )
        self.instruction.publish(String(data="pick up the soup and place it in the basket"))
        self.description.publish(description_to_msg(told, time.time_ns()))

    def wait_matched(self) -> None:
        """Until the active policy node listens to every sensor."""
        publishers = [*self.cameras.values(), self.joints, self.pose, self.instruction]
        self.wait(lambda: all(p.get_subscription_count() for p in publishers), what="the node's subscriptions")

    def send(
        self,
        stamp_ns: int | None = None,
        *,
        skip: tuple[str, ...] = (),
        change: Callable[[Image], None] | None = None,
        joint_names: tuple[str, ...] = JOINTS,
        gripper: float | None = None,
    ) -> int:
        """One frame, with parts left out or the agentview image spoilt, and the last gripper command if one is given.

        Returns its stamp.
        """
        stamp_ns = time.time_ns() if stamp_ns is None else stamp_ns
        stamp = time_from_ns(stamp_ns)
        if "joints" not in skip:
            self.joints.publish(joints_to_msg(joint_names, np.linspace(0.0, 0.8, len(joint_names)), stamp))
        if gripper is not None:
            self.gripper.publish(GripperCommand(header=Header(stamp=stamp), command=gripper))
        self.pose.publish(pose_to_msg(np.array([0.1, 0.2, 0.3]), np.array([1.0, 0.0, 0.0, 0.0]), stamp, "world"))
        for name, publisher in self.cameras.items():
            if name in skip:
                continue
            message = image_to_msg(self.image, stamp, f"{name}_optical_frame")
            if change is not None and name == "agentview":
                change(message)
            publisher.publish(message)
        return stamp_ns

    def ask(
        self, timeout: float = PATIENCE_S, after: Callable[[ActionChunkMsg], bool] = lambda _: True
    ) -> ActionChunkMsg:
        """Send frames until one is answered by a chunk that satisfies `after`, and return that chunk."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            stamp = self.send()
            chunk = self.answer(stamp, 1.0)
            if chunk is not None and after(chunk):
                return chunk
        raise AssertionError(f"no fitting chunk came within {timeout} s")

    def answer(self, stamp_ns: int, timeout: float) -> ActionChunkMsg | None:
        """The chunk that answers the frame of this stamp, or None."""

        def find() -> ActionChunkMsg | None:
            return next((m for _, m in reversed(self.chunks) if ns_from_time(m.observation_stamp) == stamp_ns), None)

        deadline = time.monotonic() + timeout
        with self.changed:
            while (found := find()) is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self.changed.wait(left)
            return found

    def wait_diagnosis(self, wanted: Callable[[DiagnosticStatus], bool], timeout: float = 10.0) -> DiagnosticStatus:
        """First status on /diagnostics, from now on, that satisfies `wanted`."""
        start = time.monotonic()

        def find() -> DiagnosticStatus | None:
            statuses = (s for at, m in self.diagnostics if at >= start for s in m.status)
            return next((s for s in statuses if wanted(s)), None)

        found = self.wait(find, timeout, "a diagnosis")
        assert isinstance(found, DiagnosticStatus)
        return found


class PolicyDriver(Listener):
    """The policy's side of the topics, so that a test can send a robot any chunk."""

    def __init__(self, domain: int | None = None) -> None:
        super().__init__("policy_driver", domain)
        self.frames: list[tuple[float, PoseStamped]] = []
        self.episodes: list[tuple[float, EpisodeStatus]] = []
        self.descriptions: list[tuple[float, RobotDescriptionMsg]] = []
        self.images: list[tuple[float, Image]] = []
        self.grippers: list[tuple[float, GripperCommand]] = []
        node = self.node
        self.actions = node.create_publisher(ActionChunkMsg, "actions", ACTION)
        node.create_subscription(PoseStamped, "eef_pose", self.keep(self.frames), SENSOR)
        node.create_subscription(GripperCommand, "gripper_command", self.keep(self.grippers), SENSOR)
        node.create_subscription(EpisodeStatus, "episode", self.keep(self.episodes), DIAGNOSTICS)
        node.create_subscription(Image, "camera/agentview/image", self.keep(self.images), SENSOR)
        node.create_subscription(RobotDescriptionMsg, "robot_description", self.keep(self.descriptions), LATCHED)

    def description(self) -> RobotDescription:
        """What the robot says of itself."""
        self.wait(lambda: self.descriptions and self.actions.get_subscription_count(), what="the robot")
        return description_from_msg(self.descriptions[-1][1])

    def moved_on(self, stamp: Time, timeout: float) -> bool:
        """Whether a frame of another stamp becomes the newest within `timeout` seconds."""
        with self.changed:
            return self.changed.wait_for(lambda: self.frames[-1][1].header.stamp != stamp, timeout)

    def status(self) -> EpisodeStatus:
        """The newest episode status."""
        self.wait(lambda: self.episodes, what="an episode status")
        return self.episodes[-1][1]

    def counters(self) -> dict[str, int]:
        """Counters in the newest episode status."""
        status = self.status()
        return dict(zip(status.counter_names, status.counter_values, strict=True))

    def act(self, action: np.ndarray, *, instance: str = "a", stamp_ns: int | None = None, **changes: Any) -> None:
        """Publish one chunk, float32 [T, dims], for the newest frame, with fields changed at will."""
        stamp = self.frames[-1][1].header.stamp if stamp_ns is None else time_from_ns(stamp_ns)
        rows, dims = action.shape
        fields = {
            "instance_id": instance,
            "session_id": self.description().session_id,
            "observation_stamp": stamp,
            "rows": rows,
            "dims": dims,
            "rate_hz": 20.0,
        }
        message = ActionChunkMsg(**{**fields, **changes})
        message.data.frombytes(np.ascontiguousarray(action, np.float32).tobytes())
        self.actions.publish(message)


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
