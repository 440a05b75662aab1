"""`steer data`: demonstrations of the scripted expert, measured and recorded."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="data", help="Demonstrations: measure the scripted expert and record it.", no_args_is_help=True)

Suite = Annotated[str, typer.Option(help="libero_object, libero_spatial or libero_goal.")]
LayoutKind = Annotated[str, typer.Option("--layouts", help="official, jitter or random.")]
Styles = Annotated[str, typer.Option(help="Modulations, comma separated; episodes take them in turn.")]
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

    from sim import score as scoring
    from sim.benchmark import versions
    from sim.rollout import Noise

    plan = _plan(suite, layouts, styles, episodes, seed, tasks, own_target)
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


def _plan(suite: str, layouts: str, styles: str, count: int, seed: int, tasks: str, own_target: bool) -> list:
    from sim.plan import episodes
    from steer_runtime.errors import SteerError

    try:
        chosen = [int(t) for t in tasks.split(",") if t.strip()] or None
    except ValueError:
        raise SteerError(
            "bad_tasks", f"--tasks {tasks[:80]!r} is not a list of task ids: expected for example 0,3,4"
        ) from None
    names = [s.strip() for s in styles.split(",") if s.strip()]
    return episodes(
        suite,
        layouts,  # type: ignore[arg-type]
        names,
        count,
        seed,
        tasks=chosen,
        any_target=not own_target,
    )
