"""A Pi0 whose prefix reads objects and proprioception in place of SigLIP's patches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import fabricate
import fabricate_pi0
import numpy as np
import pytest
import torch

from steer_runtime.errors import SteerError
from steer_runtime.policies.pi0.checkpoint import load_checkpoint, save_checkpoint
from steer_runtime.policies.pi0.config import emit_config, parse_config
from steer_runtime.policies.pi0.policy import Pi0Policy
from steer_runtime.verify import verify


@pytest.fixture
def policy() -> Pi0Policy:
    return fabricate_pi0.object_policy()


class _Roles:
    def __init__(self) -> None:
        self.heard: list[tuple[str, list[str]]] = []

    def set_roles(self, tower: str, roles: list[str]) -> None:
        self.heard.append((tower, list(roles)))


def square(**changes: object):  # type: ignore[no-untyped-def]
    return fabricate_pi0.make_observation(size=(64, 64), **changes)  # type: ignore[arg-type]


def test_the_configuration_survives_its_json(tmp_path: Path) -> None:
    config = fabricate_pi0.object_config()
    assert parse_config(emit_config(config), tmp_path) == config


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vision": fabricate_pi0.tiny_config().vision}, "neither SigLIP nor objects, or both"),
        ({"max_cameras": 3}, "max_cameras is 3"),
        ({"objects": None}, "neither SigLIP nor objects"),
    ],
)
def test_a_configuration_that_sees_twice_or_not_at_all_is_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(SteerError, match="does not fit together") as refusal:
        fabricate_pi0.object_config(**changes)
    assert named in refusal.value.sentence


def test_a_checkpoint_comes_back_with_every_key(tmp_path: Path, policy: Pi0Policy) -> None:
    table = {"norm_stats": {k: {"mean": [0.0] * n, "std": [1.0] * n} for k, n in (("state", 12), ("actions", 7))}}
    path = save_checkpoint(policy.model, tmp_path / "p", table, tokenizer=fabricate.tiny_tokenizer())
    network, report = load_checkpoint(path)
    ours, theirs = policy.model.state_dict(), network.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not report.not_persistent
    assert any(key.startswith("objects.heatmap.") for key in theirs)
    assert not any("vision_tower" in key for key in theirs)


def test_tokens_have_the_roles_of_what_they_tell(policy: Pi0Policy) -> None:
    roles = _Roles()
    policy.announce_roles_to(roles)
    policy.infer(square())
    tower, prefix = roles.heard[0]
    assert tower == "prefix"
    assert prefix[:6] == ["text", "image", "image", "image", "state", "state"]
    assert set(prefix[6:]) == {"text"}
    assert len(roles.heard) == 1 + policy.euler_steps


def test_what_is_seen_felt_and_asked_decides_the_action(policy: Pi0Policy) -> None:
    first = policy.noise(0)

    def act(**changes: object) -> np.ndarray:
        policy.reset(0)
        return policy.infer(square(**changes), first).actions

    still = act()
    assert np.array_equal(still, act())
    assert not np.array_equal(still, act(seed=1))
    assert not np.allclose(still, act(instruction="pick up the object and place it in the basket"), atol=1e-4)
    policy.reset(0)
    moved = replace(square(), state=square().state + 0.05)
    assert not np.allclose(still, policy.infer(moved, first).actions, atol=1e-4)


def test_the_last_gripper_command_is_felt_and_an_episode_begins_open(policy: Pi0Policy) -> None:
    noise = policy.noise(0)
    policy.reset(0)
    opened = policy.infer(square(), noise).actions
    policy.told_gripper(1.0)
    closed = policy.infer(square(), noise).actions
    assert not np.allclose(opened, closed, atol=1e-4)
    policy.reset(0)
    assert np.array_equal(policy.infer(square(), noise).actions, opened)


def test_a_chunk_that_ends_closed_is_remembered(policy: Pi0Policy) -> None:
    chunk = policy.infer(square())
    expected = 1.0 if chunk.actions[-1, 6] > 0 else -1.0
    assert float(policy.inputs([square()]).felt[0, -1]) == expected  # type: ignore[index]


@pytest.mark.parametrize(("text", "unknown"), [("pick up the soup and place it in the basket", 0.0), ("go up", 1.0)])
def test_an_instruction_of_unknown_objects_is_noted(policy: Pi0Policy, text: str, unknown: float) -> None:
    assert policy.infer(square(instruction=text)).notes["unknown_object"] == unknown


def test_both_cameras_are_needed() -> None:
    with pytest.raises(SteerError) as refusal:
        fabricate_pi0.object_policy(cameras=("agentview",))
    assert refusal.value.code == "bad_policy"
    policy = fabricate_pi0.object_policy()
    seen = square()
    with pytest.raises(SteerError) as missing:
        policy.infer(replace(seen, images={"agentview": seen.images["agentview"]}))
    assert missing.value.code == "missing_camera"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_refused(policy: Pi0Policy, value: float) -> None:
    seen = square()
    with pytest.raises(SteerError) as refusal:
        policy.infer(replace(seen, state=np.full(8, value)))
    assert refusal.value.code == "bad_state"


def test_its_hooks_fire_and_its_dead_layer_is_dead(policy: Pi0Policy) -> None:
    report = verify(policy, square())
    assert report.passed, report
