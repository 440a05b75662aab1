"""Conditions of a study, with the very directions that they write.

Invariant: a condition is complete: a worker on another machine needs no store, and two conditions with one label are
refused. Every direction acts at strengths up to 1: finding the range it is allowed in is what a study is for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sim.evaluation.study.kinds import CONTROLS, Kind
from sim.evaluation.study.settings import (
    Opposite,
    Prompt,
    Random,
    RandomWords,
    Scale,
    Steered,
    StudySettings,
    Unsteered,
    Zero,
)
from steer_runtime.directions.direction import Direction
from steer_runtime.directions.finders.random import controls, word_controls
from steer_runtime.directions.store import DirectionStore
from steer_runtime.directions.token_basis import TokenBasis
from steer_runtime.errors import SteerError
from steer_runtime.types import Policy

STEERED = "steered"
"""Name under which the one direction of an episode is attached."""
_OTHER_END = 1_000_003
"""Added to the seed of draws for the negative end of an axis: a dense draw would else be that of the positive one."""


@dataclass(frozen=True)
class Written:
    """What is written, ready to attach: `direction` at `strength` in [0, 1], sign: of the strength that people read.

    ramp_s: seconds of the episode over which the strength grows from 0, in a straight line; it changes at inferences.
    """

    direction: Direction
    id: str
    strength: float
    sign: float
    ramp_s: float = 0.0

    def strength_at(self, seconds: float) -> float:
        """The strength at a moment of the episode."""
        return self.strength if seconds >= self.ramp_s else self.strength * seconds / self.ramp_s


@dataclass(frozen=True)
class Condition:
    """label: unique. direction: the name it is about. strength: as `records.EPISODES` has it. starts: of each task, None
    for all; tasks: likewise. written: None where no hooks are attached. wording: has {} where the instruction goes."""

    label: str
    kind: Kind
    direction: str | None = None
    strength: float | None = None
    draw: int | None = None
    starts: int | None = None
    tasks: tuple[int, ...] | None = None
    written: Written | None = None
    wording: str = "{}"
    factor: float = 1.0

    @property
    def facts(self) -> dict[str, Any]:
        """What decides it, as JSON."""
        return {
            "label": self.label, "kind": self.kind, "direction": self.direction, "strength": self.strength,
            "draw": self.draw, "written": None if self.written is None else self.written.id,
            "wording": self.wording, "factor": self.factor,
            **({"ramp_s": self.written.ramp_s} if self.written is not None and self.written.ramp_s else {}),
        }  # fmt: skip


def resolve(settings: StudySettings, policy: Policy) -> tuple[Condition, ...]:
    """All conditions, in the order of the file.

    Raises SteerError: 'no_store', 'bad_strength', 'bad_condition', 'ambiguous_condition', and as the store and `controls`.
    """
    finder = Finder(settings, policy)
    out: list[Condition] = []
    for one in settings.conditions:
        out += _expand(one, finder)
    twice = [label for label, count in Counter(c.label for c in out).items() if count > 1]
    if twice:
        raise SteerError("ambiguous_condition", f"condition {twice[0]!r} is given twice: drop one of them")
    return tuple(out)


def directions_of(conditions: tuple[Condition, ...]) -> dict[str, dict[str, Any]]:
    """id -> card of everything that is written, but random draws, which their seed and parent decide."""
    written = {
        c.written.id: c.written.direction for c in conditions if c.written is not None and c.kind not in CONTROLS
    }
    return {id: direction.card() for id, direction in written.items()}


@dataclass(frozen=True)
class Ends:
    """A direction, or the two ends of an axis."""

    positive: Direction
    negative: Direction | None

    def at(self, name: str, strength: float) -> Direction:
        if strength > 0:
            return self.positive
        if self.negative is None:
            raise SteerError(
                "bad_strength",
                f"strength {strength:g} of direction {name!r} is below 0: expected numbers in (0, 1]; give an axis, or the "
                "condition `opposite`",
            )
        return self.negative


class Finder:
    """Directions and axes of a study's store that fit a policy. Raises SteerError('no_store'), and as the store does."""

    def __init__(self, settings: StudySettings, policy: Policy) -> None:
        self.policy = policy
        self._store = None if settings.store is None else DirectionStore(settings.store)
        self._found: dict[str, Ends] = {}
        self._drawn: dict[tuple[Random, str, int], list[Direction]] = {}
        self._basis: TokenBasis | None = None

    def ends(self, name: str) -> Ends:
        if self._store is None:
            raise SteerError("no_store", f"the study names {name!r} but no `store`: give the folder of its directions")
        if name not in self._found:
            if self._store.has_axis(name):
                axis = self._store.load_axis(name)
                self._found[name] = Ends(self._load(axis.positive), self._load(axis.negative))
            else:
                self._found[name] = Ends(self._load(name), None)
        return self._found[name]

    def draws(self, asked: Random, direction: Direction, seed: int) -> list[Direction]:
        """What a control draws beside a direction. Raises SteerError as `controls` and `word_controls`."""
        key = (asked, direction.id, seed)
        if key not in self._drawn:
            if isinstance(asked, RandomWords):
                self._basis = self._basis or TokenBasis.of(self.policy)
                self._drawn[key] = word_controls(direction, self._basis, asked.words, asked.draws, seed)
            else:
                self._drawn[key] = controls(direction, self.policy.towers[direction.tower], asked.draws, seed)
        return self._drawn[key]

    def _load(self, ref: str) -> Direction:
        assert self._store is not None
        found = self._store.load(ref, model_hash=self.policy.model_hash)
        tower = self.policy.towers.get(found.tower)
        if tower is None:
            raise SteerError(
                "unknown_tower", f"direction {found.id!r} is for tower {found.tower!r}, not one of {self.policy.name}"
            )
        found.require_fits(tower, self.policy.model_hash)
        found.require_reaches(tower)
        return found


def _expand(one: Any, finder: Finder) -> Iterator[Condition]:
    for condition in _every(one, finder):
        yield replace(condition, tasks=one.tasks)


def _every(one: Any, finder: Finder) -> Iterator[Condition]:
    match one:
        case Unsteered():
            yield Condition("unsteered", "unsteered", starts=one.starts)
        case Zero():
            for name in one.directions:
                written = _written(finder.ends(name).positive, 0.0)
                yield Condition(f"zero:{name}", "zero", name, 0.0, starts=one.starts, written=written)
        case Steered():
            for s in one.strengths:
                written = _written(finder.ends(one.name).at(one.name, s), s)
                yield Condition(
                    _label("direction", one.name, s), "direction", one.name, s, None, one.starts, written=written
                )
        case Random():
            for draw in range(one.draws):
                for s in one.strengths:
                    end = finder.ends(one.like).at(one.like, s)
                    drawn = finder.draws(one, end, one.seed + (_OTHER_END if s < 0 else 0))[draw]
                    label = _label(one.kind, f"{one.like}#{draw}", s)
                    yield Condition(label, one.kind, one.like, s, draw, one.starts, written=_written(drawn, s))
        case Opposite():
            for s in one.strengths:
                written = _written(_opposite(one, finder, s), -s)
                yield Condition(
                    _label("opposite", one.of, -s), "opposite", one.of, -s, None, one.starts, written=written
                )
        case Prompt():
            yield Condition(f"prompt:{one.wording}", "prompt", starts=one.starts, wording=one.wording)
        case Scale():
            for factor in one.factors:
                yield Condition(f"scale:{factor:g}", "scale", None, factor, starts=one.starts, factor=factor)


def _label(kind: str, name: str, strength: float) -> str:
    return f"{kind}:{name}@{strength:+g}"


def _written(direction: Direction, signed: float) -> Written:
    attached = replace(direction, name=STEERED, max_strength=1.0)
    return Written(attached, direction.id, abs(signed), -1.0 if signed < 0 else 1.0)


def _opposite(one: Opposite, finder: Finder, strength: float) -> Direction:
    ends = finder.ends(one.of)
    if one.by is not None:
        other = finder.ends(one.by)
        return other.at(one.by, strength)
    if ends.negative is not None:
        return ends.at(one.of, -strength)
    direction = ends.at(one.of, strength)
    facts = {**direction.provenance, "negative_of": direction.id}
    if direction.dense is not None:
        turned = {site: -vector for site, vector in direction.dense.items()}
        return replace(direction, dense=turned, proven=False, calibrated=None, provenance=facts)
    assert direction.neurons is not None
    if direction.op not in ("add", "override"):
        raise SteerError(
            "bad_condition",
            f"direction {one.of!r} has operation {direction.op!r}, which has no negative: name its opposite with `by`",
        )
    neurons = replace(direction.neurons, alpha=-direction.neurons.alpha)
    return replace(direction, neurons=neurons, proven=False, calibrated=None, provenance=facts)
