"""Labels and words compared as directions of the token basis.

Plain cosines of token embeddings say little: all embeddings share a mean, and rare tokens lie along a few common
directions. So both are taken out first ("all but the top", Mu & Viswanath 2018, arXiv 1702.01417): with mu the mean of
the word rows of the unembedding E and U their D = d_model / 100 leading principal directions, a token is
u(t) = (I - U U^T)(E[t] - mu), scaled to length 1. Action tokens and padding rows are no words and do not shape mu and U.

Invariant: what is compared depends on the token basis and the labels alone; value vectors are not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import eigsh

from steer_runtime.directions.token_basis import TOP_K, TokenBasis
from steer_runtime.errors import SteerError

SEMANTIC_QUANTILE = 0.99
"""Share of random directions whose labels are less coherent than a semantic one."""
Told = Callable[[int, int], None]
"""Told (done, in all) as work goes on."""
_ROWS = 4096  # rows of the unembedding at a time: a float32 copy of 257,152 x 2,048 would be 2 GB
_LABELS = 1024  # labels at a time: each gathers k rows
_CONTROLS = 4096  # random directions behind a threshold: 41 of them exceed it
_DRAWS = 256  # random directions in one multiplication


@dataclass(frozen=True, eq=False)
class WordSpace:
    """Token embeddings without what they all share. mean: float32 [d_model]; common: float32 [d_model, D]."""

    basis: TokenBasis
    mean: torch.Tensor
    common: torch.Tensor

    @classmethod
    def of(cls, basis: TokenBasis, *, progress: Told | None = None) -> WordSpace:
        """mu and U from the rows that are words. Raises SteerError: 'bad_token_basis' (too few words), 'not_finite'."""
        words = np.array(
            [t for t in range(min(basis.vocab, len(basis.tokenizer))) if t not in basis.action_values], np.int64
        )
        width = int(basis.unembedding.shape[1])
        count = max(1, width // 100)
        if len(words) < 2 or width <= count + 1:
            raise SteerError(
                "bad_token_basis", f"{len(words)} words of width {width} are too few to compare: expected more of each"
            )
        total = np.zeros(width)
        square = np.zeros((width, width))
        for start in range(0, len(words), _ROWS):
            part = words[start : start + _ROWS]
            rows = basis.unembedding[torch.from_numpy(part)].float().cpu().numpy().astype(np.float64)
            total += rows.sum(0)
            square += rows.T @ rows
            if progress is not None:
                progress(start + len(part), len(words))
        mean = total / len(words)
        covariance = square / len(words) - np.outer(mean, mean)
        if not np.isfinite(covariance).all():
            raise SteerError("not_finite", "the unembedding holds NaN or infinite weights; load the policy again")
        # A fixed start makes the iteration, and so every score, the same in every run.
        _, common = eigsh(covariance, k=count, v0=np.ones(width))
        return cls(
            basis, torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(np.ascontiguousarray(common)).float()
        )

    def rows(self, tokens: np.ndarray) -> torch.Tensor:
        """u(t) of token ids int [...]: float32 [..., d_model], each of length 1."""
        flat = torch.from_numpy(np.asarray(tokens).reshape(-1).astype(np.int64))
        rows = self.basis.unembedding[flat].float().cpu() - self.mean
        rows = rows - (rows @ self.common) @ self.common.T
        return torch.nn.functional.normalize(rows, dim=-1).reshape(*np.shape(tokens), -1)

    def words(self, words: Sequence[str]) -> torch.Tensor:
        """The direction of some words: their mean, each word the mean of its tokens; float32 [d_model] of length 1.

        Raises SteerError('unknown_word').
        """
        if not words:
            raise SteerError(
                "unknown_word", "no words were given to compare with: expected one or more, such as 'gentle'"
            )
        means = [self.rows(np.array(self.basis.tokens_of(word))).mean(0) for word in words]
        return torch.nn.functional.normalize(torch.stack(means).mean(0), dim=0)

    def labels(self, tokens: np.ndarray) -> torch.Tensor:
        """The direction of each label, the mean of its tokens: int [N, k] -> float32 [N, d_model] of length 1."""
        parts = [torch.nn.functional.normalize(self.rows(part).mean(1), dim=-1) for part in _parts(tokens)]
        return torch.cat(parts) if parts else torch.empty(0, len(self.mean))

    def nearness(self, tokens: np.ndarray, direction: torch.Tensor) -> np.ndarray:
        """Cosine of each label's direction with a direction: int [N, k], [d_model] -> float32 [N] in [-1, 1]."""
        parts = [self.labels(part) @ direction for part in _parts(tokens)]
        return torch.cat(parts).numpy() if parts else np.empty(0, np.float32)

    def coherence(self, tokens: np.ndarray) -> np.ndarray:
        """How alike the tokens of each label are, the mean cosine of its pairs: int [N, k] -> float32 [N].

        With s = sum of u(t) over the k tokens: (s . s - k) / (k (k - 1)).
        """
        k = int(np.shape(tokens)[-1])
        if k < 2:
            raise SteerError("bad_token_basis", f"labels of {k} token have no pairs: expected 2 tokens or more")
        parts = [(self.rows(part).sum(1).square().sum(-1) - k) / (k * (k - 1)) for part in _parts(tokens)]
        return torch.cat(parts).numpy() if parts else np.empty(0, np.float32)

    def coherence_by_chance(self, top_k: int = TOP_K, *, seed: int = 0, progress: Told | None = None) -> float:
        """The coherence that one label in a hundred of random directions exceeds: above it a label is semantic.

        Geva et al. 2022 (arXiv 2203.14680, section 4) had people judge whether a value vector's top tokens share a
        pattern; this asks whether they are more alike than those of a direction that means nothing.
        """
        labels = self.random_labels(_CONTROLS, top_k=top_k, seed=seed, progress=progress)
        return float(np.quantile(self.coherence(labels), SEMANTIC_QUANTILE))

    def random_labels(
        self, count: int, *, top_k: int = TOP_K, seed: int = 0, progress: Told | None = None
    ) -> np.ndarray:
        """Labels of `count` Gaussian directions, what a value vector that means nothing says: int32 [count, top_k]."""
        generator = torch.Generator().manual_seed(seed)
        table = self.basis.unembedding
        out = np.empty((count, top_k), np.int32)
        for start in range(0, count, _DRAWS):
            drawn = torch.randn(min(_DRAWS, count - start), len(self.mean), generator=generator)
            scores = drawn.to(table.device, table.dtype) @ table.T
            out[start : start + len(drawn)] = scores.topk(top_k, dim=1).indices.cpu().numpy()
            if progress is not None:
                progress(start + len(drawn), count)
        return out


def _parts(tokens: np.ndarray) -> Iterable[np.ndarray]:
    return (tokens[start : start + _LABELS] for start in range(0, len(tokens), _LABELS))
