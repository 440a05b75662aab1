"""Measures what directions and their random controls do to the actions of an inference, at recorded moments.

Invariants: every condition sees the same moments; all steering goes through the engine; a measurement is kept under the
content of what was written and the strength, so that nothing is measured twice, an interrupted run goes on, and a run
with more directions, strengths or controls adds to what is there. `score_summary` makes effects of it.

    offline effect of condition c at moment m = observable(c, m) - observable(unsteered, m)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, groupby
from pathlib import Path
from typing import Any

import numpy as np

from steer_runtime.directions.activations import Progress, capture
from steer_runtime.directions.direction import Axis, Direction
from steer_runtime.directions.finders.random import controls as random_controls
from steer_runtime.directions.finders.random import pair_controls
from steer_runtime.directions.observables import READINGS, read
from steer_runtime.directions.store import DirectionStore
from steer_runtime.errors import SteerError
from steer_runtime.moments import Moment
from steer_runtime.results import Results, results
from steer_runtime.steering.offline import OfflineSteering
from steer_runtime.types import Policy, Role

OFF = "off"
"""Key of the unsteered condition."""
_SCORED = "scored"
"""Name under which a direction is attached; one at a time, so names never clash."""
_NORM_DIGITS = 3
"""Dense directions whose norms agree in so many digits share controls: at most 0.5 % of the norm lies between."""


@dataclass(frozen=True)
class Condition:
    """One direction at one strength; direction None is the unsteered policy. key: of its measurement."""

    direction: Direction | None
    strength: float

    @property
    def key(self) -> str:
        return OFF if self.direction is None else f"{content(self.direction)}@{self.strength!r}"


@dataclass(frozen=True)
class Plan:
    """What is measured. directions: those to score. controls: content of a direction -> its random controls.

    strengths: in [0, 1], ascending; 0 must do nothing, and is there to show it.
    """

    directions: tuple[Direction, ...]
    controls: Mapping[str, tuple[Direction, ...]]
    strengths: tuple[float, ...]

    @property
    def conditions(self) -> list[Condition]:
        """Unsteered first, then each direction followed by its controls; each content once."""
        written = {
            content(d): d for one in self.directions for d in (one, *self.controls[content(one)])
        }  # a dict keeps the first place of each
        return [Condition(None, 0.0), *(Condition(d, s) for d in written.values() for s in self.strengths)]


def content(direction: Direction) -> str:
    """16 hex digits of what a direction writes: tower, operation, span and tensors, whatever it is called."""
    digest = hashlib.sha256(f"{direction.tower} {direction.op} {','.join(sorted(direction.span))}".encode())
    for name, array in sorted(direction.tensors().items()):
        digest.update(f"{name}:{array.dtype.str}:{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def choose(store: DirectionStore, names: Sequence[str], policy: Policy) -> tuple[list[Direction], list[Axis]]:
    """Directions and axes of a store by name, or all of them for no names; an axis brings both its ends.

    Each direction comes once; of all of them, those of other models are left out, and a named one of another model is
    refused. Raises SteerError: 'other_model', 'unknown_direction', 'no_directions', and what the store refuses.
    """
    axes = store.load_axes()
    if not names:
        found = [d for d in store.load_all() if d.model_hash == policy.model_hash]
        if not found:
            raise SteerError(
                "no_directions",
                f"{store.root} holds no direction of {policy.name}: make some with `steer directions make`, or give --store",
            )
    else:
        ends = {axis.name: (axis.negative, axis.positive) for axis in axes}
        found = [store.load(ref, model_hash=policy.model_hash) for name in names for ref in ends.get(name, (name,))]
    unique = list({d.hash: d for d in found}.values())
    for direction in unique:
        tower = policy.towers.get(direction.tower)
        if tower is None:
            raise SteerError(
                "unknown_tower",
                f"direction {direction.id!r} is for tower {direction.tower!r}, not one of {policy.name}",
            )
        direction.require_fits(tower, policy.model_hash)
    known = {d.name for d in unique}
    return unique, [axis for axis in axes if {axis.negative, axis.positive} <= known]


Watched = Mapping[tuple[str, frozenset[Role]], Mapping[int, np.ndarray]]
"""(tower, span) -> residual site -> float32 [moments, d_model]."""


def watch(policy: Policy, directions: Sequence[Direction], moments: Sequence[Moment], progress: Progress) -> Watched:
    """What the policy holds at the moments where dense directions write, for controls that are differences of it; without the
    sites where it holds the same at all of them (the words of one instruction, as they enter).

    Raises SteerError as `capture`.
    """
    sites: dict[tuple[str, frozenset[Role]], set[int]] = {}
    for direction in directions:
        if direction.dense is not None:
            sites.setdefault((direction.tower, direction.span), set()).update(direction.dense)
    out = {}
    for (tower, span), wanted in sites.items():
        inside = span & policy.towers[tower].roles
        rows = capture(policy, tower, moments, sites=sorted(wanted), span=inside, progress=progress).residual
        out[(tower, span)] = {site: h for site, h in rows.items() if len(np.unique(h, axis=0)) > 1}
    return out


def has_pairs(direction: Direction, watched: Watched) -> bool:
    """Whether differences of what was watched can stand beside a direction: one of vectors, where moments differ."""
    return direction.dense is not None and set(direction.dense) <= set(watched[(direction.tower, direction.span)])


def plan(
    policy: Policy,
    directions: Sequence[Direction],
    strengths: Sequence[float],
    random: int,
    seed: int,
    *,
    watched: Watched | None = None,
) -> Plan:
    """The measurements of an experiment with `random` random controls a direction.

    watched: controls are differences of it (`pair_controls`) instead of Gaussian vectors, where `has_pairs`.
    Raises SteerError: 'bad_strength', 'bad_count', 'no_directions'.
    """
    strange = [s for s in strengths if not (np.isfinite(s) and 0 <= s <= 1)]
    if strange or not strengths or max(strengths) == 0:
        raise SteerError(
            "bad_strength",
            f"strengths {', '.join(f'{s:g}' for s in strengths) or 'none'} are not usable: expected numbers in 0 to 1, at "
            "least one above 0",
        )
    if not directions:
        raise SteerError("no_directions", "no direction was given to score: name some, or give --all")
    shared: dict[str, tuple[Direction, ...]] = {}
    for direction in directions:
        like = _stand_in(direction)
        tower = policy.towers[direction.tower]
        if watched is not None and has_pairs(like, watched):
            drawn = pair_controls(like, watched[(direction.tower, direction.span)], random, seed)
        else:
            drawn = random_controls(like, tower, random, seed)
        shared[content(direction)] = tuple(drawn)
    return Plan(tuple(directions), shared, tuple(sorted(set(map(float, strengths)))))


def _stand_in(direction: Direction) -> Direction:
    """What controls are drawn for. A dense draw depends on the sites and norms alone, so directions of equal ones share it."""
    if direction.dense is None:
        return direction
    vectors = {}
    for site, vector in direction.dense.items():
        vectors[site] = np.zeros_like(vector)
        norm = float(np.linalg.norm(vector.astype(np.float64)))
        vectors[site][0] = float(f"{norm:.{_NORM_DIGITS}g}")
    return replace(direction, dense=vectors)


def spread(moments: Sequence[Moment], wanted: int | None) -> list[int]:
    """Indices of `wanted` moments in even steps through the file, all for None. Raises SteerError('bad_count')."""
    if wanted is None:
        return list(range(len(moments)))
    if not 1 <= wanted <= len(moments):
        raise SteerError(
            "bad_count", f"{wanted} moments were asked for: expected 1 to {len(moments)}, as many as the file holds"
        )
    return [int(i) for i in np.floor((np.arange(wanted) + 0.5) * len(moments) / wanted)]


@contextmanager
def measurements(path: Path, policy: Policy, moments_file: Path, used: Sequence[int]) -> Iterator[Results]:
    """The file of measurements of a policy at the moments `used` of a file. Raises as `results`."""
    configuration = {
        "command": "directions score",
        "policy": {"name": policy.name, "model_hash": policy.model_hash, "trained": bool(policy.trained)},
        "moments": {"sha256": hashlib.sha256(moments_file.read_bytes()).hexdigest(), "used": list(used)},
    }
    with results(path, configuration) as opened:
        yield opened


def measure(
    policy: Policy,
    moments: Sequence[Moment],
    wanted: Plan,
    done: Results,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Run every condition that `done` lacks, one line each: both readings and the dose by moment, values written.

    A condition under which the policy refuses to act (logits that are not finite) is kept as refused, with the sentence.
    Raises SteerError as `Policy.infer` for the unsteered policy, and what the engine refuses.
    """
    missing = [c for c in wanted.conditions if c.key not in done.rows]
    total = len(missing) * len(moments)
    inferences = count(1)

    def tick() -> None:
        if progress is not None:
            progress(next(inferences), total)

    for _, group in groupby(missing, key=lambda c: None if c.direction is None else content(c.direction)):
        conditions = list(group)
        direction = conditions[0].direction
        # Measuring is how the range that a direction is allowed in is found, so that range does not bound it.
        attached = [] if direction is None else [replace(direction, name=_SCORED, max_strength=1.0)]
        with OfflineSteering(policy, attached, measure_dose=True) as steering:
            for condition in conditions:
                steering.set({} if direction is None else {_SCORED: condition.strength})
                row: dict[str, Any] = {"strength": condition.strength}
                try:
                    row |= _at_moments(policy, steering, moments, tick)
                except SteerError as refused:
                    if refused.code != "not_finite" or direction is None:
                        raise
                    row["refused"] = refused.sentence
                done.add(condition.key, row)


def _at_moments(
    policy: Policy, steering: OfflineSteering, moments: Sequence[Moment], on_moment: Callable[[], None]
) -> dict[str, Any]:
    """Columns by moment: reading -> observable -> values; dose: largest of all sites; writes: values written in all."""
    columns: dict[str, dict[str, list[float]]] = {reading: {} for reading in READINGS}
    doses, writes = [], 0
    for moment in moments:
        values, record = steering.run(lambda moment=moment: read(policy, moment))  # type: ignore[misc]
        if steering.engine.state().alarms:
            raise SteerError("hooks_silent", f"steering failed: {steering.engine.state().alarms[-1]}")
        for reading, told in values.items():
            for name, value in told.items():
                columns[reading].setdefault(name, []).append(value)
        doses.append(max((site.dose or 0.0 for site in record.sites), default=0.0))
        writes += sum(site.writes for site in record.sites)
        on_moment()
    return {**columns, "dose": doses, "writes": writes}
