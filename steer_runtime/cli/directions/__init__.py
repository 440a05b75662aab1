"""`steer directions`: read value vectors in words, make directions, look into the store."""

from __future__ import annotations

import typer

from steer_runtime.cli.directions import catalog, choosing, exchange, labels, making, score, search, survey

app = typer.Typer(
    help="Find, name and inspect directions: what a policy's value vectors say, and what to steer with.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
for verbs in (labels, search, survey, making, catalog, exchange, score, choosing):
    app.registered_commands += verbs.app.registered_commands
    app.registered_groups += verbs.app.registered_groups
