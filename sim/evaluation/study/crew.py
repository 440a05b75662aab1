"""Workers of a study: processes of this machine, or actors of a Ray cluster; the same calls and the same rows.

Invariant: a simulator, its GL context and its policy are made inside the worker and never cross a fork; a worker whose
study is killed ends by itself. What a worker refuses comes back as data.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from sim.evaluation.study.plan import Job
from steer_runtime.directions.fan_out import connect
from steer_runtime.errors import SteerError

if TYPE_CHECKING:  # a worker imports these itself; whoever only plans does not pay for them
    from sim.evaluation.study.episode import EpisodeRunner, Finished, Work

THREADS: Mapping[str, str] = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
"""One thread a worker: its sums are then taken in one order everywhere."""
SHARED: Mapping[str, str] = {**THREADS, "LP_NUM_THREADS": "0"}
"""The same where workers share the cores: Mesa then draws in the calling thread. Alone, a worker lets it draw on all cores,
which is faster and gives the same pictures."""
Refused = tuple[str, str]
"""A SteerError as data: its constructor takes two arguments, which pickling of exceptions forgets."""


class Seat(Protocol):
    """One worker. open: called before any job, and again when it died; None when it is ready.

    deaths: what `run` or `open` of a worker that has ended raises, at once or by its future.
    """

    deaths: tuple[type[BaseException], ...]

    def open(self, work: Work) -> Future[Refused | None]: ...

    def run(self, job: Job) -> Future[Finished]: ...

    def close(self) -> None:
        """End the worker, whatever it is running."""


class Process:
    """A seat of its own process."""

    deaths: tuple[type[BaseException], ...] = (BrokenProcessPool,)

    def __init__(self, environment: Mapping[str, str] = THREADS) -> None:
        """environment: variables that the process is to find."""
        self._environment = environment
        self._pool: ProcessPoolExecutor | None = None

    def open(self, work: Work) -> Future[Refused | None]:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_settle)
        with _environment(self._environment):  # the process starts here, and reads it when it imports NumPy
            return self._pool.submit(_open, work)

    def run(self, job: Job) -> Future[Finished]:
        assert self._pool is not None
        return self._pool.submit(_run, job)

    def close(self) -> None:
        if self._pool is None:
            return
        # An executor can only be waited for, and an episode takes minutes.
        for process in list((self._pool._processes or {}).values()):
            process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Actor:
    """The body of a Ray actor."""

    def __init__(self) -> None:
        self._runner: EpisodeRunner | None = None

    def open(self, work: Work) -> Refused | None:
        self._runner, refused = _runner_of(work)
        return refused

    def run(self, job: Job) -> Finished:
        assert self._runner is not None
        return self._runner.run(job)


class RayActor:
    """A seat somewhere on a cluster, with a CPU of its own, and a GPU where the policy runs on one."""

    def __init__(self, ray: Any) -> None:
        self.deaths: tuple[type[BaseException], ...] = (ray.exceptions.RayActorError,)
        self._ray = ray
        self._actor: Any = None

    def open(self, work: Work) -> Future[Refused | None]:
        environment = {**SHARED, **{name: os.environ[name] for name in _GL if name in os.environ}}
        gpus = 0 if work.shared["device"] == "cpu" else 1
        remote = self._ray.remote(num_cpus=1, num_gpus=gpus, runtime_env={"env_vars": environment})
        self._actor = remote(_Actor).remote()
        return self._actor.open.remote(work).future()

    def run(self, job: Job) -> Future[Finished]:
        return self._actor.run.remote(job).future()

    def close(self) -> None:
        if self._actor is not None:
            self._ray.kill(self._actor)


@contextmanager
def processes(count: int) -> Iterator[list[Seat]]:
    """Seats of this machine."""
    seats: list[Seat] = [Process(SHARED if count > 1 else THREADS) for _ in range(count)]
    try:
        yield seats
    finally:
        for seat in seats:
            seat.close()


@contextmanager
def on_ray(address: str, count: int) -> Iterator[list[Seat]]:
    """Seats of a cluster. address: 'local' starts one of this machine; 'auto' or host:port joins one that is running.

    Raises SteerError('no_ray').
    """
    if importlib.util.find_spec("ray") is None:
        raise SteerError(
            "no_ray", "Ray is not installed: run `pip install 'steer-runtime[cluster]'`, or leave out --ray"
        )
    import ray

    started = connect(ray, address, count)
    seats: list[Seat] = [RayActor(ray) for _ in range(count)]
    try:
        there = int(ray.cluster_resources().get("CPU", 0))
        if there < count:
            raise SteerError(
                "bad_count", f"{count} workers were asked for and the cluster has {there} CPUs: use fewer --workers"
            )
        yield seats
    finally:
        for seat in seats:
            seat.close()
        if started:
            ray.shutdown()


def numbered(work: Work, count: int) -> Sequence[Work]:
    """What each of `count` seats is told."""
    return [replace(work, worker=number) for number in range(count)]


_GL = ("MUJOCO_GL", "PYOPENGL_PLATFORM")
_RUNNER: EpisodeRunner | None = None


def _settle() -> None:
    """First thing in a worker process."""
    # The study decides what Ctrl-C means, and lets a running episode finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _open(work: Work) -> Refused | None:
    global _RUNNER  # one a process: an executor's calls share nothing else
    _RUNNER, refused = _runner_of(work)
    return refused


def _run(job: Job) -> Finished:
    assert _RUNNER is not None
    return _RUNNER.run(job)


def _runner_of(work: Work) -> tuple[EpisodeRunner | None, Refused | None]:
    from sim.evaluation.study.episode import EpisodeRunner

    try:
        return EpisodeRunner(work), None
    except SteerError as refused:
        return None, (refused.code, refused.sentence)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
