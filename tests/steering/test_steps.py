"""Steering in some forwards of an inference only, and towers whose last layers reach nothing."""

from __future__ import annotations

import dataclasses

import fabricate
import numpy as np
import pytest
import torch

from steer_runtime.directions.direction import Direction, Neurons
from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.policy import TOWER, OpenVLAPolicy
from steer_runtime.steering.engine import SteeringEngine
from steer_runtime.steering.offline import OfflineSteering
from steer_runtime.steering.trace import TraceRecord
from steering.subjects import Sender, Time, dense_direction, neuron_direction


@pytest.fixture
def policy() -> OpenVLAPolicy:
    """The tiny policy with its seven forwards taken for denoising steps."""
    made = fabricate.tiny_policy()
    made.towers = {TOWER: dataclasses.replace(made.towers[TOWER], denoises=True)}
    return made


def _inputs_of_down_proj(policy: OpenVLAPolicy, layer: int, neuron: int) -> list[float]:
    """What one neuron was in the last token of each forward, kept while the hook is on."""
    seen: list[float] = []
    module = policy.towers[TOWER].down_projs[layer]
    module.register_forward_pre_hook(lambda m, args: seen.append(float(args[0][0, -1, neuron])))  # type: ignore[attr-defined]
    return seen


def _run(
    policy: OpenVLAPolicy, direction: Direction, steps: tuple[int, int] | None
) -> tuple[torch.Tensor, TraceRecord]:
    observation = fabricate.make_observation(policy)
    with OfflineSteering(policy, [direction]) as steering:
        steering.set({direction.name: 1.0}, steps=steps)
        return steering.run(lambda: policy.logits(observation))


@pytest.mark.parametrize("steps", [(0, 1), (2, 5), (6, 7), (0, 7)])
def test_neurons_are_written_in_the_named_forwards_only(policy: OpenVLAPolicy, steps: tuple[int, int]) -> None:
    direction = neuron_direction(policy, neurons=[(1, 5)], alpha=77.0)
    observation = fabricate.make_observation(policy)
    with OfflineSteering(policy, [direction]) as steering:
        seen = _inputs_of_down_proj(policy, 1, 5)  # behind ours: it sees what was written
        steering.set({"up": 1.0}, steps=steps)
        for _ in range(2):  # the second inference begins again with the first step
            seen.clear()
            _, record = steering.run(lambda: policy.logits(observation))
            assert [value == 77.0 for value in seen] == [steps[0] <= i < steps[1] for i in range(7)]
    (site,) = record.sites
    assert (site.neurons, site.forwards) == ((5,), steps[1] - steps[0])
    prefill = sum(count for _, count in record.tokens) - 6
    assert site.writes == (prefill if steps[0] == 0 else 1) + (steps[1] - steps[0] - 1)


def test_all_steps_are_the_same_bits_as_no_steps(policy: OpenVLAPolicy) -> None:
    for direction in (neuron_direction(policy), dense_direction(policy)):
        plain, _ = _run(policy, direction, None)
        named, record = _run(policy, direction, (0, 7))
        assert torch.equal(plain, named)
        assert record.firings == record.expected_firings


def test_steps_before_the_window_are_the_unsteered_bits(policy: OpenVLAPolicy) -> None:
    unsteered = policy.logits(fabricate.make_observation(policy))
    for direction in (neuron_direction(policy), dense_direction(policy)):
        late, record = _run(policy, direction, (4, 7))
        assert torch.equal(late[:4], unsteered[:4])
        assert not torch.equal(late[4], unsteered[4])
        assert all(site.forwards == 3 for site in record.sites)


def test_two_windows_on_one_neuron_each_hold_in_their_own_steps(policy: OpenVLAPolicy) -> None:
    first = neuron_direction(policy, "first", neurons=[(1, 5)], alpha=11.0)
    second = neuron_direction(policy, "second", neurons=[(1, 5)], alpha=22.0)
    time = Time()
    engine = SteeringEngine(policy, [first, second], clock=time.steady, wall_ns=time.wall_ns)
    engine.attach()
    seen = _inputs_of_down_proj(policy, 1, 5)
    sender = Sender(time)
    assert engine.apply(sender.set("first", 1.0, ramp_s=0.0, steps=(0, 3))).accepted
    assert engine.apply(sender.set("second", 1.0, ramp_s=0.0, steps=(2, 5))).accepted
    time.now_s += 1
    engine.latch()
    policy.logits(fabricate.make_observation(policy))
    engine.finish()
    engine.detach()
    assert [value if value in (11.0, 22.0) else 0.0 for value in seen] == [11, 11, 22, 22, 22, 0, 0]
    assert [active.steps for active in engine.state().active] == []


def test_a_stop_inside_an_inference_ends_later_steps_too(policy: OpenVLAPolicy) -> None:
    direction = neuron_direction(policy, neurons=[(1, 5)], alpha=77.0)
    observation = fabricate.make_observation(policy)
    with OfflineSteering(policy, [direction]) as steering:
        seen = _inputs_of_down_proj(policy, 1, 5)
        steering.set({"up": 1.0}, steps=(3, 7))
        stopped = policy.towers[TOWER].residual_sites[0]
        calls: list[int] = []

        def stop(*args: object) -> None:
            calls.append(1)
            if len(calls) == 2:
                steering.engine.clear_now()

        handle = stopped.register_forward_hook(stop)  # type: ignore[attr-defined]
        _, record = steering.run(lambda: policy.logits(observation))
        handle.remove()
    assert 77.0 not in seen
    assert record.interrupted


def test_a_compiled_tower_counts_the_steps_it_wrote_in(policy: OpenVLAPolicy) -> None:
    direction = neuron_direction(policy, neurons=[(1, 5), (1, 9)], alpha=77.0)
    eager, expected = _run(policy, direction, (2, 5))
    with OfflineSteering(policy, [direction]) as steering:
        policy.model.language_model.model.compile(backend="eager")
        steering.set({"up": 1.0}, steps=(2, 5))
        compiled, record = steering.run(lambda: policy.logits(fabricate.make_observation(policy)))
    torch.testing.assert_close(compiled, eager)
    assert [(s.layer, s.neurons, s.forwards, s.writes) for s in record.sites] == [
        (s.layer, s.neurons, s.forwards, s.writes) for s in expected.sites
    ]


@pytest.mark.parametrize("steps", [(0, 8), (3, 3), (-1, 2), (0.0, 2), "ab", (1, 2, 3), (True, 2)])
def test_unusable_steps_are_refused(policy: OpenVLAPolicy, steps: object) -> None:
    time = Time()
    engine = SteeringEngine(policy, [neuron_direction(policy)], clock=time.steady, wall_ns=time.wall_ns)
    verdict = engine.apply(Sender(time).set("up", 1.0, steps=steps))
    assert (verdict.accepted, verdict.code) == (False, "bad_steps")
    assert engine.state().active == ()


def test_steps_of_a_tower_that_does_not_denoise_are_refused() -> None:
    policy = fabricate.tiny_policy()
    time = Time()
    engine = SteeringEngine(policy, [neuron_direction(policy)], clock=time.steady, wall_ns=time.wall_ns)
    verdict = engine.apply(Sender(time).set("up", 1.0, steps=(0, 3)))
    assert (verdict.accepted, verdict.code) == (False, "bad_steps")
    assert "tower 'lm', which has no denoising steps: the policy has none" in verdict.sentence
    assert engine.state().active == ()


class _DeadEnd:
    """The tiny policy with a tower that says its last layer reaches nothing."""

    def __init__(self, policy: OpenVLAPolicy) -> None:
        tower = policy.towers[TOWER]
        self.__dict__.update(vars(policy), model_hash=policy.model_hash)
        self.announce_roles_to = policy.announce_roles_to
        self.towers = {
            TOWER: dataclasses.replace(tower, last_steerable=tower.layers - 2, why_dead="only keys and values leave it")
        }


def test_a_direction_of_a_dead_layer_is_refused_with_the_reason() -> None:
    policy = _DeadEnd(fabricate.tiny_policy())
    for made in (
        lambda sites: neuron_direction(policy, neurons=[(site, 3) for site in sites]),  # type: ignore[arg-type]
        lambda sites: dense_direction(policy, sites=[site + 1 for site in sites]),  # type: ignore[arg-type]
    ):
        SteeringEngine(policy, [made([0, 1])])  # type: ignore[arg-type]
        with pytest.raises(SteerError, match="only keys and values leave it") as refused:
            SteeringEngine(policy, [made([1, 2])])  # type: ignore[arg-type]
        assert refused.value.code == "dead_layer"


def test_a_tower_without_dead_layers_takes_every_layer() -> None:
    policy = fabricate.tiny_policy()
    tower = policy.towers[TOWER]
    assert list(tower.steerable_layers) == list(range(tower.layers))
    assert list(tower.steerable_sites) == list(range(tower.layers + 1))
    everywhere = Direction(
        "all",
        TOWER,
        policy.model_hash,
        tower.layers,
        tower.d_model,
        tower.d_ff,
        neurons=Neurons(np.arange(3, dtype=np.int32), np.zeros(3, np.int32), np.ones(3, np.float32)),
    )
    SteeringEngine(policy, [everywhere, dense_direction(policy, sites=range(tower.layers + 1))])
