"""Checkpoint directories of the published layout: read tensor by tensor, written atomically.

Invariant: a model comes back only when every tensor that reaches an action was found, in the right shape, and read;
nothing is executed, and memory peaks at the weights plus one window of the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer_runtime.errors import SteerError
from steer_runtime.policies.base import EMBEDDING, BaseConfig, read_base
from steer_runtime.policies.openvla.config import OpenVLAConfig, emit_config, read_config
from steer_runtime.policies.openvla.layout import NOT_PERSISTENT, OWN_ROWS, Entry, Target, entries, zero_filled
from steer_runtime.policies.openvla.model import OpenVLAModel
from steer_runtime.policies.shards import (
    DTYPES,
    LoadReport,
    Stored,
    listing,
    new_directory,
    read_headers,
    read_tensors,
    write_shards,
)

STATISTICS = "dataset_statistics.json"


@dataclass(frozen=True)
class Survey:
    """What a checkpoint directory holds, by its configuration and headers, which agree. dtype: the model's when loaded."""

    config: OpenVLAConfig
    table: list[Entry]
    stored: Mapping[str, Stored]
    report: LoadReport
    dtype: torch.dtype


def survey(directory: Path) -> Survey:
    """Read a checkpoint's configuration and headers, no weights. Raises SteerError as `load_checkpoint`."""
    if not directory.is_dir():
        raise SteerError(
            "no_checkpoint",
            f"{directory} is not a directory: download the checkpoint (config.json, safetensors, tokenizer.json) and "
            "give its path",
        )
    config = read_config(directory / "config.json")
    stored = read_headers(directory)
    table = entries(config)
    report = _check(table, stored, directory)
    return Survey(config, table, stored, report, DTYPES[stored[_embedding_key(table)].dtype])


def load_checkpoint(
    directory: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[OpenVLAModel, LoadReport]:
    """Model of a checkpoint directory, in evaluation mode, without gradients. dtype None keeps the file's.

    Raises SteerError: no_checkpoint, pickle_refused, missing_shard, torn_file, bad_model_config, missing_weights,
    unexpected_weights, misshaped_weights; with a base file also no_base, other_base.
    """
    surveyed = survey(directory)
    config, table, stored = surveyed.config, surveyed.table, surveyed.stored
    target_dtype = dtype or surveyed.dtype
    with torch.device("meta"):
        model = OpenVLAModel(config)
    model.to(target_dtype)
    model.to_empty(device=device)
    model.restore_buffers(device)
    if config.lm.tied:
        model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
    parameters = dict(model.named_parameters())
    for name in zero_filled(config):
        parameters[name].data.zero_()
    _stream(table, stored, parameters)
    if config.base is not None:
        _fill_from_base(config, config.base, parameters)
    return model.requires_grad_(False).eval(), surveyed.report


def save_checkpoint(
    model: OpenVLAModel,
    directory: Path,
    statistics: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    shard_bytes: int = 4 << 30,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Write the model in the published layout to a new directory; it appears whole or not at all.

    statistics: content of dataset_statistics.json. tokenizer: anything with `save_pretrained`. Tensors that reach no
    action (last blocks, pooling heads) are written as zeros, since the model does not hold them. `finish` may add files
    before the directory appears. Raises SteerError('exists') when the directory is there.
    """
    parameters = dict(model.named_parameters())
    dtype = model.unembedding.dtype
    table = {entry.key: entry for entry in entries(model.config)}
    with new_directory(directory) as work:
        sizes = {key: math.prod(entry.shape) * dtype.itemsize for key, entry in table.items()}
        write_shards(work, sizes, lambda key: _gather(table[key], parameters, dtype), shard_bytes)
        (work / "config.json").write_text(json.dumps(emit_config(model.config), indent=2) + "\n", encoding="utf-8")
        (work / STATISTICS).write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(work))
        if finish is not None:
            finish(work)
    return directory


def _check(table: list[Entry], stored: Mapping[str, Stored], directory: Path) -> LoadReport:
    wanted = {entry.key: entry for entry in table}
    missing = [e.key for e in table if e.used and e.key not in stored]
    if missing:
        raise SteerError(
            "missing_weights",
            f"{directory} lacks {len(missing)} tensors ({listing(missing)}); the configuration and the weights must be "
            "of the same model",
        )
    extra = [key for key in stored if key not in wanted]
    derived = tuple(key for key in extra if NOT_PERSISTENT.search(key))
    unexpected = [key for key in extra if key not in derived]
    if unexpected:
        raise SteerError(
            "unexpected_weights",
            f"{directory} holds {len(unexpected)} tensors that this architecture does not have ({listing(unexpected)}); "
            "expected OpenVLA's published layout",
        )
    misshaped = [
        f"{key} is {list(stored[key].shape)}, expected {list(entry.shape)}"
        for key, entry in wanted.items()
        if key in stored and stored[key].shape != entry.shape
    ]
    if misshaped:
        raise SteerError(
            "misshaped_weights", f"{directory} has {len(misshaped)} mis-shaped tensors: {listing(misshaped)}"
        )
    odd = [f"{k} is {s.dtype}" for k, s in stored.items() if k in wanted and s.dtype not in DTYPES]
    if odd:
        raise SteerError(
            "misshaped_weights",
            f"{directory} has tensors that are not F32, BF16 or F16 ({listing(odd)}); dequantise them first",
        )
    absent = tuple(e.key for e in table if not e.used and e.key not in stored)
    return LoadReport(len(stored), derived, absent)


def _stream(table: list[Entry], stored: Mapping[str, Stored], parameters: Mapping[str, torch.nn.Parameter]) -> None:
    targets = {entry.key: entry.targets for entry in table if entry.used}
    for key, tensor in read_tensors(stored, targets):
        for target in targets[key]:
            _place(tensor, target, parameters[target.parameter])


def _fill_from_base(config: OpenVLAConfig, base: BaseConfig, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Raises SteerError as `read_base`, and 'misshaped_weights'."""
    for name, value in read_base(base, config.lm.heads, config.lm.kv_heads):
        place = parameters[name].data
        if name == EMBEDDING:
            place = place[: base.words]
        if place.shape != value.shape:
            raise SteerError(
                "misshaped_weights", f"{base.file} gives {name} {list(value.shape)}, expected {list(place.shape)}"
            )
        place.copy_(value)


def _addressed(target: Target, parameter: Tensor) -> Tensor:
    return parameter.narrow(target.dim, target.offset, parameter.shape[target.dim] - target.offset)


def _place(tensor: Tensor, target: Target, parameter: torch.nn.Parameter) -> None:
    part = tensor[target.start : target.stop]
    destination = _addressed(target, parameter.data)
    destination.copy_(part.reshape(destination.shape))


def _gather(entry: Entry, parameters: Mapping[str, torch.nn.Parameter], dtype: torch.dtype) -> Tensor:
    if not entry.used:
        return torch.zeros(entry.shape, dtype=dtype)
    parts = [_addressed(target, parameters[target.parameter].data) for target in entry.targets]
    joined = torch.cat(parts) if len(parts) > 1 else parts[0]
    return joined.reshape(entry.shape).contiguous().clone()


def _embedding_key(table: Iterable[Entry]) -> str:
    return next(e.key for e in table if e.key.endswith(("embed_tokens.weight", OWN_ROWS)))
