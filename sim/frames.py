"""Pictures for learning to see: real arm poses, objects teleported at random, positions known.

Invariant: shard `n` of a folder depends only on the configuration and `n`. Nothing is simulated between frames, so a
frame costs its rendering; arm poses come from the expert's disturbed episodes, EPISODES_PER_SHARD of them a
shard. Frames look like those of episodes but for physics: what is held stays in the hand, everything else stands on the ground.

    <folder>/recording.json          configuration and versions
    <folder>/shards/shard_N.hdf5     images {agentview, eye_in_hand}_rgb uint8 [n, H, W, 3] (rows as in LIBERO's files),
                                     positions float32 [n, objects + 1, 3] (the last is the grip site, m),
                                     turns float32 [n, objects + 1] (about z, rad; the last is the hand's),
                                     <camera>_points float32 [n, objects + 1, 3] (column, row, depth, see Scene.project),
                                     states float64 [n, ...]; attributes object_names, task, target, schema
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sim import layouts, plan
from sim.benchmark import require_versions, versions
from sim.demonstrations import Value, build, dump, write_atomically
from sim.grasp import hand_yaw
from sim.record import claimed, require_room, settle_configuration
from sim.rollout import STYLES, Assignment, Noise, Step, follow, run
from sim.scene import CAMERAS, Scene
from steer_runtime.errors import SteerError

EPISODES_PER_SHARD = 1
"""Expert episodes whose arm poses a shard uses; each costs as much as a few hundred frames."""
STAYS = 0.1
"""Share of frames in which the objects stay where the episode had them."""
MAX_SHARD_FRAMES = 400
"""Keeps a shard of 128-pixel frames under 45 MB even when nothing compresses."""
HELD_PHASES = frozenset({"squeeze", "lift", "carry", "lower", "release"})


@dataclass(frozen=True)
class Frames:
    """Configuration. shards: how many files; frames: pictures a shard and camera; size: pixels."""

    suite: str = "libero_object"
    shards: int = 40
    frames: int = 256
    seed: int = 0
    size: int = 128
    thin: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.frames <= MAX_SHARD_FRAMES:
            raise SteerError(
                "bad_count", f"{self.frames} frames a shard were asked for: expected 1 to {MAX_SHARD_FRAMES}"
            )
        if not 16 <= self.size <= 1024:
            raise SteerError("bad_camera_size", f"camera size {self.size} is not usable: expected 16 to 1024 pixels")


def record_frames(frames: Frames, folder: Path, on_shard: Callable[[int, int], None] | None = None) -> int:
    """Record the shards that the folder lacks; returns how many it made. on_shard gets (shards done, all).

    Raises what `sim.record.record` raises.
    """
    require_versions()
    if frames.suite not in plan.PICK_AND_PLACE:
        raise SteerError("unknown_suite", f"the expert does not know suite {frames.suite[:80]!r}")
    tasks = plan.PICK_AND_PLACE[frames.suite]
    made = 0
    with claimed(folder):
        settle_configuration(asdict(frames), folder, grows="shards")
        for stale in (folder / "shards").glob("*.part"):
            stale.unlink()
        missing = [n for n in range(frames.shards) if not _shard(folder, n).exists()]
        done = frames.shards - len(missing)
        for task_id in tasks:
            mine = [n for n in missing if tasks[n % len(tasks)] == task_id]
            if not mine:
                continue
            with Scene(frames.suite, task_id, render=True) as scene:
                if frames.thin:
                    scene.thin_meshes()
                for number in mine:
                    require_room(folder)
                    write_atomically(_shard(folder, number), _content(scene, frames, number))
                    made, done = made + 1, done + 1
                    if on_shard is not None:
                        on_shard(done, frames.shards)
    return made


def _shard(folder: Path, number: int) -> Path:
    return folder / "shards" / f"shard_{number}.hdf5"


def _content(scene: Scene, frames: Frames, number: int) -> bytes:
    rng = np.random.default_rng([frames.seed, number])
    names = layouts.targets(scene)
    settled = scene.begin(scene.task.initial_states[0])
    rest = scene.state()
    styles = list(STYLES)
    pool: list[tuple[np.ndarray, frozenset[str], str]] = []
    for episode in range(EPISODES_PER_SHARD):
        target = names[int(rng.integers(len(names)))]
        layout = layouts.make(scene, "random", target, int(rng.integers(2**31)))

        def keep_pose(step: Step, target: str = target) -> None:
            held = step.expert.phase in HELD_PHASES
            # Something let go into a container is not to float there alone.
            inside = step.expert.phase in ("lower", "release", "falling", "retreat", "rest")
            kept = {target} if held or inside else set()
            kept |= {scene.goal.owner} & set(scene.objects) if inside else set()
            pool.append((scene.state(), frozenset(kept), target))

        noise = Noise(0.3, 0.15, gripper=0.01)
        style = styles[int(rng.integers(len(styles)))]
        run(
            scene,
            layout,
            Assignment(target, style, episode),
            actor=follow(noise, frames.seed * 1_000_003 + number * EPISODES_PER_SHARD + episode),
            on_step=keep_pose,
        )
    rows: dict[str, list[np.ndarray]] = {}
    while len(rows.get("states", ())) < frames.frames:
        robot, kept, target = pool[int(rng.integers(len(pool)))]
        state: np.ndarray | None = robot
        if rng.random() > STAYS:
            state = layouts.teleported(scene, settled, rest, robot, target, kept, rng)
        if state is None:
            continue
        scene.show(state)
        seen = scene.snapshot()
        points = np.concatenate([scene.positions(), seen.eef[None]])
        rows.setdefault("states", []).append(state)
        rows.setdefault("positions", []).append(points.astype(np.float32))
        turns = np.append(scene.turns(), hand_yaw(seen.rotation))
        rows.setdefault("turns", []).append(turns.astype(np.float32))
        for camera in CAMERAS:
            rows.setdefault(f"{camera}_points", []).append(scene.project(camera, points))
            rows.setdefault(f"{camera}_rgb", []).append(scene.render(camera, frames.size))
    attributes: dict[str, Value] = {
        "num_samples": frames.frames,
        "object_names": dump(list(scene.objects)),
        "task": scene.task.name,
        "configuration": dump(asdict(frames)),
        "versions": dump(versions()),
    }
    arrays = {name: np.stack(values) for name, values in rows.items()}
    return build(f"shard_{number}", arrays, attributes, {"macros_image_convention": "opengl"})
