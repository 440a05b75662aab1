"""One facade over the steering topics, for the command line, demos and tests.

Invariant: a command is sent only once the node that answers it is known to hear us and to be heard; every wait is
for an event and has a limit.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import rclpy
from rclpy.duration import Duration
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import Bool
from std_srvs.srv import Trigger
from steer_msgs.msg import EpisodeStatus
from steer_msgs.msg import SteeringCommand as SteeringCommandMsg
from steer_msgs.msg import SteeringState as SteeringStateMsg
from steer_msgs.msg import SteeringVerdict as SteeringVerdictMsg

from ros_nodes.convert import command_to_msg, ns_from_time, span_from_mask, steps_from, verdict_from_msg
from ros_nodes.qos import COMMAND, LATCHED, VERDICT
from ros_nodes.status import RobotStatus, status_from_msg
from steer_runtime.errors import SteerError
from steer_runtime.steering.command import CommandOp, SteeringCommand, Verdict
from steer_runtime.types import Role, SteeringStamp

LATCHED_S = 5.0
"""Wait for what a publisher that has been discovered has latched."""
DEFAULT_TIMEOUT_S = 8.0
"""Discovery between two processes takes up to 2.8 s; a busy machine needs more."""
MAX_VERDICTS = 4096

T = TypeVar("T")


@dataclass(frozen=True)
class ActiveDirection:
    """One direction that acts now; see the message of the same name. expires_in_s None: until cleared."""

    target: str
    direction_id: str
    strength: float
    commanded: float
    priority: int
    source: str
    span: frozenset[Role] | None
    shadowed_neurons: int
    expires_in_s: float | None
    steps: tuple[int, int] | None


@dataclass(frozen=True)
class KnownDirection:
    """A direction loaded in the node. limit: largest accepted strength."""

    name: str
    id: str
    limit: float


@dataclass(frozen=True)
class KnownAxis:
    """An axis loaded in the node: below 0 it commands `negative`, above 0 `positive`."""

    name: str
    negative: str
    positive: str


@dataclass(frozen=True)
class NodeState:
    """What the policy node last said of itself."""

    stamp_ns: int
    instance_id: str
    lifecycle: str
    loop_state: str
    policy: str
    trained: bool
    model_hash: str
    steering: SteeringStamp
    directions: tuple[KnownDirection, ...]
    axes: tuple[KnownAxis, ...]
    active: tuple[ActiveDirection, ...]
    counters: Mapping[str, int]
    alarms: tuple[str, ...]

    @property
    def policy_text(self) -> str:
        """Name of the policy, with the warning that belongs to one nobody has trained."""
        return self.policy if self.trained else f"{self.policy} (untrained policy)"


class SteeringClient:
    """Commands one policy node and listens to it, on a thread and a ROS context of its own.

    namespace: of the policy node. source: name under which commands are sent; by default host and process.
    Use it as a context manager, or call close().
    """

    def __init__(self, namespace: str = "/steer", *, source: str | None = None, domain_id: int | None = None) -> None:
        self.source = source or f"{socket.gethostname()}:{os.getpid()}"
        self.epoch = time.time_ns()
        self._sequence = 0
        self._changed = threading.Condition()
        self._state: NodeState | None = None
        self._state_count = 0
        self._robot: RobotStatus | None = None
        self._verdicts: OrderedDict[tuple[str, int, int], Verdict] = OrderedDict()
        self._context = rclpy.Context()
        rclpy.init(context=self._context, domain_id=domain_id, signal_handler_options=SignalHandlerOptions.NO)
        name = f"steering_client_{os.getpid()}_{self.epoch % 1_000_000_000}"
        self._node = rclpy.create_node(name, context=self._context, namespace=namespace, start_parameter_services=False)
        # Endpoints are announced in order: whoever reached `state`, created last, knows the others as well.
        self._publisher = self._node.create_publisher(SteeringCommandMsg, "command", COMMAND)
        self._node.create_subscription(EpisodeStatus, "episode", self._on_episode, LATCHED)
        self._node.create_subscription(SteeringVerdictMsg, "verdict", self._on_verdict, VERDICT)
        self._node.create_subscription(SteeringStateMsg, "state", self._on_state, LATCHED)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._spin, name="steering_client", daemon=True)
        self._thread.start()

    def __enter__(self) -> SteeringClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the network. Safe to call twice."""
        if not self._context.ok():
            return
        # Any other order aborts the process when the thread still spins.
        self._executor.shutdown()
        self._thread.join()
        self._node.destroy_node()
        self._context.try_shutdown()

    def connect(self, timeout: float = DEFAULT_TIMEOUT_S) -> NodeState:
        """Wait until the policy node hears and is heard. Raises SteerError('no_node') after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while self._state is None or self._publisher.get_subscription_count() == 0:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise SteerError(
                        "no_node",
                        f"no policy node answered in namespace {self._node.get_namespace()!r} within {timeout:g} s; "
                        "start one (`ros2 launch steer_runtime policy.launch.py` or `policy_node`) or give its namespace",
                    )
                # A match of our publisher wakes nobody, so look again soon.
                self._changed.wait(min(left, 0.02))
            return self._state

    def publish(
        self,
        target: str,
        strength: float,
        *,
        ramp_s: float | None = None,
        hold_s: float | None = None,
        priority: int = 0,
        span: frozenset[Role] | None = None,
        steps: tuple[int, int] | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
    ) -> SteeringCommand:
        """Send one strength and return the command as sent. target: a direction, `name@hash`, or an axis.

        strength: [0, 1] for a direction, [-1, 1] for an axis. ramp_s: None takes the engine's default. hold_s: released
        that many seconds later; None keeps it until cleared. steps: denoising steps of a flow policy, from the first up to,
        not including, the second; None is all of them. Raises SteerError('no_node').
        """
        return self._send("set", target, strength, ramp_s, hold_s, priority, span, steps, timeout)

    def clear(
        self,
        target: str | None = None,
        *,
        ramp_s: float | None = None,
        priority: int = 0,
        timeout: float = DEFAULT_TIMEOUT_S,
    ) -> SteeringCommand:
        """Clear one target, or all of them when none is named. Raises SteerError('no_node')."""
        op: CommandOp = "clear_all" if target is None else "clear"
        return self._send(op, target or "", 0.0, ramp_s, None, priority, None, None, timeout)

    def stop(self, timeout: float = DEFAULT_TIMEOUT_S) -> str:
        """Pull the emergency stop of every node that listens, and return the answer of the policy node.

        Nothing is steered, no action goes out, an arm's bridge stops. Without a policy node the topic alone stops the others,
        and the answer says so. Raises SteerError('no_node') when nobody listens.
        """
        told = self._node.create_publisher(Bool, "estop", LATCHED)
        told.publish(Bool(data=True))
        try:
            return str(self.ask(Trigger, "estop", Trigger.Request(), timeout).message)
        except SteerError:
            if not told.get_subscription_count():
                raise
            told.wait_for_all_acked(Duration(seconds=timeout))
            return "no policy node answered; the other nodes that listen to `estop` were told to stop"
        finally:
            self._node.destroy_publisher(told)

    def reset_stop(self, timeout: float = DEFAULT_TIMEOUT_S) -> str:
        """Let go of the node's emergency stop and return its answer. Raises SteerError('no_node')."""
        return str(self.ask(Trigger, "reset_estop", Trigger.Request(), timeout).message)

    def ask(self, kind: Any, name: str, request: Any, timeout: float = DEFAULT_TIMEOUT_S) -> Any:
        """The response of a service of this namespace, of the service type `kind`. Raises SteerError('no_node')."""
        service: Any = self._node.create_client(kind, name)
        deadline = time.monotonic() + timeout
        answered = threading.Event()
        try:
            if service.wait_for_service(timeout):
                future = service.call_async(request)
                future.add_done_callback(lambda _: answered.set())
                if answered.wait(max(0.0, deadline - time.monotonic())):
                    return future.result()
        finally:
            self._node.destroy_client(service)
        raise SteerError(
            "no_node",
            f"service {name!r} in namespace {self._node.get_namespace()!r} did not answer within {timeout:g} s; use the robot's "
            "own stop",
        )

    def latest(self, kind: Any, name: str, timeout: float = DEFAULT_TIMEOUT_S) -> Any:
        """What is latched on a topic of this namespace, of the message type `kind`. Raises SteerError('no_node')."""
        heard: list[Any] = []
        came = threading.Event()

        def keep(message: Any) -> None:
            heard.append(message)
            came.set()

        subscription = self._node.create_subscription(kind, name, keep, LATCHED)
        try:
            if came.wait(timeout):
                return heard[-1]
        finally:
            self._node.destroy_subscription(subscription)
        raise SteerError(
            "no_node",
            f"nobody tells {name!r} in namespace {self._node.get_namespace()!r} within {timeout:g} s; start the node or give its "
            "namespace",
        )

    def send(self, command: SteeringCommand, timeout: float = DEFAULT_TIMEOUT_S) -> SteeringCommand:
        """Send a command just as it is, whatever its stamp and sequence. Raises SteerError('no_node')."""
        self.connect(timeout)
        self._publisher.publish(command_to_msg(command))
        return command

    @contextmanager
    def stream(
        self,
        target: str,
        strength: float,
        *,
        period_s: float = 0.05,
        hold_s: float = 0.2,
        ramp_s: float | None = None,
        priority: int = 0,
        span: frozenset[Role] | None = None,
        steps: tuple[int, int] | None = None,
    ) -> Iterator[None]:
        """Steer for the length of a `with` block by repeating the command every `period_s` seconds; else as `publish`.

        Each repetition holds for `hold_s` only: when this process dies, the node releases the target by itself.
        """
        self.connect()
        done = threading.Event()

        def repeat() -> None:
            while True:
                self.publish(target, strength, ramp_s=ramp_s, hold_s=hold_s, priority=priority, span=span, steps=steps)
                if done.wait(period_s):
                    return

        thread = threading.Thread(target=repeat, name="steering_stream", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.clear(target)

    def wait_verdict(self, command: SteeringCommand, timeout: float = 2.0) -> Verdict:
        """The node's answer to a command. Raises SteerError('no_verdict') after `timeout` seconds."""
        key = (command.source, command.epoch, command.sequence)
        verdict = self._wait(lambda: self._verdicts.get(key), timeout)
        if verdict is None:
            raise SteerError(
                "no_verdict",
                f"command {command.sequence} got no verdict within {timeout:g} s; see `steer state` for the node's health",
            )
        return verdict

    def state(self, timeout: float = DEFAULT_TIMEOUT_S) -> NodeState:
        """The newest state received. Raises SteerError('no_node') when none comes within `timeout` seconds."""
        return self.connect(timeout)

    def next_state(self, timeout: float = 2.0) -> NodeState:
        """The first state received from now on. Raises SteerError('no_state') after `timeout` seconds."""
        seen = self._state_count
        return self._state_or_raise(lambda state: self._state_count > seen, timeout, "a new state")

    def wait_state(self, wanted: Callable[[NodeState], bool], timeout: float = DEFAULT_TIMEOUT_S) -> NodeState:
        """The first state that satisfies `wanted`. Raises SteerError('no_state') after `timeout` seconds."""
        return self._state_or_raise(wanted, timeout, "the wanted state")

    def robot(self, timeout: float = 0.0) -> RobotStatus | None:
        """What the robot said after its last control step; None when none is heard within `timeout` seconds.

        A robot that is there, and whose latched status is on its way, is waited for a little longer.
        """
        found = self._wait(lambda: self._robot, timeout)
        if found is None and timeout and self._node.count_publishers("episode"):
            return self._wait(lambda: self._robot, LATCHED_S)
        return found

    def directions(self, timeout: float = DEFAULT_TIMEOUT_S) -> tuple[KnownDirection, ...]:
        """Directions loaded in the node."""
        return self.connect(timeout).directions

    def axes(self, timeout: float = DEFAULT_TIMEOUT_S) -> tuple[KnownAxis, ...]:
        """Axes loaded in the node."""
        return self.connect(timeout).axes

    def _send(
        self,
        op: CommandOp,
        target: str,
        strength: float,
        ramp_s: float | None,
        hold_s: float | None,
        priority: int,
        span: frozenset[Role] | None,
        steps: tuple[int, int] | None,
        timeout: float,
    ) -> SteeringCommand:
        self.connect(timeout)
        with self._changed:
            self._sequence += 1
            command = SteeringCommand(
                self.source,
                self.epoch,
                self._sequence,
                time.time_ns(),
                op,
                target,
                float(strength),
                ramp_s,
                hold_s,
                priority,
                span,
                steps,
            )
            self._publisher.publish(command_to_msg(command))
        return command

    def _wait(self, ready: Callable[[], T | None], timeout: float) -> T | None:
        with self._changed:
            self._changed.wait_for(lambda: ready() is not None, timeout)
            return ready()

    def _state_or_raise(self, wanted: Callable[[NodeState], bool], timeout: float, what: str) -> NodeState:
        found = self._wait(lambda: self._state if self._state is not None and wanted(self._state) else None, timeout)
        if found is None:
            raise SteerError("no_state", f"{what} did not come within {timeout:g} s; the last one was {self._state}")
        return found

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except ExternalShutdownException:
            return

    def _on_verdict(self, message: SteeringVerdictMsg) -> None:
        verdict = verdict_from_msg(message)
        with self._changed:
            self._verdicts[(verdict.source, verdict.epoch, verdict.sequence)] = verdict
            while len(self._verdicts) > MAX_VERDICTS:
                self._verdicts.popitem(last=False)
            self._changed.notify_all()

    def _on_episode(self, message: EpisodeStatus) -> None:
        status = status_from_msg(message)
        with self._changed:
            self._robot = status
            self._changed.notify_all()

    def _on_state(self, message: SteeringStateMsg) -> None:
        state = _state_from_msg(message)
        with self._changed:
            self._state = state
            self._state_count += 1
            self._changed.notify_all()


def _state_from_msg(message: SteeringStateMsg) -> NodeState:
    return NodeState(
        stamp_ns=ns_from_time(message.stamp),
        instance_id=message.instance_id,
        lifecycle=message.lifecycle,
        loop_state=message.loop_state,
        policy=message.policy,
        trained=message.trained,
        model_hash=message.model_hash,
        steering=SteeringStamp(message.steering_epoch, message.steering_sequence),
        directions=tuple(map(KnownDirection, message.direction_names, message.direction_ids, message.direction_limits)),
        axes=tuple(map(KnownAxis, message.axis_names, message.axis_negatives, message.axis_positives)),
        active=tuple(
            ActiveDirection(
                target=a.target,
                direction_id=a.direction_id,
                strength=a.strength,
                commanded=a.commanded,
                priority=a.priority,
                source=a.source,
                span=span_from_mask(a.span),
                shadowed_neurons=a.shadowed_neurons,
                expires_in_s=None if a.expires_in_s < 0 else a.expires_in_s,
                steps=steps_from(a.step_begin, a.step_end),
            )
            for a in message.active
        ),
        counters=dict(zip(message.counter_names, message.counter_values, strict=False)),
        alarms=tuple(message.alarms),
    )
