"""`word`: a dense vector of word embeddings, mean of some words minus mean of others.

Source: token-basis arithmetic after Geva et al. (2022, arXiv 2203.14680).
Invariant: the vector is decided by the token basis and the words alone; no observation is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from steer_runtime.directions.direction import Direction
from steer_runtime.directions.finders.recipe import Recipe, written
from steer_runtime.directions.token_basis import TokenBasis, TowerIdentity
from steer_runtime.errors import SteerError


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
    return written(
        identity,
        recipe,
        facts,
        op=recipe.op or "add",
        span=frozenset({"text"}) if recipe.span is None else recipe.span,
        dense={0: (vector * alpha).cpu().numpy().astype(np.float32)},
    )


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
