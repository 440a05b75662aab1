"""Directories of safetensors, whatever model is in them: found, opened, written in shards, published whole.

Invariant: only safetensors are read, so nothing is executed; a directory that is written appears complete or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steer_runtime.errors import SteerError

WINDOW_BYTES = 16 << 20
"""Bytes read from one mapping of a file before it is mapped anew: touched pages of a mapping count as memory."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Stored:
    """A tensor of a file, unread. dtype: safetensors' name of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


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
            parts.append(f"the file carries derived entries that were not read: {listing(self.not_persistent)}")
        if self.absent:
            parts.append(f"the file lacks tensors that no action needs: {listing(self.absent)}")
        return "; ".join(parts)


def read_headers(directory: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint directory by its key.

    Raises SteerError: no_checkpoint, pickle_refused, missing_shard, torn_file, missing_weights (the index promises a
    tensor that its file lacks), unexpected_weights (two files hold one).
    """
    stored: dict[str, Stored] = {}
    for path, promised in _locate(directory).items():
        with open_tensors(path) as file:
            keys = list(file.keys())
            for key in keys:
                if key in stored:
                    raise SteerError("unexpected_weights", f"{path} repeats {key!r} of {stored[key].file.name}")
                part = file.get_slice(key)
                stored[key] = Stored(path, tuple(part.get_shape()), part.get_dtype())
        absent = sorted((promised or set()) - set(keys))
        if absent:
            raise SteerError("missing_weights", f"{path} lacks {listing(absent)}, which the index places there")
    return stored


def read_tensors(stored: Mapping[str, Stored], keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) one at a time, by file, in the order of the keys within each. Raises SteerError('torn_file')."""
    by_file: dict[Path, list[str]] = {}
    for key in keys:
        by_file.setdefault(stored[key].file, []).append(key)
    for path, wanted in by_file.items():
        file, read = open_tensors(path), 0
        for key in wanted:
            if read > WINDOW_BYTES:
                del file
                file, read = open_tensors(path), 0
            try:
                tensor = file.get_tensor(key)
            except (SafetensorError, OSError) as error:
                raise SteerError("torn_file", f"{path} does not yield {key} ({error}); download it again") from None
            yield key, tensor
            read += tensor.numel() * tensor.element_size()
            del tensor


def open_tensors(path: Path) -> Any:
    """safetensors' `safe_open` of a file. Raises SteerError('torn_file')."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise SteerError("torn_file", f"{path} is not a whole safetensors file ({error}); download it again") from None


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A folder to fill that becomes `directory` at the end, and vanishes when filling it fails.

    Raises SteerError('exists') when the directory is there.
    """
    if directory.exists():
        raise SteerError("exists", f"{directory} exists already: remove it or choose another directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield work
        work.chmod(0o755)
        try:
            os.rename(work, directory)
        except OSError as error:
            raise SteerError(
                "exists", f"{directory} appeared while it was being written ({error}); nothing replaced"
            ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_shards(
    directory: Path, sizes: Mapping[str, int], tensor: Callable[[str], Tensor], shard_bytes: int = 4 << 30
) -> None:
    """Write tensors into as many files as `shard_bytes` asks for, with an index where there are several.

    sizes: key -> bytes, in order. tensor: makes one, contiguous and its own memory; those of one shard exist at a time.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for key, nbytes in sizes.items():
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({key: tensor(key) for key in shard}, str(directory / name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def weights_digest(directory: Path) -> str:
    """sha256 hex of the safetensors files of a directory, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def listing(names: Iterable[str], limit: int = 5) -> str:
    """At most `limit` names, and how many more."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


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
                f"{directory} lacks {listing(missing)}, which its index names; download the missing files",
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
            f"{directory} holds {listing(pickles)} and no safetensors: pickles can run code and are not read; "
            "convert the checkpoint to safetensors",
        )
    raise SteerError(
        "no_checkpoint", f"{directory} has neither {INDEX} nor {SINGLE}: give a complete checkpoint directory"
    )
