"""Directions made from words and neurons."""

from __future__ import annotations

from typing import Annotated

import typer

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
    tower_of,
)
from steer_runtime.errors import SteerError

app = typer.Typer()


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
    )
    identity = TowerIdentity.of(tower_of(loaded, tower), loaded.model_hash)
    if words:
        found = labels_for(loaded, tower, cache, parse_numbers(layers, "layers"))
        direction = finders.from_words(found, recipe, parse_words(words), against=parse_words(against), count=count)
    elif neurons:
        finders.from_neurons(identity, recipe, pairs)  # refuses what is out of range before labels are computed
        found = labels_for(loaded, tower, cache, sorted({layer for layer, _ in pairs}))
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
    show_direction(direction)
    say(f"saved {direction.id} to {path}")
