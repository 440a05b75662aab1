"""The motion core's own clock: a thread that ticks it, whatever the rest of the process is doing.

Invariant: a tick that fails stops the arm; a late tick is not caught up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from arm.motion import MotionCore
from arm.port import ArmPort
from steer_runtime.errors import SteerError


class Ticker:
    """Ticks from construction to `close`. failed: hears what went wrong in a tick, in the ticking thread."""

    def __init__(self, core: MotionCore, port: ArmPort, failed: Callable[[SteerError], None]) -> None:
        self._core, self._port, self._failed = core, port, failed
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="motion", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No tick after this; from any other thread."""
        self._ending.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        period_s = self._core.settings.motion.tick_s
        due = time.monotonic()
        while not self._ending.wait(max(0.0, due - time.monotonic())):
            try:
                self._core.tick(time.monotonic())
            except Exception as error:
                # Whatever it is: an arm whose core is broken must not go on.
                self._port.halt()
                sentence = f"the motion core failed: {type(error).__name__}: {error}"
                self._core.stop("internal_error", sentence, time.monotonic())
                self._failed(SteerError("internal_error", sentence))
            due = max(due + period_s, time.monotonic())
