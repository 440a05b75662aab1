"""Projection at the published sizes: time against the bare blocked product and top-k, and peak memory.

    python -m benchmarks.projection_full                       # both shapes, bfloat16
    python -m benchmarks.projection_full --shape openvla-7b --layers 3 --dtype float32
    python -m benchmarks.projection_full --whole               # every layer of the shape, for memory and time

Weights are fabricated (`full_shapes`). The floor has its weights ready in the product's precision and keeps no result:
a product and the k largest and k smallest of every block. It and the real one, which reads the files, selects over all
blocks, scores again and ranks, take turns layer by layer on the same blocks. Peak memory is that of a process that does
nothing but the projection. Prints a table and one line of JSON a shape.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.full_shapes import SHAPES
from steer_runtime.directions.checkpoint_vectors import CheckpointVectors, StoredMatrix, matrices_of
from steer_runtime.directions.projection import BLOCKS, TOP_K, Compute, Matrix, Spec, project_layer

TARGET, MEMORY_TARGET = 1.15, 2.0
_CHILD = "--child"


def floor(vectors: torch.Tensor, rows: torch.Tensor) -> None:
    """vectors [n, d_model], rows [vocab, d_model], both in the product's dtype."""
    with torch.no_grad():
        for first in range(0, len(rows), BLOCKS.tokens):
            block = rows[first : first + BLOCKS.tokens].T
            for start in range(0, len(vectors), BLOCKS.neurons):
                scores = vectors[start : start + BLOCKS.neurons] @ block
                scores.topk(TOP_K, 1)
                scores.topk(TOP_K, 1, largest=False)


def child(folder: Path, dtype: Compute, layers: list[int]) -> None:
    """The projection alone; prints seconds a layer and the peak resident memory in GB."""
    source = CheckpointVectors(folder)
    tower = next(iter(source.towers.values()))
    took = []
    for weight in matrices_of(tower, layers):
        start = time.perf_counter()
        project_layer(weight, source.unembedding, Spec(dtype=dtype))
        took.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"seconds": took, "peak_gb": peak}))


def measure(folder: Path, shape: str, dtype: Compute, layers: int, whole: bool, threads: int) -> dict[str, object]:
    source = CheckpointVectors(folder)
    tower = next(iter(source.towers.values()))
    chosen = list(range(tower.layers)) if whole else [0]
    command = [sys.executable, "-m", "benchmarks.projection_full", _CHILD, str(folder), dtype, str(threads)]
    done = subprocess.run([*command, *map(str, chosen)], check=True, stdout=subprocess.PIPE, text=True)
    alone = json.loads(done.stdout)
    rows = source.unembedding[:].to(getattr(torch, dtype))
    pairs = []
    for turn, weight in enumerate(matrices_of(tower, range(layers))):
        vectors = weight[:].T.to(rows.dtype).contiguous()

        def bare(vectors: torch.Tensor = vectors) -> None:
            floor(vectors, rows)

        def ours(weight: Matrix = weight) -> None:
            assert isinstance(weight, StoredMatrix)
            project_layer(weight, source.unembedding, Spec(dtype=dtype))

        took = {}
        for work in (bare, ours) if turn % 2 == 0 else (ours, bare):
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            took[work] = (time.perf_counter() - wall, time.process_time() - cpu)
        pairs.append((*took[bare], *took[ours]))
    ratios = sorted(o / b for b, _, o, _ in pairs)
    cpu_ratios = sorted(o / b for _, b, _, o in pairs)
    layer_s = statistics.median(o for _, _, o, _ in pairs)
    return {
        "benchmark": "projection_full",
        "shape": shape,
        "dtype": dtype,
        "threads": threads,
        "layers_timed": layers,
        "floor_layer_s": round(statistics.median(b for b, _, _, _ in pairs), 2),
        "project_layer_s": round(layer_s, 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "cpu_ratio": round(statistics.median(cpu_ratios), 3),
        "cpu_ratio_range": [round(cpu_ratios[0], 3), round(cpu_ratios[-1], 3)],
        "target": TARGET,
        "peak_gb": round(alone["peak_gb"], 3),
        "layers_in_peak": len(chosen),
        "whole_model_min": round((sum(alone["seconds"]) if whole else layer_s * tower.layers) / 60, 1),
        "whole_model_is": "measured" if whole else "projected",
    }


def main(
    shape: Annotated[str, typer.Option(help="openvla-7b, pi0, or both.")] = "both",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    layers: Annotated[int, typer.Option(min=1, help="Layers to time, each against its floor.")] = 3,
    whole: Annotated[bool, typer.Option("--whole", help="All layers in the process whose memory is measured.")] = False,
    threads: Annotated[int, typer.Option(min=1)] = torch.get_num_threads(),
    scratch: Annotated[Path | None, typer.Option(help="Where to fabricate: 2 GB, deleted afterwards.")] = None,
) -> None:
    torch.set_num_threads(threads)
    table = Table(title="Projection of full-size checkpoints (random weights)")
    for column in ("shape", "dtype", "floor s/layer", "ours s/layer", "ratio", "CPU ratio", "peak GB", "whole model"):
        table.add_column(column)
    failed = False
    for name in SHAPES if shape == "both" else (shape,):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            checkpoint = SHAPES[name](Path(folder) / name, range(layers))
            result = measure(checkpoint, name, Spec(dtype=dtype).dtype, layers, whole, threads)  # type: ignore[arg-type]
        print(json.dumps(result), flush=True)
        spread = "{} ({} - {})"
        table.add_row(
            name,
            dtype,
            str(result["floor_layer_s"]),
            str(result["project_layer_s"]),
            spread.format(result["ratio"], *result["ratio_range"]),  # type: ignore[misc]
            spread.format(result["cpu_ratio"], *result["cpu_ratio_range"]),  # type: ignore[misc]
            str(result["peak_gb"]),
            f"{result['whole_model_min']} min ({result['whole_model_is']})",
        )
        failed |= float(str(result["cpu_ratio"])) > TARGET or float(str(result["peak_gb"])) > MEMORY_TARGET
    Console(width=140).print(table)
    if failed:
        print(f"over the target of {TARGET} or {MEMORY_TARGET} GB", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    if _CHILD in sys.argv[1:2]:
        torch.set_num_threads(int(sys.argv[4]))
        child(Path(sys.argv[2]), sys.argv[3], [int(i) for i in sys.argv[5:]])  # type: ignore[arg-type]
    else:
        typer.run(main)
