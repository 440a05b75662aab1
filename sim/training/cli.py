"""`steer train`: vision, policy, learning curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sim.training.demonstration_data import DemonstrationData
    from sim.training.settings import Common, ExpertTraining, PolicyTraining, VisionTraining
    from sim.training.trainer import Result, Subject
    from sim.training.vision_weights import TowerFile

app = typer.Typer(name="train", help="Train the pocket policies: vision, then actions.", no_args_is_help=True)

Config = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="A file of configs/training/.")]
Data = Annotated[Path, typer.Option(help="Directory that the recordings of the file are in.")]
Out = Annotated[Path, typer.Option(help="Directory of runs; the run's folder bears the name of the file.")]
Minutes = Annotated[float | None, typer.Option(min=0, help="Stop after so long; the same command goes on from there.")]
HELD_OUT_SHARE = 0.03
"""Share of the training frames that is held out to tell over-fitting from a change of meshes."""


@app.command(
    epilog="Examples:  steer train vision configs/training/vision-libero-object.yaml --data /data/steer --minutes 30"
)
def vision(
    config: Config, data: Data = Path("out/data"), out: Out = Path("out/train"), minutes: Minutes = None
) -> None:
    """Teach the vision tower where objects are. Interrupt it at any moment; the same command resumes."""
    from sim.training.frame_data import load_frames
    from sim.training.settings import VisionTraining, read_settings
    from sim.training.vision import VisionSubject, split

    settings = read_settings(config, VisionTraining)
    if settings.start is not None:
        settings = settings.model_copy(update={"start": (config.parent / settings.start).resolve()})
    every = load_frames([data / folder for folder in settings.frames])
    learnt, same = split(every, HELD_OUT_SHARE, settings.seed)
    held_out = {"same": same}
    if settings.held_out:
        held_out["held_out"] = load_frames([data / folder for folder in settings.held_out], classes=every.classes)
    sizes = ", ".join(f"{name} {len(frames)}" for name, frames in {"train": learnt, **held_out}.items())
    typer.echo(f"frames: {sizes}; classes: {', '.join(every.classes)}", err=True)
    subject = VisionSubject(settings, learnt, held_out)
    folder = out / settings.name
    result = _run(settings, subject, folder, minutes)
    _export_tower(
        settings, subject, folder, result, {name: len(frames) for name, frames in held_out.items()}, len(learnt)
    )


@app.command(epilog="Examples:  steer train policy configs/training/policy-libero-object.yaml --data /data/steer")
def policy(
    config: Config, data: Data = Path("out/data"), out: Out = Path("out/train"), minutes: Minutes = None
) -> None:
    """Teach a policy to act. Interrupt it at any moment; the same command resumes."""
    from sim.training.assembly import assemble, go_on, write_policy
    from sim.training.distillation import kept, teach
    from sim.training.policy import PolicySubject
    from sim.training.settings import PolicyTraining, read_settings
    from sim.training.vision_weights import load_tower
    from steer_runtime.errors import SteerError
    from steer_runtime.policies.pocket import find_gguf, load_smollm2, with_action_tokens

    settings = read_settings(config, PolicyTraining)
    tower = load_tower((config.parent / settings.vision).resolve())
    folder = out / settings.name
    finished = folder / "policy"
    if finished.exists():
        raise SteerError("exists", f"{finished} exists already: remove it or train under another name")

    learnt, held_out = _demonstrations(settings, tower, data, out)
    source, tokenizer = load_smollm2(find_gguf())
    with_action_tokens(tokenizer)
    model = assemble(settings, tower, tokenizer)
    origin = {"vision_sha256": tower.digest}
    table: dict[str, Any] | None = None
    if settings.start is not None:
        origin["start_sha256"], table = go_on(model, (config.parent / settings.start).resolve(), settings.suite)
    teaching = None
    if settings.distillation.weight:
        spec = settings.distillation
        path = out / f"teaching-{settings.seed}-{spec.texts}-{spec.length}-{spec.top}.safetensors"
        with _counting("texts that SmolLM2 writes") as tick:
            teaching = kept(path, partial(teach, source, spec, settings.seed, model.config.lm.bos_token_id, tick))
    base = model.config.base
    origin["smollm2_sha256"] = base.sha256 if base else ""
    subject = PolicySubject(settings, model, tokenizer, learnt, held_out, teaching=teaching, origin=origin, table=table)
    result = _run(settings, subject, folder, minutes)
    if result.finished:
        card = _card(settings, subject, result, {"samples": len(learnt), "episodes": int(learnt.episode.max()) + 1})
        typer.echo(write_policy(subject.net.settle(), finished, subject.table, card, tokenizer=tokenizer))


@app.command(epilog="Examples:  steer train expert configs/training/expert-libero-object.yaml --data /data/steer")
def expert(
    config: Config, data: Data = Path("out/data"), out: Out = Path("out/train"), minutes: Minutes = None
) -> None:
    """Teach Pi0's action expert on a trained policy's language model. Interrupt it at any moment; the same command resumes."""
    import torch

    from sim.training.expert import ExpertSubject
    from sim.training.pi0_assembly import around, write_pi0
    from sim.training.settings import ExpertTraining, read_settings
    from sim.training.vision_weights import tower_of
    from steer_runtime.errors import SteerError
    from steer_runtime.policies.openvla.checkpoint import load_checkpoint
    from steer_runtime.policies.pocket import find_gguf, load_smollm2
    from steer_runtime.policies.shards import weights_digest

    settings = read_settings(config, ExpertTraining)
    source = (config.parent / settings.prefix).resolve()
    folder = out / settings.name
    finished = folder / "policy"
    if finished.exists():
        raise SteerError("exists", f"{finished} exists already: remove it or train under another name")
    openvla, _ = load_checkpoint(source, dtype=torch.float32)
    network = around(openvla, settings)
    origin = {"prefix_sha256": weights_digest(source)}
    learnt, held_out = _demonstrations(settings, tower_of(openvla, origin["prefix_sha256"]), data, out)
    _, tokenizer = load_smollm2(find_gguf())
    subject = ExpertSubject(settings, network, tokenizer, learnt, held_out, origin=origin)
    result = _run(settings, subject, folder, minutes)
    if result.finished:
        card = _card(settings, subject, result, {"samples": len(learnt), "episodes": int(learnt.episode.max()) + 1})
        typer.echo(write_pi0(network, finished, subject.table, card, tokenizer=tokenizer))


def _demonstrations(
    settings: PolicyTraining | ExpertTraining, tower: TowerFile, data: Path, out: Path
) -> tuple[DemonstrationData, dict[str, DemonstrationData]]:
    """What is learnt from and what is held out, as the tower sees it."""
    from sim.training.demonstration_data import load_demonstrations

    def load(folders: tuple[Path, ...]) -> DemonstrationData:
        paths, seen = [data / folder for folder in folders], out / "seen"
        with _counting("episodes") as tick:
            return load_demonstrations(paths, tower.heat.classes, settings.chunk, tower.tower, tower.digest, seen, tick)

    learnt = load(settings.demonstrations)
    held_out = {"held_out": load(settings.held_out)} if settings.held_out else {}
    typer.echo(f"samples: train {len(learnt)}, " + ", ".join(f"{k} {len(v)}" for k, v in held_out.items()), err=True)
    return learnt, held_out


@app.command(epilog="Examples:  steer train plot out/train/vision-libero-object")
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several are drawn over one another.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file; default: curves.html in the first run.")] = None,
) -> None:
    """Draw learning curves from the logs of runs."""
    from sim.training.log import plot as draw

    typer.echo(draw(runs, out or runs[0] / "curves.html"))


def _export_tower(
    settings: VisionTraining, subject: Subject, folder: Path, result: Result, held_out: dict[str, int], frames: int
) -> None:
    from sim.training.vision import VisionSubject
    from sim.training.vision_weights import save_tower

    assert isinstance(subject, VisionSubject)
    shape = settings.tower
    scores = dict(subject.validate())
    data = {"folders": [str(p) for p in settings.frames], "frames": frames, "held_out_frames": held_out}
    about = {
        "what": "vision tower of the pocket OpenVLA: heatmaps of object classes, two cameras",
        **_card(settings, subject, result, data, scores),
    }
    path = save_tower(subject.tower, subject.heat, shape.image_size, folder / "vision", about)
    typer.echo(f"{path}: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))


def _card(
    settings: Common,
    subject: Subject,
    result: Result,
    data: dict[str, Any],
    scores: dict[str, float] | None = None,
) -> dict[str, Any]:
    """What a reader of the weights needs to know of their making."""
    from sim.benchmark import versions

    return {
        "data": {**data, **subject.fingerprint()},
        "training": {
            "configuration": settings.identity(),
            "steps_done": result.step,
            "samples_seen": result.step * settings.batch,
            "hours": round(result.seconds / 3600, 3),
            "finished": result.finished,
        },
        "scores": {name: round(value, 4) for name, value in (scores or dict(result.scores)).items()},
        "versions": versions(),
        "licence": "Apache-2.0; trained on renderings of LIBERO's scenes (MIT)",
    }


@contextmanager
def _counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; the function given hears how many are done of how many."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        job = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(job, completed=done, total=total)


def _run(settings: Common, subject: Subject, folder: Path, minutes: float | None) -> Result:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sim.training.trainer import Progress as Done
    from sim.training.trainer import train

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console) as bar:
        job = bar.add_task("steps", total=settings.steps)
        smooth: list[float] = []

        def show(done: Done) -> None:
            smooth.append(done.loss if not smooth else 0.95 * smooth[-1] + 0.05 * done.loss)
            del smooth[:-1]
            score = next((f", {k} {v:.2f}" for k, v in reversed(list(done.scores.items())) if "_median" in k), "")
            bar.update(job, completed=done.step, description=f"loss {smooth[-1]:.3f}{score}")

        result = train(settings, subject, folder, seconds=None if minutes is None else 60 * minutes, on_step=show)
    if not result.finished:
        console.print(f"stopped at step {result.step} of {settings.steps}: the same command goes on from there")
    return result
