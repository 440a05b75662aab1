"""One hash of the weights that directions depend on, whoever holds them: a loaded policy or a checkpoint's files.

Invariant: equal numbers hash alike, whatever their precision and wherever they are; memory is a few blocks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

BLOCK = 1 << 22
"""Elements read and hashed at a time: 16 MB of float32."""

Progress = Callable[[int, int], None]
"""Told (million weights done, million weights in all)."""


class Rows(Protocol):
    """A matrix of which rows can be had: a tensor, or one that stays in its file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


def hash_matrices(named: Mapping[str, Rows], *, progress: Progress | None = None) -> str:
    """sha256 hex of matrices in their order: of each the name, the shape, and the values as little-endian float32."""
    total = sum(math.prod(matrix.shape) for matrix in named.values())
    digest, done = hashlib.sha256(), 0
    for name, matrix in named.items():
        rows, columns = matrix.shape
        digest.update(f"{name} {[rows, columns]}\n".encode())
        step = max(1, BLOCK // columns)
        for start in range(0, rows, step):
            block = matrix[start : min(rows, start + step)].detach().to("cpu", torch.float32).contiguous().numpy()
            digest.update(block.astype("<f4", copy=False).tobytes())
            done += block.size
            if progress is not None:
                progress(done // 1_000_000, total // 1_000_000)
    return digest.hexdigest()
