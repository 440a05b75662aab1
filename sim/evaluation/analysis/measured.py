"""A study's episodes with everything that is measured of them.

Invariant: an episode without an outcome (errored, refused) has no metrics and enters nothing but coverage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sim.evaluation.analysis import metrics
from sim.evaluation.motion import RATE_HZ
from sim.evaluation.study import records
from steer_runtime.errors import SteerError

_STEPS = ("key", "step", "eef_pos", "target_pos", "action", "executed", "held", "dose", "entropy")


@dataclass(frozen=True)
class Episode:
    """One row of the episodes with its metrics. task: suite and task id, the cluster; words: the task's instruction."""

    key: str
    pair: str
    condition: str
    kind: str
    direction: str | None
    direction_id: str | None
    strength: float | None
    draw: int | None
    task: str
    words: str
    instruction: str
    status: str
    success: bool | None
    released: bool | None
    first_action: np.ndarray | None
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class Study:
    """folder: where its tables stand. facts: its sidecar."""

    folder: Path
    episodes: tuple[Episode, ...]
    facts: Mapping[str, Any]


def load(folder: Path, on_episode: Callable[[], None] | None = None) -> Study:
    """Read a study's tables and measure every episode. Raises SteerError: 'no_study', 'bad_record' as the tables' readers
    do, and 'bad_record' for a scored episode without its steps."""
    facts = records.read_sidecar(folder)
    rows = records.read_episodes(folder).to_pylist()
    table = records.columns_of(records.read_steps(folder, columns=_STEPS))
    spans = _spans(table["key"])
    episodes = []
    for row in rows:
        measured: dict[str, float | None] = {}
        if row["status"] == "done":
            span = spans.get(row["key"])
            if span is None or int(table["step"][span.start]) != 0:
                raise SteerError(
                    "bad_record",
                    f"episode {row['key']!r} of {folder} is scored and has no steps, or none at its start: run the study again",
                )
            columns = {name: values[span] for name, values in table.items()}
            measured = metrics.measure(metrics.of_columns(columns, row["success_step"], RATE_HZ))
        episodes.append(_episode(row, measured))
        if on_episode is not None:
            on_episode()
    return Study(folder, tuple(episodes), facts)


def _episode(row: Mapping[str, Any], measured: Mapping[str, float | None]) -> Episode:
    first = row["first_action"]
    return Episode(
        key=row["key"],
        pair=row["pair"],
        condition=row["condition"],
        kind=row["kind"],
        direction=row["direction"],
        direction_id=row["direction_id"],
        strength=row["strength"],
        draw=row["draw"],
        task=f"{row['suite']} {row['task_id']}",
        words=row["task"],
        instruction=row["instruction"],
        status=row["status"],
        success=row["success"],
        released=row["released"],
        first_action=None if first is None else np.asarray(first, dtype=np.float64),
        metrics=measured,
    )


def _spans(keys: np.ndarray) -> dict[str, slice]:
    """Where the steps of each episode stand; they are written one episode after the other."""
    if not len(keys):
        return {}
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    ends = np.append(starts[1:], len(keys))
    return {str(keys[a]): slice(int(a), int(b)) for a, b in zip(starts, ends, strict=True)}
