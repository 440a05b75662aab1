"""`steer eval video`: one axis of words at several strengths, side by side from the same start.

Invariant: nothing but the strength differs between the episodes: layout, instruction, policy and pictures are the same.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import numpy as np

    from sim.evaluation.episodes import Infer
    from sim.evaluation.motion import Motion
    from sim.scene import Scene
    from sim.video import Panel
    from steer_runtime.policies.openvla.policy import OpenVLAPolicy

EVERY = 2
"""Control steps a picture: 10 pictures a second at 20 Hz, played as fast as they were taken."""
_FPS = 10.0
_WINDOW = 10  # control steps over which the shown speed is a mean


@dataclass(frozen=True)
class Film:
    """One filmed episode. said: word -> inferences."""

    panel: Panel
    motion: Motion
    said: dict[str, int]


@dataclass(frozen=True)
class Shot:
    """What every film of a video begins with; see `sim.evaluation.episodes.start`. limit: control steps. size: pixels."""

    state: np.ndarray
    settle: int
    target: str
    targets: tuple[str, ...]
    instruction: str
    limit: int
    size: int


def film(policy: OpenVLAPolicy, scene: Scene, shot: Shot, label: str, infer: Infer) -> Film:
    """Run one episode until the target is let go, or a while after success, or to the limit, and film it."""
    import numpy as np

    from sim.demonstrations import as_seen
    from sim.evaluation.episodes import GRACE
    from sim.evaluation.motion import RATE_HZ, Watch
    from sim.policy_actor import PolicyActor
    from sim.video import Panel, says

    first = scene.begin(shot.state, settle=shot.settle)
    watch = Watch(first, shot.target, shot.targets)
    actor = PolicyActor(policy, scene, shot.instruction, size=shot.size, infer=infer)
    path, images, captions = [first.eef], [], []
    placed_at = since = 0

    def picture() -> None:
        words = says([word.strip() for word in actor.said[-1]])
        recent = np.array(path[-_WINDOW - 1 :])
        speed = np.linalg.norm(np.diff(recent, axis=0), axis=1).mean() * RATE_HZ if len(recent) > 1 else 0.0
        outcome = f"   placed after {placed_at / RATE_HZ:.1f} s" if placed_at else ""
        images.append(as_seen(scene.render("agentview", shot.size)))
        captions.append(
            (words or "says nothing", f"{(len(path) - 1) / RATE_HZ:.1f} s   {100 * speed:.0f} cm/s{outcome}")
        )

    for step in range(shot.limit):
        action = actor()
        if step % EVERY == 0:
            picture()
        scene.step(action)
        snapshot = scene.snapshot()
        path.append(snapshot.eef)
        watch.add(snapshot, {name for name in shot.targets if scene.satisfied(name)})
        placed_at = placed_at or (step + 1) * watch.done
        since += watch.done
        if watch.released or since > GRACE:
            break
    picture()
    said = Counter(word.strip() for words in actor.said for word in words)
    return Film(Panel(label, np.stack(images), captions), watch.motion(), dict(said))


def video(
    policy: Annotated[str, typer.Argument(help="A policy YAML, or a bare name of configs/policies/.")],
    axis: Annotated[str, typer.Option(help="speed, height or careful.")] = "speed",
    strengths: Annotated[str, typer.Option(help="From -1 to 1, comma separated; 0 is unsteered.")] = "-1,0,1",
    form: Annotated[str, typer.Option(help="neurons or dense, as for `steer eval axis`.")] = "dense",
    layers: Annotated[str, typer.Option(help="Neurons: the policy's layers, e.g. 4-7; default: its later half.")] = "",
    count: Annotated[int, typer.Option(help="Neurons: how many.")] = 20,
    alpha: Annotated[float, typer.Option(help="Neurons: activation written at strength 1.")] = 4.0,
    site: Annotated[int, typer.Option(help="Dense: 0 the embeddings, i + 1 the output of layer i.")] = 0,
    norm: Annotated[float, typer.Option(help="Dense: norm at strength 1, in mean norms of a word embedding.")] = 1.0,
    span: Annotated[str, typer.Option(help="Token roles; default: text for dense, all for neurons.")] = "",
    suite: Annotated[str, typer.Option(help="libero_object, libero_spatial or libero_goal.")] = "libero_object",
    task: Annotated[int, typer.Option(help="Task of the suite.")] = 0,
    layout: Annotated[str, typer.Option(help="official, jitter or random.")] = "official",
    seed: Annotated[int, typer.Option(help="Initial state of an official layout, else the layout's seed.")] = 0,
    meshes: Annotated[str, typer.Option(help="original, or thin (five times cheaper pictures).")] = "original",
    size: Annotated[int, typer.Option(help="Pixels of a picture's sides.")] = 256,
    limit: Annotated[int | None, typer.Option(help="Control steps; default: the suite's own limit.")] = None,
    out: Annotated[Path | None, typer.Option(help="The MP4; default: out/eval/<policy>-<axis>.mp4.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Another checkpoint than the policy file names.")] = None,
) -> None:
    """Film one axis of words at several strengths on the same layout, side by side."""
    from sim import layouts, options
    from sim.benchmark import require_versions, use_software_rendering
    from sim.demonstrations import write_atomically
    from sim.evaluation import axis as axes
    from sim.evaluation import axis_directions as making
    from sim.evaluation.episodes import Setting, Trial, chosen_tasks, start
    from sim.scene import Scene
    from sim.video import mp4, side_by_side
    from steer_runtime.policies import load_policy, require_openvla

    setting = Setting(suite=suite, meshes=meshes, size=size, limit=limit)  # type: ignore[arg-type]
    (chosen,) = chosen_tasks(suite, [task])
    layouts.require_kind(layout)
    wanted = options.strengths(strengths)
    require_versions()
    use_software_rendering()
    loaded = require_openvla(load_policy(policy, checkpoint=checkpoint), "steer eval video")
    spec = making.spec(loaded, axis, form, options.words(span), layers, count, alpha, site, norm)
    draws = making.make(loaded, spec, making.basis_of(loaded, axis), 0, 0)
    panels = []
    with Scene(suite, chosen, render=True) as scene, axes.Steered(loaded, draws) as steered:
        if meshes == "thin":
            scene.thin_meshes()
        targets = tuple(layouts.targets(scene))
        state, settle, target, moved = start(scene, targets, Trial("video", chosen, layout, seed))  # type: ignore[arg-type]
        shot = Shot(state, settle, target, targets, scene.instruction(target, moved), setting.steps, size)
        for strength in wanted:
            condition = axes.Condition(axis, "words", strength) if strength else axes.Condition(axes.OFF, axes.OFF, 0.0)
            label = f"{axis} {strength:+g}" if strength else "not steered"
            taken = film(loaded, scene, shot, label, steered.infer(condition))
            panels.append(taken.panel)
            speed = "none" if taken.motion.speed is None else f"{100 * taken.motion.speed:.1f} cm/s"
            typer.echo(
                f"{label}: {taken.motion.steps} steps, {'placed' if taken.motion.done else 'not placed'}, mean speed {speed}, "
                f"said {taken.said or 'nothing'}"
            )
    title = f"{loaded.name}{'' if loaded.trained else ' (untrained policy)'}: {shot.instruction}"
    path = out or Path("out/eval") / f"{loaded.name}-{axis}.mp4"
    write_atomically(path, mp4(side_by_side(title, panels), _FPS, quality=26))
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
