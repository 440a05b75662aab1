"""A tuning that is ready to run: the directions of it, what each should move, and the starts that all trials share.

Invariant: a tuning's hash is of all that decides its trials; what a tuning itself writes into a card later changes none of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sim.evaluation.analysis.claims import Claim, claim_of
from sim.evaluation.analysis.metrics import METRICS, spreads
from sim.evaluation.study.conditions import STEERED, Condition, Finder, Written
from sim.evaluation.study.plan import Job, given, jobs
from sim.evaluation.study.run import Study, prepare
from sim.evaluation.tuning import space
from sim.evaluation.tuning.score import Aim, Seen
from sim.evaluation.tuning.settings import TuneSettings
from sim.evaluation.tuning.space import Point
from steer_runtime.directions.direction import Direction
from steer_runtime.errors import SteerError

if TYPE_CHECKING:
    from steer_runtime.policies import LoadedPolicy

EVIDENCE = "tuning"
"""Key of a card's provenance under which a tuning leaves what it found."""


@dataclass(frozen=True)
class End:
    """One direction that is tuned. name: positive or negative for the ends of an axis, else direction; of: its claim, with the
    sign for this end. side: -1 for the negative end, whose strengths people read below 0."""

    name: str
    direction: Direction
    metric: str
    sign: float
    side: float

    def aim(self, settings: TuneSettings, unsteered: Iterable[Seen]) -> Aim:
        scales = spreads([seen.metrics for seen in unsteered])
        return Aim(self.metric, self.sign, settings.margin, settings.damage, settings.least, scales)

    def condition(self, target: str, label: str, point: Point) -> Condition:
        """What a choice does to an episode. target: the direction or axis that was named."""
        made = space.shaped(self.direction, point)
        attached = replace(made, name=STEERED, max_strength=1.0)
        written = Written(attached, made.id, point.strength, self.side, point.ramp_s)
        return Condition(label, "direction", target, self.side * point.strength, written=written)


@dataclass(frozen=True)
class Tuning:
    """study: the unsteered episodes. configuration: what the folder is of; hash: of it."""

    settings: TuneSettings
    study: Study
    ends: tuple[End, ...]
    claim: Claim
    configuration: Mapping[str, Any]
    hash: str

    def trial(self, end: End, number: int, point: Point) -> tuple[Condition, list[Job]]:
        """A trial's condition and its episodes in their order."""
        condition = end.condition(self.settings.name, f"{end.name}#{number}", point)
        return condition, [given(job, condition, self.settings) for job in self.study.planned]


def ready(settings: TuneSettings, policy: LoadedPolicy) -> Tuning:
    """Plan a tuning of a loaded policy. Raises SteerError: 'no_claim', 'bad_search', 'overlap', 'bad_study', and as
    the store and `study.run.prepare`."""
    claim = _claim(settings)
    found = Finder(settings, policy).ends(settings.name)
    pairs: list[tuple[str, Direction, float]] = [
        ("direction" if found.negative is None else "positive", found.positive, 1.0)
    ]
    if found.negative is not None:
        pairs.append(("negative", found.negative, -1.0))
    elif settings.ends != "both":
        raise SteerError("bad_study", f"`ends` is {settings.ends!r} and {settings.name!r} is a direction: drop it")
    chosen = [p for p in pairs if found.negative is None or settings.ends in ("both", p[0])]
    ends = tuple(End(name, bare(one), claim.metric, claim.sign * side, side) for name, one, side in chosen)
    for end in ends:
        space.require(settings.search, end.direction, policy.towers[end.direction.tower])
    if settings.held_out is not None:
        require_apart(settings)
    study = prepare(settings, policy)
    tuned = {**settings.decides, "claim": [claim.metric, claim.sign], "directions": {e.name: e.direction.id for e in ends}}  # fmt: skip
    configuration = {**study.configuration, "command": "tune", "tuning": tuned}
    text = json.dumps(configuration, sort_keys=True)
    return Tuning(settings, study, ends, claim, configuration, hashlib.sha256(text.encode()).hexdigest())


def bare(direction: Direction) -> Direction:
    """A direction without what a tuning wrote into its card."""
    facts = {key: value for key, value in direction.provenance.items() if key != EVIDENCE}
    return replace(direction, calibrated=None, provenance=facts)


def held_out(settings: TuneSettings) -> TuneSettings:
    """The same study on the held-out starts. Raises SteerError('no_held_out')."""
    if settings.held_out is None:
        raise SteerError(
            "no_held_out",
            "the YAML has no `held_out` starts, and a range is verified on starts that no trial saw: add some",
        )
    return settings.model_copy(update={"suites": settings.held_out.suites, "seeds": settings.held_out.seeds})


def require_apart(settings: TuneSettings) -> None:
    """Refuse held-out starts that a trial sees, also under another suite's name. Raises SteerError('overlap')."""
    conditions = (Condition("unsteered", "unsteered"),)
    tuned = {_state(job): job for job in jobs(settings, conditions)}
    for job in jobs(held_out(settings), conditions):
        same = tuned.get(_state(job))
        if same is not None:
            raise SteerError(
                "overlap",
                f"held-out start {job.pair} is the start {same.pair} that trials are tuned on: expected starts that no trial "
                "sees; change `held_out` or `suites`",
            )


def _state(job: Job) -> tuple[object, ...]:
    """What the episode starts from: the official state itself, or what a layout is drawn by."""
    from sim.benchmark import find_task

    if job.layout != "official":
        return job.suite, job.task_id, job.layout, job.start, job.seed
    # By content: a state may stand in a suite twice, or in two.
    state = find_task(job.suite, job.task_id).initial_states[job.start]
    return (hashlib.sha256(np.ascontiguousarray(state).tobytes()).hexdigest(),)


def _claim(settings: TuneSettings) -> Claim:
    if settings.on is not None:
        return Claim(settings.on.removeprefix("-"), -1.0 if settings.on.startswith("-") else 1.0, "`on`")
    claim = claim_of(settings.name, {})
    if claim is None:
        raise SteerError(
            "no_claim",
            f"the name {settings.name!r} claims no metric: give `on`, one of {', '.join(METRICS)}, or with a - to lower it",
        )
    return claim
