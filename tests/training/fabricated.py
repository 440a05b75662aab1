"""Small recordings in the real formats: coloured squares whose places are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sim.demonstrations import Value, build, dump, write_atomically

OBJECTS = ("milk_1", "basket_1", "soup_1")
COLOURS = np.array([[230, 40, 40], [40, 230, 40], [60, 60, 240]], dtype=np.uint8)


def frames_folder(folder: Path, *, shards: int = 2, frames: int = 24, size: int = 64, seed: int = 0) -> Path:
    """Shards as `steer data frames` writes them; position = (column - 0.5, row - 0.5, 0) m of a 10-pixel square."""
    for number in range(shards):
        rng = np.random.default_rng([seed, number])
        places = rng.uniform(0.1, 0.9, (frames, len(OBJECTS), 2))
        images = np.full((frames, size, size, 3), 90, dtype=np.uint8)
        for n in range(frames):
            for k in range(len(OBJECTS)):
                column, row = (places[n, k] * size).astype(int)
                images[n, max(0, row - 5) : row + 5, max(0, column - 5) : column + 5] = COLOURS[k]
        positions = np.concatenate([places - 0.5, np.zeros((frames, len(OBJECTS), 1))], -1)
        hand = np.zeros((frames, 1, 3))
        points = np.concatenate([places, np.ones((frames, len(OBJECTS), 1))], -1)
        recorded = images[:, ::-1, ::-1]
        arrays = {
            "agentview_rgb": np.ascontiguousarray(recorded),
            "eye_in_hand_rgb": np.ascontiguousarray(recorded),
            "positions": np.concatenate([positions, hand], 1).astype(np.float32),
            "turns": rng.uniform(-3, 3, (frames, len(OBJECTS) + 1)).astype(np.float32),
            "agentview_points": np.concatenate([points, hand], 1).astype(np.float32),
            "eye_in_hand_points": np.concatenate([points, hand], 1).astype(np.float32),
            "states": np.zeros((frames, 5)),
        }
        attributes = {"num_samples": frames, "object_names": dump(list(OBJECTS)), "task": "fabricated"}
        write_atomically(folder / "shards" / f"shard_{number}.hdf5", build(f"shard_{number}", arrays, attributes, {}))
    return folder


def demonstrations_folder(
    folder: Path, *, episodes: int = 3, steps: int = 12, size: int = 64, seed: int = 0, stride: int = 1,
    pictures: bool = True,
) -> Path:  # fmt: skip
    """Episodes as `steer data record` writes them: the action leads to the told object, fast or slow as told."""
    instructions = {"milk_1": "pick up the milk", "soup_1": "pick up the soup"}
    manners = np.array([[4, 1, 1], [0, 1, 1]])
    for number in range(episodes):
        rng = np.random.default_rng([seed, number])
        own = 2 * (number % 2)  # of OBJECTS: milk or soup
        at = rng.uniform(-0.3, 0.3, (steps, 3))
        positions = np.concatenate([np.tile(rng.uniform(-0.3, 0.3, (1, 3, 3)), (steps, 1, 1)), at[:, None]], 1)
        gripper = np.where(np.arange(steps) < steps // 2, -1.0, 1.0)

        def lead(
            target: int, manner: np.ndarray, at: np.ndarray = at, positions: np.ndarray = positions,
            gripper: np.ndarray = gripper,
        ) -> np.ndarray:  # fmt: skip
            size = 0.8 if manner[0] == 4 else 0.3
            turn = np.zeros((len(at), 3))
            return np.concatenate([np.sign(positions[:, target] - at) * size, turn, gripper[:, None]], 1)

        actions = lead(own, manners[number % 2])
        others = [(2 - own, manners[number % 2]), (own, manners[1 - number % 2])]
        places = np.concatenate([positions[..., :2] + 0.5, np.ones((steps, 4, 1))], -1).astype(np.float32)
        sampled = np.arange(0, steps, stride, dtype=np.int32)
        command = np.where(np.arange(steps) < steps // 2, -1.0, 1.0)
        images = rng.integers(0, 255, (len(sampled), size, size, 3), dtype=np.uint8)
        arrays = {
            "actions": actions,
            "expert_actions": actions,
            "obs/ee_states": np.concatenate([at, np.zeros((steps, 3))], 1),
            "obs/gripper_states": np.tile([0.04, -0.04], (steps, 1)),
            "obs/gripper_command": command,
            "obs/image_index": sampled,
            "obs/agentview_rgb": images,
            "obs/eye_in_hand_rgb": images[::-1].copy(),
            "privileged/positions": positions.astype(np.float32),
            "privileged/turns": np.tile(rng.uniform(-3, 3, (1, positions.shape[1])), (steps, 1)).astype(np.float32),
            "privileged/agentview_points": places,
            "privileged/eye_in_hand_points": places,
            "counterfactual/actions": np.stack([lead(*other)[sampled] for other in others], 1).astype(np.float32),
            "counterfactual/target": np.tile(np.array([t for t, _ in others], np.uint8), (len(sampled), 1)),
            "counterfactual/manner": np.tile(np.array([m for _, m in others], np.uint8), (len(sampled), 1, 1)),
        }
        if not pictures:
            arrays = {name: value for name, value in arrays.items() if not name.endswith("_rgb")}
        attributes: dict[str, Value] = {
            "num_samples": steps,
            "object_names": dump(list(OBJECTS)),
            "target": OBJECTS[own],
            "manner": manners[number % 2],
            "instructions": dump(instructions),
        }
        path = folder / "episodes" / "task" / f"demo_{number}.hdf5"
        write_atomically(path, build(f"demo_{number}", arrays, attributes, {}))
    return folder
