"""Verbs of this room for the `steer` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sim import data_cli
from sim.evaluation import cli as evaluation_cli
from sim.evaluation.tuning import cli as tuning_cli
from sim.training import cli as training_cli


def register(app: typer.Typer) -> None:
    """Add the verbs; nothing heavy is imported until one runs."""
    app.command("report")(report)
    app.add_typer(data_cli.app)
    app.add_typer(training_cli.app)
    app.add_typer(evaluation_cli.app)
    app.add_typer(tuning_cli.app)


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a recorded episode (episode.json and arrays.npz).")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file to write; default: report.html beside the folder.")
    ] = None,
) -> None:
    """Draw the report of a recorded episode again.

    Example: steer report out/demo/episode
    """
    from sim import report as reports
    from sim.episode import load

    typer.echo(reports.render(load(folder), out or folder.resolve().parent / "report.html"))
