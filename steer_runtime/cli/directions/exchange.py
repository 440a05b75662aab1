"""Directions from files of other projects, and to them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer_runtime.cli.directions.common import (
    DEFAULT_STORE,
    StoreOption,
    TowerOption,
    load,
    parse_words,
    policy_facts,
    progress_bar,
    say,
    today,
    tower_of,
    untrained_suffix,
)
from steer_runtime.errors import SteerError

if TYPE_CHECKING:
    from steer_runtime.directions.direction import Direction
    from steer_runtime.directions.finders.recipe import Recipe
    from steer_runtime.directions.formats.exported import Exported
    from steer_runtime.directions.token_basis import TowerIdentity

app = typer.Typer()

ModelPolicy = Annotated[
    str, typer.Option("--policy", help="Policy of the directions: a name in configs/policies, or YAML.")
]
ModelCheckpoint = Annotated[
    Path | None, typer.Option("--checkpoint", help="Instead of --policy: its checkpoint folder, read and not loaded.")
]
_FORMATS = {".yaml": "clusters", ".yml": "clusters", ".gguf": "gguf", ".safetensors": "safetensors"}


@app.command(
    "import",
    epilog="[bold]Examples[/]: steer directions import configs/clusters/corl2025_openvla_clusters.yaml --made-for openvla "
    "--checkpoint models/openvla-7b   |   steer directions import configs/clusters/corl2025_pi0fast_clusters.yaml "
    "--made-for pi0fast --alpha 10 --checkpoint models/pi0 --tower prefix   |   steer directions import honest.gguf --alpha 2 --span text --policy pocket-libero",
)
def import_file(
    file: Annotated[
        Path,
        typer.Argument(help="YAML of clusters over flat indices, GGUF control vector, or safetensors."),
    ],
    policy: ModelPolicy = "",
    checkpoint: ModelCheckpoint = None,
    tower: TowerOption = "",
    made_for: Annotated[
        str,
        typer.Option(help="YAML: sizes of the flat indices: openvla (32x11008), pi0fast (18x16384), or LAYERSxD_FF."),
    ] = "",
    name: Annotated[str, typer.Option(help="GGUF, safetensors: name of the direction; default the file's.")] = "",
    alpha: Annotated[
        float | None,
        typer.Option(help="YAML: activation at strength 1, default 4 (pi0-FAST used 10); vectors: factor, default 1."),
    ] = None,
    op: Annotated[str | None, typer.Option(help="override, add, scale, clamp or ablate; default by the file.")] = None,
    span: Annotated[str, typer.Option(help="Token roles to steer, such as text,image; default all.")] = "",
    max_strength: Annotated[float, typer.Option(help="Largest strength the engine accepts, in (0, 1].")] = 1.0,
    licence: Annotated[str, typer.Option(help="SPDX expression of the file's licence, as its maker states it.")] = "",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Save a file's directions as directions of this model, if its sizes are the right ones. The file is only data."""
    from steer_runtime.directions.direction import NO_LICENCE
    from steer_runtime.directions.finders.recipe import Recipe
    from steer_runtime.directions.store import DirectionStore

    form = _format_of(file)
    if made_for and form != "clusters":
        raise SteerError("bad_option", f"--made-for says what flat indices mean, and {file.name!r} holds none: drop it")
    if name and form == "clusters":
        raise SteerError("bad_option", f"the clusters of {file.name!r} have their own names: drop --name")
    sizes = _sizes(made_for, file) if form == "clusters" else None
    if not file.is_file():
        raise SteerError("bad_file", f"{str(file)!r} is not a file: give one to import")
    identity, facts = model_of(policy, checkpoint, tower)
    recipe = Recipe(
        name=name,
        date=today(),
        op=op,  # type: ignore[arg-type]  # Direction refuses an unknown one by name
        alpha=alpha,
        span=frozenset(parse_words(span)) if span else None,  # type: ignore[arg-type]
        max_strength=max_strength,
        facts=facts,
        licence=licence or NO_LICENCE,
    )
    directions, empty = _read(file, form, identity, recipe, sizes)
    # All are read before any is saved: a file is imported whole or not at all.
    DirectionStore(store).save_all(directions)
    for direction in directions:
        what = (
            f"{len(direction.neurons)} neurons"
            if direction.neurons is not None
            else f"{len(direction.dense or ())} dense"
        )
        say(f"saved {direction.id}, {what}{untrained_suffix([direction])}")
    if empty:
        say(f"without neurons, so not saved: {', '.join(empty)}")


@app.command(
    epilog="[bold]Examples[/]: steer directions export quick --to quick.gguf --lossy   |   "
    "steer directions export up down --to clusters.yaml --flat   |   steer directions export up --to up.safetensors"
)
def export(
    refs: Annotated[
        list[str], typer.Argument(help="Names, or name@ and first digits of the hash. YAML takes several.")
    ],
    to: Annotated[Path, typer.Option("--to", help="New file: .yaml, .gguf or .safetensors.")],
    flat: Annotated[
        bool, typer.Option("--flat", help="YAML: lists of flat indices, without labels, as the seed's pi0-FAST file.")
    ] = False,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Write it although the format cannot hold all that the direction does.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Write directions for other programs. What the format cannot hold is named, and refused without --lossy."""
    from steer_runtime.directions.files import write_atomically
    from steer_runtime.directions.store import DirectionStore

    form = _format_of(to)
    if to.exists() or to.is_symlink():
        raise SteerError("exists", f"{to} exists already: remove it or choose another file")
    if flat and form != "clusters":
        raise SteerError("bad_option", "--flat is a form of cluster files: drop it, or write to a .yaml")
    if len(refs) > 1 and form != "clusters":
        raise SteerError("bad_option", f"{len(refs)} directions were named: a {to.suffix} file holds one")
    directions = [DirectionStore(store).load(ref) for ref in refs]
    exported = _write(directions, form, flat)
    if exported.losses and not lossy:
        raise SteerError(
            "lossy",
            f"{to.name!r} would lose something: {'; '.join(exported.losses)}; give --lossy to write it nevertheless",
        )
    write_atomically(to, exported.content)
    for loss in exported.losses:
        typer.echo(f"lost: {loss}", err=True)
    say(f"wrote {', '.join(d.id for d in directions)} to {to}{untrained_suffix(directions)}")


def model_of(policy: str, checkpoint: Path | None, tower: str) -> tuple[TowerIdentity, dict[str, Any]]:
    """Identity of a tower, of a loaded policy or of a checkpoint's files, and facts for the provenance."""
    from steer_runtime.directions.token_basis import TowerIdentity

    with _model(policy, checkpoint) as model:
        # A wrong tower is refused before gigabytes are hashed.
        return TowerIdentity.of(tower_of(model, tower), model.model_hash), policy_facts(model)


def towers_of(policy: str, checkpoint: Path | None) -> tuple[TowerIdentity, ...]:
    """Identities of all towers, otherwise as `model_of`."""
    from steer_runtime.directions.token_basis import TowerIdentity

    with _model(policy, checkpoint) as model:
        return tuple(TowerIdentity.of(tower, model.model_hash) for tower in model.towers.values())


@contextmanager
def _model(policy: str, checkpoint: Path | None) -> Iterator[Any]:
    """A loaded policy, or the vectors of a checkpoint's files, with a bar for when they are hashed."""
    if bool(policy) == (checkpoint is not None):
        given = "both" if policy else "none"
        raise SteerError(
            "bad_option",
            f"{given} of --policy and --checkpoint was given: expected one, the model the directions are of",
        )
    if checkpoint is None:
        yield load(policy)
        return
    from steer_runtime.directions.checkpoint_vectors import CheckpointVectors

    with progress_bar("hashing weights (millions)") as progress:
        yield CheckpointVectors(checkpoint, hash_progress=progress)


def _format_of(path: Path) -> str:
    form = _FORMATS.get(path.suffix.lower())
    if form is None:
        raise SteerError(
            "bad_format",
            f"{path.name!r} is of no format that is read or written: expected {', '.join(_FORMATS)}; pickles and archives "
            "can run code or hold paths, and are never opened",
        )
    return form


def _sizes(made_for: str, file: Path) -> tuple[int, int]:
    from steer_runtime.directions.formats import clusters

    known = {"openvla": clusters.OPENVLA_SIZE, "pi0fast": clusters.PI0_FAST_SIZE}
    if made_for in known:
        return known[made_for]
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,8})", made_for)
    if match is None:
        raise SteerError(
            "bad_option",
            f"--made-for {made_for[:40]!r} does not say what the flat indices of {file.name!r} mean: expected openvla, "
            "pi0fast or LAYERSxD_FF, such as 32x11008",
        )
    return int(match[1]), int(match[2])


def _read(
    file: Path, form: str, identity: TowerIdentity, recipe: Recipe, sizes: tuple[int, int] | None
) -> tuple[tuple[Direction, ...], tuple[str, ...]]:
    """Directions of a file, and the names of its empty clusters."""
    if sizes is not None:
        from steer_runtime.directions.formats.clusters import from_clusters

        found = from_clusters(file, identity, recipe, made_for=sizes)
        return found.directions, found.empty
    if form == "gguf":
        from steer_runtime.directions.formats.control_vector import from_control_vector

        return (from_control_vector(file, identity, recipe),), ()
    from steer_runtime.directions.formats.tensors import from_tensors

    return (from_tensors(file, identity, recipe),), ()


def _write(directions: list[Direction], form: str, flat: bool) -> Exported:
    if form == "clusters":
        from steer_runtime.directions.formats.clusters import to_clusters

        return to_clusters(directions, labelled=not flat)
    if form == "gguf":
        from steer_runtime.directions.formats.control_vector import to_control_vector

        return to_control_vector(directions[0])
    from steer_runtime.directions.formats.tensors import to_tensors

    return to_tensors(directions[0])
