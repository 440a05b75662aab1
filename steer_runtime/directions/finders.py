"""Ways to find a direction: by the words of its labels, by neuron, by word embeddings, from the seed's clusters.

Invariant: a finder returns a Direction whose provenance is enough to find it again (finder, words, labels, scores).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from steer_runtime.directions.direction import Direction, Neurons, Operation
from steer_runtime.directions.token_basis import Labels, TokenBasis, TowerIdentity
from steer_runtime.errors import SteerError
from steer_runtime.types import ALL_ROLES, Role

OPENVLA_ALPHA = 4.0
"""The seed's override value for OpenVLA; it used 10 for pi0-FAST (Haon et al., CoRL 2025, arXiv 2509.00328)."""
CLUSTER_SIZE = 20
"""The largest cluster of the seed holds 20 neurons."""
OPENVLA_SIZE, PI0_FAST_SIZE = (32, 11008), (18, 16384)
"""(layers, d_ff) behind the flat indices of the seed's published clusters: Llama 2 7B and Gemma 2B."""
MAX_CLUSTER_BYTES = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """How a direction is to be written, whatever finds it.

    date: ISO date of making it, given by the caller so that the same inputs give the same hash.
    op, alpha, span: None for the finder's own default. alpha: activation, summand, factor or upper bound of each neuron
    (see Neurons); for a dense direction the factor of its vector. low: lower bound, for `clamp` only.
    facts: more for the provenance.
    """

    name: str
    date: str
    op: Operation | None = None
    alpha: float | None = None
    low: float | None = None
    span: frozenset[Role] | None = None
    max_strength: float = 1.0
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """A value vector whose label carries the words. rank: place of its best matching token in the label, 0 first;
    score: projection of that token; matches: tokens of the label that match."""

    layer: int
    neuron: int
    rank: int
    score: float
    matches: int
    label: tuple[str, ...]


@dataclass(frozen=True)
class Clusters:
    """Directions of a cluster file, and the names of its empty clusters (the seed's `blank` is its control)."""

    directions: tuple[Direction, ...]
    empty: tuple[str, ...]


def search(labels: Labels, words: Sequence[str], *, against: Sequence[str] = ()) -> list[Match]:
    """Value vectors whose label holds one of `words` and none of `against`, best first.

    A token matches a word when they are equal but for case and leading space. Order: number of matching tokens, then
    projection score of the best one. Raises SteerError('unknown_word') for a word that no single token reads.
    """
    if not words:
        raise SteerError("unknown_word", "no words were given to search for: expected one or more, such as 'up'")
    hit = np.isin(labels.tokens, _tokens(labels.basis, words))
    mixed = np.isin(labels.tokens, _tokens(labels.basis, against)).any(axis=-1)
    count = np.where(mixed, 0, hit.sum(axis=-1))
    rows, neurons = np.nonzero(count)
    ranks = hit[rows, neurons].argmax(axis=-1)
    scores = labels.scores[rows, neurons, ranks]
    order = np.lexsort((neurons, rows, -scores, -count[rows, neurons]))
    return [
        Match(
            layer=labels.layers[rows[i]],
            neuron=int(neurons[i]),
            rank=int(ranks[i]),
            score=float(scores[i]),
            matches=int(count[rows[i], neurons[i]]),
            label=tuple(labels.text(labels.layers[rows[i]], int(neurons[i]))),
        )
        for i in order
    ]


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
        "finder": "from_words",
        "words": list(words),
        "against": list(against),
        "layers_searched": list(labels.layers),
        "neurons": [_fact(labels, m.layer, m.neuron) | {"matches": m.matches, "score": m.score} for m in found],
    }
    return _of_neurons(labels.identity, recipe, [(m.layer, m.neuron) for m in found], facts)


def from_neurons(
    identity: TowerIdentity, recipe: Recipe, neurons: Sequence[tuple[int, int]], *, labels: Labels | None = None
) -> Direction:
    """The given (layer, neuron) pairs as one direction; `labels`, where at hand, go into the provenance.

    Raises SteerError: 'layer_out_of_range', 'neuron_out_of_range', and what Direction refuses.
    """
    facts: dict[str, Any] = {"finder": "from_neurons"}
    direction = _of_neurons(identity, recipe, neurons, facts)
    if labels is None:
        return direction
    # Labels are looked up only after Direction has refused what is out of range, in its own words.
    facts["neurons"] = [_fact(labels, layer, neuron) for layer, neuron in neurons]
    return _of_neurons(identity, recipe, neurons, facts)


def dense_from_words(
    identity: TowerIdentity,
    recipe: Recipe,
    basis: TokenBasis,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    embedding: torch.Tensor | None = None,
) -> Direction:
    """Difference of word embeddings, alpha * (mean(positive) - mean(negative)), added to the text at residual site 0.

    A bare word stands for its tokens with and without a leading space, whichever exist; " word" for the one with it.
    A word is the mean of its tokens, so that each word weighs the same. embedding: input embedding [vocab, d_model],
    by default the unembedding (right for tied weights). Default alpha 1, span text.
    Raises SteerError: 'unknown_word' for a word of several tokens, 'bad_token_basis' for another width, 'no_direction'
    when the two means are equal.
    """
    table = basis.unembedding if embedding is None else embedding.detach()
    if table.ndim != 2 or table.shape[1] != identity.d_model:
        raise SteerError(
            "bad_token_basis",
            f"embedding is {list(table.shape)}: expected [vocab, {identity.d_model}], as wide as the tower",
        )
    tokens = {word: _single_tokens(basis, word) for word in (*positive, *negative)}
    if recipe.low is not None:
        raise SteerError("bad_operation", f"dense direction {recipe.name!r} has no bounds: drop `low`")
    if not positive or not negative:
        raise SteerError("unknown_word", f"direction {recipe.name!r} needs words on both sides: give some of each")

    def mean(words: Sequence[str]) -> torch.Tensor:
        return torch.stack([table[list(tokens[word])].float().mean(0) for word in words]).mean(0)

    vector = mean(positive) - mean(negative)
    if not vector.any():
        raise SteerError(
            "no_direction",
            f"the words of direction {recipe.name!r} cancel out: expected other words on each side",
        )
    alpha = 1.0 if recipe.alpha is None else recipe.alpha
    facts = {
        "finder": "dense_from_words",
        "positive": list(positive),
        "negative": list(negative),
        "tokens": {word: list(ids) for word, ids in tokens.items()},
        "alpha": alpha,
        "norm": float(vector.norm()) * alpha,
    }
    return _direction(
        identity,
        recipe,
        facts,
        op=recipe.op or "add",
        span=frozenset({"text"}) if recipe.span is None else recipe.span,
        dense={0: (vector * alpha).cpu().numpy().astype(np.float32)},
    )


def from_clusters(
    path: Path | str, identity: TowerIdentity, recipe: Recipe, *, made_for: tuple[int, int] = OPENVLA_SIZE
) -> Clusters:
    """Every cluster of a file in the seed's published format, named by the file (the recipe's name is not used).

    Format: YAML, cluster -> list of flat indices, or mapping of flat index to label; flat = layer * d_ff + neuron. A
    flat index means nothing without the sizes it was computed with, so `made_for` = (layers, d_ff) must be the tower's.
    Raises SteerError: 'bad_clusters', 'other_model', 'neuron_out_of_range'.
    """
    if (identity.layers, identity.d_ff) != made_for:
        raise SteerError(
            "other_model",
            f"clusters of a model with (layers, d_ff) {made_for} do not fit tower {identity.tower!r} with "
            f"{(identity.layers, identity.d_ff)}: load the model they were made for",
        )
    path = Path(path)
    directions, empty = [], []
    for name, cluster in _read_clusters(path).items():
        if not cluster:
            empty.append(name)
            continue
        pairs = [identity.unflat(flat) for flat in cluster]
        facts: dict[str, Any] = {"finder": "from_clusters", "file": path.name, "flat": list(cluster)}
        if isinstance(cluster, dict):
            facts["labels"] = [
                [str(t) for t in label] if isinstance(label, list) else str(label) for label in cluster.values()
            ]
        directions.append(_of_neurons(identity, recipe, pairs, facts, name=name))
    return Clusters(tuple(directions), tuple(empty))


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error; PyYAML would keep the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is given twice", node.start_mark)
        return mapping


def _read_clusters(path: Path) -> dict[str, list[int] | dict[int, Any]]:
    def refuse(reason: str) -> SteerError:
        return SteerError(
            "bad_clusters",
            f"cluster file {path.name!r} {reason}: expected YAML of cluster names over flat indices",
        )

    try:
        with path.open("rb") as file:
            content = file.read(MAX_CLUSTER_BYTES + 1)
    except OSError as why:
        raise refuse(f"cannot be read ({why.strerror})") from why
    if len(content) > MAX_CLUSTER_BYTES:
        raise refuse(f"is larger than {MAX_CLUSTER_BYTES} bytes")
    try:
        parsed = yaml.load(content, Loader=_UniqueKeys)  # a SafeLoader: builds plain data only
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as why:
        raise refuse(f"is not plain YAML ({' '.join(str(why).split())[:120]})") from why
    if not isinstance(parsed, dict):
        raise refuse("holds no mapping")
    for name, cluster in parsed.items():
        if not isinstance(name, str) or not isinstance(cluster, list | dict | None):
            raise refuse(f"has the entry {str(name)[:80]!r}, which is no cluster")
        odd = [flat for flat in cluster or () if type(flat) is not int]
        if odd:
            raise refuse(f"has {str(odd[0])[:80]!r} in cluster {name[:80]!r}, which is no flat index")
    return {name: cluster or [] for name, cluster in parsed.items()}


def _of_neurons(
    identity: TowerIdentity,
    recipe: Recipe,
    pairs: Sequence[tuple[int, int]],
    facts: dict[str, Any],
    *,
    name: str | None = None,
) -> Direction:
    op = recipe.op or "override"
    if op == "ablate" and recipe.alpha is not None:
        raise SteerError("bad_operation", f"direction {name or recipe.name!r} ablates, which writes 0: drop alpha")
    alpha = 0.0 if op == "ablate" else OPENVLA_ALPHA if recipe.alpha is None else recipe.alpha
    size = len(pairs)
    too_big = [p for p in pairs if not all(0 <= n < 2**31 for n in p)]
    if too_big:
        raise SteerError(
            "neuron_out_of_range",
            f"neuron {too_big[0][0]}:{too_big[0][1]} is out of range: expected layer 0 to {identity.layers - 1} and "
            f"neuron 0 to {identity.d_ff - 1}",
        )
    low = None if recipe.low is None else _filled(size, recipe.low)
    neurons = Neurons(
        layer=np.array([layer for layer, _ in pairs], np.int32),
        neuron=np.array([neuron for _, neuron in pairs], np.int32),
        alpha=_filled(size, alpha),
        low=low,
    )
    span = ALL_ROLES if recipe.span is None else recipe.span
    return _direction(identity, recipe, facts | {"alpha": alpha}, op=op, span=span, neurons=neurons, name=name)


def _filled(size: int, value: float) -> np.ndarray:
    # A value beyond float32 becomes infinite here, and Direction refuses what is not finite.
    with np.errstate(over="ignore"):
        return np.full(size, value, np.float32)


def _direction(
    identity: TowerIdentity, recipe: Recipe, facts: dict[str, Any], *, name: str | None = None, **form: Any
) -> Direction:
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers", "numpy")}
    return Direction(
        name=name or recipe.name,
        tower=identity.tower,
        model_hash=identity.model_hash,
        layers=identity.layers,
        d_model=identity.d_model,
        d_ff=identity.d_ff,
        max_strength=recipe.max_strength,
        provenance={**recipe.facts, **facts, "date": recipe.date, "versions": versions},
        **form,
    )


def _fact(labels: Labels, layer: int, neuron: int) -> dict[str, Any]:
    scores = [round(float(s), 4) for s in labels.scores[labels.row(layer), neuron]]
    return {"layer": layer, "neuron": neuron, "label": labels.text(layer, neuron), "label_scores": scores}


def _tokens(basis: TokenBasis, words: Sequence[str]) -> np.ndarray:
    return np.array([token for word in words for token in basis.tokens_of(word)], np.int32)


def _single_tokens(basis: TokenBasis, word: str) -> tuple[int, ...]:
    """Tokens that are exactly `word` (case kept): " word" only with its space, "word" in both forms."""
    forms = [word] if word.startswith(" ") else [word, f" {word}"]
    encoded = [basis.tokenizer.encode(form, add_special_tokens=False) for form in forms]
    # A tokenizer with an unknown-token answers one token for any word: what it reads back tells.
    single = [ids[0] for ids in encoded if len(ids) == 1 and basis.text(ids[0]).strip() == word.strip()]
    found = tuple(dict.fromkeys(single))
    if not found or not word.strip():
        # Names the nearest tokens where no token reads the word at all.
        basis.tokens_of(word)
        raise SteerError(
            "unknown_word",
            f"{word[:40]!r}, spelt so, is not one token of this vocabulary: choose another form or word",
        )
    return found
