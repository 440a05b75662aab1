"""The seed paper's published clusters: YAML of flat neuron indices (Haon et al., CoRL 2025, arXiv 2509.00328)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from steer_runtime.directions.direction import Direction
from steer_runtime.directions.finders import Recipe, of_neurons
from steer_runtime.directions.token_basis import TowerIdentity
from steer_runtime.errors import SteerError

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
        directions.append(of_neurons(identity, recipe, pairs, facts, name=name))
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
