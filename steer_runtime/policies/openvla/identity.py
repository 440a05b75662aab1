"""Which model a checkpoint directory is, read from its files without building the model.

Invariant: the hash is that of the loaded policy (`OpenVLAPolicy.model_hash`), and memory stays at a few blocks whatever the
size of the checkpoint.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from steer_runtime.errors import SteerError
from steer_runtime.policies.base import EMBEDDING, read_base
from steer_runtime.policies.openvla.checkpoint import Survey, survey
from steer_runtime.policies.openvla.layout import OWN_ROWS
from steer_runtime.policies.shards import Stored, open_tensors

TOWER = "lm"
BLOCK = 1 << 22
"""Elements read and hashed at a time: 16 MB of float32."""
REMAP_BYTES = 64 << 20
"""Bytes read before a file is mapped anew: touched pages of a mapping count as memory."""

Progress = Callable[[int, int], None]
"""Told (million weights done, million weights in all)."""


@dataclass(frozen=True)
class CheckpointIdentity:
    """What directions are tied to: sizes of tower "lm" and the model hash. name, trained: as the configuration says."""

    name: str
    trained: bool
    layers: int
    d_model: int
    d_ff: int
    model_hash: str
    tower: str = TOWER


def identify(directory: Path, *, progress: Progress | None = None) -> CheckpointIdentity:
    """Identity of a checkpoint of the published layout or ours. Raises SteerError as `load_checkpoint`."""
    found = survey(directory)
    lm = found.config.lm
    shapes = {f"{TOWER}.{i}.down_proj": (lm.d_model, lm.d_ff) for i in range(lm.layers)}
    shapes[f"{TOWER}.unembedding"] = (lm.vocab_rows, lm.d_model)
    total = sum(rows * columns for rows, columns in shapes.values())
    tensors = _base_tensors(found)
    digest, done = hashlib.sha256(), 0
    for (name, shape), key in zip(shapes.items(), _keys(found), strict=True):
        digest.update(f"{name} {list(shape)}\n".encode())
        for block in _blocks(found, key, tensors):
            exact = block.to(found.dtype).to(torch.float32).contiguous().numpy()
            digest.update(exact.astype("<f4", copy=False).tobytes())
            done += exact.size
            if progress is not None:
                progress(done // 1_000_000, total // 1_000_000)
    return CheckpointIdentity(
        found.config.name, found.config.trained, lm.layers, lm.d_model, lm.d_ff, digest.hexdigest()
    )


def read_rows(stored: Stored, key: str) -> Iterator[Tensor]:
    """A tensor of a file, BLOCK elements of whole rows at a time, in order. Raises SteerError('torn_file')."""
    rows = stored.shape[0]
    step = max(1, BLOCK * rows // max(1, math.prod(stored.shape)))
    window = step * (REMAP_BYTES // (4 * BLOCK))
    for start in range(0, rows, window):
        file = open_tensors(stored.file)
        for at in range(start, min(rows, start + window), step):
            try:
                yield file.get_slice(key)[at : min(rows, at + step)]
            except (SafetensorError, OSError) as error:
                raise SteerError(
                    "torn_file", f"{stored.file} does not yield {key} ({error}); download it again"
                ) from None


def _keys(found: Survey) -> Iterator[str]:
    for i in range(found.config.lm.layers):
        yield f"language_model.model.layers.{i}.mlp.down_proj.weight"
    yield EMBEDDING if found.config.lm.tied else "language_model.lm_head.weight"


def _blocks(found: Survey, key: str, base: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """A parameter by its name: from the base file where the checkpoint leaves it there, else from its own files."""
    if key in base:
        yield base[key]
        if key == EMBEDDING:
            yield from read_rows(found.stored[OWN_ROWS], OWN_ROWS)
        return
    yield from read_rows(found.stored[key], key)


def _base_tensors(found: Survey) -> dict[str, Tensor]:
    """What the hash needs of a base file, by our names, as the loader reads it. Raises SteerError as `read_base`."""
    base, lm = found.config.base, found.config.lm
    if base is None:
        return {}
    wanted = set(_keys(found))
    read = {name: value for name, value in read_base(base, lm.heads, lm.kv_heads) if name in wanted}
    rows = read[EMBEDDING].shape[0] if EMBEDDING in read else base.words
    if rows != base.words:
        raise SteerError("misshaped_weights", f"{base.file} has {rows} embedding rows, expected {base.words}")
    return read
