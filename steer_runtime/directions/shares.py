"""How many value vectors of each layer say something, and how many say an action.

Invariant: the counts of a layer add up to its value vectors; what chance alone gives stands beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from steer_runtime.directions.similarity import SEMANTIC_QUANTILE, WordSpace
from steer_runtime.directions.token_basis import Labels

BY_CHANCE = 1 - SEMANTIC_QUANTILE
"""Share of random directions that count as semantic."""


@dataclass(frozen=True)
class LayerShare:
    """One layer. action: value vectors half of whose label or more are action tokens; semantic: others with a label
    more coherent than chance; action_tokens: share of action tokens among all tokens of the layer's labels.
    examples: neurons of the most coherent semantic labels, most coherent first; action_examples: of the action ones.
    """

    layer: int
    vectors: int
    semantic: int
    action: int
    action_tokens: float
    examples: tuple[int, ...]
    action_examples: tuple[int, ...]

    @property
    def semantic_share(self) -> float:
        return self.semantic / self.vectors

    @property
    def action_share(self) -> float:
        return self.action / self.vectors


def action_share(labels: Labels) -> np.ndarray:
    """Share of action tokens in each label: float [layers, d_ff] (Haon et al. 2025, arXiv 2509.00328, count these)."""
    return np.isin(labels.tokens, list(labels.basis.action_values)).mean(axis=-1)


def is_semantic(labels: Labels, space: WordSpace, threshold: float) -> np.ndarray:
    """Labels that are no action and whose coherence exceeds `threshold` (`WordSpace.coherence_by_chance`):
    bool [layers, d_ff]."""
    coherent = np.stack([space.coherence(rows) > threshold for rows in labels.tokens])
    return coherent & (action_share(labels) < 0.5)


def shares(labels: Labels, space: WordSpace, threshold: float, *, examples: int = 8) -> list[LayerShare]:
    """The shares of each layer of `labels`, in its order."""
    action = action_share(labels)
    semantic = is_semantic(labels, space, threshold)
    out = []
    for row, layer in enumerate(labels.layers):
        coherence = np.where(semantic[row], space.coherence(labels.tokens[row]), -np.inf)
        out.append(
            LayerShare(
                layer=layer,
                vectors=labels.identity.d_ff,
                semantic=int(semantic[row].sum()),
                action=int((action[row] >= 0.5).sum()),
                action_tokens=float(action[row].mean()),
                examples=_first(coherence, min(examples, int(semantic[row].sum()))),
                action_examples=_first(action[row], min(examples, int((action[row] >= 0.5).sum()))),
            )
        )
    return out


def _first(values: np.ndarray, count: int) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argsort(-values, kind="stable")[:count])
