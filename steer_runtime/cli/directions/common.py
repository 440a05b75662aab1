"""What the verbs of `steer directions` share: options, parsing, loading, tables.

Invariant: whatever comes from an untrained policy says so in every output; nothing printed from a file moves the cursor.
"""

from __future__ import annotations

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

PolicyOption = Annotated[
    str, typer.Option("--policy", help="Policy: a name in configs/policies, or a path to its YAML.")
]
StoreOption = Annotated[Path, typer.Option("--store", help="Folder of directions.")]
CacheOption = Annotated[Path, typer.Option("--cache", help="Folder of computed labels.")]
TowerOption = Annotated[
    str, typer.Option("--tower", help="Transformer of the policy, such as prefix or expert; default its only one.")
]
DEFAULT_POLICY = "pocket-untrained"
DEFAULT_STORE = Path("directions")
DEFAULT_CACHE = Path("build/labels")
UNTRAINED = "untrained policy"


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
    return Text(", ".join(printable(t) for t in shown), overflow="fold")


def printable(text: str) -> str:
    # A token or a card may hold terminal escapes; nothing printed from a file may move the cursor.
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def load(config: str) -> Any:
    from steer_runtime.policies import load_policy

    with Console(stderr=True).status(f"loading policy {config}"):
        policy = load_policy(config)
    if not policy.trained:
        typer.echo(f"{policy.name}: {UNTRAINED}", err=True)
    return policy


def policy_facts(policy: Any) -> dict[str, Any]:
    return {"policy": policy.name, "policy_trained": bool(policy.trained)}


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def tower_of(policy: Any, name: str) -> Any:
    """A tower of a policy or of `CheckpointVectors`, by name or the only one. Raises 'unknown_tower', 'which_tower'."""
    from steer_runtime.directions.towers import named_tower

    return named_tower(policy, name)


def labels_for(
    policy: Any, tower: str, cache: Path, layers: Sequence[int] | None, top_k: int = 10, **options: Any
) -> Labels:
    """Labels of a policy or of `CheckpointVectors`, by the cache. options: variant, dtype, run of `LabelCache.labels`.

    Raises SteerError('no_token_basis') for a tower without words.
    """
    from steer_runtime.directions.token_basis import LabelCache, TokenBasis
    from steer_runtime.directions.towers import require_tokens

    chosen = tower_of(policy, tower)
    require_tokens(chosen, policy.name)
    with progress_bar("projecting value vectors") as progress:
        keep = LabelCache(cache, notice=lambda sentence: typer.echo(sentence, err=True))
        return keep.labels(
            TokenBasis.of(policy), chosen, policy.model_hash, layers=layers, top_k=top_k, progress=progress, **options
        )


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
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


def policy_title(policy: Any) -> str:
    return policy.name if policy.trained else f"{policy.name} ({UNTRAINED})"


def untrained_suffix(directions: Sequence[Direction]) -> str:
    return f" ({UNTRAINED})" if any(d.provenance.get("policy_trained") is False for d in directions) else ""


def new_console() -> Console:
    # Into a pipe rich assumes 80 columns, which folds every label; a terminal says its own width.
    return Console() if sys.stdout.isatty() else Console(width=140)


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=Text(printable(title)), title_justify="left")
    for column in columns:
        number = column in ("layer", "neuron", "flat", "rank", "score", "best score", "alpha", "low", "site", "norm")
        fixed = number or column == "id"
        table.add_column(column, justify="right" if number else "left", no_wrap=fixed, overflow="fold")
    return table


def show_direction(direction: Direction) -> None:
    import numpy as np

    facts = dict(direction.provenance)
    labels_of = {
        (fact.get("layer"), fact.get("neuron")): fact.get("label", [])
        for fact in facts.pop("neurons", [])
        if isinstance(fact, dict)
    }
    calibrated = direction.calibrated
    console = new_console()
    lines = {
        "hash": direction.hash,
        "model": direction.model_hash,
        "sizes": f"{direction.layers} layers, d_model {direction.d_model}, d_ff {direction.d_ff}",
        "tower": direction.tower,
        "writes": f"{direction.op} on {', '.join(sorted(direction.span))} tokens",
        "max strength": f"{direction.max_strength:g}"
        + ("" if direction.proven else " (not shown safe in simulation yet)"),
        "calibrated": "never shown in simulation" if calibrated is None else f"{calibrated[0]:g} to {calibrated[1]:g}",
        "licence": direction.licence,
        **{key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()},
    }
    console.print(Text(direction.id + untrained_suffix([direction]), style="bold"))
    for key, value in lines.items():
        console.print(Text(f"  {printable(key)}: {printable(value)}"))
    if direction.neurons is not None:
        n = direction.neurons
        table = new_table("", "layer", "neuron", "flat", "alpha", *(["low"] if n.low is not None else []), "label")
        for i in range(len(n)):
            layer, neuron = int(n.layer[i]), int(n.neuron[i])
            label = [str(token) for token in labels_of.get((layer, neuron), [])]
            low = [f"{n.low[i]:g}"] if n.low is not None else []
            flat = str(layer * direction.d_ff + neuron)
            table.add_row(str(layer), str(neuron), flat, f"{n.alpha[i]:g}", *low, show_label(label))
    else:
        table = new_table("", "site", "norm")
        for site, vector in sorted((direction.dense or {}).items()):
            table.add_row(str(site), f"{float(np.linalg.norm(vector)):.4f}")
    console.print(table)


def say(sentence: str) -> None:
    typer.echo(printable(sentence), file=sys.stdout)
