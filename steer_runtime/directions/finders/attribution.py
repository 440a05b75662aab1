"""`attribution`: what a policy does, differentiated by what it holds.

Source: Observable Propagation (Dunefsky & Cohan 2023, arXiv 2312.16291): an observable is a functional of the outputs, and a
neuron's part in it is its activation times the observable's gradient.
Invariant: gradients are of the unsteered policy, in the span in which the direction is written, through every forward of an
inference: of a flow policy through all Euler steps, from noise that is the moment's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer_runtime.directions.activations import TowerWatch, ready
from steer_runtime.directions.direction import Direction
from steer_runtime.directions.finders.differentiable import Observable, observable
from steer_runtime.directions.finders.material import Material
from steer_runtime.directions.finders.placing import (
    chosen_layers,
    chosen_site,
    place_neurons,
    place_vector,
    span_of,
    strongest,
)
from steer_runtime.directions.finders.recipe import Recipe
from steer_runtime.directions.options import AttributionOptions
from steer_runtime.errors import SteerError
from steer_runtime.moments import Moment
from steer_runtime.types import Role

LOUDER = 2.0
"""Factor of neurons that raise the observable, when they are scaled."""
_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Attribution:
    """Of one layer or residual site, float64 [width] each, over the span's tokens of all forwards and moments.

    part: mean over moments of sum_t x_t dO/dx_t, x the inputs of down_proj or the residual stream. gradient: mean over
    moments of sum_t dO/dx_t, which is what a vector added at all of these tokens changes O by, to first order. spread:
    standard deviation of x over tokens. consistency: mean cosine of a moment's gradient with their mean.
    """

    part: np.ndarray
    gradient: np.ndarray
    spread: np.ndarray
    consistency: float


def find(material: Material, recipe: Recipe, options: AttributionOptions) -> Direction:
    """Neurons: the `count` of the largest |mean f_j dO/df_j| for an observable O; each is added
    a_j = sign(mean dO/df_j) s_j, s_j the standard deviation of its own clean activation in the span (recipe.alpha: how many).
    Scaled: the same neurons, those with a part above zero by alpha (default 2) and those below by 2 - alpha, which changes O
    by (alpha - 1) sum |part_j| to first order and does nothing where a neuron is silent: so what is written depends on the
    moment, which no summand does. Dense: mean dO/dh at a site, of norm `norm` (default 1).

    Through the greedy words and tokens no gradient passes: for what a policy says first, attribute `said_<slot>`.
    Raises SteerError: 'unknown_observable', 'no_gradient', 'no_token', 'not_finite', 'dead_layer'.
    """
    dense = options.form == "dense"
    site = chosen_site(material, options.site)
    layers = () if dense else chosen_layers(material, options.layers)
    # One backward pass tells all sites, and a catalog may ask for each.
    sites = tuple(material.tower.steerable_sites) if dense else ()
    of = observable(material.policy, options.observable)
    span = span_of(material, recipe)
    moments = material.moments(options.moments)
    key = ("attribution", material.digest(options.moments), options.observable, layers, sites, span)
    found = material.once(key, lambda: attribute(material, of, layers, span, moments, sites=sites))
    sign = -1.0 if options.invert else 1.0
    facts: dict[str, Any] = {"moments": len(moments)}
    if dense:
        at = found[("residual", site)]
        facts["consistency"] = round(at.consistency, 4)
        return place_vector(material, recipe, site, sign * at.gradient, facts, norm=options.norm or 1.0)
    of_layer = {layer: found[("ffn", layer)] for layer in layers}
    pairs = strongest({layer: of_layer[layer].part for layer in layers}, options.count)
    if options.write == "scale":
        return _scaled(material, recipe, pairs, {pair: sign * of_layer[pair[0]].part[pair[1]] for pair in pairs}, facts)
    summands = [sign * np.sign(of_layer[layer].gradient[j]) * of_layer[layer].spread[j] for layer, j in pairs]
    facts["first_order_effect"] = sum(
        abs(float(of_layer[layer].gradient[j] * of_layer[layer].spread[j])) for layer, j in pairs
    )
    scores = [of_layer[layer].part[j] for layer, j in pairs]
    return place_neurons(material, recipe, pairs, np.array(summands), facts, norm=options.norm, scores=scores)


def _scaled(
    material: Material,
    recipe: Recipe,
    pairs: Sequence[tuple[int, int]],
    parts: Mapping[tuple[int, int], float],
    facts: dict[str, Any],
) -> Direction:
    if recipe.op not in (None, "scale") or recipe.low is not None:
        raise SteerError("bad_operation", f"direction {recipe.name!r} scales neurons: drop `op` and `low`")
    louder = LOUDER if recipe.alpha is None else recipe.alpha
    factors = np.array([louder if parts[pair] > 0 else 2.0 - louder for pair in pairs])
    facts["first_order_effect"] = (louder - 1.0) * sum(abs(parts[pair]) for pair in pairs)
    scores = [float(parts[pair]) for pair in pairs]
    return place_neurons(material, recipe, pairs, factors, facts, norm=None, scores=scores, op="scale")


def attribute(
    material: Material,
    of: Observable,
    layers: Sequence[int],
    span: frozenset[Role],
    moments: Sequence[Moment],
    *,
    sites: Sequence[int] = (),
) -> Mapping[tuple[str, int], Attribution]:
    """("ffn", layer) or ("residual", site) -> gradients and activations there. One forward and one backward a moment."""
    sums: dict[tuple[str, int], _Sums] = {}
    with _Gradients(material.policy, material.tower.name, layers, sites) as watch, torch.enable_grad():
        for index, moment in enumerate(moments):
            for place, (x, g) in watch.observe(of, moment, span).items():
                sums.setdefault(place, _Sums()).add(x, g)
            material.report("differentiating", index + 1, len(moments))
    if any(kept.tokens == 0 for kept in sums.values()):
        raise SteerError(
            "no_token", f"no token of this policy has a role in span {', '.join(sorted(span))}: choose another"
        )
    out = {place: kept.attribution() for place, kept in sums.items()}
    if not all(np.isfinite(a.part).all() and np.isfinite(a.gradient).all() for a in out.values()):
        raise SteerError("not_finite", "gradients are NaN or infinite: check the observable and the moments")
    return out


class _Sums:
    """Running sums over moments at one place."""

    def __init__(self) -> None:
        self.tokens = 0
        self.part: np.ndarray | float = 0.0
        self.total: np.ndarray | float = 0.0
        self.square: np.ndarray | float = 0.0
        self.gradients: list[np.ndarray] = []

    def add(self, x: np.ndarray, g: np.ndarray) -> None:
        """One moment's x and dO/dx, [tokens, width]."""
        self.part = self.part + (x * g).sum(0)
        self.total = self.total + x.sum(0)
        self.square = self.square + (x**2).sum(0)
        self.gradients.append(g.sum(0))
        self.tokens += len(x)

    def attribution(self) -> Attribution:
        gradients = np.stack(self.gradients)
        mean = gradients.mean(0)
        sizes = np.linalg.norm(gradients, axis=1) * np.linalg.norm(mean)
        spread = np.sqrt(np.maximum(self.square / self.tokens - (self.total / self.tokens) ** 2, 0.0))
        return Attribution(
            np.asarray(self.part) / len(gradients),
            mean,
            spread,
            float(np.mean(gradients @ mean / np.maximum(sizes, _TINY))),
        )


class _Gradients(TowerWatch):
    """A watch that adds a zero at each place and differentiates by it: dO/dx through all that comes after."""

    def __init__(self, policy: Any, tower: str, layers: Sequence[int], sites: Sequence[int]) -> None:
        super().__init__(policy, tower, layers, sites)
        self._seen: dict[tuple[str, int], list[tuple[Tensor, Tensor, list[int]]]] = {}
        self._span: frozenset[Role] = frozenset()

    def observe(
        self, of: Observable, moment: Moment, span: frozenset[Role]
    ) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
        """Place -> (x, dO/dx), float64 [tokens of the span, width], over all forwards of one inference."""
        places = [*(("ffn", layer) for layer in self.layers), *(("residual", site) for site in self.sites)]
        self._seen = {place: [] for place in places}
        self._span = span
        ready(self.policy, moment)
        value = of(self.policy.decode(moment.observation))
        leaves = [zero for place in places for _, zero, _ in self._seen[place]]
        # The last layer's later words reach the observable by no path, and a said word none but its own forward.
        found = iter(torch.autograd.grad(value, leaves, allow_unused=True))
        out = {}
        for place in places:
            width = self.tower.d_ff if place[0] == "ffn" else self.tower.d_model
            xs, gs = [np.zeros((0, width))], [np.zeros((0, width))]
            for x, zero, inside in self._seen[place]:
                gradient = next(found)
                g = torch.zeros_like(zero) if gradient is None else gradient
                xs.append(x[inside].to("cpu", torch.float64).numpy())
                gs.append(g[inside].to("cpu", torch.float64).numpy())
            out[place] = np.concatenate(xs), np.concatenate(gs)
        self._seen = {}
        return out

    def on_ffn(self, layer: int, f: Tensor) -> Tensor:
        return self._with_zero(("ffn", layer), f)

    def on_residual(self, site: int, h: Tensor) -> Tensor:
        return self._with_zero(("residual", site), h)

    def _with_zero(self, place: tuple[str, int], x: Tensor) -> Tensor:
        inside = [index for index, role in enumerate(self.roles) if role in self._span]
        zero = torch.zeros_like(x, requires_grad=True)
        self._seen[place].append((x.detach(), zero, inside))
        return x + zero
