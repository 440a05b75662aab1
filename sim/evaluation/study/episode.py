"""Runs the episodes of a study in one process: one policy, one scene at a time.

Invariant: an episode depends on its job and on what `Work` says, not on the episodes before it; whatever goes wrong in one
makes it errored, with a sentence, and never a failure of the policy.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sim import layouts
from sim.benchmark import SETTLE_STEPS, require_versions, use_software_rendering, versions
from sim.evaluation.motion import STILL
from sim.evaluation.study.conditions import STEERED, Condition
from sim.evaluation.study.plan import Job
from sim.evaluation.study.recorder import Inference, Recorder, Seen, Stopwatch
from sim.policy_actor import observation_of, tell_gripper
from sim.scene import Scene, TaskScene
from steer_runtime.errors import SteerError
from steer_runtime.policies import LoadedPolicy, load_policy
from steer_runtime.steering.offline import OfflineSteering
from steer_runtime.types import ActionChunk, Observation

RATE_HZ = 20.0


@dataclass(frozen=True)
class Work:
    """What a worker is told once. model_hash, options: of the policy it must find. shared: see `StudySettings.shared`.

    conditions: by label. versions: of the simulator's packages that it must have.
    """

    policy: str
    checkpoint: str | None
    model_hash: str
    options: Mapping[str, Any]
    shared: Mapping[str, Any]
    conditions: Mapping[str, Condition]
    versions: Mapping[str, str]
    videos: bool = False
    worker: int = 0


@dataclass(frozen=True)
class Finished:
    """An episode that is over. row: as `records.EPISODES`, and `gl_backend`, and `no_video` with the sentence of a film that
    failed; steps: columns of `records.STEPS` but key, empty when errored; video: MP4, or nothing."""

    row: dict[str, Any]
    steps: Mapping[str, Any] = field(default_factory=dict)
    video: bytes = b""


class EpisodeRunner:
    """Runs jobs one after the other; keeps the scene of the last one open. Use it from one thread, and close it."""

    def __init__(self, work: Work, policy: LoadedPolicy | None = None) -> None:
        """policy: an already loaded one. Raises SteerError: 'other_model', 'wrong_version', and as `load_policy`."""
        use_software_rendering()
        require_versions()
        found = {name: version for name, version in versions().items() if name in work.versions}
        if found != dict(work.versions):
            raise SteerError(
                "wrong_version",
                f"a worker has {found}, the study {dict(work.versions)}: install the same packages there",
            )
        # One thread a worker: sums are then taken in one order everywhere, and workers do not fight for cores.
        torch.set_num_threads(1)
        self.work = work
        checkpoint = None if work.checkpoint is None else Path(work.checkpoint)
        self._policy = policy or load_policy(
            work.policy, checkpoint=checkpoint, device=work.shared["device"], progress=lambda _: None
        )
        if self._policy.model_hash != work.model_hash:
            raise SteerError(
                "other_model",
                f"a worker loaded model {self._policy.model_hash[:12]} and the study is of {work.model_hash[:12]}: give all "
                "machines the same checkpoint",
            )
        other = _differing(self._policy.options, work.options)
        if other:
            raise SteerError(
                "other_model",
                f"a worker loaded {self._policy.name} with {other}: give all machines the same policy file",
            )
        self._scene: TaskScene | None = None
        self._open: tuple[str, int, bool] | None = None
        self._broken: tuple[tuple[str, int, bool], SteerError] | None = None
        self._start: tuple[tuple[Any, ...], np.ndarray] | None = None

    def run(self, job: Job) -> Finished:
        """One episode. Never raises for what goes wrong in it; one whose film fails is done, without the film."""
        clock = Stopwatch()
        began = datetime.datetime.now(datetime.timezone.utc)
        episode = _Episode(self.work, self._policy, job, clock)
        outcome: dict[str, Any] = {}
        steps: Mapping[str, Any] = {}
        try:
            with clock.of("scene"):
                scene = self._scene_of(job)
            with clock.of("all"):
                outcome = episode.run(scene, self._state(job, scene, clock))
            steps = episode.steps()
        except Exception as error:  # whatever a policy, a hook or the simulator raises is a fact about this episode
            outcome = {"status": "errored", "error": _sentence(error)}
            if not isinstance(error, SteerError):
                self.close()  # nobody knows what state the simulator is in
        row = {**episode.facts(), **outcome, **_clocks(clock), "started": began.isoformat(timespec="seconds")}
        row |= {"worker": self.work.worker, "gl_backend": versions()["gl_backend"]}
        if row["status"] == "errored":
            return Finished(row)
        try:
            return Finished(row, steps, episode.video() if self.work.videos else b"")
        except Exception as error:  # an encoder that fails takes nothing from what was measured
            return Finished({**row, "no_video": _sentence(error)}, steps)

    def close(self) -> None:
        """Free the simulator. Harmless when it is closed already."""
        if self._scene is not None:
            self._scene.close()
        self._scene = self._open = self._start = None

    def _scene_of(self, job: Job) -> TaskScene:
        if self._scene is not None and self._open == job.scene:
            return self._scene
        if self._broken is not None and self._broken[0] == job.scene:
            raise self._broken[1]
        self.close()
        build = TaskScene if job.layout == "official" else Scene
        try:
            scene = build(job.suite, job.task_id, render=True, seed=self.work.shared["environment_seed"])
        except SteerError as error:
            self._broken = (job.scene, error)
            raise
        if self.work.shared["meshes"] == "thin":
            scene.thin_meshes()
        self._scene, self._open = scene, job.scene
        return scene

    def _state(self, job: Job, scene: TaskScene, clock: Stopwatch) -> np.ndarray:
        """Flattened state to start from; a layout is drawn once for all conditions of its start."""
        if job.layout == "official":
            return scene.task.initial_states[job.start]
        wanted = (job.scene, job.layout, job.start, job.seed)
        if self._start is None or self._start[0] != wanted:
            assert isinstance(scene, Scene)
            with clock.of("simulation"):
                drawn = layouts.make(scene, job.layout, scene.task_target, job.seed * 1_000_003 + job.start)
            self._start = (wanted, drawn.state)
        return self._start[1]


def lost(work: Work, job: Job, sentence: str) -> Finished:
    """The row of an episode that no worker lived to tell of."""
    facts = _Facts(work, job).facts()
    clocks = {**_clocks(Stopwatch()), "started": "", "worker": -1, "gl_backend": ""}
    return Finished({**facts, "status": "errored", "error": sentence, **clocks})


class _Facts:
    """What there is to say of an episode, however it ended."""

    def __init__(self, work: Work, job: Job) -> None:
        self.work, self.job = work, job
        self.condition = job.given or work.conditions[job.condition]
        self.inferences: list[Inference] = []
        self.taken = self.clamped = 0
        self.task = self.instruction = ""

    def facts(self) -> dict[str, Any]:
        """Columns of `records.EPISODES` but the outcome and the clock."""
        job, condition = self.job, self.condition
        doses = [i.dose for i in self.inferences if np.isfinite(i.dose)]
        return {
            "pair": job.pair,
            "job": job.fingerprint,
            "condition": condition.label,
            "kind": condition.kind,
            "direction": condition.direction,
            "direction_id": None if condition.written is None else condition.written.id,
            "strength": condition.strength,
            "draw": condition.draw,
            "suite": job.suite,
            "task_id": job.task_id,
            "task": self.task,
            "layout": job.layout,
            "init_state": job.start,
            "seed": job.seed,
            "environment_seed": self.work.shared["environment_seed"],
            "instruction": self.instruction,
            "limit": job.limit,
            "steps": self.taken,
            "inferences": len(self.inferences),
            "first_action": [float(v) for v in self.inferences[0].actions[0]] if self.inferences else None,
            "firings": sum(i.firings for i in self.inferences),
            "writes": sum(i.writes for i in self.inferences),
            "dose_mean": float(np.mean(doses)) if doses else None,
            "dose_max": max(doses) if doses else None,
            "clamped": self.clamped,
        }


class _Episode(_Facts):
    """One episode while it runs, and what is known of it when it breaks off."""

    def __init__(self, work: Work, policy: LoadedPolicy, job: Job, clock: Stopwatch) -> None:
        super().__init__(work, job)
        self.policy, self.clock = policy, clock
        self.recorder: Recorder | None = None

    def run(self, scene: TaskScene, state: np.ndarray) -> dict[str, Any]:
        """The outcome, as columns of `records.EPISODES`."""
        job, clock = self.job, self.clock
        base = scene.task.instruction
        if isinstance(scene, Scene):
            base = scene.instruction(scene.task_target, moved=job.layout == "random")
        self.task, self.instruction = scene.task.name, self.condition.wording.replace("{}", base)
        with clock.of("simulation"):
            # Drawn layouts are settled states already.
            scene.start(state, settle=SETTLE_STEPS if job.layout == "official" else 0)
        self.recorder = Recorder(scene, scene.target)
        self.recorder.start()
        self.policy.reset(job.seed)
        infer, attached = self._inference()
        with attached:
            seen = self._drive(scene, self.recorder, infer)
        return {"status": "done", **seen}

    def steps(self) -> dict[str, Any]:
        assert self.recorder is not None
        return self.recorder.arrays

    def video(self) -> bytes:
        """A frame an inference, at the pace of the robot."""
        from sim.video import mp4

        rows = self.taken / max(1, len(self.inferences))
        pictures = (i.image[: len(i.image) // 2 * 2, : i.image.shape[1] // 2 * 2] for i in self.inferences)
        return mp4(pictures, RATE_HZ / rows)

    def _drive(self, scene: TaskScene, recorder: Recorder, infer: Callable[[Observation], Inference]) -> dict[str, Any]:
        """released: None where it was not looked for, and where the step limit came before the hand let go and before all
        steps after success had run."""
        job, shared, clock = self.job, self.work.shared, self.clock
        after, replan = shared["after_success"], shared["replan"]
        success_step: int | None = None
        still, released, row = 0, False, 0
        now: Inference | None = None
        while self.taken < job.limit:
            rows = 0 if now is None else len(now.actions) if replan is None else min(replan, len(now.actions))
            if now is None or row >= rows:
                if now is not None and rows < len(now.actions):
                    tell_gripper(self.policy, float(now.actions[rows - 1, 6]))
                with clock.of("rendering"):
                    observation = observation_of(scene, self.instruction, shared["size"], self.taken)
                with clock.of("policy"):
                    now = infer(observation)
                self.inferences.append(now)
                row = 0
            action = now.actions[row]
            executed = self._executed(action)
            with clock.of("simulation"):
                scene.step(executed)
            self.taken += 1
            seen: Seen = recorder.add(action, executed, now, row)
            row += 1
            if seen.success and success_step is None:
                success_step = self.taken
            still = still + 1 if seen.success and seen.free else 0
            released = released or still >= STILL
            if success_step is not None and (after == 0 or released or self.taken - success_step >= after):
                break
        cut = success_step is not None and self.taken - success_step < after
        return {
            "success": success_step is not None,
            "success_step": success_step,
            "released": None if not after or (cut and not released) else released,
        }

    def _executed(self, action: np.ndarray) -> np.ndarray:
        """Clipped as the robot clips what it is sent, then scaled where the condition says so, and clipped again."""
        executed = np.clip(action, -1.0, 1.0)
        self.clamped += bool((executed != action).any())
        if self.condition.factor != 1.0:
            executed[:3] = np.clip(executed[:3] * self.condition.factor, -1.0, 1.0)
        return executed

    def _inference(self) -> tuple[Callable[[Observation], Inference], Any]:
        """How an observation becomes an `Inference`, and the context in which hooks are attached."""
        written = self.condition.written
        if written is None:
            return lambda observation: self._told(observation, self._ask(observation)), nullcontext()
        steering = OfflineSteering(self.policy, [written.direction], measure_dose=bool(self.work.shared["dose"]))
        now: float | None = None

        def infer(observation: Observation) -> Inference:
            nonlocal now
            strength = written.strength_at(self.taken / RATE_HZ)
            if strength != now:
                steering.set({STEERED: strength})
                now = strength
            answer, record = steering.run(lambda: self._ask(observation))
            alarms = steering.engine.state().alarms
            if alarms:
                raise SteerError("hooks_silent", f"steering failed: {alarms[-1]}")
            doses = [site.dose for site in record.sites if site.dose is not None]
            return self._told(
                observation,
                answer,
                strength=written.sign * max((s for _, s in record.strengths), default=0.0),
                dose=max(doses, default=0.0 if self.work.shared["dose"] else np.nan),
                firings=record.firings,
                writes=sum(site.writes for site in record.sites),
            )

        return infer, steering

    def _ask(self, observation: Observation) -> tuple[ActionChunk, np.ndarray | None]:
        """A chunk, and the entropies of its tokens [T, 7] where the policy tells them."""
        consider = getattr(self.policy, "consider", None)
        if consider is None:
            return self.policy.infer(observation), None
        considered = consider(observation)
        return considered.chunk, considered.entropy

    def _told(
        self,
        observation: Observation,
        answer: tuple[ActionChunk, np.ndarray | None],
        *,
        strength: float = 0.0,
        dose: float = np.nan,
        firings: int = 0,
        writes: int = 0,
    ) -> Inference:
        chunk, entropy = answer
        actions = np.array(chunk.actions, dtype=np.float64)
        if actions.ndim != 2 or actions.shape[1] != 7 or not len(actions) or not np.isfinite(actions).all():
            raise SteerError(
                "bad_action",
                f"{self.policy.name} gave actions of shape {list(actions.shape)}"
                f"{'' if np.isfinite(actions).all() else ' that are not finite'}: expected finite numbers [T, 7]",
            )
        weighed = np.full(len(actions), np.nan) if entropy is None else np.asarray(entropy, np.float64).mean(-1)
        said = " ".join(word.strip() for word in getattr(self.policy, "said", ())) or None
        image = next(iter(observation.images.values()))
        kept = image if self.work.videos else np.zeros((0, 0, 3), np.uint8)
        return Inference(len(self.inferences), actions, weighed, strength, dose, firings, writes, said, kept)


def _clocks(clock: Stopwatch) -> dict[str, float]:
    # Building the scene is not part of an episode: which one pays for it depends on the order.
    seconds = {**clock.seconds}
    whole = seconds.pop("all")
    return {"seconds": round(whole, 4), **{f"seconds_{part}": round(s, 4) for part, s in seconds.items()}}


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What is found and what the study has, of the options that differ."""
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    return ", ".join(f"{name} {found.get(name)!r} (the study has {wanted.get(name)!r})" for name in names)


def _sentence(error: Exception) -> str:
    if isinstance(error, SteerError):
        return error.sentence
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
