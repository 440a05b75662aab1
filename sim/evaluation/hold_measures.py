"""How well a set point was held, from the trace of an episode; and conditions against each other, in pairs.

Invariant: errors are of the filtered measurement while it is measurable, by the same filter for every condition; an
episode in which nothing was measurable has no error, not an error of zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from sim.evaluation.analysis.paired import cluster_bootstrap
from sim.evaluation.analysis.shares import mcnemar, wilson
from sim.evaluation.hold import FIXED, OFF, HoldCondition
from sim.evaluation.statistics import Line

BAND = 0.15
"""Share of the target within which the measurement counts as settled: a third of the pocket policy's tread."""


@dataclass(frozen=True)
class Held:
    """Measures of one episode, in SI units and seconds; None where there was nothing to measure.

    rmse, bias: of the filtered measurement against the target. mean: of the unfiltered one over the measurable time.
    within: share of the measurable updates in the band. settling_s: from the first measurement until it stays in the band
    for the rest of the episode; None: never did. overshoot: farthest beyond the target, as seen from the first measurement,
    as a share of the target. measurable: share of updates. activity: way of the strength a second. flips: changes of what
    the policy says first a second. dose: the largest.
    """

    rmse: float | None
    bias: float | None
    mean: float | None
    within: float | None
    settling_s: float | None
    overshoot: float | None
    measurable: float
    activity: float
    flips: float
    dose: float


def measures_of(trace: Mapping[str, Sequence[Any]], target: float) -> Held:
    """The measures of a trace: columns t, value, raw, strength, dose, said, one entry an inference."""
    t = np.array(trace["t"], dtype=np.float64)
    value = np.array([np.nan if v is None else v for v in trace["value"]], dtype=np.float64)
    raw = np.array([np.nan if v is None else v for v in trace["raw"]], dtype=np.float64)
    strength = np.array(trace["strength"], dtype=np.float64)
    said = [str(words).split(" ")[0] for words in trace["said"]]
    seconds = float(t[-1] - t[0]) if len(t) > 1 else 0.0
    known = np.isfinite(value)
    error = value[known] - target
    activity = float(np.abs(np.diff(strength)).sum()) / seconds if seconds else 0.0
    flips = sum(a != b for a, b in pairwise(said)) / seconds if seconds else 0.0
    dose = max(trace["dose"], default=0.0)
    if not known.any():
        return Held(None, None, None, None, None, None, 0.0, activity, flips, dose)
    inside = np.abs(error) <= BAND * target
    out = np.flatnonzero(~inside)
    first_in = out[-1] + 1 if len(out) else 0
    times = t[known]
    beyond = error * (1.0 if error[0] < 0 else -1.0)
    return Held(
        rmse=float(np.sqrt((error**2).mean())),
        bias=float(error.mean()),
        mean=float(raw[known].mean()),
        within=float(inside.mean()),
        settling_s=float(times[first_in] - times[0]) if first_in < len(times) else None,
        overshoot=max(0.0, float(beyond.max())) / target,
        measurable=float(known.mean()),
        activity=activity,
        flips=flips,
        dose=dose,
    )


@dataclass(frozen=True)
class Outcome:
    """One scored episode. task: the cluster. layout: what pairs are of."""

    condition: str
    layout: int
    task: int
    done: bool
    held: Held


def outcomes(rows: Sequence[Mapping[str, Any]], target: float) -> list[Outcome]:
    """Episodes that were run; refused layouts are left out."""
    return [
        Outcome(row["condition"], row["seed"], row["task_id"], bool(row["done"]), measures_of(row["trace"], target))
        for row in rows
        if "refused" not in row
    ]


def best_fixed(found: Sequence[Outcome], conditions: Sequence[HoldCondition]) -> str | None:
    """The condition without a controller, at scale 1, with the least mean error: unsteered or a fixed strength.

    It is chosen on the very layouts it is compared on, so it is as good as fixed strengths can look.
    """
    errors: dict[str, float] = {}
    for condition in conditions:
        if condition.closed or condition.scale != 1.0:
            continue
        mine = [o.held.rmse for o in found if o.condition == condition.key and o.held.rmse is not None]
        if mine:
            errors[condition.key] = float(np.mean(mine))
    return min(errors, key=lambda key: errors[key]) if errors else None


def summarise(found: Sequence[Outcome], conditions: Sequence[HoldCondition], unit: str, size: float) -> list[Line]:
    """Lines of every condition, then each controller against the best fixed strength, and success: each condition against
    unsteered, each controller against every fixed strength within its range.

    unit, size: what to show errors in, and its size in SI.
    """
    lines: list[Line] = []
    for condition in conditions:
        mine = [o for o in found if o.condition == condition.key]
        if mine:
            lines += _of_condition(condition.key, mine, unit, size)
    best = best_fixed(found, conditions)
    for condition in conditions:
        if best is not None and condition.closed and condition.scale == 1.0:
            lines += _against(found, condition.key, best, unit, size)
    for condition in conditions:
        if condition.kind != OFF:
            lines += _success_against(found, condition.key, OFF)
    for condition in conditions:
        for other in conditions if condition.closed else ():
            if other.kind == FIXED and other.scale == condition.scale:
                lines += _success_against(found, condition.key, other.key)
    return lines


def _of_condition(name: str, mine: Sequence[Outcome], unit: str, size: float) -> list[Line]:
    tasks = [o.task for o in mine]

    def mean(what: str, attribute: str, scale: float, shown: str) -> Line:
        values = [(getattr(o.held, attribute), task) for o, task in zip(mine, tasks, strict=True)]
        known = [(v * scale, task) for v, task in values if v is not None]
        found = cluster_bootstrap([v for v, _ in known], [task for _, task in known])
        return Line(f"  {what}", found.value, found.low, found.high, found.n, shown)

    done = wilson(sum(o.done for o in mine), len(mine))
    settled = wilson(sum(o.held.settling_s is not None for o in mine), len(mine))
    return [
        Line(f"{name}: error (RMSE)", *_plain(mean("", "rmse", 1 / size, unit))),
        mean("bias", "bias", 1 / size, unit),
        mean("mean, unfiltered", "mean", 1 / size, unit),
        mean(f"time within {BAND:.0%} of the target", "within", 1.0, "%"),
        Line("  settled before the end", settled.value, settled.low, settled.high, settled.n, "%"),
        mean("settling time of those", "settling_s", 1.0, "s"),
        mean("overshoot", "overshoot", 1.0, "%"),
        mean("measurable", "measurable", 1.0, "%"),
        mean("way of the strength", "activity", 1.0, "1/s"),
        mean("changes of the word", "flips", 1.0, "1/s"),
        mean("largest dose", "dose", 1.0, ""),
        Line("  success", done.value, done.low, done.high, done.n, "%"),
    ]


def _plain(line: Line) -> tuple[float | None, float | None, float | None, int, str]:
    return line.value, line.low, line.high, line.n, line.unit


def _paired(found: Sequence[Outcome], one: str, other: str) -> list[tuple[Outcome, Outcome]]:
    by_layout = {o.layout: o for o in found if o.condition == other}
    return [(o, by_layout[o.layout]) for o in found if o.condition == one and o.layout in by_layout]


def _against(found: Sequence[Outcome], one: str, other: str, unit: str, size: float) -> list[Line]:
    lines = []
    for label, attribute in (("error (RMSE)", "rmse"), ("size of the bias", "bias")):
        values = [
            ((abs(a) - abs(b)) / size, first.task)
            for first, second in _paired(found, one, other)
            if (a := getattr(first.held, attribute)) is not None
            if (b := getattr(second.held, attribute)) is not None
        ]
        if values:
            difference = cluster_bootstrap([v for v, _ in values], [task for _, task in values])
            what = f"{one} minus {other}: {label}"
            lines.append(Line(what, difference.value, difference.low, difference.high, difference.n, unit))
    return lines


def _success_against(found: Sequence[Outcome], one: str, other: str) -> list[Line]:
    pairs = _paired(found, one, other)
    if not pairs:
        return []
    won = sum(a.done and not b.done for a, b in pairs)
    lost = sum(b.done and not a.done for a, b in pairs)
    p = mcnemar([a.done for a, _ in pairs], [b.done for _, b in pairs]).p
    return [Line(f"{one} against {other}: pairs won {won}, lost {lost}; McNemar p", p, n=len(pairs))]


def stair(
    rows: Sequence[Mapping[str, Any]], conditions: Sequence[HoldCondition], width: float = 0.1
) -> dict[str, dict[str, int]]:
    """Strength (middle of a bin) -> first word said -> inferences, over every condition at scale 1: the stair itself."""
    wanted = {c.key for c in conditions if c.scale == 1.0}
    counts: dict[float, Counter[str]] = {}
    for row in rows:
        if "refused" in row or row["condition"] not in wanted:
            continue
        trace = row["trace"]
        for strength, said in zip(trace["strength"], trace["said"], strict=True):
            middle = round(round(strength / width) * width, 6)
            counts.setdefault(middle, Counter())[str(said).split(" ")[0]] += 1
    return {f"{middle:g}": dict(counts[middle]) for middle in sorted(counts)}
