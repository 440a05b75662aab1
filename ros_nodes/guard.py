"""Callbacks that cannot end their node, and warnings that cannot flood its log.

Invariant: what a guarded callback refuses is counted under its code, and warned about, never raised and never silent.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from rclpy.node import Node

from ros_nodes.convert import clean_text
from steer_runtime.errors import SteerError

WARN_PERIOD_S = 5.0
"""The same warning is not logged more often."""

Method = TypeVar("Method", bound=Callable[..., Any])


class Complaints:
    """Counts refusals of a node by code and warns about them, each code at most every WARN_PERIOD_S seconds."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._lock = threading.Lock()
        self._warned: dict[str, float] = {}
        self._counters: Counter[str] = Counter()

    @property
    def counters(self) -> Mapping[str, int]:
        """Copy of the counters; any thread."""
        with self._lock:
            return dict(self._counters)

    def count(self, code: str, by: int = 1) -> None:
        """Count without a warning; any thread."""
        with self._lock:
            self._counters[code] += by

    def refuse(self, error: SteerError) -> None:
        """Count and warn."""
        self.count(error.code)
        self.warn(error.code, error.sentence)

    def warn(self, code: str, sentence: str) -> None:
        """Log a sentence unless one of the same code was logged just before."""
        now = time.monotonic()
        if now - self._warned.get(code, -WARN_PERIOD_S) >= WARN_PERIOD_S:
            self._warned[code] = now
            self._node.get_logger().warning(clean_text(sentence))


def guarded(method: Method) -> Method:
    """For methods of a node that has `complaints`: an exception that left a callback would end the node."""

    @functools.wraps(method)
    def run(self: Any, *args: Any) -> Any:
        try:
            return method(self, *args)
        except SteerError as error:
            self.complaints.refuse(error)
        except Exception as error:
            sentence = f"{method.__name__} failed: {type(error).__name__}: {error}"
            self.complaints.refuse(SteerError("internal_error", sentence))
        return None

    return cast(Method, run)
