"""A UR arm without ROS: Universal Robots' real-time data exchange through `ur-rtde`, as an ArmPort.

Invariants: nothing is sent unless the port was opened to control, and then only points of motions that end at rest, each
point one period ahead of the last, so that an arm whose sender has died has nowhere left to go; the controller's own
watchdog ends the program when no word comes for `watchdog_s`. A program that has stopped is started again by `restart`
alone.

Servoing: the controller is given `servoj(q, t, lookahead_time, gain)` once a period (URScript manual, "servoj"). As the
speed slider does not slow servoj, motions advance by the speed scaling here, as ROS's scaled trajectory controller does.
Frames: the controller's base is ROS's base_link turned by pi about z (REP 199).
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arm.port import ArmState, JointMotion, Joints
from steer_runtime.errors import SteerError

VARIABLES = [
    "timestamp",
    "actual_q",
    "actual_qd",
    "actual_TCP_pose",
    "robot_status_bits",
    "safety_status_bits",
    "runtime_state",
    "speed_scaling",
    "target_speed_fraction",
]
PROGRAM_RUNNING = 1 << 1
"""Of robot_status_bits (RTDE guide)."""
STOPPED = 0b111_1111_1100 & ~(1 << 3)
"""Of safety_status_bits: every stop, violation and fault; not the first two and recovery mode (RTDE guide)."""


RELEASED = ("NORMAL", "REDUCED")
RELEASE_S = 3.0
"""In which a controller that has agreed releases a stop."""


@dataclass(frozen=True)
class RtdeSettings:
    """rate_hz: of points sent and states read. lookahead_s, gain: of servoj. watchdog_s: silence that ends the program.

    deceleration_rad_s2: of stops.
    """

    rate_hz: float = 125.0
    lookahead_s: float = 0.1
    gain: float = 300.0
    watchdog_s: float = 0.2
    deceleration_rad_s2: float = 2.0


class RtdePort:
    """See the module; an `arm.port.ArmPort`. host: of the controller.

    control: upload the control script, and so start a program on the controller. Without it the port only reads, and its
    arm says that no program runs. It has no gripper: openings are counted as `grip_ignored`.
    Raises SteerError('no_rtde') without the package, 'no_arm' when the controller cannot be reached or will not be
    controlled.
    """

    def __init__(
        self,
        host: str,
        *,
        control: bool,
        settings: RtdeSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings or RtdeSettings()
        self._host, self._clock = host, clock
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter()
        self._told: tuple[float, float] = (-1.0, 0.0)  # the controller's time of the newest state, and ours
        self._motion: _Running | None = None
        self._commanded: Joints | None = None
        self._halting = False
        self._closing = threading.Event()
        receive_kind, control_kind = _interfaces()
        self._control: Any = None
        self._thread: threading.Thread | None = None
        try:
            self._receive = receive_kind(host, self.settings.rate_hz, VARIABLES)
            if control:
                self._control = control_kind(host, self.settings.rate_hz, control_kind.FLAG_UPLOAD_SCRIPT)
                self._watch()
        except RuntimeError as error:
            raise SteerError(
                "no_arm",
                f"the controller at {host} cannot be {'controlled' if control else 'read'}: {error}; check the address, that "
                "the arm is on, and on an e-Series that it is in remote control",
            ) from error
        if control:
            self._thread = threading.Thread(target=self._serve, name="rtde", daemon=True)
            self._thread.start()

    @property
    def counters(self) -> Mapping[str, int]:
        """Points sent and refused, motions replaced, dropped and finished, halts, and what else befell them."""
        with self._lock:
            return dict(self._counters)

    # -- ArmPort ------------------------------------------------------------------------------------------------------

    def read(self) -> ArmState | None:
        """As ArmPort. A controller that has fallen silent leaves a state that ages."""
        receive = self._receive
        told = receive.getTimestamp()
        with self._lock:
            if told > 0 and told != self._told[0]:
                self._told = (told, self._clock())
            heard, stamp = self._told
        if heard <= 0:
            return None
        position, quaternion = in_base_link(receive.getActualTCPPose())
        return ArmState(
            stamp_s=stamp,
            positions=np.array(receive.getActualQ(), dtype=np.float64),
            velocities=np.array(receive.getActualQd(), dtype=np.float64),
            tcp_position=position,
            tcp_quaternion=quaternion,
            program_running=self._program_runs(),
            speed_scaling=float(np.clip(receive.getSpeedScalingCombined(), 0.0, 1.0)),
            gripper=None,
        )

    def send(self, motion: JointMotion) -> None:
        """As ArmPort. Dropped, and counted, by a port that only reads and while no program runs."""
        with self._lock:
            if self._control is None or not self._program_runs():
                self._counters["dropped_motions"] += 1
                return
            if self._motion is not None:
                self._counters["replaced_motions"] += 1
            start = self._commanded
            if start is None:
                start = np.array(self._receive.getActualQ(), dtype=np.float64)
            self._motion = _Running(motion, start)
            self._halting = False

    def grip(self, opening: float) -> None:
        """As ArmPort: there is no gripper behind this port."""
        with self._lock:
            self._counters["grip_ignored"] += 1

    def halt(self) -> None:
        """As ArmPort."""
        with self._lock:
            self._motion, self._halting = None, True
            self._counters["halts"] += 1

    def close(self) -> None:
        """As ArmPort. Brings the arm to rest and ends the program; safe to call twice."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(2.0)
            self._thread = None
        self._receive.disconnect()

    # -- beyond ArmPort -----------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Upload the control script again, once the cause of a stop is gone; what was moving is forgotten.

        Raises SteerError('no_arm' | 'reads_only').
        """
        if self._control is None:
            raise SteerError("reads_only", "the port only reads: open it to control, which starts a program on the arm")
        self.halt()
        try:
            self._control.reuploadScript()
            self._watch()
        except RuntimeError as error:
            raise SteerError("no_arm", f"the program at {self._host} did not start again: {error}") from error

    # -- serving (its own thread) -------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Let the controller end the program when nothing is heard."""
        self._control.setWatchdog(1.0 / self.settings.watchdog_s)

    def _serve(self) -> None:
        period = 1.0 / self.settings.rate_hz
        due = self._clock()
        while not self._closing.is_set():
            try:
                self._tick(period)
            except RuntimeError:
                # ur-rtde raises it for a connection that is gone; the state ages meanwhile, and so the core stops.
                with self._lock:
                    self._counters["connection_errors"] += 1
                    self._motion = self._commanded = None
            due = max(due + period, self._clock())
            self._closing.wait(due - self._clock())
        self._finish()

    def _tick(self, period: float) -> None:
        """One period: a point of the motion, a stop, or a sign of life."""
        scaling = float(np.clip(self._receive.getSpeedScalingCombined(), 0.0, 1.0))
        with self._lock:
            halting, self._halting = self._halting, False
            running = self._motion
            if not self._program_runs():
                self._counters["dropped_motions"] += running is not None
                self._motion = self._commanded = None
                return
        if halting:
            self._stop_servoing()
        elif running is None:
            self._control.kickWatchdog()
        else:
            self._point(running, running.advance(period * scaling), period)

    def _point(self, running: _Running, point: Joints, period: float) -> None:
        settings = self.settings
        taken = self._control.servoJ(point.tolist(), 0.0, 0.0, period, settings.lookahead_s, settings.gain)
        with self._lock:
            self._counters["points" if taken else "refused_points"] += 1
            if self._motion is not running:
                return
            self._commanded = point if taken else None
            if not taken:
                self._motion = None
                self._counters["dropped_motions"] += 1
            elif running.over(settings.lookahead_s):
                self._motion = None
                self._counters["finished_motions"] += 1

    def _stop_servoing(self) -> None:
        with self._lock:
            self._commanded = None
        self._control.servoStop(self.settings.deceleration_rad_s2)

    def _finish(self) -> None:
        try:
            if self._program_runs():
                self._stop_servoing()
            self._control.stopScript()
            self._control.disconnect()
        except RuntimeError:
            with self._lock:
                self._counters["connection_errors"] += 1

    def _program_runs(self) -> bool:
        receive = self._receive
        status, safety = receive.getRobotStatus(), receive.getSafetyStatusBits()
        return self._control is not None and bool(status & PROGRAM_RUNNING) and not safety & STOPPED


class _Running:
    """A motion on its way: lines from where the arm was sent last through its points, at the arm's own speed."""

    def __init__(self, motion: JointMotion, start: Joints) -> None:
        self._times = np.concatenate([[0.0], motion.times_s])
        self._positions = np.vstack([start, motion.positions])
        self._progress_s = 0.0

    def advance(self, seconds: float) -> Joints:
        """Go on by so long, and say where that is; the end, once it is reached."""
        self._progress_s += seconds
        return np.array([np.interp(self._progress_s, self._times, column) for column in self._positions.T])

    def over(self, settling_s: float) -> bool:
        """Whether the arm has had so long to settle at the end."""
        return self._progress_s >= self._times[-1] + settling_s


@dataclass(frozen=True)
class Box:
    """What the controller's dashboard says: modes as it words them, such as RUNNING and NORMAL."""

    robot_mode: str
    safety_status: str
    program: str
    remote_control: bool


def ask_box(host: str) -> Box:
    """What the controller says of itself. Raises SteerError('no_rtde' | 'no_arm')."""
    with _dashboard(host) as dashboard:
        return Box(
            robot_mode=_answer(dashboard.robotmode()),
            safety_status=_answer(dashboard.safetystatus()),
            program=_answer(dashboard.programState()),
            remote_control=dashboard.isInRemoteControl(),
        )


def unlock(host: str) -> Box:
    """Release a protective stop, once its cause is gone; UR's controllers take that from five seconds after the stop on.

    Starts no program and moves nothing. Raises SteerError('no_rtde' | 'no_arm' | 'still_stopped').
    """
    with _dashboard(host) as dashboard:
        try:
            dashboard.closeSafetyPopup()
            dashboard.unlockProtectiveStop()
        except RuntimeError as error:
            raise _still_stopped(host, str(error)) from error
    deadline = time.monotonic() + RELEASE_S
    while (box := ask_box(host)).safety_status not in RELEASED:
        if time.monotonic() > deadline:
            raise _still_stopped(host, box.safety_status)
        time.sleep(0.1)
    return box


def _still_stopped(host: str, why: str) -> SteerError:
    return SteerError(
        "still_stopped",
        f"the controller at {host} does not release its stop ({why}): clear the cause, wait five seconds after the stop, and "
        "see the pendant",
    )


@contextmanager
def _dashboard(host: str) -> Iterator[Any]:
    try:
        from dashboard_client import DashboardClient
    except ImportError as error:
        raise _no_rtde(error) from error
    client = DashboardClient(host)
    try:
        client.connect(2000)
        yield client
    except RuntimeError as error:
        raise SteerError("no_arm", f"the dashboard of the controller at {host} does not answer: {error}") from error
    finally:
        if client.isConnected():
            client.disconnect()


def _answer(text: str) -> str:
    """The part after the colon of an answer such as "Robotmode: RUNNING"; of "PLAYING name.urp" the first word."""
    words = text.split(":", 1)[-1].split()
    return words[0] if words else ""


def in_base_link(pose: list[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Position [3] m and quaternion [4] (x, y, z, w) in base_link of the controller's pose [x, y, z, rx, ry, rz] in base.

    base_link is base turned by pi about z: p = (-x, -y, z), q = (0, 0, 1, 0) q_base.
    """
    x, y, z = pose[:3]
    turn = np.array(pose[3:], dtype=np.float64)
    angle = float(np.linalg.norm(turn))
    axis = turn / angle if angle > 1e-12 else np.array([0.0, 0.0, 1.0])
    qx, qy, qz = axis * np.sin(angle / 2)
    qw = np.cos(angle / 2)
    return np.array([-x, -y, z]), np.array([-qy, qx, qw, -qz])


def _interfaces() -> tuple[Any, Any]:
    """Classes of `ur-rtde`: receive and control. Raises SteerError('no_rtde')."""
    try:
        from rtde_control import RTDEControlInterface
        from rtde_receive import RTDEReceiveInterface
    except ImportError as error:
        raise _no_rtde(error) from error
    return RTDEReceiveInterface, RTDEControlInterface


def _no_rtde(error: ImportError) -> SteerError:
    return SteerError("no_rtde", f"an arm without ROS needs ur-rtde ({error}); run `pip install 'steer-runtime[rtde]'`")
