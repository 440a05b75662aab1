"""Replays: the same observations without and with steering, through the real engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import fabricate
import fabricate_pi0
import numpy as np
import pytest
import torch

from sim.before_after import before_after
from steer_runtime.directions.direction import Direction, Neurons
from steer_runtime.errors import SteerError
from steer_runtime.policies.objects.config import HeatmapConfig
from steer_runtime.policies.openvla.config import Slot
from steer_runtime.policies.openvla.model import OpenVLAModel
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.types import Observation


def strong(policy: OpenVLAPolicy) -> Direction:
    """Half the neurons of layer 0, far from where they are."""
    tower = policy.towers["lm"]
    index = np.arange(tower.d_ff // 2, dtype=np.int32)
    held = Neurons(np.zeros_like(index), index, np.full(len(index), 25.0, np.float32))
    return Direction("push", "lm", policy.model_hash, tower.layers, tower.d_model, tower.d_ff, neurons=held)


def test_off_is_the_policy_itself_and_steering_changes_it(
    tiny_policy: OpenVLAPolicy, observation: Callable[..., Observation]
) -> None:
    seen = [observation(tiny_policy, seed=s) for s in range(2)]
    heard: list[int] = []
    table = before_after(tiny_policy, [strong(tiny_policy)], (), seen, {"push +1": {"push": 1.0}}, heard.append)
    assert table.conditions == ("off", "push +1")
    plain = np.stack([tiny_policy.infer(o).actions[0] for o in seen])
    assert np.array_equal(table.actions[0], plain)
    assert not np.array_equal(table.bins[0], table.bins[1])
    assert np.allclose(table.bins.sum(-1), 1.0, atol=1e-5)
    assert set(table.tokens.ravel()) <= set(tiny_policy.action_token_values())
    assert (np.diff(table.bin_values) >= 0).all()
    assert heard == [1, 2, 3, 4]


def test_tokens_are_the_ones_the_actions_were_made_from(
    tiny_policy: OpenVLAPolicy, observation: Callable[..., Observation]
) -> None:
    table = before_after(tiny_policy, (), (), [observation(tiny_policy)], {})
    normalised = tiny_policy.statistics.unnormalise(tiny_policy.actions.decode(table.tokens[0, 0]))
    assert np.allclose(normalised[:6], table.actions[0, 0, :6], atol=1e-6)


def test_of_a_chunk_the_first_action_is_compared_with_the_gripper_as_it_was_then(
    observation: Callable[..., Observation],
) -> None:
    heat = HeatmapConfig(classes=("soup", "basket"), hidden=64, blocks=1, heads=2)
    slots = (Slot("pace", (" slow", " fast"), (5, 6)),)
    torch.manual_seed(0)
    config = fabricate.tiny_config(
        dino=None, siglip=None, heatmap=heat, image_size=64, state_tokens=1, chunk=3, slots=slots, parallel=True
    )
    model = OpenVLAModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not name.startswith("heatmap"):
                parameter.copy_(torch.randn(parameter.shape) * 2.0 * parameter.shape[-1] ** -0.5)
    policy = OpenVLAPolicy(model.eval(), fabricate.tiny_tokenizer(), fabricate.tiny_statistics())
    told = [replace(observation(policy), gripper_command=command) for command in (-1.0, 1.0, -1.0)]
    opened, closed, again = before_after(policy, (), (), told, {}).bins[0]
    assert opened.shape[0] == 7
    assert np.array_equal(opened, again)
    assert not np.array_equal(opened, closed)
    table = before_after(policy, (), (), told[1:2], {})
    assert set(table.said[0][0]) <= {"slow", "fast"}
    assert len(table.said[0][0]) == 1


def test_refused_strength_is_not_replayed_as_something_else(
    tiny_policy: OpenVLAPolicy, observation: Callable[..., Observation]
) -> None:
    seen = [observation(tiny_policy)]
    with pytest.raises(SteerError, match="clamped"):
        before_after(tiny_policy, [strong(tiny_policy)], (), seen, {"push +3": {"push": 3.0}})


def test_a_policy_that_denoises_is_compared_on_the_same_noise_and_has_no_bins() -> None:
    policy = fabricate_pi0.tiny_policy()
    direction = fabricate_pi0.neuron_direction(policy, "expert")
    seen = [fabricate_pi0.make_observation() for _ in range(2)]
    conditions = {"off again": {}, "on": {direction.name: 1.0}}
    off, again, on = before_after(policy, [direction], (), seen, conditions).actions
    assert np.array_equal(off, again)
    assert (off != on).any(axis=-1).all()
    # Two observations that look alike differ by their noise.
    assert not np.array_equal(off[0], off[1])
    assert before_after(policy, (), (), seen, {}).bins.shape == (1, 2, 7, 0)
