"""Where a verb reads value vectors: a loaded policy, or the files of a checkpoint that is never built.

Invariant: an untrained source says so, and two sources at once are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from steer_runtime.cli.directions.common import DEFAULT_POLICY, UNTRAINED, load, progress_bar
from steer_runtime.errors import SteerError

CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint", help="Read this checkpoint's files (OpenVLA, or Pi0 in LeRobot's layout); no model is built."
    ),
]
TokenizerOption = Annotated[
    Path | None, typer.Option("--tokenizer", help="tokenizer.json for a --checkpoint that has none (Pi0).")
]
SourceTowerOption = Annotated[str, typer.Option("--tower", help="Transformer; default the one that reads words.")]


def open_source(policy: str, checkpoint: Path | None, tokenizer: Path | None = None) -> Any:
    """A policy or `CheckpointVectors`. Raises SteerError: 'bad_option', and those of loading either."""
    if checkpoint is None:
        if tokenizer is not None:
            raise SteerError("bad_option", "--tokenizer goes with --checkpoint: a policy has its own")
        return load(policy)
    if policy != DEFAULT_POLICY:
        raise SteerError("bad_option", "--policy and --checkpoint are two sources: give one of them")
    from steer_runtime.directions.checkpoint_vectors import CheckpointVectors

    with progress_bar("hashing the weights (millions)") as progress:
        vectors = CheckpointVectors(checkpoint, tokenizer=tokenizer, hash_progress=progress)
        vectors.model_hash  # noqa: B018  hashed here, under its own bar
    if not vectors.trained:
        typer.echo(f"{vectors.name}: {UNTRAINED}", err=True)
    return vectors


def tower_name(source: Any, tower: str) -> str:
    """The tower asked for, or the one whose token basis the source has."""
    return tower or next(name for name, of in source.towers.items() if of.basis == "tokens")
