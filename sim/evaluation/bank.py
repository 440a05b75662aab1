"""Recorded moments with neutral prompts, on which a policy is asked many times without a simulator.

Invariant: a bank is decided by its settings; it is kept beside the results, so that a run that goes on asks about the
same moments.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sim import demonstrations, layouts
from sim.demonstrations import as_seen, write_atomically
from sim.evaluation.episodes import randomised
from sim.policy_actor import observation_of
from sim.record import PHASES
from sim.rollout import Assignment, Step, run
from sim.scene import Scene
from steer_runtime.errors import SteerError
from steer_runtime.types import Observation

PARTS: tuple[tuple[str, ...], ...] = (("approach",), ("descend",), ("lift", "carry"), ("lower",))
"""Phases of the expert from which moments are taken, each part alike; squeezing and rest are left out."""
NEAR = frozenset({"descend", "lower"})
CARRIED = frozenset({"lift", "carry"})
_EVERY = 4  # steps between two candidate moments


@dataclass(frozen=True)
class Moment:
    """One observation, the gripper command given before it (-1 open, +1 close) and the phase the expert saw."""

    observation: Observation
    gripper: float
    phase: str


@dataclass(frozen=True)
class BankSpec:
    """moments: how many in all. episodes: of the expert, plain, on random layouts. recording: a folder of `steer data
    record` with pictures instead, whose first `episodes` episodes are used. thin: decimated meshes. size: pixels."""

    moments: int = 48
    episodes: int = 6
    suite: str = "libero_object"
    seed: int = 7
    size: int = 128
    thin: bool = True
    recording: str = ""

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
    found = _recorded(spec) if spec.recording else _played(spec, tasks, on_episode)
    chosen = _evenly(found, spec.moments, spec.seed)
    write_atomically(path, _bytes(chosen, settings))
    # Read back, so that a first run and one that goes on hold the same numbers.
    return _stored(path, settings)


def bank_path(folder: Path, spec: BankSpec, tasks: Sequence[int]) -> Path:
    """Where a bank stands in a folder of results; runs with the same settings share it."""
    digest = hashlib.sha256(json.dumps(_settings(spec, tasks), sort_keys=True).encode()).hexdigest()
    return folder / f"bank-{digest[:12]}.npz"


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
            neutral = str(demo.attributes["base_instruction"])
            observation = Observation(images, state, neutral, stamp_ns=int(index), frame_id=int(index))
            parts[part].append(Moment(observation, float(a["obs/gripper_command"][index]), phase))
    return parts


def _part(phase: str) -> int | None:
    return next((i for i, phases in enumerate(PARTS) if phase in phases), None)


def _evenly(parts: Sequence[Sequence[Moment]], count: int, seed: int) -> list[Moment]:
    """As many of each part as `count` allows, by seed."""
    short = [PARTS[i] for i, part in enumerate(parts) if not part]
    if short:
        raise SteerError("no_recording", f"no moment of phase {short[0]} was found: use more episodes")
    rng = np.random.default_rng([seed, 0xBA])
    out: list[Moment] = []
    for i, part in enumerate(parts):
        wanted = min(len(part), count // len(parts) + (i < count % len(parts)))
        out += [part[j] for j in sorted(rng.choice(len(part), wanted, replace=False))]
    return out


def _bytes(moments: Sequence[Moment], settings: object) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        settings=np.array(json.dumps(settings, sort_keys=True)),
        agentview=np.stack([m.observation.images["agentview"] for m in moments]),
        wrist=np.stack([m.observation.images["wrist"] for m in moments]),
        state=np.stack([m.observation.state for m in moments]),
        instruction=np.array([m.observation.instruction for m in moments]),
        gripper=np.array([m.gripper for m in moments]),
        phase=np.array([PHASES.index(m.phase) for m in moments], np.uint8),
    )
    return buffer.getvalue()


def _stored(path: Path, settings: object) -> list[Moment]:
    try:
        with np.load(path, allow_pickle=False) as file:
            a = {name: file[name] for name in file.files}
        made_with = json.loads(str(a["settings"]))
        moments = [
            Moment(
                Observation(
                    {"agentview": a["agentview"][i], "wrist": a["wrist"][i]},
                    a["state"][i],
                    str(a["instruction"][i]),
                    stamp_ns=i,
                    frame_id=i,
                ),
                float(a["gripper"][i]),
                PHASES[int(a["phase"][i])],
            )
            for i in range(len(a["state"]))
        ]
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise SteerError("torn_file", f"{path} is damaged ({error}); delete it, and it is made again") from None
    if made_with != settings:
        raise SteerError(
            "other_configuration",
            f"{path} holds moments of another choice ({made_with}, now {settings}); give the same options or another --out",
        )
    return moments
