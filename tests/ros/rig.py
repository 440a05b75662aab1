"""A whole steered arm on a network of its own: policy node, bridge, stand-in, each a process that may be killed."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import numpy as np
from bridge import BridgeClient, BridgeProcess
from driver import PolicyProcess
from standin import START_S, StandinProcess, UrClient

from ros_nodes.convert import image_to_msg

_PICTURE_S = 1.5
_PICTURES = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
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


class Onlooker(BridgeClient):
    """Shows the same picture for a while, then another: what a random policy makes of one is a motion that goes on."""

    def _film(self) -> None:
        stamp = self.node.get_clock().now().to_msg()
        picture = _PICTURES[int(time.monotonic() / _PICTURE_S) % len(_PICTURES)]
        for name in tuple(self.filming):
            self._films[name].publish(image_to_msg(picture, stamp, name))


class ArmRig:
    """Use it as a context manager. ur: the driver's topics. watch: the bridge's, and the cameras.

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
            self.watch = enter(Onlooker(self.domain))
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
        self.bridge = self._stack.enter_context(BridgeProcess(self.domain, motion_scale=0.25))

    def start_policy(self) -> None:
        """Start the policy node, again after it was killed."""
        self.policy = self._stack.enter_context(
            PolicyProcess(
                self._policy, self._store, domain=self.domain, observation_timeout_s=1.0, freeze_timeout_s=0.0
            )
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

    def wait_moving(self, speed: float = 0.1) -> None:
        """Arm it, again where a busy machine had the bridge stop, until the policy moves a joint faster than this, rad/s."""
        began_s = time.monotonic()

        def moving() -> bool:
            """In a step since the call that executes a row."""
            at, status = self.watch.episodes[-1] if self.watch.episodes else (0.0, None)
            acting = status is not None and at > began_s and status.held == ""
            return acting and self._armed() and np.abs(self.ur.velocities).max() > speed

        self.watch.wait(moving, START_S, "an arm that moves by the policy's rows")

    def _armed(self) -> bool:
        newest = json.loads(self.watch.told[-1][1].data) if self.watch.told else {}
        return newest.get("mode") == "armed" or self.watch.arm().success
