"""Value vectors read in words: their labels."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer_runtime.cli.directions.common import (
    DEFAULT_CACHE,
    DEFAULT_POLICY,
    CacheOption,
    PolicyOption,
    TowerOption,
    labels_for,
    load,
    new_console,
    new_table,
    parse_numbers,
    policy_title,
    say,
    show_label,
)
from steer_runtime.errors import SteerError

if TYPE_CHECKING:
    from steer_runtime.directions.token_basis import Labels

app = typer.Typer()


@app.command(
    epilog="[bold]Examples[/]: steer directions labels --layers 3,26-29 --neurons 0-19   |   "
    "steer directions labels --csv labels.csv   |   steer directions labels   (compute and cache all)"
)
def labels(
    layers: Annotated[str, typer.Option(help="Layers, such as 3,26-29; default all.")] = "",
    neurons: Annotated[str, typer.Option(help="Neurons of each layer to show, such as 0-9.")] = "0-9",
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write every label of the layers to this file instead.")
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, max=1000, help="Tokens in a label.")] = 10,
    policy: PolicyOption = DEFAULT_POLICY,
    tower: TowerOption = "lm",
    cache: CacheOption = DEFAULT_CACHE,
) -> None:
    """What each value vector says: its best tokens in the token basis, computed once and cached."""
    loaded = load(policy)
    found = labels_for(loaded, tower, cache, parse_numbers(layers, "layers"), top_k)
    if csv_file is not None:
        rows = _write_csv(csv_file, found, loaded)
        say(f"{rows} labels of {policy_title(loaded)} written to {csv_file}")
        return
    shown = parse_numbers(neurons, "neurons") or [0]
    table = new_table(f"Labels of {policy_title(loaded)}", "layer", "neuron", "flat", "label", "best score")
    for layer in found.layers:
        for neuron in shown:
            label = found.text(layer, neuron)
            score = f"{found.scores[found.row(layer), neuron, 0]:.3f}"
            table.add_row(str(layer), str(neuron), str(found.identity.flat(layer, neuron)), show_label(label), score)
    new_console().print(table)


def _write_csv(path: Path, found: Labels, policy: Any) -> int:
    """Every label as a row; the policy column carries the note of an untrained one. Returns the number of rows."""
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["policy", "layer", "neuron", "flat", "best_score", "label"])
            for row, layer in enumerate(found.layers):
                for neuron in range(found.identity.d_ff):
                    label = json.dumps(found.text(layer, neuron), ensure_ascii=False)
                    score = float(found.scores[row, neuron, 0])
                    flat = found.identity.flat(layer, neuron)
                    writer.writerow([policy_title(policy), layer, neuron, flat, f"{score:.6g}", label])
    except OSError as why:
        raise SteerError("not_written", f"{path} could not be written ({why.strerror})") from why
    return len(found.layers) * found.identity.d_ff
