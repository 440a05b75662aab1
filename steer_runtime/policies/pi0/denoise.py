"""From noise to actions: the prefix once, then Euler steps over its kept keys and values.

    x_1 = noise,  x_{t - dt} = x_t - dt v(x_t, t),  dt = 1 / steps                    (Black et al. 2024, arXiv 2410.24164)

Invariant: the same numbers as transformers' `sample_actions` for the same noise; every forward is announced before it
runs; between two steps it can be stopped, and nothing is left behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from steer_runtime.errors import SteerError
from steer_runtime.policies.pi0.config import Pi0Config
from steer_runtime.policies.pi0.network import Inputs, Pi0Network
from steer_runtime.types import Role

PREFIX = "prefix"
EXPERT = "expert"
STAGES = ("vision", "prefix", "denoise")
"""What is timed inside `denoise`."""

Announce = Callable[[str, list[Role]], None]


@dataclass(frozen=True)
class Denoised:
    """actions float32 [B, chunk, action_dim], normalised and padded; seconds: stage -> how long it took."""

    actions: Tensor
    seconds: Mapping[str, float]


def denoise(
    network: Pi0Network,
    inputs: Inputs,
    noise: Tensor,
    *,
    steps: int,
    announce: Announce | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.perf_counter,
) -> Denoised:
    """Actions of one inference; noise float32 [B, chunk, action_dim].

    announce: told (tower, role of each token) before each forward. cancelled: asked between two forwards.
    Raises SteerError: 'not_finite' for noise or state that is not, 'bad_noise' for another shape, 'ragged_batch' when
    roles are announced for samples whose tokens differ in role, 'cancelled'.
    """
    config = network.config
    _check(inputs, noise, (len(inputs.ids), config.chunk, config.action_dim))
    started = clock()
    embeddings = network.embed_prefix(inputs)
    seen = clock()
    if announce is not None:
        announce(PREFIX, prefix_roles(inputs, config))
    prefix = network.read_prefix(embeddings, inputs.mask)
    read = clock()
    actions, dt = noise.float(), -1.0 / steps
    roles: list[Role] = ["state", *["action"] * config.chunk]  # type: ignore[list-item]
    for step in range(steps):
        if cancelled():
            raise SteerError("cancelled", f"the inference was stopped before step {step} of {steps}")
        at = torch.full((len(actions),), 1.0 + step * dt, dtype=torch.float32, device=actions.device)
        if announce is not None:
            announce(EXPERT, roles)
        actions = actions + dt * network.velocity(prefix, inputs.state, actions, at)
    done = clock()
    return Denoised(actions, dict(zip(STAGES, (seen - started, read - seen, done - read), strict=True)))


def prefix_roles(inputs: Inputs, config: Pi0Config) -> list[Role]:
    """Role of each prefix token; padding counts as text, and nobody attends to it. Raises SteerError('ragged_batch')."""
    image = inputs.ids == config.image_token_id
    if len(image) > 1 and not bool((image == image[:1]).all()):
        raise SteerError(
            "ragged_batch", "samples with different cameras cannot be steered in one batch: run them one by one"
        )
    names: dict[int, Role] = {config.image_token_id: "image", config.state_token_id: "state"}
    return [names.get(token, "text") for token in inputs.ids[0].tolist()]


def _check(inputs: Inputs, noise: Tensor, shape: tuple[int, int, int]) -> None:
    if tuple(noise.shape) != shape:
        raise SteerError(
            "bad_noise", f"the noise is {list(noise.shape)}: expected {list(shape)} (batch, chunk, action)"
        )
    for label, values in (("noise", noise), ("state", inputs.state)):
        if not bool(torch.isfinite(values).all()):
            raise SteerError("not_finite", f"the {label} holds NaN or infinite values: the inference is refused")
