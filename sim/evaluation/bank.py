"""Recorded moments with neutral prompts, on which a policy is asked many times without a simulator.

Invariant: a bank is decided by its settings; it is kept beside the results, so that a run that goes on asks about the
same moments.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from sim import demonstrations, layouts
from sim.demonstrations import as_seen
from sim.evaluation.episodes import randomised
from sim.evaluation.motion import RATE_HZ
from sim.policy_actor import observation_of
from sim.rollout import Assignment, Step, run
from sim.scene import Scene
from steer_runtime.errors import SteerError, nearest
from steer_runtime.moments import Moment, load_moments, save_moments
from steer_runtime.types import Observation

NAMED_PARTS: Mapping[str, tuple[str, ...]] = {
    "approach": ("approach",), "descent": ("descend",), "carry": ("lift", "carry"), "lowering": ("lower",),
}  # fmt: skip
PARTS: tuple[tuple[str, ...], ...] = tuple(NAMED_PARTS.values())
"""Phases of the expert from which moments are taken, each part alike; squeezing and rest are left out."""
NEAR = frozenset({"descend", "lower"})
CARRIED = frozenset({"lift", "carry"})
_EVERY = 4  # steps between two candidate moments


@dataclass(frozen=True)
class BankSpec:
    """moments: how many in all. episodes: of the expert, plain, on random layouts. recording: a folder of `steer data
    record` with pictures instead, whose first `episodes` episodes are used; its moments carry what was measured. told: prompts
    keep what the episode's own instruction says of the manner. thin: decimated meshes. size: pixels."""

    moments: int = 48
    episodes: int = 6
    suite: str = "libero_object"
    seed: int = 7
    size: int = 128
    thin: bool = True
    recording: str = ""
    told: bool = False

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.moments < len(PARTS):
            raise SteerError(
                "bad_count",
                f"{self.moments} moments of {self.episodes} episodes were asked for: expected at least {len(PARTS)} of 1",
            )


def bank(
    spec: BankSpec, path: Path, tasks: Sequence[int], on_episode: Callable[[int, int], None] | None = None
) -> list[Moment]:
    """The bank stored at `path`, or a new one stored there. Rendering must be set up for a new one.

    Raises SteerError: 'torn_file', 'other_configuration', 'no_recording', 'no_pictures'.
    """
    settings = _settings(spec, tasks)
    if path.is_file():
        return _stored(path, settings)
    if spec.recording:
        chosen = recorded_moments(spec)
    else:
        chosen = _evenly(_played(spec, tasks, on_episode), spec.moments, spec.seed, tuple(NAMED_PARTS))
    save_moments(path, chosen, settings)
    # Read back, so that a first run and one that goes on hold the same numbers.
    return _stored(path, settings)


def recorded_moments(spec: BankSpec, only: Sequence[str] = ()) -> list[Moment]:
    """Moments of a recording, as many of each part as there are and `spec.moments` allows; only: of these parts.

    Raises SteerError: 'no_recording', 'no_pictures', 'torn_file', 'unknown_part'.
    """
    unknown = [name for name in only if name not in NAMED_PARTS]
    if unknown:
        raise SteerError("unknown_part", f"part {unknown[0][:40]!r} is not known: {nearest(unknown[0], NAMED_PARTS)}")
    parts = dict(zip(NAMED_PARTS, _recorded(spec), strict=True))
    return _evenly([parts[name] for name in only or NAMED_PARTS], spec.moments, spec.seed, tuple(only or NAMED_PARTS))


def bank_path(folder: Path, spec: BankSpec, tasks: Sequence[int]) -> Path:
    """Where a bank stands in a folder of results; runs with the same settings share it."""
    digest = hashlib.sha256(json.dumps(_settings(spec, tasks), sort_keys=True).encode()).hexdigest()
    return folder / f"bank-{digest[:12]}.safetensors"


def _settings(spec: BankSpec, tasks: Sequence[int]) -> dict[str, Any]:
    return {**asdict(spec), "tasks": list(tasks)}


def _played(spec: BankSpec, tasks: Sequence[int], on_episode: Callable[[int, int], None] | None) -> list[list[Moment]]:
    """Candidate moments of each part, from episodes that the expert plays."""
    parts: list[list[Moment]] = [[] for _ in PARTS]
    trials = randomised(tasks, spec.episodes, spec.seed)
    for done, trial in enumerate(sorted(trials, key=lambda t: t.task_id), start=1):
        with Scene(spec.suite, trial.task_id, render=True) as scene:
            if spec.thin:
                scene.thin_meshes()
            names = layouts.targets(scene)
            target = names[trial.target_index % len(names)]
            instruction = scene.instruction(target, moved=True)

            def keep(step: Step, scene: Scene = scene, instruction: str = instruction) -> None:
                part = _part(step.expert.phase)
                if part is None or step.index % _EVERY:
                    return
                observation = observation_of(scene, instruction, spec.size, step.index)
                parts[part].append(Moment(observation, step.snapshot.gripper_command, step.expert.phase))

            run(scene, layouts.make(scene, "random", target, trial.seed), Assignment(target), on_step=keep)
        if on_episode is not None:
            on_episode(done, spec.episodes)
    return parts


def _recorded(spec: BankSpec) -> list[list[Moment]]:
    parts: list[list[Moment]] = [[] for _ in PARTS]
    for path in demonstrations.episodes_in(Path(spec.recording))[: spec.episodes]:
        demo = demonstrations.read(path)
        a = demo.arrays
        if "obs/agentview_rgb" not in a:
            raise SteerError(
                "no_pictures", f"{path} holds no pictures: give a recording that was made without --no-images"
            )
        names = json.loads(demo.attributes["phase_names"])
        for image, index in enumerate(a["obs/image_index"]):
            phase = names[int(a["privileged/phase"][index])]
            part = _part(phase)
            if part is None or int(index) % _EVERY:
                continue
            images = {
                "agentview": np.ascontiguousarray(as_seen(a["obs/agentview_rgb"][image])),
                "wrist": np.ascontiguousarray(as_seen(a["obs/eye_in_hand_rgb"][image])),
            }
            state = np.concatenate([a["obs/ee_states"][index], a["obs/gripper_states"][index]]).astype(np.float64)
            said = str(demo.attributes["language_instruction" if spec.told else "base_instruction"])
            observation = Observation(images, state, said, stamp_ns=int(index), frame_id=int(index))
            gripper = float(a["obs/gripper_command"][index])
            parts[part].append(
                Moment(observation, gripper, phase, _measured(a, int(index)), f"{path.parent.name}/{path.stem}")
            )
    return parts


def _measured(arrays: Mapping[str, np.ndarray], index: int) -> dict[str, float]:
    """See `steer_runtime.moments.QUANTITIES`; nothing of motion at an episode's last step, which has no next one."""
    place, turn = arrays["obs/ee_states"][:, :3], arrays["obs/ee_states"][:, 3:6]
    out = {"height": float(place[index, 2] - place[0, 2]), "gripper": float(arrays["expert_actions"][index, 6])}
    if index + 1 >= len(place):
        return out
    way = place[index + 1] - place[index]
    between = Rotation.from_rotvec(turn[index + 1]) * Rotation.from_rotvec(turn[index]).inv()
    return {
        **out,
        "speed": float(np.linalg.norm(way)) * RATE_HZ,
        **{name: float(value) for name, value in zip(("dx", "dy", "dz"), way, strict=True)},
        "rotation": float(between.magnitude()),
    }


def _part(phase: str) -> int | None:
    return next((i for i, phases in enumerate(PARTS) if phase in phases), None)


def _evenly(parts: Sequence[Sequence[Moment]], count: int, seed: int, names: Sequence[str]) -> list[Moment]:
    """As many of each part as `count` allows, by seed."""
    short = [name for name, part in zip(names, parts, strict=True) if not part]
    if short:
        raise SteerError("no_recording", f"no moment of {short[0]} was found: use more episodes")
    rng = np.random.default_rng([seed, 0xBA])
    out: list[Moment] = []
    for i, part in enumerate(parts):
        wanted = min(len(part), count // len(parts) + (i < count % len(parts)))
        out += [part[j] for j in sorted(rng.choice(len(part), wanted, replace=False))]
    return out


def _stored(path: Path, settings: object) -> list[Moment]:
    moments, made_with = load_moments(path)
    if made_with != settings:
        raise SteerError(
            "other_configuration",
            f"{path} holds moments of another choice ({made_with}, now {settings}); give the same options or another --out",
        )
    return moments
