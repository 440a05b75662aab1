"""Rules for success: shares with intervals, paired comparisons of yes and no, and non-inferiority.

Invariant: only scored episodes enter; an errored or refused trial is counted by `coverage`, never as a failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sim import intervals
from sim.evaluation.analysis.estimate import Estimate, PValue, count
from sim.evaluation.analysis.paired import cluster_bootstrap
from steer_runtime.errors import SteerError

MARGIN = 0.10
"""Largest loss of success, as a share, that still counts as none."""

Held = Literal["held", "lost", "undecided"]


@dataclass(frozen=True)
class Coverage:
    """Planned trials by how they ended. missing: planned and not yet run."""

    planned: int
    scored: int
    errored: int
    refused: int

    @property
    def missing(self) -> int:
        return self.planned - self.scored - self.errored - self.refused

    @property
    def share(self) -> float | None:
        """scored / planned: why, because a study that lost its hard episodes to errors looks better than it is."""
        return self.scored / self.planned if self.planned else None


@dataclass(frozen=True)
class NonInferiority:
    """difference: success steered minus unsteered with the interval of the rule. verdict: see `non_inferiority`."""

    difference: Estimate
    margin: float
    verdict: Held


def wilson(hits: int, n: int) -> Estimate:
    """hits / n with the interval of sim.intervals. Raises SteerError('bad_count')."""
    if not 0 <= hits <= n:
        raise SteerError("bad_count", f"{hits} of {n} episodes cannot have succeeded")
    if n == 0:
        return Estimate(None, note="no scored episode")
    low, high = intervals.wilson(hits, n)
    # The score interval contains hits / n; at the ends rounding may step past it.
    return Estimate(hits / n, min(float(low), hits / n), max(float(high), hits / n), n)


def mcnemar(steered: Sequence[bool], unsteered: Sequence[bool]) -> PValue:
    """McNemar's exact test (McNemar 1947): of pairs that ended differently, are as many won as lost? Binomial, p = 1/2.

    Why: episodes are paired by task, initial state and seed, and pairs that end alike say nothing of a change; why exact:
    there are few of the others.
    """
    from statsmodels.stats.contingency_tables import mcnemar as test

    won, lost = _discordant(steered, unsteered)
    n = len(steered)
    if won + lost == 0:
        return PValue(1.0 if n else None, "pair", 0, "every pair ended alike" if n else "no pair")
    return PValue(float(test([[0, won], [lost, 0]], exact=True).pvalue), "pair", won + lost)


def tango(won: int, lost: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Tango's score interval of (won - lost) / n (Tango 1998, Statistics in Medicine 17:891); no library here has it.

    Limits are where Z(d) = (won - lost - n d) / sqrt(n (2 q + d (1 - d))) is +-z, with q the share of lost pairs that is
    most likely at a difference d: q = (sqrt(B^2 - 8 n C) - B) / (4 n), B = -won - lost + (2 n - won + lost) d,
    C = -lost d (1 - d). Raises SteerError('bad_count').
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    if n < 1 or won < 0 or lost < 0 or won + lost > n:
        raise SteerError("bad_count", f"{won} won and {lost} lost of {n} pairs is impossible")
    z = float(norm.ppf(0.5 + level / 2))

    def score(d: float) -> float:
        b = -won - lost + (2 * n - won + lost) * d
        root = np.sqrt(max(0.0, b * b + 8 * n * lost * d * (1 - d)))
        variance = n * (2 * (root - b) / (4 * n) + d * (1 - d))
        away = won - lost - n * d
        if abs(away) < 1e-12 * n:
            return 0.0
        return float(away / np.sqrt(variance)) if variance > 0 else float(np.copysign(np.inf, away))

    here = (won - lost) / n

    def limit(end: float, target: float) -> float:
        # At the ends +-1 the score is infinite, or the estimate itself stands there.
        inner = end * (1 - 1e-12)
        if abs(here - end) < 1e-12 or abs(score(inner)) <= z:
            return end
        return float(brentq(lambda d: score(d) - target, *sorted((here, inner)), xtol=1e-10))

    return limit(-1.0, z), limit(1.0, -z)


def non_inferiority(
    steered: Sequence[bool], unsteered: Sequence[bool], tasks: Sequence[object], margin: float = MARGIN
) -> NonInferiority:
    """Is the loss of success less than `margin`? "held" when the interval of the difference lies above -margin, "lost" when
    it lies below, else "undecided": a test that finds no difference is no proof of none, so the burden is on the steering.

    Interval: two-sided 95 %, so the claim has a one-sided error of 2.5 %. Its ends are the wider ones of two: Tango's score
    interval (why: it has width when no pair ended differently, where Wald, exact conditional and bootstrap intervals claim
    certainty: with n such pairs its lower end is -3.84 / (n + 3.84), so that less than 35 pairs prove nothing), and the
    task-cluster bootstrap's (why: pairs of one task fail together, which Tango's does not know).
    """
    won, lost = _discordant(steered, unsteered)
    n = len(steered)
    if n == 0:
        return NonInferiority(Estimate(None, note="no pair"), margin, "undecided")
    low, high = tango(won, lost, n)
    resampled = cluster_bootstrap([float(a) - float(b) for a, b in zip(steered, unsteered, strict=True)], tasks)
    if resampled.low is not None and resampled.high is not None:
        low, high = min(low, resampled.low), max(high, resampled.high)
    verdict: Held = "held" if low > -margin else "lost" if high < -margin else "undecided"
    note = ""
    if verdict == "undecided" and low <= -margin and n < least_pairs(margin):
        note = f"{count(n, 'pair')} cannot show it: at least {least_pairs(margin)} are needed"
    return NonInferiority(Estimate((won - lost) / n, low, high, n, len(set(tasks)), note), margin, verdict)


def least_pairs(margin: float = MARGIN) -> int:
    """Pairs from which non-inferiority can be shown at all: z^2 (1 - margin) / margin, when all of them end alike."""
    from scipy.stats import norm

    z2 = float(norm.ppf(0.975)) ** 2
    return int(np.floor(z2 * (1 - margin) / margin)) + 1


def _discordant(steered: Sequence[bool], unsteered: Sequence[bool]) -> tuple[int, int]:
    """Pairs won (only the steered one succeeded) and lost (only the unsteered one)."""
    if len(steered) != len(unsteered):
        raise SteerError("unpaired", f"{len(steered)} steered and {len(unsteered)} unsteered episodes are no pairs")
    one, other = np.asarray(steered, dtype=bool), np.asarray(unsteered, dtype=bool)
    return int((one & ~other).sum()), int((other & ~one).sum())
