"""Small random Pi0s of the real architecture and the full key layout, for tests of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import fabricate
import numpy as np
import torch

from steer_runtime.directions.direction import Direction, Neurons, Operation
from steer_runtime.policies.objects.config import HeatmapConfig
from steer_runtime.policies.objects.proprioception import STATE_SIZE
from steer_runtime.policies.pi0.checkpoint import save_checkpoint
from steer_runtime.policies.pi0.config import GemmaSize, ObjectSight, Pi0Config, SiglipSize
from steer_runtime.policies.pi0.network import Pi0Network
from steer_runtime.policies.pi0.policy import Pi0Policy
from steer_runtime.policies.pi0.statistics import Normal, Pi0Statistics
from steer_runtime.types import ALL_ROLES, Observation, Role

NORM_STATS = {
    "norm_stats": {
        "state": {"mean": [0.1] * 8, "std": [0.5] * 8},
        "actions": {"mean": [0.0, 0.1, -0.1, 0.0, 0.0, 0.0, 0.2], "std": [0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 1.0]},
    }
}


def tiny_config(**changes: object) -> Pi0Config:
    """Prefix d_model 32, expert 16, 3 layers, 4 patches a camera, chunks of 6 in 4 steps; state and action padded to 9."""
    values: dict[str, object] = {
        "prefix": GemmaSize(d_model=32, d_ff=64, layers=3, heads=4, kv_heads=2, head_dim=8),
        "expert": GemmaSize(d_model=16, d_ff=48, layers=3, heads=4, kv_heads=2, head_dim=8),
        "vision": SiglipSize(hidden=24, mlp=40, layers=2, heads=2, image=28),
        "vocab": 384,
        "bos_token_id": 1,
        "chunk": 6,
        "state_dim": 9,
        "action_dim": 9,
        "euler_steps": 4,
        "trained": False,
        "name": "tiny-pi0",
    }
    return Pi0Config(**{**values, **changes})  # type: ignore[arg-type]


def _ids(words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    tokenizer = fabricate.tiny_tokenizer()
    return tuple(tuple(tokenizer.encode(word, add_special_tokens=False)) for word in words)


def object_config(**changes: object) -> Pi0Config:
    """`tiny_config` that sees three objects with two cameras of 64 pixels and feels with two tokens."""
    heat = HeatmapConfig(classes=("soup", "basket", "object"), hidden=64, blocks=1, heads=2)
    sight = ObjectSight(heat, 64, names=_ids(heat.classes), state_tokens=2)
    values: dict[str, object] = {
        "vision": None,
        "objects": sight,
        "max_cameras": 2,
        "state_dim": STATE_SIZE,
        "action_dim": 7,
    }
    return tiny_config(**{**values, **changes})


def object_policy(**options: object) -> Pi0Policy:
    """A random Pi0 that sees objects."""
    statistics = Pi0Statistics(
        Normal((0.1,) * STATE_SIZE, (0.5,) * STATE_SIZE), tiny_statistics().action, 1e-6, 1e-6, "test"
    )
    return Pi0Policy(tiny_network(object_config()), fabricate.tiny_tokenizer(), statistics, **options)  # type: ignore[arg-type]


def tiny_network(config: Pi0Config | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Pi0Network:
    """Random weights of variance-preserving size, so that every parameter matters to the action."""
    network = Pi0Network(config or tiny_config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                siglip = "layer_norm" in name or ("layernorm" in name and "vision" in name)
                parameter.copy_(0.1 * noise + (1.0 if siglip and name.endswith("weight") else 0.0))
            else:
                fan_in = parameter[0].numel() if parameter.ndim == 4 else parameter.shape[-1]
                parameter.copy_(noise * fan_in**-0.5)
    network.to(dtype)
    network.restore_buffers("cpu")
    return network.requires_grad_(False).eval()


def tiny_statistics() -> Pi0Statistics:
    table = NORM_STATS["norm_stats"]
    state, action = (Normal(tuple(table[k]["mean"]), tuple(table[k]["std"])) for k in ("state", "actions"))
    return Pi0Statistics(state, action, 1e-6, 1e-6, "test statistics")


def tiny_policy(config: Pi0Config | None = None, *, seed: int = 0, **options: object) -> Pi0Policy:
    """A random Pi0 with real vision, tokenizer and denoising."""
    return Pi0Policy(tiny_network(config, seed=seed), fabricate.tiny_tokenizer(), tiny_statistics(), **options)  # type: ignore[arg-type]


def save_tiny(
    directory: Path,
    *,
    network: Pi0Network | None = None,
    shard_bytes: int = 4 << 30,
    statistics: Mapping[str, object] = NORM_STATS,
) -> Path:
    """A checkpoint directory in LeRobot's layout, with openpi's statistics and a tokenizer."""
    return save_checkpoint(
        network or tiny_network(), directory, statistics, tokenizer=fabricate.tiny_tokenizer(), shard_bytes=shard_bytes
    )


def make_observation(
    *,
    instruction: str = "pick up the soup and place it in the basket",
    seed: int = 0,
    value: int | None = None,
    frame_id: int = 0,
    size: tuple[int, int] = (40, 52),
) -> Observation:
    """Two cameras of their own pictures, or of one grey value; a state of 8."""
    rng = np.random.default_rng(seed)
    images = {
        name: rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        if value is None
        else np.full((*size, 3), value, np.uint8)
        for name in ("agentview", "wrist")
    }
    state = np.array([0.3, -0.2, 0.5, 3.1, 0.1, 0.0, 0.04, -0.04])
    return Observation(images, state, instruction, stamp_ns=1_000_000 * (frame_id + 1), frame_id=frame_id)


def neuron_direction(
    policy: Pi0Policy,
    tower: str,
    neurons: Sequence[tuple[int, int]] = ((0, 3), (1, 5), (1, 9)),
    alpha: float = 4.0,
    *,
    name: str = "up",
    op: Operation = "override",
    span: frozenset[Role] = ALL_ROLES,
) -> Direction:
    """Neurons of one tower, all at one alpha."""
    of = policy.towers[tower]
    return Direction(
        name=name,
        tower=tower,
        model_hash=policy.model_hash,
        layers=of.layers,
        d_model=of.d_model,
        d_ff=of.d_ff,
        op=op,
        span=span,
        neurons=Neurons(
            np.array([layer for layer, _ in neurons], np.int32),
            np.array([neuron for _, neuron in neurons], np.int32),
            np.full(len(neurons), alpha, np.float32),
        ),
    )


def dense_direction(
    policy: Pi0Policy,
    tower: str,
    sites: Sequence[int] = (0, 2),
    *,
    name: str = "drift",
    span: frozenset[Role] = ALL_ROLES,
) -> Direction:
    """A random vector at each of the residual sites of one tower."""
    of = policy.towers[tower]
    rng = np.random.default_rng(0)
    return Direction(
        name=name,
        tower=tower,
        model_hash=policy.model_hash,
        layers=of.layers,
        d_model=of.d_model,
        d_ff=of.d_ff,
        op="add",
        span=span,
        dense={site: rng.normal(size=of.d_model).astype(np.float32) for site in sites},
    )
