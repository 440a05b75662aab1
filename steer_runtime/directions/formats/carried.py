"""A direction that travels in another format with its whole card, and what becomes of a file without one.

Invariant: a file of ours comes back as the very direction it was, hash and all, or is refused; a file without a card
becomes a direction of the model that it is imported for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from steer_runtime.directions.card import direction_of, encode, parse_card
from steer_runtime.directions.direction import NO_LICENCE, Direction
from steer_runtime.directions.finders.recipe import Recipe
from steer_runtime.directions.token_basis import TowerIdentity
from steer_runtime.errors import SteerError

CARD_KEY = "steer.card"
"""Metadata key under which our exports carry the card; other programs read over it."""


def card_text(direction: Direction) -> str:
    """The card for a file's metadata. Raises SteerError('bad_provenance')."""
    return encode(direction, indent=None).decode()


def with_card(
    card: str, arrays: Mapping[str, np.ndarray], identity: TowerIdentity, recipe: Recipe, what: str
) -> Direction:
    """The direction of a carried card. Everything is in the card, so the recipe must ask for nothing.

    Raises SteerError: 'bad_card', 'bad_file', 'hash_mismatch', 'other_model', 'bad_option'.
    """
    raw = parse_card(card.encode("utf-8", "surrogatepass"), what)
    direction = direction_of(raw, arrays, what)
    sizes = (identity.layers, identity.d_model, identity.d_ff)
    direction.require_model(identity.model_hash, identity.tower, sizes)
    asked = {
        "--name": recipe.name not in ("", direction.name),
        "--alpha": recipe.alpha is not None,
        "--op": recipe.op is not None,
        "--span": recipe.span is not None,
        "--max-strength": recipe.max_strength != 1.0,
        "--licence": recipe.licence != NO_LICENCE,
    }
    given = [option for option, is_given in asked.items() if is_given]
    if given:
        raise SteerError(
            "bad_option", f"{what!r} carries the card of {direction.id!r}, which says it all: drop {', '.join(given)}"
        )
    return direction


def source_facts(path: Path, content: bytes, form: str) -> dict[str, Any]:
    """Provenance of an imported file: which file, by its name and content."""
    return {"finder": "import", "format": form, "file": path.name, "sha256": hashlib.sha256(content).hexdigest()}


def dense_form(
    vectors: Mapping[int, np.ndarray], identity: TowerIdentity, recipe: Recipe, what: str
) -> dict[int, np.ndarray]:
    """Site -> float32 [d_model], times the recipe's alpha (default 1). Raises SteerError: 'other_model', 'bad_operation'."""
    if recipe.low is not None:
        raise SteerError("bad_operation", f"{what!r} holds dense vectors, which have no bounds: drop `low`")
    for site, vector in vectors.items():
        if vector.shape != (identity.d_model,):
            raise SteerError(
                "other_model",
                f"{what!r} holds {list(vector.shape)} at residual site {site}: tower {identity.tower!r} has vectors of "
                f"{identity.d_model}; it was made for another model",
            )
    # A product beyond float32 becomes infinite here, and Direction refuses what is not finite.
    with np.errstate(over="ignore"):
        alpha = np.float32(1.0 if recipe.alpha is None else recipe.alpha)
        return {site: np.asarray(vector * alpha, np.float32) for site, vector in vectors.items()}
