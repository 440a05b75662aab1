"""A UR5e with its controller box, as far as a driver can tell: program, protective stop, speed slider, three controllers.

Invariant: nothing but `advance` moves time, so that the same calls at the same times give the same motion; and what
moves the arm is the controller that is active, at the pace that program and slider leave it.

Pace is the part of the wanted speed at which motion goes on, 0 to 1. A stop of any kind lowers it to 0 within 0.1 s, so
the arm brakes on its path and keeps what is left of it: after `play` the old motion goes on, as on the real arm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mujoco
import numpy as np

from sim.ur5.names import CONTROLLERS, JOINTS, POSITION, TRAJECTORY, UNLOCK_DELAY_S, VELOCITY
from sim.ur5.scene import GRIPPER_CLOSED, PREFIX, TCP, Scene
from sim.ur5.trajectory import Trajectory, TrajectoryController
from sim.ur5.truth import Peaks
from steer_runtime.errors import SteerError

JOINT_SPEED_RAD_S = 3.14
"""Hardware limit of a joint (UR5e data sheet: 180 deg/s)."""
_SERVO_RAD_S = 120.0  # natural frequency of the critically damped joint servo
_OVERLOAD_S = 0.1  # of a joint at its largest torque
_PACE_DOWN, _PACE_UP = 10.0, 3.0  # 1/s: braking within 0.1 s, starting within 0.33 s


@dataclass(frozen=True)
class Measured:
    """What the arm's sensors say, and what its controller box says of itself.

    positions, velocities [6]: rad, rad/s, kinematic order. tcp_position [3] m, tcp_quaternion [4] (x, y, z, w): in the
    controller's frame `base`. gripper: knuckle joint, rad. speed_scaling: 0 to 1.
    """

    time_s: float
    positions: np.ndarray
    velocities: np.ndarray
    tcp_position: np.ndarray
    tcp_quaternion: np.ndarray
    gripper: float
    program_running: bool
    protective_stop: bool
    speed_scaling: float


class Ur5Arm:
    """See the module. Not for several threads."""

    def __init__(self, scene: Scene, *, playing: bool = True, unlock_delay_s: float = UNLOCK_DELAY_S) -> None:
        """playing: whether the program runs from the start."""
        self.model = scene.model
        self.data = mujoco.MjData(self.model)
        self.time_s = self._due = self._over_s = 0.0
        self.period_s = float(self.model.opt.timestep)
        joints = [self.model.joint(f"{PREFIX}{joint}") for joint in JOINTS]
        self._q = np.array([joint.qposadr[0] for joint in joints])
        self._v = np.array([joint.dofadr[0] for joint in joints])
        self._torques = np.array([self.model.actuator(f"{PREFIX}{j.removesuffix('_joint')}").id for j in JOINTS])
        self._fingers = self.model.actuator(f"{PREFIX}gripper/fingers_actuator").id
        self._knuckle = self.model.joint(f"{PREFIX}gripper/left_driver_joint").qposadr[0]
        self._base, self._tcp = self.model.body(f"{PREFIX}base").id, self.model.site(TCP).id
        self._things = [self.model.joint(thing).qposadr[0] + np.arange(3) for thing in scene.things]
        self._inertia = np.zeros((self.model.nv, self.model.nv))
        self._unlock_delay_s = unlock_delay_s

        if scene.qpos is not None:
            self.data.qpos[:] = scene.qpos
        self.data.qpos[self._q] = scene.start
        mujoco.mj_forward(self.model, self.data)
        self._program = playing
        self._stopped_at_s: float | None = None  # of a protective stop that is not unlocked
        self._slider = 1.0
        self._pace = 1.0 if playing else 0.0
        self._trajectory = TrajectoryController(self.positions)
        self._goal = self.positions
        self.activate(TRAJECTORY)
        self.peaks = Peaks(self.period_s)
        self._last_tcp = self.data.site_xpos[self._tcp].copy()
        self.tcp_speed = 0.0
        self.on_step: Callable[[Ur5Arm], None] = lambda _: None

    # -- time ---------------------------------------------------------------------------------------------------------

    def advance(self, seconds: float) -> None:
        """Let so much time pass, in whole steps of 2 ms; the rest is kept for the next call."""
        self._due += seconds
        while self._due > self.period_s - 1e-9:
            self._due -= self.period_s
            self._step()

    def _step(self) -> None:
        data = self.data
        wanted = self._slider if self._program else 0.0
        change = np.clip(wanted - self._pace, -_PACE_DOWN * self.period_s, _PACE_UP * self.period_s)
        self._pace += float(change)
        goal, speed = self._wanted()
        mujoco.mj_step1(self.model, data)
        position, velocity = data.qpos[self._q], data.qvel[self._v]
        # Computed torque: each joint follows its goal like a critically damped spring, whatever the arm's pose.
        pull = _SERVO_RAD_S**2 * (goal - position) + 2 * _SERVO_RAD_S * (speed - velocity)
        mujoco.mj_fullM(self.model, data, self._inertia)
        torque = self._inertia[np.ix_(self._v, self._v)] @ pull + data.qfrc_bias[self._v]
        data.ctrl[self._torques] = torque
        self._feel(torque)
        mujoco.mj_step2(self.model, data)
        self.time_s += self.period_s
        self._judge()

    def _feel(self, torque: np.ndarray) -> None:
        """Stop by itself where a joint has long asked for more than it has: the arm pushes against something."""
        over = np.abs(torque) > self.model.actuator_ctrlrange[self._torques, 1]
        self._over_s = self._over_s + self.period_s if over.any() and self._controller == TRAJECTORY else 0.0
        if self._over_s > _OVERLOAD_S and self._program:
            self.stop_protectively()

    def _wanted(self) -> tuple[np.ndarray, np.ndarray]:
        """Position and velocity the active controller asks for at the end of this period."""
        most = JOINT_SPEED_RAD_S * self._pace * self.period_s
        if self._controller == TRAJECTORY:
            return self._trajectory.sample(self.period_s, self._pace)
        if self._controller == POSITION:
            self._goal = self._goal + np.clip(self._target - self._goal, -most, most)
            return self._goal, np.zeros(6)
        # No time-out: the last velocity is followed for ever, and only joint ranges end it.
        step = np.clip(self._velocity * self._pace * self.period_s, -most, most)
        self._goal = self._goal + step
        return self._goal, step / self.period_s

    def _judge(self) -> None:
        mujoco.mj_kinematics(self.model, self.data)
        tcp = self.data.site_xpos[self._tcp]
        self.tcp_speed = float(np.linalg.norm(tcp - self._last_tcp)) / self.period_s
        self._last_tcp = tcp.copy()
        self.peaks.add(self.data.qvel[self._v], self.tcp_speed)
        self.on_step(self)

    # -- sensors ------------------------------------------------------------------------------------------------------

    @property
    def positions(self) -> np.ndarray:
        """rad [6], kinematic order."""
        return self.data.qpos[self._q]

    @property
    def velocities(self) -> np.ndarray:
        """rad/s [6], kinematic order."""
        return self.data.qvel[self._v]

    def things(self) -> np.ndarray:
        """Where the scene's things are: m [T, 3], world frame."""
        return np.array([self.data.qpos[at] for at in self._things]).reshape(-1, 3)

    def measure(self) -> Measured:
        """The present state."""
        base = self.data.xmat[self._base].reshape(3, 3)
        # The controller's frame is base_link turned by 180 degrees about z.
        to_base = np.diag([-1.0, -1.0, 1.0]) @ base.T
        position = to_base @ (self.data.site_xpos[self._tcp] - self.data.xpos[self._base])
        quaternion = np.empty(4)
        mujoco.mju_mat2Quat(quaternion, (to_base @ self.data.site_xmat[self._tcp].reshape(3, 3)).ravel())
        return Measured(
            time_s=self.time_s,
            positions=self.positions,
            velocities=self.velocities,
            tcp_position=position,
            tcp_quaternion=np.roll(quaternion, -1),
            gripper=float(self.data.qpos[self._knuckle]),
            program_running=self._program,
            protective_stop=self._stopped_at_s is not None,
            speed_scaling=self._pace,
        )

    # -- orders -------------------------------------------------------------------------------------------------------

    def follow(self, trajectory: Trajectory, begun_s: float = 0.0) -> None:
        """Replace the trajectory, from the measured state. Raises SteerError('not_running' | 'not_active' | 'bad_trajectory')."""
        self._require(TRAJECTORY)
        self._trajectory.replace(trajectory, self.positions, self.velocities, begun_s)

    def move_to(self, positions: np.ndarray) -> None:
        """forward_position_controller: go there (rad [6]) as fast as joints can. Raises SteerError."""
        self._require(POSITION)
        self._target = _six(positions)

    def move_at(self, velocities: np.ndarray) -> None:
        """forward_velocity_controller: joint speeds (rad/s [6]) until told otherwise. Raises SteerError."""
        self._require(VELOCITY)
        self._velocity = _six(velocities)

    def grip(self, knuckle: float) -> None:
        """Gripper joint, 0 open to 0.8 rad closed; more is cut. Raises SteerError('bad_command') for NaN."""
        if not np.isfinite(knuckle):
            raise SteerError("bad_command", f"gripper position is {knuckle}: expected 0 to {GRIPPER_CLOSED} rad")
        self.data.ctrl[self._fingers] = 255.0 * np.clip(knuckle / GRIPPER_CLOSED, 0.0, 1.0)

    def activate(self, controller: str) -> None:
        """Make this controller the active one; it holds the measured position. Raises SteerError('unknown_controller')."""
        if controller not in CONTROLLERS:
            raise SteerError(
                "unknown_controller",
                f"controller {controller!r} is not known: expected one of {', '.join(CONTROLLERS)}",
            )
        self._controller = controller
        self._goal = self._target = np.array(self.positions)
        self._velocity = np.zeros(6)
        self._trajectory = TrajectoryController(self.positions)

    def play(self) -> None:
        """Let the program run, which goes on with what it was doing. Raises SteerError('protective_stop')."""
        if self._stopped_at_s is not None:
            raise SteerError("protective_stop", "the arm is in a protective stop; unlock it, then play")
        self._program = True

    def stop(self) -> None:
        """End the program: the arm brakes on its path."""
        self._program = False

    def stop_protectively(self) -> None:
        """What the arm does by itself on a collision."""
        self._program, self._stopped_at_s = False, self.time_s

    def unlock(self) -> None:
        """Leave a protective stop; the program stays stopped. Raises SteerError('too_soon')."""
        if self._stopped_at_s is None:
            return
        waited = self.time_s - self._stopped_at_s
        if waited < self._unlock_delay_s:
            raise SteerError(
                "too_soon",
                f"the protective stop is {waited:.1f} s old; it can be unlocked {self._unlock_delay_s:g} s after it happened",
            )
        self._stopped_at_s = None

    def slide(self, part: float) -> None:
        """Speed slider, 0 to 1. Raises SteerError('bad_command')."""
        if not 0.0 <= part <= 1.0:
            raise SteerError("bad_command", f"speed slider is {part}: expected 0 to 1")
        self._slider = float(part)

    def _require(self, controller: str) -> None:
        if self._controller != controller:
            raise SteerError("not_active", f"{controller} is not active, {self._controller} is; the command is dropped")
        if not self._program:
            raise SteerError("not_running", "the robot program is not running; the command is dropped")


def _six(values: np.ndarray) -> np.ndarray:
    array = np.array(values, np.float64)
    if array.shape != (6,) or not np.isfinite(array).all():
        raise SteerError(
            "bad_command", f"command has shape {list(array.shape)}: expected 6 finite numbers; it is dropped"
        )
    return array
