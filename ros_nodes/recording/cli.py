"""`steer record` and `steer replay`.

Invariant: importing this imports neither ROS, nor torch, nor the libraries of recordings.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from steer_runtime.errors import SteerError

EXIT_DIFFERS = 1

RECORD_EXAMPLES = (
    "Examples:  steer record out/run.mcap  ·  steer record out/run.mcap --no-frames  ·  "
    "steer record out/arm.mcap --topic /joint_states --topic /speed_scaling_state_broadcaster/speed_scaling"
)
REPLAY_EXAMPLES = (
    "Examples:  steer replay out/run.mcap  ·  steer replay out/run.mcap --show  ·  "
    "steer replay out/run.mcap --policy my-policy.yaml --store out/directions --json"
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    app.command("record", epilog=RECORD_EXAMPLES)(record)
    app.command("replay", epilog=REPLAY_EXAMPLES)(replay)


def record(
    out: Annotated[Path, typer.Argument(help="File to write (MCAP); it must not exist.")],
    frames: Annotated[
        bool, typer.Option("--frames/--no-frames", help="Pictures too: without them nothing can be run again.")
    ] = True,
    topic: Annotated[
        list[str] | None, typer.Option("--topic", help="A further topic, with its full name; repeatable.")
    ] = None,
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Namespace to record.")] = "/steer",
    flush: Annotated[
        float, typer.Option("--flush", help="Seconds between writes to disk: what a crash costs.", min=0.05, max=60.0)
    ] = 1.0,
) -> None:
    """Record everything that goes over the topics of a namespace, until Ctrl-C; steering never waits for it."""
    with _needs("record"):
        from ros_nodes.recording.node import RecorderNode
    with _needs("ros"):
        from rclpy.parameter import Parameter

        from ros_nodes.process import serve
    given = {"path": str(out), "frames": frames, "topics": topic or [""], "flush_period_s": flush}
    overrides = [Parameter(name, value=value) for name, value in given.items()]
    serve(lambda: RecorderNode(namespace=namespace, parameter_overrides=overrides), [])


def replay(
    file: Annotated[Path, typer.Argument(help="A recording of `steer record`.")],
    show: Annotated[bool, typer.Option("--show", help="Print what happened instead, one line an event.")] = False,
    policy: Annotated[
        str | None, typer.Option("--policy", help="Policy to run: a YAML file or a name. [default: the recorded one]")
    ] = None,
    store: Annotated[
        Path | None, typer.Option("--store", help="Folder of directions. [default: the recorded one]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run every recorded inference again and compare its actions bit for bit; exit code 1 when one differs."""
    if show:
        _show(file, as_json)
        return
    with _needs("record"), _needs("ros"):
        from ros_nodes.recording.replay import Replay
    console = Console(stderr=True, soft_wrap=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading", total=None)
        report = Replay(file, policy=policy, store=store).run(
            lambda told: progress.update(task, description=told), lambda line: console.print(line, markup=False)
        )
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        style = "green" if report.reproduced else "red"
        Console(soft_wrap=True).print(report.sentence, style=style, markup=False)
    if not report.same and not report.different:
        raise SteerError("nothing_compared", f"nothing of {file} could be compared: {report.sentence}")
    if not report.reproduced:
        raise typer.Exit(EXIT_DIFFERS)


def _show(file: Path, as_json: bool) -> None:
    with _needs("record"):
        from ros_nodes.recording.file import Recording
        from ros_nodes.recording.timeline import timeline
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `steer replay --show | head` ends quietly
    console = Console(soft_wrap=True)
    with Recording(file) as recording:
        for event in timeline(recording):
            if as_json:
                print(json.dumps(asdict(event)))
            else:
                console.print(f"{event.at_s:10.3f}  {event.kind:<12} {event.text}", style=event.style, markup=False)


@contextmanager
def _needs(extra: str) -> Iterator[Any]:
    """A missing package is one sentence. Raises SteerError('no_ros' | 'no_recorder')."""
    try:
        yield
    except ImportError as error:
        if extra == "ros":
            raise SteerError(
                "no_ros",
                f"this verb needs ROS 2 ({error}); install `pip install 'steer-runtime[ros]'` and run "
                "ros_nodes/steer_msgs/build.sh, or source your ROS distribution",
            ) from error
        raise SteerError(
            "no_recorder",
            f"recordings need packages that are missing ({error}); run `pip install 'steer-runtime[record,ros]'`",
        ) from error
