"""A vision tower on its own: `vision.safetensors` and its card.

Invariant: the tensors bear the names that they have in a policy's checkpoint, so a policy takes them over as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from sim.demonstrations import write_atomically
from steer_runtime.errors import SteerError
from steer_runtime.policies.objects.config import HeatmapConfig
from steer_runtime.policies.objects.heatmap import HeatmapTower
from steer_runtime.policies.openvla.model import OpenVLAModel

WEIGHTS, CARD = "vision.safetensors", "card.json"
_ROOT = "vision_backbone.heatmap."


@dataclass(frozen=True)
class TowerFile:
    """A tower read back. digest: sha256 of its file."""

    tower: HeatmapTower
    heat: HeatmapConfig
    image_size: int
    card: Mapping[str, Any]
    digest: str


def save_tower(
    tower: HeatmapTower, heat: HeatmapConfig, image_size: int, folder: Path, about: Mapping[str, Any]
) -> Path:
    """Write weights (float16) and card.json (`about`, and what the tower is). Raises as `write_atomically`."""
    content = save({_ROOT + name: p.detach().half().contiguous() for name, p in tower.named_parameters()})
    shape = {"heatmap": asdict(heat), "image_size": image_size}
    card = {**about, "tower": shape, "sha256": hashlib.sha256(content).hexdigest(), "dtype": "float16"}
    write_atomically(folder / WEIGHTS, content)
    write_atomically(folder / CARD, (json.dumps(card, indent=2) + "\n").encode())
    return folder


def load_tower(folder: Path) -> TowerFile:
    """Raises SteerError: 'no_checkpoint', 'torn_file', 'missing_weights'."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        content = (folder / WEIGHTS).read_bytes()
        shape = card["tower"]
        heat = dict(shape["heatmap"])
        config = HeatmapConfig(classes=tuple(heat.pop("classes")), **heat)
        size = int(shape["image_size"])
    except FileNotFoundError as error:
        raise SteerError(
            "no_checkpoint", f"{error.filename} is not there: train a tower with `steer train vision`, or mend the path"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SteerError("torn_file", f"{folder / CARD} is not a tower's card ({error!r:.100})") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != card.get("sha256"):
        raise SteerError("torn_file", f"{folder / WEIGHTS} does not have the sha256 of its card; get the file again")
    try:
        stored = {name.removeprefix(_ROOT): tensor for name, tensor in load(content).items()}
        tower = HeatmapTower(config, size)
        tower.load_state_dict({name: tensor.to(torch.float32) for name, tensor in stored.items()})
    except (SafetensorError, RuntimeError) as error:
        raise SteerError(
            "missing_weights", f"{folder / WEIGHTS} does not fill the tower of its card: {error}"
        ) from None
    return TowerFile(tower.eval(), config, size, card, digest)


def tower_of(policy: OpenVLAModel, digest: str) -> TowerFile:
    """The tower that a loaded policy sees with; digest: of the policy. Raises SteerError('other_checkpoint')."""
    heat = policy.config.heatmap
    if heat is None:
        raise SteerError(
            "other_checkpoint", f"{policy.config.name!r} does not see objects: give a trained pocket policy"
        )
    return TowerFile(policy.heatmap, heat, policy.config.image_size, {}, digest)
