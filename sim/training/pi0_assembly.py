"""A pocket Pi0 around a trained pocket OpenVLA: its language model becomes the prefix, its eyes stay, the expert is new.

Invariant: the prefix computes what the OpenVLA computed of the same tokens, in a Gemma's shell (`pi0.shell`), up to the
rounding of the type that the checkpoint is written in; and it is trained on as it is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sim.training.settings import ExpertTraining
from steer_runtime.errors import SteerError
from steer_runtime.policies.base import EMBEDDING, layer_tensors, read_base
from steer_runtime.policies.objects.proprioception import STATE_SIZE
from steer_runtime.policies.openvla.config import OpenVLAConfig
from steer_runtime.policies.openvla.model import OpenVLAModel
from steer_runtime.policies.pi0.checkpoint import save_checkpoint
from steer_runtime.policies.pi0.config import GemmaSize, ObjectSight, Pi0Config
from steer_runtime.policies.pi0.layout import of_base
from steer_runtime.policies.pi0.network import Pi0Network
from steer_runtime.policies.pi0.shell import in_shell

STORED = torch.bfloat16
SHARD_BYTES = 40_000_000
"""Files of a shipped checkpoint stay under 45 MB."""
ACTION = 7
_EYES = ("heatmap.", "projector.", "state_encoder.")
_DECODER = "language_model.model."


def around(source: OpenVLAModel, settings: ExpertTraining) -> Pi0Network:
    """The network, float32: prefix from `source`, rounded to STORED; expert and heads random from the seed.

    Raises SteerError('other_checkpoint') for a policy that does not see objects and know their names.
    """
    theirs = source.config
    if theirs.heatmap is None or not theirs.names:
        raise SteerError(
            "other_checkpoint", f"prefix {theirs.name!r} is no pocket OpenVLA: give one of `steer train policy`"
        )
    config = _config(theirs, settings)
    network = Pi0Network(config)
    torch.manual_seed(settings.seed)
    _draw(network)
    ours = dict(network.named_parameters())
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            value = parameter.detach().float()
            if name == f"{_DECODER}embed_tokens.weight":
                value = value[: config.vocab]
            if name.startswith(_DECODER):
                ours[of_base(name)].copy_(in_shell(name, value).to(STORED))
            elif name.startswith(_EYES):
                ours[f"objects.{name}"].copy_(value.to(STORED))
    network.restore_buffers("cpu")
    return network


def _config(theirs: OpenVLAConfig, settings: ExpertTraining) -> Pi0Config:
    assert theirs.heatmap is not None
    lm = theirs.lm
    shared = {"layers": lm.layers, "heads": lm.heads, "kv_heads": lm.kv_heads, "head_dim": lm.d_model // lm.heads}
    shell = {**shared, "activation": "silu", "rms_norm_eps": lm.rms_norm_eps}
    return Pi0Config(
        prefix=GemmaSize(lm.d_model, lm.d_ff, **shell),  # type: ignore[arg-type]
        expert=GemmaSize(settings.width, settings.neurons, **shell),  # type: ignore[arg-type]
        vision=None,
        objects=ObjectSight(theirs.heatmap, theirs.image_size, theirs.names, theirs.state_tokens, theirs.prompt),
        # The rows of action tokens stay behind: nothing here says them.
        vocab=theirs.usable_vocab - theirs.n_bins,
        rope_theta=lm.rope_theta,
        bos_token_id=lm.bos_token_id,
        chunk=settings.chunk,
        state_dim=STATE_SIZE,
        action_dim=ACTION,
        euler_steps=settings.euler_steps,
        max_prompt_tokens=theirs.max_prompt_tokens,
        max_cameras=2,
        base=theirs.base,
        name=settings.name,
    )


@torch.no_grad()
def _draw(network: Pi0Network) -> None:
    """Variance-preserving matrices (std fan_in**-0.5), norms that do nothing, no biases; the flow begins at zero."""
    for name, parameter in network.pi0.named_parameters():
        if parameter.ndim == 1:
            parameter.zero_()
        elif not name.startswith("model.vlm."):
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    network.pi0.action_out_proj.weight.zero_()


def learns(network: Pi0Network) -> dict[str, nn.Parameter]:
    """Name -> parameter of what is trained: the expert and what leads into and out of it."""
    beginnings = ("pi0.model.dit.", "pi0.embed_action_time.", "pi0.action_out_proj.")
    return {name: p for name, p in network.named_parameters() if name.startswith(beginnings)}


def write_pi0(
    network: Pi0Network,
    directory: Path,
    statistics: Mapping[str, Any],
    card: Mapping[str, Any],
    *,
    tokenizer: Any = None,
) -> Path:
    """Write a trained network with card.json; what equals the base file is left to it. Raises SteerError('exists')."""
    network.to(STORED)
    config, base = network.config, network.config.base
    if base is not None:
        parameters = dict(network.named_parameters())
        everything = replace(base, tensors=tuple(layer_tensors(len(base.layers))))
        equal = tuple(
            name
            for name, value in read_base(everything, config.prefix.heads, config.prefix.kv_heads)
            if name != EMBEDDING and torch.equal(parameters[of_base(name)].data, in_shell(name, value).to(STORED))
        )
        network.config = replace(config, base=replace(base, tensors=equal))

    def finish(work: Path) -> None:
        (work / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")

    return save_checkpoint(network, directory, statistics, tokenizer=tokenizer, shard_bytes=SHARD_BYTES, finish=finish)
