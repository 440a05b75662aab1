"""A tuning whose optimum is known: seats that answer what strength, gain and neurons would do, without a simulator.

The hand's speed grows with the push of a direction, strength x mean alpha / 6 (6 is what the tiny store's directions hold), and
an episode fails beyond a cliff that differs a little from start to start.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import study_world
import synthetic_study

from sim.evaluation.study.crew import Refused
from sim.evaluation.study.episode import Finished, Work, lost
from sim.evaluation.study.plan import Job
from sim.evaluation.tuning.settings import TuneSettings, read_tuning
from steer_runtime.directions.direction import Direction

CLIFF = 0.62
"""Push beyond which success is lost."""
SUITES = [{"suite": "libero_object", "tasks": [3, 6], "starts": 3, "limit": 60}]
HELD_OUT = {"suites": [{"suite": "libero_object", "tasks": [3, 6], "starts": "10-15", "limit": 60}]}


def plain(**changes: Any) -> dict[str, Any]:
    """The YAML's content, beside the files that `study_world` writes."""
    return {
        "policy": "./tiny.yaml", "store": "store", "name": "pace", "on": "speed", "suites": SUITES, "meshes": "thin",
        "size": 32, "trials": 12, "batch": 3, "startup": 5, "search": {"strength": [0.05, 1.0]}, "damage": None,
        "held_out": HELD_OUT, **changes,
    }  # fmt: skip


def settings(folder: Path, **changes: Any) -> TuneSettings:
    import yaml

    path = folder / "tune.yaml"
    path.write_text(yaml.safe_dump(plain(**changes)))
    return read_tuning(path)


def push_of(direction: Direction, strength: float) -> float:
    assert direction.neurons is not None
    return strength * float(np.abs(direction.neurons.alpha).mean()) / 6.0


class Made:
    """A seat. errs: which jobs error; also: called before each."""

    deaths: tuple[type[BaseException], ...] = ()

    def __init__(self, errs: Callable[[Job], bool] = lambda job: False, effect: float = 1.0) -> None:
        self.ran: list[str] = []
        self._errs, self._effect = errs, effect

    def open(self, work: Work) -> Future[Refused | None]:
        self._work = work
        return _done(None)

    def run(self, job: Job) -> Future[Finished]:
        self.ran.append(job.key)
        finished = lost(self._work, job, "the simulator stopped")
        if self._errs(job):
            return _done(finished)
        condition = job.given or self._work.conditions[job.condition]
        written = condition.written
        push = 0.0 if written is None else push_of(written.direction, written.strength)
        rng = np.random.default_rng([job.task_id, job.start, job.seed])
        cliff = CLIFF + 0.04 * rng.random()
        own = 0.25 * (1 + 0.05 * rng.normal())
        side = 0.0 if written is None else written.sign
        speed = own * (1 + self._effect * 0.5 * side * push)
        columns = synthetic_study.steps(rng, speed, 0.18, push > cliff, 1.2, 0.1)
        reached = np.flatnonzero(columns["success"])
        row = {
            **finished.row, "status": "done", "error": None, "success": bool(len(reached)),
            "success_step": int(reached[0]) if len(reached) else None, "steps": len(columns["step"]) - 1,
        }  # fmt: skip
        return _done(Finished(row, columns))

    def close(self) -> None:
        pass


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


__all__ = ["CLIFF", "HELD_OUT", "SUITES", "Made", "plain", "push_of", "settings", "study_world"]
