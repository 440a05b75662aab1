"""Checkpoints of the published sizes, fabricated: true names and shapes, random weights where asked, holes elsewhere.

A hole reads as zeros and takes no disk, so a whole OpenVLA-7B with two layers filled is 0.5 GB.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from steer_runtime.policies.openvla.config import OPENVLA_7B, emit_config
from steer_runtime.policies.openvla.layout import entries

PI0_LAYERS, PI0_D_MODEL, PI0_D_FF, PI0_VOCAB = 18, 2048, 16384, 257152
_PALIGEMMA = "model.paligemma_with_expert.paligemma"


def openvla_7b(folder: Path, layers: Sequence[int]) -> Path:
    """All tensors of OpenVLA-7B; the value vectors of `layers` and the unembedding hold random numbers."""
    shapes = {entry.key: entry.shape for entry in entries(OPENVLA_7B)}
    filled = [f"language_model.model.layers.{i}.mlp.down_proj.weight" for i in layers]
    return _write(folder, emit_config(OPENVLA_7B), shapes, [*filled, "language_model.lm_head.weight"])


def pi0(folder: Path, layers: Sequence[int]) -> Path:
    """The prefix of Pi0 in LeRobot's layout (tied embedding stored as lm_head); filled as `openvla_7b`."""
    name = f"{_PALIGEMMA}.model.language_model.layers.{{}}.mlp.down_proj.weight"
    shapes: dict[str, tuple[int, ...]] = {name.format(i): (PI0_D_MODEL, PI0_D_FF) for i in range(PI0_LAYERS)}
    shapes |= {f"{_PALIGEMMA}.model.language_model.norm.weight": (PI0_D_MODEL,)}
    shapes |= {f"{_PALIGEMMA}.lm_head.weight": (PI0_VOCAB, PI0_D_MODEL)}
    config = {"type": "pi0", "paligemma_variant": "gemma_2b"}
    return _write(folder, config, shapes, [*(name.format(i) for i in layers), f"{_PALIGEMMA}.lm_head.weight"])


SHAPES = {"openvla-7b": openvla_7b, "pi0": pi0}


def _write(
    folder: Path, config: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]], filled: Sequence[str]
) -> Path:
    folder.mkdir(parents=True)
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for key in filled:
            rows, columns = shapes[key]
            file.seek(8 + len(text) + header[key]["data_offsets"][0])
            generator = torch.Generator().manual_seed(int(re.sub(r"\D", "", key) or 0))
            for start in range(0, rows, 4096):
                part = torch.randn(min(4096, rows - start), columns, generator=generator).to(torch.bfloat16)
                file.write(part.view(torch.int16).numpy().tobytes())
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
