"""How often the policy does what LIBERO asks: the benchmark's own protocol, or randomised layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sim.evaluation.statistics import Line, share

TARGETS: Mapping[str, tuple[float, float]] = {"official": (0.70, 0.90), "random": (0.45, 0.75)}
"""Layout -> success that is to be reached at least, and aimed at."""


def summarise(rows: Sequence[Mapping[str, Any]], layout: str) -> list[Line]:
    """Success (LIBERO's predicate at any step), success with the object let go, both by task; refused layouts apart."""
    kept = [row for row in rows if "refused" not in row]
    least, aim = TARGETS.get(layout, (None, None))
    lines = [
        share(f"success, {layout} layouts", sum(row["done"] for row in kept), len(kept), least=least, aim=aim),
        share("  of these let go and stayed", sum(row["released"] for row in kept), len(kept)),
        share("  lifted the object asked for", sum(row["lifted"] == row["target"] for row in kept), len(kept)),
    ]
    for task in sorted({row["task_id"] for row in kept}):
        mine = [row for row in kept if row["task_id"] == task]
        lines.append(share(f"  task {task}", sum(row["done"] for row in mine), len(mine)))
    return lines
