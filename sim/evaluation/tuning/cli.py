"""`steer tune`: find how strongly, where and on which tokens a direction should write; check it on starts nobody saw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sim.evaluation.tuning.plan import Tuning
    from sim.evaluation.tuning.trials import Outcome, Told
    from steer_runtime.policies import LoadedPolicy

app = typer.Typer(
    name="tune",
    help="Find a direction's strength, size and place in closed loop, and its safe range.",
    no_args_is_help=True,
)

Config = Annotated[Path, typer.Argument(help="YAML of a tuning; see configs/tuning/ and docs/evaluation.md.")]
Out = Annotated[Path, typer.Option(help="Folder of the tuning; one that exists goes on.")]
Workers = Annotated[int, typer.Option(help="Processes, or actors on Ray; each takes one core.")]
Ray = Annotated[str | None, typer.Option(help="Ray cluster: local starts one here; auto or host:port joins one.")]
Retry = Annotated[bool, typer.Option("--retry", help="Run what errored once more.")]


@app.command(
    epilog="Examples:  steer tune run configs/tuning/pocket-speed.yaml --dry-run  ·  "
    "steer tune run configs/tuning/pocket-speed.yaml --out out/tune/speed --workers 2  ·  "
    "steer tune run my.yaml --out /shared/my --ray auto --workers 16"
)
def run(
    config: Config,
    out: Annotated[Path | None, typer.Option(help="Folder of the tuning; one that exists goes on.")] = None,
    workers: Workers = 1,
    ray: Ray = None,
    trials: Annotated[int | None, typer.Option(help="Trials of each end, instead of the YAML's; more go on.")] = None,
    retry: Retry = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and hours at most, run nothing.")] = False,
) -> None:
    """Search for the largest effect that keeps success and moves little else; every trial in pairs with the unsteered policy.

    Killed or stopped by Ctrl-C, the same command goes on and ends with the same trials. Writes tuning.json, tuning.html,
    Optuna's journal and the two tables of a study.
    """
    from sim.evaluation.study.cli import stop_on_interrupt
    from sim.evaluation.study.run import require_workers
    from sim.evaluation.tuning import page, result
    from sim.evaluation.tuning.run import Watch, open_tuning
    from sim.evaluation.tuning.run import run as work
    from steer_runtime.errors import SteerError

    if out is None and not dry_run:
        raise SteerError("bad_out", "no folder was given: expected --out FOLDER, or --dry-run to see the plan alone")
    require_workers(workers)
    tuning, policy = _ready(config, trials)
    if dry_run:
        _show_plan(tuning, policy, workers)
        return
    del policy  # the workers have one each
    assert out is not None
    with (
        open_tuning(tuning, out) as kept,
        _progress(tuning) as (trial, episode, note),
        stop_on_interrupt(note) as stop,
    ):
        watch = Watch(stop, episode, trial)
        told = work(tuning, kept, workers=workers, ray=ray, again=retry, watch=watch)
    found = result.carried(result.document(tuning, told), out)
    result.save(found, out)
    _show(found)
    typer.echo(str(page.render(found, out)))
    if any(_open(its, tuning) for its in told.values()):
        typer.echo("stopped before all trials were run; the same command goes on", err=True)
        raise typer.Exit(130)


@app.command(epilog="Examples:  steer tune show out/tune/speed  ·  steer tune show out/tune/speed --all")
def show(
    out: Annotated[Path, typer.Argument(help="Folder that `steer tune run` wrote.")],
    every: Annotated[bool, typer.Option("--all", help="Every trial, not the best ten.")] = False,
) -> None:
    """What a tuning found: the best trial of each end, the front, what stopped the others; draws the page again."""
    from sim.evaluation.tuning import page, result

    found = result.load(out)
    _show(found, None if every else 10)
    typer.echo(str(page.render(found, out)))


@app.command(
    epilog="Examples:  steer tune verify configs/tuning/pocket-speed.yaml --out out/tune/speed --workers 2  ·  "
    "steer tune verify configs/tuning/pocket-speed.yaml --out out/tune/speed --no-write"
)
def verify(
    config: Config,
    out: Out,
    workers: Workers = 1,
    ray: Ray = None,
    trials: Annotated[int | None, typer.Option(help="As it was given to `run`.")] = None,
    store: Annotated[Path | None, typer.Option(help="Store to write to, instead of the YAML's.")] = None,
    write: Annotated[bool, typer.Option("--write/--no-write", help="Write a verified range into the card.")] = True,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Write the tuned range also where held-out starts do not prove it.")
    ] = False,
    retry: Retry = False,
) -> None:
    """Run what tuning chose on starts that no trial saw; a range that holds there goes into the card, with its evidence.

    Exit code 1 where nothing is verified. The card then stays as it is, unless --unverified is said; the card says so too.
    """
    from sim.evaluation.study.cli import stop_on_interrupt
    from sim.evaluation.study.run import open_journal, require_workers
    from sim.evaluation.study.run import run as run_study
    from sim.evaluation.tuning import held_out, page, result, write_back
    from steer_runtime.directions.store import DirectionStore
    from steer_runtime.errors import SteerError

    require_workers(workers)
    tuning, policy = _ready(config, trials)
    found = result.load(out)
    if found["hash"] != tuning.hash:
        raise SteerError(
            "other_configuration",
            f"{out} holds the tuning {found['hash'][:12]} and {config} says {tuning.hash[:12]}: give the YAML, store and policy "
            "that it was run with",
        )
    trials_of = _ended(tuning, out)
    chosen = {end: best for end, told in trials_of.items() if (best := result.best(told, tuning)) is not None}
    if not chosen:
        typer.echo("no trial moves its metric within the limits: there is nothing to verify", err=True)
        raise typer.Exit(1)
    checked: list[held_out.Checked] = []
    if tuning.settings.held_out is not None or not unverified:
        study = held_out.study_of(tuning, chosen, policy)
        del policy
        folder = out / held_out.FOLDER
        with open_journal(study, folder) as kept:
            done = kept.done(study.planned, again=retry)
            with _episodes(len(study.planned), len(done)) as (tick, note), stop_on_interrupt(note) as stop:
                run_study(study, kept, workers=workers, ray=ray, again=retry, stop=stop, on_episode=tick)
                stopped = stop()
            if stopped and len(kept.done(study.planned)) < len(study.planned):
                typer.echo("stopped; the same command goes on", err=True)
                raise typer.Exit(130)
        checked = held_out.check(tuning, chosen, folder)
    findings = []
    for end in tuning.ends:
        if end.name in chosen:
            mine = [c for c in checked if c.end == end.name]
            proved = held_out.verified_range(mine)
            strength = chosen[end.name].point.strength
            low = min((c.strength for c in mine), default=strength / 2)
            findings.append(
                write_back.Finding(end, chosen[end.name], proved or (low, strength), proved is not None, mine)
            )
    found = result.document(tuning, trials_of)
    found["held_out"] = {"checked": [c.to_jsonable() for c in checked], "ranges": _ranges(findings), "written": []}
    usable = [f for f in findings if f.verified or unverified]
    if write and usable:
        saved = write_back.write(DirectionStore(store or tuning.settings.store or Path()), tuning, usable)
        found["held_out"]["written"] = [d.id for d in saved]
    result.save(found, out)
    _show_checked(found)
    typer.echo(str(page.render(found, out)))
    if not any(f.verified for f in findings):
        if not unverified:
            typer.echo(
                "nothing is verified, so no card was changed; --unverified writes the tuned range all the same",
                err=True,
            )
        raise typer.Exit(1)


def _ready(config: Path, trials: int | None) -> tuple[Tuning, LoadedPolicy]:
    from sim.benchmark import use_software_rendering
    from sim.evaluation.tuning.plan import ready
    from sim.evaluation.tuning.settings import read_tuning
    from steer_runtime.errors import SteerError
    from steer_runtime.policies import load_policy

    settings = read_tuning(config)
    if trials is not None:
        if trials < 1:
            raise SteerError("bad_count", f"--trials is {trials}: expected at least 1")
        settings = settings.model_copy(update={"trials": trials})
    use_software_rendering()
    policy = load_policy(settings.policy, checkpoint=settings.checkpoint, device=settings.device)
    return ready(settings, policy), policy


def _ended(tuning: Tuning, out: Path) -> dict[str, list[Told]]:
    """End -> its trials, all of them run. Raises SteerError('not_finished')."""
    from sim.evaluation.tuning.run import open_tuning
    from sim.evaluation.tuning.trials import Trials, open_log
    from steer_runtime.errors import SteerError

    ended = {}
    with open_tuning(tuning, out) as kept:
        log = open_log(kept.folder)
        for end in tuning.ends:
            told = Trials(log, end.name, tuning.settings).told()
            if _open(told, tuning):
                raise SteerError(
                    "not_finished", f"{out} has not run all its trials: run it to its end, or give fewer --trials"
                )
            ended[end.name] = told
    return ended


def _open(told: Sequence[Told], tuning: Tuning) -> bool:
    return len(told) < tuning.settings.trials or any(t.outcome.state == "running" for t in told)


def _ranges(findings: Sequence[Any]) -> dict[str, Any]:
    return {f.end.name: {"strengths": list(f.strengths), "verified": f.verified} for f in findings}


@contextmanager
def _progress(tuning: Tuning) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars = {end.name: progress.add_task(f"trials, {end.name}", total=tuning.settings.trials) for end in tuning.ends}
        job = progress.add_task("episodes", total=None)

        def trial(end: str, number: int, outcome: Outcome) -> None:
            progress.update(bars[end], advance=1, description=f"trials, {end}: {number} {outcome.state}")

        def episode(row: Mapping[str, Any]) -> None:
            progress.update(job, advance=1, description=row["key"])

        yield trial, episode, progress.console.print


@contextmanager
def _episodes(total: int, done: int) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        job = progress.add_task("held-out episodes", total=total, completed=done)
        yield lambda row: progress.update(job, advance=1, description=row["key"]), progress.console.print


def _show_plan(tuning: Tuning, policy: LoadedPolicy, workers: int) -> None:
    from rich.table import Table

    from sim.evaluation.study.cli import one_inference
    from sim.evaluation.study.plan import estimate

    settings = tuning.settings
    rows, seconds = one_inference(policy, tuning.study)
    guess = estimate(tuning.study.planned, settings, rows=rows, inference_s=seconds)
    table = Table(title=f"{policy.name}: {settings.name} moves {tuning.claim.metric}", title_justify="left")
    for column in ("end", "direction", "wanted", "trials", "episodes at most"):
        table.add_column(column, no_wrap=True)
    for end in tuning.ends:
        wanted = "up" if end.sign > 0 else "down"
        episodes = settings.trials * len(tuning.study.planned)
        table.add_row(end.name, end.direction.id, wanted, str(settings.trials), str(episodes))
    console = _console()
    console.print(table)
    searched = settings.search.model_dump(mode="json", exclude_none=True)
    console.print("searched: " + "; ".join(f"{name} {value}" for name, value in searched.items()))
    hours = guess.hours * (1 + len(tuning.ends) * settings.trials) / workers
    console.print(
        f"{len(tuning.study.planned)} starts unsteered, once; at most {hours:.1f} h with {workers} worker{'s' * (workers > 1)} "
        f"(every trial to its end, every episode at its step limit; an inference of {seconds:.2f} s)"
    )


def _show(found: Mapping[str, Any], most: int | None = 10) -> None:
    from sim.evaluation.tuning.words import answers, rows

    console = _console()
    for end, its in found["ends"].items():
        _table(console, f"{end}: {its['direction']}", rows(found, end, most))
    for sentence in answers(found):
        typer.echo(sentence)


def _show_checked(found: Mapping[str, Any]) -> None:
    from sim.evaluation.tuning.words import answers, checked_rows

    _table(_console(), "held-out starts", checked_rows(found))
    for sentence in answers(found):
        typer.echo(sentence)


def _table(console: Any, title: str, rows: Sequence[Mapping[str, str]]) -> None:
    from rich.table import Table

    if not rows:
        return
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, no_wrap=column != "why")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def _console() -> Any:
    """Wide enough for the tables where nobody looks at it in a terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=170)
