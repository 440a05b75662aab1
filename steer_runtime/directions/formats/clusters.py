"""The seed paper's published clusters: YAML of flat neuron indices (Haon et al., CoRL 2025, arXiv 2509.00328).

Two forms: cluster -> mapping of flat index to label (its OpenVLA file), and cluster -> list of flat indices (its pi0-FAST
file); flat = layer * d_ff + neuron.

Invariant: a file becomes directions of exactly its indices, or is refused; its YAML builds plain data only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from steer_runtime.directions.direction import Direction
from steer_runtime.directions.files import read_file
from steer_runtime.directions.finders.recipe import Recipe, of_neurons
from steer_runtime.directions.formats.exported import Exported
from steer_runtime.directions.token_basis import TowerIdentity
from steer_runtime.errors import SteerError
from steer_runtime.types import ALL_ROLES
from steer_runtime.unique_keys import UniqueKeys

OPENVLA_SIZE, PI0_FAST_SIZE = (32, 11008), (18, 16384)
"""(layers, d_ff) behind the flat indices of the seed's published clusters: Llama 2 7B and Gemma 2B."""
MAX_CLUSTER_BYTES = 1 << 20


@dataclass(frozen=True)
class Clusters:
    """Directions of a cluster file, and the names of its empty clusters (the seed's `blank` is its control)."""

    directions: tuple[Direction, ...]
    empty: tuple[str, ...]


def from_clusters(
    path: Path | str, identity: TowerIdentity, recipe: Recipe, *, made_for: tuple[int, int] = OPENVLA_SIZE
) -> Clusters:
    """Every cluster of a file in either form, named by the file (the recipe's name is not used).

    A flat index means nothing without the sizes it was computed with, so `made_for` = (layers, d_ff) must be the tower's.
    Raises SteerError: 'bad_file', 'bad_clusters', 'other_model', 'neuron_out_of_range', and what Direction refuses.
    """
    if (identity.layers, identity.d_ff) != made_for:
        raise SteerError(
            "other_model",
            f"clusters of a model with (layers, d_ff) {made_for} do not fit tower {identity.tower!r} with "
            f"{(identity.layers, identity.d_ff)}: load the model they were made for",
        )
    path = Path(path)
    content = read_file(path, MAX_CLUSTER_BYTES, follow=True)
    source = {
        "finder": "import",
        "format": "clusters",
        "file": path.name,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    directions, empty = [], []
    for name, cluster in _parse(content, path.name).items():
        if not cluster:
            empty.append(name)
            continue
        pairs = [identity.unflat(flat) for flat in cluster]
        facts: dict[str, Any] = {**source, "flat": list(cluster)}
        if isinstance(cluster, dict):
            facts["labels"] = list(cluster.values())
        directions.append(of_neurons(identity, recipe, pairs, facts, name=name))
    if not directions:
        raise SteerError(
            "bad_clusters",
            f"cluster file {path.name!r} names no neuron: expected YAML of cluster names over flat indices",
        )
    return Clusters(tuple(directions), tuple(empty))


def to_clusters(directions: Sequence[Direction], *, labelled: bool) -> Exported:
    """Directions as one cluster file; labelled: flat index to label, as in the seed's OpenVLA file, else lists.

    The format knows names, indices and labels. What else a reader needs (alpha, sizes, model, licence) is written as
    comments; only override can be meant by it. Raises SteerError('not_exportable').
    """
    if not directions:
        raise SteerError("not_exportable", "no direction was named: give some to write")
    names = [d.name for d in directions]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SteerError("not_exportable", f"a cluster file can hold one direction called {twice[0]!r}: choose one")
    if len({(d.tower, d.layers, d.d_ff) for d in directions}) > 1:
        raise SteerError(
            "not_exportable", "the directions are of towers of different sizes: a cluster file has one flat index"
        )
    comments, losses, clusters = [], [], {}
    for direction in directions:
        flat, note, lost = _cluster(direction)
        labels = _labels(direction)
        clusters[direction.name] = {f: labels.get(f, []) for f in flat} if labelled else flat
        comments.append(note)
        losses.extend(lost)
        if not labelled and labels:
            comments.append(f"{direction.id}: its labels are left out")
    head = "".join(f"# {line}\n" for line in [*comments, *(f"lost: {loss}" for loss in losses)])
    text = yaml.safe_dump(clusters, sort_keys=False, allow_unicode=True, width=1 << 16, default_flow_style=None)
    content = (head + text).encode()
    if len(content) > MAX_CLUSTER_BYTES:
        raise SteerError(
            "not_exportable",
            f"the cluster file would be {len(content)} bytes: at most {MAX_CLUSTER_BYTES} are read back",
        )
    return Exported(content, tuple(losses))


def _cluster(direction: Direction) -> tuple[list[int], str, list[str]]:
    """Flat indices, the comment and the losses of one direction."""
    n = direction.neurons
    if n is None or direction.op != "override":
        what = "a dense vector" if n is None else f"the operation {direction.op!r}"
        raise SteerError(
            "not_exportable",
            f"direction {direction.id!r} holds {what}: a cluster file holds neurons that are overridden; export it as "
            "safetensors",
        )
    flat = [int(layer) * direction.d_ff + int(neuron) for layer, neuron in zip(n.layer, n.neuron, strict=True)]
    losses = []
    alphas = sorted({float(a) for a in n.alpha})
    if len(alphas) > 1:
        losses.append(f"{direction.id}: alphas from {alphas[0]:.9g} to {alphas[-1]:.9g}, where the format has none")
    if direction.span != ALL_ROLES:
        losses.append(f"{direction.id}: written on {', '.join(sorted(direction.span))} tokens only")
    note = (
        f"{direction.id}: override, --alpha {float(np.float32(alphas[-1])):.9g}, --made-for "
        f"{direction.layers}x{direction.d_ff}, model {direction.model_hash[:12]}, licence {direction.licence}"
    )
    return flat, note, losses


def _labels(direction: Direction) -> dict[int, Any]:
    """Flat index -> label, from the provenance of an import or of a finder; empty where neither has them."""
    facts = direction.provenance
    flat, labels = facts.get("flat"), facts.get("labels")
    if isinstance(flat, list) and isinstance(labels, list) and len(flat) == len(labels):
        return dict(zip(flat, labels, strict=True))
    neurons = facts.get("neurons")
    found = [f for f in neurons if isinstance(f, dict)] if isinstance(neurons, list) else []
    return {
        f["layer"] * direction.d_ff + f["neuron"]: f["label"] for f in found if {"layer", "neuron", "label"} <= set(f)
    }


def _parse(content: bytes, what: str) -> dict[str, list[int] | dict[int, str | list[str]]]:
    """Cluster name -> flat indices, or flat index -> label. Raises SteerError('bad_clusters')."""

    def refuse(reason: str) -> SteerError:
        return SteerError(
            "bad_clusters",
            f"cluster file {what!r} {reason}: expected YAML of cluster names over flat indices",
        )

    try:
        parsed = yaml.load(content, Loader=UniqueKeys)  # a SafeLoader: builds plain data only
    # PyYAML lets out what its constructors stumble over: `!!bool x` a KeyError, `!!int ''` an IndexError,
    # `!!timestamp x` an AttributeError.
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, AttributeError) as why:
        raise refuse(f"is not plain YAML ({' '.join(str(why).split())[:120]})") from why
    if not isinstance(parsed, dict):
        raise refuse("holds no mapping")
    for name, cluster in parsed.items():
        if not isinstance(name, str) or not isinstance(cluster, list | dict | None):
            raise refuse(f"has the entry {_short(name)}, which is no cluster")
        odd = [flat for flat in cluster or () if type(flat) is not int or flat.bit_length() > 63]
        if odd:
            raise refuse(f"has {_short(odd[0])} in cluster {name[:80]!r}, which is no flat index")
    return {
        name: {flat: _label(label, name, refuse) for flat, label in cluster.items()}
        if isinstance(cluster, dict)
        else list(cluster or [])
        for name, cluster in parsed.items()
    }


def _label(label: Any, name: str, refuse: Any) -> str | list[str]:
    """A label is text or a list of texts; YAML reads some words as numbers, truth values or dates."""
    if isinstance(label, list):
        if not all(_is_word(token) for token in label):
            raise refuse(f"has a label in cluster {name[:80]!r} that is no list of words")
        return [str(token) for token in label]
    if not _is_word(label):
        raise refuse(f"has the label {_short(label)} in cluster {name[:80]!r}, which is no word")
    return str(label)


def _is_word(token: Any) -> bool:
    # Never a collection: aliases can make a small file's text exponentially long. Python writes no huge integer in digits.
    if isinstance(token, int):
        return token.bit_length() <= 63
    return token is None or isinstance(token, str | float)


def _short(value: Any) -> str:
    return repr(value)[:80] if _is_word(value) else f"a {type(value).__name__}"
