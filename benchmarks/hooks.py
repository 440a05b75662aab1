"""What steering costs an eager SmolLM2-135M on the CPU: our hooks against none, the seed's hook, and nnsight.

python -m benchmarks.hooks [--rounds 40]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import nnsight
import numpy as np
import torch
import typer
from torch import nn

from benchmarks.ratios import Variant, show, side_by_side
from benchmarks.smollm2 import PREFILL, PROMPT_ROLES, LanguageModel, overrides
from steer_runtime.directions.direction import Direction
from steer_runtime.steering.offline import OfflineSteering
from steer_runtime.steering.seed import seed_override

FORTY, EVERY = "40 neurons in 10 layers", "4 neurons in every layer"


def main(
    rounds: int = typer.Option(40, help="Rounds of the side-by-side timing; decoding takes twice as many."),
    threads: int = typer.Option(2, help="Threads of torch."),
) -> None:
    """Print prefill and decode ratios to the unhooked model; exit 1 when a limit is missed."""
    torch.set_num_threads(threads)
    subject = LanguageModel()
    tower = subject.towers["lm"]
    directions = {
        FORTY: overrides(tower, range(0, 30, 3), 4, "forty"),
        EVERY: overrides(tower, range(30), 4, "every"),
    }
    with torch.inference_mode():
        cache = subject.filled_cache()
        kept = True
        for phase, tokens, forward, limit, filled in (
            (f"eager prefill of {PREFILL} tokens", PREFILL, subject.prefill, 1.01, None),
            ("eager single-token decode", 1, lambda: subject.decode(cache), 1.03, cache),
        ):
            variants = _variants(subject, directions, forward, limit, filled)
            rest = {"rounds": rounds} if tokens > 1 else {"rounds": 2 * rounds, "calls": 5}
            ratios = side_by_side(variants, **rest)
            kept &= show(phase, ratios)
            for label, direction in directions.items():
                spent = _hooks_alone(subject, direction, tokens)
                share = spent / (ratios[0].floor_ms / 1e3)
                print(f"{phase}, {label}: the hooks alone take {spent * 1e6:.0f} us = {share:.2%} of the forward\n")
    sys.exit(0 if kept else 1)


def _variants(
    subject: LanguageModel,
    directions: dict[str, Direction],
    forward: Callable[[], torch.Tensor],
    limit: float,
    cache: object,
) -> list[Variant]:
    tower = subject.towers["lm"]
    steering = OfflineSteering(subject, list(directions.values()))  # type: ignore[arg-type]
    variants = [
        Variant("no hooks", forward),
        Variant("engine, nothing active", forward, lambda: _steered(steering, {})),
    ]
    for label, direction in directions.items():
        strengths = {direction.name: 1.0}
        variants += [
            Variant(f"engine, {label}", forward, lambda s=strengths: _steered(steering, s), limit),  # type: ignore[misc]
            Variant(f"seed's hook, {label}", forward, lambda d=direction: seed_override(tower, d)),  # type: ignore[misc]
            Variant(f"nnsight, {label}", _Nnsight(subject, direction, cache)),
        ]
    return variants


def _hooks_alone(subject: LanguageModel, direction: Direction, tokens: int) -> float:
    """Seconds for one call of every hook on tensors of the real shape: what a forward pays, without the forward's noise."""
    tower = subject.towers["lm"]
    f, h = torch.randn(1, tokens, tower.d_ff), torch.randn(1, tokens, tower.d_model)
    blank = [nn.Identity() for _ in range(2 * tower.layers + 1)]
    steering = OfflineSteering(subject, [direction])  # type: ignore[arg-type]
    times = []
    with _steered(steering, {direction.name: 1.0}):
        subject.announce(PROMPT_ROLES if tokens > 1 else ("action",))
        for module, site in zip(blank, steering.engine.sites, strict=True):
            if site.kind == "neurons":
                module.register_forward_pre_hook(site.hook)
            else:
                module.register_forward_hook(site.hook)
        inputs = [f if site.kind == "neurons" else h for site in steering.engine.sites]
        bare = nn.Identity()
        for _ in range(200):
            began = time.perf_counter()
            for module, tensor in zip(blank, inputs, strict=True):
                module(tensor)
            hooked = time.perf_counter()
            for tensor in inputs:
                bare(tensor)
            times.append(2 * hooked - began - time.perf_counter())
    return float(np.quantile(times, 0.25))


@contextmanager
def _steered(steering: OfflineSteering, strengths: dict[str, float]) -> Iterator[None]:
    with steering:
        steering.set(strengths)
        steering.engine.latch()
        yield


class _Nnsight:
    """The same override as an nnsight trace around the same forward."""

    def __init__(self, subject: LanguageModel, direction: Direction, cache: object) -> None:
        n = direction.neurons
        assert n is not None
        self._subject = subject
        self._traced = nnsight.NNsight(subject.model)
        self._cache = cache
        self._writes = [
            (int(layer), torch.from_numpy(n.neuron[n.layer == layer]).long()) for layer in np.unique(n.layer)
        ]
        self._alpha = float(n.alpha[0])

    def __call__(self) -> torch.Tensor:
        traced, writes, alpha, cache = self._traced, self._writes, self._alpha, self._cache
        embeddings = self._subject.embeddings if cache is None else self._subject.embeddings[:, :1]
        with traced.trace(inputs_embeds=embeddings, past_key_values=cache, use_cache=cache is not None):
            for layer, neurons in writes:
                traced.layers[layer].mlp.down_proj.input[..., neurons] = alpha
            hidden = traced.norm.output.save()
        if cache is not None:
            cache.crop(-1)
        return hidden


if __name__ == "__main__":
    typer.run(main)
