"""What a trace says an inference ran under is enough to run it again, bit for bit."""

from __future__ import annotations

import fabricate
import fabricate_pi0
import pytest
import torch

from steer_runtime.directions.direction import Axis
from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.steering.engine import SteeringEngine
from steer_runtime.steering.offline import OfflineSteering
from steer_runtime.types import Observation
from steering.subjects import Sender, Time, dense_direction, neuron_direction


def subjects(policy: OpenVLAPolicy):
    """Two directions that share a neuron, one that adds a vector, and an axis over them."""
    slow = neuron_direction(policy, "slow", ((0, 3), (1, 5)), -3.0, max_strength=0.8)
    fast = neuron_direction(policy, "fast", ((0, 3), (2, 7)), 5.0)
    return (slow, fast, dense_direction(policy)), (Axis("speed", negative="slow", positive="fast"),)


def test_a_ramp_caught_half_way_is_restored_to_the_bit() -> None:
    policy, observation = fabricate.tiny_policy(), fabricate.make_observation()
    directions, axes = subjects(policy)
    time = Time()
    engine = SteeringEngine(policy, directions, axes, clock=time.steady, wall_ns=time.wall_ns)
    engine.attach()
    sender = Sender(time)
    for command in (
        sender.set("drift", 0.9, ramp_s=3.0, span=frozenset({"text", "action"})),
        sender.set("speed", -1.0, ramp_s=1.7),
        sender.set("fast", 0.3, ramp_s=0.9, priority=2),
    ):
        assert engine.apply(command).accepted
    recorded = []
    for _ in range(4):
        time.now_s += 0.31
        engine.latch()
        logits = policy.logits(observation)
        recorded.append((engine.finish().applied, logits))
    engine.detach()
    assert [target.target for target in recorded[0][0]] == ["drift", "speed", "fast"]
    assert recorded[0][0][1].strength < 0
    assert len({tuple(t.strength for t in applied) for applied, _ in recorded}) == 4

    with OfflineSteering(policy, directions, axes) as steering:
        for applied, logits in reversed(recorded):
            steering.restore(applied)
            again, record = steering.run(lambda: policy.logits(observation))
            assert torch.equal(again, logits)
            assert [(t.target, t.strength, t.span) for t in record.applied] == [
                (t.target, t.strength, t.span) for t in applied
            ]
        assert not torch.equal(recorded[0][1], recorded[3][1])


def test_denoising_steps_and_noise_are_restored() -> None:
    policy = fabricate_pi0.tiny_policy()
    observation: Observation = fabricate_pi0.make_observation()
    direction = fabricate_pi0.neuron_direction(policy, "expert", name="push")
    time = Time()
    engine = SteeringEngine(policy, (direction,), clock=time.steady, wall_ns=time.wall_ns)
    engine.attach()
    assert engine.apply(Sender(time).set("push", 0.7, steps=(0, 1), ramp_s=0.0)).accepted
    time.now_s += 1.0
    policy.reset()
    policy.infer(observation)
    memory = policy.memory()
    engine.latch()
    actions = policy.infer(observation).actions
    applied = engine.finish().applied
    engine.detach()
    assert applied[0].steps == (0, 1)
    with OfflineSteering(policy, (direction,)) as steering:
        policy.remember(memory)
        steering.restore(applied)
        again, _ = steering.run(lambda: policy.infer(observation).actions)
        policy.remember(memory)
        steering.restore(())
        unsteered, _ = steering.run(lambda: policy.infer(observation).actions)
    assert again.tobytes() == actions.tobytes()
    assert unsteered.tobytes() != actions.tobytes()


def test_another_direction_of_the_same_name_is_refused() -> None:
    policy = fabricate.tiny_policy()
    directions, axes = subjects(policy)
    with OfflineSteering(policy, directions, axes) as steering:
        steering.set({"slow": 0.5})
        _, record = steering.run(lambda: policy.logits(fabricate.make_observation()))
    other = neuron_direction(policy, "slow", ((0, 3), (1, 5)), -2.0)
    changed = OfflineSteering(policy, (other, *directions[1:]), axes)
    with changed, pytest.raises(SteerError, match="load the same directions"):
        changed.restore(record.applied)


def test_a_memory_of_another_policy_is_refused() -> None:
    with pytest.raises(SteerError, match="expected gripper, said"):
        fabricate.tiny_policy().remember(fabricate_pi0.tiny_policy().memory())
