"""A whole steered arm on a network of its own: policy node, bridge, stand-in, each a process that may be killed."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from bridge import BridgeClient, BridgeProcess
from driver import PATIENCE_S, PolicyProcess
from standin import START_S, StandinProcess, UrClient

_STREAM = """
import os
from ros_nodes.client import SteeringClient
with SteeringClient(source="commander", domain_id={domain}) as client:
    client.connect(120.0)
    with client.stream("{target}", 1.0):
        print("streaming", flush=True)
        import time
        time.sleep(600)
"""


class ArmRig:
    """Use it as a context manager. ur: the driver's topics. watch: the bridge's, with cameras of noise.

    log: what the arm really did (sim.ur5.truth.read_motion), complete once the driver has ended or died.
    """

    def __init__(self, policy: Path | str, store: Path | None, domain: int, folder: Path) -> None:
        self.log = folder / "motion.npz"
        self._policy, self._store, self.domain = policy, store, domain
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> ArmRig:
        with self._stack:
            enter = self._stack.enter_context
            self.standin = enter(StandinProcess(self.domain, log=str(self.log)))
            self.start_bridge()
            self.start_policy()
            self.ur = enter(UrClient(self.domain))
            self.watch = enter(BridgeClient(self.domain))
            self.ur.wait_up()
            self.watch.wait_acting()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def start_bridge(self) -> None:
        """Start the bridge, again after it was killed."""
        self.bridge = self._stack.enter_context(BridgeProcess(self.domain))

    def start_policy(self) -> None:
        """Start the policy node, again after it was killed."""
        self.policy = self._stack.enter_context(
            PolicyProcess(self._policy, self._store, domain=self.domain, observation_timeout_s=1.0)
        )

    def start_commander(self, target: str) -> subprocess.Popen[str]:
        """Whoever steers: a process that repeats a command for `target`, each of which holds for 0.2 s."""
        process = subprocess.Popen(
            [sys.executable, "-c", _STREAM.format(domain=self.domain, target=target)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline() == "streaming\n"
        return process

    def wait_moving(self, speed: float = 0.03) -> None:
        """Arm it, unless it is, and wait until the policy moves a joint faster than this, rad/s."""
        began_s = time.monotonic()

        def acting() -> bool:
            """Whether a row of a chunk was executed since the call."""
            at, status = self.watch.episodes[-1] if self.watch.episodes else (0.0, None)
            return status is not None and at > began_s and status.held == ""

        self.watch.wait(acting, START_S, "a step that executes a row")
        self.watch.wait(self._armed, PATIENCE_S * 3, f"the arming (now {self.watch.state()})")
        self.ur.wait_moving(speed, START_S)

    def _armed(self) -> bool:
        newest = json.loads(self.watch.told[-1][1].data) if self.watch.told else {}
        return newest.get("mode") == "armed" or self.watch.arm().success
