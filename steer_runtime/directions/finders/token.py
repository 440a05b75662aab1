"""`token`: the neurons whose labels carry words, or neurons that somebody names.

Source: Haon, Stocking, Chuang, Tomlin (CoRL 2025, arXiv 2509.00328); value vectors and labels after Geva et al. (2022).
Invariant: provenance holds the words, the labels and the scores, enough to find the direction again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steer_runtime.directions.direction import Direction
from steer_runtime.directions.finders.material import Material
from steer_runtime.directions.finders.placing import chosen_layers
from steer_runtime.directions.finders.recipe import Recipe, of_neurons
from steer_runtime.directions.index import search
from steer_runtime.directions.options import NeuronsOptions, TokenOptions
from steer_runtime.directions.token_basis import Labels, TowerIdentity
from steer_runtime.errors import SteerError

CLUSTER_SIZE = 20
"""The largest cluster of the seed holds 20 neurons."""


def find(material: Material, recipe: Recipe, options: TokenOptions) -> Direction:
    """S = the `count` value vectors w_j whose label, the tokens t of the largest w_j . u_t, holds most of the words and
    none of `against`; f_j := alpha for j in S (override, alpha 4), on all tokens.

    Raises SteerError as `from_words`, and 'no_token_basis' in a tower without words.
    """
    labels = material.labels(chosen_layers(material, options.layers))
    return from_words(labels, recipe, options.words, against=options.against, count=options.count)


def find_named(material: Material, recipe: Recipe, options: NeuronsOptions) -> Direction:
    """The (layer, neuron) pairs that are given, with their labels where the tower has words.

    Raises SteerError as `from_neurons`, and 'dead_layer'.
    """
    # Refuses what is out of range before labels are computed.
    found = from_neurons(material.identity, recipe, options.neurons)
    found.require_reaches(material.tower)
    if material.tower.basis != "tokens":
        return found
    labels = material.labels(sorted({layer for layer, _ in options.neurons}))
    return from_neurons(material.identity, recipe, options.neurons, labels=labels)


def from_words(
    labels: Labels, recipe: Recipe, words: Sequence[str], *, against: Sequence[str] = (), count: int = CLUSTER_SIZE
) -> Direction:
    """The `count` best matches of `search` as one direction (by default override at alpha 4).

    Raises SteerError: as `search`, and 'no_match' when no label carries the words.
    """
    if count < 1:
        raise SteerError("no_match", f"{count} neurons were asked for direction {recipe.name!r}: expected 1 or more")
    found = search(labels, words, against=against)[:count]
    if not found:
        without = f" and none of {', '.join(map(repr, against))}" if against else ""
        raise SteerError(
            "no_match",
            f"no value vector of the {len(labels.layers)} searched layers has {', '.join(map(repr, words))} in its "
            f"label{without}: try more words, more layers or a dense direction",
        )
    facts = {
        "finder": "token",
        "words": list(words),
        "against": list(against),
        "layers_searched": list(labels.layers),
        "neurons": [label_fact(labels, m.layer, m.neuron) | {"matches": m.matches, "score": m.score} for m in found],
    }
    return of_neurons(labels.identity, recipe, [(m.layer, m.neuron) for m in found], facts)


def from_neurons(
    identity: TowerIdentity, recipe: Recipe, neurons: Sequence[tuple[int, int]], *, labels: Labels | None = None
) -> Direction:
    """The given (layer, neuron) pairs as one direction; `labels`, where at hand, go into the provenance.

    Raises SteerError: 'layer_out_of_range', 'neuron_out_of_range', and what Direction refuses.
    """
    facts: dict[str, Any] = {"finder": "neurons"}
    direction = of_neurons(identity, recipe, neurons, facts)
    if labels is None:
        return direction
    # Labels are looked up only after Direction has refused what is out of range, in its own words.
    facts["neurons"] = [label_fact(labels, layer, neuron) for layer, neuron in neurons]
    return of_neurons(identity, recipe, neurons, facts)


def label_fact(labels: Labels, layer: int, neuron: int) -> dict[str, Any]:
    scores = [round(float(s), 4) for s in labels.scores[labels.row(layer), neuron]]
    return {"layer": layer, "neuron": neuron, "label": labels.text(layer, neuron), "label_scores": scores}
