"""`verify` passes on a sound policy and fails when a promise is broken."""

from __future__ import annotations

import fabricate
import pytest
import torch
from torch import nn

from steer_runtime.errors import SteerError
from steer_runtime.verify import verify


def test_every_check_passes_on_the_tiny_policy() -> None:
    policy = fabricate.tiny_policy()
    report = verify(policy, fabricate.make_observation(policy))
    assert [(check.name, check.passed) for check in report.checks] == [
        ("hooks fire", True),
        ("off is bit-identical", True),
        ("the seed's override, bit for bit", True),
        ("the trace counts every write", True),
        ("clearing is exact", True),
        ("detaching restores everything", True),
    ]


def test_a_policy_that_is_not_deterministic_fails() -> None:
    policy = fabricate.tiny_policy()
    policy.model.projector.register_forward_hook(lambda m, args, output: output + 0.1 * torch.randn_like(output))
    failed = {check.name for check in verify(policy, fabricate.make_observation(policy)).checks if not check.passed}
    assert "off is bit-identical" in failed


def test_hooks_that_are_bypassed_are_found() -> None:
    policy = fabricate.tiny_policy()
    mlp = policy.model.language_model.model.layers[1].mlp
    down = mlp.down_proj

    def fused(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), down.weight)

    mlp.forward = fused
    with pytest.raises(SteerError, match="hook calls happened"):
        verify(policy, fabricate.make_observation(policy))
