"""`steer eval`: what a policy can do, each command one part of the reach table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sim import options
from sim.evaluation import axis_video, hold_cli
from sim.evaluation.analysis import cli as analysis_cli
from sim.evaluation.study import cli as study_cli
from sim.options import task_ids, words

if TYPE_CHECKING:
    from sim.evaluation.episodes import Setting, Trial
    from sim.evaluation.statistics import Line
    from steer_runtime.policies import LoadedPolicy
    from steer_runtime.policies.openvla.policy import OpenVLAPolicy

app = typer.Typer(name="eval", help="Measure what a policy can do, in process.", no_args_is_help=True)
app.command(epilog="Examples:  steer eval video pocket-libero --axis speed --site 6 --norm 110 --out axis-speed.mp4")(
    axis_video.video
)
app.command("hold", epilog=hold_cli.EXAMPLES)(hold_cli.hold)
app.command(epilog=study_cli.EPILOG)(study_cli.study)
app.command(epilog=analysis_cli.EPILOG)(analysis_cli.report)

Policy = Annotated[str, typer.Argument(help="A policy YAML, or a bare name of configs/policies/.")]
Suite = Annotated[str, typer.Option(help="libero_object, libero_spatial or libero_goal.")]
Tasks = Annotated[str, typer.Option(help="Task ids, comma separated; empty: all pick-and-place tasks.")]
Meshes = Annotated[str, typer.Option(help="original (the benchmark's) or thin (five times cheaper pictures).")]
Size = Annotated[int, typer.Option(help="Pixels of both sides of both cameras.")]
Split = Annotated[str, typer.Option(help="Wordings that prompts use: train or held_out.")]
Limit = Annotated[int | None, typer.Option(help="Control steps an episode may take; default: the suite's own.")]
Out = Annotated[Path | None, typer.Option(help="Results file (.jsonl); default: out/eval/<policy>-<command>.jsonl.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Another checkpoint directory than the policy file names.")]


@app.command(
    epilog="Examples:  steer eval success pocket-libero  ·  steer eval success pocket-libero --layouts random --episodes 100"
)
def success(
    policy: Policy,
    suite: Suite = "libero_object",
    layouts: Annotated[str, typer.Option(help="official, jitter or random.")] = "official",
    initial_states: Annotated[int, typer.Option(help="Official: initial states 0 to n - 1 of every task.")] = 10,
    episodes: Annotated[int, typer.Option(help="Jitter and random: how many layouts.")] = 100,
    style: Annotated[str, typer.Option(help="What prompts say: plain, quickly, slowly, high or careful.")] = "plain",
    tasks: Tasks = "",
    seed: int = 0,
    meshes: Meshes = "original",
    size: Size = 256,
    split: Split = "train",
    limit: Limit = None,
    out: Out = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Success by LIBERO's predicate at any step, with Wilson intervals; the official protocol or other layouts."""
    from sim.evaluation import episodes as runs
    from sim.evaluation import manner as manners
    from sim.evaluation.success import summarise
    from sim.layouts import require_kind
    from steer_runtime.errors import SteerError, nearest

    setting = _setting(suite=suite, meshes=meshes, size=size, split=split, limit=limit)
    if style not in manners.STYLES:
        raise SteerError("unknown_style", f"style {style[:40]!r} is not known: {nearest(style, manners.STYLES)}")
    require_kind(layouts)
    chosen, concepts = runs.chosen_tasks(suite, task_ids(tasks)), manners.STYLES[style]
    if layouts == "official":
        trials = runs.official(chosen, initial_states, concepts)
    else:
        trials = runs.randomised(chosen, episodes, seed, layouts, concepts)  # type: ignore[arg-type]
    more = {"layouts": layouts, "style": style, "tasks": list(chosen), "seed": seed}
    run = _Run(
        policy, checkpoint, "success", f"success-{layouts}" + f"-{style}" * (style != "plain"), out, setting, more
    )
    run.episodes(trials, lambda rows: summarise(rows, layouts))


@app.command(epilog="Examples:  steer eval grounding pocket-libero --episodes 100")
def grounding(
    policy: Policy,
    suite: Suite = "libero_object",
    episodes: Annotated[int, typer.Option(help="How many, all instructions together.")] = 100,
    instructions: Annotated[int, typer.Option(help="Objects asked for on each layout, in turn.")] = 2,
    until: Annotated[
        str, typer.Option(help="What ends an episode: the first object lifted, or the first placed.")
    ] = "placed",
    tasks: Tasks = "",
    seed: int = 1,
    meshes: Meshes = "original",
    size: Size = 256,
    limit: Limit = None,
    out: Out = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Is the object that was asked for the one that is taken? Randomised layouts, only the instruction changes."""
    from sim.evaluation import episodes as runs
    from sim.evaluation.grounding import summarise, trials
    from steer_runtime.errors import SteerError

    if until not in ("lifted", "placed"):
        raise SteerError("bad_until", f"--until {until[:40]!r} is not known: expected lifted or placed")
    setting = _setting(suite=suite, meshes=meshes, size=size, limit=limit, until=until)
    chosen = runs.chosen_tasks(suite, task_ids(tasks))
    plan = trials(chosen, episodes, seed, instructions)
    more = {"instructions": instructions, "tasks": list(chosen), "seed": seed}
    run = _Run(policy, checkpoint, "grounding", "grounding", out, setting, more)
    run.episodes(plan, lambda rows: summarise(rows, instructions))


@app.command(
    epilog="Examples:  steer eval manner pocket-libero --layouts 30  ·  steer eval manner pocket-libero --split held_out"
)
def manner(
    policy: Policy,
    suite: Suite = "libero_object",
    layouts: Annotated[int, typer.Option(help="How many layouts, each run in every style.")] = 30,
    kind: Annotated[str, typer.Option(help="official, jitter or random layouts.")] = "random",
    styles: Annotated[str, typer.Option(help="Styles to pair, comma separated.")] = "plain,quickly,slowly,high",
    tasks: Tasks = "",
    seed: int = 2,
    meshes: Meshes = "original",
    size: Size = 256,
    split: Split = "train",
    limit: Limit = None,
    out: Out = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Does it move as its prompt says? Speed quickly : slowly and carrying height high minus plain, on equal layouts."""
    from sim.evaluation import episodes as runs
    from sim.evaluation.manner import STYLES, summarise, trials
    from sim.layouts import require_kind
    from steer_runtime.errors import SteerError, nearest

    chosen_styles = words(styles)
    for style in chosen_styles or ("",):
        if style not in STYLES:
            raise SteerError("unknown_style", f"style {style[:40]!r} is not known: {nearest(style, STYLES)}")
    require_kind(kind)
    setting = _setting(suite=suite, meshes=meshes, size=size, split=split, limit=limit)
    chosen = runs.chosen_tasks(suite, task_ids(tasks))
    plan = trials(chosen, layouts, seed, kind, chosen_styles)  # type: ignore[arg-type]
    more = {"kind": kind, "tasks": list(chosen), "seed": seed}
    name = "manner" if split == "train" else f"manner-{split}"
    _Run(policy, checkpoint, "manner", name, out, setting, more).episodes(plan, summarise)


@app.command(epilog="Examples:  steer eval rate pocket-libero  ·  steer eval rate pocket-libero --threads 1")
def rate(
    policy: Policy,
    inferences: Annotated[int, typer.Option(min=1, help="Timed ones.")] = 50,
    warm_up: Annotated[int, typer.Option(min=0, help="Untimed ones before them.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 2,
    suite: Suite = "libero_object",
    size: Size = 256,
    out: Out = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Actions a second from camera images to actions, where the time goes, and memory. Leave the machine alone meanwhile."""
    from sim.benchmark import use_software_rendering
    from sim.evaluation import rate as rates
    from sim.policy_actor import observation_of
    from sim.scene import Scene

    use_software_rendering()
    setting = _setting(suite=suite, size=size)
    loaded = load(policy, checkpoint)
    with Scene(suite, 0, render=True) as scene:
        scene.begin(scene.task.initial_states[0])
        observation = observation_of(scene, scene.task.instruction, size)
    with bar("inferences", warm_up + inferences) as tick:
        timings = rates.measure(
            loaded, observation, inferences=inferences, warm_up=warm_up, threads=threads,
            on_inference=lambda done, _: tick(1, "inferences"),
        )  # fmt: skip
    more = {"inferences": inferences, "warm_up": warm_up, "threads": threads}
    _finish_without_episodes(loaded, "rate", out, setting, more, rates.summarise(loaded, timings, threads))


@app.command(
    epilog="Examples:  steer eval labels pocket-libero  ·  steer eval labels pocket-untrained --kept 0-3,26-29"
)
def labels(
    policy: Policy,
    layers: Annotated[
        str, typer.Option(help="The policy's layers, e.g. 4-7; default: those of the published model's later half.")
    ] = "",
    kept: Annotated[
        str, typer.Option(help="SmolLM2's layers that the policy began with, where its checkpoint does not say.")
    ] = "",
    out: Out = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Share of value vectors whose top-10 tokens still overlap the published SmolLM2's by half or more."""
    from sim.evaluation import labels as surviving
    from steer_runtime.cli.pocket import parse_layers
    from steer_runtime.policies.pocket import smollm2_base

    loaded = load_openvla(policy, checkpoint, "steer eval labels")
    base = surviving.require_base(loaded, smollm2_base(parse_layers(kept)) if kept else None)
    chosen = tuple(parse_layers(layers)) if layers else surviving.late_layers(base)
    with bar("layers", len(chosen)) as tick:
        shares = surviving.survival(
            loaded, base, chosen, on_layer=lambda layer, value: tick(1, f"layer {layer}: {value:.1%}")
        )
    more = {"layers": list(chosen), "base": base.package, "published_layers": list(base.layers)}
    _finish_without_episodes(loaded, "labels", out, None, more, surviving.summarise(loaded, base, shares))


@app.command(
    epilog="Examples:  steer eval axis pocket-libero --axis speed --site 6 --norm 110  ·  "
    "steer eval axis pocket-libero --axis height --form neurons --layers 5 --alpha 20 --span text --episodes 0"
)
def axis(
    policy: Policy,
    axis: Annotated[str, typer.Option(help="speed, height or careful.")] = "speed",
    form: Annotated[
        str, typer.Option(help="neurons (overridden) or dense (a vector added to the residual stream).")
    ] = "dense",
    strengths: Annotated[
        str, typer.Option(help="Above 0 and at most 1; each is used in both signs.")
    ] = "0.2,0.4,0.6,0.8,1",
    random_draws: Annotated[int, typer.Option(min=0, help="Random axes of the same form and norm, of each kind.")] = 20,
    episodes: Annotated[int, typer.Option(min=0, help="Layouts in closed loop; 0: offline only.")] = 10,
    random_episodes: Annotated[int, typer.Option(min=0, help="How many of these layouts the random axes run on.")] = 2,
    random_strengths: Annotated[
        str,
        typer.Option(
            help="Closed loop: strengths of the random axes, comma separated; empty: all. Others prove nothing."
        ),
    ] = "",
    layers: Annotated[str, typer.Option(help="Neurons: the policy's layers, e.g. 4-7; default: its later half.")] = "",
    count: Annotated[int, typer.Option(help="Neurons: how many.")] = 20,
    alpha: Annotated[float, typer.Option(help="Neurons: activation written at strength 1.")] = 4.0,
    site: Annotated[int, typer.Option(help="Dense: 0 the embeddings, i + 1 the output of layer i.")] = 0,
    norm: Annotated[float, typer.Option(help="Dense: norm at strength 1, in mean norms of a word embedding.")] = 1.0,
    span: Annotated[
        str, typer.Option(help="Token roles, comma separated; default: text for dense, all for neurons.")
    ] = "",
    moments: Annotated[int, typer.Option(help="Offline: observations that every condition is asked about.")] = 48,
    bank_episodes: Annotated[int, typer.Option(help="Offline: expert episodes that they are taken from.")] = 6,
    recording: Annotated[
        Path | None, typer.Option(help="Offline: a folder of `steer data record` to take them from instead.")
    ] = None,
    suite: Suite = "libero_object",
    tasks: Tasks = "",
    seed: int = 3,
    meshes: Meshes = "thin",
    size: Size = 256,
    limit: Limit = None,
    out: Out = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Does an axis made of words alone move what it names, beyond random axes? Offline and in closed loop.

    Prompts are neutral. The file may grow: more strengths, draws and layouts of the same axis go on where it stopped.
    """
    from dataclasses import asdict

    from sim.benchmark import use_software_rendering
    from sim.evaluation import axis as axes
    from sim.evaluation import axis_directions as making
    from sim.evaluation import dose_response as verdicts
    from sim.evaluation import episodes as runs
    from sim.evaluation.bank import BankSpec, bank, bank_path
    from steer_runtime.results import results

    setting = _setting(suite=suite, meshes=meshes, size=size, limit=limit)
    chosen = runs.chosen_tasks(suite, task_ids(tasks))
    use_software_rendering()
    loaded = load_openvla(policy, checkpoint, "steer eval axis")
    spec = making.spec(loaded, axis, form, words(span), layers, count, alpha, site, norm)
    basis = making.basis_of(loaded, axis)
    draws = making.make(loaded, spec, basis, random_draws, seed)
    wanted = axes.conditions(draws, options.strengths(strengths))
    tested = [c for c in wanted if c.kind in (axes.OFF, "words")]
    drawn = [c for c in wanted if c not in tested]
    layouts = runs.randomised(chosen, episodes, seed) if episodes else []
    known = options.strengths(strengths)
    ridden = axes.only(drawn, options.strengths(random_strengths) if random_strengths else known, known)
    closed = {**axes.closed_trials(layouts, tested), **axes.closed_trials(layouts[:random_episodes], ridden)}
    moments_spec = BankSpec(moments, bank_episodes, suite, seed, size, meshes == "thin", str(recording or ""))

    name = f"axis-{axis}-{form}-" + (f"site{site}-norm{norm:g}" if form == "dense" else f"alpha{alpha:g}")
    path = results_path(loaded, name, out)
    more = {
        "axis": asdict(spec), "words": basis.used, "left_out": basis.left_out, "bank": asdict(moments_spec),
        "tasks": list(chosen), "seed": seed,
    }  # fmt: skip
    configuration = runs.configuration(loaded, "axis", setting, **more)
    with results(path, configuration) as file:
        with bar("moments", bank_episodes) as tick:
            asked = bank(
                moments_spec, bank_path(path.parent, moments_spec, chosen), chosen, lambda *_: tick(1, "moments")
            )
        missing = [c for c in wanted if f"offline-{c.key}" not in file.rows]
        with axes.Steered(loaded, draws) as steered:
            with bar("offline", len(missing)) as tick:
                rows = axes.run_offline(loaded, steered, asked, wanted, file, lambda c: tick(1, f"offline {c.key}"))
            with bar("closed loop", len(closed)) as tick:
                tick(sum(key in file.rows for key in closed), "closed loop")
                episodes_run = runs.run_trials(
                    loaded, [trial for trial, _ in closed.values()], setting, file,
                    infer_for=lambda trial: steered.infer(closed[trial.key][1]),
                    on_trial=lambda trial, _: tick(1, trial.key),
                )  # fmt: skip
    closed_rows = axes.closed_rows(episodes_run, closed)
    offline = [verdicts.respond(rows, axis, measure, sign) for measure, sign in axes.OFFLINE[axis]]
    whole = [verdicts.respond(closed_rows, axis, measure, sign) for measure, sign in axes.CLOSED[axis]]
    responses = [r for r in (*offline, *whole) if r is not None]
    finish(loaded, path, configuration, verdicts.summarise(responses), episodes_run)
    if responses:
        chart = verdicts.draw_chart(responses, f"{loaded.name}: {name}", path.with_suffix(".html"))
        typer.echo(str(chart))


@app.command("table", epilog="Examples:  steer eval table out/eval/*.summary.json")
def reach_table(
    summaries: Annotated[list[Path], typer.Argument(help="Summaries that the other commands wrote.")],
) -> None:
    """Every measured row that has a target, side by side."""
    from rich.console import Console

    from sim.evaluation.statistics import read_summary

    read = [read_summary(path) for path in summaries]
    names = ", ".join(dict.fromkeys(name for name, _, _ in read))
    hours = sum(spent for _, spent, _ in read)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table(names, [line for _, _, lines in read for line in lines if line.aim is not None]))
    console.print(f"{hours:.1f} hours of episodes")


@dataclass(frozen=True)
class _Run:
    """One command on one policy: where results go and what they were measured with."""

    policy: str
    checkpoint: Path | None
    command: str
    name: str
    out: Path | None
    setting: Setting
    more: Mapping[str, Any]

    def episodes(self, trials: Sequence[Trial], summarise: Callable[[Sequence[Mapping[str, Any]]], list[Line]]) -> None:
        """Run the trials that are missing, write the summary and print it."""
        from sim.benchmark import use_software_rendering
        from sim.evaluation import episodes as runs
        from steer_runtime.results import results

        use_software_rendering()
        loaded = load(self.policy, self.checkpoint)
        configuration = runs.configuration(loaded, self.command, self.setting, **self.more)
        path = results_path(loaded, self.name, self.out)
        with results(path, configuration) as file, bar("episodes", len(trials)) as tick:
            tick(sum(trial.key in file.rows for trial in trials), "going on" if file.rows else "episodes")

            def on_trial(trial: Trial, row: Mapping[str, Any]) -> None:
                done = "refused" if "refused" in row else f"{row['steps']} steps{', success' * row['done']}"
                tick(1, f"{trial.key}: {done}")

            rows = runs.run_trials(loaded, trials, self.setting, file, on_trial=on_trial)
        finish(loaded, path, configuration, summarise(rows), rows)


def load(policy: str, checkpoint: Path | None) -> LoadedPolicy:
    """The policy of a YAML or a bare name."""
    from steer_runtime.policies import load_policy

    return load_policy(policy, checkpoint=checkpoint)


def load_openvla(policy: str, checkpoint: Path | None, what: str) -> OpenVLAPolicy:
    """The same for `what` reads more than actions. Raises SteerError('other_policy')."""
    from steer_runtime.policies import require_openvla

    return require_openvla(load(policy, checkpoint), what)


def results_path(policy: LoadedPolicy, name: str, out: Path | None) -> Path:
    """--out, or out/eval/<policy>-<name>.jsonl. Raises SteerError('bad_out') for a name that does not end in .jsonl."""
    from steer_runtime.errors import SteerError

    if out is not None and out.suffix != ".jsonl":
        raise SteerError("bad_out", f"--out {str(out)[:120]!r} is no results file: expected a name that ends in .jsonl")
    return out or Path("out/eval") / f"{policy.name}-{name}.jsonl"


def finish(
    policy: LoadedPolicy,
    path: Path,
    configuration: Mapping[str, Any],
    lines: Sequence[Line],
    rows: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the summary beside the results and print it."""
    from rich.console import Console

    from sim.evaluation.statistics import write_summary

    written = write_summary(path, configuration, lines, rows)
    console = Console()
    if not console.is_terminal:
        # A file or a pipe has no width of its own, and figures must not be cut.
        console = Console(width=140)
    console.print(table(f"{policy.name}{'' if policy.trained else ' (untrained policy)'}", lines))
    refused = [str(row["refused"]) for row in rows if "refused" in row]
    if refused:
        console.print(f"{len(refused)} trials had no layout and are left out, e.g.: {refused[0]}")
    console.print(f"{written}")


def _finish_without_episodes(
    policy: LoadedPolicy,
    command: str,
    out: Path | None,
    setting: Setting | None,
    more: Mapping[str, Any],
    lines: Sequence[Line],
) -> None:
    from sim.evaluation.episodes import configuration

    finish(policy, results_path(policy, command, out), configuration(policy, command, setting, **more), lines)


def table(title: str, lines: Sequence[Line]) -> Any:
    """A rich table of lines."""
    from rich.table import Table

    out = Table(title=title, title_justify="left")
    for name in ("what", "value", "95 %", "n", "at least", "aim"):
        out.add_column(name, no_wrap=True)
    for line in lines:
        out.add_row(*line.shown())
    return out


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on stderr; the function given advances it and shows a note."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        job = progress.add_task(what, total=total)
        yield lambda by, note: progress.update(job, advance=by, description=note)


def _setting(**values: Any) -> Setting:
    from sim.evaluation.episodes import Setting

    return Setting(**values)
