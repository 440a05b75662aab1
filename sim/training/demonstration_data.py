"""Demonstrations as a policy learns from them: where things are, what the arm feels, what the expert would do.

Invariant: a label is the expert's clean action in that very state, whatever was executed; beside the episode's own there
are labels for other targets and manners in the same state, so that only the words decide between them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sim.demonstrations import as_seen, episodes_in, read
from sim.training.frame_data import object_class
from sim.training.vision import network_input
from steer_runtime.errors import SteerError
from steer_runtime.policies.objects.heatmap import HeatmapTower, bearing, geometry
from steer_runtime.policies.objects.proprioception import state_vector
from steer_runtime.policies.openvla.actions import Statistics

_ARRAYS = frozenset(
    {
        "expert_actions", "obs/ee_states", "obs/gripper_states", "obs/gripper_command", "obs/image_index",
        "privileged/positions", "privileged/turns", "privileged/agentview_points", "privileged/eye_in_hand_points",
        "counterfactual/actions", "counterfactual/target", "counterfactual/manner",
    }
)  # fmt: skip
_IMAGES = ("agentview", "eye_in_hand")
_BATCH = 64
_NARROWEST = 0.1
"""Least width of an action's range: a dimension that hardly moves is not to turn noise into full scale."""


@dataclass(frozen=True)
class DemonstrationData:
    """N samples; K further labels each; C object classes.

    exact: float32 [N, C, GEOMETRY], the simulator's own; seen: float32 [N, C, GEOMETRY], the frozen tower's, NaN where no
    picture was recorded. states: float32 [N, STATE_SIZE]. actions: float32 [N, chunk, 7], LIBERO's units; past an
    episode's end its last one is repeated. manners: int64 [N, slots]. spoken: int64 [N], index into `instructions`.
    other_actions [N, K, 7], other_manners [N, K, slots], other_spoken [N, K]; -1 where there is no further label.
    episode: int64 [N], which one. digest: of the files.
    """

    exact: Tensor
    seen: Tensor
    states: Tensor
    actions: Tensor
    manners: Tensor
    spoken: Tensor
    other_actions: Tensor
    other_manners: Tensor
    other_spoken: Tensor
    instructions: tuple[str, ...]
    episode: Tensor
    digest: str

    def __len__(self) -> int:
        return len(self.states)


def load_demonstrations(
    folders: Sequence[Path],
    classes: Sequence[str],
    chunk: int,
    tower: HeatmapTower | None = None,
    tower_digest: str = "",
    cache: Path | None = None,
    on_episode: Callable[[int, int], None] | None = None,
) -> DemonstrationData:
    """All episodes below the folders. With a tower, images pass it once, and what it sees is kept in `cache`.

    Raises SteerError: 'no_recording', 'no_demonstration', 'torn_file', 'not_a_demonstration', 'unknown_class', 'disk_full'.
    """
    files = [path for folder in folders for path in episodes_in(folder)]
    spoken: dict[str, int] = {}
    rows: dict[str, list[np.ndarray]] = {}
    digests = []
    for number, path in enumerate(files):
        demo = read(path, verify=False)
        missing = sorted(_ARRAYS - demo.arrays.keys())
        if missing:
            raise SteerError("not_a_demonstration", f"{path} holds no {', '.join(missing)}: record it again")
        digest = f"{path.parent.name}/{path.name} {demo.attributes['checksum']}"
        names = [str(n) for n in json.loads(str(demo.attributes["object_names"]))]
        said = json.loads(str(demo.attributes["instructions"]))
        index = {name: spoken.setdefault(str(text), len(spoken)) for name, text in said.items()}
        at = demo.arrays["obs/image_index"].astype(np.int64)
        ends = demo.arrays["expert_actions"]
        steps = np.minimum(at[:, None] + np.arange(chunk), len(ends) - 1)
        felt = np.concatenate([demo.arrays["obs/ee_states"], demo.arrays["obs/gripper_states"]], 1)[at]
        commands = demo.arrays["obs/gripper_command"][at]
        exact = _exact(demo.arrays, at, names, classes, path)
        seen = np.full_like(exact, np.nan)
        if tower is not None and f"obs/{_IMAGES[0]}_rgb" in demo.arrays:
            key = hashlib.sha256((tower_digest + digest).encode()).hexdigest()
            seen = _seen(demo.arrays, tower, cache, key).numpy()
        targets = demo.arrays["counterfactual/target"]
        by_number = np.array([index.get(name, -1) for name in names])
        sample = {
            "exact": exact,
            "seen": seen,
            "states": np.stack([state_vector(s, float(c)) for s, c in zip(felt, commands, strict=True)]),
            "actions": ends[steps].astype(np.float32),
            "manners": np.tile(np.array(demo.attributes["manner"], np.int64), (len(at), 1)),
            "spoken": np.full(len(at), index[str(demo.attributes["target"])], np.int64),
            "other_actions": demo.arrays["counterfactual/actions"].astype(np.float32),
            "other_manners": demo.arrays["counterfactual/manner"].astype(np.int64),
            "other_spoken": by_number[targets].astype(np.int64),
            "episode": np.full(len(at), number, np.int64),
        }
        for name, value in sample.items():
            rows.setdefault(name, []).append(value)
        digests.append(digest)
        if on_episode is not None:
            on_episode(number + 1, len(files))
    most = max(part.shape[1] for part in rows["other_spoken"])
    for name, empty in (("other_actions", 0.0), ("other_manners", 0), ("other_spoken", -1)):
        rows[name] = [_widened(part, most, empty) for part in rows[name]]
    return DemonstrationData(
        **{name: torch.from_numpy(np.concatenate(parts)) for name, parts in rows.items()},
        instructions=tuple(spoken),
        digest=hashlib.sha256("; ".join(sorted(digests)).encode()).hexdigest(),
    )


def statistics(data: DemonstrationData, suite: str) -> dict[str, object]:
    """dataset_statistics.json of the expert's actions: 1st and 99th percentile, the gripper not normalised."""
    actions = data.actions[:, 0].numpy().astype(np.float64)
    low, high = np.percentile(actions, 1, axis=0), np.percentile(actions, 99, axis=0)
    narrow = np.maximum(0.0, _NARROWEST - (high - low)) / 2
    low, high = low - narrow, high + narrow
    low[6], high[6] = 0.0, 1.0
    entry = {
        "action": {"q01": low.tolist(), "q99": high.tolist(), "mask": [True] * 6 + [False]},
        "num_transitions": len(data),
        "num_trajectories": int(data.episode.max()) + 1,
    }
    return {suite: entry}


def normalised(actions: Tensor, table: Statistics) -> np.ndarray:
    """float64 [..., 7] in [-1, 1] of LIBERO's actions; the gripper's -1 open, +1 close becomes 1 open, 0 close."""
    values = actions.numpy().astype(np.float64).copy()
    values[..., 6] = (1.0 - values[..., 6]) / 2
    return table.normalise(values)


def _exact(arrays: object, at: np.ndarray, names: list[str], classes: Sequence[str], path: Path) -> np.ndarray:
    """float32 [n, C, GEOMETRY]; an object outside a picture is not in that picture."""
    own = [object_class(name) for name in names]
    odd = sorted(set(own) - set(classes))
    if odd:
        raise SteerError(
            "unknown_class", f"{path} shows {', '.join(odd)}, which the tower has no class for: {', '.join(classes)}"
        )
    columns = [list(classes).index(name) for name in own]

    def spread(key: str, empty: float) -> Tensor:
        found = arrays[f"privileged/{key}"][at][:, : len(own)]  # type: ignore[index]
        out = np.full((len(at), len(classes), *found.shape[2:]), empty, np.float32)
        out[:, columns] = found
        return torch.from_numpy(out)

    positions = spread("positions", np.nan)
    there = ~positions[..., 0].isnan()
    places = []
    inside = []
    for camera in _IMAGES:
        points = spread(f"{camera}_points", -1.0)
        within = ((points[..., :2] >= 0) & (points[..., :2] < 1)).all(-1) & (points[..., 2] > 0)
        places.append(points[..., :2].clamp(0, 1))
        inside.append(within & there)
    turns = spread("turns", 0.0)
    hand = torch.from_numpy(arrays["privileged/turns"][at][:, -1:])  # type: ignore[index]
    values = geometry(
        places[0], positions.nan_to_num(), there.float(), places[1], inside[1].float(), bearing(turns), bearing(turns - hand)
    )  # fmt: skip
    return values.numpy().astype(np.float32)


@torch.no_grad()
def _seen(arrays: object, tower: HeatmapTower, cache: Path | None, key: str) -> Tensor:
    """float32 [n, C, GEOMETRY]."""
    from safetensors.torch import load_file, save

    from sim.demonstrations import write_atomically

    path = cache / f"{key[:32]}.safetensors" if cache is not None else None
    if path is not None and path.is_file():
        return load_file(path)["geometry"]
    images = [as_seen(arrays[f"obs/{camera}_rgb"]) for camera in _IMAGES]  # type: ignore[index]
    parts = []
    for start in range(0, len(images[0]), _BATCH):
        pixels = np.concatenate([i[start : start + _BATCH] for i in images], -1).transpose(0, 3, 1, 2)
        parts.append(tower(network_input(torch.from_numpy(pixels.copy()).float())))
    found = torch.cat(parts)
    if path is not None:
        write_atomically(path, save({"geometry": found}))
    return found


def _widened(part: np.ndarray, columns: int, empty: float) -> np.ndarray:
    missing = [(0, 0), (0, columns - part.shape[1]), *[(0, 0)] * (part.ndim - 2)]
    return np.pad(part, missing, constant_values=empty)
