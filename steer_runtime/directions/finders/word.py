"""`word`: the token basis itself as a direction, mean embedding of some words minus that of others.

Source: reading and writing residual vectors in the token basis, after Geva et al. (2022, arXiv 2203.14680) and Haon et al.
(CoRL 2025, arXiv 2509.00328); no activation is looked at.
Invariant: the vector is decided by the token basis and the words alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from steer_runtime.directions.direction import Direction
from steer_runtime.directions.finders.material import Material
from steer_runtime.directions.finders.placing import chosen_site, place_onto, place_vector
from steer_runtime.directions.finders.recipe import Recipe, written
from steer_runtime.directions.options import WordOptions
from steer_runtime.directions.token_basis import TokenBasis, TowerIdentity
from steer_runtime.errors import SteerError


def find(material: Material, recipe: Recipe, options: WordOptions) -> Direction:
    """v = mean_w e(w) - mean_a e(a) over words w and words a against, e(w) the mean embedding of the word's tokens.

    Dense: norm ||v|| scaled to `norm` mean word norms, added at `site` (text tokens). Onto a layer: as `place_onto`, with all of
    its neurons or the `count` strongest. Raises SteerError as `difference`, `place_vector`, `place_onto`, and
    'no_token_basis' in a tower without words.
    """
    onto = options.onto_layer
    site = chosen_site(material, options.site if onto is None else onto + 1)
    lead = " " if options.spaced else ""
    positive, negative = ([lead + word for word in words] for words in (options.words, options.against))
    vector, tokens = difference(material.basis, positive, negative, material.table(site))
    if not vector.any():
        raise SteerError("no_direction", f"the words of direction {recipe.name!r} cancel out: give others on each side")
    facts = {"tokens": {word: list(ids) for word, ids in tokens.items()}}
    if onto is None:
        return place_vector(material, recipe, site, vector.numpy(), facts, norm=options.norm)
    wanted = vector.numpy().astype(np.float64)
    return place_onto(material, recipe, wanted, onto, facts, norm=options.norm, count=options.count)


def difference(
    basis: TokenBasis, positive: Sequence[str], negative: Sequence[str], table: torch.Tensor
) -> tuple[torch.Tensor, Mapping[str, tuple[int, ...]]]:
    """(`mean_of` the positive words minus that of the negative ones, word -> its tokens). Raises as `mean_of`."""
    (high, tokens), (low, others) = mean_of(basis, positive, table), mean_of(basis, negative, table)
    return high - low, {**tokens, **others}


def mean_of(
    basis: TokenBasis, words: Sequence[str], table: torch.Tensor
) -> tuple[torch.Tensor, Mapping[str, tuple[int, ...]]]:
    """(float32 [d_model], word -> its tokens): mean over words of their rows of `table` [vocab, d_model].

    A bare word stands for its tokens with and without a leading space, whichever exist; " word" for the one with it. A word
    is the mean of its tokens, so that each word weighs the same. Raises SteerError('unknown_word') for no single token.
    """
    tokens = {word: _single_tokens(basis, word) for word in words}
    rows = [table[list(tokens[word])].detach().to("cpu", torch.float32).mean(0) for word in words]
    return torch.stack(rows).mean(0), tokens


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

    embedding: input embedding [vocab, d_model], by default the unembedding (right for tied weights). Default alpha 1.
    Raises SteerError: 'unknown_word' for a word of several tokens, 'bad_token_basis' for another width, 'no_direction'
    when the two means are equal.
    """
    table = basis.unembedding if embedding is None else embedding.detach()
    if table.ndim != 2 or table.shape[1] != identity.d_model:
        raise SteerError(
            "bad_token_basis",
            f"embedding is {list(table.shape)}: expected [vocab, {identity.d_model}], as wide as the tower",
        )
    if recipe.low is not None:
        raise SteerError("bad_operation", f"dense direction {recipe.name!r} has no bounds: drop `low`")
    if not positive or not negative:
        raise SteerError("unknown_word", f"direction {recipe.name!r} needs words on both sides: give some of each")
    vector, tokens = difference(basis, positive, negative, table)
    if not vector.any():
        raise SteerError(
            "no_direction",
            f"the words of direction {recipe.name!r} cancel out: expected other words on each side",
        )
    alpha = 1.0 if recipe.alpha is None else recipe.alpha
    facts = {
        "finder": "word",
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
