"""How a node process lives and ends: spin, one sentence for a refusal, exit code 0 within two seconds of a signal.

Invariant: the ROS objects end in the one order that neither aborts nor hangs: executor, node, context.
A node tells its process two things: `exit_code`, set when it wants the process to end, and `interruptible`, true while
a signal may end it at once (loading, nothing moves); `close()` stops what it runs.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from steer_runtime.errors import SteerError


def serve(make: Callable[[], Node], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a node until a signal or until it sets `exit_code`, then end the process with that code.

    The interpreter is not unloaded: with torch in it that takes seconds, and aborts under a thread that still infers.
    """
    code = 1
    try:
        code = _run(make, argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except SteerError as error:
        print(error.sentence, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(make: Callable[[], Node], argv: Sequence[str] | None) -> int:
    stopping = False
    node: Node | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        if getattr(node, "interruptible", True):
            raise SystemExit(0)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    rclpy.init(args=None if argv is None else list(argv), signal_handler_options=SignalHandlerOptions.NO)
    executor = SingleThreadedExecutor()
    try:
        node = make()
        node.interruptible = False  # type: ignore[attr-defined]
        executor.add_node(node)
        while not stopping and getattr(node, "exit_code", None) is None:
            try:
                executor.spin_once(timeout_sec=0.1)
            except ExternalShutdownException:
                break
            except Exception as error:
                # A message that cannot be taken, not a callback: those catch their own.
                node.get_logger().error(f"a message could not be taken: {type(error).__name__}: {error}")
        return int(getattr(node, "exit_code", None) or 0)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        executor.shutdown()
        if node is not None:
            node.close()  # type: ignore[attr-defined]
            node.destroy_node()
        rclpy.try_shutdown()
