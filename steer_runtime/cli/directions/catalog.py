"""The store: axes, cards, what verifies."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.text import Text

from steer_runtime.cli.directions.common import (
    DEFAULT_STORE,
    UNTRAINED,
    StoreOption,
    new_console,
    new_table,
    printable,
    say,
    show_direction,
    untrained_suffix,
)
from steer_runtime.cli.directions.exchange import ModelCheckpoint, ModelPolicy, towers_of
from steer_runtime.errors import SteerError

app = typer.Typer()


@app.command(epilog="[bold]Example[/]: steer directions axis speed --negative slow --positive fast")
def axis(
    name: Annotated[str, typer.Argument(help="Name of the axis.")],
    negative: Annotated[str, typer.Option(help="Direction that strengths below 0 command.")],
    positive: Annotated[str, typer.Option(help="Direction that strengths above 0 command.")],
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Join two opposite directions under one name, so that one number in -1 to 1 commands both."""
    from steer_runtime.directions.direction import Axis
    from steer_runtime.directions.store import DirectionStore

    folder = DirectionStore(store)
    path = folder.save_axis(Axis(name, negative, positive))
    ends = [folder.load(end) for end in (negative, positive)]
    say(f"saved axis {name} = {ends[0].id} - {ends[1].id} to {path}{untrained_suffix(ends)}")


@app.command(
    epilog="[bold]Examples[/]: steer directions show up   |   steer directions show up@18c341 --json   |   "
    "steer directions show speed   (an axis)"
)
def show(
    ref: Annotated[str, typer.Argument(help="Name, or name@ and first digits of the hash.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON.")] = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """One direction or axis: what it writes where, and where it came from. Its hash is verified."""
    from steer_runtime.directions.store import DirectionStore

    folder = DirectionStore(store)
    if folder.has_axis(ref):
        joined = folder.load_axis(ref)
        ends = [folder.load(end) for end in (joined.negative, joined.positive)]
        if as_json:
            typer.echo(json.dumps({"name": ref, "negative": ends[0].id, "positive": ends[1].id}))
        else:
            say(f"axis {ref}: below 0 {ends[0].id}, above 0 {ends[1].id}{untrained_suffix(ends)}")
        return
    direction = folder.load(ref)
    if as_json:
        typer.echo(json.dumps({"id": direction.id, "hash": direction.hash, **direction.card()}, indent=1))
    else:
        show_direction(direction)


@app.command(
    epilog="[bold]Example[/]: steer directions annotate quick --calibrated 0.25,1 --max-strength 1 --proven "
    '--evidence "docs/results.md, speed axis" --licence Apache-2.0'
)
def annotate(
    ref: Annotated[str, typer.Argument(help="Name, or name@ and first digits of the hash.")],
    calibrated: Annotated[str, typer.Option(help="LOW,HIGH: strengths over which simulation showed its effect.")] = "",
    max_strength: Annotated[float | None, typer.Option(help="Largest strength the engine accepts, in (0, 1].")] = None,
    proven: Annotated[
        bool | None, typer.Option("--proven/--unproven", help="Whether simulation showed the largest strength safe.")
    ] = None,
    evidence: Annotated[str, typer.Option(help="Where that was shown: a command, a file, a page.")] = "",
    licence: Annotated[str, typer.Option(help="SPDX expression.")] = "",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Write into a direction's card what was found out since. What it does stays; its hash changes, as its card does."""
    from dataclasses import replace

    from steer_runtime.directions.store import DirectionStore

    if (calibrated or proven) and not evidence:
        raise SteerError("bad_option", "a range or a proof needs --evidence: say where simulation showed it")
    folder = DirectionStore(store)
    old = folder.load(ref)
    changes: dict[str, Any] = {
        "calibrated": _range(calibrated) if calibrated else None,
        "max_strength": max_strength,
        "proven": proven,
        "licence": licence or None,
        "provenance": {**old.provenance, "evidence": evidence} if evidence else None,
    }
    new = replace(old, **{key: value for key, value in changes.items() if value is not None})
    folder.replace(old, new)
    say(
        f"{old.id} is now {new.id}{untrained_suffix([new])}"
        if new.hash != old.hash
        else f"{old.id} says all that already"
    )


@app.command("list", epilog="[bold]Example[/]: steer directions list --store directions")
def list_directions(store: StoreOption = DEFAULT_STORE) -> None:
    """Every direction and axis of the store. Files that do not verify are named with the reason; the exit code is 2."""
    from steer_runtime.directions.store import DirectionStore

    folder = DirectionStore(store)
    entries, axes = folder.list(), folder.list_axes()
    table = new_table(f"Directions in {store}", "id", "model", "op", "span", "writes", "limit", "licence", "found by")
    for entry in entries:
        d = entry.direction
        if d is None:
            continue
        writes = f"{len(d.neurons)} neurons" if d.neurons is not None else f"{len(d.dense or {})} dense"
        strength = f"{d.max_strength:g}" + ("" if d.proven else " unproven")
        finder = str(d.provenance.get("finder", "-"))
        cells = (d.id, d.model_hash[:12], d.op, ",".join(sorted(d.span)), writes, strength, d.licence, finder)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    new_console().print(table)
    untrained = [e.id for e in entries if e.direction is not None and untrained_suffix([e.direction])]
    if untrained:
        say(f"of an {UNTRAINED}: {', '.join(untrained)}")
    for joined in axes:
        if joined.axis is not None:
            say(f"axis {joined.name}: {joined.axis.negative} - {joined.axis.positive}")
    found = [entry.problem for entry in entries] + [joined.problem for joined in axes]
    bad = [problem for problem in found if problem is not None]
    for problem in bad:
        typer.echo(f"refused: {printable(problem)}", err=True)
    if bad:
        raise SteerError(
            "bad_store", f"{len(bad)} of {len(found)} directions and axes in {store} do not verify, see above"
        )


@app.command(
    epilog="[bold]Examples[/]: steer directions verify   |   steer directions verify --policy pocket-libero   |   "
    "steer directions verify --checkpoint models/openvla-7b --store directions"
)
def verify(
    policy: ModelPolicy = "",
    checkpoint: ModelCheckpoint = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Read every file of the store: hashes, cards, ends of axes, and the model if one is given, each direction beside the
    tower that it names. Exit code 2 for a problem."""
    from steer_runtime.directions.store import DirectionStore

    if not store.is_dir():
        raise SteerError("bad_store", f"{store} is no folder: give the folder of directions to verify")
    folder = DirectionStore(store)
    towers = towers_of(policy, checkpoint) if policy or checkpoint is not None else ()
    problems = folder.verify(towers)
    for name, problem in problems:
        typer.echo(f"{printable(name)}: {printable(problem)}", err=True)
    if problems:
        raise SteerError("bad_store", f"{len(problems)} problems in {store}, see above")
    whose = f", all of model {towers[0].model_hash[:12]}" if towers else ""
    say(f"{len(folder.list())} directions and {len(folder.list_axes())} axes in {store} verify{whose}")


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise SteerError("bad_option", f"--calibrated {text[:40]!r} is no range: expected such as 0.25,1") from None
    return low, high
