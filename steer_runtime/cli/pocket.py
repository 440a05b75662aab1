"""`steer pocket`: make the small policy that needs no download of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steer_runtime.errors import SteerError

app = typer.Typer(help="Build pocket policies: OpenVLA's architecture around SmolLM2-135M.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `build` a verb of its own while it is the only one."""


@app.command()
def build(
    out: Annotated[Path, typer.Argument(help="New directory for the checkpoint.")],
    layers: Annotated[str, typer.Option(help="Layers of SmolLM2 to keep, e.g. 0-3,26-29.")] = "0-3,26-29",
    seed: Annotated[int, typer.Option(help="Seed of the random vision, projector and action rows.")] = 0,
    image_size: Annotated[int, typer.Option(help="Side of the network's image, px.")] = 224,
    patch: Annotated[int, typer.Option(help="Patch side, px: 28 gives 64 image tokens of 224 px, 14 gives 256.")] = 28,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Write an untrained pocket policy in OpenVLA's published checkpoint layout.

    Examples:

        steer pocket build build/pocket-untrained

        steer pocket build build/pocket-deep --layers 0-29 --patch 14
    """
    from steer_runtime.policies.pocket import build_pocket  # torch and transformers take seconds to import

    path = build_pocket(out, layers=parse_layers(layers), seed=seed, image_size=image_size, patch=patch, dtype=dtype)
    typer.echo(f"{path}: untrained policy, random vision and action rows; it has never learnt to act")


def parse_layers(text: str) -> list[int]:
    """Layer numbers of "0-3,26-29". Raises SteerError('bad_layers')."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 16:
            raise SteerError(
                "bad_layers", f"layers {text!r:.60} cannot be read: expected numbers and ranges, as 0-3,26-29"
            )
        layers += range(int(first), min(int(last), 10_000) + 1) if dash else [int(first)]
    return layers
