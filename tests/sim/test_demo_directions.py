"""What a demo steers with: shipped axes first, then what the demo file's words make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fabricate_pi0
import pytest

from ros_nodes.demo_config import DemoConfig
from ros_nodes.demo_directions import demo_directions, save_afresh
from steer_runtime.directions.direction import Axis
from steer_runtime.directions.store import DirectionStore
from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.policies.pi0.policy import Pi0Policy


def config(labels: Path, **fields: Any) -> DemoConfig:
    return DemoConfig(policy="p", commands=(), labels=labels, **fields)


def ship(policy: Pi0Policy, folder: Path, names: Sequence[str] = ("speed",)) -> None:
    """A store with an axis of the expert under each name."""
    folder.mkdir()
    store = DirectionStore(folder)
    for number, name in enumerate(names):
        for end in ("slow", "fast"):
            neurons = [(number, 3 if end == "slow" else 5)]
            store.save(fabricate_pi0.neuron_direction(policy, "expert", neurons, name=f"{name}-{end}"))
        store.save_axis(Axis(name, f"{name}-slow", f"{name}-fast"))


def test_an_axis_that_the_policy_ships_is_taken_whatever_its_tower(tmp_path: Path) -> None:
    policy = fabricate_pi0.tiny_policy()
    shipped = tmp_path / "shipped"
    ship(policy, shipped, ("height", "speed"))
    wanted = config(tmp_path, axes=({"name": "speed", "form": "dense"},))
    directions, axes = demo_directions(wanted, policy, shipped)
    assert axes == (Axis("speed", "speed-slow", "speed-fast"),)
    assert [(d.name, d.tower) for d in directions] == [("speed-slow", "expert"), ("speed-fast", "expert")]


def test_a_shipped_axis_of_another_model_is_refused(tmp_path: Path) -> None:
    policy = fabricate_pi0.tiny_policy()
    ship(policy, tmp_path / "shipped")
    wanted = config(tmp_path, axes=({"name": "speed", "form": "dense"},))
    with pytest.raises(SteerError, match="belongs to model"):
        demo_directions(wanted, fabricate_pi0.tiny_policy(seed=1), tmp_path / "shipped")


def test_without_one_words_make_it_for_openvla_and_nothing_for_pi0(
    tiny_policy: OpenVLAPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(tmp_path, axes=({"name": "pace", "words": "speed", "form": "dense"},))
    with pytest.raises(SteerError, match="axis 'pace', which is in no direction store") as refused:
        demo_directions(wanted, fabricate_pi0.tiny_policy(), tmp_path / "none")
    assert refused.value.code == "other_policy"
    known = {"speed": (("fast", "fast"), ("slow", "slow"))}
    monkeypatch.setattr("sim.evaluation.axis_directions.WORDS", known)
    directions, axes = demo_directions(wanted, tiny_policy, tmp_path / "none")
    assert axes == (Axis("pace", "pace-negative", "pace-positive"),)
    assert [d.provenance["positive"][0] for d in directions] == ["slow", "fast"]


def test_the_runs_own_store_holds_these_alone(tmp_path: Path) -> None:
    policy = fabricate_pi0.tiny_policy()
    ship(policy, tmp_path / "store", ("height",))
    (tmp_path / "store" / "notes.txt").write_text("not ours")
    mine = replace(fabricate_pi0.neuron_direction(policy, "prefix"), name="mine")
    save_afresh(tmp_path / "store", (mine,), ())
    store = DirectionStore(tmp_path / "store")
    assert [d.name for d in store.load_all()] == ["mine"]
    assert store.load_axes() == ()
    assert (tmp_path / "store" / "notes.txt").is_file()
