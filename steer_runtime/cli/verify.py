"""`steer verify`: the proof, as a table to paste."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from steer_runtime.errors import SteerError

if TYPE_CHECKING:
    import numpy as np

INSTRUCTION = "pick up the alphabet soup and place it in the basket"


def verify(
    policy: Annotated[
        str, typer.Option(help="Policy: a name in configs/policies, or a path to its YAML.")
    ] = "pocket-untrained",
    image: Annotated[
        Path | None, typer.Option(help="Square RGB picture to run on; default: a fixed random one.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the twenty neurons that are overridden.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Prove on a loaded policy that hooks fire, off is bit-identical, the seed's override is reproduced, detaching restores."""
    from steer_runtime.policies import load_policy
    from steer_runtime.types import Observation
    from steer_runtime.verify import verify as run

    console = Console(stderr=as_json)
    with console.status("loading the policy") as status:
        loaded = load_policy(policy)
        pixels = _pixels(image)
        observation = Observation(
            dict.fromkeys(loaded.cameras, pixels), state=_zeros(), instruction=INSTRUCTION, stamp_ns=0, frame_id=0
        )
        report = run(loaded, observation, seed=seed, progress=lambda name: status.update(name))
    title = f"{loaded.name}{'' if loaded.trained else ' (untrained policy)'}, model {loaded.model_hash[:12]}"
    if as_json:
        checks = [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in report.checks]
        print(
            json.dumps(
                {"policy": loaded.name, "trained": loaded.trained, "model_hash": loaded.model_hash, "checks": checks}
            )
        )
    else:
        table = Table(title=title)
        for column in ("check", "", "detail"):
            table.add_column(column)
        for check in report.checks:
            table.add_row(check.name, "[green]ok[/]" if check.passed else "[red]FAILED[/]", check.detail)
        console.print(table)
    sys.exit(0 if report.passed else 1)


def _pixels(image: Path | None) -> np.ndarray:
    """uint8 [H, W, 3]."""
    import numpy as np

    if image is None:
        return np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(image) as opened:
            return np.asarray(opened.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise SteerError("bad_image", f"{image} is not a readable picture ({error}); give a PNG or JPEG") from None


def _zeros() -> np.ndarray:
    import numpy as np

    return np.zeros(8)
