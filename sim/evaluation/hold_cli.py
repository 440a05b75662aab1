"""`steer eval hold`: does a closed loop hold a speed or a height, and what does it cost, against fixed strengths?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = (
    "Examples:  steer eval hold speed 0.12 m/s  ·  steer eval hold height 25 cm --axis height-word --fixed=-1,0.5,1  ·  "
    "steer eval hold speed 16 cm/s --fixed '' --controllers pid --strong 2,3"
)


def hold(
    quantity: Annotated[str, typer.Argument(help="speed or height.")],
    target: Annotated[list[str], typer.Argument(help="Number and unit: 0.12 m/s, 25 cm.")],
    policy: Annotated[str, typer.Option(help="A policy YAML, or a bare name of configs/policies/.")] = "pocket-libero",
    axis: Annotated[str, typer.Option(help="Axis of the store; default: <quantity>-word.")] = "",
    store: Annotated[
        Path | None, typer.Option(help="Folder of directions; default: `directions` in the policy's checkpoint.")
    ] = None,
    fixed: Annotated[str, typer.Option(help="Fixed strengths to compare with; empty: none.")] = "-1,-0.7,0.7,1",
    controllers: Annotated[str, typer.Option(help="Controllers: pid, deadband, dither.")] = "pid,deadband,dither",
    strong: Annotated[
        str, typer.Option(help="Times the axis's own alphas: both ends fixed there, and loops with that range.")
    ] = "",
    strong_controllers: Annotated[str, typer.Option(help="Controllers that run with the range of --strong.")] = "pid",
    episodes: Annotated[int, typer.Option(min=1, help="Layouts; each runs under every condition.")] = 10,
    kp: Annotated[float | None, typer.Option(help="Strength a unit of error (m/s or m); default: the preset.")] = None,
    ki: Annotated[float | None, typer.Option(help="Strength a unit of error a second.")] = None,
    kd: Annotated[float | None, typer.Option(help="Strength a unit a second of the measurement.")] = None,
    slew: Annotated[float, typer.Option(help="Largest change of the strength a second.")] = 2.0,
    dose_limit: Annotated[
        float | None, typer.Option(help="Largest relative change of the residual stream that a loop may make.")
    ] = None,
    suite: Annotated[str, typer.Option(help="libero_object, libero_spatial or libero_goal.")] = "libero_object",
    tasks: Annotated[str, typer.Option(help="Task ids, comma separated; empty: all pick-and-place tasks.")] = "",
    seed: int = 3,
    meshes: Annotated[str, typer.Option(help="original (the benchmark's) or thin (five times cheaper).")] = "thin",
    size: Annotated[int, typer.Option(help="Pixels of both sides of both cameras.")] = 128,
    limit: Annotated[int | None, typer.Option(help="Control steps; default: the suite's own limit.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Results file (.jsonl); default: out/eval/<policy>-hold-....")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Another checkpoint than the policy file names.")] = None,
) -> None:
    """Hold a measured speed or height in closed loop while the task goes on, against fixed strengths on equal layouts.

    Writes results, a summary with intervals and a page of strength and measurement against time. The same command goes on
    where it stopped; more layouts, strengths and controllers add to the file.
    """
    from dataclasses import asdict, replace

    from sim import options
    from sim.benchmark import use_software_rendering
    from sim.demonstrations import write_atomically
    from sim.evaluation import episodes as runs
    from sim.evaluation import hold as holding
    from sim.evaluation import hold_measures as measuring
    from sim.evaluation.cli import bar, finish, load, results_path
    from sim.evaluation.hold_chart import draw_hold
    from steer_runtime.directions.store import DirectionStore
    from steer_runtime.policies.registry import checkpoint_of
    from steer_runtime.results import results
    from steer_runtime.setpoint.limits import StrengthLimits
    from steer_runtime.setpoint.presets import CONTROLLERS, GAINS, tuning
    from steer_runtime.setpoint.target import parse_target

    wanted = parse_target(quantity, target)
    given = {"proportional": kp, "integral": ki, "derivative": kd}
    gains = replace(GAINS[quantity], **{name: value for name, value in given.items() if value is not None})
    closed, strongly = options.words(controllers), options.words(strong_controllers)
    tunings = {kind: tuning(kind, quantity, gains) for kind in dict.fromkeys((*closed, *strongly))}
    conditions = holding.hold_conditions(
        options.strengths(fixed) if fixed.strip() else (), closed, _scales(strong), strongly
    )
    setting = runs.Setting(suite=suite, meshes=meshes, size=size, limit=limit)  # type: ignore[arg-type]
    chosen = runs.chosen_tasks(suite, options.task_ids(tasks))
    use_software_rendering()
    loaded = load(policy, checkpoint)
    folder = store or (checkpoint or checkpoint_of(policy)) / "directions"
    held_axis = holding.HeldAxis.load(DirectionStore(folder), axis or f"{quantity}-word", loaded.model_hash)
    limits = StrengthLimits(held_axis.low, held_axis.high, slew, dose=dose_limit)
    planned = holding.hold_trials(runs.randomised(chosen, episodes, seed), conditions)

    path = results_path(loaded, f"hold-{quantity}-{wanted.value:g}-{held_axis.axis.name}", out)
    more = {
        "quantity": quantity, "target": wanted.value,
        "axis": {"name": held_axis.axis.name, "negative": held_axis.negative.id, "positive": held_axis.positive.id},
        "limits": asdict(limits), "controllers": {kind: asdict(tuning(kind, quantity, gains)) for kind in CONTROLLERS},
        "tasks": list(chosen), "seed": seed,
    }  # fmt: skip
    configuration = runs.configuration(loaded, "hold", setting, **more)
    with results(path, configuration) as file, bar("episodes", len(planned)) as tick:
        tick(sum(key in file.rows for key in planned), "going on" if file.rows else "episodes")
        scales = [condition.scale for condition in conditions]
        with holding.HeldPolicy(loaded, held_axis, scales, wanted, limits) as held:
            rows = holding.run_held(
                held, planned, tunings,
                lambda infer_for, also: runs.run_trials(
                    loaded, [trial for trial, _ in planned.values()], setting, file, infer_for=infer_for, also=also,
                    on_trial=lambda trial, _: tick(1, trial.key),
                ),
            )  # fmt: skip
    unit, size_of = ("cm/s", 0.01) if quantity == "speed" else ("cm", 0.01)
    scored = measuring.outcomes(rows, wanted.value)
    finish(loaded, path, configuration, measuring.summarise(scored, conditions, unit, size_of), rows)
    steps = measuring.stair(rows, conditions)
    write_atomically(path.with_suffix(".stair.json"), (_json(steps) + "\n").encode())
    best = measuring.best_fixed(scored, conditions)
    # Everything that a loop did, and what it is held against.
    drawn = [c for c in conditions if c.closed or c.kind == holding.OFF or c.key == best or c.scale != 1.0]
    title = f"{loaded.name}: {quantity} held at {wanted.shown} by {held_axis.axis.name}"
    typer.echo(str(draw_hold(rows, drawn, wanted, steps, title, path.with_suffix(".html"))))


def _scales(text: str) -> tuple[float, ...]:
    from sim import options
    from steer_runtime.errors import SteerError

    try:
        return tuple(float(word) for word in options.words(text))
    except ValueError:
        raise SteerError("bad_scale", f"--strong {text[:80]!r} is no list of numbers: expected such as 2,3") from None


def _json(value: object) -> str:
    import json

    return json.dumps(value, indent=1)
