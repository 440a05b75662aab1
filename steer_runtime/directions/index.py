"""Which value vectors say what: search by words, by likeness to words, by contrast.

Invariant: an answer names value vectors by (layer, neuron) and shows the label it was found by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from steer_runtime.directions.similarity import WordSpace
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


@dataclass(frozen=True)
class Neighbour:
    """A value vector like some words. cosine in [-1, 1]; projection: in units of the residual stream, contrast only;
    matches: tokens of the label that are the words asked for by name."""

    layer: int
    neuron: int
    cosine: float
    projection: float | None
    matches: int
    label: tuple[str, ...]


def near(
    labels: Labels,
    space: WordSpace,
    words: Sequence[str],
    *,
    top: int,
    says: Sequence[str] = (),
    against: Sequence[str] = (),
) -> list[Neighbour]:
    """The `top` value vectors whose labels are nearest in meaning to `words`; those that say one of `says` come first.

    cosine of l and q, both of length 1 in `space`: l is the mean of u(t) over the label's tokens, q the mean over the
    words of the mean of u(t) over each word's tokens. Labels that hold one of `against` are left out.
    Raises SteerError('unknown_word').
    """
    cosines = np.stack([space.nearness(rows, space.words(words)) for rows in labels.tokens])
    says_it, allowed = _says(labels, says, against)
    return [
        _neighbour(labels, row, neuron, float(cosines[row, neuron]), None, int(says_it[row, neuron]))
        for row, neuron in _best(cosines, says_it, allowed, top)
    ]


@dataclass(frozen=True)
class Contrast:
    """Both ends of a contrast, largest projection first.

    chance: about the largest cosine that as many random vectors of this width would reach, sqrt(2 ln N / d_model):
    what lies below it is not told from chance.
    """

    plus: tuple[Neighbour, ...]
    minus: tuple[Neighbour, ...]
    chance: float


def contrast(
    labels: Labels,
    vectors: Callable[[int], torch.Tensor],
    plus: Sequence[str],
    minus: Sequence[str],
    *,
    top: int,
    says: Sequence[str] = (),
    against: Sequence[str] = (),
) -> Contrast:
    """The `top` value vectors that point from `minus` to `plus` most, and the `top` that point the other way.

    projection = w . d / |d| with d = mean embedding of `plus` - mean embedding of `minus`, each word the mean of its
    tokens: what one unit of activation adds along the dense direction of the same words. vectors: layer ->
    down_proj weight [d_model, d_ff]. `says` and `against` as in `near`.
    Raises SteerError: 'unknown_word', 'no_direction', 'not_finite'.
    """
    if not plus or not minus:
        raise SteerError("unknown_word", "a contrast needs words on both sides: give some to move to and some to leave")
    direction = _mean_embedding(labels.basis, plus) - _mean_embedding(labels.basis, minus)
    if not direction.any():
        raise SteerError("no_direction", "the words of both sides cancel out: expected other words on each side")
    direction = direction / direction.norm()
    projections = np.empty(labels.tokens.shape[:2], np.float32)
    cosines = np.empty_like(projections)
    for row, layer in enumerate(labels.layers):
        weight = vectors(layer).detach().to("cpu", torch.float32)
        projections[row] = (direction @ weight).numpy()
        cosines[row] = projections[row] / weight.norm(dim=0).clamp_min(1e-12).numpy()
    if not np.isfinite(projections).all():
        raise SteerError("not_finite", "the value vectors hold NaN or infinite weights; load the policy again")
    says_it, allowed = _says(labels, says, against)

    def ends(sign: int) -> tuple[Neighbour, ...]:
        pick = allowed & (sign * projections > 0)
        return tuple(
            _neighbour(
                labels,
                row,
                neuron,
                float(cosines[row, neuron]),
                float(projections[row, neuron]),
                int(says_it[row, neuron]),
            )
            for row, neuron in _best(sign * projections, says_it, pick, top)
        )

    chance = math.sqrt(2 * math.log(max(projections.size, 2)) / len(direction))
    return Contrast(ends(1), ends(-1), chance)


def _says(labels: Labels, says: Sequence[str], against: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each label that are one of `says`, and whether it holds none of `against`: int, bool [layers, d_ff]."""
    hits = np.isin(labels.tokens, _tokens(labels.basis, says)).sum(axis=-1)
    mixed = np.isin(labels.tokens, _tokens(labels.basis, against)).any(axis=-1)
    return hits, np.logical_not(mixed)


def _best(scores: np.ndarray, says: np.ndarray, allowed: np.ndarray, top: int) -> list[tuple[int, int]]:
    rows, neurons = np.nonzero(allowed)
    order = np.lexsort((neurons, rows, -scores[rows, neurons], says[rows, neurons] == 0))[:top]
    return [(int(rows[i]), int(neurons[i])) for i in order]


def _neighbour(
    labels: Labels, row: int, neuron: int, cosine: float, projection: float | None, matches: int
) -> Neighbour:
    layer = labels.layers[row]
    return Neighbour(layer, neuron, cosine, projection, matches, tuple(labels.text(layer, neuron)))


def _mean_embedding(basis: TokenBasis, words: Sequence[str]) -> torch.Tensor:
    rows = [basis.unembedding[list(basis.tokens_of(word))].to("cpu", torch.float32).mean(0) for word in words]
    return torch.stack(rows).mean(0)


def _tokens(basis: TokenBasis, words: Sequence[str]) -> np.ndarray:
    return np.array([token for word in words for token in basis.tokens_of(word)], np.int32)
