"""Pi0 checkpoints of LeRobot's layout: read tensor by tensor, written atomically.

Invariant: a network comes back only when every tensor of it was found, once, in the right shape, and read, and the file
held no other but those that no forward uses, which are named; nothing is executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer_runtime.errors import SteerError
from steer_runtime.policies.base import EMBEDDING as BASE_EMBEDDING
from steer_runtime.policies.base import BaseConfig, read_base
from steer_runtime.policies.pi0.config import Pi0Config, emit_config, not_supported, read_config
from steer_runtime.policies.pi0.layout import (
    EMBEDDING,
    NEVER_READ,
    NOT_PERSISTENT,
    OWN_ROWS,
    of_base,
    ours_of,
    published_of,
    sister_of,
)
from steer_runtime.policies.pi0.network import Pi0Network
from steer_runtime.policies.pi0.shell import in_shell
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

STATISTICS = "norm_stats.json"


def load_checkpoint(
    directory: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Pi0Network, LoadReport]:
    """Network of a checkpoint directory, in evaluation mode, without gradients. dtype None keeps that of the file's heads.

    Raises SteerError: no_checkpoint, pickle_refused, missing_shard, torn_file, bad_model_config, not_supported (pi0.5,
    pi0-FAST), missing_weights, unexpected_weights, misshaped_weights; with a base file also no_base, other_base.
    """
    if not directory.is_dir():
        raise SteerError(
            "no_checkpoint",
            f"{directory} is not a directory: download the checkpoint (config.json, safetensors) and give its path",
        )
    config = read_config(directory / "config.json")
    stored = read_headers(directory)
    sister = sister_of(list(stored))
    if sister is not None:
        raise not_supported(directory, sister)
    with torch.device("meta"):
        network = Pi0Network(config)
    shapes = _stored_shapes(config, network)
    places, report = _check(shapes, stored, directory)
    network.to(dtype or DTYPES[stored[_key_of("pi0.action_out_proj.weight", places)].dtype])
    network.to_empty(device=device)
    network.restore_buffers(device)
    parameters = dict(network.named_parameters())
    for key, tensor in read_tensors(stored, places):
        if places[key] == OWN_ROWS:
            parameters[EMBEDDING].data[-len(tensor) :].copy_(tensor)
        else:
            parameters[places[key]].data.copy_(tensor)
    if config.base is not None:
        _fill_from_base(config, config.base, parameters)
    return network.requires_grad_(False).eval(), report


def save_checkpoint(
    network: Pi0Network,
    directory: Path,
    statistics: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    shard_bytes: int = 4 << 30,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Write the network in LeRobot's layout to a new directory; it appears whole or not at all.

    statistics: content of openpi's norm_stats.json. tokenizer: anything with `save_pretrained`. What the base has is
    left to it. `finish` may add files before the directory appears. Raises SteerError('exists').
    """
    parameters = dict(network.named_parameters())
    places = {
        name if name == OWN_ROWS else published_of(name): name for name in _stored_shapes(network.config, network)
    }

    def tensor(key: str) -> Tensor:
        if key == OWN_ROWS:
            assert network.config.base is not None
            return parameters[EMBEDDING].data[network.config.base.words :].clone()
        return parameters[places[key]].data.contiguous().clone()

    with new_directory(directory) as work:
        sizes = {key: tensor(key).nbytes for key in places}
        write_shards(work, sizes, tensor, shard_bytes)
        (work / "config.json").write_text(json.dumps(emit_config(network.config), indent=2) + "\n", encoding="utf-8")
        (work / STATISTICS).write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(work))
        if finish is not None:
            finish(work)
    return directory


def _stored_shapes(config: Pi0Config, network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of what a checkpoint of this configuration holds itself: parameters of ours, less what the base file has."""
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    if config.base is None:
        return shapes
    for name in (BASE_EMBEDDING, *config.base.tensors):
        if of_base(name) not in shapes:
            raise SteerError(
                "bad_model_config", f"config.json takes {name!r} from a base, and the prefix has no such tensor"
            )
        del shapes[of_base(name)]
    if config.vocab > config.base.words:
        shapes[OWN_ROWS] = (config.vocab - config.base.words, config.prefix.d_model)
    return shapes


def _check(
    shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored], directory: Path
) -> tuple[dict[str, str], LoadReport]:
    """Published key -> what it fills. Raises SteerError for what is missing, unexpected, doubled or mis-shaped."""
    places: dict[str, str] = {}
    derived, unexpected = [], []
    for key in stored:
        ours = OWN_ROWS if key == OWN_ROWS else ours_of(key)
        if NEVER_READ.match(key) or NOT_PERSISTENT.search(key):
            derived.append(key)
        elif ours is None or ours not in shapes:
            unexpected.append(key)
        else:
            places[key] = ours
    if unexpected:
        raise SteerError(
            "unexpected_weights",
            f"{directory} holds {len(unexpected)} tensors that this architecture does not have ({listing(unexpected)}); "
            "expected LeRobot's layout of pi0",
        )
    missing = [published_of(name) if name != OWN_ROWS else name for name in shapes if name not in places.values()]
    if missing:
        raise SteerError(
            "missing_weights",
            f"{directory} lacks {len(missing)} tensors ({listing(missing)}); the configuration and the weights must be "
            "of the same model",
        )
    doubled = [key for key, ours in places.items() if ours != EMBEDDING and list(places.values()).count(ours) > 1]
    if doubled:
        raise SteerError("unexpected_weights", f"{directory} holds tensors twice: {listing(doubled)}")
    misshaped = [
        f"{key} is {list(stored[key].shape)}, expected {list(shapes[ours])}"
        for key, ours in places.items()
        if stored[key].shape != shapes[ours]
    ]
    odd = [f"{key} is {stored[key].dtype}" for key in places if stored[key].dtype not in DTYPES]
    if misshaped or odd:
        wrong = misshaped or odd
        raise SteerError(
            "misshaped_weights",
            f"{directory} has {len(wrong)} mis-shaped tensors, or of a dtype other than F32, BF16 and F16: {listing(wrong)}",
        )
    return places, LoadReport(len(stored), tuple(derived), ())


def _key_of(parameter: str, places: Mapping[str, str]) -> str:
    return next(key for key, ours in places.items() if ours == parameter)


def _fill_from_base(config: Pi0Config, base: BaseConfig, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises SteerError as `read_base`, and 'misshaped_weights'."""
    for name, value in read_base(base, config.prefix.heads, config.prefix.kv_heads):
        place = parameters[of_base(name)].data
        if name == BASE_EMBEDDING:
            place = place[: base.words]
        if place.shape != value.shape:
            raise SteerError(
                "misshaped_weights", f"{base.file} gives {name} {list(value.shape)}, expected {list(place.shape)}"
            )
        place.copy_(in_shell(name, value))
