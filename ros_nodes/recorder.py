"""Everything a robot shows and a policy answers in one episode, kept in memory.

Invariants: an observation and the chunk it led to are joined by the observation's stamp, never by order of arrival; what
belongs to a later episode is not kept. Control steps are counted by rows of chunks, inferences by chunks.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import numpy as np
import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from steer_msgs.msg import ActionChunk as ActionChunkMsg
from steer_msgs.msg import EpisodeStatus
from steer_msgs.msg import RobotDescription as RobotDescriptionMsg

from ros_nodes.assembler import ObservationAssembler
from ros_nodes.convert import RobotDescription, chunk_from_msg, description_from_msg, ns_from_time
from ros_nodes.qos import DIAGNOSTICS, LATCHED
from ros_nodes.sensors import RobotSensors, Take
from sim.outcomes import SeenAction, grasp_step
from steer_runtime.errors import SteerError
from steer_runtime.types import Observation

DEEP = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=100,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.VOLATILE,
)
"""A controller wants the newest action only; a recorder wants every one."""
DEEP_SENSOR = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=50,
    reliability=ReliabilityPolicy.BEST_EFFORT,
    durability=DurabilityPolicy.VOLATILE,
)


class Recorder:
    """Records a session's first episode, on a thread and a ROS context of its own. Use it as a context manager.

    observations: by stamp (ns). actions, chunks, said, ages_s: one an inference, as received, in order; chunks[i] is float32 [T, 7],
    said[i] the policy's words. end: stamp (ns) and control steps of the episode's end, None while it runs.
    """

    def __init__(self, namespace: str = "/steer", *, domain_id: int | None = None) -> None:
        self.observations: dict[int, Observation] = {}
        self.actions: list[SeenAction] = []
        self.chunks: list[np.ndarray] = []
        self.said: list[tuple[str, ...]] = []
        self.ages_s: list[float] = []
        self.success = False
        self.end: tuple[int, int] | None = None
        self.hold_steps = 0
        self.refused: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._description: RobotDescription | None = None
        self._assembler: ObservationAssembler | None = None
        self._context = rclpy.Context()
        rclpy.init(context=self._context, domain_id=domain_id, signal_handler_options=SignalHandlerOptions.NO)
        self._node = rclpy.create_node(
            "recorder", context=self._context, namespace=namespace, start_parameter_services=False
        )
        listen = self._node.create_subscription
        listen(RobotDescriptionMsg, "robot_description", self._kept(self._on_description), LATCHED)
        listen(ActionChunkMsg, "actions", self._kept(self._on_actions), DEEP)
        listen(EpisodeStatus, "episode", self._kept(self._on_episode), DIAGNOSTICS)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._spin, name="recorder", daemon=True)
        self._thread.start()

    def wait(self, ready: Callable[[], bool], timeout: float) -> bool:
        """Wait until `ready`, looked at after every message; False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(ready, timeout)

    @property
    def commanded(self) -> int:
        """Control steps that the recorded chunks are long, all together."""
        return self.actions[-1].step + self.actions[-1].rows if self.actions else 0

    @property
    def grasped_at(self) -> int | None:
        """Control step at which the gripper was first told to close and left so, None before it."""
        return grasp_step(np.concatenate([chunk[:, 6] for chunk in self.chunks])) if self.chunks else None

    def close(self) -> None:
        """Leave the network. Safe to call twice."""
        if not self._context.ok():
            return
        self._executor.shutdown()
        self._thread.join()
        self._node.destroy_node()
        self._context.try_shutdown()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except ExternalShutdownException:
            return

    def _kept(self, take: Callable[[Any], None]) -> Callable[[Any], None]:
        """An exception in a callback would end the thread: refused messages are counted."""

        @functools.wraps(take)
        def run(message: Any) -> None:
            with self._changed:
                try:
                    take(message)
                except SteerError as error:
                    self.refused[error.code] += 1
                self._changed.notify_all()

        return run

    def _on_description(self, message: RobotDescriptionMsg) -> None:
        description = description_from_msg(message)
        if self._description is not None:
            return
        self._description = description
        self._assembler = ObservationAssembler(description)
        RobotSensors(self._node, self._assembler, self._kept(self._sense), DEEP_SENSOR)

    def _sense(self, take: Take) -> None:
        self._keep(take())

    def _keep(self, observation: Observation | None) -> None:
        if observation is not None and not self._is_over(observation.stamp_ns):
            self.observations[observation.stamp_ns] = observation

    def _on_actions(self, message: ActionChunkMsg) -> None:
        if self._description is None:
            return
        chunk = chunk_from_msg(message, self._description.space)
        # An answer is published again for a robot that has not heard it.
        again = bool(self.actions) and self.actions[-1].observation_ns == chunk.observation_stamp_ns
        if again or self._is_over(chunk.observation_stamp_ns):
            return
        step = self.commanded
        self.chunks.append(chunk.actions)
        self.said.append(tuple(message.said))
        self.ages_s.append(chunk.age_s)
        self.actions.append(
            SeenAction(
                received_ns=time.time_ns(),
                latched_ns=ns_from_time(message.header.stamp) - round(chunk.age_s * 1e9),
                inference=chunk.inference_id,
                epoch=chunk.steering.epoch,
                sequence=chunk.steering.sequence,
                observation_ns=chunk.observation_stamp_ns,
                step=step,
                rows=len(chunk.actions),
            )
        )

    def _on_episode(self, message: EpisodeStatus) -> None:
        stamp_ns = ns_from_time(message.header.stamp)
        if self._is_over(stamp_ns):
            return
        self.success = self.success or message.success
        self.hold_steps = message.hold_steps
        if message.done and self.end is None:
            self.end = stamp_ns, message.step

    def _is_over(self, stamp_ns: int) -> bool:
        """Whether this moment of the robot's clock lies behind the episode."""
        return self.end is not None and stamp_ns > self.end[0]

    @property
    def problems(self) -> Mapping[str, int]:
        """Refused messages by code, and frames that never became complete."""
        found = Counter({code: count for code, count in self.refused.items() if code != "repeated_frame"})
        if self._assembler is not None and self._assembler.incomplete_frames:
            found["incomplete_frames"] = self._assembler.incomplete_frames
        return found
