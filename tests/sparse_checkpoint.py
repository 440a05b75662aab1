"""Checkpoints of any size that take no disk: true names and shapes, and zeros that no block is stored for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from steer_runtime.policies.openvla.config import OpenVLAConfig, emit_config
from steer_runtime.policies.openvla.layout import entries


def save_sparse(folder: Path, config: OpenVLAConfig) -> Path:
    """A checkpoint directory in bfloat16, all weights zero, its one file sparse."""
    folder.mkdir(parents=True)
    write_sparse(folder / "model.safetensors", {entry.key: entry.shape for entry in entries(config)})
    (folder / "config.json").write_text(json.dumps(emit_config(config)), encoding="utf-8")
    return folder


def write_sparse(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """A safetensors file of bfloat16 zeros."""
    header: dict[str, object] = {}
    end = 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
