"""Shape and conventions of a Pi0, from the published 3B down to a pocket or test size.

Invariant: LeRobot's `config.json`, openpi's and ours parse to the same frozen object; a checkpoint of a sister model
(pi0.5, pi0-FAST) is refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from steer_runtime.errors import SteerError
from steer_runtime.policies.base import BaseConfig
from steer_runtime.policies.objects.config import HeatmapConfig

GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class GemmaSize:
    """One Gemma tower. activation: of its gated MLP, Gemma's or Llama's "silu"."""

    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str = GELU
    rms_norm_eps: float = 1e-6


@dataclass(frozen=True)
class SiglipSize:
    """The image tower: all of its blocks and its last norm. image, patch: sides in pixels."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    image: int = 224
    patch: int = 14

    @property
    def patches(self) -> int:
        """Tokens of one image."""
        return (self.image // self.patch) ** 2


@dataclass(frozen=True)
class ObjectSight:
    """The pocket policies' sight in place of SigLIP: two cameras, a token an object class, then tokens of proprioception.

    image: side of a picture in pixels. names: token ids of each class's name; where one ends in the text, its object's
    token is added. prompt: text around the instruction, which is put in lower case.
    The prefix is BOS, objects, state, text, each attending to what is before it, as its language model was trained.
    """

    heatmap: HeatmapConfig
    image: int
    names: tuple[tuple[int, ...], ...]
    state_tokens: int = 1
    prompt: str = "{instruction}\nOut:"

    def problems(self) -> list[str]:
        """What does not fit together."""
        problems = self.heatmap.problems(self.image)
        if len(self.names) != len(self.heatmap.classes) or not all(self.names):
            problems.append(f"{len(self.names)} names for {len(self.heatmap.classes)} object classes")
        if self.state_tokens < 1:
            problems.append("objects are told from the hand: state_tokens must be at least 1")
        if self.prompt.count("{instruction}") != 1:
            problems.append(f"prompt {self.prompt[:60]!r} does not hold {{instruction}} once")
        return problems


@dataclass(frozen=True)
class Pi0Config:
    """Architecture and token conventions (Black et al. 2024, arXiv 2410.24164; openpi; LeRobot).

    prefix reads images and text, expert reads the state and the noisy actions; both attend with the same heads, layer
    by layer, and turn keys with one rope_theta. vocab: rows of the tied embedding. bos_token_id: begins the text.
    chunk: actions of one inference. state_dim, action_dim: padded sizes. euler_steps: denoising steps of one inference.
    max_prompt_tokens: text with BOS and line end. max_cameras: pictures of one observation. action_steps: rows of a
    chunk that are handed on, None for all (LeRobot: n_action_steps). min_period, max_period: of the time embedding.
    vision: SigLIP as published, or objects in its place. base: a published file that holds part of the prefix.
    trained: False for random weights.
    """

    prefix: GemmaSize
    expert: GemmaSize
    vision: SiglipSize | None
    vocab: int
    objects: ObjectSight | None = None
    rope_theta: float = 10000.0
    bos_token_id: int = 2
    chunk: int = 50
    state_dim: int = 32
    action_dim: int = 32
    euler_steps: int = 10
    max_prompt_tokens: int = 48
    max_cameras: int = 3
    action_steps: int | None = None
    min_period: float = 4e-3
    max_period: float = 4.0
    base: BaseConfig | None = None
    trained: bool = True
    name: str = "pi0"

    def __post_init__(self) -> None:
        problems = []
        for name in ("layers", "heads", "kv_heads", "head_dim"):
            mine, theirs = getattr(self.prefix, name), getattr(self.expert, name)
            if mine != theirs:
                problems.append(f"{name} is {mine} in the prefix and {theirs} in the expert, which attends to it")
        for label, size in (("prefix", self.prefix), ("expert", self.expert)):
            if min(size.d_model, size.d_ff, size.heads, size.kv_heads, size.head_dim) < 1:
                problems.append(f"{label} has a size below 1")
            elif size.heads % size.kv_heads or size.head_dim % 2:
                problems.append(f"{label} heads {size.heads}, kv_heads {size.kv_heads} or head_dim {size.head_dim}")
        if self.prefix.layers < 2:
            problems.append(f"{self.prefix.layers} layers leave none in the prefix that can be steered: expected 2")
        if self.expert.d_model % 2:
            problems.append(f"expert d_model {self.expert.d_model} is odd, and half of it is the time's sines")
        vision = self.vision
        if (vision is None) == (self.objects is None):
            problems.append("the vision is neither SigLIP nor objects, or both")
        if self.objects is not None:
            problems += self.objects.problems()
            if self.max_cameras != 2:
                problems.append(f"max_cameras is {self.max_cameras}: objects are seen with 2")
        if vision is not None and (vision.image % vision.patch or vision.hidden % vision.heads):
            problems.append(f"vision image {vision.image}, patch {vision.patch}, heads {vision.heads} do not divide")
        for name in ("chunk", "state_dim", "action_dim", "euler_steps", "max_prompt_tokens", "max_cameras", "vocab"):
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.action_steps is not None and not 1 <= self.action_steps <= self.chunk:
            problems.append(f"action_steps {self.action_steps} is not within the chunk of {self.chunk}")
        if self.base is not None and (len(self.base.layers) != self.prefix.layers or self.base.words > self.vocab):
            problems.append("base has other layers than the prefix or more words than the vocabulary")
        if problems:
            raise SteerError(
                "bad_model_config", "the model configuration does not fit together: " + "; ".join(problems)
            )

    @property
    def image_token_id(self) -> int:
        """Stands for an image token in the ids of a prompt: the first id that no word has (as published)."""
        return self.vocab

    @property
    def state_token_id(self) -> int:
        """Stands for a token of proprioception in the ids of a prompt; only where `objects` has them."""
        return self.vocab + 1

    @property
    def prefix_tokens(self) -> int:
        """Longest prefix: the patches of every camera, or objects and proprioception, and the text."""
        if self.objects is not None:
            return len(self.objects.heatmap.classes) + self.objects.state_tokens + self.max_prompt_tokens
        assert self.vision is not None
        return self.max_cameras * self.vision.patches + self.max_prompt_tokens

    @property
    def expert_tokens(self) -> int:
        """Tokens of the expert: the state, then one an action."""
        return 1 + self.chunk


PI0 = Pi0Config(
    prefix=GemmaSize(2048, 16384, 18, 8, 1, 256),
    expert=GemmaSize(1024, 4096, 18, 8, 1, 256),
    vision=SiglipSize(1152, 4304, 27, 16),
    vocab=257152,
)
"""The published architecture: PaliGemma-3B at 224 px and a 300M expert."""

_VARIANTS = {
    "gemma_2b": PI0.prefix,
    "gemma_300m": PI0.expert,
}
_SISTERS = {
    "pi05": "pi0.5",
    "pi0.5": "pi0.5",
    "pi0_5": "pi0.5",
    "pi0_fast": "pi0-FAST",
    "pi0fast": "pi0-FAST",
    "pi0-fast": "pi0-FAST",
}


def not_supported(where: Path, sister: str) -> SteerError:
    """The refusal of a sister model's checkpoint."""
    return SteerError(
        "not_supported",
        f"{where} is a checkpoint of {sister}, which is not supported yet: give one of pi0 (flow matching)",
    )


def read_config(path: Path) -> Pi0Config:
    """Parse a checkpoint's `config.json`. Raises SteerError: no_checkpoint, bad_model_config, not_supported."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SteerError(
            "no_checkpoint", f"{path.parent} has no config.json: give the directory of a Pi0 checkpoint"
        ) from None
    except (OSError, ValueError) as error:
        raise SteerError(
            "bad_model_config", f"{path} is not readable JSON ({error}); download the file again"
        ) from None
    if not isinstance(raw, dict):
        raise SteerError("bad_model_config", f"{path} holds a {type(raw).__name__}: expected a JSON object")
    try:
        return parse_config(raw, path.parent)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SteerError("bad_model_config", f"{path} is not a Pi0 configuration: {error!r}") from None


def parse_config(raw: Mapping[str, Any], where: Path) -> Pi0Config:
    """Configuration from the content of a `config.json`; where: the checkpoint, for the refusal of a sister model.

    LeRobot names the policy in `type`, transformers in `model_type`; openpi's files have neither, and say
    `action_horizon` for the chunk.
    """
    kind = str(raw.get("type", raw.get("model_type", "pi0"))).lower()
    sister = _SISTERS.get(kind) or ("pi0.5" if raw.get("pi05") else None)
    if sister is not None:
        raise not_supported(where, sister)
    if kind != "pi0":
        raise SteerError(
            "bad_model_config",
            f"{where} has config.json of type {kind[:40]!r}: expected 'pi0'; other policies need their own loader",
        )
    _require_plain_normalisation(raw, where)
    ours = dict(raw.get("steer_runtime") or {})
    unknown = set(ours) - {f.name for f in fields(Pi0Config)}
    if unknown:
        raise SteerError("bad_model_config", f"config.json's section steer_runtime has unknown keys {sorted(unknown)}")
    values: dict[str, Any] = {
        "prefix": _variant(raw, "paligemma_variant", "gemma_2b"),
        "expert": _variant(raw, "action_expert_variant", "gemma_300m"),
        "vision": PI0.vision,
        "vocab": PI0.vocab,
        "chunk": int(raw.get("chunk_size", raw.get("action_horizon", PI0.chunk))),
        "state_dim": int(raw.get("max_state_dim", raw.get("action_dim", PI0.state_dim))),
        "action_dim": int(raw.get("max_action_dim", raw.get("action_dim", PI0.action_dim))),
        "euler_steps": int(raw.get("num_inference_steps", raw.get("num_steps", PI0.euler_steps))),
        "max_prompt_tokens": int(raw.get("tokenizer_max_length", PI0.max_prompt_tokens)),
        "min_period": float(raw.get("min_period", PI0.min_period)),
        "max_period": float(raw.get("max_period", PI0.max_period)),
        "action_steps": None if raw.get("n_action_steps") is None else int(raw["n_action_steps"]),
    }
    values |= _transformers_sizes(raw)
    for name in ("prefix", "expert"):
        if name in ours:
            values[name] = GemmaSize(**ours.pop(name))
    if "vision" in ours:
        values["vision"] = SiglipSize(**ours.pop("vision"))
    if "objects" in ours:
        sight = dict(ours.pop("objects"))
        heat = dict(sight.pop("heatmap"))
        values["vision"] = None
        values["objects"] = ObjectSight(
            heatmap=HeatmapConfig(classes=tuple(str(c) for c in heat.pop("classes")), **heat),
            names=tuple(tuple(int(i) for i in ids) for ids in sight.pop("names")),
            **sight,
        )
    if ours.get("base") is not None:
        base = dict(ours.pop("base"))
        numbers, names = tuple(int(i) for i in base.pop("layers")), tuple(str(t) for t in base.pop("tensors"))
        ours["base"] = BaseConfig(**base, layers=numbers, tensors=names)
    return Pi0Config(**{**values, **ours})


def emit_config(config: Pi0Config) -> dict[str, Any]:
    """Content of `config.json`: LeRobot's fields, and a section `steer_runtime` for what they cannot say."""
    own = ("vocab", "rope_theta", "bos_token_id", "max_cameras", "trained", "name")
    sections = ("prefix", "expert", "vision", "objects", "base")
    parts = {name: asdict(part) for name in sections if (part := getattr(config, name)) is not None}
    return {
        "type": "pi0",
        "chunk_size": config.chunk,
        "n_action_steps": config.action_steps,
        "max_state_dim": config.state_dim,
        "max_action_dim": config.action_dim,
        "num_inference_steps": config.euler_steps,
        "tokenizer_max_length": config.max_prompt_tokens,
        "min_period": config.min_period,
        "max_period": config.max_period,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
        "steer_runtime": {
            **{name: getattr(config, name) for name in own},
            **parts,
        },
    }


def _variant(raw: Mapping[str, Any], key: str, default: str) -> GemmaSize:
    name = str(raw.get(key, default))
    if name not in _VARIANTS:
        raise SteerError(
            "bad_model_config", f"config.json has {key} {name[:40]!r}: expected one of {', '.join(_VARIANTS)}"
        )
    return _VARIANTS[name]


def _transformers_sizes(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that transformers' `PI0Config` spells out, as far as it does; LeRobot's and openpi's files have none."""
    found: dict[str, Any] = {}
    vlm = raw.get("vlm_config") or {}
    for name, text in (("prefix", vlm.get("text_config")), ("expert", raw.get("dit_config"))):
        if text:
            heads = int(text["num_attention_heads"])
            found[name] = GemmaSize(
                d_model=int(text["hidden_size"]),
                d_ff=int(text["intermediate_size"]),
                layers=int(text["num_hidden_layers"]),
                heads=heads,
                kv_heads=int(text.get("num_key_value_heads", heads)),
                head_dim=int(text.get("head_dim", 256)),
                activation=str(text.get("hidden_act", GELU)),
                rms_norm_eps=float(text.get("rms_norm_eps", 1e-6)),
            )
    text, vision = vlm.get("text_config") or {}, vlm.get("vision_config")
    if "vocab_size" in text:
        found["vocab"] = int(text["vocab_size"])
    if "rope_parameters" in text:
        found["rope_theta"] = float(text["rope_parameters"]["rope_theta"])
    if "bos_token_id" in text:
        found["bos_token_id"] = int(text["bos_token_id"])
    if vision:
        found["vision"] = SiglipSize(
            hidden=int(vision["hidden_size"]),
            mlp=int(vision["intermediate_size"]),
            layers=int(vision["num_hidden_layers"]),
            heads=int(vision["num_attention_heads"]),
            image=int(vision["image_size"]),
            patch=int(vision["patch_size"]),
        )
    return found


def _require_plain_normalisation(raw: Mapping[str, Any], where: Path) -> None:
    """Pi0 was trained on z-scores; another mapping would be applied silently wrong."""
    mapping = raw.get("normalization_mapping") or {}
    for feature in ("STATE", "ACTION"):
        mode = str(mapping.get(feature, "MEAN_STD"))
        if mode != "MEAN_STD":
            raise SteerError(
                "bad_model_config",
                f"{where} normalises {feature} by {mode[:40]}: expected MEAN_STD (z-scores), as pi0 is trained with",
            )
