"""`steer arm`: let a UR bridge move its arm, take that back, see what it does.

Invariant: nothing is armed but by the bare verb; every answer is the bridge's own.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

EXAMPLES = "Examples:  steer arm --state  ·  steer arm  ·  steer arm --off  ·  steer arm --reset"
EXIT_REFUSED = 1
_SHOWN = ("mode", "code", "sentence", "estop", "waiting_for", "moving", "limited_by", "speed_scaling", "counters")


def arm(
    off: Annotated[bool, typer.Option("--off", help="Back to the dry run: nothing reaches the driver.")] = False,
    state: Annotated[bool, typer.Option("--state", help="Show what the bridge does, and change nothing.")] = False,
    reset: Annotated[
        bool, typer.Option("--reset", help="Let go of the bridge's emergency stop; it stays unarmed.")
    ] = False,
    bridge: Annotated[str, typer.Option(help="Name of the bridge node.")] = "ur5_bridge",
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the bridge.")] = "/steer",
    timeout: Annotated[float, typer.Option(min=0.1, max=600.0, help="Seconds to wait for the bridge.")] = 8.0,
    as_json: Annotated[bool, typer.Option("--json", help="With --state: the bridge's own JSON.")] = False,
) -> None:
    """Arm the bridge to a UR arm: from here on the policy's actions move it. Stop with `steer stop`.

    The exit code is 1 when the bridge refuses, with its reason.
    """
    from ros_nodes.cli import open_client
    from steer_runtime.errors import SteerError

    if off + state + reset > 1:
        raise SteerError("two_orders", "--off, --state and --reset exclude each other: give one of them")
    from std_msgs.msg import String
    from std_srvs.srv import SetBool, Trigger

    with open_client(namespace) as client:
        if state:
            told = client.latest(String, "arm_state", timeout).data
            print(told) if as_json else _show(json.loads(told))
            return
        if reset:
            answer = client.ask(Trigger, f"{bridge}/reset_estop", Trigger.Request(), timeout)
        else:
            answer = client.ask(SetBool, f"{bridge}/arm", SetBool.Request(data=not off), timeout)
    print(answer.message)
    if not answer.success:
        raise typer.Exit(EXIT_REFUSED)


def _show(told: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name in _SHOWN:
        value = told.get(name)
        if isinstance(value, dict):
            value = ", ".join(f"{key} {count}" for key, count in value.items() if count)
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        if value not in (None, ""):
            table.add_row(name.replace("_", " "), str(value))
    Console().print(table)
