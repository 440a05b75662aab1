"""`contrast`: the difference of mean activations between two conditions.

Source: difference of means, as in contrastive activation addition (Rimsky et al. 2024, arXiv 2312.06681) and
representation engineering (Zou et al. 2023, arXiv 2310.01405).
Invariant: both conditions are seen by the same unsteered policy in the span in which the direction is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from steer_runtime.directions.activations import Activations
from steer_runtime.directions.direction import Direction
from steer_runtime.directions.finders.material import Material
from steer_runtime.directions.finders.placing import (
    chosen_layers,
    chosen_site,
    column_norms,
    place_neurons,
    place_onto,
    place_vector,
    place_vectors,
    span_of,
    strongest,
)
from steer_runtime.directions.finders.recipe import Recipe
from steer_runtime.directions.options import ContrastOptions
from steer_runtime.errors import SteerError

Place = tuple[str, int]


def find(material: Material, recipe: Recipe, options: ContrastOptions) -> Direction:
    """d = mean over pairs of h(moment, positive wording) - h(moment, negative wording), or
    d = mean h(moments above the median of a quantity) - mean h(moments below it); h pooled over the span's tokens.

    Dense: d at a site, or at each of several sites its own: one alone is undone by what the layers behind it read from
    elsewhere (from the prefix, in an expert). Neurons: on f, the inputs of down_proj, the `count` largest |d_j| ||w_j||, each added its d_j. Onto a
    layer: d behind it, written as `place_onto` does. In an expert h is a mean over denoising steps as well, and both sides
    of a pair begin from the same noise.
    `consistency` in the provenance: mean cosine of a pair's difference with d. Raises SteerError: 'no_groups', and as
    `Material.activations`.
    """
    onto = options.onto_layer
    if options.sites:
        sites = [chosen_site(material, site) for site in options.sites]
        found, facts = _differences(material, recipe, options, [("residual", site) for site in sites])
        vectors = {site: _signed(found[("residual", site)], options) for site in sites}
        return place_vectors(material, recipe, vectors, facts, norm=options.norm)
    if options.form == "dense":
        site = chosen_site(material, options.site if onto is None else onto + 1)
        found, facts = _differences(material, recipe, options, [("residual", site)])
        vector = _signed(found[("residual", site)], options)
        if onto is not None:
            return place_onto(material, recipe, vector, onto, facts, norm=options.norm, count=options.count)
        return place_vector(material, recipe, site, vector, facts, norm=options.norm)
    layers = chosen_layers(material, options.layers)
    found, facts = _differences(material, recipe, options, [("ffn", layer) for layer in layers])
    means = {layer: _signed(found[("ffn", layer)], options) for layer in layers}
    scores = {layer: means[layer] * column_norms(material, layer) for layer in layers}
    pairs = strongest(scores, options.count)
    return place_neurons(
        material,
        recipe,
        pairs,
        np.array([means[layer][neuron] for layer, neuron in pairs]),
        facts,
        norm=options.norm,
        scores=[scores[layer][neuron] for layer, neuron in pairs],
    )


def _signed(vector: np.ndarray, options: ContrastOptions) -> np.ndarray:
    return -vector if options.invert else vector


def _differences(
    material: Material, recipe: Recipe, options: ContrastOptions, places: list[Place]
) -> tuple[Mapping[Place, np.ndarray], dict[str, Any]]:
    """Place -> difference of means float64 [width], and facts."""
    span = span_of(material, recipe)

    def seen(wording: str) -> Activations:
        return material.activations(options.moments, span, options.pool, wording=wording)

    if options.quantity:
        here = seen("{}")
        high, low = _groups(material, options, here)
        facts: dict[str, Any] = {"above": int(high.sum()), "below": int(low.sum())}
        return {p: _rows(here, p)[high].mean(0) - _rows(here, p)[low].mean(0) for p in places}, facts
    pairs = list(zip(options.positive, options.negative, strict=True))
    out: dict[Place, np.ndarray] = {}
    agreement = []
    for place in places:
        parts = np.concatenate([_rows(seen(one), place) - _rows(seen(other), place) for one, other in pairs])
        out[place] = parts.mean(0)
        sizes = np.linalg.norm(parts, axis=1) * np.linalg.norm(out[place])
        agreement.append(
            float(np.mean(np.divide(parts @ out[place], sizes, out=np.zeros_like(sizes), where=sizes > 0)))
        )
    facts = {
        "pairs": len(pairs) * len(material.moments(options.moments)),
        "consistency": round(float(np.mean(agreement)), 4),
    }
    return out, facts


def _rows(seen: Activations, place: Place) -> np.ndarray:
    kind, index = place
    return (seen.ffn if kind == "ffn" else seen.residual)[index].astype(np.float64)


def _groups(material: Material, options: ContrastOptions, seen: Activations) -> tuple[np.ndarray, np.ndarray]:
    """Masks [moments] above and below the median of the quantity."""
    values = material.quantity(options.moments, options.quantity, seen)
    if options.by == "episode":
        episodes = material.episodes(options.moments)
        means = np.array([values[episodes == episode].mean() for episode in range(episodes.max() + 1)])
        values = means[episodes]
    middle = float(np.median(values))
    high, low = values > middle, values < middle
    if not high.any() or not low.any():
        # Half of the moments or more share the median value: then everything else stands against them.
        high, low = (high, ~high) if high.any() else (~low, low)
    if not high.any() or not low.any():
        raise SteerError(
            "no_groups",
            f"{options.quantity} does not divide these moments in two: use more moments or another quantity",
        )
    return high, low
