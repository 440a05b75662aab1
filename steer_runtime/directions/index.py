"""Which value vectors say what: search in labels.

Invariant: an answer names value vectors by (layer, neuron) and shows the label it was found by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steer_runtime.directions.token_basis import Labels, TokenBasis
from steer_runtime.errors import SteerError


@dataclass(frozen=True)
class Match:
    """A value vector whose label carries the words. rank: place of its best matching token in the label, 0 first;
    score: projection of that token; matches: tokens of the label that match."""

    layer: int
    neuron: int
    rank: int
    score: float
    matches: int
    label: tuple[str, ...]


def search(labels: Labels, words: Sequence[str], *, against: Sequence[str] = ()) -> list[Match]:
    """Value vectors whose label holds one of `words` and none of `against`, best first.

    A token matches a word when they are equal but for case and leading space. Order: number of matching tokens, then
    projection score of the best one. Raises SteerError('unknown_word') for a word that no single token reads.
    """
    if not words:
        raise SteerError("unknown_word", "no words were given to search for: expected one or more, such as 'up'")
    hit = np.isin(labels.tokens, _tokens(labels.basis, words))
    mixed = np.isin(labels.tokens, _tokens(labels.basis, against)).any(axis=-1)
    count = np.where(mixed, 0, hit.sum(axis=-1))
    rows, neurons = np.nonzero(count)
    ranks = hit[rows, neurons].argmax(axis=-1)
    scores = labels.scores[rows, neurons, ranks]
    order = np.lexsort((neurons, rows, -scores, -count[rows, neurons]))
    return [
        Match(
            layer=labels.layers[rows[i]],
            neuron=int(neurons[i]),
            rank=int(ranks[i]),
            score=float(scores[i]),
            matches=int(count[rows[i], neurons[i]]),
            label=tuple(labels.text(labels.layers[rows[i]], int(neurons[i]))),
        )
        for i in order
    ]


def _tokens(basis: TokenBasis, words: Sequence[str]) -> np.ndarray:
    return np.array([token for word in words for token in basis.tokens_of(word)], np.int32)
