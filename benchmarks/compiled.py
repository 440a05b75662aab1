"""What steering costs under torch.compile, and that nothing recompiles while everything about it changes.

    python -m benchmarks.compiled [--changes 1000] [--rounds 40]

The floor is the same model, compiled without any hook. The changes run under `error_on_recompile`.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from types import FunctionType, MethodType

import torch
import typer
from rich.progress import track
from torch import Tensor
from transformers.cache_utils import StaticCache

from benchmarks.ratios import Variant, show, side_by_side
from benchmarks.smollm2 import PREFILL, PROMPT_ROLES, LanguageModel, dense, overrides
from steer_runtime.steering.command import SteeringCommand
from steer_runtime.steering.engine import SteeringEngine
from steer_runtime.types import ROLES, Role

LIMIT = 1.02


def main(
    changes: int = typer.Option(1000, help="Changes of strengths, directions and spans under error_on_recompile."),
    rounds: int = typer.Option(40, help="Rounds of the side-by-side timing; decoding takes twice as many."),
) -> None:
    """Print ratios of compiled steered to compiled unsteered; exit 1 on a recompilation or a missed limit."""
    torch.set_num_threads(2)
    subjects = {"floor": LanguageModel(), "steered": LanguageModel()}
    tower = subjects["steered"].towers["lm"]
    directions = [
        overrides(tower, range(0, 30, 3), 4, "forty"),
        overrides(tower, range(30), 4, "every"),
        dense(tower, (0, 10, 20), "dense"),
    ]
    clock = itertools.count()
    engine = SteeringEngine(subjects["steered"], directions, clock=lambda: float(next(clock)))
    engine.attach()
    with torch.inference_mode():
        forwards = {name: _compiled(subject) for name, subject in subjects.items()}
        for prefill, decode in forwards.values():
            prefill()
            decode()
        _change_everything(engine, forwards["steered"], changes)
        kept = True
        for index, phase in enumerate((f"compiled prefill of {PREFILL} tokens", "compiled single-token decode")):
            floor, steered = (forwards[name][index] for name in ("floor", "steered"))
            variants = [Variant("compiled, no hooks", floor), Variant("engine, nothing active", steered, limit=LIMIT)]
            for direction in directions:
                variants.append(
                    Variant(f"engine, {direction.name}", steered, lambda d=direction.name: _Only(engine, d), LIMIT)  # type: ignore[misc]
                )
            kept &= show(phase, side_by_side(variants, rounds=rounds * (1 + index), calls=1 + 4 * index))
    sys.exit(0 if kept else 1)


def _compiled(subject: LanguageModel) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Compiled prefill, and compiled decoding on a static cache that every step winds back, so that all steps are alike."""
    cache = StaticCache(config=subject.model.config, max_cache_len=PREFILL + 8)
    subject.announce(PROMPT_ROLES)
    subject.forward(subject.embeddings, cache)
    # A compiler keeps its graphs by code object and does not look at hooks: each forward needs code of its own, or the
    # steered model would silently run the graph of the floor.
    whole = torch.compile(_own_code(subject.forward), fullgraph=True, dynamic=False)
    step = torch.compile(_own_code(subject.forward), fullgraph=True, dynamic=False)

    def prefill() -> Tensor:
        subject.announce(PROMPT_ROLES)
        return whole(subject.embeddings)

    def decode() -> Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(PREFILL)
        subject.announce(("action",))
        return step(subject.embeddings[:, :1], cache)

    return prefill, decode


def _own_code(method: MethodType) -> MethodType:
    function = method.__func__
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    return MethodType(copy, method.__self__)


class _Only:
    """One direction at full strength while it lasts."""

    sequence = itertools.count(1)

    def __init__(self, engine: SteeringEngine, target: str) -> None:
        self._engine, self._target = engine, target

    def __enter__(self) -> None:
        _send(self._engine, "set", self._target, 1.0)
        self._engine.latch()

    def __exit__(self, *exc: object) -> None:
        _send(self._engine, "clear_all", "", 0.0)
        self._engine.latch()


def _send(engine: SteeringEngine, op: str, target: str, strength: float, span: frozenset[Role] | None = None) -> None:
    sequence = next(_Only.sequence)
    command = SteeringCommand("benchmark", 1, sequence, time.time_ns(), op, target, strength, span=span)  # type: ignore[arg-type]
    verdict = engine.apply(command)
    assert verdict.accepted, verdict.sentence


def _change_everything(engine: SteeringEngine, forwards: tuple[Callable[[], Tensor], ...], changes: int) -> None:
    """Strengths, directions and spans in turn; every forward of the compiled graph must be the graph that exists."""
    spans = [None, *(frozenset({role}) for role in ROLES if role != "state"), frozenset(ROLES)]
    names = list(engine.directions)
    sums = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for change in track(range(changes), description="changes without recompiling"):
            _send(engine, "set", names[change % len(names)], (change % 11) / 10, spans[change % len(spans)])
            if change % 17 == 16:
                _send(engine, "clear_all", "", 0.0)
            engine.latch()
            # Prefill is slow: one in fifty changes is enough to exercise its graph.
            sums.add(float(forwards[0 if change % 50 == 0 else 1]().sum()))
            engine.finish()  # raises when the graph does not hold the hooks
    _send(engine, "clear_all", "", 0.0)
    engine.latch()
    print(
        f"{changes} changes of strength, direction and span: no recompilation, every hook in the graph, {len(sums)} different results"
    )


if __name__ == "__main__":
    typer.run(main)
