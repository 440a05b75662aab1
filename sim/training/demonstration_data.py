"""Demonstrations as a policy learns from them: what it sees and feels, what it was told, what the expert would do.

Invariant: one sample is one recorded image with its step; the label is the expert's clean action, whatever was executed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sim.demonstrations import as_seen, episodes_in, read
from sim.training.vision import network_input
from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.actions import Statistics
from steer_runtime.policies.openvla.proprioception import state_vector
from steer_runtime.policies.openvla.vision_heatmap import HeatmapTower

_ARRAYS = frozenset(
    {
        "expert_actions", "obs/ee_states", "obs/gripper_states", "obs/gripper_command", "obs/image_index",
        "obs/agentview_rgb", "obs/eye_in_hand_rgb",
    }
)  # fmt: skip
_BATCH = 64
_NARROWEST = 0.1
"""Least width of an action's range: a dimension that hardly moves is not to turn noise into full scale."""


@dataclass(frozen=True)
class DemonstrationData:
    """N samples. tokens: float16 [N, P, hidden], the frozen tower's. states: float32 [N, STATE_SIZE].

    actions: float32 [N, chunk, 7], the expert's, LIBERO's units; past an episode's end its last one is repeated.
    instructions: of each episode; episode: int64 [N], which one. digest: of the files.
    """

    tokens: Tensor
    states: Tensor
    actions: Tensor
    instructions: tuple[str, ...]
    episode: Tensor
    digest: str

    def __len__(self) -> int:
        return len(self.states)


def load_demonstrations(
    folders: Sequence[Path],
    tower: HeatmapTower,
    tower_digest: str,
    chunk: int,
    cache: Path,
    on_episode: Callable[[int, int], None] | None = None,
) -> DemonstrationData:
    """All episodes below the folders; images pass the tower once, and its tokens are kept in `cache`.

    Raises SteerError: 'no_recording', 'no_demonstration', 'torn_file', 'not_a_demonstration', 'disk_full'.
    """
    files = [path for folder in folders for path in episodes_in(folder)]
    tokens, states, actions, episode, instructions, digests = [], [], [], [], [], []
    for number, path in enumerate(files):
        demo = read(path, verify=False)
        missing = sorted(_ARRAYS - demo.arrays.keys())
        if missing:
            raise SteerError("not_a_demonstration", f"{path} holds no {', '.join(missing)}")
        digest = f"{path.parent.name}/{path.name} {demo.attributes['checksum']}"
        at = demo.arrays["obs/image_index"].astype(np.int64)
        ends = demo.arrays["expert_actions"]
        steps = np.minimum(at[:, None] + np.arange(chunk), len(ends) - 1)
        felt = np.concatenate([demo.arrays["obs/ee_states"], demo.arrays["obs/gripper_states"]], 1)[at]
        commands = demo.arrays["obs/gripper_command"][at]
        states.append(np.stack([state_vector(s, float(c)) for s, c in zip(felt, commands, strict=True)]))
        actions.append(ends[steps].astype(np.float32))
        tokens.append(_tokens(demo.arrays, tower, cache, hashlib.sha256((tower_digest + digest).encode()).hexdigest()))
        episode += [number] * len(at)
        instructions.append(str(demo.attributes["language_instruction"]))
        digests.append(digest)
        if on_episode is not None:
            on_episode(number + 1, len(files))
    return DemonstrationData(
        tokens=torch.cat(tokens),
        states=torch.from_numpy(np.concatenate(states)),
        actions=torch.from_numpy(np.concatenate(actions)),
        instructions=tuple(instructions),
        episode=torch.tensor(episode),
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
        "num_trajectories": len(data.instructions),
    }
    return {suite: entry}


def normalised(actions: Tensor, table: Statistics) -> np.ndarray:
    """float64 [..., 7] in [-1, 1] of LIBERO's actions; the gripper's -1 open, +1 close becomes 1 open, 0 close."""
    values = actions.numpy().astype(np.float64).copy()
    values[..., 6] = (1.0 - values[..., 6]) / 2
    return table.normalise(values)


@torch.no_grad()
def _tokens(arrays: object, tower: HeatmapTower, cache: Path, key: str) -> Tensor:
    from safetensors.torch import load_file, save

    from sim.demonstrations import write_atomically

    path = cache / f"{key[:32]}.safetensors"
    if path.is_file():
        return load_file(path)["tokens"]
    images = [as_seen(arrays[f"obs/{camera}_rgb"]) for camera in ("agentview", "eye_in_hand")]  # type: ignore[index]
    parts = []
    for start in range(0, len(images[0]), _BATCH):
        pixels = np.concatenate([i[start : start + _BATCH] for i in images], -1).transpose(0, 3, 1, 2)
        parts.append(tower(network_input(torch.from_numpy(pixels.copy()).float())).half())
    found = torch.cat(parts)
    write_atomically(path, save({"tokens": found}))
    return found
