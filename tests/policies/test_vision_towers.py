"""The vision towers against a plain ViT written from the published tensor names."""

from __future__ import annotations

import fabricate
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from steer_runtime.policies.openvla.checkpoint import load_checkpoint
from steer_runtime.policies.openvla.config import OpenVLAConfig, ViTConfig
from steer_runtime.policies.openvla.layout import entries


def published_weights(config: OpenVLAConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors in the published layout, unused ones included."""
    generator = torch.Generator().manual_seed(seed)
    return {
        e.key: torch.randn(e.shape, generator=generator) * (0.3 if len(e.shape) < 2 else e.shape[-1] ** -0.5)
        for e in entries(config)
    }


def plain_vit(weights: dict[str, Tensor], root: str, vit: ViTConfig, pixels: Tensor, patch: int) -> Tensor:
    """timm's forward in torch functionals: fused qkv, pre-norm, LayerScale if there, output of block depth - 2."""
    w = {key.removeprefix(root + "."): value for key, value in weights.items() if key.startswith(root + ".")}
    x = functional.conv2d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2) + w["pos_embed"]
    prefix = 0
    if vit.class_token:
        x = torch.cat([w["cls_token"], w["reg_token"], x], dim=1)
        prefix = 1 + vit.registers
    d = vit.hidden
    for index in range(vit.depth - 1):
        b = {key.removeprefix(f"blocks.{index}."): v for key, v in w.items() if key.startswith(f"blocks.{index}.")}
        y = functional.layer_norm(x, (d,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        qkv = functional.linear(y, b["attn.qkv.weight"], b["attn.qkv.bias"])
        q, k, v = qkv.reshape(1, -1, 3, vit.heads, d // vit.heads).permute(2, 0, 3, 1, 4)
        weight = torch.softmax(q @ k.transpose(-1, -2) / (d // vit.heads) ** 0.5, dim=-1)
        y = (weight @ v).transpose(1, 2).reshape(1, -1, d)
        y = functional.linear(y, b["attn.proj.weight"], b["attn.proj.bias"])
        x = x + y * b.get("ls1.scale_factor", torch.ones(()))
        y = functional.layer_norm(x, (d,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        y = functional.gelu(functional.linear(y, b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
        y = functional.linear(y, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
        x = x + y * b.get("ls2.scale_factor", torch.ones(()))
    return x[:, prefix:]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """(weights in the published layout, model our loader makes of them)."""
    import json

    from safetensors.torch import save_file

    from steer_runtime.policies.openvla.config import emit_config

    config = fabricate.tiny_config(image_size=42)
    directory = tmp_path_factory.mktemp("published")
    weights = published_weights(config)
    save_file(weights, str(directory / "model.safetensors"))
    (directory / "config.json").write_text(json.dumps(emit_config(config)))
    return weights, load_checkpoint(directory)[0]


@pytest.mark.parametrize(
    ("tower", "root", "channels"),
    [
        ("dino", "vision_backbone.featurizer", slice(0, 3)),
        ("siglip", "vision_backbone.fused_featurizer", slice(3, 6)),
    ],
)
def test_a_tower_equals_a_plain_vit(published, tower: str, root: str, channels: slice) -> None:  # type: ignore[no-untyped-def]
    weights, model = published
    pixels = torch.randn(1, 6, 42, 42, generator=torch.Generator().manual_seed(1))[:, channels]
    expected = plain_vit(weights, root, getattr(model.config, tower), pixels, model.config.patch)
    assert expected.shape[1] == 9
    torch.testing.assert_close(getattr(model, tower)(pixels), expected, atol=2e-5, rtol=2e-5)


def test_the_projector_sees_dino_then_siglip(published) -> None:  # type: ignore[no-untyped-def]
    weights, model = published
    config = model.config
    pixels = torch.randn(1, 6, 42, 42, generator=torch.Generator().manual_seed(2))
    x = torch.cat(
        [
            plain_vit(weights, "vision_backbone.featurizer", config.dino, pixels[:, :3], config.patch),
            plain_vit(weights, "vision_backbone.fused_featurizer", config.siglip, pixels[:, 3:], config.patch),
        ],
        dim=-1,
    )
    for name in ("fc1", "fc2", "fc3"):
        x = functional.linear(x, weights[f"projector.{name}.weight"], weights[f"projector.{name}.bias"])
        x = functional.gelu(x) if name != "fc3" else x
    torch.testing.assert_close(model.vision(pixels), x, atol=2e-5, rtol=2e-5)
