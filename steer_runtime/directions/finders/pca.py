"""`pca`: a principal direction of hidden states.

Source: principal components (Pearson 1901), on hidden states as in representation engineering (Zou et al. 2023, arXiv
2310.01405).
Invariant: the sign is decided by the quantity, or by the largest entry, never by the solver.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np
from sklearn.decomposition import PCA

from steer_runtime.directions.direction import Direction
from steer_runtime.directions.finders.material import Material
from steer_runtime.directions.finders.placing import (
    chosen_layers,
    chosen_site,
    column_norms,
    place_neurons,
    place_vector,
    span_of,
    strongest,
)
from steer_runtime.directions.finders.recipe import Recipe
from steer_runtime.directions.finders.snmf import correlations
from steer_runtime.directions.options import PcaOptions
from steer_runtime.errors import SteerError


def find(material: Material, recipe: Recipe, options: PcaOptions) -> Direction:
    """x ~ mean + sum_i c_i p_i, p_i the unit directions of largest variance; added: s_i p_i, s_i the standard deviation of c_i.

    i is given, or has the largest |correlation| of c_i with a quantity, and the sign that raises it; without a quantity
    the largest entry of p_i is positive. Dense: x at a site. Neurons: x the inputs of one layer's down_proj, of which the
    `count` largest |p_ij| ||w_j|| are written. Raises SteerError: 'bad_option', 'bad_count', and as `Material.quantity`.
    """
    layer, site = None, chosen_site(material, options.site)
    if options.form == "neurons":
        if len(options.layers) != 1:
            raise SteerError(
                "bad_option", f"pca of neurons takes one layer, {len(options.layers)} were given: give one"
            )
        (layer,) = chosen_layers(material, options.layers)
    seen = material.activations(
        options.moments,
        span_of(material, recipe),
        options.pool,
        layers=[] if layer is None else [layer],
        sites=[site] if layer is None else [],
    )
    rows = (seen.residual[site] if layer is None else seen.ffn[layer]).astype(np.float64)
    wanted = options.components if options.component is None else options.component + 1
    if wanted > min(rows.shape[0] - 1, rows.shape[1]):
        raise SteerError(
            "bad_count", f"{wanted} components were asked of {len(rows)} rows of {rows.shape[1]}: ask for fewer"
        )
    fitted = PCA(wanted, svd_solver="full").fit(rows)
    scores = fitted.transform(rows)
    facts: dict[str, Any] = {"rows": len(rows), "scikit_learn": importlib.metadata.version("scikit-learn")}
    if options.component is None:
        values = material.quantity(options.moments, options.quantity, seen)[seen.moment]
        found = correlations(scores, values)
        chosen = int(np.argmax(np.abs(found)))
        sign = float(np.sign(found[chosen])) or 1.0
        facts["correlation"] = round(abs(float(found[chosen])), 4)
    else:
        chosen = options.component
        sign = float(np.sign(fitted.components_[chosen][np.argmax(np.abs(fitted.components_[chosen]))]))
    facts |= {"component": chosen, "explained": round(float(fitted.explained_variance_ratio_[chosen]), 4)}
    vector = fitted.components_[chosen] * float(np.sqrt(fitted.explained_variance_[chosen])) * sign
    vector = -vector if options.invert else vector
    if layer is None:
        return place_vector(material, recipe, site, vector, facts, norm=options.norm)
    sized = {layer: vector * column_norms(material, layer)}
    pairs = strongest(sized, options.count)
    neurons = [neuron for _, neuron in pairs]
    return place_neurons(
        material, recipe, pairs, vector[neurons], facts, norm=options.norm, scores=sized[layer][neurons].tolist()
    )
