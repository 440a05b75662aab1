"""`snmf`: one factor of what a layer's neurons do together.

Source: semi-nonnegative matrix factorisation (Ding, Li, Jordan 2010, "Convex and semi-nonnegative matrix
factorizations"), used on MLP activations by Shafran et al. (2025).
Invariant: the same activations, seed and count of updates give the same factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.cluster import KMeans

from steer_runtime.directions.activations import Activations
from steer_runtime.directions.direction import Direction
from steer_runtime.directions.finders.material import Material
from steer_runtime.directions.finders.placing import (
    chosen_layers,
    column_norms,
    place_neurons,
    place_vector,
    span_of,
    strongest,
)
from steer_runtime.directions.finders.recipe import Recipe
from steer_runtime.directions.finders.word import mean_of
from steer_runtime.directions.options import SnmfOptions
from steer_runtime.errors import SteerError

_TINY = 1e-9
OCCURS = 95.0
"""Percentile of a factor's strength, where it occurs at all, that is called the size in which it occurs."""


def find(material: Material, recipe: Recipe, options: SnmfOptions) -> Direction:
    """X ~ G F, G >= 0: rows of X the inputs of down_proj at each token of the span, rows of F the factors.

    The factor i is chosen by the correlation of a quantity with G_i averaged over a moment's tokens, or by
    cos(W_down F_i, v) with v as in `word` (without words against: minus the mean of all words); inverted: the most negative,
    which is another factor, since strengths have no sign. Added: g F_i, g the 95th percentile of G_i where it is above 0;
    neurons: the `count` largest |F_ij| ||w_j||; dense: g W_down F_i at the layer's output site.

    Raises SteerError: 'bad_count' for more factors than tokens or neurons, 'unknown_quantity', 'no_variation'.
    """
    chosen_layers(material, [options.layer])
    weight = material.weight(options.layer).numpy().astype(np.float64)
    span = span_of(material, recipe)
    seen = material.activations(options.moments, span, "each", layers=[options.layer])
    rows = seen.ffn[options.layer].astype(np.float64)
    key = (
        "snmf",
        material.digest(options.moments),
        span,
        options.layer,
        options.factors,
        options.seed,
        options.iterations,
    )
    strengths, factors = material.once(
        key,
        lambda: factorise(
            rows,
            options.factors,
            options.seed,
            options.iterations,
            on_step=lambda step: material.report("factorising", step, options.iterations),
        ),
    )
    scores = (
        _by_quantity(material, options, seen, strengths)
        if options.quantity
        else _by_words(material, options, factors, weight)
    )
    chosen = int(np.argmin(scores) if options.invert else np.argmax(scores))
    occurs = strengths[:, chosen][strengths[:, chosen] > _TINY]
    vector = factors[chosen] * (float(np.percentile(occurs, OCCURS)) if len(occurs) else 0.0)
    left = float(np.linalg.norm(rows - strengths @ factors) / np.linalg.norm(rows))
    facts: dict[str, Any] = {
        "factor": chosen,
        "choice": round(float(scores[chosen]), 4),
        "unexplained": round(left, 4),
        "tokens": len(rows),
    }
    if options.form == "dense":
        return place_vector(material, recipe, options.layer + 1, weight @ vector, facts, norm=options.norm)
    sized = {options.layer: vector * column_norms(material, options.layer)}
    pairs = strongest(sized, options.count)
    neurons = [neuron for _, neuron in pairs]
    scored = sized[options.layer][neurons]
    return place_neurons(material, recipe, pairs, vector[neurons], facts, norm=options.norm, scores=scored.tolist())


def factorise(
    rows: np.ndarray, count: int, seed: int, iterations: int, *, on_step: Callable[[int], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(G [N, count] >= 0, F [count, width]) of rows X [N, width]; factors have norm 1.

    From a k-means start G = indicator + 0.2 (as Ding et al.), alternate F = (G^T G)^-1 G^T X and
    G <- G sqrt(([X F^T]+ + G [F F^T]-) / ([X F^T]- + G [F F^T]+)), under which ||X - G F|| never grows.
    Raises SteerError('bad_count').
    """
    if not 1 <= count <= min(rows.shape):
        raise SteerError(
            "bad_count", f"{count} factors were asked of {rows.shape[0]} tokens of {rows.shape[1]} neurons"
        )
    start = KMeans(count, n_init=1, max_iter=30, random_state=seed).fit(rows)
    strengths = np.eye(count)[start.labels_] + 0.2
    factors = _factors(rows, strengths)
    for step in range(iterations):
        crossed, inner = rows @ factors.T, factors @ factors.T
        up = np.maximum(crossed, 0) + strengths @ np.maximum(-inner, 0)
        down = np.maximum(-crossed, 0) + strengths @ np.maximum(inner, 0)
        strengths = strengths * np.sqrt((up + _TINY) / (down + _TINY))
        factors = _factors(rows, strengths)
        if on_step is not None:
            on_step(step + 1)
    sizes = np.maximum(np.linalg.norm(factors, axis=1), _TINY)
    return strengths * sizes, factors / sizes[:, None]


def _factors(rows: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    return np.linalg.pinv(strengths.T @ strengths, hermitian=True) @ (strengths.T @ rows)


def _by_quantity(material: Material, options: SnmfOptions, seen: Activations, strengths: np.ndarray) -> np.ndarray:
    """Correlation of each factor's mean strength at a moment with the quantity, [factors]."""
    values = material.quantity(options.moments, options.quantity, seen)
    counts = np.bincount(seen.moment, minlength=len(values))
    sums = np.stack([np.bincount(seen.moment, column, len(values)) for column in strengths.T])
    return correlations((sums / counts).T, values)


def _by_words(material: Material, options: SnmfOptions, factors: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Cosine of each factor's write with the words, [factors]."""
    table = material.table(options.layer + 1)
    words, _ = mean_of(material.basis, options.words, table)
    others = mean_of(material.basis, options.against, table)[0] if options.against else material.words.mean(0)
    wanted = (words - others).numpy().astype(np.float64)
    writes = factors @ weight.T
    return writes @ wanted / np.maximum(np.linalg.norm(writes, axis=1) * np.linalg.norm(wanted), _TINY)


def correlations(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Pearson correlation of every column of [N, K] with values [N]; 0 for a column that is constant."""
    centred, target = columns - columns.mean(0), values - values.mean()
    sizes = np.linalg.norm(centred, axis=0) * np.linalg.norm(target)
    return np.divide(target @ centred, sizes, out=np.zeros(columns.shape[1]), where=sizes > 0)
