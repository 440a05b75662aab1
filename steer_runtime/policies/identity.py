"""What a model is, for directions: a hash of the weights that they depend on.

Invariant: the hash is of names, shapes and values, not of dtypes or files: a bf16 model and its exact float32 copy agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

_HASH_BLOCK = 1 << 22  # elements hashed at a time: 16 MB of float32


def hash_of(named: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 hex of the named tensors in order: names, shapes, values as little-endian float32."""
    digest = hashlib.sha256()
    for name, weight in named:
        digest.update(f"{name} {list(weight.shape)}\n".encode())
        flat = weight.detach().reshape(-1)
        for start in range(0, flat.numel(), _HASH_BLOCK):
            block = flat[start : start + _HASH_BLOCK].to("cpu", torch.float32).numpy()
            digest.update(block.astype("<f4", copy=False).tobytes())
    return digest.hexdigest()
