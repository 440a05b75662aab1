"""Names and shapes of the published OpenVLA tensors, and where each goes in our module.

Invariant: one table serves loading, saving and checking, so they cannot disagree.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from steer_runtime.policies.base import EMBEDDING, BaseConfig
from steer_runtime.policies.objects.heatmap import HeatmapTower
from steer_runtime.policies.objects.proprioception import StateEncoder
from steer_runtime.policies.objects.tokens import ObjectProjector
from steer_runtime.policies.openvla.config import OpenVLAConfig, ViTConfig


@dataclass(frozen=True)
class Target:
    """Where one cut of a published tensor goes.

    The tensor's rows [start, stop) (to the end when stop is None) are reshaped to, and fill, the part of `parameter`
    that begins at `offset` along `dim`.
    """

    parameter: str
    start: int = 0
    stop: int | None = None
    dim: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Entry:
    """One published tensor. targets is empty for tensors that never reach an action (last blocks, pooling heads)."""

    key: str
    shape: tuple[int, ...]
    targets: tuple[Target, ...]

    @property
    def used(self) -> bool:
        return bool(self.targets)


NOT_PERSISTENT = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|mask_token|rope\.freqs)$")
"""Derived entries that some exports carry; they are reported and not read."""


OWN_ROWS = "language_model.model.embed_tokens.own_rows"
"""Rows of the embedding that a base file does not have: action tokens and padding."""


def entries(config: OpenVLAConfig) -> list[Entry]:
    """Every tensor of the published layout for this configuration, in the published order.

    What the published model does not have (the small vision tower, its projector, the state encoder, action queries)
    follows its own module's names.
    """
    return [*vision_entries(config), *_projector(config), *_state(config), *_queries(config), *_llama(config)]


def vision_entries(config: OpenVLAConfig) -> list[Entry]:
    """The part of the table that is the vision tower's."""
    if config.heatmap is not None:
        with torch.device("meta"):
            tower = HeatmapTower(config.heatmap, config.image_size)
        return _module(tower, "vision_backbone.heatmap", "heatmap")
    dino, siglip = config.vits
    patch_shape = (3, config.patch, config.patch)
    return [*_dino(dino, config.patches, patch_shape), *_siglip(siglip, config.patches, patch_shape)]


def zero_filled(config: OpenVLAConfig) -> list[str]:
    """Parameters of ours that the published layout has no tensor for, filled with zeros before loading.

    DINOv2's position embedding has no CLS row in the published towers (timm `no_embed_class`), transformers' has one:
    it stays zero. The mask token is used in pretraining only.
    """
    if config.dino is None:
        return []
    return ["dino.embeddings.mask_token", "dino.embeddings.position_embeddings"]


def _module(module: nn.Module, key: str, parameter: str) -> list[Entry]:
    """One tensor a parameter of a module of ours, under its own name."""
    return [_one(f"{key}.{n}", tuple(p.shape), f"{parameter}.{n}") for n, p in module.named_parameters()]


def _one(key: str, shape: tuple[int, ...], parameter: str | None) -> Entry:
    return Entry(key, shape, (Target(parameter),) if parameter else ())


def _qkv(key: str, width: int, shape: tuple[int, ...], names: tuple[str, str, str] | None, suffix: str) -> Entry:
    targets = (
        tuple(Target(f"{name}.{suffix}", i * width, (i + 1) * width) for i, name in enumerate(names)) if names else ()
    )
    return Entry(f"{key}.{suffix}", shape, targets)


def _affine(key: str, out: int, shape: tuple[int, ...], parameter: str | None) -> list[Entry]:
    """Weight and bias of one layer."""
    return [
        _one(f"{key}.weight", shape, f"{parameter}.weight" if parameter else None),
        _one(f"{key}.bias", (out,), f"{parameter}.bias" if parameter else None),
    ]


def _dino(vit: ViTConfig, patches: int, patch_shape: tuple[int, ...]) -> list[Entry]:
    d, root = vit.hidden, "vision_backbone.featurizer"
    table = [
        _one(f"{root}.cls_token", (1, 1, d), "dino.embeddings.cls_token"),
        _one(f"{root}.reg_token", (1, vit.registers, d), "dino.embeddings.register_tokens"),
        Entry(
            f"{root}.pos_embed",
            (1, patches, d),
            (Target("dino.embeddings.position_embeddings", dim=1, offset=1),),
        ),
        *_affine(f"{root}.patch_embed.proj", d, (d, *patch_shape), "dino.embeddings.patch_embeddings.projection"),
    ]
    for block in range(vit.depth):
        ours = f"dino.layers.{block}" if block < vit.depth - 1 else None
        table += _block(
            f"{root}.blocks.{block}",
            vit,
            norms=(f"{ours}.norm1", f"{ours}.norm2") if ours else None,
            qkv=tuple(f"{ours}.attention.{x}_proj" for x in "qkv") if ours else None,  # type: ignore[arg-type]
            out=f"{ours}.attention.o_proj" if ours else None,
            mlp=f"{ours}.mlp" if ours else None,
            scales=(f"{ours}.layer_scale1.lambda1", f"{ours}.layer_scale2.lambda1") if ours else (None, None),
        )
    return [*table, *_affine(f"{root}.norm", d, (d,), None)]


def _siglip(vit: ViTConfig, patches: int, patch_shape: tuple[int, ...]) -> list[Entry]:
    d, root = vit.hidden, "vision_backbone.fused_featurizer"
    table = [
        _one(f"{root}.pos_embed", (1, patches, d), "siglip.embeddings.position_embedding.weight"),
        *_affine(f"{root}.patch_embed.proj", d, (d, *patch_shape), "siglip.embeddings.patch_embedding"),
    ]
    for block in range(vit.depth):
        ours = f"siglip.layers.{block}" if block < vit.depth - 1 else None
        table += _block(
            f"{root}.blocks.{block}",
            vit,
            norms=(f"{ours}.layer_norm1", f"{ours}.layer_norm2") if ours else None,
            qkv=tuple(f"{ours}.self_attn.{x}_proj" for x in "qkv") if ours else None,  # type: ignore[arg-type]
            out=f"{ours}.self_attn.out_proj" if ours else None,
            mlp=f"{ours}.mlp" if ours else None,
        )
    pool = f"{root}.attn_pool"
    return [
        *table,
        *_affine(f"{root}.norm", d, (d,), None),
        _one(f"{pool}.latent", (1, 1, d), None),
        *_affine(f"{pool}.q", d, (d, d), None),
        *_affine(f"{pool}.kv", 2 * d, (2 * d, d), None),
        *_affine(f"{pool}.proj", d, (d, d), None),
        *_affine(f"{pool}.norm", d, (d,), None),
        *_affine(f"{pool}.mlp.fc1", vit.mlp, (vit.mlp, d), None),
        *_affine(f"{pool}.mlp.fc2", d, (d, vit.mlp), None),
    ]


def _block(
    key: str,
    vit: ViTConfig,
    *,
    norms: tuple[str, str] | None,
    qkv: tuple[str, str, str] | None,
    out: str | None,
    mlp: str | None,
    scales: tuple[str | None, str | None] | None = None,
) -> list[Entry]:
    """One timm ViT block; LayerScale only where `scales` is given."""
    d = vit.hidden
    return [
        *_affine(f"{key}.norm1", d, (d,), norms[0] if norms else None),
        _qkv(f"{key}.attn.qkv", d, (3 * d, d), qkv, "weight"),
        _qkv(f"{key}.attn.qkv", d, (3 * d,), qkv, "bias"),
        *_affine(f"{key}.attn.proj", d, (d, d), out),
        *([_one(f"{key}.ls1.scale_factor", (d,), scales[0])] if scales else []),
        *_affine(f"{key}.norm2", d, (d,), norms[1] if norms else None),
        *_affine(f"{key}.mlp.fc1", vit.mlp, (vit.mlp, d), f"{mlp}.fc1" if mlp else None),
        *_affine(f"{key}.mlp.fc2", d, (d, vit.mlp), f"{mlp}.fc2" if mlp else None),
        *([_one(f"{key}.ls2.scale_factor", (d,), scales[1])] if scales else []),
    ]


def _projector(config: OpenVLAConfig) -> list[Entry]:
    if config.heatmap is not None:
        with torch.device("meta"):
            return _module(ObjectProjector(len(config.heatmap.classes), config.lm.d_model), "projector", "projector")
    vision, d = config.vision_width, config.lm.d_model
    return [
        *_affine("projector.fc1", 4 * vision, (4 * vision, vision), "projector.fc1"),
        *_affine("projector.fc2", d, (d, 4 * vision), "projector.fc2"),
        *_affine("projector.fc3", d, (d, d), "projector.fc3"),
    ]


def _state(config: OpenVLAConfig) -> list[Entry]:
    if not config.state_tokens:
        return []
    with torch.device("meta"):
        encoder = StateEncoder(config.state_tokens, config.lm.d_model)
    return _module(encoder, "state_encoder", "state_encoder")


def _queries(config: OpenVLAConfig) -> list[Entry]:
    shape = (config.action_tokens, config.lm.d_model)
    return [_one("action_queries", shape, "action_queries")] if config.parallel else []


def _llama(config: OpenVLAConfig) -> list[Entry]:
    """Same names as ours; a tied unembedding has no tensor of its own."""
    lm = config.lm
    d, kv = lm.d_model, lm.d_model // lm.heads * lm.kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (lm.vocab_rows, d)}
    for layer in range(lm.layers):
        root = f"model.layers.{layer}"
        shapes |= {
            f"{root}.self_attn.q_proj.weight": (d, d),
            f"{root}.self_attn.k_proj.weight": (kv, d),
            f"{root}.self_attn.v_proj.weight": (kv, d),
            f"{root}.self_attn.o_proj.weight": (d, d),
            f"{root}.mlp.gate_proj.weight": (lm.d_ff, d),
            f"{root}.mlp.up_proj.weight": (lm.d_ff, d),
            f"{root}.mlp.down_proj.weight": (d, lm.d_ff),
            f"{root}.input_layernorm.weight": (d,),
            f"{root}.post_attention_layernorm.weight": (d,),
        }
    shapes["model.norm.weight"] = (d,)
    if not lm.tied:
        shapes["lm_head.weight"] = (lm.vocab_rows, d)
    if config.base is not None:
        return _beside_base(config, config.base, shapes)
    return [_one(f"language_model.{name}", shape, f"language_model.{name}") for name, shape in shapes.items()]


def _beside_base(config: OpenVLAConfig, base: BaseConfig, shapes: dict[str, tuple[int, ...]]) -> list[Entry]:
    """What a checkpoint stores itself when the rest is a published file's: the embedding only below the file's rows."""
    lm = config.lm
    own_rows = Target(EMBEDDING, dim=0, offset=base.words)
    table = [Entry(OWN_ROWS, (lm.vocab_rows - base.words, lm.d_model), (own_rows,))]
    for name, shape in shapes.items():
        key = f"language_model.{name}"
        if key != EMBEDDING and key not in base.tensors:
            table.append(_one(key, shape, key))
    return table
