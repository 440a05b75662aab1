"""The policy node: observations in, stamped actions out, steering commands judged in between.

Invariants: the same node runs against every robot, and publishes no action before the robot has described itself and
fits, nor while it is stopped; whatever arrives, the node answers, counts and goes on; inactive means that no hook is in
the policy.
"""

from __future__ import annotations

import gc
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from std_msgs.msg import String
from std_srvs.srv import Trigger
from steer_msgs.msg import ActionChunk as ActionChunkMsg
from steer_msgs.msg import RobotDescription as RobotDescriptionMsg
from steer_msgs.msg import SteeringCommand as SteeringCommandMsg
from steer_msgs.msg import SteeringState as SteeringStateMsg
from steer_msgs.msg import SteeringVerdict as SteeringVerdictMsg

from ros_nodes.answers import Answers
from ros_nodes.assembler import ObservationAssembler
from ros_nodes.command_json import command_from_json
from ros_nodes.convert import (
    RobotDescription,
    active_to_msg,
    chunk_to_msg,
    clean_text,
    command_from_msg,
    description_from_msg,
    time_from_ns,
    verdict_to_msg,
)
from ros_nodes.diagnosis import ERROR, OK, WARN, Diagnosis, Health
from ros_nodes.estop import Estop
from ros_nodes.evidence import Evidence
from ros_nodes.guard import Complaints, guarded
from ros_nodes.loading import Loaded, PolicyParameters, load
from ros_nodes.parameters import declare, read
from ros_nodes.process import serve
from ros_nodes.qos import ACTION, COMMAND, LATCHED, VERDICT
from ros_nodes.rivals import Rivals
from ros_nodes.sensors import RobotSensors, Take
from steer_runtime.errors import SteerError
from steer_runtime.loop import Inference, LoopEvent
from steer_runtime.steering.command import SteeringCommand, Verdict
from steer_runtime.steering.trace import TraceRecord
from steer_runtime.types import ActionChunk, SteeringStamp, require_match

TICK_S = 0.05
"""Period of the watchdog; also the shortest time between two states."""

PACE_S = 0.004
"""Commands that come faster are judged a few at a time: at 1000 a second it halves the node's processor time."""
ANSWER_AGAIN_S = 0.5
"""The same answer is not published again sooner."""


class PolicyNode(LifecycleNode):
    """See the module. `exit_code` is set when the node wants its process to end."""

    def __init__(self, **node_options: Any) -> None:
        """Declare parameters and topics. Raises SteerError('bad_parameter')."""
        super().__init__("policy", namespace="/steer", **node_options)
        self.exit_code: int | None = None
        self.interruptible = True
        self.instance_id = uuid.uuid4().hex
        self._started_ns = time.time_ns()
        self._settings = declare(self, PolicyParameters)
        self._loaded: Loaded | None = None
        self._description: RobotDescription | None = None
        self._description_refused = ""
        self._session: RobotDescription | None = None  # the robot that the running loop acts for
        self._sensors: RobotSensors | None = None
        self._rivals = Rivals(self.instance_id, self._started_ns)
        self.complaints = Complaints(self)
        self._lifecycle = "unconfigured"
        self._autostart_over = False
        self._last_event: LoopEvent | None = None
        self._last_seen_s = self._last_good_s = self._state_sent_s = self._judged_s = 0.0
        self._answered_frame = self._submitted_frame = 0
        self._last_sent: tuple[float, ActionChunkMsg] | None = None
        self._shown: object = None

        self._state_pub = self.create_publisher(SteeringStateMsg, "state", LATCHED)
        self._verdict_pub = self.create_publisher(SteeringVerdictMsg, "verdict", VERDICT)
        self._rejected_pub = self.create_publisher(SteeringVerdictMsg, "rejected", VERDICT)
        self._answers = Answers(
            self._publish_verdict,
            lambda: self._settings.verdict_rate_hz,
            self.complaints.count,
        )
        self._action_pub = self.create_publisher(ActionChunkMsg, "actions", ACTION)
        self._evidence = Evidence(self)
        self._commands = self.create_subscription(SteeringCommandMsg, "command", self._on_command, COMMAND)
        self.create_subscription(String, "command_json", self._on_command_json, COMMAND)
        self.create_subscription(RobotDescriptionMsg, "robot_description", self._on_description, LATCHED)
        self.create_subscription(SteeringStateMsg, "state", self._on_other_state, LATCHED)
        self.create_service(Trigger, "clear_now", self._on_clear_now)
        self._estop = Estop(self, self._on_estop)
        # Not simulated time, which may stand still or jump: a watchdog must not.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(TICK_S, self._tick, clock=steady)
        self._diagnosis = Diagnosis(self, self.complaints, "steering", self._look)
        self._publish_state()

    # -- lifecycle ----------------------------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load policy, directions and axes, and check that they belong together."""
        self.interruptible = True
        try:
            self._settings = read(self, PolicyParameters)
            self._yield_to_elder()
            self._loaded = load(self._settings, self._on_chunk, self._on_event, self._on_inference)
            self._evidence.describe(self._settings, self._loaded, self.instance_id)
        except Exception as error:
            return self._refused("configure", error)
        finally:
            self.interruptible = False
        # What is loaded stays: a full collection over torch's and the model's objects would stop inference for 0.3 s.
        gc.collect()
        gc.freeze()
        policy = self._loaded.policy
        self.get_logger().info(
            f"policy {policy.name!r} ({'trained' if policy.trained else 'untrained policy'}, {policy.model_hash[:12]}) with "
            f"{len(self._loaded.direction_ids)} directions is ready"
        )
        return self._entered("inactive")

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Shake hands with the robot, then attach the engine and start to infer."""
        try:
            self._yield_to_elder()
            if self._description is None:
                raise SteerError(
                    "no_robot",
                    "no robot has described itself on `robot_description`; start the robot node, then activate",
                )
            self._start(self._description)
        except Exception as error:
            return self._refused("activate", error)
        return self._entered("active")

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop inferring and take every hook out."""
        return self._entered("inactive") if self._stop(10.0) else TransitionCallbackReturn.ERROR

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Forget policy and directions."""
        self._loaded = None
        gc.unfreeze()
        return self._entered("unconfigured")

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop for good."""
        if not self._stop(1.0):
            return TransitionCallbackReturn.ERROR
        self._loaded = None
        return self._entered("finalized")

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """After an inference that did not end: nothing can be trusted, so the node is finalized."""
        self._entered("finalized")
        return TransitionCallbackReturn.FAILURE

    def close(self) -> None:
        """Stop within a second, and say so; a running inference that takes longer is left behind without hooks."""
        self._stop(1.0)
        self._lifecycle = "finalized"
        self._publish_state()

    def _start(self, description: RobotDescription) -> None:
        loaded = self._require_loaded()
        require_match(loaded.policy.action_space, description.space)
        assembler = ObservationAssembler(description, freeze_timeout_s=self._settings.freeze_timeout_s)
        self._last_seen_s = self._last_good_s = time.monotonic()
        self._submitted_frame = self._answered_frame = 0
        self._last_event = self._last_sent = None
        self._session = description
        loaded.loop.start()
        self._sensors = RobotSensors(self, assembler, self._sense)
        mode = "lockstep" if description.lockstep else "free-running"
        self.get_logger().info(f"steering {loaded.policy.name!r} on robot {description.robot!r} ({mode})")

    def _stop(self, timeout_s: float) -> bool:
        if self._sensors is not None:
            self._sensors.close()
            self._sensors = None
        if self._loaded is None:
            return True
        try:
            self._loaded.loop.stop(timeout_s)
        except SteerError as error:
            self._loaded.engine.detach()
            self.get_logger().error(error.sentence)
            return False
        return True

    def _yield_to_elder(self) -> None:
        elder = self._rivals.elder()
        if elder is not None:
            raise SteerError(
                "second_instance",
                f"policy node {elder.instance_id[:8]} runs already in namespace {self.get_namespace()!r} and is older; "
                "this one does not act: stop one of them or give this one another namespace",
            )

    def _refused(self, what: str, error: Exception) -> TransitionCallbackReturn:
        sentence = error.sentence if isinstance(error, SteerError) else f"{type(error).__name__}: {error}"
        self.complaints.count(f"{what}_refused")
        self.get_logger().error(f"cannot {what}: {sentence}")
        self._stop(10.0)
        return TransitionCallbackReturn.FAILURE

    def _entered(self, lifecycle: str) -> TransitionCallbackReturn:
        self._lifecycle = lifecycle
        self._publish_state()
        return TransitionCallbackReturn.SUCCESS

    def _require_loaded(self) -> Loaded:
        if self._loaded is None:
            raise SteerError("not_configured", "the policy node holds no policy yet; configure it first")
        return self._loaded

    # -- commands -----------------------------------------------------------------------------------------------------

    def _publish_verdict(self, verdict: Verdict) -> None:
        message = verdict_to_msg(verdict, time.time_ns())
        self._verdict_pub.publish(message)
        if not verdict.accepted:
            self._rejected_pub.publish(message)

    @guarded
    def _on_command(self, message: SteeringCommandMsg) -> None:
        self._judge_typed(message)
        # One wait of the executor costs more than ten commands: in a flood let a few gather and take them together.
        if time.monotonic() - self._judged_s < PACE_S:
            time.sleep(PACE_S)
        for _ in range(COMMAND.depth):
            with self._commands.handle:
                taken = self._commands.handle.take_message(SteeringCommandMsg, False)
            if taken is None:
                break
            self._judge_typed(taken[0])
        self._judged_s = time.monotonic()

    def _judge_typed(self, message: SteeringCommandMsg) -> None:
        self._judge(lambda: command_from_msg(message), message.source, message.epoch, message.sequence)

    @guarded
    def _on_command_json(self, message: String) -> None:
        self._judge(lambda: command_from_json(message.data), "", 0, 0)

    @guarded
    def _on_clear_now(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self._loaded is not None:
            self._loaded.engine.clear_now()
        response.success, response.message = True, "nothing is steered from the next forward on"
        return response

    @guarded
    def _on_estop(self, by: str) -> None:
        self.complaints.count("emergency_stops")
        if self._loaded is not None:
            self._loaded.engine.clear_now()
            self._loaded.engine.alarm(f"emergency stop by {by}")
            self._loaded.loop.hold(f"emergency stop by {by}")
        self._publish_state()

    def _judge(self, make: Callable[[], SteeringCommand], source: str, epoch: int, sequence: int) -> None:
        self.complaints.count("commands")
        try:
            command = make()
            self._answers.count_missed(command)
            if self._lifecycle != "active":
                source, epoch, sequence = command.source, command.epoch, command.sequence
                raise SteerError("not_active", f"the policy node is {self._lifecycle}; activate it, then send again")
            if self._estop.on:
                source, epoch, sequence = command.source, command.epoch, command.sequence
                raise SteerError("stopped", self._estop.sentence)
        except SteerError as error:
            self._answers.tell(self._refusal(error, source, epoch, sequence))
            return
        loaded = self._require_loaded()
        verdict = loaded.engine.apply(command)
        if verdict.accepted and self._settings.restart_on_command:
            loaded.loop.restart()
        self._answers.tell(verdict)

    def _refusal(self, error: SteerError, source: str, epoch: int, sequence: int) -> Verdict:
        if self._loaded is not None:
            refuse = self._loaded.engine.refuse
            return refuse(error.code, error.sentence, source=source, epoch=epoch, sequence=sequence)
        self.complaints.count("refused")
        return Verdict(False, error.code, error.sentence, source, epoch, sequence, SteeringStamp(0, 0), 0.0)

    # -- robot --------------------------------------------------------------------------------------------------------

    @guarded
    def _on_description(self, message: RobotDescriptionMsg) -> None:
        description = description_from_msg(message)
        if description == self._description:
            return
        self._description, self._description_refused = description, ""
        if self._lifecycle != "active":
            return
        self.get_logger().warning(f"robot session {description.session_id[:8]} began: steering is cleared")
        if not self._stop(10.0):
            self.trigger_deactivate()
            return
        try:
            self._start(description)
        except SteerError as error:
            self.get_logger().error(f"robot {description.robot!r} is refused: {error.sentence}")
            self.trigger_deactivate()

    @guarded
    def _sense(self, take: Take) -> None:
        if self._sensors is None or self._loaded is None:
            return
        if self._estop.on:
            self.complaints.count("withheld_observations")
            return
        try:
            observation = take()
        except SteerError as error:
            if error.code == "stamp_jumped_back":
                self._recover_clock()
            if error.code == "repeated_frame":
                self.complaints.count(error.code)
                self._answer_again()
                return
            raise
        if observation is not None:
            self._last_seen_s = self._last_good_s = time.monotonic()
            self._submitted_frame = observation.frame_id
            self._loaded.loop.submit(observation)

    def _answer_again(self) -> None:
        """A robot that repeats its newest frame has not heard the answer, which came before it could listen."""
        sent = self._last_sent
        if sent is None or self._submitted_frame != sent[1].frame_id or time.monotonic() - sent[0] < ANSWER_AGAIN_S:
            return
        self._last_sent = (time.monotonic(), sent[1])
        self.complaints.count("answered_again")
        self._action_pub.publish(sent[1])

    def _recover_clock(self) -> None:
        """A clock that stays set back is the robot's new time; what was steered under the old one ends."""
        sensors, loaded = self._sensors, self._loaded
        if sensors is None or loaded is None:
            return
        if time.monotonic() - self._last_good_s > self._settings.observation_timeout_s:
            self._last_good_s = time.monotonic()
            sensors.assembler.forget_stamps()
            loaded.engine.clear_now()
            self.complaints.count("clock_resets")
            self.get_logger().warning("the robot's clock was set back: its new time is taken and steering is cleared")

    # -- inference (its own thread) -----------------------------------------------------------------------------------

    @guarded
    def _on_inference(self, inference: Inference) -> None:
        if self._session is not None:
            self._evidence.tell(inference, self.instance_id, self._session.session_id)

    def _on_chunk(self, chunk: ActionChunk) -> None:
        # Not the newest description: a chunk for a robot that has begun anew must not go out in its new session's name.
        session, loaded = self._session, self._loaded
        if session is None or loaded is None:
            return
        if self._estop.on:
            self.complaints.count("withheld_chunks")
            return
        self._write_trace(loaded.engine.trace.last)
        if not session.lockstep and self._silent_s() > self._settings.observation_timeout_s:
            self.complaints.count("withheld_chunks")
            return
        message = chunk_to_msg(
            chunk,
            instance_id=self.instance_id,
            session_id=session.session_id,
            stamp_ns=time.time_ns(),
            trained=loaded.policy.trained,
            # Of this very inference: its thread is the one that calls here. Other policies say nothing.
            said=getattr(loaded.policy, "said", ()),
        )
        self._action_pub.publish(message)
        self._last_sent = (time.monotonic(), message)
        self._answered_frame = chunk.frame_id
        self._last_seen_s = max(self._last_seen_s, time.monotonic() if session.lockstep else 0.0)

    def _write_trace(self, record: TraceRecord | None) -> None:
        """Append a record to `trace_path`; a disk that refuses costs the trace, never the action."""
        if not self._settings.trace_path or record is None:
            return
        try:
            with open(self._settings.trace_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record.to_jsonable()) + "\n")
        except OSError as error:
            self.complaints.refuse(SteerError("trace_not_written", f"the trace was not written: {error}"))

    def _on_event(self, event: LoopEvent) -> None:
        self._last_event = event
        self._answered_frame = self._submitted_frame
        self.complaints.count(f"loop_{event.code}")
        self.complaints.warn(event.code, event.sentence)

    def _silent_s(self) -> float:
        """Seconds for which the robot owes an observation. One in lockstep owes none while it waits for actions."""
        waits = self._session is not None and self._session.lockstep
        if waits and self._submitted_frame != self._answered_frame:
            return 0.0
        return time.monotonic() - self._last_seen_s

    # -- watching -----------------------------------------------------------------------------------------------------

    @guarded
    def _tick(self) -> None:
        self._settings = read(self, PolicyParameters)
        self._answers.tell_delayed()
        if self._lifecycle == "active":
            self._watch_robot()
            self._watch_rivals()
        if self._settings.autostart and not self._autostart_over:
            self._autostart()
        now = time.monotonic()
        if self._fingerprint() != self._shown or now - self._state_sent_s >= 1.0 / self._settings.state_rate_hz:
            self._publish_state()

    def _watch_robot(self) -> None:
        silent = self._silent_s()
        if silent > self._settings.observation_timeout_s:
            self._require_loaded().loop.hold(
                f"no new observation for {silent:.1f} s: no actions are published until the robot sends one"
            )

    def _watch_rivals(self) -> None:
        elder = self._rivals.elder()
        if elder is not None:
            self._autostart_over = True
            self.complaints.count("yielded_to_elder")
            self.get_logger().error(f"policy node {elder.instance_id[:8]} is older: this one deactivates itself")
            self.trigger_deactivate()

    def _autostart(self) -> None:
        """Configure once, activate once; after that a deactivated node stays so until somebody activates it."""
        if self._lifecycle == "unconfigured":
            if self.trigger_configure() != TransitionCallbackReturn.SUCCESS:
                self._autostart_over, self.exit_code = True, 1
        elif self._lifecycle == "inactive" and self._description is not None and not self._description_refused:
            if self._rivals.elder() is not None:
                self._autostart_over = True
            if self.trigger_activate() != TransitionCallbackReturn.SUCCESS:
                self._description_refused = self._description.session_id
            else:
                self._autostart_over = True

    @guarded
    def _on_other_state(self, message: SteeringStateMsg) -> None:
        self._rivals.hear(message)

    # -- telling ------------------------------------------------------------------------------------------------------

    def counters(self) -> Mapping[str, int]:
        """Everything counted: messages by this node, observations and inferences by the loop, commands by the engine."""
        total = Counter(self.complaints.counters)
        if self._sensors is not None:
            total["incomplete_frames"] += self._sensors.assembler.incomplete_frames
        if self._loaded is not None:
            total.update(self._loaded.loop.counters)
            total.update(self._loaded.engine.state().counters)
        return total

    def _fingerprint(self) -> object:
        """Changes exactly when the operator should see a new state at once."""
        if self._loaded is None:
            return self._lifecycle, self._estop.on
        state = self._loaded.engine.state()
        active = tuple((a.target, a.commanded, a.source, a.priority, a.shadowed_neurons) for a in state.active)
        return self._lifecycle, self._estop.on, self._loaded.loop.state, state.steering, active, len(state.alarms)

    @guarded
    def _publish_state(self) -> None:
        self._shown, self._state_sent_s = self._fingerprint(), time.monotonic()
        message = SteeringStateMsg(
            stamp=time_from_ns(time.time_ns()),
            instance_id=self.instance_id,
            started_ns=self._started_ns,
            lifecycle=self._lifecycle,
            loop_state="idle",
        )
        if self._loaded is not None:
            self._fill_state(message, self._loaded)
        if self._estop.on:
            message.loop_state = "stopped"
        counters = self.counters()
        message.counter_names = list(counters)
        message.counter_values = [max(0, value) for value in counters.values()]
        self._state_pub.publish(message)

    def _fill_state(self, message: SteeringStateMsg, loaded: Loaded) -> None:
        state = loaded.engine.state()
        message.loop_state = loaded.loop.state
        message.policy, message.trained = loaded.policy.name, loaded.policy.trained
        message.model_hash = loaded.policy.model_hash
        message.steering_epoch, message.steering_sequence = state.steering.epoch, state.steering.sequence
        message.direction_names = [name for name, _, _ in loaded.direction_ids]
        message.direction_ids = [ref for _, ref, _ in loaded.direction_ids]
        message.direction_limits = [limit for _, _, limit in loaded.direction_ids]
        axes = list(loaded.engine.axes.values())
        message.axis_names = [axis.name for axis in axes]
        message.axis_negatives = [axis.negative for axis in axes]
        message.axis_positives = [axis.positive for axis in axes]
        message.active = [active_to_msg(active) for active in state.active]
        message.alarms = [clean_text(alarm) for alarm in state.alarms]

    def _look(self) -> Health:
        level, sentence = self._health()
        now, counters = time.monotonic(), self.counters()
        values: dict[str, object] = {"instance_id": self.instance_id, "lifecycle": self._lifecycle}
        if self._loaded is not None:
            engine, policy = self._loaded.engine.state(), self._loaded.policy
            values |= {
                "policy": policy.name if policy.trained else f"{policy.name} (untrained policy)",
                "model_hash": policy.model_hash,
                "loop_state": self._loaded.loop.state,
                "steering_sequence": engine.steering.sequence,
                "active": ", ".join(f"{a.target} {a.strength:+.3f}" for a in engine.active),
                "alarms": "; ".join(engine.alarms),
            }
        if self._lifecycle == "active":
            values["observation_age_s"] = now - self._last_good_s
            if self._last_sent is not None:
                values["action_age_s"] = now - self._last_sent[0]
        rates = {name: counters.get(name, 0) for name in ("commands", "observations", "inferences")}
        robot = "" if self._description is None else self._description.robot
        return Health(level, sentence, {**values, **counters}, rates, robot)

    def _health(self) -> tuple[bytes, str]:
        if self._estop.on:
            return ERROR, self._estop.sentence
        if self._loaded is None or self._lifecycle != "active":
            return WARN, self._lifecycle
        untrained = "" if self._loaded.policy.trained else ", untrained policy"
        event = self._last_event.sentence if self._last_event is not None else "waiting for observations"
        match self._loaded.loop.state:
            case "error":
                return ERROR, event
            case "holding":
                return WARN, event
        if self._loaded.engine.state().alarms:
            return WARN, self._loaded.engine.state().alarms[-1]
        return OK, f"running{untrained}"


def main(args: list[str] | None = None) -> NoReturn:
    """Entry point of the process."""
    serve(PolicyNode, args)


if __name__ == "__main__":
    main()
