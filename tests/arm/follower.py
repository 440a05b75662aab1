"""An arm of a few lines behind an ArmPort: follows trajectories as a controller that joins points by lines, and keeps what
it did every 2 ms. Its clock is the test's."""

from __future__ import annotations

import numpy as np

from arm.actions import ActionReader
from arm.kinematics import Kinematics
from arm.motion import MotionCore
from arm.port import ArmState, JointMotion
from arm.settings import ArmSettings, load_settings
from steer_runtime.types import ActionSpace

STEP_S = 0.002
START = np.array([0.0, -1.5708, 1.5708, -1.5708, -1.5708, 0.0])
EE_DELTA = ActionSpace("ee_delta", "axis_angle", "base", 0.05, 0.5, 20.0, -1.0, 1.0)
JOINT_DELTA = ActionSpace("joint_delta", "none", "base_link", 0.0, 0.02, 20.0, 0.0, 1.0)
JOINT_ABS = ActionSpace("joint_abs", "none", "base_link", 0.0, 1.0, 20.0, 0.0, 1.0)
SETTINGS = load_settings()
SPACES = {"ee_delta": (EE_DELTA, 0.2), "joint_delta": (JOINT_DELTA, 1.0), "joint_abs": (JOINT_ABS, 1.0)}


class Follower:
    """The arm. now_s is its clock; pace its speed scaling; running its program; silent: it tells nothing new."""

    def __init__(self, settings: ArmSettings = SETTINGS, start: np.ndarray = START) -> None:
        self.kinematics = Kinematics(settings)
        self.now_s = 100.0
        self.pace, self.running, self.silent, self.stuck = 1.0, True, False, False
        self.positions, self.velocities = start.astype(np.float64), np.zeros(6)
        self.sent: list[JointMotion] = []
        self.grips: list[float] = []
        self.halts = 0
        self.track = [self.positions.copy()]  # every STEP_S
        self._line: tuple[np.ndarray, np.ndarray] | None = None  # times and positions, its start included
        self._run_s = 0.0
        self._told_s = self.now_s

    def read(self) -> ArmState | None:
        pose = self.kinematics.pose(self.positions)
        return ArmState(
            self._told_s,
            self.positions.copy(),
            self.velocities.copy(),
            pose.position,
            pose.quaternion,
            self.running,
            self.pace,
            0.5,
        )

    def send(self, motion: JointMotion) -> None:
        self.sent.append(motion)
        if not self.running or self.stuck:
            return
        times = np.concatenate([[0.0], motion.times_s])
        self._line = times, np.concatenate([self.positions[None], motion.positions])
        self._run_s = 0.0

    def grip(self, opening: float) -> None:
        self.grips.append(opening)

    def halt(self) -> None:
        self.halts += 1
        self._line = None

    def close(self) -> None:
        pass

    def advance(self, seconds: float) -> None:
        """Let so much time pass."""
        for _ in range(round(seconds / STEP_S)):
            before = self.positions
            self.now_s += STEP_S
            if self._line is not None and self.running:
                times, points = self._line
                self._run_s += STEP_S * self.pace
                self.positions = np.array([np.interp(self._run_s, times, column) for column in points.T])
            self.velocities = (self.positions - before) / STEP_S
            self.track.append(self.positions.copy())
            if not self.silent:
                self._told_s = self.now_s


class Bench:
    """A core on a follower, at its tick and at the rate of its rows."""

    def __init__(self, kind: str = "ee_delta", *, armed: bool = True, start: np.ndarray = START) -> None:
        space, scale = SPACES[kind]
        self.arm = Follower(start=start)
        self.shown: list[JointMotion] = []
        self._even = False
        reader = ActionReader(space, SETTINGS, scale)
        self.core = MotionCore(SETTINGS, reader, self.arm, self.shown.append)
        if armed:
            self.core.arm(self.arm.now_s)

    def tick(self, count: int = 1) -> None:
        """Ticks of the core, each after its time has passed."""
        for _ in range(count):
            self.arm.advance(SETTINGS.motion.tick_s)
            self.core.tick(self.arm.now_s)

    def row(self, row: np.ndarray, late_s: float = 0.0) -> None:
        """One row, then the ticks of its control period, the first of them late."""
        self.core.accept(row, self.arm.now_s)
        self.arm.advance(late_s)
        period = round(self.core.reader.period_s * SETTINGS.motion.tick_hz)
        # 20 Hz in 50 Hz: two ticks, then three.
        self._even = not self._even
        self.tick(period if self._even else period + 1)

    def rest(self, ticks: int = 40) -> None:
        """Hold until at rest."""
        self.core.hold(self.arm.now_s)
        self.tick(ticks)

    def counters(self) -> dict[str, int]:
        return dict(self.core.state().counters)
