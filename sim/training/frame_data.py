"""Pictures in memory: what `steer data frames` teleported and what `steer data record` played, ready to learn from.

Invariant: images and places agree: both are as policies see them (the recorded rows turned by 180 degrees).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sim.demonstrations import as_seen, episodes_in, read
from steer_runtime.errors import SteerError

_ARRAYS = frozenset(
    {"agentview_rgb", "eye_in_hand_rgb", "positions", "turns", "agentview_points", "eye_in_hand_points"}
)
_PLAYED = {name: f"{'obs' if name.endswith('_rgb') else 'privileged'}/{name}" for name in _ARRAYS}
"""Where an episode keeps them; it has places at every step, and pictures at the steps of _PICTURED."""
_PICTURED = "obs/image_index"


@dataclass(frozen=True)
class FrameData:
    """N frames of C object classes. Absent classes have NaN.

    agentview, wrist: uint8 [N, 3, S, S]. positions: float32 [N, C, 3], world, m. places, wrist_places: float32 [N, C, 2],
    column and row as fractions of the image; NaN as well where the object is outside the picture or behind the camera.
    turns: float32 [N, C], about world z, rad; hand_turn: float32 [N], the hand's.
    digest: of the shards' names and checksums.
    """

    classes: tuple[str, ...]
    agentview: Tensor
    wrist: Tensor
    positions: Tensor
    places: Tensor
    wrist_places: Tensor
    turns: Tensor
    hand_turn: Tensor
    digest: str

    def __len__(self) -> int:
        return len(self.positions)

    def pixels(self, indices: Tensor) -> Tensor:
        """float32 [n, 6, S, S], 0 to 255."""
        return torch.cat((self.agentview[indices], self.wrist[indices]), 1).float()


def object_class(name: str) -> str:
    """'milk' of the object 'milk_1'."""
    return re.sub(r"_\d+$", "", name)


def load_frames(folders: Sequence[Path], *, classes: Sequence[str] | None = None) -> FrameData:
    """All shards and all pictured steps of episodes. classes: in which order; None: those of the data, sorted.

    Teleported frames show objects everywhere; only episodes show many ways of holding one and of letting it go.
    Raises SteerError: 'no_recording', 'torn_file', 'not_a_demonstration', 'unknown_class' (an object that `classes`
    lacks), 'mixed_sizes', 'repeated_class' (two objects of one class in a scene: a heatmap has one peak).
    """
    shards = [p for folder in folders for p in _files(folder)]
    parts: list[dict[str, np.ndarray]] = []
    names: list[list[str]] = []
    digest = []
    for path in shards:
        demo = read(path, verify=False)
        part = _pictured(demo.arrays)
        missing = sorted(_ARRAYS - part.keys())
        if missing:
            raise SteerError(
                "not_a_demonstration",
                f"{path} holds no {', '.join(missing)}: expected a shard of frames, or an episode with pictures; record it again",
            )
        own = [object_class(n) for n in json.loads(demo.attributes["object_names"])]
        if len(set(own)) != len(own):
            raise SteerError(
                "repeated_class", f"{path} shows two objects of one class ({', '.join(sorted(own))}): expected one each"
            )
        parts.append({key: part[key] for key in _ARRAYS})
        names.append(own)
        digest.append(f"{path.parent.name}/{path.name} {demo.attributes['checksum']}")
    known = tuple(classes) if classes is not None else tuple(sorted({n for own in names for n in own}))
    odd = sorted({n for own in names for n in own} - set(known))
    if odd:
        raise SteerError(
            "unknown_class", f"the frames show {', '.join(odd)}, which the tower has no class for: {', '.join(known)}"
        )
    sizes = {part["agentview_rgb"].shape[1:] for part in parts} | {part["eye_in_hand_rgb"].shape[1:] for part in parts}
    if len(sizes) != 1:
        raise SteerError("mixed_sizes", f"the shards have images of sizes {sorted(sizes)}: record them all at one size")
    return FrameData(
        classes=known,
        agentview=_images(parts, "agentview_rgb"),
        wrist=_images(parts, "eye_in_hand_rgb"),
        positions=_spread(parts, "positions", names, known),
        places=_inside(_spread(parts, "agentview_points", names, known)),
        wrist_places=_inside(_spread(parts, "eye_in_hand_points", names, known)),
        turns=_spread(parts, "turns", names, known),
        hand_turn=torch.from_numpy(np.concatenate([part["turns"][:, -1] for part in parts])),
        digest="; ".join(sorted(digest)),
    )


def _files(folder: Path) -> list[Path]:
    if (folder / "episodes").is_dir():
        return episodes_in(folder)
    found = sorted((folder / "shards").glob("shard_*.hdf5"), key=lambda p: int(p.stem.removeprefix("shard_")))
    if not found:
        raise SteerError(
            "no_recording",
            f"{folder} holds no shards of frames and no episodes; record them with `steer data frames {folder}`",
        )
    return found


def _pictured(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of _ARRAYS that a shard or an episode has, a row a picture."""
    if _PICTURED not in arrays:
        return {name: arrays[name] for name in _ARRAYS & arrays.keys()}
    at = arrays[_PICTURED].astype(np.int64)
    there = {name: key for name, key in _PLAYED.items() if key in arrays}
    return {name: arrays[key] if name.endswith("_rgb") else arrays[key][at] for name, key in there.items()}


def _images(parts: list[dict[str, np.ndarray]], key: str) -> Tensor:
    count = sum(len(part[key]) for part in parts)
    side = parts[0][key].shape[1]
    out = torch.empty((count, 3, side, side), dtype=torch.uint8)
    at = 0
    for part in parts:
        images = part.pop(key)  # frees each part as it is copied
        out[at : at + len(images)] = torch.from_numpy(as_seen(images).copy()).permute(0, 3, 1, 2)
        at += len(images)
    return out


def _spread(parts: list[dict[str, np.ndarray]], key: str, names: list[list[str]], known: tuple[str, ...]) -> Tensor:
    """float32 [N, C, ...]: each object's row under its class; the last row of a shard, the hand's, is left out."""
    out = []
    for part, own in zip(parts, names, strict=True):
        rows = np.full((len(part[key]), len(known), *part[key].shape[2:]), np.nan, np.float32)
        rows[:, [known.index(n) for n in own]] = part[key][:, : len(own)]
        out.append(rows)
    return torch.from_numpy(np.concatenate(out))


def _inside(points: Tensor) -> Tensor:
    """[N, C, 2] of [N, C, 3] (column, row, depth): NaN where the point is not in the picture."""
    place, depth = points[..., :2], points[..., 2:]
    inside = (place >= 0).all(-1, keepdim=True) & (place < 1).all(-1, keepdim=True) & (depth > 0)
    return torch.where(inside, place, torch.nan)
