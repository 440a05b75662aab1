"""What every finder starts from and ends in: a recipe, and the Direction that is written by it.

Invariant: a direction made here carries the recipe's facts, the finder's own, the date and the versions it was made with.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from steer_runtime.directions.direction import NO_LICENCE, Direction, Neurons, Operation
from steer_runtime.directions.token_basis import TowerIdentity
from steer_runtime.errors import SteerError
from steer_runtime.types import ALL_ROLES, Role

OPENVLA_ALPHA = 4.0
"""The seed's override value for OpenVLA; it used 10 for pi0-FAST (Haon et al., CoRL 2025, arXiv 2509.00328)."""


@dataclass(frozen=True)
class Recipe:
    """How a direction is to be written, whatever finds it.

    date: ISO date of making it, given by the caller so that the same inputs give the same hash.
    op, alpha, span: None for the finder's own default. alpha: activation, summand, factor or upper bound of each neuron
    (see Neurons); for a dense direction the factor of its vector. low: lower bound, for `clamp` only.
    facts: more for the provenance. licence: SPDX expression.
    """

    name: str
    date: str
    op: Operation | None = None
    alpha: float | None = None
    low: float | None = None
    span: frozenset[Role] | None = None
    max_strength: float = 1.0
    facts: Mapping[str, Any] = field(default_factory=dict)
    licence: str = NO_LICENCE


def of_neurons(
    identity: TowerIdentity,
    recipe: Recipe,
    pairs: Sequence[tuple[int, int]],
    facts: Mapping[str, Any],
    *,
    name: str | None = None,
) -> Direction:
    """(layer, neuron) pairs that are all written alike, by default overridden with alpha 4 everywhere.

    Raises SteerError: 'bad_operation', 'neuron_out_of_range', and what Direction refuses.
    """
    op = recipe.op or "override"
    if op == "ablate" and recipe.alpha is not None:
        raise SteerError("bad_operation", f"direction {name or recipe.name!r} ablates, which writes 0: drop alpha")
    alpha = 0.0 if op == "ablate" else OPENVLA_ALPHA if recipe.alpha is None else recipe.alpha
    size = len(pairs)
    too_big = [p for p in pairs if not all(0 <= n < 2**31 for n in p)]
    if too_big:
        raise SteerError(
            "neuron_out_of_range",
            f"neuron {too_big[0][0]}:{too_big[0][1]} is out of range: expected layer 0 to {identity.layers - 1} and "
            f"neuron 0 to {identity.d_ff - 1}",
        )
    low = None if recipe.low is None else _filled(size, recipe.low)
    neurons = Neurons(
        layer=np.array([layer for layer, _ in pairs], np.int32),
        neuron=np.array([neuron for _, neuron in pairs], np.int32),
        alpha=_filled(size, alpha),
        low=low,
    )
    span = ALL_ROLES if recipe.span is None else recipe.span
    return written(identity, recipe, {**facts, "alpha": alpha}, op=op, span=span, neurons=neurons, name=name)


def written(
    identity: TowerIdentity, recipe: Recipe, facts: Mapping[str, Any], *, name: str | None = None, **form: Any
) -> Direction:
    """The Direction of a recipe. form: op, span, and neurons or dense, as in Direction. Raises what Direction refuses."""
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers", "numpy")}
    return Direction(
        name=name or recipe.name,
        tower=identity.tower,
        model_hash=identity.model_hash,
        layers=identity.layers,
        d_model=identity.d_model,
        d_ff=identity.d_ff,
        max_strength=recipe.max_strength,
        provenance={**recipe.facts, **facts, "date": recipe.date, "versions": versions},
        licence=recipe.licence,
        **form,
    )


def _filled(size: int, value: float) -> np.ndarray:
    # A value beyond float32 becomes infinite here, and Direction refuses what is not finite.
    with np.errstate(over="ignore"):
        return np.full(size, value, np.float32)
