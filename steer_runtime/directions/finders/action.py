"""`action`: the action basis, value vectors read through the rows that make actions of a hidden state.

Source: the token-basis reading of Geva et al. (2022, arXiv 2203.14680) with the action rows in place of words: the action
tokens of OpenVLA, or `action_out_proj` of Pi0.
Invariant: no observation is looked at.

Honest limit: where actions are tokens, all dimensions share the same rows, so the rows cannot tell dz from the gripper; which
dimension a token moves comes with its position. Such a direction moves every value of the chunk alike.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

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


def find(material: Material, recipe: Recipe, options: ActionOptions) -> Direction:
    """u = mean of the rows of the highest quarter of action tokens minus the lowest ("value"), or of the half with the
    largest |value| minus the quarter with the smallest ("size"); with a matrix, u = its row `dimension`.

    Neurons: the `count` largest |w_j . u|, overridden by alpha sign(w_j . u) (alpha 4). Dense: u at a site, of norm `norm`
    (default 1) mean word norms. On action tokens. Raises SteerError: 'no_action_rows', 'bad_option', 'bad_operation'.
    """
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
    later_half = range(material.tower.layers // 2, material.tower.layers)
    layers = chosen_layers(material, options.layers or later_half)
    scores = {layer: readout @ material.weight(layer).numpy().astype(np.float64) for layer in layers}
    pairs = strongest(scores, options.count)
    of_pair = np.array([scores[layer][neuron] for layer, neuron in pairs])
    alpha = OPENVLA_ALPHA if recipe.alpha is None else recipe.alpha
    if op == "add":
        # Adding takes the recipe's alpha as a factor.
        return place_neurons(
            material,
            replace(recipe, alpha=alpha),
            pairs,
            np.sign(of_pair),
            facts,
            norm=None,
            scores=of_pair.tolist(),
            span=ACTION,
        )
    return place_neurons(
        material,
        recipe,
        pairs,
        alpha * np.sign(of_pair),
        facts,
        norm=None,
        scores=of_pair.tolist(),
        span=ACTION,
        op="override",
    )


def _readout(material: Material, options: ActionOptions) -> tuple[np.ndarray, dict[str, Any]]:
    """The vector [d_model] that raises what is asked for, and how it was read."""
    matrix = getattr(getattr(material.policy, "action_out_proj", None), "weight", None)
    if options.dimension is not None:
        if not isinstance(matrix, torch.Tensor):
            raise SteerError(
                "no_action_rows",
                f"the actions of {material.policy.name!r} are tokens, whose rows all dimensions share: drop `dimension`",
            )
        return matrix_row(matrix, options.dimension, material.tower.d_model), {"rows": "action_out_proj"}
    values = material.basis.action_values
    if not values:
        raise SteerError("no_action_rows", f"{material.policy.name!r} has no action tokens: give `dimension` instead")
    ids = sorted(values)
    rows = material.basis.unembedding[ids].to("cpu", torch.float64).numpy()
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


def matrix_row(matrix: torch.Tensor, dimension: int, d_model: int) -> np.ndarray:
    """Row of an action matrix [dims, d_model], float64. Raises SteerError('no_action_rows')."""
    if matrix.ndim != 2 or matrix.shape[1] != d_model or dimension >= matrix.shape[0]:
        raise SteerError(
            "no_action_rows",
            f"dimension {dimension} of a matrix {list(matrix.shape)} was asked for: expected [dimensions, {d_model}] and a "
            "row of it; choose the tower whose output it reads",
        )
    return matrix[dimension].detach().to("cpu", torch.float64).numpy()
