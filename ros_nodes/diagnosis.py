"""What a node tells of its own health on /diagnostics: a level, a sentence, and its numbers, once a second.

Invariant: a level above OK has a sentence that says why; counters and rates are told whatever the level.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from std_msgs.msg import Header

from ros_nodes.convert import clean_text, time_from_ns
from ros_nodes.guard import Complaints
from ros_nodes.qos import DIAGNOSTICS

PERIOD_S = 1.0

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR


@dataclass(frozen=True)
class Health:
    """level: OK, WARN or ERROR. rates: events counted since the node began, told a second. values: told as they are.

    Ages are values, in seconds, under names that end in `_age_s`. hardware: what the node speaks for, where it knows.
    """

    level: bytes
    sentence: str
    values: Mapping[str, Any] = field(default_factory=dict)
    rates: Mapping[str, int] = field(default_factory=dict)
    hardware: str = ""


class Diagnosis:
    """Asks a node for its health every second and publishes it. what: the part of the node that it is about.

    A `look` that fails is published as an error, and counted by `complaints`.
    """

    def __init__(self, node: Node, complaints: Complaints, what: str, look: Callable[[], Health]) -> None:
        self._node, self._complaints, self._what, self._look = node, complaints, what, look
        self._before: tuple[float, Mapping[str, int]] = (time.monotonic(), {})
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", DIAGNOSTICS)
        # On the steady clock: a simulated one may stand still.
        node.create_timer(PERIOD_S, self.publish, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def publish(self) -> None:
        """Tell it now."""
        try:
            health = self._look()
        except Exception as error:
            # The one place that must go on telling, whatever is wrong with the node.
            self._complaints.count("diagnosis_failed")
            health = Health(ERROR, f"the node cannot tell its health: {type(error).__name__}: {error}")
        values = {**health.values, **self._rates(health.rates), **self._complaints.counters}
        status = DiagnosticStatus(
            level=health.level,
            name=f"{self._node.get_fully_qualified_name()}: {self._what}",
            hardware_id=clean_text(health.hardware),
            message=clean_text(health.sentence),
            values=[KeyValue(key=key, value=_text(value)) for key, value in values.items()],
        )
        stamp = time_from_ns(time.time_ns())
        self._publisher.publish(DiagnosticArray(header=Header(stamp=stamp), status=[status]))

    def _rates(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Events a second since the last call."""
        now = time.monotonic()
        (then, before), self._before = self._before, (now, dict(counts))
        past_s = max(now - then, 1e-3)
        return {f"{name}_hz": (count - before.get(name, count)) / past_s for name, count in counts.items()}


def _text(value: Any) -> str:
    return clean_text(f"{value:.3f}" if isinstance(value, float) else str(value))
