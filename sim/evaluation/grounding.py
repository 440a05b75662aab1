"""Does the policy take the object it is told to take? The same layout, another instruction.

A policy that is deaf to words takes the same object in every episode of a layout, so it is right in at most one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sim.evaluation.episodes import Trial, randomised
from sim.evaluation.statistics import Line, share
from steer_runtime.errors import SteerError

LEAST, AIM = 0.80, 0.95


def trials(tasks: Sequence[int], episodes: int, seed: int, instructions: int) -> list[Trial]:
    """Episodes in groups of `instructions` on one layout, each asking for another object.

    Raises SteerError('bad_count') for under 2 instructions a layout.
    """
    if instructions < 2:
        raise SteerError("bad_count", f"{instructions} instructions a layout were asked for: expected at least 2")
    layouts = randomised(tasks, -(-episodes // instructions), seed)
    every = [replace(t, key=f"{t.key}-asked{k}", asked=k) for t in layouts for k in range(instructions)]
    return every[:episodes]


def summarise(rows: Sequence[Mapping[str, Any]], instructions: int) -> list[Line]:
    """Right objects among episodes that lifted one, among all, and the same of placing; chance levels beside them."""
    kept = [row for row in rows if "refused" not in row]
    lifted = [row for row in kept if row["lifted"] is not None]
    placed = [row for row in kept if row["placed"] is not None]

    def right(part: Sequence[Mapping[str, Any]], verb: str) -> int:
        return sum(row[verb] == row["target"] for row in part)

    even = sum(1 / row["targets"] for row in kept) / len(kept) if kept else None
    return [
        share("right object, of episodes that lifted one", right(lifted, "lifted"), len(lifted), least=LEAST, aim=AIM),
        share("  of all episodes", right(kept, "lifted"), len(kept)),
        share("  right object placed, of episodes that placed one", right(placed, "placed"), len(placed)),
        share("  right object placed, of all episodes", right(kept, "placed"), len(kept)),
        Line("  by chance, any object alike", even, n=len(kept), unit="%"),
        Line("  deaf to words, at most", 1 / instructions, n=len(kept), unit="%"),
    ]
