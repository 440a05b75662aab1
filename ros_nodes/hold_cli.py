"""`steer hold`: the hold node in the terminal, with a line a second of what it measures and commands.

Invariant: importing this imports no ROS; Ctrl-C lets the axis go.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from steer_runtime.errors import SteerError
from steer_runtime.setpoint.presets import tuning
from steer_runtime.setpoint.target import parse_target

if TYPE_CHECKING:
    from ros_nodes.hold_node import HoldNode
    from steer_runtime.setpoint.loop import Step
    from steer_runtime.setpoint.target import Target

EXAMPLES = (
    "Examples:  steer hold speed 0.12 m/s  ·  steer hold height 25 cm --axis height-word --controller dither  ·  "
    "steer hold speed 12 cm/s --axis slow-fast --kp 4 --ki 8 --low -0.8 --high 0.5 --expiry 0.5"
)
LINE_S = 1.0


def hold(
    quantity: Annotated[str, typer.Argument(help="speed or height.")],
    target: Annotated[list[str], typer.Argument(help="Number and unit: 0.12 m/s, 25 cm.")],
    axis: Annotated[str, typer.Option(help="Axis, as `steer list` shows it; default: <quantity>-word.")] = "",
    controller: Annotated[str, typer.Option(help="pid, deadband or dither.")] = "pid",
    kp: Annotated[float, typer.Option(help="Strength a unit of error (m/s or m); all gains 0: the preset.")] = 0.0,
    ki: Annotated[float, typer.Option(help="Strength a unit of error a second.")] = 0.0,
    kd: Annotated[float, typer.Option(help="Strength a unit a second of the measurement.")] = 0.0,
    low: Annotated[float, typer.Option(help="Lowest strength, -1 to 0; the axis's own limit holds as well.")] = -1.0,
    high: Annotated[float, typer.Option(help="Highest strength, 0 to 1; the axis's own limit holds as well.")] = 1.0,
    slew: Annotated[float, typer.Option(help="Largest change of the strength a second.")] = 2.0,
    expiry: Annotated[float, typer.Option(help="Seconds until the strength falls back when this process dies.")] = 1.0,
    silence: Annotated[float, typer.Option(help="Seconds without a frame until the strength is let go.")] = 10.0,
    priority: Annotated[int, typer.Option(help="The higher one owns the axis.", min=-128, max=127)] = 0,
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the policy node.")] = "/steer",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the node.", min=0.1, max=600.0)] = 8.0,
) -> None:
    """Hold a measured speed or height on the running robot by moving the strength of an axis, until Ctrl-C."""
    # Refused before any ROS is needed.
    parse_target(quantity, target)
    tuning(controller, quantity)
    try:
        from rclpy.parameter import Parameter

        from ros_nodes.hold_node import HoldNode
        from ros_nodes.process import serve
    except ImportError as error:
        raise SteerError(
            "no_ros",
            f"this verb needs ROS 2 ({error}); install `pip install 'steer-runtime[ros]'` and run "
            "ros_nodes/steer_msgs/build.sh, or source your ROS distribution",
        ) from error
    values = {
        "quantity": quantity, "target": " ".join(target), "axis": axis or f"{quantity}-word", "controller": controller,
        "kp": kp, "ki": ki, "kd": kd, "strength_low": low, "strength_high": high, "slew_per_s": slew, "expiry_s": expiry,
        "keepalive_s": min(0.25, expiry / 4), "silence_s": silence, "priority": priority,
    }  # fmt: skip
    overrides = [Parameter(name, value=value) for name, value in values.items()]

    def make() -> HoldNode:
        return HoldNode(on_step=_Printer(), patience_s=timeout, namespace=namespace, parameter_overrides=overrides)

    serve(make, [])


class _Printer:
    """A line at most every LINE_S seconds, and one whenever the reason to hold changes."""

    def __init__(self) -> None:
        self._printed_s, self._held = 0.0, ""

    def __call__(self, time_s: float, step: Step, target: Target, counters: Mapping[str, int]) -> None:
        now = time.monotonic()
        if now - self._printed_s < LINE_S and step.held == self._held:
            return
        self._printed_s, self._held = now, step.held
        value = step.reading.value
        measured = "nothing measurable" if value is None else target.show(value)
        why = f"   holds: {step.held}" if step.held else ""
        print(f"{time_s:7.2f} s   {measured} of {target.shown}   strength {step.strength:+.3f}{why}", flush=True)
