"""Which value vectors say what: search by words, by likeness to words, by contrast.

Invariant: an answer names value vectors by (layer, neuron) and shows the label it was found by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.stats import beta

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


def negated(labels: Labels) -> Labels | None:
    """The labels of -w for every value vector w: what it says with an activation below zero. None without low ends."""
    if labels.low_tokens is None or labels.low_scores is None:
        return None
    return replace(
        labels,
        tokens=labels.low_tokens,
        scores=-labels.low_scores,
        low_tokens=labels.tokens,
        low_scores=-labels.scores,
    )


@dataclass(frozen=True)
class Neighbour:
    """A value vector like some words. sign: -1 when its low end is, so that an activation below zero says them;
    cosine in [-1, 1]; projection: in units of the residual stream, contrast only; matches: tokens of that end that are
    the words asked for by name; label: that end; other: the other end, empty where labels have none."""

    layer: int
    neuron: int
    sign: int
    cosine: float
    projection: float | None
    matches: int
    label: tuple[str, ...]
    other: tuple[str, ...]


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
    words of the mean of u(t) over each word's tokens. Each end of a label stands for itself; an end that holds one of
    `against` is left out. Raises SteerError('unknown_word').
    """
    query = space.words(words)
    ends = [(sign, end) for sign, end in ((1, labels), (-1, negated(labels))) if end is not None]
    cosines = np.stack([[space.nearness(rows, query) for rows in end.tokens] for _, end in ends])
    said = [_says(end, says, against) for _, end in ends]
    says_it, allowed = np.stack([hits for hits, _ in said]), np.stack([free for _, free in said])
    return [
        _neighbour(
            ends[i][1], row, neuron, ends[i][0], float(cosines[i, row, neuron]), None, int(says_it[i, row, neuron])
        )
        for i, row, neuron in _best(cosines, says_it, allowed, top)
    ]


@dataclass(frozen=True)
class Contrast:
    """Both ends of a contrast, largest projection first.

    chance: the largest cosine that as many random vectors of this width reach, in the median: the 0.5^(1/N) quantile of
    2 B - 1 with B of the beta distribution of (d_model - 1) / 2 twice. What lies below it is not told from chance.
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
                1,
                float(cosines[row, neuron]),
                float(projections[row, neuron]),
                int(says_it[row, neuron]),
            )
            for row, neuron in _best(sign * projections, says_it, pick, top)
        )

    half = (len(direction) - 1) / 2
    chance = 2 * float(beta.ppf(0.5 ** (1 / projections.size), half, half)) - 1
    return Contrast(ends(1), ends(-1), chance)


def _says(labels: Labels, says: Sequence[str], against: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each label that are one of `says`, and whether it holds none of `against`: int, bool [layers, d_ff]."""
    hits = np.isin(labels.tokens, _tokens(labels.basis, says)).sum(axis=-1)
    mixed = np.isin(labels.tokens, _tokens(labels.basis, against)).any(axis=-1)
    return hits, np.logical_not(mixed)


def _best(scores: np.ndarray, says: np.ndarray, allowed: np.ndarray, top: int) -> list[tuple[int, ...]]:
    """Places of the largest scores, those that say a word first; equal ones in the order of their places."""
    places = np.nonzero(allowed)
    order = np.lexsort((*places[::-1], -scores[places], says[places] == 0))[:top]
    return [tuple(int(place[i]) for place in places) for i in order]


def _neighbour(
    labels: Labels, row: int, neuron: int, sign: int, cosine: float, projection: float | None, matches: int
) -> Neighbour:
    layer = labels.layers[row]
    other = () if labels.low_tokens is None else tuple(labels.low_text(layer, neuron))
    return Neighbour(layer, neuron, sign, cosine, projection, matches, tuple(labels.text(layer, neuron)), other)


def _mean_embedding(basis: TokenBasis, words: Sequence[str]) -> torch.Tensor:
    rows = [basis.unembedding[list(basis.tokens_of(word))].to("cpu", torch.float32).mean(0) for word in words]
    return torch.stack(rows).mean(0)


def _tokens(basis: TokenBasis, words: Sequence[str]) -> np.ndarray:
    return np.array([token for word in words for token in basis.tokens_of(word)], np.int32)
