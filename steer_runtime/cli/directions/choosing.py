"""The variants of a swept catalog that did best, as a catalog of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from steer_runtime.cli.directions.common import new_console, new_table, printable, say

app = typer.Typer()


@app.command(
    epilog="[bold]Example[/]: steer directions build configs/catalogs/pocket-pi0-libero-sweep.yaml --store out/sweep   |   "
    "steer directions score --all --store out/sweep --random 0 ... --out out/sweep-score   |   steer directions choose "
    "configs/catalogs/pocket-pi0-libero-sweep.yaml --scored out/sweep-score/score.json --out configs/catalogs/chosen.yaml"
)
def choose(
    file: Annotated[Path, typer.Argument(help="Catalog file whose entries sweep options.")],
    scored: Annotated[Path, typer.Option(help="score.json of what was built from it.")],
    out: Annotated[Path, typer.Option(help="The catalog file to write; one that is there is replaced.")],
    aim: Annotated[
        float, typer.Option(min=0, help="On-axis effect that both ends are to reach, in standard deviations.")
    ] = 1.0,
    reading: Annotated[str, typer.Option(help="executed or expected, as in `score`.")] = "executed",
) -> None:
    """Keep, of every entry of a swept catalog, the variant and strength that reach an effect with the least damage.

    Where none reaches it: the one with the largest on-axis effect less damage. Choose on other moments than those on which
    the result is shown.
    """
    from steer_runtime.directions import choosing
    from steer_runtime.directions.building import read_catalog

    catalog = read_catalog(file)
    document = choosing.read_score(scored)
    choices = choosing.choose(catalog, document, reading, aim)
    table = new_table("Chosen", "entry", "variant", "strength", "on-axis", "damage", "reaches the aim", "tried")
    for c in choices:
        variant = c.variant.name.removeprefix(c.entry.name).lstrip(".")
        numbers = (
            f"{c.strength:g}",
            f"{c.on:+.2f}",
            f"{c.damage:.2f}",
            "yes" if c.reaches else "no",
            str(len(c.tried)),
        )
        table.add_row(*(Text(printable(cell)) for cell in (c.entry.name, variant, *numbers)))
    new_console().print(table)
    without = sorted({e.name for e in catalog.entries} - {c.entry.name for c in choices})
    missing = [*without, *(name for c in choices for name in c.missing)]
    if missing:
        say(f"not in the score, refused by their finder or never scored: {', '.join(missing)}")
    say(f"written: {choosing.save(catalog, choices, document, out)}")
