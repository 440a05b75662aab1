"""Directions made by finders: `make FINDER NAME`, one verb a finder, and `build FILE` for a whole catalog.

Invariant: a verb's options are the fields of its finder's model, so that the command line and catalog files cannot differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic.fields import FieldInfo

from steer_runtime.cli.directions.common import (
    DEFAULT_CACHE,
    DEFAULT_POLICY,
    DEFAULT_STORE,
    CacheOption,
    PolicyOption,
    StoreOption,
    TowerOption,
    labels_for,
    load,
    parse_neurons,
    parse_numbers,
    parse_words,
    policy_facts,
    say,
    show_direction,
    today,
    untrained_suffix,
)
from steer_runtime.directions.direction import NO_LICENCE
from steer_runtime.directions.options import OPTIONS, FinderOptions, options_for
from steer_runtime.errors import SteerError

if TYPE_CHECKING:
    from steer_runtime.directions.finders import Material
    from steer_runtime.directions.store import DirectionStore

app = typer.Typer()
make = typer.Typer(
    help="Make a direction and save it: one verb a finder.", no_args_is_help=True, rich_markup_mode="rich"
)
app.add_typer(make, name="make")

EXAMPLES = {
    "token": "token up --words up,above --against down",
    "neurons": "neurons lift --neurons 3:17,4:20 --alpha 10",
    "word": "word speed --words faster,quick --against slow,slower --site 6 --norm 110 --axis",
    "action": "action rise --dimension 2 --tower expert --policy pocket-pi0-untrained   (of action tokens: action bold "
    "--readout size)",
    "contrast": "contrast quick --moments out/moments/neutral.safetensors --positive '{}, quickly | {}, fast' "
    "--negative '{}, slowly | {}, no hurry'   (an expert: --tower expert)",
    "attribution": "attribution pace --moments out/moments/told.safetensors --observable said_pace --axis   (an expert: "
    "attribution height --tower expert --form dense --site 4 --observable dz ...)",
    "probe": "probe height --moments out/moments/told.safetensors --quantity height --axis",
    "snmf": "snmf height --moments out/moments/told.safetensors --layer 5 --quantity height",
    "pca": "pca main --moments out/moments/told.safetensors --component 0",
    "random": "random up-control --like up --seed 1",
}
_PARSERS: dict[Any, Callable[[str, str], Any]] = {
    tuple[str, ...]: lambda text, name: _wordings(text) if "{}" in text else parse_words(text),
    tuple[int, ...]: lambda text, name: parse_numbers(text, name) or [],
    tuple[tuple[int, int], ...]: lambda text, name: parse_neurons(text),
}
"""How a field that the command line gives as text is read."""


def _recipe_parameters() -> list[inspect.Parameter]:
    """What every verb takes beside its finder's options, in the order in which help shows it."""

    def common(
        axis: Annotated[
            bool, typer.Option("--axis", help="Make NAME-positive, its opposite NAME-negative, and the axis NAME.")
        ] = False,
        alpha: Annotated[
            float | None,
            typer.Option(help="Activation at strength 1 of overridden neurons, else a factor of what is added."),
        ] = None,
        op: Annotated[
            str | None, typer.Option(help="override, add, scale, clamp or ablate, where neurons allow.")
        ] = None,
        low: Annotated[float | None, typer.Option(help="Lower bound, for clamp.")] = None,
        span: Annotated[
            str, typer.Option(help="Token roles, such as text,image; default the finder's: see its help.")
        ] = "",
        max_strength: Annotated[float, typer.Option(help="Largest strength the engine accepts, in (0, 1].")] = 1.0,
        licence: Annotated[str, typer.Option(help="SPDX expression, such as Apache-2.0.")] = NO_LICENCE,
        policy: PolicyOption = DEFAULT_POLICY,
        tower: TowerOption = "",
        store: StoreOption = DEFAULT_STORE,
        cache: CacheOption = DEFAULT_CACHE,
    ) -> None: ...

    return list(inspect.signature(common, eval_str=True).parameters.values())


def _option_parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """A field of a finder's options as a command-line option; sequences are given as text."""
    flag = f"--{name.replace('_', '-')}"
    kind: Any = field.annotation
    default: Any = ... if field.is_required() else field.default
    text = f"{field.description}"
    if kind in _PARSERS or "Literal" in str(kind):
        default = default if default is ... else default if isinstance(default, str) else ""
        kind = str
    annotation = Annotated[kind, typer.Option(flag, help=text)]
    parameter = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
    return parameter if default is ... else parameter.replace(default=default)


def _wordings(text: str) -> list[str]:
    """Wordings with bars between them, since a wording may hold commas."""
    return [part.strip() for part in text.split("|") if part.strip()]


def _parsed(field: FieldInfo, name: str, value: Any) -> Any:
    parser = _PARSERS.get(field.annotation)
    return value if parser is None else parser(value, name)


def _verb(finder: str, model: type[FinderOptions]) -> Callable[..., None]:
    """The function of one verb, with a signature that typer reads."""
    fields = model.model_fields
    recipe = _recipe_parameters()
    name = inspect.Parameter(
        "name",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        annotation=Annotated[str, typer.Argument(help="Name: lower-case letters, digits, '_', '-', '.'.")],
    )

    def verb(**given: Any) -> None:
        told = {field: given.pop(field) for field in fields}
        # What was not given is left to the model.
        kept = {field: _parsed(fields[field], field, value) for field, value in told.items() if value not in (None, "")}
        _make(finder, options_for(finder, kept), **given)

    optional = [_option_parameter(field, info) for field, info in fields.items()]
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*optional, *recipe)]
    verb.__signature__ = inspect.Signature([name, *keywords])  # type: ignore[attr-defined]
    verb.__doc__ = model.__doc__
    return verb


def _make(
    finder: str,
    options: FinderOptions,
    *,
    name: str,
    axis: bool,
    alpha: float | None,
    op: str | None,
    low: float | None,
    span: str,
    max_strength: float,
    licence: str,
    policy: str,
    tower: str,
    store: Path,
    cache: Path,
) -> None:
    from steer_runtime.directions import finders
    from steer_runtime.directions.direction import Axis
    from steer_runtime.directions.store import DirectionStore

    if axis:
        options.opposite()  # refused before a policy is loaded
    folder = DirectionStore(store)
    loaded = load(policy)
    recipe = finders.Recipe(
        name=name,
        date=today(),
        op=op,  # type: ignore[arg-type]  # Direction refuses an unknown one by name
        alpha=alpha,
        low=low,
        span=frozenset(parse_words(span)) if span else None,  # type: ignore[arg-type]
        max_strength=max_strength,
        facts=policy_facts(loaded),
        licence=licence,
    )
    with _material(loaded, tower, cache, folder) as material:
        made = (
            finders.find_axis(finder, material, recipe, options)
            if axis
            else (finders.find(finder, material, recipe, options),)
        )
    for direction in made:
        path = folder.save(direction)
        show_direction(direction)
        say(f"saved {direction.id} to {path}")
    if axis:
        path = folder.save_axis(Axis(name, made[0].name, made[-1].name))
        say(f"saved axis {name} to {path}{untrained_suffix(made)}")


for _finder, _options in OPTIONS.items():
    make.command(_finder, epilog=f"[bold]Example[/]: steer directions make {EXAMPLES[_finder]}")(
        _verb(_finder, _options)
    )


@app.command(
    epilog="[bold]Example[/]: steer directions build configs/catalogs/pocket-libero.yaml --store out/directions"
)
def build(
    file: Annotated[Path, typer.Argument(help="Catalog file: entries, each with a finder and its options.")],
    store: StoreOption = DEFAULT_STORE,
    cache: CacheOption = DEFAULT_CACHE,
) -> None:
    """Make every entry of a catalog file. Entries that are in the store by the same recipe are left as they are.

    An entry that its finder refuses is named with the reason, the rest is built, and the exit code is 2.
    """
    from steer_runtime.directions import building
    from steer_runtime.directions.store import DirectionStore

    catalog = building.read_catalog(file)
    loaded = load(catalog.policy)
    folder = DirectionStore(store)
    counts = {"made": 0, "left": 0}
    refused = []
    with _material(loaded, building.first_tower(catalog), cache, folder) as material:
        for built in building.build(catalog, material, folder, date=today(), facts=policy_facts(loaded)):
            if built.refused is not None:
                refused.append(built.refused)
                typer.echo(f"refused: {built.refused.sentence}", err=True)
                continue
            what = "made" if built.made else "left"
            counts[what] += 1
            say(f"{what} {built.entry.name}: {', '.join(direction.id for direction in built.directions)}")
    say(f"{counts['made']} entries made, {counts['left']} left as they were, {len(refused)} refused")
    if refused:
        raise SteerError("bad_catalog", f"{len(refused)} of {len(catalog.entries)} entries were refused, see above")


@contextmanager
def _material(loaded: Any, tower: str, cache: Path, store: DirectionStore) -> Iterator[Material]:
    """Material whose long work is shown as a bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from steer_runtime.directions.finders import Material

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        # Shown at the first report only: what takes no time needs no bar.
        task = bar.add_task("", total=None, visible=False)
        yield Material(
            loaded,
            tower,
            labels=lambda tower, layers: labels_for(loaded, tower, cache, layers),
            stored=lambda ref: store.load(ref, model_hash=loaded.model_hash),
            report=lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total, visible=done < total
            ),
        )
