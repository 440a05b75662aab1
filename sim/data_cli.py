"""`steer data`: demonstrations of the scripted expert, measured and recorded."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sim.options import task_ids, words

app = typer.Typer(name="data", help="Demonstrations: measure the scripted expert and record it.", no_args_is_help=True)

Suite = Annotated[str, typer.Option(help="libero_object, libero_spatial or libero_goal.")]
LayoutKind = Annotated[str, typer.Option("--layouts", help="official, jitter, random or mixed (70 % random).")]
Styles = Annotated[str, typer.Option(help="Modulations, comma separated, in turn; mix: drawn for each episode.")]
Tasks = Annotated[str, typer.Option(help="Task ids, comma separated; empty: all that the expert can do.")]
OwnTarget = Annotated[bool, typer.Option("--own-target", help="Only the task's own object, not any graspable one.")]
PositionNoise = Annotated[float, typer.Option(min=0, max=1, help="Noise on executed translation actions (std).")]
RotationNoise = Annotated[float, typer.Option(min=0, max=1, help="Noise on executed rotation actions (std).")]
GripperNoise = Annotated[float, typer.Option(min=0, max=0.5, help="Chance a step that the gripper command flips.")]
DEFAULT_STYLES = "plain,quickly,slowly,high"


@app.command(
    epilog="Examples:  steer data expert --suite libero_object --layouts random --episodes 100  ·  "
    "steer data expert --layouts official --noise 0.2 --json out.json"
)
def expert(
    suite: Suite = "libero_object",
    layouts: LayoutKind = "random",
    episodes: Annotated[int, typer.Option(min=1, help="How many, all modulations together.")] = 100,
    styles: Styles = DEFAULT_STYLES,
    tasks: Tasks = "",
    seed: int = 0,
    own_target: OwnTarget = False,
    noise: PositionNoise = 0.0,
    rotation_noise: RotationNoise = 0.0,
    gripper_noise: GripperNoise = 0.0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write every episode's outcome here.")] = None,
) -> None:
    """Run the expert without rendering and print released success (Wilson 95 %), steps, speed and carrying height."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from sim import plan as plans
    from sim import score as scoring
    from sim.benchmark import versions
    from sim.rollout import Noise

    plan = plans.episodes(
        suite,
        layouts,  # type: ignore[arg-type]
        words(styles),
        episodes,
        seed,
        tasks=task_ids(tasks),
        any_target=not own_target,
    )
    console = Console()
    ticks = iter(track(plan, description="episodes", console=Console(stderr=True)))
    next(ticks)

    def on_episode(scored: scoring.Scored) -> None:
        if not scored.outcome.released:
            e = scored.episode
            console.print(f"failed: task {e.task_id}, {scored.target}, {e.style}, seed {e.seed}: {scored.outcome}")
        next(ticks, None)

    disturbance = Noise(noise, rotation_noise, gripper=gripper_noise)
    results = scoring.score(plan, noise=disturbance, on_episode=on_episode)
    table = Table(title=f"expert on {suite}, {layouts} layouts", title_justify="left")
    for name in ("style", "n", "released", "95 %", "done", "steps", "m/s", "carried m"):
        table.add_column(name, no_wrap=True)
    for row in scoring.summary(results):
        table.add_row(
            row.style,
            str(row.episodes),
            f"{row.released / row.episodes:.1%}",
            f"{row.low:.1%}-{row.high:.1%}",
            f"{row.done / row.episodes:.1%}",
            f"{row.steps:.0f}",
            f"{row.speed:.3f}",
            f"{row.height:.3f}",
        )
    console.print(table)
    speeds = scoring.paired(results, "quickly", "slowly", lambda o: o.speed)
    if speeds:
        ratio = sum(a for a, _ in speeds) / sum(b for _, b in speeds)
        console.print(f"speed, quickly : slowly = {ratio:.2f} ({len(speeds)} equal layouts)")
    heights = scoring.paired(results, "high", "plain", lambda o: o.height)
    if heights:
        difference = sum(a - b for a, b in heights) / len(heights)
        console.print(f"carrying height, high minus plain = {difference * 100:.1f} cm ({len(heights)} equal layouts)")
    console.print("versions: " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    if json_out is not None:
        rows = [{**asdict(r.episode), "target": r.target, **asdict(r.outcome)} for r in results]
        json_out.parent.mkdir(parents=True, exist_ok=True)
        json_out.write_text(json.dumps({"versions": versions(), "episodes": rows}, indent=1))


@app.command(
    epilog="Examples:  steer data record out/data/object --episodes 400 --noise 0.2 --rotation-noise 0.1  ·  "
    "steer data record out/data/plain --no-images --layouts mixed --stride 2  ·  "
    "steer data record out/data/official --layouts official --own-target --original-meshes"
)
def record(
    folder: Annotated[Path, typer.Argument(help="Where the recording goes; an existing one is continued.")],
    suite: Suite = "libero_object",
    layouts: LayoutKind = "random",
    episodes: Annotated[int, typer.Option(min=1, help="How many there shall be; may grow from run to run.")] = 100,
    styles: Styles = "mix",
    tasks: Tasks = "",
    seed: int = 0,
    own_target: OwnTarget = False,
    size: Annotated[int, typer.Option(help="Pixels of both sides of both cameras.")] = 128,
    stride: Annotated[int, typer.Option(help="A sample (images, counterfactual labels) every so many steps.")] = 1,
    no_images: Annotated[bool, typer.Option("--no-images", help="Render nothing, which is what costs most.")] = False,
    original_meshes: Annotated[
        bool, typer.Option("--original-meshes", help="Draw the full meshes: five times slower.")
    ] = False,
    noise: PositionNoise = 0.0,
    rotation_noise: RotationNoise = 0.0,
    gripper_noise: GripperNoise = 0.0,
    policy: Annotated[
        str,
        typer.Option(help="DAgger: this policy (a YAML, or a name of configs/policies/) drives, the expert labels."),
    ] = "",
    expert_share: Annotated[
        float | None,
        typer.Option(help="With --policy: share of the steps that the expert drives even so; default 0.3."),
    ] = None,
) -> None:
    """Record the expert in LIBERO's HDF5 layout. Interrupt it at any moment; the same command goes on."""
    from rich.console import Console

    from sim.benchmark import use_software_rendering
    from sim.record import Progress, Recording
    from sim.record import record as record_all
    from sim.rollout import Noise
    from steer_runtime.errors import SteerError

    if not no_images:
        use_software_rendering()
    driver, disturbed = None, noise or rotation_noise or gripper_noise
    if policy and (no_images or disturbed):
        given = "--no-images" if no_images else "noise"
        raise SteerError(
            "bad_recording",
            f"--policy was given with {given}: a policy needs pictures and errs by itself; drop {given}",
        )
    if expert_share is not None and not policy:
        raise SteerError(
            "bad_recording", "--expert-share was given without --policy: the expert drives anyway; drop it"
        )
    if policy:
        from sim.evaluation.episodes import identity
        from steer_runtime.policies import load_policy

        driver = load_policy(policy)
    recording = Recording(
        suite=suite,
        layout=layouts,  # type: ignore[arg-type]
        styles=words(styles),
        episodes=episodes,
        seed=seed,
        tasks=task_ids(tasks),
        any_target=not own_target,
        size=size,
        stride=stride,
        thin=not original_meshes,
        images=not no_images,
        noise=Noise(noise, rotation_noise, gripper=gripper_noise),
        driver=identity(driver)["sha256"][:16] if driver is not None else "",
        expert_share=1.0 if driver is None else 0.3 if expert_share is None else expert_share,
    )
    last: Progress | None = None
    with _bar() as bar:
        job = bar.add_task("episodes", total=episodes)

        def on_episode(progress: Progress) -> None:
            e = progress.episode
            note = f"task {e.task_id} {progress.target} {e.style} {'/'.join(e.manner.words())}: {progress.steps} steps, {progress.seconds:.1f} s"
            bar.update(job, completed=progress.recorded + progress.failed, description=note)

        try:
            last = record_all(recording, folder, on_episode, driver)
        except KeyboardInterrupt:
            Console(stderr=True).print(f"every finished episode is safe in {folder}; the same command goes on")
            raise
    done = f"{last.recorded} episodes, {last.failed} failed" if last else "nothing was missing"
    Console().print(f"{folder}: {done}")


@app.command(epilog="Examples:  steer data frames out/data/frames --shards 60 --frames 256")
def frames(
    folder: Annotated[Path, typer.Argument(help="Where the shards go; an existing folder is continued.")],
    suite: Suite = "libero_object",
    shards: Annotated[int, typer.Option(min=1, help="How many files there shall be.")] = 40,
    per_shard: Annotated[int, typer.Option("--frames", help="Frames a shard, each from both cameras.")] = 256,
    seed: int = 0,
    size: Annotated[int, typer.Option(help="Pixels of both sides of both cameras.")] = 128,
    original_meshes: Annotated[bool, typer.Option("--original-meshes", help="Draw the full meshes.")] = False,
) -> None:
    """Record pictures with teleported objects and their positions, to train vision on."""
    from rich.console import Console

    from sim.benchmark import use_software_rendering
    from sim.frames import Frames, record_frames

    use_software_rendering()
    configuration = Frames(suite, shards, per_shard, seed, size, not original_meshes)
    with _bar() as bar:
        job = bar.add_task("shards", total=shards)
        made = record_frames(configuration, folder, lambda done, _: bar.update(job, completed=done))
    Console().print(f"{folder}: {made} shards made")


@app.command(epilog="Examples:  steer data check out/data/object")
def check(folder: Annotated[Path, typer.Argument(help="A folder that `steer data record` wrote.")]) -> None:
    """Read every episode, hold it against its checksum, and print what the recording holds."""
    from collections import Counter

    from rich.console import Console
    from rich.table import Table

    from sim.demonstrations import iterate
    from sim.manner import SLOTS

    styles: Counter[str] = Counter()
    targets: Counter[str] = Counter()
    words: Counter[str] = Counter()
    steps = samples = size = 0
    for demo in iterate(folder):
        styles[demo.attributes["style"]] += 1
        targets[demo.attributes["target_label"]] += 1
        for (slot, choices), index in zip(SLOTS.items(), demo.attributes["manner"], strict=True):
            words[f"{slot}: {choices[index]}"] += 1
        steps += int(demo.attributes["num_samples"])
        samples += len(demo.arrays["obs/image_index"])
        size += demo.path.stat().st_size
    table = Table("what", "episodes")
    for name, count in [*styles.most_common(), *sorted(words.items()), *targets.most_common()]:
        table.add_row(name, str(count))
    console = Console()
    console.print(table)
    console.print(
        f"{styles.total()} episodes, {steps} steps, {samples} samples, {size / 1e6:.0f} MB, every checksum fits"
    )


@app.command(
    epilog="Examples:  steer data moments out/data/object-held-out --out out/moments/neutral.safetensors  ·  "
    "steer data moments out/data/object --out out/moments/told.safetensors --told --count 240 --episodes 40  ·  "
    "steer data moments out/data/object --out out/moments/carry.safetensors --parts carry --count 40 --episodes 40"
)
def moments(
    folder: Annotated[Path, typer.Argument(help="A folder that `steer data record` wrote, with pictures.")],
    out: Annotated[Path, typer.Option(help="The file of moments to write; one that is there is replaced.")],
    count: Annotated[
        int, typer.Option(min=4, help="Moments in all, evenly over approach, descent, carry and lowering.")
    ] = 96,
    episodes: Annotated[int, typer.Option(min=1, help="The first so many episodes.")] = 10,
    told: Annotated[
        bool, typer.Option("--told", help="Keep the prompt's words on pace, height and care; default: neutral prompts.")
    ] = False,
    parts: Annotated[
        str, typer.Option(help="Only these parts of an episode, comma separated, such as carry; empty: all four.")
    ] = "",
    seed: int = 0,
) -> None:
    """Take observations and what was measured at them from a recording, for finders and for scoring directions."""
    from sim.evaluation.bank import BankSpec, recorded_moments
    from steer_runtime.moments import QUANTITIES, save_moments

    spec = BankSpec(count, episodes, seed=seed, recording=str(folder), told=told)
    only = [name.strip() for name in parts.split(",") if name.strip()]
    found = recorded_moments(spec, only)
    save_moments(
        out, found, {"recording": folder.name, "told": told, "seed": seed, **({"parts": only} if only else {})}
    )
    phases = ", ".join(sorted({m.phase for m in found}))
    typer.echo(f"{len(found)} moments of {len({m.episode for m in found})} episodes ({phases}) written to {out}")
    typer.echo("measured: " + ", ".join(f"{name} ({unit})" for name, unit in QUANTITIES.items()))


def _bar():  # type: ignore[no-untyped-def]
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
