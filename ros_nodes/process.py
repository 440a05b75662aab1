"""How a node process lives and ends: spin, one sentence for a refusal, exit code 0 within two seconds of a signal.

Invariant: the ROS objects end in the one order that neither aborts nor hangs: executor, node, context.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Protocol

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from steer_runtime.errors import SteerError


class Served(Protocol):
    """What a node tells the process that runs it."""

    exit_code: int | None  # set by the node to end its process
    interruptible: bool  # true while a signal may end the process at once (loading, nothing moves)

    def close(self) -> bool:
        """Stop everything. False when a thread could not be ended, so that the process must not wait for it."""


def serve(make: Callable[[], Node], argv: Sequence[str] | None = None) -> int:
    """Run a node until a signal or until it sets `exit_code`; return the exit code of the process."""
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
    ended = True
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
    except SteerError as error:
        print(f"{error}", file=sys.stderr)
        return 1
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        executor.shutdown()
        if node is not None:
            ended = node.close()  # type: ignore[attr-defined]
            node.destroy_node()
        rclpy.try_shutdown()
        if not ended:
            # A thread is inside the policy; ending the interpreter under it would abort.
            sys.stderr.flush()
            os._exit(int(getattr(node, "exit_code", None) or 0))
