"""Shape of an OpenVLA, from the published 7B down to a pocket or test size.

Invariant: the published `config.json` and ours parse to the same frozen object; whatever decides a tensor's shape or a
token's meaning is in it, and nothing else is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from steer_runtime.errors import SteerError
from steer_runtime.policies.base import BaseConfig
from steer_runtime.policies.objects.config import HeatmapConfig


@dataclass(frozen=True)
class ViTConfig:
    """One vision tower. depth counts all published blocks; the output is that of block depth - 2 (the second to last).

    registers and class_token are DINOv2's (4 and one CLS); SigLIP has neither.
    """

    hidden: int
    depth: int
    heads: int
    mlp: int
    registers: int = 0
    class_token: bool = False


@dataclass(frozen=True)
class Slot:
    """A word that the policy says before it acts, one of a few. ids: token ids of the words, in their order."""

    name: str
    words: tuple[str, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class LMConfig:
    """The Llama tower. vocab_rows: rows of the embedding, padding included; tied: the unembedding is the embedding."""

    vocab_rows: int
    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_positions: int = 2048
    tied: bool = False
    bos_token_id: int = 1


@dataclass(frozen=True)
class OpenVLAConfig:
    """Architecture and token conventions (Kim et al. 2024, arXiv 2406.09246, and its HF modelling code).

    The vision is dino and siglip together, as published, or heatmap alone, which has no patches. names: token ids of
    each heatmap class's name, or none; a name in the prompt carries that object's token (prompts interleaved as in VIMA,
    Jiang et al. 2022, arXiv 2210.03094), so that the language model need not first find out which one is meant.
    state_tokens: soft tokens of proprioception between image and prompt (published: 0).
    chunk: actions of one inference (published: 1). slots: words said after the prompt and before the actions, decoded
    greedily among each slot's own (as RT-H says its motion, Belkhale et al. 2024, arXiv 2403.01823; published: none).
    parallel: all action tokens in one forward, from learnt queries (OpenVLA-OFT, Kim et al. 2025, arXiv 2502.19645);
    published: one forward a token. prompt: text around the instruction. base: a published file that holds part of the
    weights. usable_vocab: first id that is not a token; action tokens are the n_bins ids below it. append_token_id: the token
    Llama's tokenizer puts after "Out:" in training (29871), None for tokenizers without it. restrict_to_action_tokens:
    decode among action tokens only; the published policy decodes among all. trained: False for random weights.
    """

    lm: LMConfig
    usable_vocab: int
    dino: ViTConfig | None = None
    siglip: ViTConfig | None = None
    heatmap: HeatmapConfig | None = None
    names: tuple[tuple[int, ...], ...] = ()
    base: BaseConfig | None = None
    state_tokens: int = 0
    chunk: int = 1
    slots: tuple[Slot, ...] = ()
    parallel: bool = False
    prompt: str = "In: What action should the robot take to {instruction}?\nOut:"
    image_size: int = 224
    patch: int = 14
    n_bins: int = 256
    append_token_id: int | None = 29871
    restrict_to_action_tokens: bool = False
    max_prompt_tokens: int = 128
    trained: bool = True
    name: str = "openvla"
    norm_stats: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        problems = []
        if self.heatmap is None and self.image_size % self.patch:
            problems.append(f"image_size {self.image_size} is not a multiple of patch {self.patch}")
        if not self.n_bins < self.usable_vocab <= self.lm.vocab_rows:
            problems.append(
                f"usable_vocab {self.usable_vocab} must be above n_bins {self.n_bins} and at most "
                f"vocab_rows {self.lm.vocab_rows}"
            )
        if (self.dino is None) != (self.siglip is None) or (self.dino is None) == (self.heatmap is None):
            problems.append("the vision is neither dino and siglip together nor heatmap alone")
        for tower, vit in (("dino", self.dino), ("siglip", self.siglip)):
            if vit is None:
                continue
            if vit.hidden % vit.heads:
                problems.append(f"{tower} hidden {vit.hidden} is not a multiple of its {vit.heads} heads")
            if vit.depth < 2:
                problems.append(f"{tower} depth {vit.depth} leaves no second-to-last block")
        if self.heatmap is not None:
            problems += self.heatmap.problems(self.image_size)
        classes = 0 if self.heatmap is None else len(self.heatmap.classes)
        if self.names and (len(self.names) != classes or not all(self.names)):
            problems.append(
                f"{len(self.names)} names for {classes} heatmap classes: expected one of some tokens for each"
            )
        if self.state_tokens < 0 or self.chunk < 1:
            problems.append(f"state_tokens {self.state_tokens} or chunk {self.chunk} is too small")
        if self.heatmap is not None and not self.state_tokens:
            problems.append("heatmap needs state_tokens: its tokens are told from the hand")
        for slot in self.slots:
            if (
                not slot.ids
                or len(slot.ids) != len(slot.words)
                or not all(0 <= i < self.usable_vocab for i in slot.ids)
            ):
                problems.append(f"slot {slot.name!r} has {len(slot.words)} words and token ids {list(slot.ids)[:8]}")
        if self.prompt.count("{instruction}") != 1:
            problems.append(f"prompt {self.prompt[:60]!r} does not hold {{instruction}} once")
        if self.dino is not None and self.dino.mlp % self.dino.hidden:
            problems.append(f"dino mlp {self.dino.mlp} is not a multiple of its hidden size {self.dino.hidden}")
        if self.lm.d_model % self.lm.heads or self.lm.heads % self.lm.kv_heads:
            problems.append(
                f"lm d_model {self.lm.d_model}, heads {self.lm.heads} and kv_heads {self.lm.kv_heads} do not divide"
            )
        if self.max_tokens + self.action_tokens + len(self.slots) - 1 > self.lm.max_positions:
            problems.append(
                f"{self.max_tokens} prefill tokens and {self.action_tokens + len(self.slots) - 1} more exceed the lm's {self.lm.max_positions} positions"
            )
        if self.base is not None and (len(self.base.layers) != self.lm.layers or not self.lm.tied):
            problems.append("base needs a tied embedding and as many layers as the lm")
        if self.lm.layers < 1:
            problems.append("lm has no layers")
        if problems:
            raise SteerError(
                "bad_model_config", "the model configuration does not fit together: " + "; ".join(problems)
            )

    @property
    def patches(self) -> int:
        """Image tokens of one inference."""
        return (self.image_size // self.patch) ** 2 if self.heatmap is None else len(self.heatmap.classes)

    @property
    def vision_width(self) -> int:
        """Channels of a patch before the projector of the published towers."""
        dino, siglip = self.vits
        return dino.hidden + siglip.hidden

    @property
    def vits(self) -> tuple[ViTConfig, ViTConfig]:
        """The published towers, DINOv2's and SigLIP's; only where the vision is not the small tower."""
        assert self.dino is not None
        assert self.siglip is not None
        return self.dino, self.siglip

    @property
    def action_tokens(self) -> int:
        """Action tokens of one inference: 7 an action."""
        return 7 * self.chunk

    @property
    def forwards(self) -> int:
        """Language-model forwards of one inference (published: 7)."""
        return len(self.slots) + (1 if self.parallel else self.action_tokens)

    @property
    def max_tokens(self) -> int:
        """Longest forward, the prefill: BOS and prompt, image tokens, state tokens, action queries where they follow."""
        queries = self.action_tokens if self.parallel and not self.slots else 0
        return max(self.max_prompt_tokens + self.patches + self.state_tokens + queries, self.action_tokens + 1)


OPENVLA_7B = OpenVLAConfig(
    dino=ViTConfig(hidden=1024, depth=24, heads=16, mlp=4096, registers=4, class_token=True),
    siglip=ViTConfig(hidden=1152, depth=27, heads=16, mlp=4304),
    lm=LMConfig(vocab_rows=32064, d_model=4096, d_ff=11008, layers=32, heads=32, kv_heads=32),
    usable_vocab=32000,
    name="openvla-7b",
)
"""The published architecture: `dinosiglip-vit-so-224px` and Llama-2-7B (HF modelling code of openvla/openvla)."""

_PUBLISHED_VISION = "dinosiglip-vit-so-224px"


def read_config(path: Path) -> OpenVLAConfig:
    """Parse a checkpoint's `config.json`, published or ours. Raises SteerError('bad_model_config')."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SteerError(
            "no_checkpoint", f"{path.parent} has no config.json: give the directory of an OpenVLA checkpoint"
        ) from None
    except (OSError, ValueError) as error:
        raise SteerError(
            "bad_model_config", f"{path} is not readable JSON ({error}); download the file again"
        ) from None
    if not isinstance(raw, dict):
        raise SteerError("bad_model_config", f"{path} holds a {type(raw).__name__}: expected a JSON object")
    try:
        return parse_config(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SteerError("bad_model_config", f"{path} is not an OpenVLA configuration: {error!r}") from None


def parse_config(raw: Mapping[str, Any]) -> OpenVLAConfig:
    """Configuration from the content of a `config.json`.

    A field the published files leave out has the default of Llama's configuration class, which is what the published
    modelling code runs with; usable_vocab is vocab_size - pad_to_multiple_of as there.
    """
    if raw.get("model_type") != "openvla":
        raise SteerError(
            "bad_model_config",
            f"config.json has model_type {raw.get('model_type')!r}: expected 'openvla'; other policies need their own loader",
        )
    text: dict[str, Any] = {k: v for k, v in (raw.get("text_config") or {}).items() if v is not None}
    if text.get("rope_scaling"):
        raise SteerError("bad_model_config", "config.json asks for rope_scaling, which OpenVLA's Llama-2 does not use")
    rope = text.get("rope_parameters") or {}
    published = OPENVLA_7B.lm
    lm = LMConfig(
        vocab_rows=int(text.get("vocab_size", published.vocab_rows)),
        d_model=int(text.get("hidden_size", published.d_model)),
        d_ff=int(text.get("intermediate_size", published.d_ff)),
        layers=int(text.get("num_hidden_layers", published.layers)),
        heads=int(text.get("num_attention_heads", published.heads)),
        kv_heads=int(text.get("num_key_value_heads", text.get("num_attention_heads", published.kv_heads))),
        rope_theta=float(rope.get("rope_theta", text.get("rope_theta", published.rope_theta))),
        rms_norm_eps=float(text.get("rms_norm_eps", published.rms_norm_eps)),
        max_positions=int(text.get("max_position_embeddings", published.max_positions)),
        tied=bool(text.get("tie_word_embeddings", published.tied)),
        bos_token_id=int(text.get("bos_token_id", published.bos_token_id)),
    )
    ours = dict(raw.get("steer_runtime") or {})
    unknown = set(ours) - {f.name for f in fields(OpenVLAConfig)}
    if unknown:
        raise SteerError("bad_model_config", f"config.json's section steer_runtime has unknown keys {sorted(unknown)}")
    if "base" in ours:
        base = dict(ours.pop("base"))
        numbers, names = tuple(int(i) for i in base.pop("layers")), tuple(str(t) for t in base.pop("tensors"))
        ours["base"] = BaseConfig(**base, layers=numbers, tensors=names)
    if "names" in ours:
        ours["names"] = tuple(tuple(int(i) for i in ids) for ids in ours["names"])
    if "slots" in ours:
        ours["slots"] = tuple(
            Slot(str(s["name"]), tuple(str(w) for w in s["words"]), tuple(int(i) for i in s["ids"]))
            for s in ours["slots"]
        )
    dino: ViTConfig | None = None
    siglip: ViTConfig | None = None
    if "heatmap" in ours:
        heat = dict(ours.pop("heatmap"))
        ours["heatmap"] = HeatmapConfig(classes=tuple(str(c) for c in heat.pop("classes")), **heat)
    elif "dino" in ours and "siglip" in ours:
        dino, siglip = ViTConfig(**ours.pop("dino")), ViTConfig(**ours.pop("siglip"))
    elif raw.get("vision_backbone_id", _PUBLISHED_VISION) == _PUBLISHED_VISION:
        dino, siglip = OPENVLA_7B.dino, OPENVLA_7B.siglip
    else:
        raise SteerError(
            "bad_model_config",
            f"config.json has vision_backbone_id {raw.get('vision_backbone_id')!r}: expected {_PUBLISHED_VISION!r}",
        )
    ours.setdefault("usable_vocab", lm.vocab_rows - int(raw.get("pad_to_multiple_of", 64)))
    ours.setdefault("n_bins", int(raw.get("n_action_bins", 256)))
    return OpenVLAConfig(dino=dino, siglip=siglip, lm=lm, norm_stats=raw.get("norm_stats") or {}, **ours)


def emit_config(config: OpenVLAConfig) -> dict[str, Any]:
    """Content of `config.json`: the published fields, and a section `steer_runtime` for what they cannot say."""
    lm = config.lm
    ours = {
        f.name: getattr(config, f.name)
        for f in fields(OpenVLAConfig)
        if f.name not in {"dino", "siglip", "heatmap", "base", "lm", "norm_stats", "n_bins", "slots"}
    }
    ours["slots"] = [asdict(slot) for slot in config.slots]
    parts = {"dino": config.dino, "siglip": config.siglip, "heatmap": config.heatmap, "base": config.base}
    return {
        "model_type": "openvla",
        "n_action_bins": config.n_bins,
        "pad_to_multiple_of": lm.vocab_rows - config.usable_vocab,
        "image_sizes": [config.image_size, config.image_size],
        "image_resize_strategy": "resize-naive",
        "use_fused_vision_backbone": config.heatmap is None,
        "text_config": {
            "model_type": "llama",
            "vocab_size": lm.vocab_rows,
            "hidden_size": lm.d_model,
            "intermediate_size": lm.d_ff,
            "num_hidden_layers": lm.layers,
            "num_attention_heads": lm.heads,
            "num_key_value_heads": lm.kv_heads,
            "rope_theta": lm.rope_theta,
            "rms_norm_eps": lm.rms_norm_eps,
            "max_position_embeddings": lm.max_positions,
            "tie_word_embeddings": lm.tied,
            "bos_token_id": lm.bos_token_id,
        },
        "norm_stats": dict(config.norm_stats),
        "steer_runtime": {**ours, **{name: asdict(part) for name, part in parts.items() if part is not None}},
    }
