"""`steer directions`: read value vectors in words, make directions, look into the store.

Invariant: whatever comes from an untrained policy says so in every output.
"""

from __future__ import annotations

import csv
import datetime
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steer_runtime.errors import SteerError

if TYPE_CHECKING:  # torch and the policies take seconds to import; the verbs import what they use, so `--help` is quick
    from steer_runtime.directions.direction import Direction
    from steer_runtime.directions.token_basis import Labels, Progress

app = typer.Typer(
    help="Find, name and inspect directions: what a policy's value vectors say, and what to steer with.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

PolicyOption = Annotated[
    str, typer.Option("--policy", help="Policy: a name in configs/policies, or a path to its YAML.")
]
StoreOption = Annotated[Path, typer.Option("--store", help="Folder of directions.")]
CacheOption = Annotated[Path, typer.Option("--cache", help="Folder of computed labels.")]
TowerOption = Annotated[str, typer.Option("--tower", help="Transformer of the policy.")]
DEFAULT_POLICY = "pocket-untrained"
DEFAULT_STORE = Path("directions")
DEFAULT_CACHE = Path("build/labels")
UNTRAINED = "untrained policy"


@app.command(
    epilog="[bold]Examples[/]: steer directions labels --layers 3,26-29 --neurons 0-19   |   "
    "steer directions labels --csv labels.csv   |   steer directions labels   (compute and cache all)"
)
def labels(
    layers: Annotated[str, typer.Option(help="Layers, such as 3,26-29; default all.")] = "",
    neurons: Annotated[str, typer.Option(help="Neurons of each layer to show, such as 0-9.")] = "0-9",
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write every label of the layers to this file instead.")
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, max=1000, help="Tokens in a label.")] = 10,
    policy: PolicyOption = DEFAULT_POLICY,
    tower: TowerOption = "lm",
    cache: CacheOption = DEFAULT_CACHE,
) -> None:
    """What each value vector says: its best tokens in the token basis, computed once and cached."""
    loaded = _load(policy)
    found = _labels(loaded, tower, cache, parse_numbers(layers, "layers"), top_k)
    if csv_file is not None:
        rows = _write_csv(csv_file, found, loaded)
        _say(f"{rows} labels of {_policy_title(loaded)} written to {csv_file}")
        return
    shown = parse_numbers(neurons, "neurons") or [0]
    table = _table(f"Labels of {_policy_title(loaded)}", "layer", "neuron", "flat", "label", "best score")
    for layer in found.layers:
        for neuron in shown:
            label = found.text(layer, neuron)
            score = f"{found.scores[found.row(layer), neuron, 0]:.3f}"
            table.add_row(str(layer), str(neuron), str(found.identity.flat(layer, neuron)), show_label(label), score)
    _console().print(table)


@app.command(
    epilog="[bold]Examples[/]: steer directions search up above --top 10   |   "
    "steer directions search fast quick --against slow --layers 20-29"
)
def search(
    words: Annotated[list[str], typer.Argument(help="Words to look for in the labels, one token each.")],
    against: Annotated[str, typer.Option(help="Comma-separated words a label must not hold.")] = "",
    top: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 20,
    layers: Annotated[str, typer.Option(help="Layers, such as 3,26-29; default all.")] = "",
    policy: PolicyOption = DEFAULT_POLICY,
    tower: TowerOption = "lm",
    cache: CacheOption = DEFAULT_CACHE,
) -> None:
    """Value vectors whose labels carry words; `flat` is layer * d_ff + neuron, as in the published OpenVLA clusters."""
    from steer_runtime.directions import finders

    loaded = _load(policy)
    found = _labels(loaded, tower, cache, parse_numbers(layers, "layers"))
    matches = finders.search(found, words, against=parse_words(against))
    said = f"{len(matches)} value vectors of {_policy_title(loaded)} say {', '.join(words)}"
    table = _table(f"{said}; the first {min(top, len(matches))}", "layer", "neuron", "flat", "rank", "score", "label")
    for m in matches[:top]:
        flat = found.identity.flat(m.layer, m.neuron)
        table.add_row(str(m.layer), str(m.neuron), str(flat), str(m.rank), f"{m.score:.3f}", show_label(m.label))
    _console().print(table)


@app.command(
    epilog="[bold]Examples[/]: steer directions make up --words up,above --against down   |   "
    "steer directions make lift --neurons 3:17,4:20 --alpha 10   |   "
    "steer directions make quick --dense-words quick,fast --minus slow,slower --alpha 3"
)
def make(
    name: Annotated[str, typer.Argument(help="Name: lower-case letters, digits, '_', '-', '.'.")],
    words: Annotated[str, typer.Option(help="Neurons whose labels carry these comma-separated words.")] = "",
    against: Annotated[str, typer.Option(help="With --words: leave out neurons whose labels carry these.")] = "",
    count: Annotated[int, typer.Option(min=1, help="With --words: the most neurons to take.")] = 20,
    layers: Annotated[str, typer.Option(help="With --words: layers to search, such as 3,26-29; default all.")] = "",
    neurons: Annotated[str, typer.Option(help="These neurons, as layer:neuron,layer:neuron.")] = "",
    dense_words: Annotated[str, typer.Option(help="Dense vector: mean embedding of these words ...")] = "",
    minus: Annotated[str, typer.Option(help="... minus the mean embedding of these.")] = "",
    spaced: Annotated[
        bool, typer.Option("--spaced", help="Dense: only the tokens with a leading space, as inside a sentence.")
    ] = False,
    alpha: Annotated[
        float | None, typer.Option(help="Activation at strength 1, default 4; dense: factor of the vector, default 1.")
    ] = None,
    op: Annotated[
        str | None, typer.Option(help="override, add, scale, clamp or ablate; default override, dense: add.")
    ] = None,
    low: Annotated[float | None, typer.Option(help="Lower bound, for clamp.")] = None,
    span: Annotated[str, typer.Option(help="Token roles to steer, such as text,image; default all, dense: text.")] = "",
    max_strength: Annotated[float, typer.Option(help="Largest strength the engine accepts, in (0, 1].")] = 1.0,
    policy: PolicyOption = DEFAULT_POLICY,
    tower: TowerOption = "lm",
    store: StoreOption = DEFAULT_STORE,
    cache: CacheOption = DEFAULT_CACHE,
) -> None:
    """Make a direction and save it. Give one of --words, --neurons, --dense-words."""
    from steer_runtime.directions import finders
    from steer_runtime.directions.store import DirectionStore
    from steer_runtime.directions.token_basis import TokenBasis, TowerIdentity

    given = [
        flag for flag, value in (("--words", words), ("--neurons", neurons), ("--dense-words", dense_words)) if value
    ]
    if len(given) != 1:
        raise SteerError(
            "bad_option",
            f"{' and '.join(given) or 'no finder'} was given: expected one of --words, --neurons, --dense-words",
        )
    pairs = parse_neurons(neurons)
    loaded = _load(policy)
    recipe = finders.Recipe(
        name=name,
        date=_today(),
        op=op,  # type: ignore[arg-type]  # Direction refuses an unknown one by name
        alpha=alpha,
        low=low,
        span=frozenset(parse_words(span)) if span else None,  # type: ignore[arg-type]
        max_strength=max_strength,
        facts=_policy_facts(loaded),
    )
    identity = TowerIdentity.of(_tower(loaded, tower), loaded.model_hash)
    if words:
        found = _labels(loaded, tower, cache, parse_numbers(layers, "layers"))
        direction = finders.from_words(found, recipe, parse_words(words), against=parse_words(against), count=count)
    elif neurons:
        finders.from_neurons(identity, recipe, pairs)  # refuses what is out of range before labels are computed
        found = _labels(loaded, tower, cache, sorted({layer for layer, _ in pairs}))
        direction = finders.from_neurons(identity, recipe, pairs, labels=found)
    else:
        lead = " " if spaced else ""
        direction = finders.dense_from_words(
            identity,
            recipe,
            TokenBasis.of(loaded),
            [lead + word for word in parse_words(dense_words)],
            [lead + word for word in parse_words(minus)],
            embedding=loaded.model.language_model.get_input_embeddings().weight,
        )
    path = DirectionStore(store).save(direction)
    _show_direction(direction)
    _say(f"saved {direction.id} to {path}")


@app.command(
    epilog="[bold]Example[/]: steer directions clusters configs/clusters/corl2025_openvla_clusters.yaml "
    "--made-for openvla --policy openvla-7b"
)
def clusters(
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
    from steer_runtime.directions.store import DirectionStore
    from steer_runtime.directions.token_basis import TowerIdentity

    sizes = {"openvla": finders.OPENVLA_SIZE, "pi0fast": finders.PI0_FAST_SIZE}
    if made_for not in sizes:
        raise SteerError("bad_option", f"--made-for {made_for[:40]!r} is unknown: expected {' or '.join(sizes)}")
    loaded = _load(policy)
    identity = TowerIdentity.of(_tower(loaded, tower), loaded.model_hash)
    recipe = finders.Recipe(name="", date=_today(), alpha=alpha, facts=_policy_facts(loaded))
    found = finders.from_clusters(file, identity, recipe, made_for=sizes[made_for])
    for direction in found.directions:
        DirectionStore(store).save(direction)
        _say(f"saved {direction.id}, {len(direction.neurons or ())} neurons{_untrained_suffix([direction])}")
    if found.empty:
        _say(f"without neurons, so not saved: {', '.join(found.empty)}")


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
    _say(f"saved axis {name} = {ends[0].id} - {ends[1].id} to {path}{_untrained_suffix(ends)}")


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
            _say(f"axis {ref}: below 0 {ends[0].id}, above 0 {ends[1].id}{_untrained_suffix(ends)}")
        return
    direction = folder.load(ref)
    if as_json:
        typer.echo(json.dumps({"id": direction.id, "hash": direction.hash, **direction.card()}, indent=1))
    else:
        _show_direction(direction)


@app.command("list", epilog="[bold]Example[/]: steer directions list --store directions")
def list_directions(store: StoreOption = DEFAULT_STORE) -> None:
    """Every direction and axis of the store. Files that do not verify are named with the reason; the exit code is 2."""
    from steer_runtime.directions.store import DirectionStore

    folder = DirectionStore(store)
    entries = folder.list()
    table = _table(f"Directions in {store}", "id", "model", "op", "span", "writes", "max strength", "found by")
    for entry in entries:
        d = entry.direction
        if d is None:
            continue
        writes = f"{len(d.neurons)} neurons" if d.neurons is not None else f"{len(d.dense or {})} dense"
        strength = f"{d.max_strength:g}" + ("" if d.proven else " (unproven)")
        finder = str(d.provenance.get("finder", "-")) + _untrained_suffix([d])
        cells = (d.id, d.model_hash[:12], d.op, ",".join(sorted(d.span)), writes, strength, finder)
        table.add_row(*(Text(_printable(cell)) for cell in cells))
    _console().print(table)
    bad = [entry for entry in entries if entry.problem is not None]
    for entry in bad:
        typer.echo(f"refused: {_printable(entry.problem or '')}", err=True)
    for joined in folder.load_axes() if not bad else ():
        _say(f"axis {joined.name}: {joined.negative} - {joined.positive}")
    if bad:
        raise SteerError("bad_store", f"{len(bad)} of {len(entries)} directions in {store} do not verify, see above")


def parse_words(text: str) -> list[str]:
    """Comma-separated words, surrounding space dropped."""
    return [word.strip() for word in text.split(",") if word.strip()]


def parse_numbers(text: str, what: str) -> list[int] | None:
    """`3,26-29` as numbers, None for an empty text. Raises SteerError('bad_option')."""
    numbers: list[int] = []
    for part in parse_words(text):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        if match is None or int(match[1]) > int(match[2] or match[1]):
            raise SteerError("bad_option", f"{what} {part[:40]!r} is no number or range: expected such as 3,26-29")
        numbers.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return numbers or None


def parse_neurons(text: str) -> list[tuple[int, int]]:
    """`3:17,4:20` as (layer, neuron) pairs. Raises SteerError('bad_option')."""
    pairs = []
    for part in parse_words(text):
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", part)
        if match is None:
            raise SteerError("bad_option", f"neuron {part[:40]!r} is not layer:neuron: expected such as 3:17,4:20")
        pairs.append((int(match[1]), int(match[2])))
    return pairs


def show_label(tokens: Sequence[str]) -> Text:
    """Tokens of a label for a terminal: a leading space as U+2581, control characters visible."""
    shown = (f"\u2581{t[1:]}" if t.startswith(" ") and len(t) > 1 else t for t in tokens)
    return Text(", ".join(_printable(t) for t in shown), overflow="fold")


def _printable(text: str) -> str:
    # A token or a card may hold terminal escapes; nothing printed from a file may move the cursor.
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def _load(config: str) -> Any:
    from steer_runtime.policies import load_policy

    with Console(stderr=True).status(f"loading policy {config}"):
        policy = load_policy(config)
    if not policy.trained:
        typer.echo(f"{policy.name}: {UNTRAINED}", err=True)
    return policy


def _policy_facts(policy: Any) -> dict[str, Any]:
    return {"policy": policy.name, "policy_trained": bool(policy.trained)}


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def _tower(policy: Any, name: str) -> Any:
    if name not in policy.towers:
        raise SteerError(
            "unknown_tower", f"{policy.name!r} has no tower {name[:40]!r}: expected {', '.join(policy.towers)}"
        )
    return policy.towers[name]


def _labels(policy: Any, tower: str, cache: Path, layers: Sequence[int] | None, top_k: int = 10) -> Labels:
    from steer_runtime.directions.token_basis import LabelCache, TokenBasis

    chosen = _tower(policy, tower)
    with _progress("projecting value vectors") as progress:
        keep = LabelCache(cache, notice=lambda sentence: typer.echo(sentence, err=True))
        return keep.labels(
            TokenBasis.of(policy), chosen, policy.model_hash, layers=layers, top_k=top_k, progress=progress
        )


@contextmanager
def _progress(title: str) -> Iterator[Progress]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        # Shown at the first report only: cached labels need no bar.
        task = bar.add_task(title, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def _policy_title(policy: Any) -> str:
    return policy.name if policy.trained else f"{policy.name} ({UNTRAINED})"


def _untrained_suffix(directions: Sequence[Direction]) -> str:
    return f" ({UNTRAINED})" if any(d.provenance.get("policy_trained") is False for d in directions) else ""


def _console() -> Console:
    # Into a pipe rich assumes 80 columns, which folds every label; a terminal says its own width.
    return Console() if sys.stdout.isatty() else Console(width=140)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(_printable(title)), title_justify="left")
    for column in columns:
        number = column in ("layer", "neuron", "flat", "rank", "score", "best score", "alpha", "low", "site", "norm")
        fixed = number or column == "id"
        table.add_column(column, justify="right" if number else "left", no_wrap=fixed, overflow="fold")
    return table


def _show_direction(direction: Direction) -> None:
    import numpy as np

    facts = dict(direction.provenance)
    labels_of = {
        (fact.get("layer"), fact.get("neuron")): fact.get("label", [])
        for fact in facts.pop("neurons", [])
        if isinstance(fact, dict)
    }
    console = _console()
    lines = {
        "hash": direction.hash,
        "model": direction.model_hash,
        "sizes": f"{direction.layers} layers, d_model {direction.d_model}, d_ff {direction.d_ff}",
        "tower": direction.tower,
        "writes": f"{direction.op} on {', '.join(sorted(direction.span))} tokens",
        "max strength": f"{direction.max_strength:g}"
        + ("" if direction.proven else " (not shown safe in simulation yet)"),
        **{key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()},
    }
    console.print(Text(direction.id + _untrained_suffix([direction]), style="bold"))
    for key, value in lines.items():
        console.print(Text(f"  {_printable(key)}: {_printable(value)}"))
    if direction.neurons is not None:
        n = direction.neurons
        table = _table("", "layer", "neuron", "flat", "alpha", *(["low"] if n.low is not None else []), "label")
        for i in range(len(n)):
            layer, neuron = int(n.layer[i]), int(n.neuron[i])
            label = [str(token) for token in labels_of.get((layer, neuron), [])]
            low = [f"{n.low[i]:g}"] if n.low is not None else []
            flat = str(layer * direction.d_ff + neuron)
            table.add_row(str(layer), str(neuron), flat, f"{n.alpha[i]:g}", *low, show_label(label))
    else:
        table = _table("", "site", "norm")
        for site, vector in sorted((direction.dense or {}).items()):
            table.add_row(str(site), f"{float(np.linalg.norm(vector)):.4f}")
    console.print(table)


def _write_csv(path: Path, found: Labels, policy: Any) -> int:
    """Every label as a row; the policy column carries the note of an untrained one. Returns the number of rows."""
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["policy", "layer", "neuron", "flat", "best_score", "label"])
            for row, layer in enumerate(found.layers):
                for neuron in range(found.identity.d_ff):
                    label = json.dumps(found.text(layer, neuron), ensure_ascii=False)
                    score = float(found.scores[row, neuron, 0])
                    flat = found.identity.flat(layer, neuron)
                    writer.writerow([_policy_title(policy), layer, neuron, flat, f"{score:.6g}", label])
    except OSError as why:
        raise SteerError("not_written", f"{path} could not be written ({why.strerror})") from why
    return len(found.layers) * found.identity.d_ff


def _say(sentence: str) -> None:
    typer.echo(_printable(sentence), file=sys.stdout)
