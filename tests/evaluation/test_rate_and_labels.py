"""How fast, and whether words survive: on small policies of the real classes and the published language model's file."""

from __future__ import annotations

from dataclasses import replace

import fabricate
import fabricate_pi0
import pytest
import torch

from sim.evaluation import labels, rate
from steer_runtime.errors import SteerError
from steer_runtime.policies.base import EMBEDDING, PREFIX, read_base
from steer_runtime.policies.openvla.config import LMConfig
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.policies.pocket import smollm2_base


def test_rate_times_every_part_and_leaves_no_hook_and_no_thread_setting() -> None:
    policy = fabricate.tiny_policy(fabricate.tiny_config(chunk=2))
    before = torch.get_num_threads()
    timings = rate.measure(policy, fabricate.make_observation(policy), inferences=3, warm_up=1, threads=2)
    assert len(timings) == 3
    assert all(set(t.parts) == {"vision", "prefill", "decode"} and min(t.parts.values()) > 0 for t in timings)
    assert torch.get_num_threads() == before
    decoder = policy.model.language_model.model
    assert not decoder._forward_pre_hooks
    assert not decoder._forward_hooks


def test_actions_a_second_counts_the_whole_chunk() -> None:
    policy = fabricate.tiny_policy(fabricate.tiny_config(chunk=4))
    lines = {line.what: line for line in rate.summarise(policy, [rate.Timing(0.4, {"prefill": 0.2})] * 5, 2)}
    first = lines["actions a second, 2 threads, 4 a chunk"]
    assert first.value == pytest.approx(10.0)
    assert lines["  share of prefill"].value == pytest.approx(0.5)
    parameters = sum(p.numel() for p in policy.model.parameters())
    assert lines["  parameters"].value == pytest.approx(4 * parameters / 1e6)


def test_the_rate_of_a_flow_policy_counts_what_is_executed_of_a_chunk_and_names_its_own_stages() -> None:
    policy = fabricate_pi0.tiny_policy(action_steps=3)
    timings = rate.measure(policy, fabricate_pi0.make_observation(), inferences=2, warm_up=1, threads=1)
    assert all(set(t.parts) == {"preprocess", "vision", "prefix", "denoise"} for t in timings)
    assert all(0 < sum(t.parts.values()) <= t.total for t in timings)
    lines = {line.what: line for line in rate.summarise(policy, [rate.Timing(0.1, {"denoise": 0.08})] * 4, 1)}
    assert lines["actions a second, 1 threads, 3 a chunk"].value == pytest.approx(30.0)
    assert lines["  share of denoise"].value == pytest.approx(0.8)


def smollm2_sized() -> OpenVLAPolicy:
    """Two layers of SmolLM2's width with random weights."""
    lm = LMConfig(vocab_rows=384, d_model=576, d_ff=1536, layers=2, heads=9, kv_heads=3)
    return fabricate.tiny_policy(fabricate.tiny_config(lm=lm))


def test_untouched_layer_keeps_its_words_and_a_random_one_does_not() -> None:
    policy, base = smollm2_sized(), smollm2_base((0, 29))
    published = f"{PREFIX}layers.1.mlp.down_proj.weight"
    weights = dict(read_base(replace(base, tensors=(published,)), 9, 3))
    assert weights[EMBEDDING].shape == (49152, 576)
    with torch.no_grad():
        policy.model.language_model.model.layers[1].mlp.down_proj.weight.copy_(weights[published])
    shares = labels.survival(policy, base, (0, 1))
    assert shares[1] == 1.0
    assert shares[0] < 0.05


def test_late_layers_are_those_of_the_published_later_half() -> None:
    assert labels.late_layers(smollm2_base((0, 1, 2, 14, 15, 29))) == (4, 5)


def test_checkpoint_that_names_no_base_is_refused_with_the_way_out() -> None:
    with pytest.raises(SteerError, match="--kept"):
        labels.require_base(fabricate.tiny_policy(), None)
    with pytest.raises(SteerError, match="expected as many"):
        labels.require_base(fabricate.tiny_policy(), smollm2_base((0, 29)))
