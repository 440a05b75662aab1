"""A direction: a named thing to steer with, tied to the weights it was found in.

Invariant: a Direction that exists is valid (finite, in range, one write per neuron), and its `hash` is its content.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from steer_runtime.directions.towers import require_reach
from steer_runtime.errors import SteerError
from steer_runtime.types import ALL_ROLES, Role, Tower, span_bits

Operation = Literal["override", "add", "scale", "clamp", "ablate"]
OPERATIONS: tuple[Operation, ...] = ("override", "add", "scale", "clamp", "ablate")
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
"""Names are file names and topic text: lower case, digits, `_.-`, at most 64 characters."""
CARD_FORMAT = "steer-direction/2"
NO_LICENCE = "NOASSERTION"
"""SPDX's word for: whoever made this has not said."""
_LICENCE = re.compile(r"[A-Za-z0-9.+()-][A-Za-z0-9.+() -]{0,127}")


@dataclass(frozen=True)
class Neurons:
    """Value vectors to write to: layer int32 [K], neuron int32 [K], alpha float32 [K].

    alpha is, at strength 1: the activation for `override`; the summand for `add`; the factor for `scale`; the upper
    bound for `clamp` (`low` holds the lower one); ignored for `ablate`. Units: those of the input of `down_proj`.
    """

    layer: np.ndarray
    neuron: np.ndarray
    alpha: np.ndarray
    low: np.ndarray | None = None  # float32 [K], clamp only

    def __len__(self) -> int:
        return len(self.layer)


@dataclass(frozen=True)
class Direction:
    """Either `neurons` (written at the input of down_proj) or `dense` (residual site -> float32 [d_model], added).

    Residual site 0 is the embedding entry, site i + 1 the output of layer i.
    model_hash, d_model, d_ff, layers: the tower it belongs to. max_strength: largest strength shown safe in simulation
    (0 < max_strength <= 1); 1.0 with `proven=False` means nobody has shown it yet.
    provenance: JSON-able facts (finder, words, labels, date). licence: SPDX expression of whoever made it.
    calibrated: (low, high) strengths over which its effect was shown in simulation, 0 <= low < high <= 1; None for never.
    """

    name: str
    tower: str
    model_hash: str
    layers: int
    d_model: int
    d_ff: int
    op: Operation = "override"
    span: frozenset[Role] = ALL_ROLES
    neurons: Neurons | None = None
    dense: Mapping[int, np.ndarray] | None = None
    max_strength: float = 1.0
    proven: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)
    licence: str = NO_LICENCE
    calibrated: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name) or ".." in self.name:
            raise SteerError(
                "bad_name",
                f"direction name {self.name[:80]!r} is not usable: expected lower-case letters, digits, '_', '-' or '.', "
                "at most 64; choose such a name",
            )
        span_bits(self.span)
        if self.op not in OPERATIONS:
            raise SteerError(
                "bad_operation", f"operation {self.op!r} is unknown: expected one of {', '.join(OPERATIONS)}"
            )
        if not (np.isfinite(self.max_strength) and 0 < self.max_strength <= 1):
            raise SteerError(
                "bad_max_strength", f"max_strength of {self.name!r} is {self.max_strength}: expected a number in (0, 1]"
            )
        if not _LICENCE.fullmatch(self.licence):
            raise SteerError(
                "bad_licence",
                f"licence {self.licence[:40]!r} of {self.name!r} is no SPDX expression: expected such as 'Apache-2.0', or "
                f"{NO_LICENCE!r} where nobody has said",
            )
        if self.calibrated is not None:
            self._check_calibrated(*self.calibrated)
        if (self.neurons is None) == (self.dense is None):
            raise SteerError(
                "bad_direction", f"direction {self.name!r} must hold neurons or a dense vector, not both or none"
            )
        if self.neurons is not None:
            self._check_neurons(self.neurons)
        else:
            self._check_dense(self.dense or {})

    def _check_calibrated(self, low: float, high: float) -> None:
        if not (np.isfinite(low) and np.isfinite(high) and 0 <= low < high <= 1):
            raise SteerError(
                "bad_calibrated",
                f"calibrated range of {self.name!r} is {low} to {high}: expected strengths, 0 <= low < high <= 1",
            )

    def _check_neurons(self, n: Neurons) -> None:
        arrays = {"layer": n.layer, "neuron": n.neuron, "alpha": n.alpha}
        if self.op == "clamp":
            if n.low is None:
                raise SteerError("bad_direction", f"direction {self.name!r} clamps but has no lower bounds; give `low`")
            arrays["low"] = n.low
        elif n.low is not None:
            raise SteerError(
                "bad_direction", f"direction {self.name!r} has lower bounds but operation {self.op!r}; drop `low`"
            )
        for label, array in arrays.items():
            want = "int32" if label in ("layer", "neuron") else "float32"
            if array.ndim != 1 or len(array) != len(n.layer) or array.dtype != want or len(array) == 0:
                raise SteerError(
                    "bad_direction",
                    f"{label} of direction {self.name!r} is {array.dtype} {list(array.shape)}: expected {want} [K], "
                    "K >= 1, equal for all",
                )
        if not (np.isfinite(n.alpha).all() and (n.low is None or np.isfinite(n.low).all())):
            raise SteerError("not_finite", f"direction {self.name!r} holds NaN or infinite values; build it again")
        if n.low is not None and (n.low > n.alpha).any():
            raise SteerError(
                "bad_direction", f"direction {self.name!r} has lower bounds above the upper ones; swap them"
            )
        for label, array, size in (("layer", n.layer, self.layers), ("neuron", n.neuron, self.d_ff)):
            bad = array[(array < 0) | (array >= size)]
            if len(bad):
                raise SteerError(
                    f"{label}_out_of_range",
                    f"direction {self.name!r} names {label} {int(bad[0])}: expected 0 to {size - 1}; "
                    "it was made for another model or mistyped",
                )
        flat = n.layer.astype(np.int64) * self.d_ff + n.neuron
        if len(np.unique(flat)) != len(flat):
            raise SteerError("bad_direction", f"direction {self.name!r} names a neuron twice; keep one of each")

    def _check_dense(self, dense: Mapping[int, np.ndarray]) -> None:
        if self.op != "add":
            raise SteerError(
                "bad_operation", f"dense direction {self.name!r} has operation {self.op!r}: expected 'add'"
            )
        if not dense:
            raise SteerError("bad_direction", f"dense direction {self.name!r} holds no vector")
        for site, vector in dense.items():
            if not 0 <= site <= self.layers:
                raise SteerError(
                    "layer_out_of_range",
                    f"direction {self.name!r} names residual site {site}: expected 0 (embedding) to {self.layers}",
                )
            if vector.dtype != np.float32 or vector.shape != (self.d_model,):
                raise SteerError(
                    "bad_direction",
                    f"site {site} of direction {self.name!r} is {vector.dtype} {list(vector.shape)}: "
                    f"expected float32 [{self.d_model}]",
                )
            if not np.isfinite(vector).all():
                raise SteerError("not_finite", f"direction {self.name!r} holds NaN or infinite values; build it again")

    def card(self) -> dict[str, Any]:
        """The JSON card: all but the tensors. Its canonical form is part of the hash."""
        return {
            "format": CARD_FORMAT,
            "name": self.name,
            "tower": self.tower,
            "model_hash": self.model_hash,
            "layers": self.layers,
            "d_model": self.d_model,
            "d_ff": self.d_ff,
            "op": self.op,
            "span": sorted(self.span),
            "form": "neurons" if self.neurons is not None else "dense",
            "writes": self.writes,
            "max_strength": self.max_strength,
            "proven": self.proven,
            "calibrated": None if self.calibrated is None else list(self.calibrated),
            "licence": self.licence,
            "provenance": dict(self.provenance),
        }

    @property
    def writes(self) -> dict[str, Any]:
        """What the tensors hold, for people who read the card: layers, number of neurons and range of alpha; or sites."""
        if self.neurons is None:
            return {"sites": sorted(self.dense or {})}
        alpha = self.neurons.alpha
        # Adding zero makes -0.0 and 0.0 one number: which of them `min` returns depends on the machine.
        return {
            "neurons": len(self.neurons),
            "layers": sorted({int(layer) for layer in self.neurons.layer}),
            "alpha": [float(alpha.min()) + 0.0, float(alpha.max()) + 0.0],
        }

    def tensors(self) -> dict[str, np.ndarray]:
        """Named arrays as they are stored in safetensors."""
        if self.neurons is not None:
            out = {"layer": self.neurons.layer, "neuron": self.neurons.neuron, "alpha": self.neurons.alpha}
            if self.neurons.low is not None:
                out["low"] = self.neurons.low
            return out
        return {f"site.{site}": vector for site, vector in sorted((self.dense or {}).items())}

    @property
    def hash(self) -> str:
        """sha256 hex over the canonical card and the tensors (name, dtype, shape, bytes): identity is content."""
        digest = hashlib.sha256(json.dumps(self.card(), sort_keys=True, separators=(",", ":")).encode())
        for name, array in sorted(self.tensors().items()):
            digest.update(f"{name}:{array.dtype.str}:{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @property
    def id(self) -> str:
        """`name@` and the first 12 hex digits of the hash: what people type and states show."""
        return f"{self.name}@{self.hash[:12]}"

    def require_fits(self, tower: Tower, model_hash: str) -> None:
        """Refuse a direction of another model or size. Raises SteerError('other_model')."""
        self.require_model(model_hash, tower.name, (tower.layers, tower.d_model, tower.d_ff))

    def require_reaches(self, tower: Tower) -> None:
        """Refuse to write where nothing can come of it. Raises SteerError('dead_layer')."""
        if self.neurons is not None:
            require_reach(
                tower, layers=sorted(set(self.neurons.layer.tolist())), who=f"direction {self.id!r} writes to"
            )
        else:
            require_reach(tower, sites=sorted(self.dense or {}), who=f"direction {self.id!r} writes to")

    def require_model(self, model_hash: str, tower: str, sizes: tuple[int, int, int]) -> None:
        """As `require_fits`, from the facts alone. sizes: layers, d_model, d_ff. Raises SteerError('other_model')."""
        if self.model_hash != model_hash:
            raise SteerError(
                "other_model",
                f"direction {self.id!r} belongs to model {self.model_hash[:12]} but {model_hash[:12]} is loaded; "
                "load that model or find the direction again with `steer directions make`",
            )
        mine = (self.layers, self.d_model, self.d_ff)
        if mine != sizes:
            raise SteerError(
                "other_model",
                f"direction {self.id!r} is for (layers, d_model, d_ff) {mine} but tower {tower!r} has {sizes}",
            )


@dataclass(frozen=True)
class Axis:
    """Two opposite directions under one name: strength in [-1, 1] commands `negative` below 0 and `positive` above."""

    name: str
    negative: str  # direction name
    positive: str
