"""Episodes of a policy in LIBERO: planned as trials, run scene by scene, one line of results each.

Invariant: a trial decides its scene, layout, target and instruction, and does not depend on how many others there are or
which of them ran before; so a longer run begins with the episodes of a shorter one.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch

from sim import grasp, layouts
from sim.benchmark import SETTLE_STEPS, require_versions, step_limit, versions
from sim.evaluation.motion import Motion, Watch
from sim.plan import PICK_AND_PLACE
from sim.policy_actor import CAMERA_SIZE, PolicyActor
from sim.scene import Scene
from sim.wordings import Concept, Split, choose, say
from steer_runtime.errors import SteerError, nearest
from steer_runtime.policies import LoadedPolicy
from steer_runtime.results import Results
from steer_runtime.types import ActionChunk, Observation

Meshes = Literal["original", "thin"]
Until = Literal["released", "placed", "lifted"]
Infer = Callable[[Observation], ActionChunk]
GRACE = 40
"""Steps after success in which the policy may still let go; the step limit holds all the same."""


@dataclass(frozen=True)
class Setting:
    """What all episodes of a run share. meshes: original ones are the benchmark's, thin ones five times cheaper.

    size: pixels of both cameras. limit: control steps, None for the suite's own. split: of the wordings. until: what ends
    an episode before the limit: the target released (at most GRACE steps after success), any object placed, or lifted.
    """

    suite: str = "libero_object"
    meshes: Meshes = "original"
    size: int = CAMERA_SIZE
    limit: int | None = None
    split: Split = "train"
    until: Until = "released"

    def __post_init__(self) -> None:
        if self.suite not in PICK_AND_PLACE:
            raise SteerError(
                "unknown_suite",
                f"the evaluation does not know suite {self.suite[:80]!r}: {nearest(self.suite, PICK_AND_PLACE)}",
            )
        for label, value, known in (
            ("meshes", self.meshes, ("original", "thin")),
            ("split", self.split, ("train", "held_out")),
        ):
            if value not in known:
                raise SteerError(
                    f"unknown_{label}", f"{label} {value[:40]!r} are not known: expected {' or '.join(known)}"
                )
        if not 16 <= self.size <= 1024:
            raise SteerError("bad_camera_size", f"camera size {self.size} is not usable: expected 16 to 1024 pixels")
        if self.limit is not None and self.limit < 1:
            raise SteerError("bad_count", f"a limit of {self.limit} steps was given: expected at least 1")

    @property
    def steps(self) -> int:
        """Control steps an episode may take."""
        return step_limit(self.suite) if self.limit is None else self.limit


@dataclass(frozen=True)
class Trial:
    """One episode. key: unique and stable. layout "official": initial state `seed` of the task; else a layout of that seed.

    target_index: whose layout, modulo the scene's targets. asked: 0, that object; k, the k-th other one that can be
    grasped. concepts: what the wording says; none leaves LIBERO's instruction as it is. condition: of the experiment.
    """

    key: str
    task_id: int
    layout: layouts.Kind
    seed: int
    target_index: int = 0
    asked: int = 0
    concepts: tuple[Concept, ...] = ()
    condition: str = ""


def official(tasks: Sequence[int], initial_states: int, concepts: tuple[Concept, ...] = ()) -> list[Trial]:
    """The benchmark's protocol: initial states 0 to n - 1 of every task, the task's own object.

    All tasks' state i come before state i + 1, so that a part of it already shows every task.
    """
    if initial_states < 1:
        raise SteerError("bad_count", f"{initial_states} initial states were asked for: expected at least 1")
    return [
        Trial(f"task{task}-state{state}", task, "official", state, concepts=concepts)
        for state in range(initial_states)
        for task in tasks
    ]


def randomised(
    tasks: Sequence[int], count: int, seed: int, kind: layouts.Kind = "random", concepts: tuple[Concept, ...] = ()
) -> list[Trial]:
    """`count` layouts, tasks in turn, every graspable object in turn as the target. Raises SteerError('bad_count')."""
    if count < 1:
        raise SteerError("bad_count", f"{count} layouts were asked for: expected at least 1")
    out = []
    for index in range(count):
        turn, place = divmod(index, len(tasks))
        # Task t begins with its t-th target, so that ten layouts already show different objects.
        out.append(
            Trial(f"layout{index}", tasks[place], kind, seed * 1_000_003 + index, turn + place, concepts=concepts)
        )
    return out


def chosen_tasks(suite: str, tasks: Sequence[int] | None) -> tuple[int, ...]:
    """The given tasks, or all pick-and-place ones of the suite. Raises SteerError('task_out_of_range')."""
    known = PICK_AND_PLACE[suite]
    unfit = [task for task in tasks or () if task not in known]
    if unfit:
        raise SteerError(
            "task_out_of_range", f"tasks {unfit} of {suite} are not evaluated: expected some of {list(known)}"
        )
    return tuple(dict.fromkeys(tasks)) if tasks else known


def run_trials(
    policy: LoadedPolicy,
    trials: Sequence[Trial],
    setting: Setting,
    results: Results,
    *,
    infer_for: Callable[[Trial], Infer] | None = None,
    on_trial: Callable[[Trial, Mapping[str, Any]], None] | None = None,
    also: Callable[[Trial], Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Run what the results file lacks and return the rows of all trials, in their order.

    infer_for: how this trial's observations become chunks, by default the policy's own. also: what else the line
    of an episode that has just been run shall hold. Rendering must be set up
    (`sim.benchmark.use_software_rendering`). Raises SteerError('wrong_version') and those of scenes, layouts and policy.
    """
    require_versions()
    missing = [trial for trial in trials if trial.key not in results.rows]
    for task_id in dict.fromkeys(trial.task_id for trial in missing):
        with _scene(setting, task_id) as scene:
            targets = layouts.targets(scene)
            for trial in (t for t in missing if t.task_id == task_id):
                infer = infer_for(trial) if infer_for is not None else policy.infer
                row = run_trial(policy, scene, targets, trial, setting, infer)
                if also is not None:
                    row |= also(trial)
                results.add(trial.key, row)
                if on_trial is not None:
                    on_trial(trial, row)
    return [results.rows[trial.key] for trial in trials]


def run_trial(
    policy: LoadedPolicy, scene: Scene, targets: Sequence[str], trial: Trial, setting: Setting, infer: Infer
) -> dict[str, Any]:
    """One episode's line: the trial, what was asked, the `Motion`, what the policy said (word -> inferences), seconds.

    A layout that cannot be made gives a line with the reason under "refused", and nothing measured.
    """
    started = time.monotonic()
    try:
        state, settle, target, moved = start(scene, targets, trial)
    except SteerError as error:
        if error.code != "no_layout":
            raise
        # Drawn for nothing: told in the results, and no episode of the policy.
        return {**asdict(trial), "refused": error.sentence}
    instruction = scene.instruction(target, moved)
    if trial.concepts:
        instruction = say(instruction, choose(trial.concepts, trial.seed, setting.split))
    actor = PolicyActor(policy, scene, instruction, size=setting.size, infer=infer, seed=trial.seed)
    motion = drive(scene, state, settle, target, targets, actor, setting)
    return {
        **asdict(trial),
        "target": target,
        "targets": len(targets),
        "instruction": instruction,
        **asdict(motion),
        "inferences": actor.inferences,
        "said": dict(Counter(word for words in actor.said for word in words)),
        "seconds": round(time.monotonic() - started, 2),
    }


def start(scene: Scene, targets: Sequence[str], trial: Trial) -> tuple[np.ndarray, int, str, bool]:
    """(simulator state, settling steps, object asked for, whether things were moved from where the task has them)."""
    own = targets[trial.target_index % len(targets)]
    if trial.layout == "official":
        states = scene.task.initial_states
        if trial.seed >= len(states):
            raise SteerError(
                "init_state_out_of_range",
                f"{scene.task.name!r} has no initial state {trial.seed}: expected 0 to {len(states) - 1}",
            )
        return states[trial.seed], SETTLE_STEPS, own, False
    layout = layouts.make(scene, trial.layout, own, trial.seed)
    target = own
    if trial.asked:
        snapshot = scene.begin(layout.state, settle=0)
        others = [n for n in targets if n != own and grasp.plan(snapshot, n).clear and not scene.satisfied(n)]
        if not others:
            raise SteerError(
                "no_layout", f"nothing but {own} can be grasped in layout {trial.seed}: use another --seed"
            )
        target = others[(trial.asked - 1) % len(others)]
    return layout.state, 0, target, trial.layout == "random"


def drive(
    scene: Scene,
    state: np.ndarray,
    settle: int,
    target: str,
    objects: Sequence[str],
    actor: PolicyActor,
    setting: Setting,
) -> Motion:
    """One episode from a state, until `setting` ends it."""
    watch = Watch(scene.begin(state, settle=settle), target, objects)
    since = 0
    for _ in range(setting.steps):
        scene.step(actor())
        watch.add(scene.snapshot(), {name for name in objects if scene.satisfied(name)})
        since += watch.done
        if setting.until == "lifted" and watch.lifted is not None:
            break
        if setting.until == "placed" and watch.placed is not None:
            break
        if watch.released or since > GRACE:
            break
    return watch.motion()


def identity(policy: LoadedPolicy) -> dict[str, Any]:
    """What a result is tied to: name, sha256 of all weights and of the action statistics, and options as they are now."""
    digest = hashlib.sha256(repr(policy.statistics).encode())
    for name, value in sorted(policy.model.state_dict().items()):
        digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {"name": policy.name, "sha256": digest.hexdigest(), "options": dict(policy.options)}


def configuration(policy: LoadedPolicy, command: str, setting: Setting | None, **more: Any) -> dict[str, Any]:
    """The first line of a results file."""
    found = versions()
    # Not known before the first scene is built.
    found.pop("gl_backend")
    shared = asdict(setting) if setting is not None else {}
    return {"command": command, "policy": identity(policy), **shared, **more, "versions": found}


@contextmanager
def _scene(setting: Setting, task_id: int) -> Iterator[Scene]:
    with Scene(setting.suite, task_id, render=True) as scene:
        if setting.meshes == "thin":
            scene.thin_meshes()
        yield scene
