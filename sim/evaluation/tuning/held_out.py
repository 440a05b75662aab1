"""What tuning chose, on starts that no trial saw: unsteered and at several shares of the tuned strength.

Invariant: a strength is verified when all three hold on the held-out pairs: the interval of the change lies on the wanted
side of zero, success is non-inferior ("held", see `shares.non_inferiority`), and the off-axis damage is within its limit. All
must hold at once, so no correction for several looks is due (intersection-union test). The best of many trials looks better
than it is; starts that chose nothing do not know that.

A label names the trial beside the strength, `direction:pace#4@+0.31`: one folder holds the episodes of every choice that was
ever checked, and the tables those of the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sim.evaluation.analysis import effects, measured, paired, shares
from sim.evaluation.analysis.estimate import Estimate
from sim.evaluation.study.conditions import Condition
from sim.evaluation.study.run import Study, prepare
from sim.evaluation.tuning.plan import End, Tuning, held_out
from sim.evaluation.tuning.score import Seen, score
from sim.evaluation.tuning.trials import Told

if TYPE_CHECKING:
    from steer_runtime.policies import LoadedPolicy

FOLDER = "held-out"


@dataclass(frozen=True)
class Checked:
    """One end at one strength. change: of the metric, its own sign; damage: see `score.Score`; planned: pairs there should be.

    fails: what is not shown, in words; empty where it is verified.
    """

    end: str
    strength: float
    change: Estimate
    success: Estimate
    unsteered: Estimate
    difference: Estimate
    kept: str
    damage: float | None
    planned: int
    fails: tuple[str, ...]

    def to_jsonable(self) -> dict[str, Any]:
        return asdict(self)


def study_of(tuning: Tuning, chosen: Mapping[str, Told], policy: LoadedPolicy) -> Study:
    """The study of the held-out starts. chosen: end -> the trial that tuning chose. Raises SteerError('no_held_out')."""
    more = [c for end in tuning.ends if end.name in chosen for c in _conditions(tuning, end, chosen[end.name])]
    return prepare(held_out(tuning.settings), policy, more)


def check(tuning: Tuning, chosen: Mapping[str, Told], folder: Path) -> list[Checked]:
    """Of a study that ran, by end and rising strength. Raises SteerError as `measured.load`."""
    groups = {g.label: g for g in effects.grouped(measured.load(folder).episodes)}
    off = groups["unsteered"]
    out = []
    for end in tuning.ends:
        for condition in _conditions(tuning, end, chosen[end.name]) if end.name in chosen else ():
            out.append(_checked(tuning, end, condition, groups[condition.label], off))
    return sorted(out, key=lambda c: (c.end, c.strength))


def verified_range(checked: list[Checked]) -> tuple[float, float] | None:
    """Of one end: from the lowest to the highest of the largest two or more verified strengths that follow each other; None
    where no two do. Between two verified strengths the effect is taken to lie between theirs."""
    runs: list[list[float]] = [[]]
    for one in sorted(checked, key=lambda c: -c.strength):
        if one.fails:
            runs.append([])
        else:
            runs[-1].append(one.strength)
    return next(((run[-1], run[0]) for run in runs if len(run) > 1), None)


def _conditions(tuning: Tuning, end: End, trial: Told) -> list[Condition]:
    assert tuning.settings.held_out is not None
    out = []
    for share in sorted(tuning.settings.held_out.shares):
        weaker = replace(trial.point, strength=round(share * trial.point.strength, 4))
        label = f"direction:{tuning.settings.name}#{trial.number}@{end.side * weaker.strength:+.4g}"
        out.append(end.condition(tuning.settings.name, label, weaker))
    return out


def _checked(tuning: Tuning, end: End, condition: Condition, group: effects.Group, off: effects.Group) -> Checked:
    settings = tuning.settings
    both = [(e, off.scored[pair]) for pair, e in group.scored.items() if pair in off.scored]
    seen = [(Seen(bool(a.success), a.metrics), Seen(bool(b.success), b.metrics)) for a, b in both]
    tasks = [a.task for a, _ in both]
    one, other = [a.success for a, _ in seen], [b.success for _, b in seen]
    change = paired.cluster_bootstrap(*effects.differences(group, off, end.metric))
    kept = shares.non_inferiority(one, other, tasks, settings.margin)
    damage = score(seen, end.aim(settings, [b for _, b in seen])).damage if seen else None
    fails = []
    if group.coverage.scored < group.coverage.planned or off.coverage.scored < off.coverage.planned:
        fails.append("episodes errored")
    edge = change.low if end.sign > 0 else change.high
    if edge is None or edge * end.sign <= 0:
        fails.append("the effect is not shown")
    if kept.verdict != "held":
        fails.append("success is lost" if kept.verdict == "lost" else "success is not shown to be kept")
    if settings.damage is not None and (damage is None or damage > settings.damage):
        fails.append("off-axis damage is above its limit")
    assert condition.strength is not None
    return Checked(
        end.name, abs(condition.strength), change, shares.wilson(sum(one), len(one)), shares.wilson(sum(other), len(other)),
        kept.difference, kept.verdict, damage, group.coverage.planned, tuple(fails),
    )  # fmt: skip
