"""What a trial is worth, from its pairs; when it is hopeless; which trials no other one beats.

Invariant: a number here is a function of pairs (steered, unsteered) of the same start, in their fixed order; an episode
without an outcome makes no pair.

Limits while searching are limits on what was seen, not proofs: a handful of starts proves no non-inferiority (35 pairs are the
least, see `shares.least_pairs`). The proof is asked of the held-out starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sim.evaluation.analysis.metrics import METRICS, off_axis

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Seen:
    """An episode that ended. metrics: see `analysis.metrics`."""

    success: bool
    metrics: Mapping[str, float | None]


Pair = tuple[Seen, Seen]


@dataclass(frozen=True)
class Aim:
    """metric should move with this sign. margin, damage, least: see `settings.TuneSettings`. scales: metric -> standard
    deviation over the unsteered episodes, at least its floor."""

    metric: str
    sign: float
    margin: float
    damage: float | None
    least: int
    scales: Mapping[str, float]


@dataclass(frozen=True)
class Score:
    """effect: mean change of the metric in the wanted direction, in its unit, over `valued` pairs. loss: pairs lost minus won,
    as a share of all. damage: root mean square over the off-axis metrics of their mean change in standard deviations; aside: those
    changes, by metric."""

    effect: float | None
    success: float
    unsteered: float
    loss: float
    damage: float | None
    pairs: int
    valued: int
    aside: Mapping[str, float] = field(default_factory=dict)

    def violations(self, margin: float, damage: float | None) -> dict[str, float]:
        """Limit -> by how much it is passed; at most 0 where it is kept."""
        out = {"success": round(self.loss - margin, 12)}
        if damage is not None:
            out["damage"] = (self.damage or 0.0) - damage
        return out

    def keeps(self, margin: float, damage: float | None) -> bool:
        return all(value <= 0 for value in self.violations(margin, damage).values())


def score(pairs: Sequence[Pair], aim: Aim) -> Score:
    """Of at least one pair."""
    changes = _changes(pairs, aim.metric)
    aside = {}
    for name in off_axis(aim.metric):
        moved = _changes(pairs, name)
        if moved and name in aim.scales:
            aside[name] = float(np.mean(moved)) / aim.scales[name]
    n = len(pairs)
    won = sum(a.success and not b.success for a, b in pairs)
    lost = sum(b.success and not a.success for a, b in pairs)
    return Score(
        effect=aim.sign * float(np.mean(changes)) if changes else None,
        success=sum(a.success for a, _ in pairs) / n,
        unsteered=sum(b.success for _, b in pairs) / n,
        loss=(lost - won) / n,
        damage=float(np.sqrt(np.mean(np.square(list(aside.values()))))) if aside else None,
        pairs=n,
        valued=len(changes),
        aside=aside,
    )


def hopeless(pairs: Sequence[Pair], left: Sequence[Seen], aim: Aim) -> str | None:
    """Why a trial need not go on, or None. left: unsteered episodes of the starts that it has not run.

    success: even if it won every start left that the unsteered policy fails and lost none, its loss would pass the margin:
    exact, nothing is guessed. effect: after `least` pairs the upper end of a one-sided 95 % t interval of the mean change is
    below the metric's floor, a change that says nothing. Why not Optuna's pruners: they compare one number with other trials'
    and know neither limit; a trial far from the best one still shapes the front.
    """
    from scipy.stats import t

    n = len(pairs) + len(left)
    net = sum(int(a.success) - int(b.success) for a, b in pairs)
    best = net + sum(not seen.success for seen in left)
    if round(-best / n - aim.margin, 12) > 0:
        return "success is lost beyond the margin whatever comes"
    changes = aim.sign * np.array(_changes(pairs, aim.metric))
    if len(changes) >= aim.least:
        error = float(np.std(changes, ddof=1)) / len(changes) ** 0.5
        upper = float(changes.mean()) + float(t.ppf(CONFIDENCE, len(changes) - 1)) * error
        if upper < METRICS[aim.metric].floor:
            return "it has no effect"
    return None


def front(scores: Sequence[Score]) -> list[int]:
    """Numbers of those that no other one beats: larger effect, smaller loss, less damage. Without an effect: never there."""
    rows = [(i, (-s.effect, s.loss, s.damage or 0.0)) for i, s in enumerate(scores) if s.effect is not None]
    out = []
    for i, mine in rows:
        beaten = any(all(o <= m for o, m in zip(other, mine, strict=True)) and other != mine for _, other in rows)
        if not beaten:
            out.append(i)
    return out


def _changes(pairs: Sequence[Pair], metric: str) -> list[float]:
    """steered - unsteered where both have a value."""
    out = []
    for one, other in pairs:
        a, b = one.metrics.get(metric), other.metrics.get(metric)
        if a is not None and b is not None:
            out.append(a - b)
    return out
