"""A study of a tiny random policy in real scenes, and seats without processes, for the tests of `sim.evaluation.study`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import fabricate
import numpy as np
import yaml

from sim.evaluation.study import records
from sim.evaluation.study.crew import Refused
from sim.evaluation.study.episode import EpisodeRunner, Finished, Work, lost
from sim.evaluation.study.plan import Job
from sim.evaluation.study.settings import StudySettings, check
from steer_runtime.directions.direction import Axis, Direction, Neurons
from steer_runtime.directions.store import DirectionStore
from steer_runtime.policies.openvla.policy import OpenVLAPolicy

LIMIT = 5
TOO_LONG = "{}" + " very" * 60 + " slowly"
"""Makes more tokens than the tiny policy takes: it refuses to act."""
CONDITIONS: list[Any] = [
    "unsteered",
    {"kind": "zero", "directions": ["pace"]},
    {"kind": "direction", "name": "pace", "strengths": [-1, 1]},
    {"kind": "random", "like": "pace", "draws": 1, "strengths": [1], "starts": 1},
    {"kind": "prompt", "wording": TOO_LONG, "starts": 1},
    {"kind": "scale", "factors": [0.5]},
]
EPISODES = 2 * 5 + 2
"""Of two starts of one task."""


def policy_file(folder: Path, *, chunk: int = 2) -> Path:
    """A checkpoint and its YAML."""
    fabricate.save_tiny(folder / "tiny", model=fabricate.tiny_model(fabricate.tiny_config(chunk=chunk)))
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"kind": "openvla", "name": "tiny", "checkpoint": "tiny", "suite": "libero_object"}))
    return path


def store(folder: Path, policy: OpenVLAPolicy) -> DirectionStore:
    """Directions `slow` and `fast`, and the axis `pace` of both."""
    out = DirectionStore(folder / "store")
    lm = policy.config.lm
    for name, sign in (("slow", -1.0), ("fast", 1.0)):
        neurons = Neurons(
            np.array([1, 1, 2], np.int32), np.array([3, 9, 5], np.int32), np.float32(sign) * np.full(3, 6, np.float32)
        )
        out.save(
            Direction(
                name, "lm", policy.model_hash, lm.layers, lm.d_model, lm.d_ff, neurons=neurons,
                provenance={"finder": "tests"},
            )
        )  # fmt: skip
    out.save_axis(Axis("pace", "slow", "fast"))
    return out


def plain(policy: str, store: str, **changes: Any) -> dict[str, Any]:
    """The YAML's content: one task, two starts."""
    return {
        "policy": policy,
        "store": store,
        "suites": [{"suite": "libero_object", "tasks": [6], "starts": 2, "limit": LIMIT}],
        "meshes": "thin",
        "size": 32,
        "conditions": ["unsteered"],
        **changes,
    }


def settings(**changes: Any) -> StudySettings:
    return check(plain(**changes), "a test")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The episodes' columns that do not come from the clock."""
    return records.read_episodes(folder).drop_columns(list(records.CLOCK)).to_pylist()


def steps_of(folder: Path) -> dict[str, np.ndarray]:
    return records.columns_of(records.read_steps(folder))


def require_equal(one: Path, other: Path) -> None:
    """Two studies hold the same rows, the clock apart; NaN equals NaN."""
    assert rows_of(one) == rows_of(other)
    ours, theirs = steps_of(one), steps_of(other)
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name], err_msg=name)


class Here:
    """A seat of this very process, for a policy that is loaded already."""

    deaths: tuple[type[BaseException], ...] = ()

    def __init__(self, runner: EpisodeRunner) -> None:
        self._runner = runner

    def open(self, work: Work) -> Future[Refused | None]:
        self._runner.work = work
        return _done(None)

    def run(self, job: Job) -> Future[Finished]:
        return _done(self._runner.run(job))

    def close(self) -> None:
        self._runner.close()


class Gone(Exception):
    """A worker that is no more."""


Death = Literal["", "in", "after"]


class Mortal:
    """A seat without a simulator whose worker dies; its episodes are errored ("made up").

    dies: over which jobs, in them or after they were finished. idle: openings after which it dies at once, counted from 1.
    loading: openings in which it dies. told: what it was opened with, each time; ran: keys of finished jobs.
    """

    deaths: tuple[type[BaseException], ...] = (Gone,)

    def __init__(
        self, dies: Callable[[Job], Death] = lambda job: "", idle: range = range(0), loading: range = range(0)
    ) -> None:
        self.told: list[Work] = []
        self.ran: list[str] = []
        self._dies, self._idle, self._loading = dies, idle, loading
        self._alive = False

    def open(self, work: Work) -> Future[Refused | None]:
        self.told.append(work)
        if len(self.told) in self._loading:
            return _died()
        self._alive = len(self.told) not in self._idle
        return _done(None)

    def run(self, job: Job) -> Future[Finished]:
        if not self._alive:
            raise Gone
        death = self._dies(job)
        self._alive = not death
        if death == "in":
            return _died()
        self.ran.append(job.key)
        return _done(lost(self.told[-1], job, "made up"))

    def close(self) -> None:
        pass


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def _died() -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(Gone())
    return future
