"""Rules for paired differences clustered by task: test, interval, smallest effect that could be seen, control band.

Invariant: a difference is steered minus unsteered of one pair (same task, initial state and seed); tasks are the
clusters, because what is claimed is about tasks that were not run. Seeds are fixed: the same records give the same numbers.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sim.evaluation.analysis.estimate import Estimate, PValue, count, finite
from steer_runtime.errors import SteerError

RESAMPLES = 10_000
SEED = 20260
LEAST_TASKS = 8
"""Tasks from which flipping whole tasks can show something: the least p is 2 / 2^8 = 0.008, which Holm over six concepts
still passes at 5 %; with six tasks it is 0.03 and nothing would."""
FULL_BAND = 20
"""Draws from which a 95th percentile is more than the largest one."""
_CHUNK = 4_000_000
"""Resampled values held at once: 32 MB an array."""


@dataclass(frozen=True)
class Band:
    """What random directions do at one strength. size: 95th percentile of |effect|; directed: 95th percentile of the effects
    in the wanted direction, at least 0. rank: share of draws, this effect among them, that push at least as far that way,
    (1 + those) / (1 + draws). beyond: the effect goes the wanted way and farther than `size`. effects: those of the draws.
    kind: of the draws, as a study names it; empty where there are none."""

    size: float | None
    directed: float | None
    draws: int
    pairs: int
    rank: float | None
    beyond: bool | None
    note: str = ""
    effects: tuple[float, ...] = ()
    kind: str = ""


def sign_flip(differences: Sequence[float], tasks: Sequence[Hashable]) -> PValue:
    """Sign-flip permutation test of a zero mean, two-sided, by scipy's permutation_test of one paired sample.

    Statistic: the mean over pairs. Where there are LEAST_TASKS or more tasks the signs of whole tasks flip together, else
    those of pairs. Why flips: they need no normal distribution, only that without an effect a difference is as likely to be
    +x as -x, which pairing brings about. Why whole tasks: pairs of a task move together, and flipping each alone then calls
    noise an effect several times as often as 5 % (tests/evaluation/test_analysis_rules.py measures it); with fewer tasks a
    p value speaks of these tasks only, and the note says so. All flips are tried up to RESAMPLES, else as many random ones.
    """
    from scipy.stats import permutation_test

    values = finite(differences, "differences")
    groups = _groups(values, tasks)
    if len(values) < 2:
        return PValue(None, "pair", len(values), f"{count(len(values), 'pair')}: no test")
    by_task = len(groups) >= LEAST_TASKS
    summands = np.array([g.sum() for g in groups]) if by_task else values
    note = "" if by_task else f"only {count(len(groups), 'task')}: says nothing of other tasks"
    if not values.any():
        return PValue(1.0, "task" if by_task else "pair", len(summands), "every difference is zero")
    result = permutation_test(
        (summands,),
        lambda x, axis: np.sum(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(SEED),
    )
    return PValue(min(1.0, float(result.pvalue)), "task" if by_task else "pair", len(summands), note)


def cluster_bootstrap(differences: Sequence[float], tasks: Sequence[Hashable], resamples: int = RESAMPLES) -> Estimate:
    """Mean of differences with a 95 % percentile interval: tasks are resampled, then pairs inside each (Davison and
    Hinkley 1997, 3.8); scipy's bootstrap resamples one level, so the two levels are drawn here.

    Why: pairs of a task are alike, so resampling pairs alone makes intervals that are too narrow for other tasks; drawing
    inside as well widens the interval by the noise within tasks, which makes up for few clusters. One task: pairs only, and
    the note says so. One pair: no interval.
    """
    values = finite(differences, "differences")
    groups = _groups(values, tasks)
    n, k = len(values), len(groups)
    if n == 0:
        return Estimate(None, note="no pair")
    mean = float(values.mean())
    if n == 1:
        return Estimate(mean, n=1, tasks=1, note="one pair: no interval")
    sizes = np.array([len(g) for g in groups])
    padded = np.zeros((k, sizes.max()))
    for row, group in zip(padded, groups, strict=True):
        row[: len(group)] = group
    rng = np.random.default_rng(SEED)
    means: list[np.ndarray] = []
    batch = max(1, _CHUNK // padded.size)
    for start in range(0, resamples, batch):
        rows = min(batch, resamples - start)
        drawn = rng.integers(k, size=(rows, k))
        inside = (rng.random((rows, k, padded.shape[1])) * sizes[drawn][..., None]).astype(np.int64)
        kept = np.arange(padded.shape[1]) < sizes[drawn][..., None]
        picked = padded[drawn[..., None], inside] * kept
        means.append(picked.sum((1, 2)) / kept.sum((1, 2)))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    notes = []
    if k < LEAST_TASKS:
        notes.append(f"only {count(k, 'task')}: the interval says {'nothing' if k == 1 else 'little'} of other tasks")
    if np.ptp(values) == 0:
        notes.append("every pair differs by the same")
    return Estimate(mean, min(float(low), mean), max(float(high), mean), n, k, "; ".join(notes))


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm's step-down adjustment (Holm 1979), by statsmodels; None stays None and is no test.

    Why: of ten concepts tried one is "significant" at 5 % by chance; Holm bounds the chance of any false claim, needs no
    independence, and loses less power than Bonferroni.
    """
    from statsmodels.stats.multitest import multipletests

    known = {name: p for name, p in p_values.items() if p is not None}
    if not known:
        return dict(p_values)
    adjusted = multipletests(list(known.values()), method="holm")[1]
    return {**p_values, **dict(zip(known, (float(p) for p in adjusted), strict=True))}


def detectable(
    differences: Sequence[float], tasks: Sequence[Hashable], alpha: float = 0.05, power: float = 0.80
) -> Estimate:
    """Smallest mean difference that this design would find with probability `power` at a two-sided `alpha`.

    delta * s, delta: effect size at which a one-sample t test of as many samples as tasks (pairs where there is one task) has
    that power; s: standard error of the mean, clustered by task, times the root of that number. Why: a null result says
    something only beside the effect that it would have missed. From the observed spread: it tells what is needed next time,
    not whether the effect at hand is real.
    """
    values = finite(differences, "differences")
    groups = _groups(values, tasks) if len(set(tasks)) > 1 else [np.array([v]) for v in values]
    units, n = len(groups), len(values)
    if units < 2:
        return Estimate(None, n=n, tasks=len(set(tasks)), note=f"{count(n, 'pair')}: no spread to reckon with")
    residual = np.array([(g - values.mean()).sum() for g in groups])
    spread = float(np.sqrt((residual**2).sum() * units / (units - 1)) / n * np.sqrt(units))
    if spread <= 1e-12 * max(1.0, float(np.abs(values).max())):
        return Estimate(None, n=n, tasks=len(set(tasks)), note="all differences alike: no spread to reckon with")
    return Estimate(_effect_size(units, alpha, power) * spread, n=n, tasks=len(set(tasks)))


def _effect_size(units: int, alpha: float, power: float) -> float:
    """d at which P(|T| > t(1 - alpha/2)) = power, T noncentral t with units - 1 degrees of freedom and noncentrality
    d sqrt(units) (Cohen 1988, chapter 2). By bisection: statsmodels' solver stops far from it below five samples."""
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    freedom, root = units - 1, units**0.5
    edge = float(t.ppf(1 - alpha / 2, freedom))

    def short(size: float) -> float:
        return float(nct.sf(edge, freedom, size * root) + nct.sf(edge, freedom, -size * root)) - power

    high = 1.0
    while short(high) < 0:
        high *= 2
    return float(brentq(short, 0.0, high))


def control_band(effect: float | None, draws: Sequence[float], sign: float, pairs: int) -> Band:
    """An effect beside those of random directions of the same form, layers and norm at the same strength.

    effect, draws: mean paired differences; sign: +1 or -1, the way that the direction's name tells; pairs: the fewest that a
    draw had. Why the 95th percentile of sizes: a network moves under any push, so "differs from unsteered" is not yet
    "because of what these neurons say"; a draw that pushes hard the wrong way shows what pushing does as well. Below
    FULL_BAND draws the percentile is about the largest of them, and draws on few pairs scatter more than the effect does:
    both make the band wider, never the claim easier.
    """
    if sign not in (1.0, -1.0):
        raise SteerError("bad_sign", f"sign {sign} is not usable: expected 1 or -1")
    values = finite(draws, "effects of random draws") * sign
    if len(values) == 0:
        return Band(None, None, 0, 0, None, None, "no random control was run at this strength")
    size = float(np.quantile(np.abs(values), 0.95))
    directed = max(0.0, float(np.quantile(values, 0.95)))
    note = "" if len(values) >= FULL_BAND else f"{count(len(values), 'draw')} of {FULL_BAND}: the band is rough"
    if effect is None:
        return Band(size, directed, len(values), pairs, None, None, note or "no effect was measured", tuple(draws))
    wanted = effect * sign
    rank = (1 + int((values >= wanted).sum())) / (1 + len(values))
    return Band(size, directed, len(values), pairs, rank, bool(wanted > size), note, tuple(draws))


def _groups(values: np.ndarray, tasks: Sequence[Hashable]) -> list[np.ndarray]:
    """Values by task, in order of appearance. Raises SteerError('unpaired')."""
    if len(values) != len(tasks):
        raise SteerError(
            "unpaired", f"{len(values)} differences and {len(tasks)} tasks: expected one task a difference"
        )
    groups: dict[Hashable, list[float]] = {}
    for value, task in zip(values.tolist(), tasks, strict=True):
        groups.setdefault(task, []).append(value)
    return [np.array(group) for group in groups.values()]
