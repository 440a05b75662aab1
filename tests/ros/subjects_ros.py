"""What the ROS tests and benchmarks steer: a tiny policy on disk and directions that visibly change its actions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from steer_runtime.directions.direction import Direction, Neurons
from steer_runtime.types import Policy


def write_policy(root: Path, fabricate: Any) -> Path:
    """A checkpoint of tests/fabricate.py and the configuration file that names it."""
    fabricate.save_tiny(root / "checkpoint")
    path = root / "tiny.yaml"
    path.write_text("kind: openvla\nname: tiny\ncheckpoint: checkpoint\nsuite: libero_object\n")
    return path


def make_direction(
    policy: Policy, name: str, alpha: float, *, max_strength: float = 1.0, tower_name: str = "lm"
) -> Direction:
    """Twenty neurons over all layers, strong enough to change the actions of a tiny policy."""
    tower = policy.towers[tower_name]
    flat = np.random.default_rng(len(name)).choice(tower.layers * tower.d_ff, size=20, replace=False)
    return Direction(
        name=name,
        tower=tower_name,
        model_hash=policy.model_hash,
        layers=tower.layers,
        d_model=tower.d_model,
        d_ff=tower.d_ff,
        neurons=Neurons(
            layer=(flat // tower.d_ff).astype(np.int32),
            neuron=(flat % tower.d_ff).astype(np.int32),
            alpha=np.full(20, alpha, np.float32),
        ),
        max_strength=max_strength,
    )
