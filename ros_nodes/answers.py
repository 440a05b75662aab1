"""Verdicts on commands, told no faster than anybody reads them, and commands that never came.

Invariant: every refusal is told, and of each source's acceptances the newest; what is left out is counted.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from steer_runtime.steering.command import SteeringCommand, Verdict

SOURCES = 64
"""Sources that are remembered at once; the longest silent ones are forgotten."""
MOST_MISSED = 1_000_000
"""A gap beyond it is no loss of the network: the source has jumped."""


class Answers:
    """publish: tells one verdict. rate_hz: acceptances a second and source, asked anew for each. count: takes a counter's
    name and how much it grows."""

    def __init__(
        self,
        publish: Callable[[Verdict], None],
        rate_hz: Callable[[], float],
        count: Callable[[str, int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._publish, self._rate_hz, self._count, self._clock = publish, rate_hz, count, clock
        self._tokens: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._untold: dict[str, Verdict] = {}
        self._sequences: OrderedDict[str, tuple[int, int]] = OrderedDict()

    def tell(self, verdict: Verdict) -> None:
        """Publish a verdict, at once or, of too many acceptances, with `tell_delayed` if none follows it."""
        if verdict.accepted and not self._may_tell(verdict.source):
            if self._untold.get(verdict.source) is not None:
                self._count("suppressed_verdicts", 1)
            self._untold[verdict.source] = verdict
            return
        self._publish(verdict)

    def tell_delayed(self) -> None:
        """Publish what waits and may be told now."""
        for source in [source for source in self._untold if self._may_tell(source)]:
            self._publish(self._untold.pop(source))

    def count_missed(self, command: SteeringCommand) -> None:
        """Commands that the network dropped show as gaps in a source's sequence."""
        last = self._sequences.pop(command.source, None)
        if last is not None and last[0] == command.epoch and command.sequence > last[1] + 1:
            self._count("missed_commands", min(command.sequence - last[1] - 1, MOST_MISSED))
        newest = (command.epoch, command.sequence)
        self._sequences[command.source] = newest if last is None else max(last, newest)
        while len(self._sequences) > SOURCES:
            self._sequences.popitem(last=False)

    def _may_tell(self, source: str) -> bool:
        """Token bucket of one second for each source."""
        rate, now = self._rate_hz(), self._clock()
        left, at = self._tokens.pop(source, (rate, now))
        left = min(rate, left + (now - at) * rate)
        self._tokens[source] = (left - 1.0 if left >= 1.0 else left, now)
        while len(self._tokens) > SOURCES:
            self._untold.pop(self._tokens.popitem(last=False)[0], None)
        return left >= 1.0
