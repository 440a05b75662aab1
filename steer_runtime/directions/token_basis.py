"""What each value vector of a tower says, in tokens: its projection onto the unembedding.

Value vector i of a layer is column i of `mlp.down_proj.weight` (Geva et al. 2022, arXiv 2203.14680). Its label is the k
tokens with the largest `W_down[:, i] . unembedding[token]`, with no final norm and no centring, as in Haon et al.
(CoRL 2025, arXiv 2509.00328), whose k is 10; its low end, which they did not use, is the k most negative. `Spec` has the
other variants.

Invariant: cached labels are those of the weights they are keyed by, or they are computed again and somebody is told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_save

from steer_runtime.directions.checkpoint_vectors import matrix_of
from steer_runtime.directions.projection import (
    BLOCKS,
    RAW,
    TOP_K,
    Blocks,
    Compute,
    Ends,
    LayerJob,
    Matrix,
    Runner,
    Spec,
    Variant,
    mean_row,
    one_process,
)
from steer_runtime.directions.store import write_atomically
from steer_runtime.errors import SteerError, nearest
from steer_runtime.types import Tower

_LEAST_LETTERS = 3
Progress = Callable[[int, int], None]
"""Told (value vectors done, value vectors in all); within a layer, the share of its work."""


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

    unembedding: [vocab, d_model], any float dtype, in memory or in its file; a padded vocabulary (more rows than the
    tokenizer knows) is fine. tokenizer: a transformers tokenizer. action_values: token id -> bin centre, for action
    tokens. final_norm: what the norm before the unembedding multiplies with, [d_model], for 'normed' labels.
    """

    def __init__(
        self,
        unembedding: Matrix,
        tokenizer: Any,
        action_values: Mapping[int, float] | None = None,
        final_norm: torch.Tensor | None = None,
    ) -> None:
        tensor = isinstance(unembedding, torch.Tensor)
        if len(unembedding.shape) != 2 or (tensor and not unembedding.is_floating_point()):  # type: ignore[attr-defined]
            given = f"{unembedding.dtype} " if tensor else ""  # type: ignore[attr-defined]
            raise SteerError(
                "bad_token_basis",
                f"unembedding is {given}{list(unembedding.shape)}: expected floats of [vocab, d_model]",
            )
        self.rows: Matrix = unembedding.detach() if isinstance(unembedding, torch.Tensor) else unembedding
        self.tokenizer = tokenizer
        self.action_values = dict(action_values or {})
        self.final_norm = None if final_norm is None else final_norm.detach()
        self._texts: dict[int, str] = {}

    @classmethod
    def of(cls, policy: Any) -> TokenBasis:
        """The token basis of a loaded policy or of a checkpoint (`CheckpointVectors`)."""
        norm = getattr(policy, "final_norm", None)
        return cls(policy.unembedding, policy.tokenizer, policy.action_token_values(), norm)

    @cached_property
    def unembedding(self) -> torch.Tensor:
        """[vocab, d_model] in memory; of a checkpoint it is read whole, 1 GB for Pi0."""
        return self.rows[:]

    @cached_property
    def mean(self) -> torch.Tensor:
        """Mean of all rows, float64 [d_model]."""
        return mean_row(self.rows)

    @property
    def vocab(self) -> int:
        return int(self.rows.shape[0])

    def ends(self, vectors: np.ndarray, count: int) -> list[tuple[list[str], list[str]]]:
        """The `count` tokens that each row of [N, d_model] points at most, best first, and at least."""
        table = self.unembedding.detach()
        k, out = min(count, self.vocab), []
        for rows in torch.from_numpy(np.ascontiguousarray(vectors, np.float32)).split(64):
            scores = rows.to(table.device) @ table.float().T
            high, low = scores.topk(k, dim=1).indices.tolist(), scores.topk(k, dim=1, largest=False).indices.tolist()
            out += [([self.text(t) for t in a], [self.text(t) for t in b]) for a, b in zip(high, low, strict=True)]
        return out

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

    @cached_property
    def plain_words(self) -> np.ndarray:
        """Token ids int64 of lower-case words of three letters or more; where the tokenizer marks how words begin, only of
        those, since pieces from the middle of words are no words."""
        texts = {token: self.text(token) for token in range(self.vocab) if token not in self.action_values}
        kept = [
            token
            for token, text in texts.items()
            if len(word := text.strip()) >= _LEAST_LETTERS and word.isascii() and word.isalpha() and word.islower()
        ]
        whole = [token for token in kept if texts[token].startswith(" ")]
        return np.array(whole or kept, np.int64)

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
        variant: Variant = "raw",
        dtype: Compute = "float32",
        blocks: Blocks = BLOCKS,
        progress: Progress | None = None,
        run: Runner = one_process,
    ) -> Labels:
        """Labels of every value vector: the k largest and the k most negative scores, by `Spec`'s formulas.

        W_down [d_model, d_ff], unembedding [vocab, d_model] -> token ids int32 and scores float32 [layers, d_ff, k],
        best first. layers: which ones, default all. run: where the layers are computed (`fan_out.on_ray`).
        Raises SteerError: 'bad_token_basis', 'bad_projection', 'layer_out_of_range', 'not_finite'.
        """
        identity = TowerIdentity.of(tower, model_hash)
        chosen = _chosen(identity, layers)
        spec = Spec(variant, dtype, top_k)
        found = dict(self._layers(tower, chosen, spec, blocks, progress, run))
        return Labels.joined(identity, chosen, [found[layer] for layer in chosen], self)

    def _layers(
        self,
        tower: Tower,
        layers: Sequence[int],
        spec: Spec,
        blocks: Blocks,
        progress: Progress | None,
        run: Runner,
    ) -> Iterator[tuple[int, Ends]]:
        gamma = self.final_norm if spec.variant == "normed" else None
        mean = self.mean if spec.variant == "centred" else None
        jobs = [
            LayerJob(layer, matrix_of(tower.down_projs[layer]), self.rows, spec, gamma, mean, blocks)
            for layer in layers
        ]

        def told(done: float) -> None:
            if progress is not None:
                progress(round(done * tower.d_ff), len(layers) * tower.d_ff)

        try:
            yield from run(jobs, told)
        except SteerError as refused:
            if refused.code != "not_finite":
                raise
            raise SteerError("not_finite", f"tower {tower.name!r}: {refused.sentence}") from None


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of some layers: token ids int32 and scores float32 [len(layers), d_ff, k], best first.

    low_tokens, low_scores: the same of the most negative end; None where labels were made without it.
    """

    identity: TowerIdentity
    layers: tuple[int, ...]
    tokens: np.ndarray
    scores: np.ndarray
    basis: TokenBasis = field(repr=False)
    low_tokens: np.ndarray | None = None
    low_scores: np.ndarray | None = None

    @classmethod
    def joined(
        cls, identity: TowerIdentity, layers: tuple[int, ...], parts: Sequence[Ends], basis: TokenBasis
    ) -> Labels:
        tokens, scores, low_tokens, low_scores = (np.stack(arrays) for arrays in zip(*parts, strict=True))
        return cls(identity, layers, tokens, scores, basis, low_tokens, low_scores)

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
        return [self.basis.text(int(token)) for token in self._of(self.tokens, layer, neuron)]

    def low_text(self, layer: int, neuron: int) -> list[str]:
        """The k tokens it says least, the most negative first. Raises SteerError as `text`, and 'no_low_end'."""
        if self.low_tokens is None:
            raise SteerError("no_low_end", "these labels hold the largest scores only; project the layer again")
        return [self.basis.text(int(token)) for token in self._of(self.low_tokens, layer, neuron)]

    def _of(self, tokens: np.ndarray, layer: int, neuron: int) -> np.ndarray:
        if not 0 <= neuron < self.identity.d_ff:
            raise SteerError(
                "neuron_out_of_range",
                f"neuron {neuron} is out of range: expected 0 to {self.identity.d_ff - 1}",
            )
        return tokens[self.row(layer), neuron]


class LabelCache:
    """Labels on disk, one safetensors file a layer, by (model_hash, tower, k, variant, dtype): interrupted runs resume.

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
        variant: Variant = "raw",
        dtype: Compute = "float32",
        progress: Progress | None = None,
        run: Runner = one_process,
    ) -> Labels:
        """Labels of `layers` (default all), computing only the uncached ones. Options and errors as TokenBasis.project.

        A layer is written as soon as it is done, so an interruption costs at most the layers under way.
        """
        identity = TowerIdentity.of(tower, model_hash)
        chosen = _chosen(identity, layers)
        spec = Spec(variant, dtype, top_k)
        found = {layer: self._read(identity, layer, spec, basis.vocab) for layer in chosen}
        missing = [layer for layer in chosen if found[layer] is None]
        if missing:
            for layer, ends in basis._layers(tower, missing, spec, BLOCKS, progress, run):
                self._write(identity, layer, spec, ends)
                found[layer] = ends
        return Labels.joined(identity, chosen, [part for layer in chosen if (part := found[layer])], basis)

    def path(self, identity: TowerIdentity, layer: int, spec: Spec = RAW) -> Path:
        """Where the labels of one layer are kept."""
        return self.root / f"{identity.model_hash[:16]}-{identity.tower}-{spec.key}" / f"layer-{layer:03d}.safetensors"

    def _write(self, identity: TowerIdentity, layer: int, spec: Spec, ends: Ends) -> None:
        # One entry: safetensors writes several in any order, and equal labels are to be equal files.
        facts = {"labels": f"{identity.model_hash} {_digest(*ends)}"}
        write_atomically(self.path(identity, layer, spec), safetensors_save(ends._asdict(), metadata=facts))

    def _read(self, identity: TowerIdentity, layer: int, spec: Spec, vocab: int) -> Ends | None:
        path = self.path(identity, layer, spec)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                facts = file.metadata() or {}
                ends = Ends(*(file.get_tensor(name) for name in Ends._fields))
        except (SafetensorError, OSError) as why:
            self._discard(path, f"cannot be read ({why})")
            return None
        shape = (identity.d_ff, spec.top_k)
        if [(part.shape, part.dtype) for part in ends] != [(shape, np.int32), (shape, np.float32)] * 2:
            self._discard(path, "has other shapes than this tower")
        elif facts.get("labels") != f"{identity.model_hash} {_digest(*ends)}":
            self._discard(path, "does not match its own checksum or this model")
        elif any(part.min() < 0 or part.max() >= vocab for part in (ends.tokens, ends.low_tokens)):
            self._discard(path, "names tokens outside the vocabulary")
        else:
            return ends
        return None

    def _discard(self, path: Path, reason: str) -> None:
        self.discarded += 1
        self.notice(f"cached labels {path.name!r} in {path.parent.name!r}: the file {reason}; computing them again")


def _digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


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
