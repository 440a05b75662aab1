"""`steer eval study`: from a YAML to the two tables."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sim.evaluation.study.run import Study
    from steer_runtime.policies import LoadedPolicy

EPILOG = (
    "Examples:  steer eval study configs/evaluations/pocket-speed.yaml --out out/study/speed --workers 2  ·  "
    "steer eval study configs/evaluations/pocket-speed.yaml --dry-run  ·  steer eval study my.yaml --out /shared/my --ray auto "
    "--workers 16"
)


def study(
    config: Annotated[Path, typer.Argument(help="YAML of a study; see configs/evaluations/ and docs/evaluation.md.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the study; one that exists goes on.")] = None,
    workers: Annotated[int, typer.Option(help="Processes, or actors on Ray; each takes one core.")] = 1,
    ray: Annotated[
        str | None, typer.Option(help="Ray cluster: local starts one here; auto or host:port joins one.")
    ] = None,
    videos: Annotated[bool, typer.Option("--videos", help="Keep an MP4 of every episode that runs.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run errored episodes once more.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and an estimate of hours, run nothing.")
    ] = False,
    tables: Annotated[bool, typer.Option("--tables", help="Write the tables of what is there, run nothing.")] = False,
) -> None:
    """Run LIBERO episodes of one policy in pairs under conditions: unsteered, directions, random controls, prompts, scaling.

    Killed or stopped by Ctrl-C, the same command goes on and ends with the same rows. Writes episodes.parquet,
    steps.parquet and study.json.
    """
    from sim.benchmark import use_software_rendering
    from sim.evaluation.study.run import open_journal, prepare, require_workers, run
    from sim.evaluation.study.settings import StudySettings, read_settings
    from steer_runtime.errors import SteerError
    from steer_runtime.policies import load_policy

    settings = read_settings(config, StudySettings)
    require_workers(workers)
    if out is None and not dry_run:
        raise SteerError("bad_out", "no folder was given: expected --out FOLDER, or --dry-run to see the plan alone")
    use_software_rendering()
    loaded = load_policy(settings.policy, checkpoint=settings.checkpoint, device=settings.device)
    ready = prepare(settings, loaded)
    if dry_run:
        _show_plan(ready, loaded, out, workers)
        return
    # The workers have a policy each.
    trained, name = loaded.trained, loaded.name
    del loaded
    assert out is not None
    with open_journal(ready, out) as kept:
        if tables:
            rows, steps = kept.write_tables(ready.planned, ready.facts)
            typer.echo(f"{rows} of {len(ready.planned)} episodes and {steps} steps: {out}")
            return
        stopped = False
        with _progress(ready, kept.done(ready.planned, again=retry)) as (tick, note), stop_on_interrupt(note) as stop:
            run(
                ready, kept, workers=workers, ray=ray, videos=videos, again=retry, stop=stop, on_episode=tick
            )  # fmt: skip
            stopped = stop()
        done = kept.done(ready.planned)
        _show_outcome(ready, done, f"{name}{'' if trained else ' (untrained policy)'}", out)
    if stopped and len(done) < len(ready.planned):
        typer.echo(f"stopped with {len(done)} of {len(ready.planned)} episodes; the same command goes on", err=True)
        raise typer.Exit(130)


@contextmanager
def _progress(ready: Study, done: Mapping[str, Any]) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        job = progress.add_task("episodes", total=len(ready.planned), completed=len(done))

        def tick(row: Mapping[str, Any]) -> None:
            outcome = "errored" if row["status"] == "errored" else f"{row['steps']} steps{', success' * row['success']}"
            progress.update(job, advance=1, description=f"{row['key']}: {outcome}")

        yield tick, progress.console.print


@contextmanager
def stop_on_interrupt(note: Any) -> Iterator[Any]:
    """Ctrl-C lets running episodes finish; a second one drops them."""
    asked = False

    def interrupt(_signal: int, _frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        note("finishing the episodes that run; Ctrl-C again drops them (they are run again later)")

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def _show_plan(ready: Study, policy: LoadedPolicy, out: Path | None, workers: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from sim.evaluation.study.journal import JOURNAL_FILE
    from sim.evaluation.study.plan import estimate
    from sim.evaluation.study.run import open_journal

    done: Mapping[str, Any] = {}
    if out is not None and (out / JOURNAL_FILE).is_file():
        with open_journal(ready, out) as kept:
            done = kept.done(ready.planned)
    missing = [job for job in ready.planned if job.key not in done]
    rows, seconds = one_inference(policy, ready)
    measured = [row["seconds"] / row["steps"] for row in done.values() if row["status"] == "done" and row["steps"]]
    known = statistics.fmean(measured) if measured else None
    guess = estimate(missing, ready.settings, rows=rows, inference_s=seconds, seconds_a_step=known)
    grouped: dict[str, list[int]] = {}
    for condition in ready.conditions:
        # A line for all draws of a control, not one a draw.
        draws = f"{condition.kind}:{condition.direction}@{condition.strength:+g}" if condition.draw is not None else ""
        counts = grouped.setdefault(draws or condition.label, [0, 0])
        counts[0] += 1
        counts[1] += guess.episodes.get(condition.label, 0)
    table = Table(title=f"{policy.name}: {len(ready.planned)} episodes, {len(done)} of them done", title_justify="left")
    for column in ("condition", "draws", "episodes to run"):
        table.add_column(column, no_wrap=True)
    for label, (draws_, episodes) in grouped.items():
        table.add_row(label, str(draws_) if draws_ > 1 else "", str(episodes))
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)
    basis = (
        "as the episodes of this folder took" if known else f"an inference of {seconds:.2f} s, pictures from a table"
    )
    hours = guess.hours / workers
    long = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
    console.print(
        f"{len(missing)} episodes in {guess.scenes} scenes: at most {long} with {workers} "
        f"worker{'s' * (workers > 1)} (every episode at its step limit; {basis})"
    )


def one_inference(policy: LoadedPolicy, ready: Study) -> tuple[int, float]:
    """(actions executed of a chunk, seconds of an inference): the fastest of four on grey pictures."""
    import numpy as np

    from steer_runtime.types import Observation

    size = ready.settings.size
    grey = np.full((size, size, 3), 128, np.uint8)
    observation = Observation(
        {"agentview": grey, "wrist": grey}, np.zeros(8), "pick up the milk and place it in the basket", 0, 0
    )
    policy.reset(0)
    rows, seconds = 1, float("inf")
    for _ in range(4):
        began = time.perf_counter()
        rows = len(policy.infer(observation).actions)
        seconds = min(seconds, time.perf_counter() - began)
    return min(rows, ready.settings.replan or rows), seconds


def _show_outcome(ready: Study, done: Mapping[str, Mapping[str, Any]], title: str, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from sim.intervals import wilson

    table = Table(title=title, title_justify="left")
    for column in ("condition", "success", "95 %", "n", "errored"):
        table.add_column(column, no_wrap=True)
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in done.values():
        drawn = row["draw"] is not None
        grouped.setdefault(
            f"{row['kind']}:{row['direction']}@{row['strength']:+g}" if drawn else row["condition"], []
        ).append(row)
    for label, rows in grouped.items():
        scored = [row["success"] for row in rows if row["status"] == "done"]
        low, high = wilson(sum(scored), len(scored)) if scored else (0.0, 1.0)
        share = f"{100 * sum(scored) / len(scored):.0f} %" if scored else "-"
        table.add_row(
            label, share, f"{100 * low:.0f} to {100 * high:.0f} %", str(len(scored)), str(len(rows) - len(scored))
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)
    errors = [row["error"] for row in done.values() if row["status"] == "errored"]
    if errors:
        console.print(f"{len(errors)} episodes errored and count nowhere (--retry runs them again), e.g.: {errors[0]}")
    films = [row["no_video"] for row in done.values() if row.get("no_video")]
    if films:
        console.print(f"{len(films)} films could not be made, their episodes stand, e.g.: {films[0]}")
    if not ready.facts["reference_simulator"]["is_reference"]:
        differing = ", ".join(f"{k} {v}" for k, v in ready.facts["reference_simulator"]["differing"].items())
        console.print(f"not the reference simulator of published figures ({differing}); see the extra `parity`")
    console.print(str(out))
