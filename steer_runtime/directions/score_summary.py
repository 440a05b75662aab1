"""From measurements to what a direction does: effects with intervals, z-scores, damage, and which finder does it best.

Rules, the same for directions and their random controls:

    effect e_o      mean over moments of observable o steered minus unsteered; 95 % interval: bootstrap of whole episodes
    z_o             (e_o - mean of the controls' e_o) / standard deviation of the controls' e_o, at the same strength;
                    none where no control moved: where that deviation is below a tenth of o's resolution
    scale s_o       standard deviation of o over the unsteered moments, at least its resolution
    on-axis         sign * e_on / s_on, on the observable that the direction claims
    damage          sqrt(mean over off-axis observables o, of mean over moments, of ((o steered - o unsteered) / s_o)^2):
                    moved one way here and the other way there does not cancel
    ratio           on-axis / max(damage, DAMAGE_FLOOR), at the strength where it is largest; each control gets its own
                    best strength as well

Invariant: a number that cannot be had (no claim, no control, no interval of one episode) is None with a reason, never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from steer_runtime.directions.direction import Axis, Direction
from steer_runtime.directions.observables import Claim, Reading, claim_of, derived, observable, off_axis
from steer_runtime.directions.score import OFF, Condition, Plan, content
from steer_runtime.errors import SteerError
from steer_runtime.moments import Moment

DRAWS = 2000
"""Resamples of episodes behind an interval."""
DAMAGE_FLOOR = 0.05
"""In standard deviations: below it a direction does next to nothing off its axis, and dividing by less would praise noise."""
POOLED = "random controls"
"""How the controls of an axis are called among the finders."""
_STILL = 0.1
"""Of an observable's resolution: what changes less has not moved."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Effect:
    """One observable at one strength, in its own unit. low, high: 95 % interval, None for moments of one episode.

    standardised: value / scale. controls: effects of the random controls. z: None where no control moved, or there are
    fewer than two. beaten: share of controls whose effect is smaller in size. moved: controls with an effect above a tenth of
    the observable's resolution.
    """

    value: float
    low: float | None
    high: float | None
    standardised: float
    controls: tuple[float, ...]
    z: float | None
    beaten: float | None
    moved: int

    @property
    def mean(self) -> float | None:
        """Of the controls."""
        return float(np.mean(self.controls)) if self.controls else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of the controls."""
        return float(np.std(self.controls, ddof=1)) if len(self.controls) > 1 else None


@dataclass(frozen=True)
class Point:
    """A direction at one strength. dose: relative size of the change of the residual stream, largest of all sites, mean
    over moments; control_dose: mean of the controls'. writes: values written.

    on: on-axis standardised effect with the claimed sign; z: on-axis, with that sign; beaten: share of controls that move
    less in the claimed direction. damage, ratio: as above. All None without a claim.
    controls_damage, controls_on: of each control.
    """

    strength: float
    dose: float
    control_dose: float | None
    writes: int
    effects: Mapping[str, Effect]
    on: float | None = None
    z: float | None = None
    beaten: float | None = None
    damage: float | None = None
    ratio: float | None = None
    controls_on: tuple[float, ...] = ()
    controls_damage: tuple[float, ...] = ()


@dataclass(frozen=True)
class Score:
    """What one direction does. best: index of the point of the largest ratio. monotone: no strength undoes what a smaller
    one did on the axis, as far as the observable's resolution tells. controls_ratio: best ratio of each control. notes: what should be known, in sentences."""

    direction: Direction
    claim: Claim | None
    axes: tuple[str, ...]
    points: tuple[Point, ...]
    best: int | None
    monotone: bool | None
    controls_ratio: tuple[float, ...]
    notes: tuple[str, ...]

    @property
    def finder(self) -> str:
        return str(self.direction.provenance.get("finder", "unknown"))

    @property
    def at_best(self) -> Point | None:
        return None if self.best is None else self.points[self.best]

    @property
    def ratio_beaten(self) -> float | None:
        """Share of controls whose own best ratio is smaller."""
        point = self.at_best
        if point is None or point.ratio is None or not self.controls_ratio:
            return None
        return float(np.mean([r < point.ratio for r in self.controls_ratio]))


@dataclass(frozen=True)
class FinderRow:
    """Directions of one axis by one finder in one tower, each at its best strength; means over directions. POOLED stands for
    the controls.

    beaten: controls whose on-axis effect is smaller; ratio_beaten: whose ratio is. works: of how many the on-axis effect is
    larger than every control's there.
    """

    axis: str
    tower: str
    finder: str
    directions: int
    on: float
    z: float | None
    damage: float
    ratio: float
    beaten: float | None
    ratio_beaten: float | None
    works: int


@dataclass(frozen=True)
class Summary:
    """One reading of all measurements. unsteered: observable -> (mean, scale, moments it is told at)."""

    reading: Reading
    unsteered: Mapping[str, tuple[float, float, int]]
    scores: tuple[Score, ...]
    finders: tuple[FinderRow, ...]


def summarise(
    rows: Mapping[str, Row],
    plan: Plan,
    moments: Sequence[Moment],
    reading: Reading,
    *,
    axes: Iterable[Axis] = (),
    on: Claim | None = None,
    seed: int = 0,
) -> Summary:
    """The scores of a plan's directions, best ratio first. rows: key -> measurement, all of the plan's.

    on: the claim of every direction, None for each its own. Raises SteerError: 'not_told' for a claim on an observable
    that no moment tells.
    """
    sheet = _Sheet(rows, moments, reading, seed)
    if on is not None and on.observable not in sheet.scale:
        told = ", ".join(sheet.scale)
        raise SteerError(
            "not_told",
            f"none of the {len(moments)} moments tells {on.observable!r} of this policy ({reading}): expected one of {told}; "
            "give other moments or another --on",
        )
    known = tuple(axes)
    scores = [_score(sheet, plan, d, on or claim_of(d, known), known) for d in plan.directions]

    def rank(score: Score) -> tuple[bool, float]:
        ratio = None if score.at_best is None else score.at_best.ratio
        return ratio is None, -(ratio or 0.0)

    ranked = tuple(sorted(scores, key=rank))
    return Summary(reading, sheet.unsteered, ranked, tuple(_by_finder(ranked)))


class _Sheet:
    """Paired differences to the unsteered policy, and how they are averaged and scaled."""

    def __init__(self, rows: Mapping[str, Row], moments: Sequence[Moment], reading: Reading, seed: int) -> None:
        self._rows, self._reading = rows, reading
        self._phases = [m.phase for m in moments]
        off = rows[OFF][reading]
        self._off = {name: np.asarray(values, np.float64) for name, values in off.items()}
        if not self._off:
            raise SteerError("not_told", f"this policy has no {reading} action: give --reading executed")
        self._still = derived(self._off, self._off, self._phases)
        told = {name: v[np.isfinite(v)] for name, v in self._still.items()}
        self.scale = {n: max(float(v.std()), observable(n).resolution) for n, v in told.items() if len(v)}
        # Sideways is 0 without steering; it is a length of the same motion as the three translations.
        self.scale["sideways"] = float(np.sqrt(np.mean([self.scale[n] ** 2 for n in ("dx", "dy", "dz")])))
        self.unsteered = {n: (float(v.mean()), self.scale[n], len(v)) for n, v in told.items() if len(v)}
        # A moment of no named episode stands for itself.
        named = [m.episode or f"moment {i}" for i, m in enumerate(moments)]
        _, self._episode = np.unique(named, return_inverse=True)
        episodes = int(self._episode.max()) + 1
        rng = np.random.default_rng(seed)
        self._draws = rng.multinomial(episodes, np.full(episodes, 1 / episodes), DRAWS) if episodes > 1 else None

    def row(self, condition: Condition) -> Row | None:
        """Its measurement, None where the policy refused to act."""
        row = self._rows[condition.key]
        return None if "refused" in row else row

    def differences(self, row: Row) -> dict[str, np.ndarray]:
        """Observable -> steered minus unsteered, float64 [moments], NaN where not told."""
        steered = derived(row[self._reading], self._off, self._phases)
        return {name: steered[name] - self._still[name] for name in self.scale}

    def interval(self, difference: np.ndarray) -> tuple[float | None, float | None]:
        """95 % percentile bootstrap of the mean, whole episodes resampled; None for a single episode."""
        if self._draws is None:
            return None, None
        told = np.isfinite(difference)
        width = self._draws.shape[1]
        sums = np.bincount(self._episode[told], difference[told], minlength=width)
        counts = np.bincount(self._episode[told], minlength=width)
        if (counts > 0).sum() < 2:
            return None, None
        drawn = self._draws @ counts
        means = (self._draws @ sums)[drawn > 0] / drawn[drawn > 0]
        low, high = np.quantile(means, [0.025, 0.975])
        return float(low), float(high)

    def damage(self, differences: Mapping[str, np.ndarray], claimed: str) -> float:
        names = [o for o in off_axis(claimed) if o in self.scale]
        squares = [float(np.nanmean((differences[o] / self.scale[o]) ** 2)) for o in names]
        return float(np.sqrt(np.mean(squares)))


def _score(sheet: _Sheet, plan: Plan, direction: Direction, claim: Claim | None, axes: Sequence[Axis]) -> Score:
    notes = []
    if claim is None:
        notes.append("its name claims nothing known: give --on to say what it should move")
    elif claim.observable not in sheet.scale:
        notes.append(f"it claims {claim.observable}, which no moment tells")
        claim = None
    controls = plan.controls[content(direction)]
    points, refused = [], []
    for strength in plan.strengths:
        row = sheet.row(Condition(direction, strength))
        if row is None:
            refused.append(f"{strength:g}")
            continue
        others = [sheet.row(Condition(c, strength)) for c in controls]
        kept = [r for r in others if r is not None]
        if len(kept) < len(others):
            notes.append(f"at {strength:g} the policy refused to act under {len(others) - len(kept)} controls")
        points.append(_point(sheet, strength, row, kept, claim))
    if refused:
        notes.append(f"at strength {', '.join(refused)} the policy refused to act: its logits were not finite")
    if points and not any(p.writes for p in points):
        span = ", ".join(sorted(direction.span))
        notes.append(f"it wrote nothing: the policy has no tokens in the span ({span}), or the strength was 0")
    if points and controls and not any(e.moved for p in points for e in p.effects.values()):
        notes.append("no control moved anything, so there are no z-scores")
    if direction.max_strength < 1 and points and points[-1].strength > direction.max_strength:
        notes.append(f"strengths above its max_strength {direction.max_strength:g} are measured, not allowed live")
    mine = tuple(a.name for a in axes if direction.name in (a.negative, a.positive))
    ratios = [(p.ratio, i) for i, p in enumerate(points) if p.ratio is not None and p.strength > 0]
    best = max(ratios)[1] if ratios else None
    curve = [0.0, *(p.on for p in points if p.on is not None and p.strength > 0)]
    monotone = None
    if claim is not None and len(curve) > 1:
        least = _STILL * observable(claim.observable).resolution / sheet.scale[claim.observable]
        monotone = curve[-1] > least and all(b >= a - least for a, b in pairwise(curve))
    tried = [p for p in points if p.strength > 0 and p.controls_on]
    count = min((len(p.controls_on) for p in tried), default=0)
    own = [max(_ratio(p.controls_on[i], p.controls_damage[i]) for p in tried) for i in range(count)]
    return Score(direction, claim, mine, tuple(points), best, monotone, tuple(own), tuple(notes))


def _point(sheet: _Sheet, strength: float, row: Row, controls: Sequence[Row], claim: Claim | None) -> Point:
    mine = sheet.differences(row)
    theirs = [sheet.differences(r) for r in controls]
    effects = {name: _effect(sheet, name, mine, theirs) for name in sheet.scale}
    doses = [float(np.mean(r["dose"])) for r in controls]
    facts: dict[str, Any] = {
        "strength": strength,
        "dose": float(np.mean(row["dose"])),
        "control_dose": float(np.mean(doses)) if doses else None,
        "writes": int(row["writes"]),
        "effects": effects,
    }
    if claim is None:
        return Point(**facts)
    effect, scale = effects[claim.observable], sheet.scale[claim.observable]
    on = claim.sign * effect.standardised + 0.0  # no negative zero
    on_controls = tuple(claim.sign * c / scale for c in effect.controls)
    damage = sheet.damage(mine, claim.observable)
    return Point(
        **facts,
        on=on,
        z=None if effect.z is None else claim.sign * effect.z,
        beaten=float(np.mean([c < on for c in on_controls])) if on_controls else None,
        damage=damage,
        ratio=_ratio(on, damage),
        controls_on=on_controls,
        controls_damage=tuple(sheet.damage(d, claim.observable) for d in theirs),
    )


def _effect(
    sheet: _Sheet, name: str, mine: Mapping[str, np.ndarray], theirs: Sequence[Mapping[str, np.ndarray]]
) -> Effect:
    value = float(np.nanmean(mine[name]))
    low, high = sheet.interval(mine[name])
    controls = tuple(float(np.nanmean(d[name])) for d in theirs)
    spread = float(np.std(controls, ddof=1)) if len(controls) > 1 else 0.0
    # Where next to no control moves (a policy that acts by the words it says), their deviation is no measure.
    least = _STILL * observable(name).resolution
    z = (value - float(np.mean(controls))) / spread if spread > least else None
    beaten = float(np.mean([abs(c) < abs(value) for c in controls])) if controls else None
    return Effect(
        value, low, high, value / sheet.scale[name], controls, z, beaten, sum(abs(c) > least for c in controls)
    )


def _ratio(on: float, damage: float) -> float:
    return on / max(damage, DAMAGE_FLOOR)


def _by_finder(scores: Sequence[Score]) -> list[FinderRow]:
    """Best ratio first within an axis; the controls of its directions stand among the finders, pooled by tower."""
    claimed = [s for s in scores if s.claim is not None and s.at_best is not None]
    rows = []
    for axis in sorted({s.claim.axis for s in claimed if s.claim is not None}):
        of_axis: list[FinderRow] = []
        for tower in sorted({s.direction.tower for s in claimed}):
            mine = [s for s in claimed if s.claim is not None and (s.claim.axis, s.direction.tower) == (axis, tower)]
            of_axis += [
                _finder_row(axis, tower, f, [s for s in mine if s.finder == f])
                for f in sorted({s.finder for s in mine})
            ]
            pooled = _pooled_row(axis, tower, mine)
            of_axis += [pooled] if pooled else []
        rows += sorted(of_axis, key=lambda r: -r.ratio)
    return rows


def _finder_row(axis: str, tower: str, finder: str, scores: Sequence[Score]) -> FinderRow:
    points = [p for s in scores if (p := s.at_best) is not None]

    def mean(value: Callable[[Point], float | None]) -> float | None:
        known = [v for p in points if (v := value(p)) is not None]
        return float(np.mean(known)) if known else None

    shares = [share for s in scores if (share := s.ratio_beaten) is not None]
    return FinderRow(
        axis,
        tower,
        finder,
        len(points),
        on=mean(lambda p: p.on) or 0.0,
        z=mean(lambda p: p.z),
        damage=mean(lambda p: p.damage) or 0.0,
        ratio=mean(lambda p: p.ratio) or 0.0,
        beaten=mean(lambda p: p.beaten),
        ratio_beaten=float(np.mean(shares)) if shares else None,
        works=sum(p.beaten == 1.0 for p in points),
    )


def _pooled_row(axis: str, tower: str, scores: Sequence[Score]) -> FinderRow | None:
    """Every control at its own best strength."""
    picked: list[tuple[float, float, float]] = []
    for score in scores:
        tried = [p for p in score.points if p.strength > 0 and p.controls_on]
        for i in range(len(score.controls_ratio)):
            best = max(tried, key=lambda p, i=i: _ratio(p.controls_on[i], p.controls_damage[i]))  # type: ignore[misc]
            on, damage = best.controls_on[i], best.controls_damage[i]
            picked.append((on, damage, _ratio(on, damage)))
    if not picked:
        return None
    on, damage, ratio = np.mean(picked, axis=0)
    return FinderRow(axis, tower, POOLED, len(picked), float(on), None, float(damage), float(ratio), None, None, 0)
