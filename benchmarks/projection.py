"""Projection onto the token basis against its floor: a bare blocked multiplication and top-k of the same size.

    python benchmarks/projection.py                 # SmolLM2's value vectors, policy pocket-untrained
    python benchmarks/projection.py --quick         # one layer, three repeats
    python benchmarks/projection.py --dtype bfloat16

The two run in turn in one process, so that what else the machine does hits both; the figure is the median of the paired
ratios. `projection_full` has the published sizes.
Target: at most 1.15. Prints a table and one line of JSON.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from steer_runtime.directions.projection import BLOCKS, TOP_K, Blocks
from steer_runtime.directions.token_basis import TokenBasis
from steer_runtime.errors import SteerError
from steer_runtime.policies import load_policy

TARGET = 1.15


def floor(weights: list[torch.Tensor], embedding: torch.Tensor, blocks: Blocks) -> None:
    """What any implementation must at least do for both ends, with weights ready in float32 and no result kept."""
    with torch.no_grad():
        for weight in weights:
            for first in range(0, len(embedding), blocks.tokens):
                rows = embedding[first : first + blocks.tokens].T
                for start in range(0, weight.shape[1], blocks.neurons):
                    scores = weight[:, start : start + blocks.neurons].T @ rows
                    scores.topk(TOP_K, dim=1)
                    scores.topk(TOP_K, dim=1, largest=False)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(
    policy: Annotated[str, typer.Option(help="Policy whose weights to project.")] = "pocket-untrained",
    dtype: Annotated[str, typer.Option(help="Stored precision of the weights: float32 or bfloat16.")] = "float32",
    layers: Annotated[int, typer.Option(min=1, help="Layers, from the last.")] = 4,
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    neurons: Annotated[int, typer.Option(min=1, help="Value vectors of one product, for both.")] = BLOCKS.neurons,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of one product, for both.")] = BLOCKS.tokens,
    quick: Annotated[bool, typer.Option("--quick", help="One layer, three repeats.")] = False,
) -> None:
    if quick:
        layers, repeats = 1, 3
    blocks = Blocks(neurons, tokens)
    loaded = load_policy(policy, dtype=getattr(torch, dtype))
    tower = loaded.towers["lm"]
    chosen = list(range(max(0, tower.layers - layers), tower.layers))
    basis = TokenBasis.of(loaded)
    weights = [tower.down_projs[i].weight.detach().float() for i in chosen]  # type: ignore[attr-defined]
    embedding = basis.unembedding.float()

    def ours() -> None:
        basis.project(tower, loaded.model_hash, layers=chosen, blocks=blocks)

    def bare() -> None:
        floor(weights, embedding, blocks)

    for work in (bare, ours):  # the first pass pays for threads and pages
        work()
    times = []
    for i in range(repeats):  # whoever goes second finds warmer caches, so they take turns
        order = (bare, ours) if i % 2 == 0 else (ours, bare)
        took = {work: seconds(work) for work in order}
        times.append((took[bare], took[ours]))
    ratios = sorted(o / b for b, o in times)
    vectors = len(chosen) * tower.d_ff
    result = {
        "benchmark": "projection",
        "policy": loaded.name,
        "trained": bool(loaded.trained),
        "dtype": dtype,
        "vectors": vectors,
        "d_model": tower.d_model,
        "vocab": basis.vocab,
        "top_k": TOP_K,
        "blocks": [neurons, tokens],
        "repeats": repeats,
        "floor_s": round(statistics.median(b for b, _ in times), 4),
        "project_s": round(statistics.median(o for _, o in times), 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_range": [round(ratios[0], 4), round(ratios[-1], 4)],
        "target": TARGET,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    note = "" if loaded.trained else " (untrained policy)"
    table = Table(title=f"{vectors} value vectors of {loaded.name}{note} x {basis.vocab} tokens, {dtype}")
    for column in ("work", "median s", "vectors/s", "ratio to floor"):
        table.add_column(column, justify="left" if column == "work" else "right")
    for name, key, ratio in (
        ("bare product + top-k, both ends", "floor_s", "1"),
        ("TokenBasis.project", "project_s", ""),
    ):
        spread = f"{result['ratio']} ({ratios[0]:.3f} - {ratios[-1]:.3f})"
        table.add_row(name, str(result[key]), f"{vectors / float(str(result[key])):.0f}", ratio or spread)
    Console().print(table)
    print(json.dumps(result))
    if statistics.median(ratios) > TARGET:
        print(f"over the target of {TARGET}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        typer.run(main)
    except SteerError as refused:
        print(refused, file=sys.stderr)
        sys.exit(2)
