"""`action`: the action basis, value vectors read through the rows that make actions of a hidden state.

Source: the token-basis reading of Geva et al. (2022, arXiv 2203.14680) with the action rows in place of words: the action
tokens of OpenVLA, or `action_out_proj` of Pi0's expert (`ActionBasis`).
Invariant: no observation is looked at.

Honest limits. Where actions are tokens, all dimensions share the same rows, so the rows cannot tell dz from the gripper;
which dimension a token moves comes with its position. In an expert of a flow policy the next steps work against what was
added to the flow v at one: were v exact for one action a, x_t = (1 - t) a + t e and v = (x_t - a) / t, of a constant shift d
of v only the last step's dt d would be left.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from steer_runtime.directions.action_basis import ActionBasis
from steer_runtime.directions.direction import Direction
from steer_runtime.directions.finders.material import Material
from steer_runtime.directions.finders.placing import (
    chosen_layers,
    chosen_site,
    place_neurons,
    place_vector,
    strongest,
)
from steer_runtime.directions.finders.recipe import OPENVLA_ALPHA, Recipe
from steer_runtime.directions.options import ActionOptions
from steer_runtime.errors import SteerError
from steer_runtime.types import Role

ACTION: frozenset[Role] = frozenset({"action"})
LOUDER = 2.0
"""Factor of neurons that make moves large."""


def find(material: Material, recipe: Recipe, options: ActionOptions) -> Direction:
    """u = mean of the rows of the highest quarter of action tokens minus the lowest ("value"), or of the half with the
    largest |value| minus the quarter with the smallest ("size"); in an expert u = row `dimension` of its action basis.

    Neurons: the `count` largest |w_j . u|, overridden by alpha sign(w_j . u) (alpha 4). Dense: u at a site, of norm `norm`
    (default 1). In an expert "size" has no u, since which way is faster depends on the moment: there the `count` neurons of
    the largest ||S R w_j||, R the three rows of the translation and S their scales, are multiplied by alpha (default 2;
    inverted 2 - alpha). On action tokens. Raises SteerError: 'no_action_rows', 'bad_option', 'bad_operation', 'dead_layer'.
    """
    if material.tower.basis == "actions" and options.readout == "size":
        return _louder(material, recipe, options)
    readout, facts = _readout(material, options)
    if options.invert:
        readout = -readout
    if options.form == "dense":
        site = chosen_site(material, options.site)
        return place_vector(material, recipe, site, readout, facts, norm=options.norm or 1.0, span=ACTION)
    op = recipe.op or "override"
    if op not in ("override", "add") or recipe.low is not None:
        raise SteerError(
            "bad_operation", f"direction {recipe.name!r} overrides or adds: drop `low` and other operations"
        )
    layers = _later_layers(material, options)
    scores = {layer: readout @ material.weight(layer).numpy().astype(np.float64) for layer in layers}
    pairs = strongest(scores, options.count)
    of_pair = np.array([scores[layer][neuron] for layer, neuron in pairs])
    alpha = OPENVLA_ALPHA if recipe.alpha is None else recipe.alpha
    signs = np.sign(of_pair)
    # Adding takes the recipe's alpha as a factor.
    as_written = (replace(recipe, alpha=alpha), signs) if op == "add" else (recipe, alpha * signs)
    return place_neurons(
        material, as_written[0], pairs, as_written[1], facts, norm=None, scores=of_pair.tolist(), span=ACTION, op=op
    )


def _louder(material: Material, recipe: Recipe, options: ActionOptions) -> Direction:
    if options.form == "dense" or recipe.op not in (None, "scale") or recipe.low is not None:
        raise SteerError(
            "bad_operation",
            f"direction {recipe.name!r}: in tower {material.tower.name!r} no vector makes moves larger, since which way that is "
            "depends on the moment; neurons are scaled: drop `op` and `form`, or find speed by contrast or attribution",
        )
    basis = ActionBasis.of(material.policy)
    rows = basis.rows[:3] * _scales(material.policy)[:3, None]
    layers = _later_layers(material, options)
    scores = {
        layer: np.linalg.norm(rows @ material.weight(layer).numpy().astype(np.float64), axis=0) for layer in layers
    }
    pairs = strongest(scores, options.count)
    alpha = LOUDER if recipe.alpha is None else recipe.alpha
    factors = np.full(len(pairs), 2.0 - alpha if options.invert else alpha)
    of_pair = [float(scores[layer][neuron]) for layer, neuron in pairs]
    facts = {"rows": "action_out_proj, translation"}
    return place_neurons(material, recipe, pairs, factors, facts, norm=None, scores=of_pair, span=ACTION, op="scale")


def _scales(policy: Any) -> np.ndarray:
    """Size of each dimension of an action per unit of what the model computes, float64 [dims]."""
    dims = policy.action_space.dims
    return policy.statistics.unnormalise(np.ones(dims)) - policy.statistics.unnormalise(np.zeros(dims))


def _later_layers(material: Material, options: ActionOptions) -> tuple[int, ...]:
    alive = material.tower.steerable_layers
    return chosen_layers(material, options.layers or range(material.tower.layers // 2, alive.stop))


def _readout(material: Material, options: ActionOptions) -> tuple[np.ndarray, dict[str, Any]]:
    """The vector [d_model] that raises what is asked for, and how it was read."""
    if material.tower.basis == "actions":
        basis = ActionBasis.of(material.policy)
        if options.dimension is None:
            raise SteerError(
                "no_action_rows",
                f"the dimensions of {material.policy.name!r} have a row each: give `dimension`, 0 to {len(basis.rows) - 1} "
                f"({', '.join(basis.names)})",
            )
        facts = {"rows": "action_out_proj", "dimension": basis.names[options.dimension : options.dimension + 1]}
        return basis.row(options.dimension), facts
    if options.dimension is not None:
        raise SteerError(
            "no_action_rows",
            f"tower {material.tower.name!r} of {material.policy.name!r} has no matrix with a row for each dimension: drop "
            "`dimension`, or give the tower that computes actions",
        )
    values = material.basis.action_values
    if not values:
        raise SteerError(
            "no_action_rows",
            f"{material.policy.name!r} has no action tokens: use the tower that computes actions, with `dimension`",
        )
    ids = sorted(values)
    rows = material.basis.unembedding[ids].to("cpu").double().numpy()
    worth = np.array([values[token] for token in ids])
    if options.readout == "size":
        worth = np.abs(worth)
        high, low = worth >= np.quantile(worth, 0.5), worth <= np.quantile(worth, 0.25)
    else:
        high, low = worth >= np.quantile(worth, 0.75), worth <= np.quantile(worth, 0.25)
    return rows[high].mean(0) - rows[low].mean(0), {
        "rows": "action tokens",
        "high": int(high.sum()),
        "low": int(low.sum()),
    }
