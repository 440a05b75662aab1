"""Recording the expert: a folder of demonstrations that can be interrupted at any moment and continued.

Invariant: what a folder holds is decided by its `recording.json`; a run with another configuration or other versions of
the simulator is refused, and episodes that are there already are not recorded again.

    <folder>/recording.json               configuration and versions
    <folder>/episodes/<task>/demo_N.hdf5  one file an episode (see `sim.demonstrations`)
    <folder>/episodes/<task>/demo_N.failed.json  an episode whose expert failed: not kept, not tried again
    <folder>/<task>_demo.hdf5             index a task, in LIBERO's layout

Every sample (a step of `obs/image_index`) also holds what the expert would do in that very state about other targets and
in other manners, so that a policy has to read its instruction: arrays `counterfactual/*`, see `Counterfactuals`.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sim import demonstrations, layouts, plan
from sim.benchmark import load_module, require_versions, versions
from sim.demonstrations import dump, write_atomically
from sim.expert import decide
from sim.grasp import hand_yaw
from sim.manner import Manner, draw
from sim.policy_actor import PolicyActor, SharedActor
from sim.rollout import MIX, STEP_LIMIT, Actor, Assignment, Noise, Outcome, Step, follow, run
from sim.scene import CAMERAS, Goal, Scene, Snapshot
from sim.wordings import Wording, choose, say
from steer_runtime.errors import SteerError
from steer_runtime.types import Policy

PHASES: tuple[str, ...] = (
    "approach", "descend", "squeeze", "lift", "carry", "lower", "release", "falling", "retreat", "rest",
)  # fmt: skip
OTHER_MANNERS = 3
"""Counterfactuals of a sample with the episode's own target."""
DRIVEN_LIMIT = 320
"""Steps after which an episode that a policy drives ends: stuck states teach little more."""


@dataclass(frozen=True)
class Recording:
    """Configuration of a folder. size: pixels. stride: a sample every so many steps. thin: decimated meshes.
    images: samples have pictures; without them nothing is rendered, and size and thin mean nothing. driver: hash of the
    model that drives (DAgger); empty: the expert does. expert_share: of blocks of steps that the expert drives even so.

    episodes is how many there shall be; a folder may grow, everything else is fixed by its first run.
    """

    suite: str = "libero_object"
    layout: plan.LayoutMix = "random"
    styles: tuple[str, ...] = (MIX,)
    episodes: int = 100
    seed: int = 0
    tasks: tuple[int, ...] | None = None
    any_target: bool = True
    size: int = 128
    stride: int = 1
    thin: bool = True
    images: bool = True
    noise: Noise = field(default_factory=Noise)
    driver: str = ""
    expert_share: float = 1.0

    def __post_init__(self) -> None:
        if not 16 <= self.size <= 1024:
            raise SteerError("bad_camera_size", f"camera size {self.size} is not usable: expected 16 to 1024 pixels")
        if not 1 <= self.stride <= 100:
            raise SteerError("bad_stride", f"image stride {self.stride} is not usable: expected 1 to 100 steps")
        if not 0 <= self.expert_share <= 1:
            raise SteerError("bad_share", f"the expert's share {self.expert_share} is not usable: expected 0 to 1")

    def plan(self) -> list[plan.Episode]:
        """The episodes of this configuration."""
        return plan.episodes(
            self.suite,
            self.layout,
            self.styles,
            self.episodes,
            self.seed,
            tasks=self.tasks,
            any_target=self.any_target,
        )


@dataclass(frozen=True)
class Progress:
    """After an episode: recorded, failed and all of the plan; seconds it took (0 when it was there already)."""

    episode: plan.Episode
    target: str
    recorded: int
    failed: int
    total: int
    seconds: float
    steps: int


def record(
    recording: Recording,
    folder: Path,
    on_episode: Callable[[Progress], None] | None = None,
    policy: Policy | None = None,
) -> Progress | None:
    """Record what the folder still lacks. For images rendering must be set up (`use_software_rendering`).

    policy: the driver of a recording that names one; its episodes are kept however they end (DAgger).

    Raises SteerError: 'wrong_version', 'other_configuration', 'other_versions', 'in_use', 'disk_full', 'torn_file' and
    those of plans. An interruption loses at most the running episode; tasks are even whenever it comes. Returns the last
    progress.
    """
    require_versions()
    episodes = recording.plan()
    last: Progress | None = None
    with claimed(folder):
        settle_configuration(asdict(recording), folder, grows="episodes")
        for stale in (folder / "episodes").glob("*/*.part"):
            stale.unlink()
        names = plan.task_names(recording.suite)
        recorded = sum(_file(folder, names, e).exists() for e in episodes)
        failed = sum(_failure(folder, names, e).exists() for e in episodes)
        try:
            for batch in plan.in_rounds(episodes):
                missing = [
                    e for e in batch if not _file(folder, names, e).exists() and not _failure(folder, names, e).exists()
                ]
                if not missing:
                    continue
                with Scene(recording.suite, missing[0].task_id, render=recording.images) as scene:
                    if recording.images and recording.thin:
                        scene.thin_meshes()
                    targets = layouts.targets(scene)
                    for episode in missing:
                        started = time.monotonic()
                        require_room(folder)
                        target = targets[episode.target_index % len(targets)]
                        content, steps = _episode(scene, recording, episode, target, targets, policy)
                        if isinstance(content, bytes):
                            write_atomically(_file(folder, names, episode), content)
                            recorded += 1
                        else:
                            report = dump({"target": target, **content}).encode()
                            write_atomically(_failure(folder, names, episode), report)
                            failed += 1
                        seconds = time.monotonic() - started
                        last = Progress(episode, target, recorded, failed, len(episodes), seconds, steps)
                        if on_episode is not None:
                            on_episode(last)
        finally:
            if recorded:
                demonstrations.write_indices(folder)
    return last


@dataclass(frozen=True)
class Counterfactuals:
    """What the expert would do instead, asked in a snapshot: about each other target, and about its own in other manners.

    own, manner: the episode's target and manner. others: the other targets. A sample has len(others) + OTHER_MANNERS
    rows: actions float32 [K, 7]; target uint8 [K], an index into `objects`; manner uint8 [K, 3] (see `sim.manner`);
    phase uint8 [K], an index into PHASES. The other targets come first; manners are drawn anew for each sample.
    """

    goal: Goal
    objects: Sequence[str]
    own: str
    manner: Manner
    others: Sequence[str]

    def ask(self, snapshot: Snapshot, rng: np.random.Generator) -> Mapping[str, np.ndarray]:
        """The rows of one sample, by name."""
        wanted = [(name, draw(rng)) for name in self.others]
        wanted += [(self.own, self._another(rng)) for _ in range(OTHER_MANNERS)]
        answers = [decide(snapshot, name, self.goal, manner.style()) for name, manner in wanted]
        return {
            "actions": np.array([a.action for a in answers], np.float32),
            "target": np.array([self.objects.index(name) for name, _ in wanted], np.uint8),
            "manner": np.array([astuple(manner) for _, manner in wanted], np.uint8),
            "phase": np.array([PHASES.index(a.phase) for a in answers], np.uint8),
        }

    def _another(self, rng: np.random.Generator) -> Manner:
        while (manner := draw(rng)) == self.manner:
            pass
        return manner


def nameable(scene: Scene, targets: Sequence[str], moved: bool) -> list[str]:
    """The targets that an instruction can tell from all else in the scene: twins only while LIBERO's own relation does."""
    categories = [scene.category(name) for name in scene.objects]
    return [
        name
        for name in targets
        if categories.count(scene.category(name)) == 1 or (name == scene.task_target and not moved)
    ]


def _episode(
    scene: Scene,
    recording: Recording,
    episode: plan.Episode,
    target: str,
    targets: Sequence[str],
    policy: Policy | None,
) -> tuple[bytes | Mapping[str, Any], int]:
    """One episode's file, or why there is none, and its steps."""
    try:
        layout = layouts.make(scene, episode.layout, target, episode.seed)
    except SteerError as e:
        if e.code != "no_layout":
            raise
        return {"code": e.code, "sentence": str(e)}, 0
    moved = episode.layout == "random"
    others = [name for name in nameable(scene, targets, moved) if name != target]
    counterfactuals = Counterfactuals(scene.goal, scene.objects, target, episode.manner, others)
    rng = np.random.default_rng([recording.seed, episode.index, 0xCF])
    collector = _Collector(scene, recording, counterfactuals, rng)
    actor: Actor = follow(recording.noise, episode.index, episode.manner.style().speed)
    limit = STEP_LIMIT
    if policy is not None:
        spoken = say(scene.instruction(target, moved), _wordings(recording, episode))
        driven = PolicyActor(policy, scene, spoken, size=recording.size)
        actor, limit = SharedActor(driven, expert_share=recording.expert_share, seed=episode.index), DRIVEN_LIMIT
    outcome = run(
        scene,
        layout,
        Assignment(target, episode.style, episode.index, episode.manner),
        actor=actor,
        on_step=collector.add,
        step_limit=limit,
    )
    if policy is None and not outcome.released:
        return asdict(outcome), outcome.steps
    return _content(scene, recording, episode, layout, outcome, [target, *others], collector.arrays()), outcome.steps


def _wordings(recording: Recording, episode: plan.Episode) -> tuple[Wording, ...]:
    return choose(episode.manner.concepts(), episode.index + 1_000_003 * recording.seed)


def _content(
    scene: Scene,
    recording: Recording,
    episode: plan.Episode,
    layout: layouts.Layout,
    outcome: Outcome,
    named: Sequence[str],
    arrays: Mapping[str, np.ndarray],
) -> bytes:
    """An episode's file. named: the targets that it has labels for."""
    target, moved = layout.target, layout.kind == "random"
    concepts, chosen = episode.manner.concepts(), _wordings(recording, episode)
    base = scene.instruction(target, moved)
    spoken = say(base, chosen)
    problem = {"problem_name": scene.domain_name, "domain_name": "robosuite", "language_instruction": spoken}
    attributes: dict[str, demonstrations.Value] = {
        "num_samples": outcome.steps,
        "init_state": layout.state,
        "language_instruction": spoken,
        "problem_info": dump(problem),
        "base_instruction": base,
        "instructions": dump({name: scene.instruction(name, moved) for name in named}),
        "wordings": dump([w.id for w in chosen]),
        "style": episode.style,
        "manner": np.array(astuple(episode.manner), np.uint8),
        "concepts": dump(list(concepts) or ["plain"]),
        "target": target,
        "target_label": scene.label(target),
        "object_names": dump(list(scene.objects)),
        "phase_names": dump(list(PHASES)),
        "layout": episode.layout,
        "layout_seed": episode.seed,
        "episode_index": episode.index,
        "noise": dump(asdict(recording.noise)),
        "driver": recording.driver,
        "image_stride": recording.stride,
        "images": recording.images,
        "decimated": recording.images and recording.thin,
        "outcome": dump(asdict(outcome)),
        "versions": dump(versions()),
    }
    return demonstrations.build(episode.name, arrays, attributes, _file_attributes(scene, recording))


def _file_attributes(scene: Scene, recording: Recording) -> Mapping[str, demonstrations.Value]:
    """Attributes of `data`, as in LIBERO's files."""
    task = scene.task
    bddl = f"{task.bddl.parent.name}/{task.bddl.name}"
    kwargs = {
        "robots": ["Panda"],
        "bddl_file_name": bddl,
        "control_freq": 20,
        "camera_names": list(CAMERAS.values()),
        "camera_heights": recording.size,
        "camera_widths": recording.size,
        "ignore_done": True,
    }
    return {
        "env_name": scene.domain_name,
        "env_args": dump(
            {"type": 1, "env_name": scene.domain_name, "problem_name": scene.domain_name, "bddl_file": bddl}
            | {"env_kwargs": kwargs}
        ),
        "problem_info": dump(
            {
                "problem_name": scene.domain_name,
                "domain_name": "robosuite",
                "language_instruction": task.instruction,
            }
        ),
        "bddl_file_name": bddl,
        "bddl_file_content": task.bddl.read_text(),
        "macros_image_convention": "opengl",
        "tag": "libero-v1",
    }


class _Collector:
    """Gathers an episode's arrays, step by step, as the scene stands before each action."""

    def __init__(
        self, scene: Scene, recording: Recording, counterfactuals: Counterfactuals, rng: np.random.Generator
    ) -> None:
        self._scene, self._recording = scene, recording
        self._counterfactuals, self._rng = counterfactuals, rng
        self._transform = load_module("robosuite.utils.transform_utils")
        self._rows: dict[str, list[Any]] = {}

    def add(self, step: Step) -> None:
        scene, seen = self._scene, step.snapshot
        raw = scene.proprioception()
        quaternion = np.array(raw["robot0_eef_quat"], dtype=np.float64)
        position = np.array(raw["robot0_eef_pos"], dtype=np.float64)
        fingers = np.array(raw["robot0_gripper_qpos"], dtype=np.float64)
        # The function writes into its input.
        turn = self._transform.quat2axisangle(quaternion.copy())
        self._put("actions", step.executed)
        self._put("expert_actions", step.expert.action)
        self._put("states", scene.state())
        self._put("robot_states", np.concatenate([fingers, position, quaternion]))
        self._put("obs/ee_pos", position)
        self._put("obs/ee_ori", turn)
        self._put("obs/ee_states", np.concatenate([position, turn]))
        self._put("obs/gripper_states", fingers)
        self._put("obs/joint_states", np.array(raw["robot0_joint_pos"], dtype=np.float64))
        self._put("obs/gripper_command", np.float64(seen.gripper_command))
        points = np.concatenate([scene.positions(), seen.eef[None]])
        self._put("privileged/positions", points.astype(np.float32))
        turns = np.append(scene.turns(), hand_yaw(seen.rotation))
        self._put("privileged/turns", turns.astype(np.float32))
        for camera in CAMERAS:
            self._put(f"privileged/{camera}_points", scene.project(camera, points))
        self._put("privileged/phase", np.uint8(PHASES.index(step.expert.phase)))
        if step.index % self._recording.stride == 0:
            self._put("obs/image_index", np.int32(step.index))
            for name, rows in self._counterfactuals.ask(seen, self._rng).items():
                self._put(f"counterfactual/{name}", rows)
            for camera in CAMERAS if self._recording.images else ():
                self._put(f"obs/{camera}_rgb", scene.render(camera, self._recording.size))

    def arrays(self) -> dict[str, np.ndarray]:
        out = {path: np.stack(rows) for path, rows in self._rows.items()}
        steps = len(out["actions"])
        # As in LIBERO's files: one at the last step.
        ends = np.zeros(steps, np.uint8)
        ends[-1] = 1
        return {**out, "rewards": ends, "dones": ends.copy()}

    def _put(self, path: str, value: Any) -> None:
        self._rows.setdefault(path, []).append(value)


def _file(folder: Path, names: list[str], episode: plan.Episode) -> Path:
    return folder / "episodes" / names[episode.task_id] / f"{episode.name}.hdf5"


def _failure(folder: Path, names: list[str], episode: plan.Episode) -> Path:
    return folder / "episodes" / names[episode.task_id] / f"{episode.name}.failed.json"


def require_room(folder: Path) -> None:
    """Raises SteerError('disk_full') before the disk is so full that other programs fail."""
    free = shutil.disk_usage(folder).free
    if free < demonstrations.LEAST_FREE_BYTES:
        raise SteerError(
            "disk_full",
            f"only {free / 1e6:.0f} MB are free in {folder}: expected {demonstrations.LEAST_FREE_BYTES / 1e6:.0f} MB; "
            "every finished episode is safe: free some space and run the same command again",
        )


def settle_configuration(configuration: Mapping[str, Any], folder: Path, grows: str) -> None:
    """Write recording.json, or hold this run against the one that is there; only `grows` may become larger.

    Raises SteerError: 'other_configuration', 'other_versions', 'torn_file'.
    """
    # Through JSON, so that tuples compare equal to the lists they become.
    wanted = json.loads(dump({"configuration": configuration, "versions": versions()}))
    path = folder / "recording.json"
    if path.exists():
        try:
            there = json.loads(path.read_text())
            old, old_versions = there["configuration"], there["versions"]
            old_size = int(old[grows])
        except (ValueError, KeyError, TypeError):
            raise SteerError(
                "torn_file",
                f"{path} is damaged or of another kind: expected JSON with configuration and versions; "
                "record into a new folder",
            ) from None
        new = wanted["configuration"]
        differing = [k for k in new if k != grows and new[k] != old.get(k)]
        if differing:
            raise SteerError(
                "other_configuration",
                f"{folder} was recorded with "
                + ", ".join(f"{k} {old.get(k)!r} (now {new[k]!r})" for k in differing)
                + "; give the same options or another folder",
            )
        changed = [k for k, v in wanted["versions"].items() if k != "gl_backend" and old_versions.get(k) != v]
        if changed:
            raise SteerError(
                "other_versions",
                f"{folder} was recorded with "
                + ", ".join(f"{k} {old_versions.get(k)} (now {wanted['versions'][k]})" for k in changed)
                + "; install those versions or record into another folder",
            )
        if new[grows] <= old_size:
            return
    write_atomically(path, (json.dumps(wanted, indent=1, sort_keys=True) + "\n").encode())


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the folder against a second recorder. Raises SteerError('in_use', 'not_writable')."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as e:
        raise SteerError("not_writable", f"{folder} cannot be written ({e.strerror}); choose another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SteerError(
                "in_use", f"another recorder works in {folder}; wait for it or choose another folder"
            ) from None
        yield
