"""Directions made from words, neurons and published clusters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    untrained_suffix,
)
from steer_runtime.errors import SteerError

if TYPE_CHECKING:
    pass

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
