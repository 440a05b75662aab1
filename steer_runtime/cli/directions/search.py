"""Value vectors found by what they say."""

from __future__ import annotations

from typing import Annotated

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
    parse_words,
    policy_title,
    show_label,
)

app = typer.Typer()


@app.command(
    epilog="[bold]Examples[/]: steer directions search up above --top 10   |   "
    "steer directions search fast quick --against slow --layers 20-29"
)
def search(
    words: Annotated[list[str], typer.Argument(help="Words to look for in the labels, one token each.")],
    against: Annotated[str, typer.Option(help="Comma-separated words a label must not hold.")] = "",
    top: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 20,
    layers: Annotated[str, typer.Option(help="Layers, such as 3,26-29; default all.")] = "",
    policy: PolicyOption = DEFAULT_POLICY,
    tower: TowerOption = "lm",
    cache: CacheOption = DEFAULT_CACHE,
) -> None:
    """Value vectors whose labels carry words; `flat` is layer * d_ff + neuron, as in the published OpenVLA clusters."""
    from steer_runtime.directions import index

    loaded = load(policy)
    found = labels_for(loaded, tower, cache, parse_numbers(layers, "layers"))
    matches = index.search(found, words, against=parse_words(against))
    said = f"{len(matches)} value vectors of {policy_title(loaded)} say {', '.join(words)}"
    table = new_table(
        f"{said}; the first {min(top, len(matches))}", "layer", "neuron", "flat", "rank", "score", "label"
    )
    for m in matches[:top]:
        flat = found.identity.flat(m.layer, m.neuron)
        table.add_row(str(m.layer), str(m.neuron), str(flat), str(m.rank), f"{m.score:.3f}", show_label(m.label))
    new_console().print(table)
