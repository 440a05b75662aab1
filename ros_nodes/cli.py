"""Verbs of the `steer` command that talk to a running policy node: list, pub, state, clear, stop, arm.

Invariant: importing this imports no ROS; a missing ROS or node is one sentence and its own exit code.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ros_nodes import arm_cli, hold_cli
from ros_nodes.demo import demo
from ros_nodes.recording import cli as recording_cli
from steer_runtime.errors import SteerError
from steer_runtime.types import ROLES, Role

if TYPE_CHECKING:
    from ros_nodes.client import NodeState, SteeringClient
    from ros_nodes.status import RobotStatus
    from steer_runtime.steering.command import Verdict

EXIT_REFUSED = 1
EXIT_NO_NODE = 3
ROBOT_S = 0.5
"""Wait for a robot's status before it is taken that none runs."""

Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the policy node.")]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds to wait for the node.", min=0.1, max=600.0)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    app.command("list", epilog="Examples:  steer list  ·  steer list --json")(list_targets)
    app.command(
        "pub",
        # An axis takes negative numbers, which are not options.
        context_settings={"ignore_unknown_options": True},
        epilog="Examples:  steer pub slow 0.5  ·  steer pub slow-fast -0.8  ·  "
        "steer pub slow 0.5 --ramp 0.5 --hold 2 --priority 1 --span text  ·  steer pub motion 1 --steps 0:3  ·  "
        "steer pub slow 0.5 --keep",
    )(publish)
    app.command("state", epilog="Examples:  steer state  ·  steer state --watch  ·  steer state --json")(show_state)
    app.command("clear", epilog="Examples:  steer clear slow  ·  steer clear --all")(clear)
    app.command("stop", epilog="Examples:  steer stop  ·  steer stop --reset")(stop)
    app.command("arm", epilog=arm_cli.EXAMPLES)(arm_cli.arm)
    app.command("demo")(demo)
    app.command("hold", epilog=hold_cli.EXAMPLES)(hold_cli.hold)
    recording_cli.register(app)


def list_targets(namespace: Namespace = "/steer", timeout: Timeout = 8.0, as_json: AsJson = False) -> None:
    """Directions and axes that the running policy node knows."""
    with open_client(namespace) as client:
        state = client.state(timeout)
    if as_json:
        _print_json(
            {"directions": state.directions, "axes": state.axes, "policy": state.policy, "trained": state.trained}
        )
        return
    table = Table("name", "id", "largest strength", title=f"directions of {state.policy_text}", title_justify="left")
    for direction in state.directions:
        table.add_row(direction.name, direction.id, f"{direction.limit:g}")
    axes = Table("axis", "-1", "+1", title="axes", title_justify="left")
    for axis in state.axes:
        axes.add_row(axis.name, axis.negative, axis.positive)
    console = Console()
    console.print(table if state.directions else "no directions are loaded; set the node's parameter direction_store")
    if state.axes:
        console.print(axes)


def publish(
    target: Annotated[str, typer.Argument(help="Direction or axis, as `steer list` shows it.")],
    strength: Annotated[float, typer.Argument(help="0 to 1 for a direction, -1 to 1 for an axis; 0 is off.")],
    ramp: Annotated[float | None, typer.Option("--ramp", help="Seconds to reach it. [default: the node's]")] = None,
    hold: Annotated[float | None, typer.Option("--hold", help="Seconds it lasts. [default: until cleared]")] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Repeat it until Ctrl-C, then clear it; it is released if this process dies.")
    ] = False,
    priority: Annotated[int, typer.Option("--priority", help="The higher one wins.", min=-128, max=127)] = 0,
    span: Annotated[list[str] | None, typer.Option("--span", help=f"Tokens: {', '.join(ROLES)}; repeatable.")] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            "--steps",
            metavar="A:B",
            help="Denoising steps of a flow policy to write in, from A up to, not including, B. [default: all of them]",
        ),
    ] = None,
    source: Annotated[str, typer.Option("--source", help="Name to command under.")] = "steer-cli",
    namespace: Namespace = "/steer",
    timeout: Timeout = 8.0,
    as_json: AsJson = False,
) -> None:
    """Command one direction or axis and print the verdict; exit code 1 when it was refused."""
    if keep and hold is not None:
        raise SteerError("bad_usage", "--keep lasts until Ctrl-C and --hold a number of seconds: give one of them")
    with open_client(namespace, source) as client:
        state = client.state(timeout)
        sent = client.publish(
            target,
            strength,
            ramp_s=ramp,
            hold_s=hold,
            priority=priority,
            span=_span(span),
            steps=_steps(steps),
            timeout=timeout,
        )
        verdict = client.wait_verdict(sent, timeout)
        if keep and verdict.accepted:
            again = client.stream(
                target, strength, ramp_s=ramp, priority=priority, span=_span(span), steps=_steps(steps)
            )
            with again, suppress(KeyboardInterrupt):
                print("kept until Ctrl-C", file=sys.stderr, flush=True)
                threading.Event().wait()
    _finish(verdict, state, as_json)


def clear(
    target: Annotated[str | None, typer.Argument(help="Direction or axis to clear.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Clear all of them.")] = False,
    ramp: Annotated[float | None, typer.Option("--ramp", help="Seconds to fade. [default: at once]")] = None,
    priority: Annotated[int, typer.Option("--priority", help="The higher one wins.", min=-128, max=127)] = 0,
    source: Annotated[str, typer.Option("--source", help="Name to command under.")] = "steer-cli",
    namespace: Namespace = "/steer",
    timeout: Timeout = 8.0,
    as_json: AsJson = False,
) -> None:
    """Stop steering one target, or all of them."""
    if (target is None) != everything:
        raise SteerError(
            "bad_usage", "give either one name or --all, such as `steer clear slow` or `steer clear --all`"
        )
    with open_client(namespace, source) as client:
        state = client.state(timeout)
        sent = client.clear(target, ramp_s=ramp, priority=priority, timeout=timeout)
        verdict = client.wait_verdict(sent, timeout)
    _finish(verdict, state, as_json)


def stop(
    reset: Annotated[bool, typer.Option("--reset", help="Let go of the stop instead; steering stays off.")] = False,
    namespace: Namespace = "/steer",
    timeout: Timeout = 8.0,
) -> None:
    """Emergency stop by software: nothing is steered, no action goes out and an arm's bridge stops.

    --reset lets the policy node go on; a bridge lets go by `steer arm --reset`.
    """
    with open_client(namespace) as client:
        print(client.reset_stop(timeout) if reset else client.stop(timeout))


def show_state(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep showing it until Ctrl-C.")] = False,
    namespace: Namespace = "/steer",
    timeout: Timeout = 8.0,
    as_json: AsJson = False,
) -> None:
    """What the policy node does now, and which chunk and steering the robot's last control step came from."""
    with open_client(namespace) as client:
        state = client.state(timeout)
        robot = client.robot(ROBOT_S)
        if not watch:
            _print_state(state, robot) if as_json else Console().print(_state_view(state, robot))
            return
        try:
            if as_json:
                while True:
                    _print_state(state, robot)
                    state, robot = client.next_state(timeout), client.robot()
            with Live(_state_view(state, robot), refresh_per_second=10) as live:
                while True:
                    state, robot = client.next_state(timeout), client.robot()
                    live.update(_state_view(state, robot))
        except KeyboardInterrupt:
            return


@contextmanager
def open_client(namespace: str, source: str | None = None) -> Iterator[SteeringClient]:
    """A client whose failures are one sentence and an exit code."""
    try:
        from ros_nodes.client import SteeringClient
    except ImportError as error:
        raise SteerError(
            "no_ros",
            f"this verb needs ROS 2 ({error}); install `pip install 'steer-runtime[ros]'` and run "
            "ros_nodes/steer_msgs/build.sh, or source your ROS distribution",
        ) from error
    try:
        with SteeringClient(namespace, source=source) as client:
            yield client
    except SteerError as error:
        if error.code not in ("no_node", "no_state", "no_verdict"):
            raise
        print(error.sentence, file=sys.stderr)
        raise typer.Exit(EXIT_NO_NODE) from None


def _span(names: list[str] | None) -> frozenset[Role] | None:
    if not names:
        return None
    unknown = [name for name in names if name not in ROLES]
    if unknown:
        raise SteerError(
            "bad_span", f"--span {unknown[0][:40]!r} is unknown: expected one or more of {', '.join(ROLES)}"
        )
    return frozenset(cast("list[Role]", names))


def _steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    begin, colon, end = text.partition(":")
    if not (colon and begin.isascii() and begin.isdigit() and end.isascii() and end.isdigit()):
        raise SteerError("bad_steps", f"--steps {text[:40]!r} is no range of steps: expected A:B, such as 0:3")
    return int(begin), int(end)


def _finish(verdict: Verdict, state: NodeState, as_json: bool) -> None:
    if as_json:
        _print_json(verdict)
    else:
        word, style = ("accepted", "green") if verdict.accepted else ("refused", "red")
        line = Text.assemble((word, style), f" ({verdict.code}): {verdict.sentence}")
        Console(soft_wrap=True).print(line)
        if not state.trained:
            Console(soft_wrap=True).print(Text(f"the node runs {state.policy_text}", style="yellow"))
    if not verdict.accepted:
        raise typer.Exit(EXIT_REFUSED)


def _state_view(state: NodeState, robot: RobotStatus | None) -> Group:
    age_s = time.time() - state.stamp_ns / 1e9
    head = Table.grid(padding=(0, 2))
    head.add_row("policy", Text(state.policy_text or "none", style="" if state.trained else "yellow"))
    head.add_row("node", f"{state.lifecycle}, loop {state.loop_state}, instance {state.instance_id[:8]}")
    head.add_row("steering", f"epoch {state.steering.epoch}, sequence {state.steering.sequence}")
    head.add_row("state age", f"{age_s:.1f} s")
    for label, text in _robot_rows(robot):
        head.add_row(label, text)
    active = Table("target", "direction", "strength", "commanded", "priority", "source", "span", "shadowed", "expires")
    for a in state.active:
        steps = "" if a.steps is None else f" steps {a.steps[0]}:{a.steps[1]}"
        active.add_row(
            a.target,
            a.direction_id,
            f"{a.strength:+.3f}",
            f"{a.commanded:+.3f}",
            str(a.priority),
            a.source,
            " ".join(sorted(a.span or ())) + steps,
            str(a.shadowed_neurons),
            "when cleared" if a.expires_in_s is None else f"{a.expires_in_s:.1f} s",
        )
    counters = Table("counter", "value")
    told = {**state.counters, **({} if robot is None else {f"robot: {k}": v for k, v in robot.counters.items()})}
    for name, value in sorted(told.items()):
        counters.add_row(name, str(value))
    alarms = [Text(f"alarm: {alarm}", style="red") for alarm in state.alarms]
    return Group(head, active if state.active else Text("nothing is steered"), *alarms, counters)


def _robot_rows(robot: RobotStatus | None) -> list[tuple[str, str]]:
    """What the robot says of its last control step, as label and text."""
    if robot is None:
        return [("robot", "none is heard")]
    over = "" if not robot.done else ", succeeded" if robot.success else ", ended without success"
    last = robot.last
    if last.held:
        executed = f"held ({last.held})"
    else:
        executed = (
            f"row {last.row} of chunk {last.inference_id}, made under epoch {last.steering.epoch}, sequence "
            f"{last.steering.sequence}, {last.delay_steps} steps after its frame"
        )
    return [
        ("robot", f"{robot.mode}, episode {robot.episode + 1}, control step {robot.step}{over}"),
        ("last step", executed),
        ("of the session", f"{robot.hold_steps} steps held, {robot.trimmed_rows} rows trimmed as late"),
    ]


def _print_state(state: NodeState, robot: RobotStatus | None) -> None:
    _print_json({**vars(state), "robot": robot})


def _print_json(value: Any) -> None:
    print(json.dumps(value, default=_plain), flush=True)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, (frozenset, tuple)):
        return sorted(value)
    return str(value)
