"""Ways to find a direction: by the words of its labels, by neuron, by word embeddings.

Invariant: a finder returns a Direction whose provenance is enough to find it again (finder, words, labels, scores).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from steer_runtime.directions.direction import Direction, Neurons, Operation
from steer_runtime.directions.index import search
from steer_runtime.directions.token_basis import Labels, TokenBasis, TowerIdentity
from steer_runtime.errors import SteerError
from steer_runtime.types import ALL_ROLES, Role

OPENVLA_ALPHA = 4.0
"""The seed's override value for OpenVLA; it used 10 for pi0-FAST (Haon et al., CoRL 2025, arXiv 2509.00328)."""
CLUSTER_SIZE = 20
"""The largest cluster of the seed holds 20 neurons."""


@dataclass(frozen=True)
class Recipe:
    """How a direction is to be written, whatever finds it.

    date: ISO date of making it, given by the caller so that the same inputs give the same hash.
    op, alpha, span: None for the finder's own default. alpha: activation, summand, factor or upper bound of each neuron
    (see Neurons); for a dense direction the factor of its vector. low: lower bound, for `clamp` only.
    facts: more for the provenance.
    """

    name: str
    date: str
    op: Operation | None = None
    alpha: float | None = None
    low: float | None = None
    span: frozenset[Role] | None = None
    max_strength: float = 1.0
    facts: Mapping[str, Any] = field(default_factory=dict)


def from_words(
    labels: Labels, recipe: Recipe, words: Sequence[str], *, against: Sequence[str] = (), count: int = CLUSTER_SIZE
) -> Direction:
    """The `count` best matches of `search` as one direction (by default override at alpha 4).

    Raises SteerError: as `search`, and 'no_match' when no label carries the words.
    """
    if count < 1:
        raise SteerError("no_match", f"{count} neurons were asked for direction {recipe.name!r}: expected 1 or more")
    found = search(labels, words, against=against)[:count]
    if not found:
        without = f" and none of {', '.join(map(repr, against))}" if against else ""
        raise SteerError(
            "no_match",
            f"no value vector of the {len(labels.layers)} searched layers has {', '.join(map(repr, words))} in its "
            f"label{without}: try more words, more layers or a dense direction",
        )
    facts = {
        "finder": "from_words",
        "words": list(words),
        "against": list(against),
        "layers_searched": list(labels.layers),
        "neurons": [_fact(labels, m.layer, m.neuron) | {"matches": m.matches, "score": m.score} for m in found],
    }
    return of_neurons(labels.identity, recipe, [(m.layer, m.neuron) for m in found], facts)


def from_neurons(
    identity: TowerIdentity, recipe: Recipe, neurons: Sequence[tuple[int, int]], *, labels: Labels | None = None
) -> Direction:
    """The given (layer, neuron) pairs as one direction; `labels`, where at hand, go into the provenance.

    Raises SteerError: 'layer_out_of_range', 'neuron_out_of_range', and what Direction refuses.
    """
    facts: dict[str, Any] = {"finder": "from_neurons"}
    direction = of_neurons(identity, recipe, neurons, facts)
    if labels is None:
        return direction
    # Labels are looked up only after Direction has refused what is out of range, in its own words.
    facts["neurons"] = [_fact(labels, layer, neuron) for layer, neuron in neurons]
    return of_neurons(identity, recipe, neurons, facts)


def dense_from_words(
    identity: TowerIdentity,
    recipe: Recipe,
    basis: TokenBasis,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    embedding: torch.Tensor | None = None,
) -> Direction:
    """Difference of word embeddings, alpha * (mean(positive) - mean(negative)), added to the text at residual site 0.

    A bare word stands for its tokens with and without a leading space, whichever exist; " word" for the one with it.
    A word is the mean of its tokens, so that each word weighs the same. embedding: input embedding [vocab, d_model],
    by default the unembedding (right for tied weights). Default alpha 1, span text.
    Raises SteerError: 'unknown_word' for a word of several tokens, 'bad_token_basis' for another width, 'no_direction'
    when the two means are equal.
    """
    table = basis.unembedding if embedding is None else embedding.detach()
    if table.ndim != 2 or table.shape[1] != identity.d_model:
        raise SteerError(
            "bad_token_basis",
            f"embedding is {list(table.shape)}: expected [vocab, {identity.d_model}], as wide as the tower",
        )
    tokens = {word: _single_tokens(basis, word) for word in (*positive, *negative)}
    if recipe.low is not None:
        raise SteerError("bad_operation", f"dense direction {recipe.name!r} has no bounds: drop `low`")
    if not positive or not negative:
        raise SteerError("unknown_word", f"direction {recipe.name!r} needs words on both sides: give some of each")

    def mean(words: Sequence[str]) -> torch.Tensor:
        return torch.stack([table[list(tokens[word])].float().mean(0) for word in words]).mean(0)

    vector = mean(positive) - mean(negative)
    if not vector.any():
        raise SteerError(
            "no_direction",
            f"the words of direction {recipe.name!r} cancel out: expected other words on each side",
        )
    alpha = 1.0 if recipe.alpha is None else recipe.alpha
    facts = {
        "finder": "dense_from_words",
        "positive": list(positive),
        "negative": list(negative),
        "tokens": {word: list(ids) for word, ids in tokens.items()},
        "alpha": alpha,
        "norm": float(vector.norm()) * alpha,
    }
    return _direction(
        identity,
        recipe,
        facts,
        op=recipe.op or "add",
        span=frozenset({"text"}) if recipe.span is None else recipe.span,
        dense={0: (vector * alpha).cpu().numpy().astype(np.float32)},
    )


def of_neurons(
    identity: TowerIdentity,
    recipe: Recipe,
    pairs: Sequence[tuple[int, int]],
    facts: dict[str, Any],
    *,
    name: str | None = None,
) -> Direction:
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
    return _direction(identity, recipe, facts | {"alpha": alpha}, op=op, span=span, neurons=neurons, name=name)


def _filled(size: int, value: float) -> np.ndarray:
    # A value beyond float32 becomes infinite here, and Direction refuses what is not finite.
    with np.errstate(over="ignore"):
        return np.full(size, value, np.float32)


def _direction(
    identity: TowerIdentity, recipe: Recipe, facts: dict[str, Any], *, name: str | None = None, **form: Any
) -> Direction:
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
        **form,
    )


def _fact(labels: Labels, layer: int, neuron: int) -> dict[str, Any]:
    scores = [round(float(s), 4) for s in labels.scores[labels.row(layer), neuron]]
    return {"layer": layer, "neuron": neuron, "label": labels.text(layer, neuron), "label_scores": scores}


def _single_tokens(basis: TokenBasis, word: str) -> tuple[int, ...]:
    """Tokens that are exactly `word` (case kept): " word" only with its space, "word" in both forms."""
    forms = [word] if word.startswith(" ") else [word, f" {word}"]
    encoded = [basis.tokenizer.encode(form, add_special_tokens=False) for form in forms]
    # A tokenizer with an unknown-token answers one token for any word: what it reads back tells.
    single = [ids[0] for ids in encoded if len(ids) == 1 and basis.text(ids[0]).strip() == word.strip()]
    found = tuple(dict.fromkeys(single))
    if not found or not word.strip():
        # Names the nearest tokens where no token reads the word at all.
        basis.tokens_of(word)
        raise SteerError(
            "unknown_word",
            f"{word[:40]!r}, spelt so, is not one token of this vocabulary: choose another form or word",
        )
    return found
