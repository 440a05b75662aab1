"""What steering costs an eager SmolLM2-135M on the CPU: our hooks against none, the seed's hook, and nnsight.

python -m benchmarks.hooks [--rounds 40]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import nnsight
import numpy as np
import torch
import typer

from benchmarks.ratios import Variant, show, side_by_side
from benchmarks.smollm2 import PREFILL, LanguageModel, overrides
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
        kept = show(
            f"eager prefill of {PREFILL} tokens",
            side_by_side(_variants(subject, directions, subject.prefill, 1.01, None), rounds=rounds),
        )
        cache = subject.filled_cache()
        kept &= show(
            "eager single-token decode",
            side_by_side(
                _variants(subject, directions, lambda: subject.decode(cache), 1.03, cache), rounds=2 * rounds, calls=5
            ),
        )
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
