"""Checkpoint directories of the published layout: read tensor by tensor, written atomically.

Invariant: a model comes back only when every tensor that reaches an action was found, in the right shape, and read;
nothing is executed, and memory peaks at the weights plus one window of the file.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.base import EMBEDDING, BaseConfig, read_base
from steer_runtime.policies.openvla.config import OpenVLAConfig, emit_config, read_config
from steer_runtime.policies.openvla.layout import NOT_PERSISTENT, OWN_ROWS, Entry, Target, entries, zero_filled
from steer_runtime.policies.openvla.model import OpenVLAModel

WINDOW_BYTES = 16 << 20
"""Bytes read from one mapping of a file before it is mapped anew: touched pages of a mapping count as memory."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STATISTICS = "dataset_statistics.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class LoadReport:
    """What a load left aside, by name. not_persistent: derived entries of the file; absent: tensors no action needs."""

    tensors: int
    not_persistent: tuple[str, ...]
    absent: tuple[str, ...]

    @property
    def noteworthy(self) -> str:
        """What an operator may want to know, in one phrase; empty for a file of exactly the published layout."""
        parts = []
        if self.not_persistent:
            parts.append(f"the file carries derived entries that were not read: {_listing(self.not_persistent)}")
        if self.absent:
            parts.append(f"the file lacks tensors that no action needs: {_listing(self.absent)}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Stored:
    """Where one tensor is, with its shape and safetensors' name of its dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


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
    if directory.exists():
        raise SteerError("exists", f"{directory} exists already: remove it or choose another directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        _write_shards(model, work, shard_bytes)
        (work / "config.json").write_text(json.dumps(emit_config(model.config), indent=2) + "\n", encoding="utf-8")
        (work / STATISTICS).write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(work))
        if finish is not None:
            finish(work)
        work.chmod(0o755)
        try:
            os.rename(work, directory)
        except OSError as error:
            raise SteerError(
                "exists", f"{directory} appeared while it was being written ({error}); nothing replaced"
            ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return directory


def _locate(directory: Path) -> dict[Path, set[str] | None]:
    """Safetensors files of the checkpoint and the keys the index promises of each (None without an index)."""
    index = directory / INDEX
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = {str(k): str(v) for k, v in weight_map.items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise SteerError("torn_file", f"{index} is not a usable index ({error!r}); download it again") from None
        files: dict[Path, set[str] | None] = {}
        for key, name in names.items():
            if Path(name).name != name:
                raise SteerError(
                    "torn_file", f"{index} points outside its directory ({name!r}); do not use this checkpoint"
                )
            if not name.endswith(".safetensors"):
                raise SteerError(
                    "pickle_refused",
                    f"{index} names {name!r}: only .safetensors files are read; convert the checkpoint",
                )
            promised = files.setdefault(directory / name, set())
            assert promised is not None
            promised.add(key)
        missing = sorted(path.name for path in files if not path.is_file())
        if missing:
            raise SteerError(
                "missing_shard",
                f"{directory} lacks {_listing(missing)}, which its index names; download the missing files",
            )
        return files
    if (directory / SINGLE).is_file():
        return {directory / SINGLE: None}
    pickles = sorted(
        p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt") for p in directory.glob(pattern)
    )
    if pickles:
        raise SteerError(
            "pickle_refused",
            f"{directory} holds {_listing(pickles)} and no safetensors: pickles can run code and are not read; "
            "convert the checkpoint to safetensors",
        )
    raise SteerError(
        "no_checkpoint", f"{directory} has neither {INDEX} nor {SINGLE}: give a complete checkpoint directory"
    )


def open_tensors(path: Path) -> Any:
    """safetensors' `safe_open` of a file. Raises SteerError('torn_file')."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise SteerError("torn_file", f"{path} is not a whole safetensors file ({error}); download it again") from None


def read_headers(directory: Path) -> dict[str, Stored]:
    """Every tensor of a directory's safetensors by name, of any architecture, unread. Raises SteerError as `survey`."""
    files = _locate(directory)
    stored: dict[str, Stored] = {}
    for path, promised in files.items():
        with open_tensors(path) as file:
            keys = list(file.keys())
            for key in keys:
                if key in stored:
                    raise SteerError("unexpected_weights", f"{path} repeats {key!r} of {stored[key].file.name}")
                part = file.get_slice(key)
                stored[key] = Stored(path, tuple(part.get_shape()), part.get_dtype())
        absent = sorted((promised or set()) - set(keys))
        if absent:
            raise SteerError("missing_weights", f"{path} lacks {_listing(absent)}, which the index places there")
    return stored


def _check(table: list[Entry], stored: Mapping[str, Stored], directory: Path) -> LoadReport:
    wanted = {entry.key: entry for entry in table}
    missing = [e.key for e in table if e.used and e.key not in stored]
    if missing:
        raise SteerError(
            "missing_weights",
            f"{directory} lacks {len(missing)} tensors ({_listing(missing)}); the configuration and the weights must be "
            "of the same model",
        )
    extra = [key for key in stored if key not in wanted]
    derived = tuple(key for key in extra if NOT_PERSISTENT.search(key))
    unexpected = [key for key in extra if key not in derived]
    if unexpected:
        raise SteerError(
            "unexpected_weights",
            f"{directory} holds {len(unexpected)} tensors that this architecture does not have ({_listing(unexpected)}); "
            "expected OpenVLA's published layout",
        )
    misshaped = [
        f"{key} is {list(stored[key].shape)}, expected {list(entry.shape)}"
        for key, entry in wanted.items()
        if key in stored and stored[key].shape != entry.shape
    ]
    if misshaped:
        raise SteerError(
            "misshaped_weights", f"{directory} has {len(misshaped)} mis-shaped tensors: {_listing(misshaped)}"
        )
    odd = [f"{k} is {s.dtype}" for k, s in stored.items() if k in wanted and s.dtype not in DTYPES]
    if odd:
        raise SteerError(
            "misshaped_weights",
            f"{directory} has tensors that are not F32, BF16 or F16 ({_listing(odd)}); dequantise them first",
        )
    absent = tuple(e.key for e in table if not e.used and e.key not in stored)
    return LoadReport(len(stored), derived, absent)


def _stream(table: list[Entry], stored: Mapping[str, Stored], parameters: Mapping[str, torch.nn.Parameter]) -> None:
    by_file: dict[Path, list[Entry]] = {}
    for entry in table:
        if entry.used:
            by_file.setdefault(stored[entry.key].file, []).append(entry)
    for path, wanted in by_file.items():
        file, read = open_tensors(path), 0
        for entry in wanted:
            if read > WINDOW_BYTES:
                del file
                file, read = open_tensors(path), 0
            try:
                tensor = file.get_tensor(entry.key)
            except (SafetensorError, OSError) as error:
                raise SteerError(
                    "torn_file", f"{path} does not yield {entry.key} ({error}); download it again"
                ) from None
            for target in entry.targets:
                _place(tensor, target, parameters[target.parameter])
            read += tensor.numel() * tensor.element_size()
            del tensor


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


def _write_shards(model: OpenVLAModel, directory: Path, shard_bytes: int) -> None:
    parameters = dict(model.named_parameters())
    dtype = model.unembedding.dtype
    table = entries(model.config)
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in table:
        nbytes = math.prod(entry.shape) * dtype.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(
            {e.key: _gather(e, parameters, dtype) for e in shard}, str(directory / name), metadata={"format": "pt"}
        )
        weight_map |= {e.key: name for e in shard}
    if len(shards) > 1:
        total = sum(math.prod(e.shape) * dtype.itemsize for e in table)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _embedding_key(table: Iterable[Entry]) -> str:
    return next(e.key for e in table if e.key.endswith(("embed_tokens.weight", OWN_ROWS)))


def _listing(names: Iterable[str], limit: int = 5) -> str:
    """At most `limit` names, and how many more."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
