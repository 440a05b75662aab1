"""The `steer` command: one application, verbs from every room.

Invariant: a refused input is one sentence on stderr and exit code 2, never a traceback; `--help` imports no model code.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import click
import typer

from steer_runtime.cli import directions, pocket
from steer_runtime.cli.verify import verify
from steer_runtime.errors import SteerError

app = typer.Typer(
    name="steer",
    help="Steer vision-language-action policies from the inside.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(directions.app, name="directions")
app.add_typer(pocket.app, name="pocket")
app.command(epilog="Examples:  steer verify  ·  steer verify --policy my-policy.yaml --image photo.png --json")(verify)


def _add_outer_rooms() -> None:
    """Verbs of rooms that steer_runtime must not import, found by entry point."""
    for point in sorted(entry_points(group="steer_runtime.commands"), key=lambda point: point.name):
        point.load()(app)


def main() -> None:
    """Entry point of the console script."""
    _add_outer_rooms()
    try:
        app()
    except SteerError as error:
        click.echo(f"steer: {error.sentence}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("steer: interrupted", err=True)
        sys.exit(130)
