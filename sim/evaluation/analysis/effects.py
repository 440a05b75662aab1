"""From measured episodes to effects: every condition against the unsteered one, in pairs, beside its controls.

Invariant: an effect is the mean over pairs of (condition - unsteered) of the same start; a pair lacks an effect where either
episode has no value, and n says how many are left. Rules and their reasons stand in `paired` and `shares`.

Claims are tested in two steps, so that ten strengths are not ten chances. First, once a direction: is the slope of its
metric over strength, a pair at a time, other than zero (`slope`), adjusted by Holm over all directions of the study? Only
then, strength by strength: p < 0.05, the wanted way, beyond the control band. A strength of a direction without any effect is
called working with a chance of at most 5 % over all of its strengths and all directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from sim.evaluation.analysis import paired, shares
from sim.evaluation.analysis.claims import Claim, claim_of, claim_of_prompt
from sim.evaluation.analysis.estimate import Estimate, PValue
from sim.evaluation.analysis.measured import Episode, Study
from sim.evaluation.analysis.metrics import METRICS, first_action, off_axis, spreads
from sim.evaluation.motion import RATE_HZ
from sim.evaluation.study.kinds import CONTROLS
from steer_runtime.errors import SteerError

ALPHA = 0.05
POSITION_SCALE_M = 0.05
"""Metres that an action component of 1 moves the hand in a control step, in LIBERO."""


@dataclass(frozen=True)
class Group:
    """All episodes of one condition, scored ones by pair."""

    label: str
    kind: str
    direction: str | None
    strength: float | None
    draw: int | None
    scored: Mapping[str, Episode]
    coverage: shares.Coverage


@dataclass(frozen=True)
class Effect:
    """One condition against the unsteered one. change: of the claimed metric; mean: the metric's own mean over the pairs;
    share: change relative to the unsteered mean of the same pairs. first: the same change in the first action, before the
    robot moved (open loop). off: metric -> change in standard deviations of the unsteered episodes; damage: their root mean
    square. bands: one for each kind of control that ran, the widest first; band: that one. released: share in which the hand let go of the
    object after success, of episodes that went on long enough to see it. all: metric -> change in its unit; dose: the metric's own mean, since the unsteered policy has none. works: see the module; None where no control was run or nothing was tested.
    """

    label: str
    kind: str
    strength: float | None
    change: Estimate
    mean: float | None
    share: float | None
    p: PValue
    detectable: Estimate
    band: paired.Band
    bands: tuple[paired.Band, ...]
    first: Estimate
    success: Estimate
    baseline: Estimate
    released: Estimate
    mcnemar: PValue
    non_inferiority: shares.NonInferiority
    off: Mapping[str, Estimate]
    damage: float | None
    all: Mapping[str, Estimate]
    dose: Estimate
    pairs: int
    right_way: bool | None
    works: bool | None


@dataclass(frozen=True)
class TaskRow:
    """One task. before: mean of the metric unsteered; changes: label of the condition -> mean change and success."""

    task: str
    words: str
    before: float | None
    success: tuple[int, int]
    changes: Mapping[str, tuple[float | None, int, tuple[int, int]]]


@dataclass(frozen=True)
class Subject:
    """A direction or axis. slope: change of the metric for strength 1 (see `slope`); p: its test, adjusted: by Holm.

    rivals: prompts, scaled actions and the opposite that claim the same metric. monotone: no strength undoes what a smaller
    one did; None below two strengths. tests: directions whose slopes Holm judged together, this one among them.
    """

    name: str
    ids: tuple[str, ...]
    claim: Claim | None
    slope: Estimate
    p: PValue
    adjusted: float | None
    detectable: Estimate
    doses: tuple[Effect, ...]
    rivals: tuple[Effect, ...]
    monotone: bool | None
    tasks: tuple[TaskRow, ...]
    tests: int = 1


@dataclass(frozen=True)
class Analysis:
    """unsteered: metric -> mean with its interval over tasks. zero: pairs under strength 0 through the hooks, and how many
    of them equal the unsteered ones in every metric."""

    subjects: tuple[Subject, ...]
    unsteered: Mapping[str, Estimate]
    success: Estimate
    released: Estimate
    zero: tuple[int, int]
    coverage: shares.Coverage
    by_kind: Mapping[str, shares.Coverage]
    groups: Mapping[str, shares.Coverage]
    tasks: int


def analyse(
    study: Study, told: Mapping[str, Claim] | None = None, on_condition: Callable[[str], None] | None = None
) -> Analysis:
    """All subjects of a study. Raises SteerError('no_baseline') without a scored unsteered episode."""
    groups = grouped(study.episodes)
    off = next((g for g in groups if g.kind == "unsteered"), None)
    if off is None or not off.scored:
        raise SteerError(
            "no_baseline",
            f"{study.folder} has no scored unsteered episode, and effects are told against those: add the condition "
            "`unsteered` to the study, or let it run on",
        )
    scales = spreads([e.metrics for e in off.scored.values()])
    tick = on_condition or (lambda _: None)
    names = dict.fromkeys(g.direction for g in groups if g.kind == "direction" and g.direction is not None)
    claims = {name: claim_of(name, told or {}) for name in names}
    # What the strictest of Holm's steps asks.
    alpha = ALPHA / max(1, sum(claim is not None for claim in claims.values()))
    drafts = [_subject(name, claim, groups, off, scales, alpha, tick) for name, claim in claims.items()]
    adjusted = paired.holm({s.name: s.p.p for s in drafts})
    tests = max(1, sum(s.p.p is not None for s in drafts))
    subjects = tuple(replace(_decided(s, adjusted[s.name]), tests=tests) for s in drafts)
    scored = list(off.scored.values())
    covered = _covered(groups, study.facts)
    kinds = dict.fromkeys(kind for kind, _ in covered.values())
    return Analysis(
        subjects=subjects,
        unsteered={name: _level(name, scored) for name in METRICS},
        success=_share([e.success for e in scored]),
        released=_share([e.released for e in scored if e.released is not None]),
        zero=_zero(groups, off),
        coverage=_sum([c for _, c in covered.values()]),
        by_kind={kind: _sum([c for k, c in covered.values() if k == kind]) for kind in kinds},
        groups={label: c for label, (_, c) in covered.items()},
        tasks=len({e.task for e in study.episodes}),
    )


def comparisons(study: Study, told: Mapping[str, Claim] | None = None) -> int:
    """How many conditions `analyse` announces: a rival is compared for each direction that it rivals."""
    groups = grouped(study.episodes)
    names = dict.fromkeys(g.direction for g in groups if g.kind == "direction" and g.direction is not None)
    rivals = sum(_rival(g, name, claim_of(name, told or {})) is not None for name in names for g in groups)
    return rivals + sum(g.kind == "direction" for g in groups)


def grouped(episodes: Sequence[Episode]) -> list[Group]:
    """Conditions in order of appearance. Raises SteerError('bad_record') for a start that ran twice under one."""
    rows: dict[str, list[Episode]] = {}
    for episode in episodes:
        rows.setdefault(episode.condition, []).append(episode)
    out = []
    for label, mine in rows.items():
        scored = [e for e in mine if e.status == "done"]
        by_pair = {e.pair: e for e in scored}
        if len(by_pair) < len(scored):
            raise SteerError(
                "bad_record", f"condition {label!r} has a start twice: the tables were put together wrongly"
            )
        coverage = shares.Coverage(
            planned=len(mine),
            scored=len(scored),
            errored=sum(e.status == "errored" for e in mine),
            refused=sum(e.status == "refused" for e in mine),
        )
        first = mine[0]
        out.append(Group(label, first.kind, first.direction, first.strength, first.draw, by_pair, coverage))
    return out


def differences(group: Group, off: Group, metric: str) -> tuple[list[float], list[str]]:
    """(condition - unsteered of each pair, its task) where both have a value."""
    values, tasks = [], []
    for pair, episode in group.scored.items():
        one = episode.metrics.get(metric)
        other = off.scored[pair].metrics.get(metric) if pair in off.scored else None
        if one is not None and other is not None:
            values.append(one - other)
            tasks.append(episode.task)
    return values, tasks


def slope(groups: Sequence[Group], off: Group, metric: str) -> tuple[list[float], list[str]]:
    """A slope a pair and its task: sum_s s d_s / sum_s s^2 over the strengths s that the pair ran, d_s the change at s: least
    squares through the unsteered value, in units of the metric for strength 1.

    Why: one number a pair answers "does it move with strength" at once for all strengths and both ends, so that nothing is
    chosen after looking.
    """
    top: dict[str, float] = {}
    bottom: dict[str, float] = {}
    task: dict[str, str] = {}
    for group in groups:
        for pair, episode in group.scored.items():
            one = episode.metrics.get(metric)
            other = off.scored[pair].metrics.get(metric) if pair in off.scored else None
            if one is None or other is None or not group.strength:
                continue
            top[pair] = top.get(pair, 0.0) + group.strength * (one - other)
            bottom[pair] = bottom.get(pair, 0.0) + group.strength**2
            task[pair] = episode.task
    return [top[pair] / bottom[pair] for pair in top], [task[pair] for pair in top]


def _subject(
    name: str,
    claim: Claim | None,
    groups: Sequence[Group],
    off: Group,
    scales: Mapping[str, float],
    alpha: float,
    tick: Callable[[str], None],
) -> Subject:
    mine = sorted((g for g in groups if g.kind == "direction" and g.direction == name), key=lambda g: g.strength or 0.0)
    draws = [g for g in groups if g.kind in CONTROLS and g.direction == name]
    doses, rivals = [], []
    for group in mine:
        doses.append(_effect(group, off, scales, claim, draws, len(mine)))
        tick(group.label)
    for group in groups:
        its = _rival(group, name, claim)
        if its is not None:
            rivals.append(_effect(group, off, scales, its, [], len(mine)))
            tick(group.label)
    ids = tuple(dict.fromkeys(e.direction_id for g in mine for e in g.scored.values() if e.direction_id))
    if claim is None:
        nothing = Estimate(None, note="its name claims no metric")
        return Subject(name, ids, None, nothing, PValue(None, "pair", 0, "its name claims no metric"), None, nothing, tuple(doses), tuple(rivals), None, ())  # fmt: skip
    slopes, tasks = slope(mine, off, claim.metric)
    return Subject(
        name=name,
        ids=ids,
        claim=claim,
        slope=paired.cluster_bootstrap(slopes, tasks),
        p=paired.sign_flip(slopes, tasks),
        adjusted=None,
        detectable=paired.detectable(slopes, tasks, alpha),
        doses=tuple(doses),
        rivals=tuple(rivals),
        monotone=_monotone(doses, claim.sign),
        tasks=_tasks(mine, off, claim.metric),
    )


def _rival(group: Group, name: str, claim: Claim | None) -> Claim | None:
    """What a condition claims that rivals `claim`; None for one that is no rival of it."""
    if claim is None:
        return None
    if group.kind == "opposite" and group.direction == name:
        return claim
    if group.kind == "scale" and claim.metric in ("speed", "near_speed"):
        return Claim(claim.metric, 1.0, "its factor")
    if group.kind == "prompt":
        its = claim_of_prompt(group.label.removeprefix("prompt:"))
        return its if its is not None and its.metric == claim.metric else None
    return None


def _effect(
    group: Group,
    off: Group,
    scales: Mapping[str, float],
    claim: Claim | None,
    draws: Sequence[Group],
    tests: int,
) -> Effect:
    both = [(e, off.scored[pair]) for pair, e in group.scored.items() if pair in off.scored]
    tasks = [e.task for e, _ in both]
    every = {}
    for name in METRICS:
        every[name] = paired.cluster_bootstrap(*differences(group, off, name))
    metric = None if claim is None else claim.metric
    towards = _towards(group, claim)
    nothing = Estimate(None, note="its name claims no metric")
    values, its = ([], []) if metric is None else differences(group, off, metric)
    change = nothing if metric is None else every[metric]
    before = _mean([b.metrics.get(metric) for a, b in both if a.metrics.get(metric) is not None]) if metric else None
    mean = None if before is None or change.value is None else before + change.value
    aside = {name: _scaled(every[name], scales[name]) for name in off_axis(metric or "") if name in scales}
    aside = {name: e for name, e in aside.items() if e.value is not None}
    sizes = [e.value for e in aside.values() if e.value is not None]
    wanted = None if towards is None or change.value is None else change.value * towards > 0
    bands = _bands(group, off, metric, towards, change.value, draws)
    return Effect(
        label=group.label,
        kind=group.kind,
        strength=group.strength,
        change=change,
        mean=mean,
        share=change.value / before if before and change.value is not None else None,
        p=paired.sign_flip(values, its),
        detectable=paired.detectable(values, its, alpha=ALPHA / max(1, tests)),
        band=bands[0],
        bands=bands,
        first=_first(both, metric),
        success=_share([a.success for a, _ in both]),
        baseline=_share([b.success for _, b in both]),
        released=_share([a.released for a, _ in both if a.released is not None]),
        mcnemar=shares.mcnemar([bool(a.success) for a, _ in both], [bool(b.success) for _, b in both]),
        non_inferiority=shares.non_inferiority([bool(a.success) for a, _ in both], [bool(b.success) for _, b in both], tasks),
        off=aside,
        damage=float(np.sqrt(np.mean(np.square(sizes)))) if sizes else None,
        all=every,
        dose=_level("dose", [a for a, _ in both]),
        pairs=len(both),
        right_way=wanted,
        works=None,
    )  # fmt: skip


def _towards(group: Group, claim: Claim | None) -> float | None:
    """+1 where the claimed metric should grow under this condition, -1 where it should fall."""
    if claim is None:
        return None
    if group.kind == "scale":
        return 1.0 if (group.strength or 1.0) >= 1 else -1.0
    return claim.sign * (-1.0 if (group.strength or 0.0) < 0 else 1.0)


def _bands(
    group: Group, off: Group, metric: str | None, towards: float | None, effect: float | None, draws: Sequence[Group]
) -> tuple[paired.Band, ...]:
    """A band for each kind of control that ran at this strength, the widest first; one without draws where none did.

    Why not one of all draws: draws of a kind that moves nothing would hide those of a kind that does.
    """
    if metric is None or towards is None:
        return (paired.Band(None, None, 0, 0, None, None, "its name claims no metric"),)
    found = []
    for kind in CONTROLS:
        pushed = [differences(g, off, metric)[0] for g in draws if g.kind == kind and g.strength == group.strength]
        pushed = [values for values in pushed if values]
        fewest = min((len(values) for values in pushed), default=0)
        band = paired.control_band(effect, [float(np.mean(values)) for values in pushed], towards, fewest)
        found.append(replace(band, kind=kind if pushed else ""))
    known = sorted((b for b in found if b.size is not None), key=lambda b: -(b.size or 0.0))
    return tuple(known) or (found[0],)


def _first(both: Sequence[tuple[Episode, Episode]], metric: str | None) -> Estimate:
    """Change of the first action, which both policies chose at the same state (see `metrics.first_action`)."""
    values, tasks = [], []
    for one, other in both:
        if metric is None or one.first_action is None or other.first_action is None:
            continue
        a, b = (first_action(metric, e.first_action, POSITION_SCALE_M, RATE_HZ) for e in (one, other))  # type: ignore[arg-type]
        if a is not None and b is not None:
            values.append(a - b)
            tasks.append(one.task)
    if not values:
        return Estimate(None, note="has no counterpart in a first action")
    return paired.cluster_bootstrap(values, tasks)


def _decided(subject: Subject, adjusted: float | None) -> Subject:
    """With Holm's p and the strengths that work.

    A strength at which a kind of control did not run that ran at another one is not called working: else leaving the harder
    control out where an effect is small would let it pass.
    """
    kinds = {b.kind for d in subject.doses for b in d.bands if b.kind}
    passed = adjusted is not None and adjusted < ALPHA
    doses = []
    for d in subject.doses:
        works = None
        if adjusted is not None and d.band.beyond is not None and kinds == {b.kind for b in d.bands}:
            works = bool(passed and d.right_way and d.p.p is not None and d.p.p < ALPHA and d.band.beyond)
        doses.append(replace(d, works=works))
    return replace(subject, adjusted=adjusted, doses=tuple(doses))


def _monotone(doses: Sequence[Effect], sign: float) -> bool | None:
    curve = sorted(
        [(0.0, 0.0), *((d.strength or 0.0, sign * d.change.value) for d in doses if d.change.value is not None)]
    )
    if len(curve) < 3:
        return None
    values = [value for _, value in curve]
    return values[-1] > values[0] and all(b >= a for a, b in pairwise(values))


def _tasks(groups: Sequence[Group], off: Group, metric: str) -> tuple[TaskRow, ...]:
    out = []
    for task in dict.fromkeys(e.task for e in off.scored.values()):
        still = {pair: e for pair, e in off.scored.items() if e.task == task}
        changes = {}
        for group in groups:
            mine = [e for e in group.scored.values() if e.task == task and e.pair in still]
            values, tasks = differences(group, off, metric)
            its = [value for value, of in zip(values, tasks, strict=True) if of == task]
            changes[group.label] = (_mean(its), len(its), (sum(bool(e.success) for e in mine), len(mine)))
        words = next(iter(still.values())).words
        before = _mean([e.metrics.get(metric) for e in still.values()])
        out.append(TaskRow(task, words, before, (sum(bool(e.success) for e in still.values()), len(still)), changes))
    return tuple(out)


def _zero(groups: Sequence[Group], off: Group) -> tuple[int, int]:
    """(pairs, of them equal in every metric and in success) of strength 0 through the hooks; the dose is not a metric of
    what the robot did."""
    pairs = equal = 0
    for group in groups:
        if group.kind != "zero":
            continue
        for pair, one in group.scored.items():
            other = off.scored.get(pair)
            if other is None:
                continue
            pairs += 1
            same = all(one.metrics.get(name) == other.metrics.get(name) for name in METRICS if name != "dose")
            equal += same and one.success == other.success
    return pairs, equal


def _scaled(estimate: Estimate, scale: float) -> Estimate:
    def by(value: float | None) -> float | None:
        return None if value is None else value / scale

    return replace(estimate, value=by(estimate.value), low=by(estimate.low), high=by(estimate.high))


def _level(name: str, episodes: Sequence[Episode]) -> Estimate:
    known = [(e.metrics[name], e.task) for e in episodes if e.metrics.get(name) is not None]
    return paired.cluster_bootstrap([float(v) for v, _ in known if v is not None], [t for _, t in known])


def _share(values: Sequence[bool | None]) -> Estimate:
    return shares.wilson(sum(bool(v) for v in values), len(values))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _covered(groups: Sequence[Group], facts: Mapping[str, Any]) -> dict[str, tuple[str, shares.Coverage]]:
    """Label -> (kind, coverage), also of conditions that were planned and have no row yet.

    facts: `plan` is label -> episodes planned; rows alone say nothing of what is missing.
    """
    plan: Mapping[str, int] = facts.get("plan") or {}
    out = {g.label: (g.kind, g.coverage) for g in groups}
    for label, planned in plan.items():
        kind, seen = out.get(label, (label.partition(":")[0], shares.Coverage(0, 0, 0, 0)))
        out[label] = kind, replace(seen, planned=max(planned, seen.planned))
    return out


def _sum(parts: Sequence[shares.Coverage]) -> shares.Coverage:
    return shares.Coverage(
        *(sum(getattr(p, name) for p in parts) for name in ("planned", "scored", "errored", "refused"))
    )
