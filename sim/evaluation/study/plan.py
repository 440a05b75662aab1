"""The episodes of a study: every start of every task under every condition, in pairs.

Invariant: an episode is decided by its `Job` and what the study's episodes share, not by which others there are or run
before it. Jobs of one (suite, task, initial state or layout, seed) share a `pair`, hence the start, the environment's seed
and the seed of the policy's draws.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sim.benchmark import find_task, step_limit, task_counts
from sim.evaluation.study.conditions import Condition
from sim.evaluation.study.settings import MANY, StudySettings, SuiteSettings
from sim.layouts import Kind as Layout
from sim.plan import PICK_AND_PLACE
from steer_runtime.errors import SteerError


@dataclass(frozen=True)
class Job:
    """One episode to run. start: number of the official initial state, or of a layout. condition: its label.

    fingerprint: hash of all that decides it besides policy and simulator. given: the condition itself, where it was made
    after the workers were told of theirs.
    """

    key: str
    pair: str
    suite: str
    task_id: int
    layout: Layout
    start: int
    seed: int
    limit: int
    condition: str
    fingerprint: str
    given: Condition | None = None

    @property
    def scene(self) -> tuple[str, int, bool]:
        """Jobs of one scene are run by one worker in turn, since building it takes longer than a short episode."""
        return self.suite, self.task_id, self.layout == "official"


def jobs(settings: StudySettings, conditions: Sequence[Condition]) -> list[Job]:
    """All episodes: task by task, start by start, all conditions of a start in a row.

    Raises SteerError: as `find_task`, 'init_state_out_of_range', 'no_layouts', 'ambiguous_suite', 'no_step_limit'.
    """
    out: list[Job] = []
    counts = task_counts()
    for wanted in _flat(settings.suites, counts):
        limit = step_limit(wanted.suite) if wanted.limit is None else wanted.limit
        for task_id in range(counts[wanted.suite]) if wanted.tasks == "all" else wanted.tasks:
            _require(wanted, task_id)
            out += _of_task(settings, conditions, wanted, task_id, limit)
    if len({job.key for job in out}) < len(out):
        raise SteerError("ambiguous_suite", "the study names a task of a suite twice with the same starts: drop one")
    planned = {job.condition for job in out}
    idle = next((c for c in conditions if c.label not in planned), None)
    if idle is not None:
        raise SteerError(
            "bad_study",
            f"condition {idle.label!r} runs on no task: its `tasks` {list(idle.tasks or ())} are none of those of `suites`; "
            "correct either",
        )
    return out


def _flat(suites: Sequence[SuiteSettings], known: Mapping[str, int]) -> list[SuiteSettings]:
    out = []
    for one in suites:
        names = MANY.get(one.suite, (one.suite,))
        if len(names) > 1 and one.tasks != "all":
            raise SteerError(
                "bad_study", f"suite {one.suite!r} stands for several, which have no tasks in common: drop `tasks`"
            )
        for name in names:
            if name not in known:
                find_task(name, 0)  # refuses it
            out.append(one.model_copy(update={"suite": name}))
    return out


def _require(wanted: SuiteSettings, task_id: int) -> None:
    task = find_task(wanted.suite, task_id)
    if wanted.layout == "official":
        over = [n for n in wanted.starts if n >= len(task.initial_states)]
        if over:
            raise SteerError(
                "init_state_out_of_range",
                f"{wanted.suite} task {task_id} has no initial state {over[0]}: expected 0 to "
                f"{len(task.initial_states) - 1}",
            )
    elif task_id not in PICK_AND_PLACE.get(wanted.suite, ()):
        raise SteerError(
            "no_layouts",
            f"{wanted.suite} task {task_id} has no {wanted.layout} layouts, which are made for single pick-and-place tasks "
            f"({', '.join(f'{suite} {list(ids)}' for suite, ids in PICK_AND_PLACE.items())}): use layout official",
        )


def _of_task(
    settings: StudySettings, conditions: Sequence[Condition], wanted: SuiteSettings, task_id: int, limit: int
) -> list[Job]:
    out = []
    for number, start in enumerate(wanted.starts):
        for seed in settings.seeds:
            pair = f"{wanted.suite}/{task_id}/{wanted.layout}{start}/seed{seed}"
            for condition in conditions:
                if condition.starts is not None and number >= condition.starts:
                    continue
                if condition.tasks is not None and task_id not in condition.tasks:
                    continue
                out.append(
                    Job(
                        f"{pair}/{condition.label}", pair, wanted.suite, task_id, wanted.layout, start, seed, limit,
                        condition.label, _fingerprint(pair, limit, condition, settings),
                    )
                )  # fmt: skip
    return out


def given(job: Job, condition: Condition, settings: StudySettings) -> Job:
    """The same start under a condition that no worker was told of."""
    digest = _fingerprint(job.pair, job.limit, condition, settings)
    key = f"{job.pair}/{condition.label}"
    return replace(job, key=key, condition=condition.label, fingerprint=digest, given=condition)


def _fingerprint(pair: str, limit: int, condition: Condition, settings: StudySettings) -> str:
    decided = {"pair": pair, "limit": limit, "condition": condition.facts, **settings.shared}
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Estimate:
    """Episodes by condition label, and hours of one worker: at most, when every episode takes all its steps."""

    episodes: Mapping[str, int]
    scenes: int
    hours: float

    def to_jsonable(self) -> dict[str, Any]:
        return asdict(self)


SECONDS_A_STEP = 0.02
"""Of simulation without pictures; measured on one core."""
SECONDS_A_LOOK = {"original": 0.30, "thin": 0.07}
"""Of both cameras by software rendering; measured on one core."""
SECONDS_A_SCENE = 20.0


def estimate(
    planned: Sequence[Job],
    settings: StudySettings,
    *,
    rows: int,
    inference_s: float,
    seconds_a_step: float | None = None,
) -> Estimate:
    """rows: actions executed of each chunk. inference_s: of one inference. seconds_a_step: as measured, instead."""
    episodes: dict[str, int] = {}
    for job in planned:
        episodes[job.condition] = episodes.get(job.condition, 0) + 1
    step = seconds_a_step
    if step is None:
        step = SECONDS_A_STEP + (SECONDS_A_LOOK[settings.meshes] + inference_s) / rows
    scenes = len({job.scene for job in planned})
    seconds = scenes * SECONDS_A_SCENE + step * sum(job.limit for job in planned)
    return Estimate(episodes, scenes, seconds / 3600)
