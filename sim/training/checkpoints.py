"""Training checkpoints: safetensors with everything that the next step depends on.

Invariant: a file that bears its name is whole, and a file that is not whole is refused; a checkpoint is written beside
its place and renamed, so the last one survives a full disk and an interruption.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sim.demonstrations import write_atomically
from steer_runtime.errors import SteerError

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name; the rest follows from the configuration."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def save_step(folder: Path, module: nn.Module, optimiser: torch.optim.Optimizer, facts: Mapping[str, Any]) -> Path:
    """Write `step_<facts["step"]>.safetensors`: trained parameters, Adam's moments, facts (JSON). Raises as
    `write_atomically`."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained(module).items():
        tensors[f"model.{name}"] = parameter.detach()
        for moment in _MOMENTS:
            if moment in optimiser.state.get(parameter, {}):
                tensors[f"optimiser.{moment}.{name}"] = optimiser.state[parameter][moment]
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    metadata = {"facts": json.dumps(facts, sort_keys=True), "checksum": _checksum(tensors)}
    path = folder / f"step_{int(facts['step']):08d}.safetensors"
    write_atomically(path, save(tensors, metadata))
    return path


def newest(folder: Path) -> Path | None:
    """The checkpoint of the latest step."""
    found = sorted(folder.glob("step_*.safetensors"))
    return found[-1] if found else None


def load_step(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint back; returns its facts. Raises SteerError: 'torn_checkpoint', 'other_checkpoint'."""
    tensors, facts = read_step(path)
    parameters = trained(module)
    stored = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    odd = sorted(set(stored) ^ set(parameters)) or [n for n, t in stored.items() if t.shape != parameters[n].shape]
    if odd:
        raise SteerError(
            "other_checkpoint",
            f"{path} is of another model: {', '.join(odd[:3])} differ; resume with the configuration that began the run",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])
            moments = {m: tensors[f"optimiser.{m}.{name}"] for m in _MOMENTS if f"optimiser.{m}.{name}" in tensors}
            if moments:
                optimiser.state[parameter] = moments
    return facts


def read_step(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint. Raises SteerError('torn_checkpoint')."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        facts = json.loads(metadata["facts"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _torn(path, f"{error}") from None
    if metadata.get("checksum") != _checksum(tensors):
        raise _torn(path, "its checksum does not fit")
    return tensors, facts


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in sorted(folder.glob("step_*.safetensors"))[:-keep]:
        with contextlib.suppress(OSError):
            path.unlink()


def _torn(path: Path, why: str) -> SteerError:
    return SteerError(
        "torn_checkpoint",
        f"{path} is torn or damaged ({why[:100]}); delete it, and the same command resumes from the checkpoint before it",
    )


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total = zlib.crc32(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), total)
    return f"{total:08x}"
