"""Recorded moments: observations with what was measured at them, on which a policy is asked without a robot.

Invariant: a file holds all moments that were saved, or it is refused; it is data (safetensors), never code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_save

from steer_runtime.directions.store import write_atomically
from steer_runtime.errors import SteerError, nearest
from steer_runtime.types import Observation

SCHEMA = "steer-moments/1"


@dataclass(frozen=True)
class Moment:
    """One observation. gripper: the command given before it (-1 open, +1 close). phase: what the demonstrator was doing.

    measured: quantity -> value in the units of `QUANTITIES`; a quantity may be missing. episode: what it was taken from;
    moments of one episode are not independent.
    """

    observation: Observation
    gripper: float
    phase: str
    measured: Mapping[str, float] = field(default_factory=dict)
    episode: str = ""


QUANTITIES: Mapping[str, str] = {
    "speed": "m/s",
    "dx": "m",
    "dy": "m",
    "dz": "m",
    "height": "m",
    "rotation": "rad",
    "gripper": "-1 open, +1 close",
}
"""What a recording can tell of a moment, with its unit: speed of the hand, its way over the next control step (base
frame), height of the hand above where the episode began, angle turned over the step, the gripper command given next."""


def save_moments(path: Path, moments: Sequence[Moment], settings: Any) -> None:
    """Write moments and the JSON-able settings they were made with. Raises SteerError('not_written', 'bad_count')."""
    if not moments:
        raise SteerError("bad_count", f"no moments were given for {path}: expected at least one")
    cameras = sorted(moments[0].observation.images)
    measured = sorted({name for m in moments for name in m.measured})
    arrays: dict[str, np.ndarray] = {
        f"images/{camera}": np.stack([m.observation.images[camera] for m in moments]) for camera in cameras
    }
    arrays["state"] = np.stack([np.asarray(m.observation.state, np.float64) for m in moments])
    arrays["gripper"] = np.array([m.gripper for m in moments], np.float64)
    for name in measured:
        arrays[f"measured/{name}"] = np.array([m.measured.get(name, np.nan) for m in moments], np.float64)
    facts = {
        "schema": SCHEMA,
        "settings": settings,
        "instructions": [m.observation.instruction for m in moments],
        "phases": [m.phase for m in moments],
        "episodes": [m.episode for m in moments],
    }
    # One entry: safetensors writes several in no fixed order, and equal moments shall be equal bytes.
    write_atomically(path, safetensors_save(arrays, metadata={"moments": json.dumps(facts, sort_keys=True)}))


def load_moments(path: Path) -> tuple[list[Moment], Any]:
    """(moments, settings) of a file. Raises SteerError('no_moments', 'torn_file')."""
    if not path.is_file():
        raise SteerError("no_moments", f"there is no file of moments {path}: make one with `steer data moments`")
    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {}).get("moments", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if facts.get("schema") != SCHEMA:
            raise SteerError(
                "torn_file", f"{path} is of schema {str(facts.get('schema'))[:40]!r}: expected {SCHEMA}, as saved here"
            )
        settings = facts["settings"]
        lists = {name: facts[name] for name in ("instructions", "phases", "episodes")}
        images = {n.removeprefix("images/"): a for n, a in arrays.items() if n.startswith("images/")}
        told = {n.removeprefix("measured/"): a for n, a in arrays.items() if n.startswith("measured/")}
        count = len(arrays["state"])
        sizes = {len(part) for part in (*images.values(), *told.values(), *lists.values(), arrays["gripper"])}
        if sizes != {count} or not images:
            raise ValueError(f"its parts hold {sorted(sizes | {count})} moments")
        moments = [
            Moment(
                Observation(
                    {camera: stack[i] for camera, stack in images.items()},
                    arrays["state"][i],
                    str(lists["instructions"][i]),
                    stamp_ns=i,
                    frame_id=i,
                ),
                float(arrays["gripper"][i]),
                str(lists["phases"][i]),
                {name: float(values[i]) for name, values in told.items() if np.isfinite(values[i])},
                str(lists["episodes"][i]),
            )
            for i in range(count)
        ]
    except (SafetensorError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise SteerError("torn_file", f"{path} is damaged ({error}); delete it and make it again") from None
    return moments, settings


def measured(moments: Sequence[Moment], quantity: str) -> np.ndarray:
    """float64 [N] of one quantity. Raises SteerError('unknown_quantity') where not every moment has it."""
    known = sorted(set.intersection(*(set(m.measured) for m in moments))) if moments else []
    if quantity not in known:
        raise SteerError(
            "unknown_quantity",
            f"quantity {quantity[:40]!r} was not measured at every moment: {nearest(quantity, known)}; make moments "
            "from a recording that has it",
        )
    return np.array([m.measured[quantity] for m in moments])
