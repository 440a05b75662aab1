"""Node processes that live as long as a `with` block, and never longer.

Invariant: when the block or its process ends, however it ends, every child ends too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from steer_runtime.errors import SteerError

STOP_S = 8.0
"""A node ends within two seconds of a signal; one inside a long inference or scene build needs more."""
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Children:
    """Starts nodes of this package as processes of their own, output into `logs/<name>.log`."""

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        self._logs = logs
        self._environment = {**os.environ, **environment}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, module: str, parameters: Mapping[str, object]) -> None:
        """Start `python -m module` with ROS parameters."""
        arguments = ["--ros-args"]
        for key, value in parameters.items():
            arguments += ["-p", f"{key}:={_ros_value(value)}"]
        with open(self._logs / f"{name}.log", "wb") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    def check(self) -> None:
        """Raises SteerError('node_ended') when a child is gone, with the last line it wrote."""
        for name, process in self._running.items():
            if process.poll() is not None:
                log = self._logs / f"{name}.log"
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                said = lines[-1][-300:] if lines else "nothing"
                raise SteerError(
                    "node_ended", f"the {name} process ended with code {process.returncode} ({said}); see {log}"
                )

    def stop(self, name: str) -> None:
        """End one child: ask, wait, then kill. Harmless for one that is gone."""
        process = self._running.pop(name, None)
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._running):
            self.stop(name)


def _die_with_parent() -> None:
    """In the child, before it becomes the node: a parent killed outright takes it along."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _ros_value(value: object) -> str:
    """A parameter as the YAML that ROS arguments carry."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(f"'{item}'" for item in value) + "]"
    if isinstance(value, str):
        return f"'{value}'"
    return str(value)
