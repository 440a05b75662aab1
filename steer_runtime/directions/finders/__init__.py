"""Ways to find a direction, one module a finder, all behind `find` and all ending in the same kind of Direction.

Invariant: the provenance of what `find` returns names the finder and its options, so that the same material finds it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from steer_runtime.directions.direction import Direction
from steer_runtime.directions.finders import action, attribution, contrast, pca, probe, random, snmf, token, word
from steer_runtime.directions.finders.material import Material
from steer_runtime.directions.finders.random import controls
from steer_runtime.directions.finders.recipe import OPENVLA_ALPHA, Recipe, of_neurons
from steer_runtime.directions.finders.token import CLUSTER_SIZE, from_neurons, from_words
from steer_runtime.directions.finders.word import dense_from_words
from steer_runtime.directions.options import OPTIONS, FinderOptions, options_for
from steer_runtime.directions.towers import require_span
from steer_runtime.errors import SteerError, nearest

__all__ = [
    "CLUSTER_SIZE",
    "FINDERS",
    "OPENVLA_ALPHA",
    "Finder",
    "Material",
    "Recipe",
    "controls",
    "dense_from_words",
    "find",
    "find_axis",
    "from_neurons",
    "from_words",
    "of_neurons",
    "options_for",
    "recipe_key",
]


@dataclass(frozen=True)
class Finder:
    """One way to find a direction. find(material, recipe, options) -> Direction; its docstring is the formula."""

    name: str
    options: type[FinderOptions]
    find: Callable[[Material, Recipe, Any], Direction]


_FIND: Mapping[str, Callable[[Material, Recipe, Any], Direction]] = {
    "token": token.find,
    "neurons": token.find_named,
    "word": word.find,
    "action": action.find,
    "contrast": contrast.find,
    "attribution": attribution.find,
    "probe": probe.find,
    "snmf": snmf.find,
    "pca": pca.find,
    "random": random.find,
}
FINDERS: Mapping[str, Finder] = {name: Finder(name, OPTIONS[name], find) for name, find in _FIND.items()}
"""Every finder by name."""


def find(finder: str, material: Material, recipe: Recipe, options: FinderOptions) -> Direction:
    """What a finder finds, with finder, options and `recipe_key` in its provenance.

    Raises SteerError: 'unknown_finder', 'bad_span' for a span of which the tower has no token, 'dead_layer', and what the
    finder refuses.
    """
    if finder not in FINDERS:
        raise SteerError("unknown_finder", f"finder {finder[:40]!r} is not known: {nearest(finder, FINDERS)}")
    require_span(material.tower, recipe.span)
    facts = {
        **recipe.facts,
        "finder": finder,
        "options": told(material, options),
        "recipe": recipe_key(finder, material, recipe, options),
    }
    direction = FINDERS[finder].find(material, replace(recipe, facts=facts), options)
    require_span(material.tower, direction.span)
    direction.require_reaches(material.tower)
    return direction


def find_axis(finder: str, material: Material, recipe: Recipe, options: FinderOptions) -> tuple[Direction, Direction]:
    """(NAME-negative, NAME-positive): what a finder finds and its opposite. Raises as `find`, and 'no_opposite'."""
    other = options.opposite()
    positive = find(finder, material, replace(recipe, name=f"{recipe.name}-positive"), options)
    return find(finder, material, replace(recipe, name=f"{recipe.name}-negative"), other), positive


def told(material: Material, options: FinderOptions) -> dict[str, Any]:
    """Options as JSON data; a file of moments by its name and content, never by a path of this machine."""
    out = options.model_dump(mode="json")
    moments = getattr(options, "moments", None)
    if moments is not None:
        out["moments"] = {"file": moments.name, "sha256": material.digest(moments)}
    return out


def recipe_key(finder: str, material: Material, recipe: Recipe, options: FinderOptions) -> str:
    """16 hex digits of everything that decides a direction, the date and the versions left out."""
    identity = material.identity
    decided = {
        "finder": finder,
        "options": told(material, options),
        "tower": identity.tower,
        "model": identity.model_hash,
        "name": recipe.name,
        "op": recipe.op,
        "alpha": recipe.alpha,
        "low": recipe.low,
        "span": None if recipe.span is None else sorted(recipe.span),
        "max_strength": recipe.max_strength,
        "licence": recipe.licence,
    }
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]
