"""`steer verify`: prove on the loaded policy that steering does what it says, and nothing else.

Invariant: every check compares tensors of real forwards on the policy as loaded; nothing is assumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from steer_runtime.directions.direction import Direction, Neurons
from steer_runtime.steering.engine import hooks_on
from steer_runtime.steering.offline import OfflineSteering
from steer_runtime.steering.seed import SEED_ALPHA, seed_override
from steer_runtime.types import Observation, Policy, Tower


class VerifiablePolicy(Policy, Protocol):
    """A policy that also shows its module and the logits of its decoding steps [steps, vocabulary]."""

    @property
    def model(self) -> nn.Module: ...

    def logits(self, observation: Observation) -> Tensor: ...


@dataclass(frozen=True)
class Check:
    """One promise: its name, whether it held, and the numbers behind that."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def verify(
    policy: VerifiablePolicy,
    observation: Observation,
    *,
    seed: int = 0,
    progress: Callable[[str], None] = lambda name: None,
) -> VerifyReport:
    """Run every check on one observation. `seed` chooses the neurons; `progress` hears each check's name."""
    return VerifyReport(tuple(_checks(policy, observation, np.random.default_rng(seed), progress)))


def _checks(
    policy: VerifiablePolicy, observation: Observation, rng: np.random.Generator, progress: Callable[[str], None]
) -> Iterator[Check]:
    tower = next(iter(policy.towers.values()))
    override = _random_override(policy, tower, rng)
    progress("unsteered reference")
    weights_before = weights_hash(policy.model)
    hooks_before = hooks_on(policy.model)
    unsteered = policy.logits(observation)

    def forward() -> Tensor:
        return policy.logits(observation)

    with OfflineSteering(policy, [override]) as steering:
        progress("hooks fire")
        off, record = steering.run(forward)
        yield Check(
            "hooks fire",
            record.firings == record.expected_firings > 0,
            f"{record.firings} of {record.expected_firings} calls: {tower.layers} down_proj and {tower.layers + 1} "
            f"residual sites, {tower.firings_per_inference} forwards each",
        )
        yield Check("off is bit-identical", torch.equal(unsteered, off), _difference(unsteered, off))

        progress("the seed's override")
        steering.set({override.name: 1.0})
        steered, written = steering.run(forward)
        steering.set({})
        cleared, _ = steering.run(forward)

    with seed_override(tower, override):
        reference = policy.logits(observation)
    yield Check(
        "the seed's override, bit for bit",
        torch.equal(steered, reference) and not torch.equal(steered, unsteered),
        f"{_difference(reference, steered)} against the seed's hook, {_difference(unsteered, steered)} against unsteered",
    )
    expected = len(override.neurons or ()) * sum(count for _, count in written.tokens)
    writes = sum(site.writes for site in written.sites)
    yield Check("the trace counts every write", writes == expected, f"{writes} of {expected} values")
    yield Check("clearing is exact", torch.equal(unsteered, cleared), _difference(unsteered, cleared))

    progress("detaching")
    after = policy.logits(observation)
    hooks_left = hooks_on(policy.model) - hooks_before
    same_weights = weights_hash(policy.model) == weights_before
    yield Check(
        "detaching restores everything",
        hooks_left == 0 and same_weights and torch.equal(unsteered, after),
        f"{hooks_left} hooks left, weights {'unchanged' if same_weights else 'CHANGED'}, {_difference(unsteered, after)}",
    )


def weights_hash(module: nn.Module) -> str:
    """sha256 hex over names and bytes of all parameters and buffers of a module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _random_override(policy: Policy, tower: Tower, rng: np.random.Generator) -> Direction:
    """Twenty random neurons of the tower at the seed's alpha, in the form of a seed cluster."""
    count = min(20, tower.layers * tower.d_ff)
    flat = np.sort(rng.choice(tower.layers * tower.d_ff, count, replace=False))
    return Direction(
        name="verify-random",
        tower=tower.name,
        model_hash=policy.model_hash,
        layers=tower.layers,
        d_model=tower.d_model,
        d_ff=tower.d_ff,
        neurons=Neurons(
            (flat // tower.d_ff).astype(np.int32),
            (flat % tower.d_ff).astype(np.int32),
            np.full(count, SEED_ALPHA, np.float32),
        ),
    )


def _difference(a: Tensor, b: Tensor) -> str:
    return f"largest difference {float((a - b).abs().max()):.3g}"
