"""The seed's published clusters become directions, or the file is refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from steer_runtime.directions.finders import Recipe
from steer_runtime.directions.formats import clusters as clusters_format
from steer_runtime.directions.store import DirectionStore
from steer_runtime.directions.token_basis import TowerIdentity
from steer_runtime.errors import SteerError

CLUSTERS = Path(__file__).parents[2] / "configs" / "clusters"
OPENVLA = TowerIdentity("lm", "f" * 64, 32, 4096, 11008)
PI0_FAST = TowerIdentity("prefix", "f" * 64, 18, 2048, 16384)
RECIPE = Recipe("up", "2026-01-31")
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in pairwise("abcdefghijklm"))
"""Aliases of aliases: plain data of a few bytes whose text would be of terabytes."""


@pytest.mark.parametrize(
    ("file", "identity", "made_for", "sizes"),
    [
        (
            "corl2025_openvla_clusters.yaml",
            OPENVLA,
            clusters_format.OPENVLA_SIZE,
            {"up_10": 10, "up_20": 20, "careful_10_full": 10},
        ),
        (
            "corl2025_pi0fast_clusters.yaml",
            PI0_FAST,
            clusters_format.PI0_FAST_SIZE,
            {"high_cluster": 3, "low_cluster": 4},
        ),
    ],
)
def test_the_published_clusters_load(
    file: str, identity: TowerIdentity, made_for: tuple[int, int], sizes: dict[str, int]
) -> None:
    clusters = clusters_format.from_clusters(CLUSTERS / file, identity, RECIPE, made_for=made_for)
    found = {d.name: len(d.neurons or ()) for d in clusters.directions}
    assert found.items() >= sizes.items()
    assert clusters.empty == (("blank",) if "openvla" in file else ())


def test_a_published_cluster_keeps_its_flat_indices_and_labels(tmp_path: Path) -> None:
    path = CLUSTERS / "corl2025_openvla_clusters.yaml"
    up = next(d for d in clusters_format.from_clusters(path, OPENVLA, RECIPE).directions if d.name == "up_10")
    assert up.neurons is not None
    flat = [OPENVLA.flat(int(a), int(b)) for a, b in zip(up.neurons.layer, up.neurons.neuron, strict=True)]
    assert flat == list(yaml.safe_load(path.read_text())["up_10"])
    assert up.provenance["labels"][0][:2] == ["up", "Up"]
    DirectionStore(tmp_path).save(up)
    assert DirectionStore(tmp_path).load("up_10").hash == up.hash


def test_clusters_of_a_model_of_another_size_are_refused() -> None:
    other = TowerIdentity("lm", "f" * 64, 8, 576, 1536)
    path = CLUSTERS / "corl2025_openvla_clusters.yaml"
    assert refused(lambda: clusters_format.from_clusters(path, other, RECIPE)).code == "other_model"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (f"up: [{32 * 11008}]", "neuron_out_of_range"),
        ("up: [-1]", "neuron_out_of_range"),
        ("up: [1, 1]", "bad_direction"),
        ("up: {1: [a], 1: [b]}", "bad_clusters"),
        ("up: [true]", "bad_clusters"),
        ("up: ['1']", "bad_clusters"),
        ("up: 5", "bad_clusters"),
        ("[1, 2]", "bad_clusters"),
        ("up: [1", "bad_clusters"),
        ("up: !!python/object/apply:os.getcwd []", "bad_clusters"),
        ("../up: [1]", "bad_name"),
        ("up: " + "[" * 20_000, "bad_clusters"),
        ("up: [" + "1, " * 400_000 + "2]", "bad_file"),
        ("up: [0x" + "f" * 9_000 + "]", "bad_clusters"),
        ("up: {1: 0x" + "f" * 9_000 + "}", "bad_clusters"),
        ("up: {1: [[a]]}", "bad_clusters"),
        ("up: {1: 2026-01-31}", "bad_clusters"),
        ("up: !!bool x", "bad_clusters"),
        ("up: !!int ''", "bad_clusters"),
        ("up: !!timestamp x", "bad_clusters"),
        (BOMB, "bad_clusters"),
    ],
)
def test_a_cluster_file_that_is_none_is_refused(tmp_path: Path, text: str, code: str) -> None:
    path = tmp_path / "clusters.yaml"
    path.write_text(text)
    error = refused(lambda: clusters_format.from_clusters(path, OPENVLA, RECIPE))
    assert error.code == code
    assert str(tmp_path) not in error.sentence


def test_no_path_of_this_machine_gets_into_a_card() -> None:
    for direction in clusters_format.from_clusters(
        CLUSTERS / "corl2025_openvla_clusters.yaml", OPENVLA, RECIPE
    ).directions:
        assert str(CLUSTERS.parent) not in json.dumps(direction.card())


def refused(action: Callable[[], object]) -> SteerError:
    with pytest.raises(SteerError) as caught:
        action()
    return caught.value
