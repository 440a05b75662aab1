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
    """A policy that also shows its module and what it computes last, unrounded: the logits of decoding steps
    [steps, vocabulary], or of a flow policy the normalised actions [chunk, dims]."""

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
    towers = list(policy.towers.values())
    overrides = [_random_override(policy, tower, rng, tower.steerable_layers) for tower in towers]
    progress("unsteered reference")
    weights_before = weights_hash(policy.model)
    hooks_before = hooks_on(policy.model)
    unsteered = policy.logits(observation)

    with OfflineSteering(policy, overrides) as steering:
        progress("hooks fire")
        off, record = steering.run(lambda: policy.logits(observation))
        counted = ", ".join(
            f"{'' if len(towers) == 1 else f'{tower.name} '}{tower.layers} down_proj and {tower.layers + 1} residual sites, {tower.firings_per_inference} forwards each"
            for tower in towers
        )
        yield Check(
            "hooks fire",
            record.firings == record.expected_firings > 0,
            f"{record.firings} of {record.expected_firings} calls: {counted}",
        )
        yield Check("off is bit-identical", torch.equal(unsteered, off), _difference(unsteered, off))

    for tower, override in zip(towers, overrides, strict=True):
        of_tower = "" if len(towers) == 1 else f" ({tower.name})"
        progress(f"the seed's override{of_tower}")
        yield from _override_checks(policy, observation, tower, override, unsteered, of_tower)

    progress("detaching")
    after = policy.logits(observation)
    hooks_left = hooks_on(policy.model) - hooks_before
    same_weights = weights_hash(policy.model) == weights_before
    yield Check(
        "detaching restores everything",
        hooks_left == 0 and same_weights and torch.equal(unsteered, after),
        f"{hooks_left} hooks left, weights {'unchanged' if same_weights else 'CHANGED'}, {_difference(unsteered, after)}",
    )


def _override_checks(
    policy: VerifiablePolicy,
    observation: Observation,
    tower: Tower,
    override: Direction,
    unsteered: Tensor,
    of_tower: str,
) -> Iterator[Check]:
    with OfflineSteering(policy, [override]) as steering:
        steering.set({override.name: 1.0})
        steered, written = steering.run(lambda: policy.logits(observation))
        steering.set({})
        cleared, _ = steering.run(lambda: policy.logits(observation))
    with seed_override(tower, override):
        reference = policy.logits(observation)
    yield Check(
        f"the seed's override, bit for bit{of_tower}",
        torch.equal(steered, reference) and not torch.equal(steered, unsteered),
        f"{_difference(reference, steered)} against the seed's hook, {_difference(unsteered, steered)} against unsteered",
    )
    expected = len(override.neurons or ()) * dict(written.tower_tokens)[tower.name]
    writes = sum(site.writes for site in written.sites)
    yield Check(f"the trace counts every write{of_tower}", writes == expected, f"{writes} of {expected} values")
    yield Check(f"clearing is exact{of_tower}", torch.equal(unsteered, cleared), _difference(unsteered, cleared))
    dead = range(tower.steerable_layers.stop, tower.layers)
    if dead:
        with seed_override(tower, _random_override(policy, tower, np.random.default_rng(0), dead)):
            still = policy.logits(observation)
        yield Check(
            f"layers that are refused reach nothing{of_tower}",
            torch.equal(unsteered, still),
            f"layers {dead.start} to {dead.stop - 1} overridden all the same: {_difference(unsteered, still)}",
        )


def weights_hash(module: nn.Module) -> str:
    """sha256 hex over names and bytes of all parameters and buffers of a module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _random_override(policy: Policy, tower: Tower, rng: np.random.Generator, layers: range) -> Direction:
    """Twenty random neurons of these layers at the seed's alpha, in the form of a seed cluster."""
    count = min(20, len(layers) * tower.d_ff)
    flat = layers.start * tower.d_ff + np.sort(rng.choice(len(layers) * tower.d_ff, count, replace=False))
    return Direction(
        name=f"verify-random-{tower.name}",
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
