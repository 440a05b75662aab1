"""What the arm really did: its peaks, and a log of its motion that outlives whoever dies.

Invariant: both are measured on the simulated arm itself, never on what it was told; a log that was cut off is readable
to its last second.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ACCELERATION_WINDOW_S = 0.04
"""Accelerations are changes of speed over so long: the servo's ripple between two points of a trajectory is no jerk."""
_COLUMNS = 1 + 6 + 6 + 3 + 1  # time, positions, velocities, TCP, its largest speed since the last row


class Peaks:
    """Largest joint speeds [6] rad/s, joint accelerations [6] rad/s^2 and TCP speed (m/s) since the last reset."""

    def __init__(self, period_s: float) -> None:
        """period_s: time between two calls of `add`."""
        self._steps = round(ACCELERATION_WINDOW_S / period_s)
        self._period_s = period_s
        self.reset()

    def reset(self) -> None:
        """Forget them."""
        self.values = np.zeros(13)
        self._recent: deque[np.ndarray] = deque(maxlen=self._steps + 1)

    def add(self, velocities: np.ndarray, tcp_speed: float) -> None:
        """One period's joint velocities [6] and TCP speed."""
        self._recent.append(velocities)
        np.maximum(self.values[:6], np.abs(velocities), out=self.values[:6])
        if len(self._recent) > self._steps:
            change = np.abs(velocities - self._recent[0]) / (self._steps * self._period_s)
            np.maximum(self.values[6:12], change, out=self.values[6:12])
        self.values[12] = max(self.values[12], tcp_speed)


@dataclass(frozen=True)
class Motion:
    """A log. time_s [n] (the machine's steady clock), positions and velocities [n, 6] rad and rad/s, tcp [n, 3] m in the
    controller's frame `base`, tcp_speed [n] m/s: the largest since the row before. things [n, T, 3] m in the world frame,
    names [T]: what lies around."""

    time_s: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray
    tcp: np.ndarray
    tcp_speed: np.ndarray
    things: np.ndarray
    names: tuple[str, ...]


class MotionLog:
    """Rows of numbers, appended to `<path>.rows` and flushed by whoever calls `flush`; `close` makes the .npz of them."""

    def __init__(self, path: Path, things: Sequence[str] = ()) -> None:
        """Begin a log afresh. things: names of what lies around."""
        self._path, self._rows = path, _rows_of(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._file = open(self._rows, "wb")  # noqa: SIM115  open for as long as the log is
        self._file.write(json.dumps(list(things)).encode() + b"\n")

    def add(
        self,
        time_s: float,
        positions: np.ndarray,
        velocities: np.ndarray,
        tcp: np.ndarray,
        speed: float,
        things: np.ndarray | None = None,
    ) -> None:
        """One row; units as in Motion."""
        rest = np.zeros(0) if things is None else things.ravel()
        row = np.concatenate([[time_s], positions, velocities, tcp, [speed], rest])
        self._file.write(row.astype("<f8").tobytes())

    def flush(self) -> None:
        """Hand what there is to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Write `path`, whole at once, and drop the rows."""
        self._file.close()
        motion = _read_rows(self._rows)
        whole = self._path.with_name(self._path.name + ".part")
        with open(whole, "wb") as file:
            np.savez_compressed(file, **vars(motion))
        whole.replace(self._path)
        self._rows.unlink()


def read_motion(path: Path) -> Motion:
    """A log, whole or cut off. Raises FileNotFoundError where there is neither."""
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            parts = {name: stored[name] for name in Motion.__dataclass_fields__}
        return Motion(**{**parts, "names": tuple(parts["names"].tolist())})
    return _read_rows(_rows_of(path))


def _rows_of(path: Path) -> Path:
    return path.with_name(path.name + ".rows")


def _read_rows(path: Path) -> Motion:
    head, _, raw = path.read_bytes().partition(b"\n")
    names = tuple(json.loads(head))
    columns = _COLUMNS + 3 * len(names)
    rows = np.frombuffer(raw[: len(raw) // (8 * columns) * (8 * columns)], "<f8").reshape(-1, columns)
    things = rows[:, _COLUMNS:].reshape(len(rows), len(names), 3)
    return Motion(rows[:, 0], rows[:, 1:7], rows[:, 7:13], rows[:, 13:16], rows[:, 16], things, names)
