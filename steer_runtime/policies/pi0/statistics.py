"""Means and standard deviations of a Pi0's states and actions, from LeRobot's or openpi's files.

    state' = (state - mean) / (std + eps),   action = action' * (std + eps') + mean

Invariant: without statistics there is no policy; an identity in their place explains the 0 % that users of statistics-free
checkpoints report. eps and eps' are those of the code that wrote the file: LeRobot 1e-8 and 0, openpi 1e-6 both ways.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from steer_runtime.errors import SteerError
from steer_runtime.policies.shards import listing

DELTA_DIMS = 6
"""Action dimensions that openpi's extra delta transform makes relative to the state: all but the gripper."""


@dataclass(frozen=True)
class Normal:
    """Mean and standard deviation of each dimension."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.mean)


@dataclass(frozen=True)
class Pi0Statistics:
    """source: the file, for people."""

    state: Normal
    action: Normal
    state_eps: float
    action_eps: float
    source: str

    def normalise_state(self, state: np.ndarray) -> np.ndarray:
        """float64 [D] from the robot's state [D]; the file may have more dimensions (padding), not fewer.

        Raises SteerError('bad_state') for other sizes and for what is not finite.
        """
        given = np.asarray(state, dtype=np.float64)
        if given.ndim != 1 or not 0 < len(given) <= len(self.state):
            raise SteerError(
                "bad_state",
                f"the state is {list(given.shape)}: expected 1 to {len(self.state)} numbers, as {self.source} has",
            )
        if not np.isfinite(given).all():
            raise SteerError("bad_state", "the state holds NaN or infinite values: the observation is refused")
        n = len(given)
        mean, std = np.asarray(self.state.mean[:n]), np.asarray(self.state.std[:n])
        return (given - mean) / (std + self.state_eps)

    def unnormalise(self, actions: np.ndarray) -> np.ndarray:
        """float64 [..., D] from normalised [..., D]; the file may have more dimensions, not fewer."""
        n = actions.shape[-1]
        mean, std = np.asarray(self.action.mean[:n]), np.asarray(self.action.std[:n])
        return actions * (std + self.action_eps) + mean

    def normalise_action(self, actions: np.ndarray) -> np.ndarray:
        """Inverse of `unnormalise`; a dimension that never moved maps to 0."""
        n = actions.shape[-1]
        mean, width = np.asarray(self.action.mean[:n]), np.asarray(self.action.std[:n]) + self.action_eps
        return np.where(width > 0, (actions - mean) / np.where(width > 0, width, 1.0), 0.0)


def add_state(actions: np.ndarray, state: np.ndarray) -> np.ndarray:
    """openpi's extra delta transform undone: the state [>= 6] is added to the first six dimensions of actions [T, D].

    Source: openpi `AbsoluteActions` with the mask of its pi0_libero configuration.
    """
    moved = actions.copy()
    moved[..., :DELTA_DIMS] += np.asarray(state, dtype=np.float64)[:DELTA_DIMS]
    return moved


def read_statistics(checkpoint: Path, explicit: Path | None = None) -> Pi0Statistics:
    """Statistics of a file, or of the first kind that the checkpoint has: LeRobot's, then openpi's.

    explicit: a LeRobot `.safetensors` or an openpi `norm_stats.json`. openpi keeps it in `assets/<data set>/`.
    Raises SteerError('no_statistics') when there are none, several, or none that can be used.
    """
    if explicit is not None:
        if not explicit.is_file():
            raise SteerError("no_statistics", f"{explicit} is not a file: give a LeRobot or openpi statistics file")
        return _openpi(explicit) if explicit.suffix == ".json" else _lerobot([explicit])
    lerobot = sorted(
        [*checkpoint.glob("policy_preprocessor*.safetensors"), *checkpoint.glob("policy_postprocessor*.safetensors")],
        key=lambda path: path.name.startswith("policy_post"),
    )
    if lerobot:
        return _lerobot(lerobot)
    openpi = [
        p
        for p in (checkpoint / "norm_stats.json", *sorted(checkpoint.glob("assets/**/norm_stats.json")))
        if p.is_file()
    ]
    if len(openpi) > 1:
        raise SteerError(
            "no_statistics",
            f"{checkpoint} has statistics of several data sets ({listing(str(p.relative_to(checkpoint)) for p in openpi)}): "
            "name one of them as `statistics`",
        )
    if openpi:
        return _openpi(openpi[0])
    raise SteerError(
        "no_statistics",
        f"{checkpoint} has no statistics (policy_preprocessor*.safetensors or norm_stats.json): actions would be unscaled; "
        "use a fine-tuned checkpoint or name its data set's file as `statistics`",
    )


def _lerobot(paths: Sequence[Path]) -> Pi0Statistics:
    found: dict[str, np.ndarray] = {}
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    if key.endswith((".mean", ".std")):
                        found.setdefault(key, file.get_tensor(key))
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise SteerError(
                "no_statistics", f"{path} is not a whole safetensors file ({error}); download it again"
            ) from None
    normals = {}
    for name in ("observation.state", "action"):
        missing = [f"{name}.{part}" for part in ("mean", "std") if f"{name}.{part}" not in found]
        if missing:
            raise SteerError(
                "no_statistics",
                f"{paths[0]} has no {listing(missing)}: a base checkpoint carries none; use a fine-tuned one or name its "
                "data set's file as `statistics`",
            )
        normals[name] = _normal(found[f"{name}.mean"], found[f"{name}.std"], f"{paths[0]} ({name})")
    return Pi0Statistics(normals["observation.state"], normals["action"], 1e-8, 0.0, paths[0].name)


def _openpi(path: Path) -> Pi0Statistics:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        table: Mapping[str, Any] = raw.get("norm_stats", raw)
        parts = {name: (table[name]["mean"], table[name]["std"]) for name in ("state", "actions")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SteerError(
            "no_statistics", f"{path} is no norm_stats.json ({error!r}): expected state and actions, mean and std each"
        ) from None
    state, action = (_normal(*parts[name], f"{path} ({name})") for name in ("state", "actions"))
    return Pi0Statistics(state, action, 1e-6, 1e-6, path.name)


def _normal(mean: Any, std: Any, source: str) -> Normal:
    try:
        means, stds = (np.asarray(part, dtype=np.float64) for part in (mean, std))
    except (TypeError, ValueError) as error:
        raise SteerError("no_statistics", f"{source} is not usable ({error}): expected numbers") from None
    if means.ndim != 1 or means.shape != stds.shape or len(means) == 0:
        raise SteerError(
            "no_statistics", f"{source} has mean {list(means.shape)} and std {list(stds.shape)}: expected one size, [D]"
        )
    if not (np.isfinite(means).all() and np.isfinite(stds).all()) or (stds < 0).any():
        raise SteerError("no_statistics", f"{source} holds NaN, infinite values or a negative std: download it again")
    return Normal(tuple(means.tolist()), tuple(stds.tolist()))
