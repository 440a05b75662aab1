"""A policy before and after training: put together from SmolLM2 and a trained tower, written as a checkpoint.

Invariant: whatever of the written checkpoint equals the published SmolLM2, to the bit in the checkpoint's type, is left
to that file and named in the configuration; so frozen layers and embeddings cost no room.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sim.manner import SLOTS
from sim.training.settings import PolicyTraining
from sim.training.vision_weights import TowerFile
from steer_runtime.errors import SteerError
from steer_runtime.policies.base import EMBEDDING, layer_tensors, read_base
from steer_runtime.policies.openvla.actions import read_statistics
from steer_runtime.policies.openvla.checkpoint import load_checkpoint, save_checkpoint
from steer_runtime.policies.openvla.config import LMConfig, OpenVLAConfig, Slot
from steer_runtime.policies.openvla.model import OpenVLAModel
from steer_runtime.policies.pocket import smollm2_base
from steer_runtime.policies.shards import weights_digest

SHARD_BYTES = 40_000_000
"""Files of a shipped checkpoint stay under 45 MB."""
_BINS, _PAD_ROWS = 256, 64
_WAVES, _QUIET = 16, 0.05
PROMPT = "{instruction}\nOut:"
"""The published prompt without its question: each token of it costs time, and says nothing."""


def assemble(settings: PolicyTraining, vision: TowerFile, tokenizer: Any) -> OpenVLAModel:
    """SmolLM2's kept layers behind the trained tower; projector, state encoder, queries and action rows from the seed.

    Raises SteerError as `read_base`, 'bad_model_config'.
    """
    layers = settings.language_model.layers
    words = tuple(
        tuple(tokenizer.encode(" " + name.replace("_", " "), add_special_tokens=False)) for name in vision.heat.classes
    )
    base = smollm2_base(layers)
    config = OpenVLAConfig(
        # SmolLM2-135M's shape (its GGUF's metadata).
        lm=LMConfig(
            vocab_rows=base.words + _BINS + _PAD_ROWS,
            d_model=576,
            d_ff=1536,
            layers=len(layers),
            heads=9,
            kv_heads=3,
            rope_theta=100000.0,
            rms_norm_eps=1e-5,
            max_positions=8192,
            tied=True,
        ),
        usable_vocab=base.words + _BINS,
        heatmap=vision.heat,
        names=words,
        base=base,
        state_tokens=settings.state_tokens,
        chunk=settings.chunk,
        slots=slots(tokenizer),
        parallel=settings.parallel,
        prompt=PROMPT,
        image_size=vision.image_size,
        append_token_id=None,
        restrict_to_action_tokens=True,
        name=settings.name,
    )
    torch.manual_seed(settings.seed)
    model = OpenVLAModel(config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        everything = replace(base, tensors=tuple(layer_tensors(len(layers))))
        for name, value in read_base(everything, config.lm.heads, config.lm.kv_heads):
            parameters[name][: len(value)] = value
        model.heatmap.load_state_dict(vision.tower.state_dict())
        initialise(model)
        table = model.language_model.model.embed_tokens.weight
        model.projector.get_parameter("name").copy_(torch.stack([table[list(ids)].mean(0) for ids in words]))
    return model


def slots(tokenizer: Any) -> tuple[Slot, ...]:
    """The words of `sim.manner` as tokens. Raises SteerError('bad_model_config') for a word that is not one token."""
    out = []
    for name, words in SLOTS.items():
        spoken = tuple(" " + word for word in words)
        ids = [tokenizer.encode(word, add_special_tokens=False) for word in spoken]
        if any(len(i) != 1 for i in ids):
            raise SteerError("bad_model_config", f"the words of slot {name!r} are not one token each: {spoken}")
        out.append(Slot(name, spoken, tuple(int(i[0]) for i in ids)))
    return tuple(out)


def go_on(model: OpenVLAModel, start: Path, suite: str) -> tuple[str, dict[str, Any]]:
    """Fill everything but the vision tower from a finished policy of the same shape.

    Returns the policy's sha256 and its action statistics of the suite, as dataset_statistics.json has them. Raises
    SteerError as `load_checkpoint` and `read_statistics`, and 'other_checkpoint' for a policy of another shape.
    """
    there, _ = load_checkpoint(start, dtype=torch.float32)
    ours = {n: p for n, p in model.named_parameters() if not n.startswith("heatmap.")}
    theirs = {n: p for n, p in there.named_parameters() if not n.startswith("heatmap.")}
    different = sorted({n for n in ours.keys() | theirs.keys() if n not in ours or n not in theirs}) or sorted(
        n for n in ours if ours[n].shape != theirs[n].shape
    )
    said = (there.config.slots, there.config.names, there.config.prompt)
    if different or said != (model.config.slots, model.config.names, model.config.prompt):
        raise SteerError(
            "other_checkpoint",
            f"{start} is a policy of another shape ({', '.join(different[:3]) or 'other words'}): train without `start`",
        )
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(theirs[name])
    known = read_statistics(start, there.config, suite)
    action = {"q01": list(known.q01), "q99": list(known.q99), "mask": list(known.mask)}
    return weights_digest(start), {suite: {"action": action}}


@torch.no_grad()
def initialise(model: OpenVLAModel) -> None:
    """New embeddings (image, state, query) get the size of word embeddings, or the first layers are deaf to the words.

    Rows of action tokens begin small and smooth: neighbouring bins are alike (random mixtures of the first cosines).
    """
    config = model.config
    table = model.language_model.model.embed_tokens.weight
    low = config.usable_vocab - config.n_bins
    spread = float(table[:low].std())
    at = torch.linspace(0, torch.pi, config.n_bins)[:, None] * torch.arange(1, _WAVES + 1)
    table[low : config.usable_vocab] = _QUIET * spread * torch.cos(at) @ torch.randn(_WAVES, config.lm.d_model)
    table[config.usable_vocab :] = 0.0
    last = [model.projector.fc3] + ([model.state_encoder.fc2] if model.state_encoder is not None else [])
    if config.parallel:
        model.action_queries.normal_(std=spread)
    for layer in last:
        torch.nn.init.normal_(layer.weight, std=spread * layer.in_features**-0.5)
        torch.nn.init.zeros_(layer.bias)


def write_policy(
    model: OpenVLAModel,
    directory: Path,
    statistics: Mapping[str, Any],
    card: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a finished policy (`PolicyNet.settle`) with card.json; what equals the base file is left to it.

    Raises SteerError('exists'), and as `read_base`.
    """
    model.to(dtype)
    base = model.config.base
    if base is not None:
        parameters = dict(model.named_parameters())
        everything = replace(base, tensors=tuple(layer_tensors(len(base.layers))))
        equal = tuple(
            name
            for name, value in read_base(everything, model.config.lm.heads, model.config.lm.kv_heads)
            if name != EMBEDDING and torch.equal(parameters[name].data, value.to(dtype))
        )
        model.config = replace(model.config, base=replace(base, tensors=equal))

    def finish(work: Path) -> None:
        (work / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")

    return save_checkpoint(model, directory, statistics, tokenizer=tokenizer, shard_bytes=SHARD_BYTES, finish=finish)
