"""`attribution`: neurons by how much what they hold moves what the policy does.

Source: Observable Propagation (Dunefsky & Cohan 2023, arXiv 2312.16291): an observable is a functional of the outputs, and a
neuron's part in it is its activation times the observable's gradient.
Invariant: gradients are of the unsteered policy, in the span in which the direction is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer_runtime.directions.activations import TowerWatch, ready
from steer_runtime.directions.direction import Direction
from steer_runtime.directions.finders.differentiable import Observable, observable
from steer_runtime.directions.finders.material import Material
from steer_runtime.directions.finders.placing import chosen_layers, place_neurons, span_of, strongest
from steer_runtime.directions.finders.recipe import Recipe
from steer_runtime.directions.options import AttributionOptions
from steer_runtime.errors import SteerError
from steer_runtime.moments import Moment
from steer_runtime.types import Role


@dataclass(frozen=True, eq=False)
class Attribution:
    """Of one layer, float64 [d_ff] each, over the span's tokens of all moments. part: mean over moments of
    sum_t f_t dO/df_t. gradient: mean over moments of sum_t dO/df_t. spread: standard deviation of f over tokens."""

    part: np.ndarray
    gradient: np.ndarray
    spread: np.ndarray


def find(material: Material, recipe: Recipe, options: AttributionOptions) -> Direction:
    """The `count` neurons of the largest |mean f_j dO/df_j| for an observable O; each is added
    a_j = sign(mean dO/df_j) s_j, s_j the standard deviation of its own clean activation in the span (recipe.alpha: how many).

    Through the greedy words and tokens no gradient passes: for what a policy says first, attribute `said_<slot>`.
    Raises SteerError: 'unknown_observable', 'no_gradient', 'no_token', 'not_finite'.
    """
    layers = chosen_layers(material, options.layers)
    of = observable(material.policy, options.observable)
    span = span_of(recipe)
    moments = material.moments(options.moments)
    key = ("attribution", material.digest(options.moments), options.observable, layers, span)
    found = material.once(key, lambda: attribute(material, of, layers, span, moments))
    pairs = strongest({layer: found[layer].part for layer in layers}, options.count)
    sign = -1.0 if options.invert else 1.0
    summands = [sign * np.sign(found[layer].gradient[j]) * found[layer].spread[j] for layer, j in pairs]
    raised = sum(abs(float(found[layer].gradient[j] * found[layer].spread[j])) for layer, j in pairs)
    facts = {"moments": len(moments), "first_order_effect": raised}
    scores = [found[layer].part[j] for layer, j in pairs]
    return place_neurons(material, recipe, pairs, np.array(summands), facts, norm=options.norm, scores=scores)


def attribute(
    material: Material, of: Observable, layers: Sequence[int], span: frozenset[Role], moments: Sequence[Moment]
) -> dict[int, Attribution]:
    """Gradient times activation of every neuron of some layers. One forward and one backward a moment."""
    width = material.tower.d_ff
    part, gradient, total, square = ({layer: np.zeros(width) for layer in layers} for _ in range(4))
    tokens = 0
    with _Gradients(material.policy, material.tower.name, layers) as watch, torch.enable_grad():
        for index, moment in enumerate(moments):
            for layer, (f, g) in watch.observe(of, moment, span).items():
                part[layer] += (f * g).sum(0)
                gradient[layer] += g.sum(0)
                total[layer] += f.sum(0)
                square[layer] += (f**2).sum(0)
                tokens += len(f) if layer == layers[0] else 0
            material.report("differentiating", index + 1, len(moments))
    if tokens == 0:
        raise SteerError(
            "no_token", f"no token of this policy has a role in span {', '.join(sorted(span))}: choose another"
        )
    out = {
        layer: Attribution(
            part[layer] / len(moments),
            gradient[layer] / len(moments),
            np.sqrt(np.maximum(square[layer] / tokens - (total[layer] / tokens) ** 2, 0.0)),
        )
        for layer in layers
    }
    if not all(np.isfinite(a.part).all() and np.isfinite(a.gradient).all() for a in out.values()):
        raise SteerError("not_finite", "gradients are NaN or infinite: check the observable and the moments")
    return out


class _Gradients(TowerWatch):
    """A watch that adds a zero to each input of down_proj and differentiates by it: dO/df through all later layers."""

    def __init__(self, policy: Any, tower: str, layers: Sequence[int]) -> None:
        super().__init__(policy, tower, layers)
        self._seen: dict[int, list[tuple[Tensor, Tensor, list[int]]]] = {}
        self._span: frozenset[Role] = frozenset()

    def observe(
        self, of: Observable, moment: Moment, span: frozenset[Role]
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """layer -> (f, dO/df), float64 [tokens of the span, d_ff], over all forwards of one inference."""
        self._seen = {layer: [] for layer in self.layers}
        self._span = span
        ready(self.policy, moment)
        value = of(self.policy.decode(moment.observation))
        leaves = [zero for layer in self.layers for _, zero, _ in self._seen[layer]]
        # The last layer's later words reach the observable by no path, and a said word none but its own forward.
        found = iter(torch.autograd.grad(value, leaves, allow_unused=True))
        out = {}
        for layer in self.layers:
            fs, gs = [np.zeros((0, self.tower.d_ff))], [np.zeros((0, self.tower.d_ff))]
            for f, zero, inside in self._seen[layer]:
                gradient = next(found)
                g = torch.zeros_like(zero) if gradient is None else gradient
                fs.append(f[inside].to("cpu", torch.float64).numpy())
                gs.append(g[inside].to("cpu", torch.float64).numpy())
            out[layer] = np.concatenate(fs), np.concatenate(gs)
        self._seen = {}
        return out

    def on_ffn(self, layer: int, f: Tensor) -> Tensor:
        inside = [index for index, role in enumerate(self.roles) if role in self._span]
        zero = torch.zeros_like(f, requires_grad=True)
        self._seen[layer].append((f.detach(), zero, inside))
        return f + zero
