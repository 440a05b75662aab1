"""Runs a tuning: the unsteered episodes once, then batches of trials side by side, until all are told or somebody stops it.

Invariant: what is told of a trial depends on its episodes in their fixed order and on nothing else, not on how many workers
there are, where they run or how often the tuning was killed. Episodes that ran past a trial's end count nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sim.evaluation.analysis import metrics
from sim.evaluation.motion import RATE_HZ
from sim.evaluation.study import records
from sim.evaluation.study.conditions import Condition, directions_of
from sim.evaluation.study.crew import Seat
from sim.evaluation.study.journal import Journal, journal
from sim.evaluation.study.plan import Job
from sim.evaluation.study.run import Shift, hired, open_seats, require_workers
from sim.evaluation.tuning.plan import End, Tuning
from sim.evaluation.tuning.score import Aim, Pair, Seen, hopeless, score
from sim.evaluation.tuning.trials import Outcome, Told, Trials, open_log
from steer_runtime.errors import SteerError
from steer_runtime.results import Row


@dataclass(frozen=True)
class Watch:
    """Who is told, and who may stop it. episode: its row. trial: end, number, outcome."""

    stop: Callable[[], bool] = lambda: False
    episode: Callable[[Row], None] = lambda row: None
    trial: Callable[[str, int, Outcome], None] = lambda end, number, outcome: None


@dataclass
class Live:
    """A trial while it runs. seen: position -> what its episode showed, None where it errored."""

    end: End
    number: int
    condition: Condition
    jobs: Sequence[Job]
    seen: dict[int, Seen | None] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    outcome: Outcome | None = None
    counted: int = 0

    def advance(self, unsteered: Sequence[Seen], aim: Aim, report: Callable[[int, float | None], None]) -> None:
        """Take in what stands next in the order, as far as it is there, and decide."""
        while self.outcome is None and self.counted in self.seen:
            self.counted += 1
            if self.seen[self.counted - 1] is None:
                self.outcome = Outcome("errored", why=self.errors[self.counted - 1], episodes=self.counted)
                return
            pairs = self.pairs(unsteered)
            now = score(pairs, aim)
            report(self.counted, now.effect)
            why = hopeless(pairs, unsteered[self.counted :], aim)
            if why is not None:
                self.outcome = Outcome("pruned", now, why, self.counted)
            elif self.counted == len(self.jobs):
                state = ("complete", None) if now.effect is not None else ("pruned", "there was nothing to measure")
                self.outcome = Outcome(state[0], now, state[1], self.counted)  # type: ignore[arg-type]

    def pairs(self, unsteered: Sequence[Seen]) -> list[Pair]:
        counted = [self.seen[i] for i in range(self.counted)]
        return [(one, other) for one, other in zip(counted, unsteered, strict=False) if one is not None]


def open_tuning(tuning: Tuning, folder: Path) -> AbstractContextManager[Journal]:
    """The folder of a tuning, as a context. Raises as `steer_runtime.results.results`."""
    return journal(folder, tuning.configuration)


def run(
    tuning: Tuning,
    kept: Journal,
    *,
    workers: int = 1,
    ray: str | None = None,
    again: bool = False,
    watch: Watch | None = None,
    seats: Sequence[Seat] | None = None,
) -> dict[str, list[Told]]:
    """Run what is missing, write the tables, and return the trials of every end, also when it was stopped.

    again: run errored unsteered episodes once more, and plan every errored trial once more. seats: workers to use instead of
    processes or Ray. Raises SteerError: 'bad_count', 'no_baseline', and as `study.run.run` and `trials.open_log`.
    """
    require_workers(workers)
    log = open_log(kept.folder)
    trials = {end.name: Trials(log, end.name, tuning.settings) for end in tuning.ends}
    if again:
        for its in trials.values():
            its.retry()
    bench = _Bench(tuning, kept, watch or Watch(), again)
    missing = bench.missing_unsteered()
    counted: list[Job] = []
    conditions: list[Condition] = []
    if missing or any(its.open() is not None for its in trials.values()):
        with hired(workers, ray, seats) as crew:
            open_seats(crew, tuning.study.work)
            bench.work(missing, {}, crew, lambda *_: None)
            if not bench.stopped:
                _batches(tuning, trials, bench, crew)
    for end in tuning.ends:
        for told in trials[end.name].told():
            condition, jobs = tuning.trial(end, told.number, told.point)
            conditions.append(condition)
            counted += jobs if told.outcome.state == "running" else jobs[: told.outcome.episodes]
    facts = {
        **tuning.study.facts,
        "tuning": tuning.hash,
        "conditions": [c.facts for c in (*tuning.study.conditions, *conditions)],
        "directions": directions_of(tuple(conditions)),
    }
    kept.write_tables((*tuning.study.planned, *counted), facts)
    return {name: its.told() for name, its in trials.items()}


def unsteered_of(tuning: Tuning, kept: Journal, *, again: bool = False) -> list[Seen]:
    """What every start showed unsteered, in order. Raises SteerError('no_baseline') where one is missing or errored."""
    done = kept.done(tuning.study.planned, again=again)
    out = []
    for job in tuning.study.planned:
        row = done.get(job.key)
        if row is None or row["status"] == "errored":
            why = "has not run" if row is None else f"errored ({row['error']})"
            raise SteerError(
                "no_baseline",
                f"the unsteered episode {job.key} {why}, and every trial is compared with it: run again with --retry, or leave "
                "that start out of the YAML and give another --out",
            )
        out.append(_seen(kept, row))
    return out


def _batches(tuning: Tuning, trials: Mapping[str, Trials], bench: _Bench, crew: Sequence[Seat]) -> None:
    unsteered = unsteered_of(tuning, bench.kept)
    aims = {end.name: end.aim(tuning.settings, unsteered) for end in tuning.ends}
    while True:
        live: dict[str, Live] = {}
        for end in tuning.ends:
            numbers = trials[end.name].open()
            for number, point in ({} if numbers is None else trials[end.name].ask(numbers)).items():
                condition, jobs = tuning.trial(end, number, point)
                live[condition.label] = Live(end, number, condition, jobs)
        if not live:
            return

        def advance(one: Live) -> None:
            name, number = one.end.name, one.number
            one.advance(unsteered, aims[name], lambda n, effect: trials[name].report(number, n, effect))
            if one.outcome is not None:
                bench.watch.trial(name, number, one.outcome)

        bench.work([], live, crew, advance)
        if any(one.outcome is None for one in live.values()):
            return  # stopped
        # In the order of their numbers, whatever order they ended in.
        for one in live.values():
            assert one.outcome is not None
            trials[one.end.name].tell(one.number, one.outcome)


class _Bench:
    """Runs episodes on the crew, those of trials position by position."""

    def __init__(self, tuning: Tuning, kept: Journal, watch: Watch, again: bool) -> None:
        self.tuning, self.kept, self.watch, self._again = tuning, kept, watch, again

    @property
    def stopped(self) -> bool:
        return self.watch.stop()

    def missing_unsteered(self) -> list[Job]:
        done = self.kept.done(self.tuning.study.planned, again=self._again)
        return [job for job in self.tuning.study.planned if job.key not in done]

    def work(
        self, first: Sequence[Job], live: Mapping[str, Live], crew: Sequence[Seat], advance: Callable[[Live], None]
    ) -> None:
        """`first` and the trials, until all are decided or it is stopped."""
        queue = _SideBySide(first, live)
        for one in live.values():
            rows = self.kept.done(one.jobs)
            for position, job in enumerate(one.jobs):
                if job.key in rows:
                    self._take(one, position, rows[job.key])
                    queue.forget(job)
            advance(one)
        places = {job.key: (one, i) for one in live.values() for i, job in enumerate(one.jobs)}

        def on_episode(row: Row) -> None:
            self.watch.episode(row)
            if row["key"] in places:
                one, position = places[row["key"]]
                if one.outcome is None:
                    self._take(one, position, row)
                    advance(one)

        if queue:
            Shift(self.tuning.study.work, queue, self.kept, self.watch.stop, on_episode).work_on(crew)

    def _take(self, one: Live, position: int, row: Row) -> None:
        if row["status"] == "errored":
            one.seen[position], one.errors[position] = None, row["error"]
        else:
            one.seen[position] = _seen(self.kept, row)


class _SideBySide:
    """Episodes of several trials, earlier positions first: what ends a trial is known before much more of it was run.

    A worker stays with the scene that it has open, since building one takes as long as an episode.
    """

    def __init__(self, first: Iterable[Job], live: Mapping[str, Live]) -> None:
        self._live = live
        waiting = [(i, 0, job) for i, job in enumerate(first)]
        for order, one in enumerate(live.values()):
            waiting += [(i, order, job) for i, job in enumerate(one.jobs)]
        self._waiting = [job for _, _, job in sorted(waiting, key=lambda w: w[:2])]

    def next(self, now: tuple[str, int, bool] | None) -> Job | None:
        self._drop_decided()
        if not self._waiting:
            return None
        job = next((j for j in self._waiting if j.scene == now), self._waiting[0])
        self._waiting.remove(job)
        return job

    def put_back(self, job: Job) -> None:
        self._waiting.insert(0, job)

    def forget(self, job: Job) -> None:
        self._waiting.remove(job)

    def __bool__(self) -> bool:
        self._drop_decided()
        return bool(self._waiting)

    def _drop_decided(self) -> None:
        decided = {label for label, one in self._live.items() if one.outcome is not None}
        self._waiting = [job for job in self._waiting if job.condition not in decided]


def _seen(kept: Journal, row: Row) -> Seen:
    columns: Any = records.columns_of(kept.steps(row["key"]))
    return Seen(bool(row["success"]), metrics.measure(metrics.of_columns(columns, row["success_step"], RATE_HZ)))
