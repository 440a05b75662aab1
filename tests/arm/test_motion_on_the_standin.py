"""The motion core on the simulated UR5e, in simulated time: limits by the arm's own account, and rest after a kill."""

from __future__ import annotations

import numpy as np
import pytest
from follower import EE_DELTA, SETTINGS

from arm.actions import ActionReader
from arm.motion import MotionCore
from arm.port import ArmState, JointMotion
from sim.ur5.arm import Ur5Arm
from sim.ur5.scene import table_scene
from sim.ur5.trajectory import Trajectory

LIMITS = SETTINGS.limits
STEP_S = 0.002
ROWS = (
    [0, 1, 0, 0, 0, 0, -1],
    [0, -1, 0, 0, 0, 0, -1],
    [0.6, 0.6, 0, 0, 0, 0, 1],
    [-0.6, -0.6, 0, 0, 0, 0.1, 1],
)


class Delayed:
    """An ArmPort on the simulated arm, whose trajectories arrive up to `jitter_s` late, at random."""

    def __init__(self, jitter_s: float) -> None:
        self.arm = Ur5Arm(table_scene(meshes=False))
        self._jitter_s, self._random = jitter_s, np.random.default_rng(0)
        self._on_their_way: list[tuple[float, JointMotion]] = []
        self.speeds: list[float] = []

    @property
    def now_s(self) -> float:
        return self.arm.time_s

    def read(self) -> ArmState | None:
        told = self.arm.measure()
        x, y, z = told.tcp_position
        return ArmState(
            self.now_s,
            told.positions.copy(),
            told.velocities.copy(),
            np.array([-x, -y, z]),
            told.tcp_quaternion,
            told.program_running,
            told.speed_scaling,
            1.0 - told.gripper / 0.8,
        )

    def send(self, motion: JointMotion) -> None:
        before = self._on_their_way[-1][0] if self._on_their_way else 0.0
        due_s = max(self.now_s + self._random.uniform(0, self._jitter_s), before)  # a reliable topic keeps the order
        self._on_their_way.append((due_s, motion))

    def grip(self, opening: float) -> None:
        self.arm.grip(0.8 * (1.0 - opening))

    def halt(self) -> None:
        pass

    def close(self) -> None:
        pass

    def advance(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP_S)):
            for due_s, motion in list(self._on_their_way):
                if due_s <= self.now_s:
                    self._on_their_way.remove((due_s, motion))
                    if self.arm.measure().program_running:  # else the driver drops it
                        self.arm.follow(Trajectory(motion.times_s, motion.positions))
            self.arm.advance(STEP_S)
            self.speeds.append(float(np.abs(self.arm.velocities).max()))


def _driven(jitter_s: float, seconds: float = 4.0) -> Delayed:
    """Rows in all directions, each for 0.8 s; it still moves at the end."""
    port = Delayed(jitter_s)
    port.advance(0.1)
    core = MotionCore(SETTINGS, ActionReader(EE_DELTA, SETTINGS, 0.2), port)
    core.arm(port.now_s)
    port.arm.peaks.reset()
    begin_s = row_s = port.now_s
    while port.now_s < begin_s + seconds:
        if port.now_s >= row_s - 1e-9:
            row_s += 0.05
            core.accept(np.array(ROWS[int((port.now_s - begin_s) / 0.8) % len(ROWS)]), port.now_s)
        port.advance(SETTINGS.motion.tick_s)
        core.tick(port.now_s)
    assert core.state().mode == "armed", core.state().sentence
    return port


@pytest.mark.parametrize("jitter_s", [0.0, 0.004])
def test_the_arm_itself_keeps_every_speed_and_acceleration(jitter_s: float) -> None:
    peaks = _driven(jitter_s).arm.peaks.values
    assert (peaks[:6] <= LIMITS.joint_speed_rad_s).all(), peaks
    assert (peaks[6:12] <= LIMITS.joint_acceleration_rad_s2).all(), peaks
    assert 0.15 < peaks[12] <= LIMITS.tcp_speed_m_s, peaks


@pytest.mark.parametrize("jitter_s", [SETTINGS.motion.transport_jitter_s, 0.04, 0.1, 0.25])
def test_late_messages_slow_the_arm_and_leave_its_speeds_within_their_limits(jitter_s: float) -> None:
    peaks = _driven(jitter_s).arm.peaks.values
    assert (peaks[:6] <= LIMITS.joint_speed_rad_s).all(), peaks
    assert peaks[12] <= LIMITS.tcp_speed_m_s, peaks


@pytest.mark.fault(33)
def test_killed_in_motion_the_arm_is_at_rest_within_the_horizon() -> None:
    port = _driven(0.002, 0.7)
    assert port.speeds[-1] > 0.2
    port.speeds.clear()
    port.advance(SETTINGS.motion.horizon_s + 0.3)
    moving = np.nonzero(np.array(port.speeds) > 0.01)[0]
    assert (moving[-1] + 1) * STEP_S <= SETTINGS.motion.horizon_s


@pytest.mark.fault(28)
def test_after_a_protective_stop_the_program_goes_on_with_nothing_of_ours_in_it() -> None:
    port = Delayed(0.0)
    port.advance(0.1)
    core = MotionCore(SETTINGS, ActionReader(EE_DELTA, SETTINGS, 0.2), port)
    core.arm(port.now_s)
    for _ in range(20):
        core.accept(np.array(ROWS[0]), port.now_s)
        for _ in range(2):
            port.advance(SETTINGS.motion.tick_s)
            core.tick(port.now_s)
    port.arm.stop_protectively()
    port.advance(0.5)
    core.tick(port.now_s)
    stood = port.arm.positions.copy()
    port.advance(6.0)
    port.arm.unlock()
    port.arm.play()
    for _ in range(20):
        core.accept(np.array(ROWS[0]), port.now_s)
        port.advance(0.05)
        core.tick(port.now_s)
    assert core.state().code == "program_stopped"
    # What the box had left is the end of one trajectory.
    assert np.abs(port.arm.positions - stood).max() < 0.4 * SETTINGS.motion.horizon_s
    assert np.abs(port.arm.velocities).max() < 1e-3
