"""The store: axes, cards, what verifies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from steer_runtime.cli.directions.common import (
    DEFAULT_POLICY,
    DEFAULT_STORE,
    PolicyOption,
    StoreOption,
    TowerOption,
    load,
    new_console,
    new_table,
    policy_facts,
    printable,
    say,
    show_direction,
    today,
    tower_of,
    untrained_suffix,
)
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


@app.command("list", epilog="[bold]Example[/]: steer directions list --store directions")
def list_directions(store: StoreOption = DEFAULT_STORE) -> None:
    """Every direction and axis of the store. Files that do not verify are named with the reason; the exit code is 2."""
    from steer_runtime.directions.store import DirectionStore

    folder = DirectionStore(store)
    entries = folder.list()
    table = new_table(f"Directions in {store}", "id", "model", "op", "span", "writes", "max strength", "found by")
    for entry in entries:
        d = entry.direction
        if d is None:
            continue
        writes = f"{len(d.neurons)} neurons" if d.neurons is not None else f"{len(d.dense or {})} dense"
        strength = f"{d.max_strength:g}" + ("" if d.proven else " (unproven)")
        finder = str(d.provenance.get("finder", "-")) + untrained_suffix([d])
        cells = (d.id, d.model_hash[:12], d.op, ",".join(sorted(d.span)), writes, strength, finder)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    new_console().print(table)
    bad = [entry for entry in entries if entry.problem is not None]
    for entry in bad:
        typer.echo(f"refused: {printable(entry.problem or '')}", err=True)
    for joined in folder.load_axes() if not bad else ():
        say(f"axis {joined.name}: {joined.negative} - {joined.positive}")
    if bad:
        raise SteerError("bad_store", f"{len(bad)} of {len(entries)} directions in {store} do not verify, see above")


@app.command(
    "import",
    epilog="[bold]Example[/]: steer directions import configs/clusters/corl2025_openvla_clusters.yaml "
    "--made-for openvla --policy openvla-7b",
)
def import_file(
    file: Annotated[Path, typer.Argument(help="YAML of cluster names over flat indices.")],
    made_for: Annotated[
        str, typer.Option(help="Model of the flat indices: openvla (32 x 11008), pi0fast (18 x 16384).")
    ],
    alpha: Annotated[float | None, typer.Option(help="Activation at strength 1, default 4; pi0-FAST used 10.")] = None,
    policy: PolicyOption = DEFAULT_POLICY,
    tower: TowerOption = "lm",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Save every cluster of a published file as a direction of this policy, if its sizes are the right ones."""
    from steer_runtime.directions import finders
    from steer_runtime.directions.formats import clusters as clusters_format
    from steer_runtime.directions.store import DirectionStore
    from steer_runtime.directions.token_basis import TowerIdentity

    sizes = {"openvla": clusters_format.OPENVLA_SIZE, "pi0fast": clusters_format.PI0_FAST_SIZE}
    if made_for not in sizes:
        raise SteerError("bad_option", f"--made-for {made_for[:40]!r} is unknown: expected {' or '.join(sizes)}")
    loaded = load(policy)
    identity = TowerIdentity.of(tower_of(loaded, tower), loaded.model_hash)
    recipe = finders.Recipe(name="", date=today(), alpha=alpha, facts=policy_facts(loaded))
    found = clusters_format.from_clusters(file, identity, recipe, made_for=sizes[made_for])
    for direction in found.directions:
        DirectionStore(store).save(direction)
        say(f"saved {direction.id}, {len(direction.neurons or ())} neurons{untrained_suffix([direction])}")
    if found.empty:
        say(f"without neurons, so not saved: {', '.join(found.empty)}")
