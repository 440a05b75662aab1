"""Runs a study: what is missing in its folder, on all workers, until it is whole or somebody stops it.

Invariant: the rows do not depend on how many workers there were, where they ran or how often the study was interrupted;
only the writer here touches the folder, and an episode is handed out once.
"""

from __future__ import annotations

import platform
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sim.benchmark import use_software_rendering, versions
from sim.evaluation.study.conditions import Condition, directions_of, resolve
from sim.evaluation.study.crew import Refused, Seat, numbered, on_ray, processes
from sim.evaluation.study.journal import Journal, journal
from sim.evaluation.study.plan import Job, jobs
from sim.evaluation.study.settings import StudySettings
from steer_runtime.errors import SteerError
from steer_runtime.results import Row

if TYPE_CHECKING:
    from sim.evaluation.study.episode import Finished, Work
    from steer_runtime.policies import LoadedPolicy

REFERENCE: Mapping[str, str] = {"mujoco": "3.2.3", "robosuite": "1.4.0"}
"""The simulator that published LIBERO figures are compared on (extra `parity`)."""
STEAL = 3
"""Episodes that a scene must have left before a second worker builds it too."""
DEATHS = 2
"""Times that a worker may die over one episode before it counts as errored."""
OFFERS = 3
"""Times that a worker is offered an episode, opened anew in between, where it has died before it takes it."""


@dataclass(frozen=True)
class Study:
    """A study that is ready to run. configuration: what all its episodes share; facts: of the sidecar."""

    settings: StudySettings
    conditions: tuple[Condition, ...]
    planned: tuple[Job, ...]
    work: Work
    configuration: Mapping[str, Any]
    facts: Mapping[str, Any]


def prepare(settings: StudySettings, policy: LoadedPolicy, more: Sequence[Condition] = ()) -> Study:
    """Plan a study of a loaded policy. more: conditions beside those of the file. Raises SteerError as `resolve` and `jobs`."""
    from sim.evaluation.episodes import identity
    from sim.evaluation.study.episode import Work

    backend = use_software_rendering()
    conditions = (*resolve(settings, policy), *more)
    planned = tuple(jobs(settings, conditions))
    simulator = versions()
    # Not known before the first scene is built: it comes with every episode.
    simulator.pop("gl_backend")
    whole = {**simulator, **{name: _version(name) for name in ("torch", "transformers", "steer-runtime", "pyarrow")}}
    checkpoint = None if settings.checkpoint is None else str(settings.checkpoint)
    known = {**identity(policy), "model_hash": policy.model_hash, "trained": bool(policy.trained)}
    work = Work(
        settings.policy, checkpoint, policy.model_hash, known["options"], settings.shared,
        {c.label: c for c in conditions}, simulator,
    )  # fmt: skip
    configuration = {
        "command": "study", "policy": known, **settings.shared, "gl": backend,
        "versions": {**simulator, "torch": whole["torch"], "transformers": whole["transformers"]},
    }  # fmt: skip
    facts = {
        # Paths are those of one machine; names and hashes say which files they were.
        "settings": {**settings.model_dump(mode="json"), "checkpoint": None, "store": None, "policy": policy.name},
        "policy": known,
        "conditions": [c.facts for c in conditions],
        "plan": dict(Counter(job.condition for job in planned)),
        "directions": directions_of(conditions),
        "versions": {**whole, "python": platform.python_version(), "platform": platform.platform()},
        "gl": backend,
        "reference_simulator": reference(simulator),
    }
    return Study(settings, conditions, planned, work, configuration, facts)


def reference(simulator: Mapping[str, str]) -> dict[str, Any]:
    """Whether this is the simulator of published figures, and what differs."""
    other = {name: simulator[name] for name, wanted in REFERENCE.items() if simulator[name] != wanted}
    return {"is_reference": not other, "expected": dict(REFERENCE), "differing": other}


def require_workers(count: int) -> None:
    """Raises SteerError('bad_count') for none."""
    if count < 1:
        raise SteerError("bad_count", f"{count} workers were asked for: expected at least 1")


def open_journal(study: Study, folder: Path) -> Any:
    """The folder of a study, as a context. Raises as `steer_runtime.results.results`."""
    return journal(folder, study.configuration)


def run(
    study: Study,
    kept: Journal,
    *,
    workers: int = 1,
    ray: str | None = None,
    videos: bool = False,
    again: bool = False,
    stop: Callable[[], bool] = lambda: False,
    on_episode: Callable[[Row], None] | None = None,
    seats: Sequence[Seat] | None = None,
) -> None:
    """Run what is missing and write the tables, also when it was stopped: `stop` is asked several times a second.

    again: run errored episodes once more. seats: workers to use instead of processes or Ray. Raises SteerError: 'bad_count',
    'no_ray', 'worker_died', what opening a worker refuses, and as `Journal.add`; what is in the journal stays.
    """
    require_workers(workers)
    done = kept.done(study.planned, again=again)
    missing = [job for job in study.planned if job.key not in done]
    kept.write_sidecar(study.facts)
    if missing:
        work = replace(study.work, videos=videos)
        with hired(min(workers, len(missing)), ray, seats) as crew:
            open_seats(crew, work)
            Shift(work, _ByScene(missing), kept, stop, on_episode).work_on(crew)
    kept.write_tables(study.planned, study.facts)


@contextmanager
def hired(count: int, ray: str | None = None, seats: Sequence[Seat] | None = None) -> Iterator[Sequence[Seat]]:
    """Workers: those that are there already, actors of a Ray cluster, or processes. Raises SteerError('no_ray')."""
    if seats is not None:
        yield seats
    elif ray is not None:
        with on_ray(ray, count) as actors:
            yield actors
    else:
        with processes(count) as own:
            yield own


def open_seats(seats: Sequence[Seat], work: Work) -> None:
    """Tell every worker what it needs to know. Raises SteerError with what one of them refuses."""
    opening = [seat.open(its) for seat, its in zip(seats, numbered(work, len(seats)), strict=True)]
    for seat, opened in zip(seats, opening, strict=True):
        _require_open(seat, opened)


class Queue(Protocol):
    """Episodes that wait for a worker."""

    def next(self, now: tuple[str, int, bool] | None) -> Job | None:
        """The next episode for a worker that has scene `now` open; None where there is none for it."""

    def put_back(self, job: Job) -> None:
        """An episode whose worker died; any worker may run it."""

    def __bool__(self) -> bool: ...


class _ByScene:
    """Missing episodes by scene. A worker stays with a scene; others take it over only where enough is left."""

    def __init__(self, missing: Sequence[Job]) -> None:
        self._scenes: dict[tuple[str, int, bool], deque[Job]] = {}
        for job in missing:
            self._scenes.setdefault(job.scene, deque()).append(job)
        self._taken: set[tuple[str, int, bool]] = set()

    def next(self, now: tuple[str, int, bool] | None) -> Job | None:
        if now is not None and self._scenes.get(now):
            return self._scenes[now].popleft()
        for scene, left in self._scenes.items():
            if left and scene not in self._taken:
                self._taken.add(scene)
                return left.popleft()
        scene = max(self._scenes, key=lambda s: len(self._scenes[s]))
        return self._scenes[scene].pop() if len(self._scenes[scene]) >= STEAL else None

    def put_back(self, job: Job) -> None:
        self._scenes[job.scene].appendleft(job)
        self._taken.discard(job.scene)

    def __bool__(self) -> bool:
        return any(self._scenes.values())


class Shift:
    """Hands out the episodes of a queue to open seats and keeps what comes back."""

    def __init__(
        self,
        work: Work,
        queue: Queue,
        kept: Journal,
        stop: Callable[[], bool],
        on_episode: Callable[[Row], None] | None,
    ) -> None:
        self._work, self._kept, self._stop, self._on_episode = work, kept, stop, on_episode
        self._queue = queue
        self._running: dict[Future[Finished], tuple[Seat, Job]] = {}
        self._deaths: dict[str, int] = {}
        self._told: dict[Seat, Work] = {}
        self._dead: set[Seat] = set()

    def work_on(self, seats: Sequence[Seat]) -> None:
        """Until the queue is empty, or somebody stops it. seats: opened by `open_seats`; those that died since are opened
        anew when there is something to do for them. Raises SteerError: 'worker_died', and what opening refuses."""
        self._told = dict(zip(seats, numbered(self._work, len(seats)), strict=True))
        for seat in seats:
            self._send(seat, None)
        while self._running:
            ready, _ = wait(self._running, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in ready:
                seat, job = self._running.pop(future)
                try:
                    finished = future.result()
                except seat.deaths:
                    self._died(seat, job)
                    continue
                try:
                    # The worker goes on while this process writes.
                    self._send(seat, job)
                finally:
                    self._keep(job, finished)

    def _send(self, seat: Seat, before: Job | None) -> None:
        job = None if self._stop() else self._queue.next(None if before is None else before.scene)
        if job is not None:
            self._running[self._begun(seat, job)] = seat, job

    def _begun(self, seat: Seat, job: Job) -> Future[Finished]:
        """The episode on its worker. One that died while it had nothing to do is opened anew, and the episode is not blamed."""
        for _ in range(OFFERS):
            try:
                if seat in self._dead:
                    _require(seat.open(self._told[seat]).result())
                    self._dead.remove(seat)
                return seat.run(job)
            except seat.deaths:
                self._dead.add(seat)
        raise _died_loading()

    def _keep(self, job: Job, finished: Finished) -> None:
        row = self._kept.add(job, finished)
        if self._on_episode is not None:
            self._on_episode(row)

    def _died(self, seat: Seat, job: Job) -> None:
        """Its worker ended over an episode: another one runs it again, and at last it is errored."""
        from sim.evaluation.study.episode import lost

        self._dead.add(seat)
        self._deaths[job.key] = self._deaths.get(job.key, 0) + 1
        if self._deaths[job.key] < DEATHS:
            self._queue.put_back(job)
        else:
            sentence = f"the worker process ended {DEATHS} times in this episode, as when there is not enough memory"
            self._keep(job, lost(self._work, job, sentence))
        self._send(seat, None)


def _require_open(seat: Seat, opening: Future[Refused | None]) -> None:
    try:
        refused = opening.result()
    except seat.deaths:
        raise _died_loading() from None
    _require(refused)


def _require(refused: Refused | None) -> None:
    if refused is not None:
        raise SteerError(*refused)


def _died_loading() -> SteerError:
    return SteerError(
        "worker_died", "a worker ended while it loaded the policy, as when there is no memory: use fewer --workers"
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
