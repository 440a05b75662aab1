"""Other policy nodes of the same namespace, as their states tell of them.

Invariant: of the nodes that are alive, all agree on one elder, by start and then by id; a silent one counts as dead.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from steer_msgs.msg import SteeringState

SILENCE_S = 1.5
"""Another node that has not shown its state for so long is taken for dead; states come at 5 Hz."""
KEPT = 8


@dataclass(frozen=True)
class Rival:
    """Another policy node and when it was last heard (steady seconds)."""

    instance_id: str
    started_ns: int
    lifecycle: str
    heard_s: float


class Rivals:
    """Those that the node `instance_id`, started at `started_ns`, has heard."""

    def __init__(self, instance_id: str, started_ns: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._me = (started_ns, instance_id)
        self._clock = clock
        self._heard: dict[str, Rival] = {}

    def hear(self, state: SteeringState) -> None:
        """Take note of a state, unless it is the node's own."""
        if state.instance_id == self._me[1]:
            return
        self._heard[state.instance_id] = Rival(state.instance_id, state.started_ns, state.lifecycle, self._clock())
        for old in sorted(self._heard.values(), key=lambda rival: rival.heard_s)[:-KEPT]:
            del self._heard[old.instance_id]

    def elder(self) -> Rival | None:
        """A living node that started earlier."""
        now = self._clock()
        for rival in self._heard.values():
            alive = now - rival.heard_s < SILENCE_S and rival.lifecycle != "finalized"
            if alive and (rival.started_ns, rival.instance_id) < self._me:
                return rival
        return None
