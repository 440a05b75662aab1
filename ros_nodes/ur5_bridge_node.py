"""A UR arm on its stock ROS 2 driver as the robot that a policy acts on: the lifecycle node `ur5_bridge`.

Invariants: it begins in a dry run, in which nothing reaches the driver; only `~/arm` lets motion through, and whatever
stops it demands that again. Frames are what ros_nodes.robot_node shows; limits are the motion core's (arm.motion), which
ticks in a thread of its own.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.lifecycle.node import LifecycleNodeMixin
from std_msgs.msg import String
from std_srvs.srv import SetBool
from steer_msgs.msg import ActionChunk as ActionChunkMsg
from trajectory_msgs.msg import JointTrajectory

from arm.actions import ActionReader
from arm.motion import CoreState, MotionCore
from arm.port import JointMotion
from arm.robot import ArmRobot, StateFrame
from arm.settings import ArmSettings, load_settings
from arm.ticker import Ticker
from ros_nodes.arm_cameras import ArmCameras, camera_topics
from ros_nodes.diagnosis import ERROR, OK, WARN, Health
from ros_nodes.estop import Estop
from ros_nodes.guard import guarded
from ros_nodes.parameters import declare, parameter
from ros_nodes.process import serve
from ros_nodes.qos import LATCHED, SENSOR
from ros_nodes.robot_node import Frame, Robot, RobotNode, RobotParameters
from ros_nodes.ur_driver import UrDriver, UrDriverParameters, trajectory_to_msg
from steer_runtime.chunk_queue import Tick
from steer_runtime.errors import SteerError
from steer_runtime.types import ActionSpace

WATCH_S = 0.05
STATE_S = 0.5
"""The state is told at least so often: it is the bridge's heartbeat."""
CLOCK_JUMP_S = 0.5
"""The wall clock may part from the steady one by so much between two looks."""
RIVAL_S = 2.0
"""Another bridge is there while its state is not older."""


@dataclass(frozen=True)
class ArmRobotParameters(RobotParameters):
    """Of every robot node; an arm runs on the wall clock."""

    mode: str = parameter("free", "an arm runs on the wall clock", choices=("free",))


@dataclass(frozen=True)
class BridgeParameters:
    """Parameters of the bridge. The action space is what the checkpoint declares; `rate_hz` is its rate."""

    autostart: bool = parameter(True, "configure and activate by itself; never arms")
    arm_settings: str = parameter("ur5e", "YAML file of limits, or its name in configs/robots")
    instruction: str = parameter("", "the task in words")
    cameras: tuple[str, ...] = parameter(
        ("agentview:/agentview/image_raw", "wrist:/wrist/image_raw"), "name of a picture for the policy : topic (rgb8)"
    )
    camera_timeout_s: float = parameter(0.5, "older pictures make no frame", low=0.02, high=10.0)
    camera_skew_s: float = parameter(0.1, "stamps of the cameras of a frame may differ by so much", low=0.0, high=10.0)
    action_kind: str = parameter("ee_delta", "of the checkpoint", choices=("ee_delta", "joint_delta", "joint_abs"))
    action_rotation: str = parameter(
        "axis_angle", "of ee_delta; none for joints", choices=("axis_angle", "rpy", "none")
    )
    action_frame: str = parameter(
        "base", "of ee_delta: base or base_link (x forward), ur_base (the controller's), tool0"
    )
    action_dims: int = parameter(7, "numbers of a row, the gripper's the last", low=2, high=64)
    position_scale_m: float = parameter(0.05, "metres a step at action 1.0", low=0.0, high=1.0)
    rotation_scale_rad: float = parameter(0.5, "radians a step at action 1.0; of joints too", low=0.0, high=10.0)
    gripper_open: float = parameter(-1.0, "number that opens the gripper", low=-10.0, high=10.0)
    gripper_close: float = parameter(1.0, "number that closes it", low=-10.0, high=10.0)
    state_offset_x_m: float = parameter(
        0.0, "where base_link is in the frame of the policy's state", low=-10.0, high=10.0
    )
    state_offset_y_m: float = parameter(0.0, "the same, y", low=-10.0, high=10.0)
    state_offset_z_m: float = parameter(0.0, "the same, z", low=-10.0, high=10.0)
    state_tool_yaw_rad: float = parameter(
        0.0, "turn from the TCP's axes to the hand's of the policy's state, about z", low=-6.3, high=6.3
    )
    motion_scale: float = parameter(0.2, "part of each delta that is executed; 1.0 for joint_abs", low=0.001, high=1.0)


@dataclass
class _Configured:
    """What a configured bridge holds."""

    driver: UrDriver
    cameras: ArmCameras
    core: MotionCore
    ticker: Ticker | None = None
    robot: ArmRobot | None = None


class Ur5BridgeNode(LifecycleNodeMixin, RobotNode):
    """See the module."""

    parameters = ArmRobotParameters
    pose_frame = "base_link"

    def __init__(self, **node_options: Any) -> None:
        """Declare parameters and topics. Raises SteerError('bad_parameter')."""
        self._active = False
        self._configured: _Configured | None = None
        RobotNode.__init__(self, "ur5_bridge", "ur5", self._make_robot, **node_options)
        LifecycleNodeMixin.__init__(self)
        self._bridge = declare(self, BridgeParameters)
        self._driver_names = declare(self, UrDriverParameters)
        self._instance = uuid.uuid4().hex
        self._lifecycle, self._autostart_over = "unconfigured", False
        self._refused = ""
        self._rivals: dict[str, tuple[float, bool]] = {}
        self._told: tuple[float, object] = (0.0, None)
        self._told_lock = threading.Lock()
        self._offset_s = time.time() - time.monotonic()
        self._estop = Estop(self, self._on_estop, prefix="~/")
        self._state_pub = self.create_publisher(String, "arm_state", LATCHED)
        self._planned_pub = self.create_publisher(JointTrajectory, "~/planned", SENSOR)
        self.create_subscription(String, "arm_state", self._on_other_state, LATCHED)
        self.create_service(SetBool, "~/arm", self._on_arm)
        self.create_timer(WATCH_S, self._watch, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._tell()

    # -- lifecycle ----------------------------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Read the limits, check the action space against them, and listen to the driver and cameras."""
        try:
            settings = load_settings(self._bridge.arm_settings)
            reader = ActionReader(self._space(), settings, self._bridge.motion_scale)
            topics = camera_topics(self._bridge.cameras)
            driver = UrDriver(self, self._driver_names, self.complaints)
            core = MotionCore(settings, reader, driver, self._publish_planned)
        except SteerError as error:
            self._refused = error.sentence
            self.complaints.count("configure_refused")
            self.get_logger().error(f"cannot configure: {error.sentence}")
            return TransitionCallbackReturn.FAILURE
        cameras = ArmCameras(
            self,
            topics,
            self.complaints,
            timeout_s=self._bridge.camera_timeout_s,
            skew_s=self._bridge.camera_skew_s,
        )
        self._configured = _Configured(driver, cameras, core)
        if self._estop.on:
            core.estop(time.monotonic())
        self.get_logger().info(f"limits of {settings.arm}: {_in_words(settings)}; dry run until armed")
        return self._entered("inactive")

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Begin to show frames and to take actions, in the dry run."""
        configured = self._configured
        assert configured is not None
        configured.ticker = Ticker(configured.core, configured.driver, self.complaints.refuse)
        self._active = True
        return self._entered("active")

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Come to rest and lose the arming."""
        self._rest()
        return self._entered("inactive")

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let go of driver and cameras."""
        self._let_go()
        return self._entered("unconfigured")

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop for good."""
        self._rest()
        self._let_go()
        return self._entered("finalized")

    def close(self) -> None:
        """Brake, say so, and let go: what was sent ends at rest by itself."""
        self._rest()
        self._lifecycle = "finalized"
        self._tell()
        super().close()
        self._let_go()

    def _rest(self) -> None:
        self._active = False
        configured = self._configured
        if configured is None:
            return
        configured.core.disarm(time.monotonic())
        if configured.ticker is not None:
            configured.ticker.close()
            configured.ticker = None
        # The next activation begins with a frame of its own; chunks for the last one are refused.
        self._frame = self._chunk = self._robot = configured.robot = None

    def _let_go(self) -> None:
        configured, self._configured = self._configured, None
        if configured is not None:
            configured.cameras.close()
            configured.driver.close()

    def _entered(self, lifecycle: str) -> TransitionCallbackReturn:
        self._lifecycle = lifecycle
        self._tell()
        return TransitionCallbackReturn.SUCCESS

    def _space(self) -> ActionSpace:
        told = self._bridge
        return ActionSpace(
            kind=told.action_kind,  # type: ignore[arg-type]
            rotation=told.action_rotation,  # type: ignore[arg-type]
            frame=told.action_frame,
            position_scale_m=told.position_scale_m,
            rotation_scale_rad=told.rotation_scale_rad,
            rate_hz=self._settings.rate_hz,
            gripper_open=told.gripper_open,
            gripper_close=told.gripper_close,
            dims=told.action_dims,
        )

    # -- the robot that RobotNode steps -------------------------------------------------------------------------------

    def _make_robot(self) -> Robot:
        configured = self._configured
        assert configured is not None
        told = self._bridge
        configured.robot = ArmRobot(
            configured.core,
            configured.driver,
            configured.cameras.fresh,
            self._bridge.instruction,
            state_frame=StateFrame(
                (told.state_offset_x_m, told.state_offset_y_m, told.state_offset_z_m), told.state_tool_yaw_rad
            ),
        )
        return configured.robot

    @guarded
    def _tick(self) -> None:
        configured = self._configured
        if not self._active or configured is None:
            return
        if self._frame is None and (configured.driver.missing or not configured.cameras.fresh()):
            waits = (*configured.driver.missing, *(f"camera {name}" for name in configured.cameras.stale()))
            self.complaints.warn("waiting", f"waiting for {', '.join(waits)}")
            return
        super()._tick()

    def _drive(self, robot: Robot, now: Tick, draw: bool) -> Frame:
        assert isinstance(robot, ArmRobot)
        return robot.hold(draw=draw) if now.hold else robot.step(now.action, draw=draw)

    def _resting(self, robot: Robot) -> np.ndarray | None:
        assert isinstance(robot, ArmRobot)
        return robot.resting() if robot.action_space.kind == "joint_abs" else None

    def _publish_frame(self) -> None:
        # A frame without all pictures would never be whole at the policy's, which then holds by itself.
        if self._frame is not None and not self._frame.images:
            self.complaints.count("frames_without_pictures")
            names = self._configured.cameras.stale() if self._configured is not None else ()
            self.complaints.warn(
                "no_pictures", f"no fresh picture of {', '.join(names) or 'one moment'}: no frame is shown"
            )
            return
        super()._publish_frame()

    def _require_owner(self, message: ActionChunkMsg) -> None:
        """As of every robot; and whoever armed the arm armed it for the policy that answered then, not for its successor."""
        super()._require_owner(message)
        before = self._owner
        if before is None or before[0] == message.instance_id or self._configured is None:
            return
        core = self._configured.core
        if core.state().mode == "armed":
            core.stop(
                "policy_changed",
                f"policy node {message.instance_id[:8]} answers in place of {before[0][:8]}: look at what it does, then arm again",
                time.monotonic(),
            )
            self._tell()

    # -- arming and stopping ------------------------------------------------------------------------------------------

    def _on_arm(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        now = time.monotonic()
        try:
            if not self._active or self._configured is None:
                raise SteerError("not_active", f"the bridge is {self._lifecycle}: activate it, then arm")
            if request.data:
                self._require_alone(now)
                self._configured.core.arm(now)
                # Made before the arm was: nobody has seen what they lead to.
                self._chunk = None
                if self._queue is not None:
                    self._queue.reset()
                self.get_logger().warning("ARMED: actions move the arm")
            else:
                self._configured.core.disarm(now)
        except SteerError as error:
            self.complaints.refuse(error)
            response.success, response.message = False, f"{error.code}: {error.sentence}"
        else:
            response.success, response.message = True, "armed" if request.data else "dry run"
        self._tell()
        return response

    def _on_estop(self, by: str) -> None:
        if self._configured is not None:
            self._configured.core.estop(time.monotonic())
        self._tell()

    def _require_alone(self, now_s: float) -> None:
        armed = [name for name, (heard_s, is_armed) in self._rivals.items() if is_armed and now_s - heard_s < RIVAL_S]
        if armed:
            raise SteerError(
                "second_bridge", f"bridge {armed[0][:8]} is armed on this arm: disarm or stop it, then arm this one"
            )

    @guarded
    def _on_other_state(self, message: String) -> None:
        try:
            told = json.loads(message.data)
            instance, mode = str(told["instance"]), str(told["mode"])
        except (ValueError, TypeError, KeyError) as error:
            raise SteerError("bad_arm_state", f"an arm state is not what a bridge tells: {error}") from error
        if instance == self._instance:
            return
        if len(self._rivals) > 16:
            self._rivals.clear()
        self._rivals[instance] = time.monotonic(), mode == "armed"

    # -- watching and telling -----------------------------------------------------------------------------------------

    @guarded
    def _watch(self) -> None:
        offset_s = time.time() - time.monotonic()
        jump_s, self._offset_s = offset_s - self._offset_s, offset_s
        configured = self._configured
        if configured is not None:
            if abs(jump_s) > CLOCK_JUMP_S:
                self.complaints.count("clock_jumps")
                configured.core.stop(
                    "clock_jump", f"the wall clock jumped by {jump_s:.1f} s; arm again", time.monotonic()
                )
            if not self._estop.on and configured.core.state().estop:
                configured.core.reset_estop()
        if self._bridge.autostart and not self._autostart_over:
            self._autostart()
        fingerprint = self._fingerprint()
        if fingerprint != self._told[1] or time.monotonic() - self._told[0] >= STATE_S:
            self._tell()

    def _autostart(self) -> None:
        self._autostart_over = self._lifecycle != "unconfigured"
        if self._lifecycle == "unconfigured":
            if self.trigger_configure() != TransitionCallbackReturn.SUCCESS:
                self._autostart_over, self.exit_code = True, 1
        elif self._lifecycle == "inactive":
            self.trigger_activate()

    def _fingerprint(self) -> object:
        """Changes exactly when an operator should see a new state at once."""
        core = None if self._configured is None else self._configured.core.state()
        if core is None:
            return self._lifecycle, self._estop.on
        return self._lifecycle, core.mode, core.code, core.estop, core.moving, core.limited_by

    @guarded
    def _tell(self) -> None:
        with self._told_lock:
            self._told = time.monotonic(), self._fingerprint()
            self._state_pub.publish(String(data=json.dumps(self._as_json())))

    def _as_json(self) -> dict[str, Any]:
        told: dict[str, Any] = {
            "instance": self._instance,
            "stamp_s": time.time(),
            "lifecycle": self._lifecycle,
            "mode": "dry_run",
            "code": "",
            "sentence": self._refused,
            "estop": self._estop.on,
        }
        configured = self._configured
        if configured is None:
            return told
        core = configured.core.state()
        told |= {
            "mode": core.mode,
            "code": core.code,
            "sentence": core.sentence,
            "moving": core.moving,
            "limited_by": list(core.limited_by),
            "commanded_rad": _rounded(core.commanded),
            "target_rad": _rounded(core.target),
            "gripper_opening": core.opening,
            "speed_scaling": core.speed_scaling,
            "horizon_s": configured.core.settings.motion.horizon_s,
            "waiting_for": [*configured.driver.missing, *configured.cameras.stale()],
            "counters": dict(core.counters),
        }
        return told

    def health(self) -> Health:
        """As of every robot, with what the motion core counts."""
        usual = super().health()
        configured = self._configured
        core = None if configured is None else configured.core.state()
        if core is None or configured is None:
            return Health(WARN, self._lifecycle, usual.values, usual.rates, "ur5")
        values = {**usual.values, "arm_mode": core.mode, "arm_code": core.code, **core.counters}
        level, sentence = _judged(core, usual)
        return Health(level, sentence, values, usual.rates, configured.core.settings.arm)

    def _publish_planned(self, motion: JointMotion) -> None:
        """Hears every planned motion, in the ticking thread."""
        self._planned_pub.publish(trajectory_to_msg(motion))


def _judged(core: CoreState, usual: Health) -> tuple[bytes, str]:
    if core.mode == "stopped":
        return ERROR, f"stopped ({core.code}): {core.sentence}"
    if core.mode == "dry_run":
        return WARN, "dry run: nothing reaches the driver until `~/arm`"
    return (OK if usual.level == OK else WARN), f"armed; {usual.sentence}"


def _rounded(joints: np.ndarray | None) -> list[float] | None:
    return None if joints is None else [round(float(value), 5) for value in joints]


def _in_words(settings: ArmSettings) -> str:
    limits = settings.limits
    return f"{limits.tcp_speed_m_s:g} m/s, {max(limits.joint_speed_rad_s):.2f} rad/s a joint"


def main(args: list[str] | None = None) -> NoReturn:
    """Entry point of the process."""
    serve(Ur5BridgeNode, args)


if __name__ == "__main__":
    main()
