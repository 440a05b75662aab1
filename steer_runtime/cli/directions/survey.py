"""What the labels of a whole model say, layer by layer, and what became of them in another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steer_runtime.cli.directions.common import (
    DEFAULT_CACHE,
    DEFAULT_POLICY,
    CacheOption,
    PolicyOption,
    labels_for,
    new_console,
    new_table,
    parse_numbers,
    policy_title,
    progress_bar,
    say,
    show_label,
)
from steer_runtime.cli.directions.search import word_space
from steer_runtime.cli.directions.source import (
    CheckpointOption,
    SourceTowerOption,
    TokenizerOption,
    open_source,
    tower_name,
)

app = typer.Typer()


@app.command(
    epilog="[bold]Examples[/]: steer directions layers --out layers.html   |   "
    "steer directions layers --checkpoint models/pocket-openvla-libero --layers 3-5"
)
def layers(
    out: Annotated[Path | None, typer.Option(help="Draw them on this page, a .html file.")] = None,
    layers: Annotated[str, typer.Option(help="Layers, such as 3,26-29; default all.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of the random directions that show what chance gives.")] = 0,
    policy: PolicyOption = DEFAULT_POLICY,
    checkpoint: CheckpointOption = None,
    tokenizer: TokenizerOption = None,
    tower: SourceTowerOption = "",
    cache: CacheOption = DEFAULT_CACHE,
) -> None:
    """How many value vectors of each layer say something, and how many say an action."""
    from steer_runtime.directions.share_page import require_plotly, write_share_page
    from steer_runtime.directions.shares import BY_CHANCE, shares

    if out is not None:
        require_plotly(out)
    loaded = open_source(policy, checkpoint, tokenizer)
    found = labels_for(loaded, tower_name(loaded, tower), cache, parse_numbers(layers, "layers"))
    space = word_space(found.basis)
    with progress_bar("random directions") as progress:
        threshold = space.coherence_by_chance(found.tokens.shape[-1], seed=seed, progress=progress)
    rows = shares(found, space, threshold)
    title = f"What the value vectors of {policy_title(loaded)} say"
    table = new_table(
        f"{title}; {BY_CHANCE:.0%} semantic by chance",
        "layer",
        "vectors",
        "semantic",
        "action",
        "action tokens",
        "most coherent label",
    )
    for row in rows:
        example = show_label(found.text(row.layer, row.examples[0])[:5]) if row.examples else ""
        table.add_row(
            str(row.layer),
            str(row.vectors),
            f"{row.semantic} ({row.semantic_share:.1%})",
            f"{row.action} ({row.action_share:.1%})",
            f"{row.action_tokens:.2%}",
            example,
        )
    new_console().print(table)
    if out is not None:
        write_share_page(out, title, found, rows, threshold)
        say(f"drawn in {out}")


@app.command(
    epilog="[bold]Examples[/]: steer directions compare openvla-7b/ openvla-7b-finetuned-libero-object/   |   "
    "steer directions compare pocket-untrained pocket-libero --layers-before 0-3,6-7 --layers-after 0-5"
)
def compare(
    before: Annotated[
        str, typer.Argument(help="A policy (a name in configs/policies, or its YAML) or a checkpoint's folder.")
    ],
    after: Annotated[str, typer.Argument(help="The same, of the model that came of it.")],
    layers_before: Annotated[str, typer.Option(help="Layers of the first, such as 0-3,26-29; default all.")] = "",
    layers_after: Annotated[str, typer.Option(help="Layers of the second, as many, paired in order.")] = "",
    top: Annotated[int, typer.Option(min=0, help="Most moved value vectors to show.")] = 20,
    tower: SourceTowerOption = "",
    cache: CacheOption = DEFAULT_CACHE,
) -> None:
    """Which labels differ between two models: by layer, and the value vectors that moved most."""
    from steer_runtime.directions.comparison import compare as compared

    sides = []
    for name, chosen, what in ((before, layers_before, "layers-before"), (after, layers_after, "layers-after")):
        numbers = parse_numbers(chosen, what)
        folder = Path(name) if Path(name).is_dir() else None
        source = open_source(DEFAULT_POLICY if folder else name, folder)
        sides.append((policy_title(source), labels_for(source, tower_name(source, tower), cache, numbers)))
    (title_before, labels_before), (title_after, labels_after) = sides
    found = compared(labels_before, labels_after, top=top)
    table = new_table(
        f"{found.share:.1%} of value vectors keep half of their label or more, {title_before} to {title_after}",
        "layer",
        "layer after",
        "vectors",
        "kept",
        "unchanged",
        "lost all",
        "became action",
    )
    for pair in found.layers:
        table.add_row(
            str(pair.before),
            str(pair.after),
            str(pair.vectors),
            f"{pair.kept} ({pair.share:.1%})",
            f"{pair.unchanged} ({pair.unchanged / pair.vectors:.1%})",
            f"{pair.lost} ({pair.lost / pair.vectors:.1%})",
            f"{pair.became_action} ({pair.became_action / pair.vectors:.1%})",
        )
    console = new_console()
    console.print(table)
    if not found.moved:
        say("every label shown is the same in both")
        return
    moved = new_table("Most moved", "layer", "neuron", "shared", "label before", "label after")
    for one in found.moved:
        layer = str(one.before) if one.before == one.after else f"{one.before}, {one.after}"
        texts = (show_label(one.label_before), show_label(one.label_after))
        moved.add_row(layer, str(one.neuron), str(one.shared), *texts)
    console.print(moved)
