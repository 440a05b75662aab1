"""How a found vector, or found summands of neurons, become a Direction of one size unit.

Invariant: the two forms are sized alike, by the norm of what they add to the residual stream at strength 1; the
provenance says in tokens what is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.linalg
import torch

from steer_runtime.directions.direction import Direction, Neurons, Operation
from steer_runtime.directions.finders.material import Material
from steer_runtime.directions.finders.recipe import Recipe, written
from steer_runtime.directions.towers import require_reach
from steer_runtime.errors import SteerError
from steer_runtime.types import Role

NEURON_FACTS = 50
"""Neurons whose labels are kept in the provenance: the largest writers."""


def span_of(material: Material, recipe: Recipe, default: frozenset[Role] | None = None) -> frozenset[Role]:
    """Where a direction is measured and written: the recipe's span, the finder's default, or the tower's."""
    if recipe.span is not None:
        return recipe.span
    return material.default_span if default is None else default


def place_vector(
    material: Material,
    recipe: Recipe,
    site: int,
    vector: np.ndarray,
    facts: Mapping[str, Any],
    *,
    norm: float | None,
    span: frozenset[Role] | None = None,
) -> Direction:
    """`vector` [d_model] added at a residual site; norm in units of `Material.mean_norm`, None as it is; recipe.alpha a factor.

    span: the finder's default, where it is not the tower's.

    Raises SteerError: 'bad_operation', 'no_direction' for a zero vector, and what Direction refuses.
    """
    return place_vectors(material, recipe, {site: vector}, facts, norm=norm, span=span)


def place_vectors(
    material: Material,
    recipe: Recipe,
    vectors: Mapping[int, np.ndarray],
    facts: Mapping[str, Any],
    *,
    norm: float | None,
    span: frozenset[Role] | None = None,
) -> Direction:
    """Site -> vector [d_model], each added at its residual site; norm: of the largest of them, the others in proportion.

    What it reads as in tokens is told of the last site. Raises as `place_vector`.
    """
    _only_add(recipe)
    size = max(float(np.linalg.norm(np.asarray(vector, np.float64))) for vector in vectors.values())
    factor = _factor(material, recipe, size, norm)
    written_at = {site: (np.asarray(v, np.float64) * factor).astype(np.float32) for site, v in vectors.items()}
    last = max(written_at)
    more = {
        "site": last if len(written_at) == 1 else sorted(written_at),
        "norm": size * factor / material.mean_norm,
        "reads": material.reads(written_at[last][None])[0],
        "reads_low": material.reads(-written_at[last][None])[0],
    }
    return written(
        material.identity,
        recipe,
        {**facts, **more},
        op="add",
        span=span_of(material, recipe, span),
        dense=written_at,
    )


def place_neurons(
    material: Material,
    recipe: Recipe,
    pairs: Sequence[tuple[int, int]],
    summands: np.ndarray,
    facts: Mapping[str, Any],
    *,
    norm: float | None,
    scores: Sequence[float] | None = None,
    span: frozenset[Role] | None = None,
    op: Operation = "add",
) -> Direction:
    """`summands` [K] added to the (layer, neuron) inputs of down_proj; norm and recipe.alpha as in `place_vector`.

    The size is that of the sum over layers of what is written, || sum_l W_l a_l ||. Raises as `place_vector`.
    """
    if op == "add":
        _only_add(recipe)
    summands = np.asarray(summands, np.float64)
    columns = _columns(material, pairs)
    total = summands @ columns
    size = float(np.linalg.norm(total))
    factor = _factor(material, recipe, size, norm) if op == "add" else 1.0
    alphas = (summands * factor).astype(np.float32)
    order = np.argsort(-np.abs(summands) * np.linalg.norm(columns, axis=1), kind="stable")[:NEURON_FACTS]
    labels = material.reads(columns[order])
    more = {
        "norm": size * factor / material.mean_norm,
        "reads": material.reads(total[None])[0],
        "reads_low": material.reads(-total[None])[0],
        "neurons": [
            {"layer": int(pairs[i][0]), "neuron": int(pairs[i][1]), "label": label}
            | ({} if scores is None else {"score": float(scores[i])})
            for i, label in zip(order.tolist(), labels, strict=True)
        ],
    }
    neurons = Neurons(
        np.array([layer for layer, _ in pairs], np.int32), np.array([neuron for _, neuron in pairs], np.int32), alphas
    )
    return written(
        material.identity, recipe, {**facts, **more}, op=op, span=span_of(material, recipe, span), neurons=neurons
    )


def place_onto(
    material: Material,
    recipe: Recipe,
    vector: np.ndarray,
    layer: int,
    facts: Mapping[str, Any],
    *,
    norm: float | None,
    count: int | None,
) -> Direction:
    """`vector` [d_model] written by one layer's neurons, with the smallest f that brings W_down f nearest to it.

    f = W_down^+ vector (pseudo-inverse); with `count`, the same over the neurons of the largest |f_j| ||w_j||, which reach
    it in part (`reached` in the provenance, a cosine). Raises as `place_neurons`, and 'dead_layer'.
    """
    chosen_layers(material, [layer])
    weight = material.weight(layer).numpy().astype(np.float64)
    chosen = np.arange(weight.shape[1])
    activations = _smallest(weight, vector)
    if count is not None:
        scores = {layer: activations * column_norms(material, layer)}
        chosen = np.array([neuron for _, neuron in strongest(scores, count)])
        activations = _smallest(weight[:, chosen], vector)
    wrote = weight[:, chosen] @ activations
    sizes = float(np.linalg.norm(wrote)) * float(np.linalg.norm(vector))
    reached = round(float(wrote @ vector) / sizes, 6) if sizes > 0 else 0.0
    pairs = [(layer, int(neuron)) for neuron in chosen]
    return place_neurons(material, recipe, pairs, activations, {**facts, "reached": reached}, norm=norm)


def _smallest(columns: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """The smallest f that brings `columns @ f` nearest to `vector`."""
    return scipy.linalg.lstsq(columns, vector, lapack_driver="gelsy")[0]


def _columns(material: Material, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Value vectors of (layer, neuron) pairs, float64 [K, d_model]. Raises SteerError('layer_out_of_range')."""
    out = np.empty((len(pairs), material.tower.d_model))
    for layer in sorted({layer for layer, _ in pairs}):
        rows = [i for i, pair in enumerate(pairs) if pair[0] == layer]
        out[rows] = material.weight(layer)[:, [pairs[i][1] for i in rows]].T.numpy()
    return out


def strongest(scores: Mapping[int, np.ndarray], count: int) -> list[tuple[int, int]]:
    """The `count` (layer, neuron) pairs of the largest |score|; scores: layer -> [d_ff]. Raises SteerError('bad_count')."""
    layers = sorted(scores)
    flat = np.concatenate([np.abs(scores[layer]) for layer in layers])
    if count > len(flat):
        raise SteerError(
            "bad_count", f"{count} neurons were asked of {len(flat)} in {len(layers)} layers: ask for fewer"
        )
    width = len(scores[layers[0]])
    order = np.argsort(-flat, kind="stable")[:count]
    return [(layers[int(i) // width], int(i) % width) for i in order]


def column_norms(material: Material, layer: int) -> np.ndarray:
    """||w_j|| of every value vector of a layer, float64 [d_ff]."""
    return material.weight(layer).to(torch.float64).norm(dim=0).numpy()


def chosen_layers(material: Material, layers: Sequence[int]) -> tuple[int, ...]:
    """The given layers, or all that can reach the action. Raises SteerError: 'layer_out_of_range', 'dead_layer'."""
    for layer in layers:
        material.require_layer(layer)
    require_reach(material.tower, layers=layers)
    return tuple(dict.fromkeys(layers)) or tuple(material.tower.steerable_layers)


def chosen_site(material: Material, site: int | None) -> int:
    """The given residual site, or the last that can reach the action. Raises SteerError: 'layer_out_of_range', 'dead_layer'."""
    last = material.tower.layers
    if site is None:
        return material.tower.steerable_sites.stop - 1
    if not 0 <= site <= last:
        raise SteerError("layer_out_of_range", f"residual site {site} was given: expected 0 (embeddings) to {last}")
    require_reach(material.tower, sites=[site])
    return site


def _factor(material: Material, recipe: Recipe, size: float, norm: float | None) -> float:
    if not np.isfinite(size):
        raise SteerError(
            "not_finite", f"what was found for direction {recipe.name!r} is NaN or infinite; check the input"
        )
    if size == 0:
        raise SteerError(
            "no_direction", f"nothing is left of direction {recipe.name!r}, its parts cancel out: give others"
        )
    alpha = 1.0 if recipe.alpha is None else recipe.alpha
    return alpha * (1.0 if norm is None else norm * material.mean_norm / size)


def _only_add(recipe: Recipe) -> None:
    if recipe.op not in (None, "add") or recipe.low is not None:
        raise SteerError(
            "bad_operation",
            f"what is found for direction {recipe.name!r} is added: drop `low`, and op unless it is add",
        )
