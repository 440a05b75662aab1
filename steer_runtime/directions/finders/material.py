"""What finders look at: a policy, its labels, recorded moments and its activations there, each made when first asked for.

Invariant: nothing is computed twice, and everything a finder read from a file is known by the file's content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from steer_runtime.directions.action_basis import ActionBasis
from steer_runtime.directions.activations import Activations, capture
from steer_runtime.directions.direction import Direction
from steer_runtime.directions.options import Pool
from steer_runtime.directions.token_basis import Labels, TokenBasis, TowerIdentity
from steer_runtime.directions.towers import named_tower, require_tokens
from steer_runtime.errors import SteerError, nearest
from steer_runtime.moments import Moment, load_moments, measured
from steer_runtime.types import Role, Tower

LABEL = 10
"""Tokens that a written vector is described by, at either end."""
Made = TypeVar("Made")
Report = Callable[[str, int, int], None]
"""Told (what is being done, done, in all)."""


@dataclass(frozen=True)
class _Batch:
    moments: tuple[Moment, ...]
    digest: str


class Material:
    """tower: name of one, empty for the policy's only one. labels: where labels of layers of a tower come from (default:
    projected here, uncached). stored: how to load a direction by name.

    Raises SteerError: 'unknown_tower', 'which_tower' for no name where there are several.
    """

    def __init__(
        self,
        policy: Any,
        tower: str = "",
        *,
        labels: Callable[[str, Sequence[int] | None], Labels] | None = None,
        stored: Callable[[str], Direction] | None = None,
        report: Report | None = None,
    ) -> None:
        self.policy = policy
        self.tower: Tower = named_tower(policy, tower)
        self._labels = labels
        self._stored = stored
        self._report = report
        self._batches: dict[Path, _Batch] = {}
        self._activations: dict[tuple[object, ...], Activations] = {}
        self._once: dict[Hashable, Any] = {}
        self._towers: dict[str, Material] = {self.tower.name: self}

    def at(self, tower: str) -> Material:
        """The same material of another tower of the policy; files of moments are shared. Raises as the constructor."""
        name = named_tower(self.policy, tower).name
        if name not in self._towers:
            other = Material(self.policy, name, labels=self._labels, stored=self._stored, report=self._report)
            other._batches, other._towers = self._batches, self._towers
            self._towers[name] = other
        return self._towers[name]

    @cached_property
    def identity(self) -> TowerIdentity:
        return TowerIdentity.of(self.tower, self.policy.model_hash)

    @cached_property
    def basis(self) -> TokenBasis:
        """Raises SteerError('no_token_basis') for a tower without words."""
        require_tokens(self.tower, self.policy.name)
        return TokenBasis.of(self.policy)

    @cached_property
    def reader(self) -> TokenBasis | ActionBasis:
        """What the tower's residual stream is read through."""
        return self.basis if self.tower.basis == "tokens" else ActionBasis.of(self.policy)

    @property
    def default_span(self) -> frozenset[Role]:
        """Where measured directions are taken and written unless said otherwise: the text, or the actions of an expert."""
        return frozenset({"text"}) if self.tower.basis == "tokens" else frozenset({"action"})

    def labels(self, layers: Sequence[int] | None) -> Labels:
        """Labels of layers, None for all. Raises SteerError('no_token_basis')."""
        basis = self.basis
        if self._labels is not None:
            return self._labels(self.tower.name, layers)
        return basis.project(self.tower, self.policy.model_hash, layers=layers)

    def stored(self, ref: str) -> Direction:
        """A direction of the store that is being filled. Raises SteerError as its `load`, 'no_store' where there is none."""
        if self._stored is None:
            raise SteerError("no_store", f"there is no store to load direction {ref[:80]!r} from: give one")
        return self._stored(ref)

    def report(self, what: str, done: int, total: int) -> None:
        """Tell whoever waits."""
        if self._report is not None:
            self._report(what, done, total)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` makes, the first time that `key` is asked for; both ends of an axis share what it takes."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    @cached_property
    def words(self) -> Tensor:
        """Rows of the token basis that are words of the tokenizer, float32 [words, d_model]: neither actions nor padding."""
        count = min(self.basis.vocab, len(self.basis.tokenizer))
        keep = [token for token in range(count) if token not in self.basis.action_values]
        return self.basis.unembedding[keep].to("cpu", torch.float32)

    @cached_property
    def mean_norm(self) -> float:
        """The unit of `norm`: mean norm of a word embedding as the tower reads it, or of a row of the action basis."""
        if isinstance(self.reader, ActionBasis):
            return self.reader.unit
        return float(self.words.norm(dim=1).mean()) * self._embedding_scale

    @property
    def _embeddings(self) -> Any:
        language_model = getattr(getattr(self.policy, "model", None), "language_model", None)
        return None if language_model is None else language_model.get_input_embeddings()

    @property
    def _embedding_scale(self) -> float:
        """What a word's row is multiplied by on its way in: Gemma's sqrt(d_model), else 1."""
        return float(getattr(self._embeddings, "embed_scale", 1.0))

    def table(self, site: int) -> Tensor:
        """[vocab, d_model] that words are read from at a site: input embeddings at site 0, the unembedding after."""
        basis = self.basis
        if site == 0 and self._embeddings is not None:
            return self._embeddings.weight * self._embedding_scale
        return basis.unembedding

    def require_layer(self, layer: int) -> None:
        """Raises SteerError('layer_out_of_range')."""
        if not 0 <= layer < self.tower.layers:
            raise SteerError(
                "layer_out_of_range",
                f"layer {layer} of tower {self.tower.name!r} was asked for: expected 0 to {self.tower.layers - 1}",
            )

    def weight(self, layer: int) -> Tensor:
        """down_proj of a layer, float32 [d_model, d_ff]. Raises SteerError('layer_out_of_range')."""
        self.require_layer(layer)
        return self.tower.down_projs[layer].weight.detach().to("cpu", torch.float32)  # type: ignore[attr-defined]

    def reads(self, vectors: np.ndarray, count: int = LABEL) -> list[list[str]]:
        """The `count` tokens, or action dimensions, that each row of [N, d_model] points at most, best first."""
        return [high for high, _ in self.reader.ends(vectors, count)]

    def moments(self, path: Path) -> tuple[Moment, ...]:
        """Moments of a file. Raises SteerError as `load_moments`."""
        return self._batch(path).moments

    def digest(self, path: Path) -> str:
        """sha256 hex of a file of moments."""
        return self._batch(path).digest

    def _batch(self, path: Path) -> _Batch:
        if path not in self._batches:
            moments, _ = load_moments(path)
            self._batches[path] = _Batch(tuple(moments), hashlib.sha256(path.read_bytes()).hexdigest())
        return self._batches[path]

    def activations(
        self,
        path: Path,
        span: frozenset[Role],
        pool: Pool,
        *,
        layers: Sequence[int] = (),
        sites: Sequence[int] = (),
        wording: str = "{}",
    ) -> Activations:
        """Activations at the moments of a file; wording: what becomes of the instruction, in place of {}.

        Pooled rows are few, so all layers and sites are watched in one pass; token by token only what is asked for.
        Raises SteerError as `capture`.
        """
        if pool != "each":
            layers, sites = range(self.tower.layers), range(self.tower.layers + 1)
        key = (self.digest(path), span, pool, tuple(layers), tuple(sites), wording)
        if key not in self._activations:
            said = f" saying {wording!r}" if wording != "{}" else ""
            self._activations[key] = capture(
                self.policy,
                self.tower.name,
                [_worded(moment, wording) for moment in self.moments(path)],
                layers=layers,
                sites=sites,
                span=span,
                pool=pool,
                progress=lambda done, total: self.report(f"watching the policy{said}", done, total),
            )
        return self._activations[key]

    def quantity(self, path: Path, name: str, seen: Activations) -> np.ndarray:
        """float64 [moments] of a measured quantity, or of the word the policy said (`said_<slot>`, counted from 0).

        Raises SteerError: 'unknown_quantity', 'no_variation' where it is the same at every moment.
        """
        if name.startswith("said_"):
            if name not in seen.said:
                raise SteerError(
                    "unknown_quantity", f"the policy has no note {name[:40]!r}: {nearest(name, seen.said)}"
                )
            values = seen.said[name]
        else:
            values = measured(self.moments(path), name)
        if not float(np.ptp(values)) > 0:
            raise SteerError(
                "no_variation", f"{name} is {values[0]:g} at all {len(values)} moments: use moments in which it differs"
            )
        return values

    def episodes(self, path: Path) -> np.ndarray:
        """The episode each moment is of, int64 [moments], counted from 0."""
        names = [moment.episode for moment in self.moments(path)]
        return np.unique(names, return_inverse=True)[1]


def _worded(moment: Moment, wording: str) -> Moment:
    if wording == "{}":
        return moment
    told = wording.replace("{}", moment.observation.instruction)
    return replace(moment, observation=replace(moment.observation, instruction=told))
