"""Value vectors read in words: their labels."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    say,
    show_label,
)
from steer_runtime.cli.directions.source import (
    CheckpointOption,
    SourceTowerOption,
    TokenizerOption,
    open_source,
    tower_name,
)
from steer_runtime.errors import SteerError

if TYPE_CHECKING:
    from steer_runtime.directions.token_basis import Labels

app = typer.Typer()


@app.command(
    epilog="[bold]Examples[/]: steer directions labels --layers 3,26-29 --neurons 0-19   |   "
    "steer directions labels --csv labels.csv   |   steer directions labels   (compute and cache all)   |   "
    "steer directions labels --checkpoint models/pocket-openvla-libero --layers 5 --low --units dz   |   "
    "steer directions labels --checkpoint openvla-7b --dtype bfloat16 --ray auto"
)
def labels(
    layers: Annotated[str, typer.Option(help="Layers, such as 3,26-29; default all.")] = "",
    neurons: Annotated[str, typer.Option(help="Neurons of each layer to show, such as 0-9.")] = "0-9",
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write every label of the layers to this file instead.")
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, max=1000, help="Tokens in a label.")] = 10,
    low: Annotated[bool, typer.Option("--low", help="Show the most negative end too.")] = False,
    variant: Annotated[
        str, typer.Option(help="Scores: raw (as published), normed (final norm's weight), centred (mean row off).")
    ] = "raw",
    dtype: Annotated[
        str, typer.Option(help="Precision of the product: float32, or bfloat16 (faster; scores stay float32).")
    ] = "float32",
    units: Annotated[
        str, typer.Option(help="Show action tokens as this dimension moves (dx, dy, dz, ...), or 'all' in a table.")
    ] = "",
    policy: PolicyOption = DEFAULT_POLICY,
    checkpoint: CheckpointOption = None,
    tokenizer: TokenizerOption = None,
    suite: Annotated[
        str, typer.Option(help="With --checkpoint and --units: whose action statistics; default the only ones.")
    ] = "",
    ray: Annotated[
        str, typer.Option(help="Compute layers on Ray: auto or host:port (a running cluster), or local.")
    ] = "",
    workers: Annotated[int | None, typer.Option(min=1, help="With --ray local: layers at a time.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="With --ray: CPUs of each layer.")] = 1,
    tower: SourceTowerOption = "",
    cache: CacheOption = DEFAULT_CACHE,
) -> None:
    """What each value vector says: the tokens it is closest to and furthest from, computed once and cached."""
    loaded, statistics = _source(policy, checkpoint, tokenizer, suite, bool(units))
    action_text = _action_text(units, loaded, statistics)
    options: dict[str, Any] = {"variant": variant, "dtype": dtype}
    if ray:
        from steer_runtime.directions.fan_out import on_ray

        options["run"] = on_ray(ray, workers=workers, threads=threads)
    found = labels_for(loaded, tower_name(loaded, tower), cache, parse_numbers(layers, "layers"), top_k, **options)
    if csv_file is not None:
        rows = _write_csv(csv_file, found, loaded, action_text)
        say(f"{rows} labels of {policy_title(loaded)} written to {csv_file}")
        return
    shown = parse_numbers(neurons, "neurons") or [0]
    ends = ["label", "best score", *(["low label", "low score"] if low else [])]
    title = f"Labels of {policy_title(loaded)}" + (f", {variant}" if variant != "raw" else "")
    table = new_table(title, "layer", "neuron", "flat", *ends)
    met: set[int] = set()
    for layer in found.layers:
        row = found.row(layer)
        for neuron in shown:
            found.text(layer, neuron)  # a neuron out of range is refused
            cells: list[Any] = [str(layer), str(neuron), str(found.identity.flat(layer, neuron))]
            for tokens, scores in _ends(found, low):
                ids = [int(token) for token in tokens[row, neuron]]
                met.update(ids)
                cells += [show_label([action_text(i) for i in ids]), f"{scores[row, neuron, 0]:.3f}"]
            table.add_row(*cells)
    console = new_console()
    console.print(table)
    if units == "all":
        actions = sorted(met & found.basis.action_values.keys())
        if actions:
            console.print(_units_table(actions, found, loaded, statistics))
        else:
            say("none of the labels shown holds an action token")


def _source(policy: str, checkpoint: Path | None, tokenizer: Path | None, suite: str, units: bool) -> tuple[Any, Any]:
    """What has the weights, and the action statistics where units are asked for."""
    if suite and checkpoint is None:
        raise SteerError("bad_option", "--suite goes with --checkpoint: a policy has the statistics of its own suite")
    source = open_source(policy, checkpoint, tokenizer)
    if not units:
        return source, None
    return source, source.statistics if checkpoint is None else source.statistics(suite or None)


def _action_text(units: str, loaded: Any, statistics: Any) -> Callable[[int], str]:
    """How a token is written: as the basis does, or an action token as its motion in one dimension."""
    from steer_runtime.directions.token_basis import TokenBasis
    from steer_runtime.directions.units import dimensions, in_units
    from steer_runtime.types import LIBERO_ACTION_SPACE

    basis = TokenBasis.of(loaded)
    if units in ("", "all"):
        return basis.text
    space = getattr(loaded, "action_space", LIBERO_ACTION_SPACE)
    if units not in dimensions(space):
        raise SteerError(
            "bad_option", f"--units {units[:40]!r} is no dimension: expected all or {', '.join(dimensions(space))}"
        )

    def text(token: int) -> str:
        value = basis.action_values.get(token)
        return basis.text(token) if value is None else f"[{in_units(value, statistics, space)[units]}]"

    return text


def _units_table(tokens: Sequence[int], found: Labels, loaded: Any, statistics: Any) -> Any:
    """The action tokens that were shown, and what each means in every dimension."""
    from steer_runtime.directions.units import dimensions, in_units
    from steer_runtime.types import LIBERO_ACTION_SPACE

    space = getattr(loaded, "action_space", LIBERO_ACTION_SPACE)
    table = new_table("Action tokens shown, a control step of each", "token", "value", *dimensions(space))
    for token in tokens:
        value = found.basis.action_values[token]
        table.add_row(str(token), f"{value:+.3f}", *in_units(value, statistics, space).values())
    return table


def _ends(found: Labels, low: bool) -> list[tuple[Any, Any]]:
    return [(found.tokens, found.scores), *([(found.low_tokens, found.low_scores)] if low else [])]


def _write_csv(path: Path, found: Labels, policy: Any, text: Callable[[int], str]) -> int:
    """Every label as a row; the policy column carries the note of an untrained one. Returns the number of rows."""
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["policy", "layer", "neuron", "flat", "best_score", "label", "low_score", "low_label"])
            for row, layer in enumerate(found.layers):
                for neuron in range(found.identity.d_ff):
                    cells: list[Any] = [policy_title(policy), layer, neuron, found.identity.flat(layer, neuron)]
                    for tokens, scores in _ends(found, True):
                        label = [text(int(token)) for token in tokens[row, neuron]]
                        cells += [f"{float(scores[row, neuron, 0]):.6g}", json.dumps(label, ensure_ascii=False)]
                    writer.writerow(cells)
    except OSError as why:
        raise SteerError("not_written", f"{path} could not be written ({why.strerror})") from why
    return len(found.layers) * found.identity.d_ff
