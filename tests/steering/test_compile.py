"""Steering inside a compiled graph: same result, no recompilation, whatever changes."""

from __future__ import annotations

from collections.abc import Iterator

import fabricate
import pytest
import torch
from torch import Tensor

from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.steering.engine import SteeringEngine
from steering.subjects import Sender, Time, dense_direction, neuron_direction

TOKENS = 9


@pytest.fixture
def policy() -> Iterator[OpenVLAPolicy]:
    torch._dynamo.reset()
    yield fabricate.tiny_policy()
    torch._dynamo.reset()


def embeddings() -> Tensor:
    return torch.randn(1, TOKENS, 32, generator=torch.Generator().manual_seed(0))


def test_strengths_directions_and_spans_change_without_recompiling(policy: OpenVLAPolicy) -> None:
    time = Time()
    directions = [
        neuron_direction(policy, "up"),
        neuron_direction(policy, "slow", [(0, 3), (2, 1)], -3.0, op="add", span=frozenset({"image"})),
        neuron_direction(policy, "calm", [(1, 7)], 0.5, op="clamp", low=-0.5),
        dense_direction(policy),
    ]
    engine = SteeringEngine(policy, directions, clock=time.steady, wall_ns=time.wall_ns)
    sender = Sender(time)
    roles = ["text", *["image"] * 4, *["text"] * 4]
    x = embeddings()
    with torch.inference_mode():
        unsteered = policy.model.step(x, None)
        engine.attach()
        compiled = torch.compile(lambda e: policy.model.step(e, None), fullgraph=True)

        def run() -> tuple[Tensor, Tensor]:
            engine.latch()
            engine.set_roles("lm", roles)
            steered = compiled(x)
            engine.set_roles("lm", roles)
            return steered, policy.model.step(x, None)

        off, _ = run()
        compiled_off = off.clone()
        torch.testing.assert_close(compiled_off, unsteered, rtol=1e-4, atol=1e-4)
        seen = set()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step in range(40):
                target = directions[step % 4].name
                span = (None, frozenset({"image", "text"}), frozenset({"image"}))[step % 3]
                engine.apply(sender.set(target, (step % 5) / 4, span=span))
                if step % 9 == 8:
                    engine.apply(sender.clear_all())
                time.now_s += 0.3
                steered, eager = run()
                torch.testing.assert_close(steered, eager, rtol=2e-4, atol=2e-4)
                seen.add(round(float(steered.sum()), 3))
        engine.apply(sender.clear_all())
        off_again, _ = run()
        assert torch.equal(off_again, compiled_off)
    assert len(seen) > 20


def test_hooks_in_a_compiled_graph_are_counted(policy: OpenVLAPolicy) -> None:
    engine = SteeringEngine(policy, [neuron_direction(policy)])
    with torch.inference_mode():
        engine.attach()
        compiled = torch.compile(lambda e: policy.model.step(e, None), fullgraph=True)
        x = embeddings()
        for _ in range(2):
            engine.latch()
            for _ in range(7):
                engine.set_roles("lm", ["text"] * TOKENS)
                compiled(x)
            record = engine.finish()
    assert record.firings == record.expected_firings == 49
