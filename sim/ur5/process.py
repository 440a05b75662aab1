"""The simulated arm as a process of its own, as a real arm is a machine of its own: what talks to it may die.

Invariant: the arm runs on the machine's steady clock whatever the other side does, and stops its program when the other
side is gone (UR's external control does so after some milliseconds of silence); then it brakes, writes its log and ends.

Both sides speak over a pipe: orders and answers are JSON objects, reports are rows of numbers.
"""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from sim.ur5.arm import Ur5Arm
from sim.ur5.scene import Scene
from sim.ur5.trajectory import Trajectory
from sim.ur5.truth import MotionLog
from steer_runtime.errors import SteerError

REPORT_HZ = 125.0
"""Of a UR5's interface; rows of the log are as many."""
MOST_CATCH_UP_S = 0.5
"""A machine that stands still for longer loses time instead of running it fast afterwards."""
_CATCH_UP_STEP_S = 0.05
REST_RAD_S = 1e-3
_FLUSH_S = 1.0
_START_S = 60.0
_ANSWER_S = 5.0
_REPORT, _ANSWER = b"R", b"A"


@dataclass(frozen=True)
class Report:
    """What the arm says of itself 125 times a second. time_s: steady clock. tcp in the controller's frame `base`.

    peaks [13]: see sim.ur5.truth.Peaks. lost_s: time that the machine was too slow for. qpos: of the whole scene.
    """

    time_s: float
    program_running: bool
    protective_stop: bool
    speed_scaling: float
    gripper: float
    positions: np.ndarray
    velocities: np.ndarray
    tcp_position: np.ndarray
    tcp_quaternion: np.ndarray
    peaks: np.ndarray
    lost_s: float
    qpos: np.ndarray

    def to_bytes(self) -> bytes:
        """Little-endian doubles, qpos last."""
        head = (self.time_s, self.program_running, self.protective_stop, self.speed_scaling, self.gripper)
        parts = (head, self.positions, self.velocities, self.tcp_position, self.tcp_quaternion, self.peaks)
        return np.concatenate([*parts, [self.lost_s], self.qpos]).astype("<f8").tobytes()

    @staticmethod
    def from_bytes(raw: bytes) -> Report:
        """The inverse."""
        row = np.frombuffer(raw, "<f8")
        q, v, p, r, peaks = np.split(row[5:37], np.cumsum([6, 6, 3, 4]))
        running, stopped = bool(row[1]), bool(row[2])
        return Report(row[0], running, stopped, row[3], row[4], q, v, p, r, peaks, row[37], row[38:])


class ArmProcess:
    """Starts the arm and talks to it; for one thread. The arm outlives this process for as long as it brakes."""

    def __init__(self, scene: Scene, log: Path | None = None, **options: Any) -> None:
        """options: of Ur5Arm. log: where the arm writes what it really did (sim.ur5.truth.read_motion reads it)."""
        self._answers: deque[dict[str, Any]] = deque()
        self._newest: Report | None = None
        self._asked = 0
        ours, theirs = Pipe()
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "scene.mjb"
            mujoco.mj_saveModel(scene.model, str(model))
            said = {
                "model": str(model),
                "start": list(scene.start),
                "qpos": None if scene.qpos is None else scene.qpos.tolist(),
                "things": list(scene.things),
                "log": None if log is None else str(log.resolve()),
                "options": options,
            }
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sim.ur5.process", str(theirs.fileno()), json.dumps(said)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # Signals of a terminal are for the driver; the arm ends when the driver has.
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            theirs.close()
            self._pipe = ours
            if not self._pipe.poll(_START_S):
                self._process.kill()
                raise SteerError(
                    "no_arm", f"the simulated arm did not start within {_START_S:g} s; see its output above"
                )
            self._take()

    @property
    def pid(self) -> int:
        """Of the arm."""
        return self._process.pid

    def read(self) -> Report | None:
        """The newest report, None when none has come since the last call. Raises SteerError('no_arm') once it has ended."""
        while self._pipe.poll():
            self._take()
        newest, self._newest = self._newest, None
        return newest

    def refusals(self) -> list[SteerError]:
        """What was refused of the orders given so far, each once."""
        found = [SteerError(answer["code"], answer["sentence"]) for answer in self._answers if answer["code"]]
        self._answers.clear()
        return found

    def order(self, name: str, *values: Any) -> None:
        """Have the arm do something: a method of Ur5Arm, or `follow`, see `_OBEYED`. A refusal is read later."""
        self._asked += 1
        try:
            self._pipe.send_bytes(json.dumps([self._asked, name, *values]).encode())
        except OSError:
            raise _gone() from None

    def ask(self, name: str, *values: Any) -> None:
        """The same, waiting for it to be done. Raises the arm's refusal as SteerError."""
        self.order(name, *values)
        deadline = time.monotonic() + _ANSWER_S
        while not any(answer["to"] == self._asked for answer in self._answers):
            if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
                raise SteerError("no_answer", f"the simulated arm did not answer {name!r} within {_ANSWER_S:g} s")
            self._take()
        answer = next(answer for answer in self._answers if answer["to"] == self._asked)
        self._answers.remove(answer)
        if answer["code"]:
            raise SteerError(answer["code"], answer["sentence"])

    def close(self) -> None:
        """Let go of it and wait until it is at rest and its log is written."""
        self._pipe.close()
        try:
            self._process.wait(_ANSWER_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _take(self) -> None:
        try:
            raw = self._pipe.recv_bytes()
        except (EOFError, OSError):
            raise _gone() from None
        if raw[:1] == _REPORT:
            self._newest = Report.from_bytes(raw[1:])
        else:
            self._answers.append(json.loads(raw[1:]))


def _gone() -> SteerError:
    return SteerError("no_arm", "the simulated arm has ended; start the stand-in again")


class _Served:
    """The arm's side: clock, orders, reports, log."""

    def __init__(self, pipe: Connection, arm: Ur5Arm, log: MotionLog | None) -> None:
        self._pipe, self._arm, self._log = pipe, arm, log
        self._begin_s = time.monotonic()
        self._lost_s = self._fastest = 0.0
        self._flushed_s = self._begin_s
        arm.on_step = self._on_step

    def run(self) -> None:
        """Until the other side has gone and the arm is at rest."""
        period = 1.0 / REPORT_HZ
        due = time.monotonic()
        connected = True
        while connected or np.abs(self._arm.velocities).max() > REST_RAD_S:
            wait = max(0.0, due - time.monotonic())
            try:
                if connected and self._pipe.poll(wait):
                    raw = self._pipe.recv_bytes()
                    self._pass_time()
                    self._obey(raw)
                    continue
                self._pass_time()
                # A side that does not read misses reports, and does not hold up the arm.
                if connected and select.select([], [self._pipe], [], 0.0)[1]:
                    self._pipe.send_bytes(_REPORT + self._report().to_bytes())
            except (EOFError, OSError):
                self._pass_time()
                connected = False
                self._arm.stop()
            if not connected:
                time.sleep(wait)
            self._write()
            due += period * max(1, math.ceil((time.monotonic() - due) / period))
        if self._log is not None:
            self._log.close()

    def _pass_time(self) -> None:
        """Let the arm's clock catch up with the steady one, a bounded step at a time: orders are heard in between."""
        late = time.monotonic() - (self._begin_s + self._arm.time_s)
        if late > MOST_CATCH_UP_S:
            self._lost_s += late - MOST_CATCH_UP_S
            self._begin_s += late - MOST_CATCH_UP_S
        self._arm.advance(self._arm.period_s * int(min(late, _CATCH_UP_STEP_S) / self._arm.period_s))

    def _on_step(self, arm: Ur5Arm) -> None:
        self._fastest = max(self._fastest, arm.tcp_speed)

    def _obey(self, raw: bytes) -> None:
        number, name, *values = json.loads(raw)
        answer = {"to": number, "code": "", "sentence": ""}
        try:
            if name == "follow":
                self._follow(*values)
            elif name == "reset_peaks":
                self._arm.peaks.reset()
            else:
                _OBEYED[name](self._arm, *values)
        except SteerError as error:
            answer |= {"code": error.code, "sentence": error.sentence}
        self._pipe.send_bytes(_ANSWER + json.dumps(answer).encode())

    def _follow(self, start_s: float | None, times_s: Any, *parts: Any) -> None:
        """start_s: on the steady clock; None is now."""
        arrays = [None if part is None else np.array(part, np.float64) for part in parts]
        assert arrays[0] is not None
        # Against the arm's own clock, which stands at the end of its last whole step.
        begun_s = 0.0 if start_s is None else self._begin_s + self._arm.time_s - start_s
        self._arm.follow(Trajectory(np.array(times_s, np.float64), arrays[0], *arrays[1:]), begun_s)

    def _report(self) -> Report:
        measured = self._arm.measure()
        return Report(
            **{**vars(measured), "time_s": self._begin_s + measured.time_s},
            peaks=self._arm.peaks.values,
            lost_s=self._lost_s,
            qpos=self._arm.data.qpos,
        )

    def _write(self) -> None:
        if self._log is None:
            return
        arm, time_s = self._arm, self._begin_s + self._arm.time_s
        tcp = arm.measure().tcp_position
        self._log.add(time_s, arm.positions, arm.velocities, tcp, self._fastest, arm.things())
        self._fastest = 0.0
        if time_s - self._flushed_s > _FLUSH_S:
            self._flushed_s = time_s
            self._log.flush()


_OBEYED: Mapping[str, Callable[..., None]] = {
    "move_to": Ur5Arm.move_to,
    "move_at": Ur5Arm.move_at,
    "grip": Ur5Arm.grip,
    "activate": Ur5Arm.activate,
    "play": Ur5Arm.play,
    "stop": Ur5Arm.stop,
    "stop_protectively": Ur5Arm.stop_protectively,
    "unlock": Ur5Arm.unlock,
    "slide": Ur5Arm.slide,
}


def _serve(descriptor: int, said: Mapping[str, Any]) -> None:
    model = mujoco.MjModel.from_binary_path(said["model"])
    qpos = None if said["qpos"] is None else np.array(said["qpos"])
    things = tuple(said["things"])
    arm = Ur5Arm(Scene(model, tuple(said["start"]), qpos, things=things), **said["options"])
    log = None if said["log"] is None else MotionLog(Path(said["log"]), things)
    _Served(Connection(descriptor), arm, log).run()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), json.loads(sys.argv[2]))
