"""A UR controller's network side as tests hold it: orders in, what the arm was told and did out."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FAKE = Path(__file__).parent / "fake_ur.py"

_numbers = itertools.count(2)


def free_address() -> str:
    """An address of this machine's own that no other test of this process uses; ur-rtde knows no other ports."""
    return f"127.{80 + os.getpid() % 100}.{os.getpid() // 100 % 250}.{next(_numbers)}"


class Fake:
    """The controller's process, on an address of this machine's own."""

    def __init__(self, address: str, log: Path) -> None:
        self.address, self._log = address, log
        self.process = subprocess.Popen(
            [sys.executable, str(FAKE), address, str(log)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def order(self, word: str) -> None:
        """Tell it what happens, and wait until it has."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline()

    def told(self) -> dict[str, Any]:
        """What the arm was told and did so far."""
        self.order("dump")
        return json.loads(self._log.read_text())

    def events(self) -> list[str]:
        return [what for _, what in self.told()["events"]]

    def end(self) -> None:
        self.process.kill()
        self.process.wait(5.0)
