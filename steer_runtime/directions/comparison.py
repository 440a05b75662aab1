"""What became of the labels of one model in another: fine-tuning, pruning, distillation.

Invariant: two models are compared neuron by neuron, and only where their shapes and their tokens agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steer_runtime.directions.shares import action_share
from steer_runtime.directions.token_basis import TOP_K, Labels
from steer_runtime.errors import SteerError


def shared_tokens(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Tokens that two labels of the same value vector have in common: int [..., k], [..., k] -> int [...]."""
    return (before[..., :, None] == after[..., None, :]).any(-1).sum(-1)


def kept(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Whether half of a label or more is still there: int [..., k], [..., k] -> bool [...]."""
    return 2 * shared_tokens(before, after) >= before.shape[-1]


@torch.no_grad()
def label_survival(before: Tensor, after: Tensor, embedding: Tensor, top: int = TOP_K, block: int = 256) -> float:
    """Share of value vectors whose `top` best tokens overlap those before by half or more.

    before, after [d_model, d_ff]: a `down_proj` weight; embedding [words, d_model]: the token basis. Label as in Haon et
    al. 2025 (arXiv 2509.00328): the best rows of embedding @ column.
    """
    same = 0
    for columns in torch.arange(before.shape[1]).split(block):
        old, new = ((embedding @ w[:, columns]).topk(top, dim=0).indices.T.cpu().numpy() for w in (before, after))
        same += int(kept(old, new).sum())
    return same / before.shape[1]


@dataclass(frozen=True)
class LayerComparison:
    """One pair of layers. kept: value vectors that share half of their label or more; unchanged: that share all of it;
    lost: that share none; became_action: half of whose label or more is action tokens after, and was not before (Haon et
    al. 2025, arXiv 2509.00328, count what fine-tuning rewired for actions)."""

    before: int
    after: int
    vectors: int
    kept: int
    unchanged: int
    lost: int
    became_action: int

    @property
    def share(self) -> float:
        return self.kept / self.vectors


@dataclass(frozen=True)
class Moved:
    """A value vector whose label changed. shared: tokens both labels hold."""

    before: int
    after: int
    neuron: int
    shared: int
    label_before: tuple[str, ...]
    label_after: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """layers: each pair, in order; moved: the most moved value vectors, most moved first."""

    layers: tuple[LayerComparison, ...]
    moved: tuple[Moved, ...]

    @property
    def share(self) -> float:
        """Value vectors that kept their label, of all."""
        return sum(layer.kept for layer in self.layers) / sum(layer.vectors for layer in self.layers)


def compare(before: Labels, after: Labels, *, top: int = 20) -> Comparison:
    """Labels of two models, their layers paired in order, each label read in its own model's token basis.

    Most moved: fewest shared tokens, then the largest score of either label, since a label that said something
    clearly is the greater loss or gain. Raises SteerError: 'other_model' when the layers, widths or label sizes
    differ, 'other_vocabulary' when a token of the labels reads differently in the two.
    """
    _require_alike(before, after)
    rows = tuple(zip(before.layers, after.layers, strict=True))
    shared = shared_tokens(before.tokens, after.tokens)
    k = before.tokens.shape[-1]
    became = (action_share(after) >= 0.5) & (action_share(before) < 0.5)
    layers = tuple(
        LayerComparison(
            before=old,
            after=new,
            vectors=before.identity.d_ff,
            kept=int((2 * shared[row] >= k).sum()),
            unchanged=int((shared[row] == k).sum()),
            lost=int((shared[row] == 0).sum()),
            became_action=int(became[row].sum()),
        )
        for row, (old, new) in enumerate(rows)
    )
    clearest = np.maximum(before.scores[..., 0], after.scores[..., 0])
    changed, neurons = np.nonzero(shared < k)
    order = np.lexsort((neurons, changed, -clearest[changed, neurons], shared[changed, neurons]))[:top]
    moved = tuple(
        Moved(
            before=rows[changed[i]][0],
            after=rows[changed[i]][1],
            neuron=int(neurons[i]),
            shared=int(shared[changed[i], neurons[i]]),
            label_before=tuple(before.text(rows[changed[i]][0], int(neurons[i]))),
            label_after=tuple(after.text(rows[changed[i]][1], int(neurons[i]))),
        )
        for i in order
    )
    return Comparison(layers, moved)


def _require_alike(before: Labels, after: Labels) -> None:
    sizes = [
        (len(labels.layers), labels.identity.d_model, labels.identity.d_ff, labels.tokens.shape[-1])
        for labels in (before, after)
    ]
    if sizes[0] != sizes[1]:
        raise SteerError(
            "other_model",
            f"(layers, d_model, d_ff, tokens of a label) are {sizes[0]} before and {sizes[1]} after: expected the same; "
            "name as many layers of each, or compare other models",
        )
    known = _texts(before, before.tokens) | _texts(before, after.tokens)
    there = _texts(after, before.tokens) | _texts(after, after.tokens)
    differ = sorted(token for token in known.keys() & there.keys() if known[token] != there[token])
    if differ:
        raise SteerError(
            "other_vocabulary",
            f"token {differ[0]} reads {known[differ[0]][:40]!r} before and {there[differ[0]][:40]!r} after: expected "
            "models with one tokenizer",
        )


def _texts(labels: Labels, tokens: np.ndarray) -> dict[int, str]:
    """Texts of the tokens that are words here: an action token may stand where the other model has a word."""
    basis = labels.basis
    words: Sequence[int] = [int(t) for t in np.unique(tokens) if t < min(basis.vocab, len(basis.tokenizer))]
    return {token: basis.text(token) for token in words if token not in basis.action_values}
