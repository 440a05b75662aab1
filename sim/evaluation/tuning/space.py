"""What a trial may choose, and the direction that a choice makes of the one that is tuned.

Invariant: a choice writes to no neuron, layer or site that the direction does not hold, except a dense vector that is moved
to another site by name; a choice that changes nothing gives the very same direction, to its hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sim.evaluation.tuning.settings import Search
from steer_runtime.directions.direction import Direction
from steer_runtime.directions.towers import require_reach, require_span
from steer_runtime.errors import SteerError
from steer_runtime.types import Role, Tower

if TYPE_CHECKING:
    from optuna.trial import Trial

GAINED = ("override", "add")
"""Operations whose alpha is a size that can be multiplied; of `scale` and `clamp` it is a factor or a bound."""


@dataclass(frozen=True)
class Point:
    """One choice; see `settings.Search`. None: as the direction has it."""

    strength: float
    gain: float = 1.0
    neurons: int | None = None
    layers: tuple[int, ...] | None = None
    sites: tuple[int, ...] | None = None
    span: frozenset[Role] | None = None
    ramp_s: float = 0.0

    def to_jsonable(self) -> dict[str, Any]:
        """What is chosen, without what is left as it is."""
        span = None if self.span is None else sorted(self.span)
        layers, sites = (None if v is None else list(v) for v in (self.layers, self.sites))
        whole = {**asdict(self), "span": span, "layers": layers, "sites": sites}
        return {k: v for k, v in whole.items() if v is not None and (k, v) not in (("gain", 1.0), ("ramp_s", 0.0))}


def suggest(trial: Trial, search: Search) -> Point:
    """Ask the sampler; a number that is held is not asked for. Rounded: nobody commands a strength of twelve digits."""
    low, high = search.strength
    layers = None if search.layers is None else trial.suggest_categorical("layers", [_text(c) for c in search.layers])
    sites = None if search.sites is None else trial.suggest_categorical("sites", [_text(c) for c in search.sites])
    spans = None if search.spans is None else trial.suggest_categorical("span", [_text(c) for c in search.spans])
    return Point(
        strength=low if low == high else round(trial.suggest_float("strength", low, high), 3),
        gain=1.0 if search.gain is None else round(trial.suggest_float("gain", *search.gain, log=True), 3),
        neurons=None if search.neurons is None else trial.suggest_int("neurons", *search.neurons),
        layers=None if layers is None else tuple(int(part) for part in layers.split(",")),
        sites=None if sites is None else tuple(int(part) for part in sites.split(",")),
        span=None if spans is None else frozenset(spans.split(",")),  # type: ignore[arg-type]
        ramp_s=0.0 if search.ramp_s is None else round(trial.suggest_float("ramp_s", *search.ramp_s), 2),
    )


def point_of(parameters: Mapping[str, Any], search: Search) -> Point:
    """The choice of a trial that was asked before. Raises KeyError where it has not all of its parameters."""
    return suggest(_Told(parameters), search)  # type: ignore[arg-type]


def unchanged(search: Search) -> dict[str, Any] | None:
    """Parameters that leave the direction as it is, at the largest strength; None where the space does not hold them."""
    if search.neurons is not None or search.layers is not None or search.sites is not None or search.spans is not None:
        return None
    out: dict[str, Any] = {} if search.strength[0] == search.strength[1] else {"strength": search.strength[1]}
    if search.gain is not None:
        if not search.gain[0] <= 1 <= search.gain[1]:
            return None
        out["gain"] = 1.0
    if search.ramp_s is not None:
        out["ramp_s"] = search.ramp_s[0]
    return out


def shaped(direction: Direction, point: Point) -> Direction:
    """The direction that a choice makes: layers first, then so many of what is left, then the gain. Its strength and ramp
    are no part of it. Raises SteerError('bad_search')."""
    neurons, dense = direction.neurons, direction.dense
    if neurons is not None:
        kept = np.arange(len(neurons))
        if point.layers is not None:
            kept = kept[np.isin(neurons.layer, point.layers)]
        if point.neurons is not None and point.neurons < len(kept):
            largest = np.argsort(-np.abs(neurons.alpha[kept]), kind="stable")[: point.neurons]
            kept = kept[np.sort(largest)]
        if not len(kept):
            raise _bad(f"{direction.id!r} has no neuron in the layers {_text(point.layers or ())}")
        low = None if neurons.low is None else neurons.low[kept]
        alpha = neurons.alpha[kept] * np.float32(point.gain)
        neurons = replace(neurons, layer=neurons.layer[kept], neuron=neurons.neuron[kept], alpha=alpha, low=low)
    if dense is not None:
        if point.sites is not None:
            dense = {site: _vector(direction, dense, site) for site in sorted(point.sites)}
        dense = {site: vector * np.float32(point.gain) for site, vector in dense.items()}
    made = replace(direction, neurons=neurons, dense=dense, span=direction.span if point.span is None else point.span)
    if made.hash == direction.hash:
        return direction
    chosen = {k: v for k, v in point.to_jsonable().items() if k not in ("strength", "ramp_s")}
    facts = {**direction.provenance, "tuned_from": direction.id, "tuned": chosen}
    return replace(made, proven=False, calibrated=None, provenance=facts)


def require(search: Search, direction: Direction, tower: Tower) -> None:
    """Refuse a space that does not apply to a direction. Raises SteerError: 'bad_search', 'dead_layer', 'bad_span'."""
    who = f"{direction.id!r}"
    if search.gain is not None:
        if direction.op not in GAINED:
            raise _bad(f"`gain` has no meaning for {who}, whose operation is {direction.op!r}")
        if direction.op == "add" and search.strength[0] < search.strength[1]:
            raise _bad(
                f"`strength` and `gain` are one number for {who}, whose operation is 'add': hold one, such as strength: 1"
            )
    if direction.neurons is None:
        for name in ("neurons", "layers"):
            if getattr(search, name) is not None:
                raise _bad(f"`{name}` does not apply to {who}, which is dense: choose among `sites`, `gain`, `spans`")
        asked = sorted({site for sites in search.sites or () for site in sites})
        for site in asked:
            _vector(direction, direction.dense or {}, site)
        require_reach(tower, sites=asked, who="the search would write to")
    else:
        if search.sites is not None:
            raise _bad(f"`sites` does not apply to {who}, which writes neurons: choose among `layers` and `neurons`")
        if search.neurons is not None and search.neurons[1] > len(direction.neurons):
            raise _bad(f"`neurons` goes to {search.neurons[1]} and {who} has {len(direction.neurons)}")
        for layers in search.layers or ():
            shaped(direction, Point(1.0, layers=layers))
            strange = set(layers) - set(direction.neurons.layer.tolist())
            if strange:
                raise _bad(f"{who} has no neuron in layer {min(strange)}")
    for span in search.spans or ():
        require_span(tower, frozenset(span))


def _vector(direction: Direction, dense: Mapping[int, np.ndarray], site: int) -> np.ndarray:
    if site in dense:
        return dense[site]
    if len(dense) == 1:
        return next(iter(dense.values()))
    raise _bad(f"{direction.id!r} has vectors at the sites {_text(sorted(dense))} and none at {site}")


class _Told:
    """Answers as the sampler did."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._parameters = parameters

    def suggest_float(self, name: str, *_: float, log: bool = False) -> float:
        return float(self._parameters[name])

    def suggest_int(self, name: str, *_: int) -> int:
        return int(self._parameters[name])

    def suggest_categorical(self, name: str, _: object) -> Any:
        return self._parameters[name]


def _text(values: Any) -> str:
    return ",".join(str(v) for v in values)


def _bad(sentence: str) -> SteerError:
    return SteerError("bad_search", f"{sentence}; correct `search` in the YAML")
