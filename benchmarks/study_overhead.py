"""What a study costs beside simulation, rendering and policy, and what a second worker brings.

`python -m benchmarks.study_overhead` runs the same short episodes of a policy with one worker and with two, and prints a
table and one JSON line. Times run from the first episode handed out to the tables on the disk; loading the policy is left out.

    share beside = 1 - sum over episodes (simulation + rendering + policy + building scenes) / (workers * wall time)

With one worker this is all that is neither of these: reading the simulator's state, hooks, journal, tables, messages between
processes. With two it also holds the time in which one has nothing left to do.

A worker alone lets Mesa draw on all cores, so a second one brings less than twice the speed where drawing dominates. Core for
core: `LP_NUM_THREADS=0 python -m benchmarks.study_overhead`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PARTS = ("seconds_simulation", "seconds_rendering", "seconds_policy", "seconds_scene")


@dataclass(frozen=True)
class Measured:
    """One run. seconds: wall time; parts: of all workers together; inside: share of the episodes' own time that is none of
    the parts; beside: as above."""

    workers: int
    episodes: int
    seconds: float
    parts: dict[str, float]
    inside: float
    beside: float


def measure(study: Any, folder: Path, workers: int) -> Measured:
    """Run a prepared study from nothing."""
    from sim.evaluation.study.run import open_journal, run

    begins: list[float] = []
    rows: list[dict[str, Any]] = []

    def seen(row: dict[str, Any]) -> None:
        begins.append(time.perf_counter() - row["seconds"] - row["seconds_scene"])
        rows.append(row)

    with open_journal(study, folder) as kept:
        run(study, kept, workers=workers, on_episode=seen)
    wall = time.perf_counter() - min(begins)
    parts = {name.removeprefix("seconds_"): sum(row[name] for row in rows) for name in PARTS}
    episodes = sum(row["seconds"] for row in rows)
    return Measured(
        workers,
        len(rows),
        wall,
        parts,
        inside=1 - (sum(parts.values()) - parts["scene"]) / episodes,
        beside=1 - sum(parts.values()) / (workers * wall),
    )


def prepared(policy: str, tasks: int, starts: int, limit: int, size: int, meshes: str) -> Any:
    """A study of steered and unsteered episodes, ready to run."""
    from sim.evaluation.study.run import prepare
    from sim.evaluation.study.settings import check
    from steer_runtime.policies import load_policy

    store = Path(__file__).resolve().parents[1] / "models" / "pocket-openvla-libero" / "directions"
    raw = {
        "policy": policy,
        "store": str(store),
        "suites": [{"suite": "libero_object", "tasks": list(range(tasks)), "starts": starts, "limit": limit}],
        "meshes": meshes,
        "size": size,
        "conditions": ["unsteered", {"kind": "direction", "name": "speed-word", "strengths": [1]}],
    }
    return prepare(check(raw, "the benchmark"), load_policy(policy))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="pocket-libero")
    parser.add_argument("--workers", default="1,2", help="comma separated")
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--limit", type=int, default=80)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--meshes", default="original", choices=("original", "thin"))
    asked = parser.parse_args()
    study = prepared(asked.policy, asked.tasks, asked.starts, asked.limit, asked.size, asked.meshes)
    measured = []
    for count in map(int, asked.workers.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            measured.append(measure(study, Path(folder), count))
    table = Table(title=f"{asked.policy}: {measured[0].episodes} episodes of at most {asked.limit} steps")
    for column in (
        "workers",
        "wall s",
        "scenes",
        "simulation",
        "rendering",
        "policy",
        "in episodes",
        "beside",
        "speed",
    ):
        table.add_column(column, justify="right")
    for one in measured:
        parts = one.parts
        table.add_row(
            str(one.workers), f"{one.seconds:.1f}", f"{parts['scene']:.1f}", f"{parts['simulation']:.1f}",
            f"{parts['rendering']:.1f}", f"{parts['policy']:.1f}", f"{100 * one.inside:.1f} %", f"{100 * one.beside:.1f} %",
            f"{measured[0].seconds / one.seconds:.2f} x",
        )  # fmt: skip
    Console(width=130).print(table)
    print(json.dumps([asdict(one) for one in measured]))


if __name__ == "__main__":
    main()
