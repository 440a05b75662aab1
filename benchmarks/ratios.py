"""Ratios of times measured side by side: variants take turns inside each round, so drift of the machine hits them alike."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table


@dataclass(frozen=True)
class Ratio:
    """Lower quartile of the times over that of the floor, with a 95 % interval from resampling whole rounds.

    What else a machine does only adds time, so the lower quartile is nearer to the work itself than the median is.
    """

    name: str
    ratio: float
    low: float
    high: float
    floor_ms: float
    limit: float | None

    @property
    def passed(self) -> bool | None:
        return None if self.limit is None else self.ratio <= self.limit


@dataclass(frozen=True)
class Variant:
    """One way to do the same work. around: entered, untimed, while it is timed. limit: largest accepted ratio."""

    name: str
    run: Callable[[], object]
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    limit: float | None = None


def side_by_side(variants: Sequence[Variant], *, rounds: int, calls: int = 1) -> list[Ratio]:
    """Ratios to the first variant. Every round times each variant `calls` times; who begins turns from round to round."""
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    order = list(variants)
    for round_index in track(range(-2, rounds), description=f"{len(variants)} variants", transient=True):
        order.append(order.pop(0))
        for variant in order:
            with variant.around():
                variant.run()  # the first call after a switch pays for cold caches
                began = time.perf_counter()
                for _ in range(calls):
                    variant.run()
                elapsed = (time.perf_counter() - began) / calls
            if round_index >= 0:
                times[variant.name].append(elapsed)
    floor = np.array(times[variants[0].name])
    drawn = np.random.default_rng(0).integers(0, rounds, (2000, rounds))
    out = []
    for variant in variants:
        mine = np.array(times[variant.name])
        resampled = np.quantile(mine[drawn], 0.25, axis=1) / np.quantile(floor[drawn], 0.25, axis=1)
        low, high = np.quantile(resampled, (0.025, 0.975))
        floor_ms = float(np.quantile(floor, 0.25)) * 1e3
        ratio = float(np.quantile(mine, 0.25)) / float(np.quantile(floor, 0.25))
        out.append(Ratio(variant.name, ratio, float(low), float(high), floor_ms, variant.limit))
    return out


def show(title: str, ratios: Sequence[Ratio]) -> bool:
    """Print a table and one JSON line; True when every limit is kept."""
    table = Table(title=title)
    for column in ("variant", "ratio", "95 % interval", "limit", ""):
        table.add_column(column)
    for ratio in ratios:
        verdict = {None: "", True: "ok", False: "MISSED"}[ratio.passed]
        limit = "" if ratio.limit is None else f"<= {ratio.limit:g}"
        table.add_row(ratio.name, f"{ratio.ratio:.4f}", f"{ratio.low:.4f} - {ratio.high:.4f}", limit, verdict)
    Console().print(table)
    print(json.dumps({"benchmark": title, "ratios": [vars(ratio) for ratio in ratios]}))
    return all(ratio.passed is not False for ratio in ratios)
