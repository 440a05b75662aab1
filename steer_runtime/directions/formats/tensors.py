"""Plain safetensors: one vector a layer or residual site, or three vectors layer, neuron, alpha.

`layer.N` is the output of layer N counted from 0, the residual site N + 1; `site.N` is that site, 0 the embeddings.

Invariant: numbers are taken exactly (float16 and bfloat16 fit into float32) or refused; nothing is executed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save as safetensors_save
from safetensors.torch import load as safetensors_load

from steer_runtime.directions.card import read_header
from steer_runtime.directions.direction import Direction, Neurons
from steer_runtime.directions.files import read_file
from steer_runtime.directions.finders.recipe import Recipe, written
from steer_runtime.directions.formats.carried import CARD_KEY, card_text, dense_form, source_facts, with_card
from steer_runtime.directions.formats.exported import Exported
from steer_runtime.directions.token_basis import TowerIdentity
from steer_runtime.errors import SteerError
from steer_runtime.types import ALL_ROLES

MAX_TENSOR_BYTES = 64 << 20
_PLACE = re.compile(r"(layers?|site)\.(0|[1-9][0-9]{0,3})")
_NEURONS = ("layer", "neuron", "alpha", "low")
_FLOATS, _INTEGERS = {"F32", "F16", "BF16"}, {"I32", "I64"}


def from_tensors(path: Path | str, identity: TowerIdentity, recipe: Recipe) -> Direction:
    """The direction of a safetensors file, dense (added) or of neurons (overridden unless the recipe names another op).

    recipe.alpha: factor of dense vectors; neurons bring their own. A file of ours comes back as the direction it was.
    Raises SteerError: 'bad_file', 'bad_card', 'other_model', 'bad_operation', as `with_card`, and what Direction refuses.
    """
    path = Path(path)
    content = read_file(path, MAX_TENSOR_BYTES, follow=True)
    header = read_header(content, path.name)
    metadata = header.pop("__metadata__", {})
    for name, entry in header.items():
        wanted = _INTEGERS if name in ("layer", "neuron") else _FLOATS
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if dtype not in wanted:
            raise SteerError(
                "bad_file",
                f"tensor {name[:80]!r} of {path.name!r} is {str(dtype)[:20]}: expected {' or '.join(sorted(wanted))}",
            )
    try:
        tensors = safetensors_load(content)
    except SafetensorError as why:
        raise SteerError("bad_file", f"{path.name!r} is torn or lies about its tensors ({why}); copy it again") from why
    arrays = {name: _exact(name, tensor, path.name) for name, tensor in tensors.items()}
    card = metadata.get(CARD_KEY) if isinstance(metadata, dict) else None
    if card is not None:
        return with_card(str(card), arrays, identity, recipe, path.name)
    facts = source_facts(path, content, "safetensors")
    if "neuron" in arrays:
        return _neurons(arrays, facts, identity, recipe, path.name)
    facts["alpha"] = 1.0 if recipe.alpha is None else recipe.alpha
    dense = dense_form(_sites(arrays, path.name), identity, recipe, path.name)
    return written(identity, recipe, facts, op=recipe.op or "add", span=recipe.span or ALL_ROLES, dense=dense)


def to_tensors(direction: Direction) -> Exported:
    """Any direction as safetensors, its card in the metadata: nothing is lost."""
    arrays = {name: np.ascontiguousarray(array) for name, array in direction.tensors().items()}
    return Exported(safetensors_save(arrays, metadata={CARD_KEY: card_text(direction)}))


def _sites(arrays: Mapping[str, np.ndarray], what: str) -> dict[int, np.ndarray]:
    sites: dict[int, np.ndarray] = {}
    for name, array in arrays.items():
        match = _PLACE.fullmatch(name)
        if match is None:
            raise SteerError(
                "bad_file",
                f"{what!r} holds a tensor called {name[:80]!r}: expected layer.N or site.N, or layer, neuron and alpha",
            )
        site = int(match[2]) + (0 if match[1] == "site" else 1)
        if site in sites:
            raise SteerError("bad_file", f"{what!r} holds two tensors for residual site {site}: keep one")
        sites[site] = array
    return sites


def _neurons(
    arrays: Mapping[str, np.ndarray], facts: dict[str, Any], identity: TowerIdentity, recipe: Recipe, what: str
) -> Direction:
    needed = {"layer", "neuron", "alpha"}
    if not needed <= set(arrays) <= set(_NEURONS):
        raise SteerError(
            "bad_file",
            f"{what!r} holds the tensors {sorted(arrays)[:8]}: expected layer, neuron and alpha, for clamp also low",
        )
    if recipe.alpha is not None or recipe.low is not None:
        raise SteerError("bad_option", f"{what!r} holds an alpha for each neuron: drop --alpha")
    neurons = Neurons(arrays["layer"], arrays["neuron"], arrays["alpha"], arrays.get("low"))
    op = recipe.op or ("override" if neurons.low is None else "clamp")
    return written(identity, recipe, facts, op=op, span=recipe.span or ALL_ROLES, neurons=neurons)


def _exact(name: str, tensor: torch.Tensor, what: str) -> np.ndarray:
    """float32 or int32, value for value. Raises SteerError('bad_file') for an integer that needs more."""
    if tensor.is_floating_point():
        return tensor.to(torch.float32).numpy()
    values = tensor.numpy()
    if values.size and (values.min() < -(2**31) or values.max() >= 2**31):
        raise SteerError("bad_file", f"tensor {name!r} of {what!r} holds numbers beyond 32 bits: no model has so many")
    return values.astype(np.int32)
