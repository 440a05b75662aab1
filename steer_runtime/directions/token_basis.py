"""What each value vector of a tower says, in tokens: its projection onto the unembedding.

Value vector i of a layer is column i of `mlp.down_proj.weight` (Geva et al. 2022, arXiv 2203.14680). Its label is the k
tokens with the largest `W_down[:, i] . unembedding[token]`, with no final norm and no centring, as in Haon et al.
(CoRL 2025, arXiv 2509.00328), whose k is 10.

Invariant: cached labels are those of the weights they are keyed by, or they are computed again and somebody is told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_save

from steer_runtime.directions.store import write_atomically
from steer_runtime.errors import SteerError, nearest
from steer_runtime.types import Tower

TOP_K = 10
"""Tokens in a label (the seed's)."""
BLOCK = 256
"""Value vectors in one multiplication: 256 rows of 49,152 scores are 50 MB, and larger blocks were no faster on CPU."""

Progress = Callable[[int, int], None]
"""Told (value vectors done, value vectors in all) after every block."""


@dataclass(frozen=True)
class TowerIdentity:
    """The tower that labels and directions belong to. Sizes as in Direction; model_hash is the policy's."""

    tower: str
    model_hash: str
    layers: int
    d_model: int
    d_ff: int

    @classmethod
    def of(cls, tower: Tower, model_hash: str) -> TowerIdentity:
        return cls(tower.name, model_hash, tower.layers, tower.d_model, tower.d_ff)

    def flat(self, layer: int, neuron: int) -> int:
        """The seed's flat index: layer * d_ff + neuron (Haon et al. 2025, published clusters)."""
        return layer * self.d_ff + neuron

    def unflat(self, flat: int) -> tuple[int, int]:
        """(layer, neuron) of a flat index. Raises SteerError('neuron_out_of_range')."""
        if not 0 <= flat < self.layers * self.d_ff:
            raise SteerError(
                "neuron_out_of_range",
                f"flat index {flat} is outside tower {self.tower!r} of {self.layers} layers x {self.d_ff}: "
                f"expected 0 to {self.layers * self.d_ff - 1}; it was made for another model or mistyped",
            )
        return divmod(flat, self.d_ff)


class TokenBasis:
    """The rows that residual vectors are read against, and the text of each row.

    unembedding: [vocab, d_model], any float dtype; a padded vocabulary (more rows than the tokenizer knows) is fine.
    tokenizer: a transformers tokenizer. action_values: token id -> bin centre, for action tokens.
    """

    def __init__(
        self, unembedding: torch.Tensor, tokenizer: Any, action_values: Mapping[int, float] | None = None
    ) -> None:
        if unembedding.ndim != 2 or not unembedding.is_floating_point():
            raise SteerError(
                "bad_token_basis",
                f"unembedding is {unembedding.dtype} {list(unembedding.shape)}: expected floats of [vocab, d_model]",
            )
        self.unembedding = unembedding.detach()
        self.tokenizer = tokenizer
        self.action_values = dict(action_values or {})
        self._texts: dict[int, str] = {}

    @classmethod
    def of(cls, policy: Any) -> TokenBasis:
        """The token basis of a loaded policy."""
        return cls(policy.unembedding, policy.tokenizer, policy.action_token_values())

    @property
    def vocab(self) -> int:
        return int(self.unembedding.shape[0])

    def text(self, token: int) -> str:
        """Text of a token, leading space kept; `[action: 0.824]` for an action token, `[row 32001]` for padding."""
        if token not in self._texts:
            self._texts[token] = self._text(token)
        return self._texts[token]

    def _text(self, token: int) -> str:
        if token in self.action_values:
            return f"[action: {self.action_values[token]:.3f}]"
        piece = self.tokenizer.convert_ids_to_tokens(token) if token < len(self.tokenizer) else None
        if piece is None:
            return f"[row {token}]"
        text = self.tokenizer.decode([token])
        # Half a UTF-8 character decodes to U+FFFD; the raw piece at least tells such tokens apart.
        return str(piece) if "\ufffd" in text or not text else str(text)

    @cached_property
    def _index(self) -> dict[str, tuple[int, ...]]:
        index: dict[str, list[int]] = {}
        for token in range(min(self.vocab, len(self.tokenizer))):
            if token not in self.action_values:
                index.setdefault(_plain(self.text(token)), []).append(token)
        return {word: tuple(tokens) for word, tokens in index.items()}

    def tokens_of(self, word: str) -> tuple[int, ...]:
        """Ids of every token that reads `word`, whatever its case and leading space.

        Raises SteerError('unknown_word') when no single token does.
        """
        tokens = self._index.get(_plain(word), ()) if _plain(word) else ()
        if not tokens:
            # Alike words share their first letter; the whole vocabulary would take difflib seconds.
            alike = [w for w in self._index if w[:1] == _plain(word)[:1] and len(w) > 1]
            raise SteerError(
                "unknown_word",
                f"no token of this vocabulary is the word {word[:40]!r}: {nearest(_plain(word), alike)}; "
                "use words of one token",
            )
        return tokens

    def project(
        self,
        tower: Tower,
        model_hash: str,
        *,
        layers: Sequence[int] | None = None,
        top_k: int = TOP_K,
        block: int = BLOCK,
        progress: Progress | None = None,
    ) -> Labels:
        """Labels of every value vector: the k largest of `W_down^T @ unembedding^T`, always in float32.

        W_down [d_model, d_ff], unembedding [vocab, d_model] -> token ids int32 and scores float32 [layers, d_ff, k],
        best first. layers: which ones, default all. No more than `block` x vocab scores exist at a time.
        Raises SteerError: 'bad_token_basis', 'layer_out_of_range', 'not_finite'.
        """
        identity = TowerIdentity.of(tower, model_hash)
        chosen = _chosen(identity, layers)
        if self.unembedding.shape[1] != tower.d_model:
            raise SteerError(
                "bad_token_basis",
                f"unembedding has width {self.unembedding.shape[1]} and tower {tower.name!r} {tower.d_model}: "
                "expected the same",
            )
        if not 1 <= top_k <= self.vocab or block < 1:
            raise SteerError(
                "bad_token_basis",
                f"top_k {top_k} and block {block}: expected 1 to {self.vocab} tokens and a block of 1 or more",
            )
        tokens = np.empty((len(chosen), tower.d_ff, top_k), np.int32)
        scores = np.empty((len(chosen), tower.d_ff, top_k), np.float32)
        with torch.no_grad():
            basis = self.unembedding.float().T
            # One buffer for all blocks: a fresh 50 MB allocation a block costs page faults.
            buffer = torch.empty(min(block, tower.d_ff), self.vocab, device=basis.device)
            for row, layer in enumerate(chosen):
                weight = tower.down_projs[layer].weight  # type: ignore[attr-defined]
                for start in range(0, tower.d_ff, block):
                    vectors = weight[:, start : start + block].float().T.to(basis.device)
                    product = torch.matmul(vectors, basis, out=buffer[: len(vectors)])
                    best = product.topk(top_k, dim=1)
                    stop = start + len(vectors)
                    tokens[row, start:stop] = best.indices.cpu().numpy()
                    scores[row, start:stop] = best.values.cpu().numpy()
                    if progress is not None:
                        progress(row * tower.d_ff + stop, len(chosen) * tower.d_ff)
        # topk ranks NaN above every number, so one NaN weight cannot hide below the k best.
        if not np.isfinite(scores).all():
            raise SteerError(
                "not_finite", f"tower {tower.name!r} or its unembedding holds NaN or infinite weights; load it again"
            )
        return Labels(identity, chosen, tokens, scores, self)


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of some layers: token ids int32 and scores float32 [len(layers), d_ff, k], best first."""

    identity: TowerIdentity
    layers: tuple[int, ...]
    tokens: np.ndarray
    scores: np.ndarray
    basis: TokenBasis = field(repr=False)

    def row(self, layer: int) -> int:
        """Index of a layer in `tokens` and `scores`. Raises SteerError('layer_out_of_range')."""
        if layer not in self.layers:
            raise SteerError(
                "layer_out_of_range",
                f"layer {layer} of tower {self.identity.tower!r} has no labels here: expected one of "
                f"{', '.join(map(str, self.layers))}",
            )
        return self.layers.index(layer)

    def text(self, layer: int, neuron: int) -> list[str]:
        """The k tokens of one value vector, best first. Raises SteerError for a layer or neuron out of range."""
        if not 0 <= neuron < self.identity.d_ff:
            raise SteerError(
                "neuron_out_of_range",
                f"neuron {neuron} is out of range: expected 0 to {self.identity.d_ff - 1}",
            )
        return [self.basis.text(int(token)) for token in self.tokens[self.row(layer), neuron]]


class LabelCache:
    """Labels on disk, one safetensors file a layer, keyed by (model_hash, tower, k): an interrupted run resumes.

    notice: told one sentence for every cached file that had to be thrown away; `discarded` counts them.
    """

    def __init__(self, root: Path | str, notice: Callable[[str], None]) -> None:
        self.root = Path(root)
        self.notice = notice
        self.discarded = 0

    def labels(
        self,
        basis: TokenBasis,
        tower: Tower,
        model_hash: str,
        *,
        layers: Sequence[int] | None = None,
        top_k: int = TOP_K,
        progress: Progress | None = None,
    ) -> Labels:
        """Labels of `layers` (default all), computing only the uncached ones. Errors as TokenBasis.project."""
        identity = TowerIdentity.of(tower, model_hash)
        chosen = _chosen(identity, layers)
        found = {layer: self._read(identity, layer, top_k, basis.vocab) for layer in chosen}
        missing = [layer for layer in chosen if found[layer] is None]
        for done, layer in enumerate(missing):

            def report(vectors: int, _: int, before: int = done * tower.d_ff) -> None:
                if progress is not None:
                    progress(before + vectors, len(missing) * tower.d_ff)

            fresh = basis.project(tower, model_hash, layers=[layer], top_k=top_k, progress=report)
            found[layer] = (fresh.tokens[0], fresh.scores[0])
            self._write(identity, layer, fresh.tokens[0], fresh.scores[0])
        parts = [part for layer in chosen if (part := found[layer]) is not None]
        return Labels(identity, chosen, np.stack([p[0] for p in parts]), np.stack([p[1] for p in parts]), basis)

    def path(self, identity: TowerIdentity, layer: int, top_k: int) -> Path:
        """Where the labels of one layer are kept."""
        return self.root / f"{identity.model_hash[:16]}-{identity.tower}-top{top_k}" / f"layer-{layer:03d}.safetensors"

    def _write(self, identity: TowerIdentity, layer: int, tokens: np.ndarray, scores: np.ndarray) -> None:
        facts = {"model_hash": identity.model_hash, "sha256": _digest(tokens, scores)}
        content = safetensors_save({"tokens": tokens, "scores": scores}, metadata=facts)
        write_atomically(self.path(identity, layer, tokens.shape[-1]), content)

    def _read(
        self, identity: TowerIdentity, layer: int, top_k: int, vocab: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        path = self.path(identity, layer, top_k)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                facts = file.metadata() or {}
                tokens, scores = file.get_tensor("tokens"), file.get_tensor("scores")
        except (SafetensorError, OSError) as why:
            self._discard(path, f"cannot be read ({why})")
            return None
        shape = (identity.d_ff, top_k)
        if (tokens.shape, scores.shape, tokens.dtype, scores.dtype) != (shape, shape, np.int32, np.float32):
            self._discard(path, "has other shapes than this tower")
        elif facts.get("model_hash") != identity.model_hash or facts.get("sha256") != _digest(tokens, scores):
            self._discard(path, "does not match its own checksum or this model")
        elif tokens.min() < 0 or tokens.max() >= vocab:
            self._discard(path, "names tokens outside the vocabulary")
        else:
            return tokens, scores
        return None

    def _discard(self, path: Path, reason: str) -> None:
        self.discarded += 1
        self.notice(f"cached labels {path.name!r} in {path.parent.name!r}: the file {reason}; computing them again")


def _digest(tokens: np.ndarray, scores: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(tokens).tobytes() + np.ascontiguousarray(scores).tobytes()).hexdigest()


def _chosen(identity: TowerIdentity, layers: Sequence[int] | None) -> tuple[int, ...]:
    chosen = tuple(range(identity.layers)) if layers is None else tuple(dict.fromkeys(layers))
    bad = [layer for layer in chosen if not 0 <= layer < identity.layers]
    if bad or not chosen:
        given = f"layer {bad[0]}" if bad else "an empty list of layers"
        raise SteerError(
            "layer_out_of_range", f"{given} was asked of tower {identity.tower!r}: expected 0 to {identity.layers - 1}"
        )
    return chosen


def _plain(text: str) -> str:
    """How words are compared: case and surrounding space do not matter."""
    return text.strip().lstrip("\u0120\u2581").casefold()
