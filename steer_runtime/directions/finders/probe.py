"""`probe`: the direction along which a measured quantity can be read, and raised.

Source: linear probes; motion-aligned residual directions as in CTRL-STEER (arXiv 2606.00269).
Invariant: a probe that cannot read its quantity in episodes it was not fitted on is refused, never a direction.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from steer_runtime.directions.activations import Activations
from steer_runtime.directions.direction import Direction
from steer_runtime.directions.finders.material import Material
from steer_runtime.directions.finders.placing import chosen_layers, chosen_site, place_neurons, place_vector, span_of
from steer_runtime.directions.finders.recipe import Recipe
from steer_runtime.directions.options import ProbeOptions
from steer_runtime.errors import SteerError

PENALTIES = np.logspace(0, 6, 13)
"""Ridge penalties to choose from, on standardised activations (leave-one-out inside each fit)."""
FOLDS = 5


@dataclass(frozen=True, eq=False)
class Reading:
    """A fitted probe: y = weight . (x - mean) / spread + b. weight, spread float64 [width]; r2 on episodes left out."""

    weight: np.ndarray
    spread: np.ndarray
    r2: float
    penalty: float


def find(material: Material, recipe: Recipe, options: ProbeOptions) -> Direction:
    """Ridge w = argmin sum (y - w . z - b)^2 + lambda ||w||^2 on standardised activations z = (x - mean) / s, pooled over the
    span; x + v raises the reading by q = `step` standard deviations of y with the least change of z:
    v = q s * w / ||w||^2.

    Dense: x at a site. Neurons: x the inputs of down_proj of the layers; only the `count` largest |w_j| are kept, in the
    same formula. Raises SteerError: 'no_fit' where the cross-validated R^2 (episodes left out whole) is not above zero,
    'few_episodes', 'unknown_quantity', 'no_variation'.
    """
    seen = material.activations(options.moments, span_of(material, recipe), options.pool)
    values = material.quantity(options.moments, options.quantity, seen)
    inputs, places = _inputs(material, options, seen)
    reading = read(inputs, values, material.episodes(options.moments))
    material.report("fitting a probe", 1, 1)
    if not reading.r2 > 0:
        raise SteerError(
            "no_fit",
            f"{options.quantity} cannot be read here: R^2 {reading.r2:.2f} on episodes left out, expected above 0; use another "
            "place, span or more moments",
        )
    step = options.step * float(values.std()) * (-1.0 if options.invert else 1.0)
    facts: dict[str, Any] = {
        "r2": round(reading.r2, 4),
        "penalty": reading.penalty,
        "raises": abs(step),
        "moments": len(values),
        "scikit_learn": importlib.metadata.version("scikit-learn"),
    }
    if options.form == "dense":
        site = chosen_site(material, options.site)
        return place_vector(material, recipe, site, raising(reading, step), facts, norm=options.norm)
    if options.count > len(places):
        raise SteerError("bad_count", f"{options.count} neurons were asked of {len(places)}: ask for fewer")
    order = np.argsort(-np.abs(reading.weight), kind="stable")[: options.count]
    kept = Reading(reading.weight[order], reading.spread[order], reading.r2, reading.penalty)
    pairs = [places[i] for i in order.tolist()]
    return place_neurons(
        material, recipe, pairs, raising(kept, step), facts, norm=options.norm, scores=kept.weight.tolist()
    )


def read(inputs: np.ndarray, values: np.ndarray, groups: np.ndarray) -> Reading:
    """Fit on rows [N, width] of quantity [N]; groups [N]: episodes, left out whole to judge. Raises SteerError."""
    count = len(np.unique(groups))
    if count < 2:
        raise SteerError(
            "few_episodes", "a probe is judged on episodes left out: expected moments of at least 2 episodes"
        )
    guessed = np.empty(len(values))
    for inside, outside in GroupKFold(min(FOLDS, count)).split(inputs, values, groups):
        guessed[outside] = _ridge().fit(inputs[inside], values[inside]).predict(inputs[outside])
    whole = _ridge().fit(inputs, values)
    ridge, scaler = whole[-1], whole[0]
    return Reading(
        np.asarray(ridge.coef_, np.float64).ravel(),
        np.asarray(scaler.scale_, np.float64),
        float(r2_score(values, guessed)),
        float(ridge.alpha_),
    )


def raising(reading: Reading, step: float) -> np.ndarray:
    """The change [width] that raises the reading by `step` and moves standardised activations least."""
    size = float(reading.weight @ reading.weight)
    if size == 0:
        raise SteerError("no_direction", "the probe reads nothing, all its weights are zero: use more moments")
    return step * reading.spread * reading.weight / size


def _ridge() -> Pipeline:
    return make_pipeline(StandardScaler(), RidgeCV(alphas=PENALTIES))


def _inputs(
    material: Material, options: ProbeOptions, seen: Activations
) -> tuple[np.ndarray, Sequence[tuple[int, int]]]:
    """Rows float64 [N, width], and for neurons the (layer, neuron) of each column."""
    if options.form == "dense":
        return seen.residual[chosen_site(material, options.site)].astype(np.float64), ()
    layers = chosen_layers(material, options.layers)
    places = [(layer, neuron) for layer in layers for neuron in range(material.tower.d_ff)]
    return np.concatenate([seen.ffn[layer] for layer in layers], axis=1).astype(np.float64), places
