"""Value vectors found by what they say, one by one and in clusters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from steer_runtime.cli.directions.common import (
    DEFAULT_CACHE,
    DEFAULT_POLICY,
    CacheOption,
    PolicyOption,
    labels_for,
    new_console,
    new_table,
    parse_numbers,
    parse_words,
    policy_title,
    progress_bar,
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
    from collections.abc import Sequence

    from steer_runtime.directions.index import Match, Neighbour
    from steer_runtime.directions.similarity import WordSpace
    from steer_runtime.directions.token_basis import Labels, TokenBasis

app = typer.Typer()
_OTHER = 5  # tokens of the other end that a table has room for
_CONTROLS = 1024  # random directions whose nearest shows what chance reaches


class WordLists(TyperCommand):
    """A command whose word options take every word up to the next option: `--near gentle precise`."""

    flags = ("--near", "--against", "--contrast", "--minus", "--words")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        out: list[str] = []
        flag = ""
        for position, arg in enumerate(args):
            if arg == "--":
                return list(super().parse_args(ctx, out + args[position:]))
            if arg.startswith("-"):
                flag = arg if arg in self.flags else ""
            elif flag and args[position - 1] != flag:
                out.append(flag)
            out.append(arg)
        return list(super().parse_args(ctx, out))


@app.command(
    cls=WordLists,
    epilog="[bold]Examples[/]: steer directions search up above --top 10   |   "
    "steer directions search fast quick --against slow --layers 20-29   |   "
    "steer directions search careful --near gentle precise --layers 20-31   |   "
    "steer directions search --contrast fast quick --minus slow",
)
def search(
    words: Annotated[
        list[str] | None, typer.Argument(help="Words to look for in the labels, one token each; before the options.")
    ] = None,
    near: Annotated[
        list[str] | None, typer.Option(help="Rank by likeness of the label to these words, in the token basis.")
    ] = None,
    contrast: Annotated[
        list[str] | None, typer.Option(help="Rank by projection onto the mean embedding of these words ...")
    ] = None,
    minus: Annotated[list[str] | None, typer.Option(help="... minus that of these; both ends are shown.")] = None,
    against: Annotated[list[str] | None, typer.Option(help="Words a label must not hold.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 20,
    layers: Annotated[str, typer.Option(help="Layers, such as 3,26-29; default all.")] = "",
    policy: PolicyOption = DEFAULT_POLICY,
    checkpoint: CheckpointOption = None,
    tokenizer: TokenizerOption = None,
    tower: SourceTowerOption = "",
    cache: CacheOption = DEFAULT_CACHE,
) -> None:
    """Value vectors that say words. With --near or --contrast all are ranked, those that say WORDS first.

    `flat` is layer * d_ff + neuron, as in the published OpenVLA clusters.
    """
    from steer_runtime.directions import index

    says, without = _words(words), _words(against)
    like, plus, less = _words(near), _words(contrast), _words(minus)
    if like and (plus or less):
        raise SteerError("bad_option", "--near and --contrast were given: expected one of them")
    if bool(plus) != bool(less):
        raise SteerError("bad_option", "a contrast has two sides: give both --contrast and --minus words")
    if not (says or like or plus):
        raise SteerError(
            "bad_option", "nothing was asked for: give words, --near words, or --contrast and --minus words"
        )
    loaded = open_source(policy, checkpoint, tokenizer)
    found = labels_for(loaded, tower_name(loaded, tower), cache, parse_numbers(layers, "layers"))
    title = policy_title(loaded)
    if like:
        space = word_space(found.basis)
        neighbours = index.near(found, space, like, top=top, says=says, against=without)
        control = space.nearness(space.random_labels(_CONTROLS, top_k=found.tokens.shape[-1]), space.words(like))
        say = f"; {sum(n.matches > 0 for n in neighbours)} of these say {', '.join(says)}" if says else ""
        chance = f"labels of {_CONTROLS} random directions reach {control.max():.2f}"
        _show(f"Value vectors of {title} near {', '.join(like)}{say}; {chance}", found, neighbours)
    elif plus:
        chosen = loaded.towers[found.identity.tower]
        ends = index.contrast(
            found, lambda layer: chosen.down_projs[layer].weight, plus, less, top=top, says=says, against=without
        )
        chance = f"as many random vectors reach a cosine of {ends.chance:.2f}"
        _show(f"Value vectors of {title} from {', '.join(less)} to {', '.join(plus)}; {chance}", found, ends.plus)
        _show(f"The other way, from {', '.join(plus)} to {', '.join(less)}", found, ends.minus)
    else:
        low = index.negated(found)
        _show_matches(
            f"value vectors of {title} say {', '.join(says)}", found, index.search(found, says, against=without), top
        )
        if low is not None and (matches := index.search(low, says, against=without)):
            _show_matches("say so with an activation below zero, at their low end", low, matches, top)


@app.command(
    cls=WordLists,
    epilog="[bold]Examples[/]: steer directions cluster --layers 20-31   |   "
    "steer directions cluster --words speed fast --members 20",
)
def cluster(
    words: Annotated[
        list[str] | None, typer.Option(help="Show the clusters with a member whose label holds one of these.")
    ] = None,
    alike: Annotated[float, typer.Option(help="Mean cosine between two clusters that are still joined.")] = 0.5,
    smallest: Annotated[
        int | None, typer.Option(min=1, help="Members of the smallest cluster to show; default 2, with --words 1.")
    ] = None,
    members: Annotated[int, typer.Option(min=1, help="Members of each cluster to show, nearest to its centre.")] = 8,
    top: Annotated[int, typer.Option(min=1, help="Clusters to show, largest first.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Of the random directions and of the parts.")] = 0,
    layers: Annotated[str, typer.Option(help="Layers, such as 3,26-29; default all.")] = "",
    policy: PolicyOption = DEFAULT_POLICY,
    checkpoint: CheckpointOption = None,
    tokenizer: TokenizerOption = None,
    tower: SourceTowerOption = "",
    cache: CacheOption = DEFAULT_CACHE,
) -> None:
    """Value vectors that say the same, put together and named by their most characteristic words."""
    from steer_runtime.directions.clustering import clusters

    loaded = open_source(policy, checkpoint, tokenizer)
    found = labels_for(loaded, tower_name(loaded, tower), cache, parse_numbers(layers, "layers"))
    space = word_space(found.basis)
    with progress_bar("random directions") as progress:
        threshold = space.coherence_by_chance(found.tokens.shape[-1], seed=seed, progress=progress)
    with progress_bar("clustering labels") as progress:
        groups = clusters(
            found,
            space,
            threshold,
            alike=alike,
            smallest=smallest or (1 if words else 2),
            words=_words(words),
            seed=seed,
            progress=progress,
        )
    table = new_table(
        f"{len(groups)} clusters of {policy_title(loaded)}; the first {min(top, len(groups))}",
        "name",
        "size",
        "alike",
        "layers",
        "members, as layer:neuron",
    )
    for group in groups[:top]:
        where = sorted({layer for layer, _ in group.members})
        shown = ", ".join(f"{layer}:{neuron}" for layer, neuron in group.members[:members])
        more = f" and {len(group.members) - members} more" if len(group.members) > members else ""
        table.add_row(
            show_label([group.name]),
            str(len(group.members)),
            f"{group.alike:.2f}",
            ", ".join(map(str, where)),
            shown + more,
        )
    new_console().print(table)


def word_space(basis: TokenBasis) -> WordSpace:
    from steer_runtime.directions.similarity import WordSpace

    with progress_bar("reading the token basis") as progress:
        return WordSpace.of(basis, progress=progress)


def _show_matches(said: str, found: Labels, matches: Sequence[Match], top: int) -> None:
    two = ["other end"] if found.low_tokens is not None else []
    table = new_table(
        f"{len(matches)} {said}; the first {min(top, len(matches))}",
        "layer",
        "neuron",
        "flat",
        "rank",
        "score",
        "label",
        *two,
    )
    for m in matches[:top]:
        flat = found.identity.flat(m.layer, m.neuron)
        other = [show_label(found.low_text(m.layer, m.neuron)[:_OTHER])] if two else []
        table.add_row(
            str(m.layer), str(m.neuron), str(flat), str(m.rank), f"{m.score:.3f}", show_label(m.label), *other
        )
    new_console().print(table)


def _show(title: str, found: Labels, neighbours: Sequence[Neighbour]) -> None:
    contrast = any(n.projection is not None for n in neighbours)
    two = found.low_tokens is not None
    columns = ["layer", "neuron", "flat", *(["projection"] if contrast else []), "cosine", "says"]
    columns += [*(["end"] if two and not contrast else []), "label", *(["other end"] if two else [])]
    table = new_table(title, *columns)
    for n in neighbours:
        row = [str(n.layer), str(n.neuron), str(found.identity.flat(n.layer, n.neuron))]
        row += [f"{n.projection:.3f}"] if n.projection is not None else []
        row += [f"{n.cosine:.3f}", str(n.matches or "")]
        row += ["high" if n.sign > 0 else "low"] if "end" in columns else []
        table.add_row(*row, show_label(n.label), *([show_label(n.other[:_OTHER])] if two else []))
    new_console().print(table)


def _words(given: list[str] | None) -> list[str]:
    return [word for text in given or [] for word in parse_words(text)]
