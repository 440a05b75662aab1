"""`steer ur`: a UR arm without ROS, read or moved over RTDE through the same motion core as the bridge's.

Invariant: nothing is started on the controller and nothing moves without --arm; importing this imports neither the model
nor `ur-rtde`.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer_runtime.errors import SteerError

if TYPE_CHECKING:
    import numpy as np

    from arm.motion import MotionCore
    from arm.port import ArmState, JointMotion
    from arm.rtde import RtdePort

app = typer.Typer(help="A UR arm without ROS, over RTDE.", no_args_is_help=True)
PATIENCE_S = 5.0
"""Wait for the first state, and for the program after it was uploaded."""

Host = Annotated[str, typer.Argument(help="Address of the controller.")]
Settings = Annotated[str, typer.Option("--settings", help="YAML of limits, or its name in configs/robots.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def register(main: typer.Typer) -> None:
    """Add the verbs to the application."""
    main.add_typer(app, name="ur")


@app.command(epilog="Examples:  steer ur state 192.168.56.101  ·  steer ur state 192.168.56.101 --json")
def state(host: Host, settings: Settings = "ur5e", as_json: AsJson = False) -> None:
    """What the arm measures, and whether the model of it agrees; starts and moves nothing."""
    from arm.kinematics import Kinematics
    from arm.rtde import ask_box
    from arm.settings import load_settings

    limits = load_settings(settings)
    box = ask_box(host)
    with _port(host, control=False) as port:
        now = _first_state(port)
        expected = Kinematics(limits).pose(now.positions).position
        off = float(((expected - now.tcp_position) ** 2).sum() ** 0.5)
    told = {
        **vars(box),
        "positions_rad": now.positions.round(5).tolist(),
        "velocities_rad_s": now.velocities.round(5).tolist(),
        "tcp_m": now.tcp_position.round(5).tolist(),
        "tcp_quaternion": now.tcp_quaternion.round(5).tolist(),
        "speed_scaling": now.speed_scaling,
        "model_error_m": round(off, 5),
        "model_agrees": off <= limits.motion.model_error_m,
    }
    _print(told, as_json)


@app.command(epilog="Examples:  steer ur unlock 192.168.56.101")
def unlock(host: Host, as_json: AsJson = False) -> None:
    """Release a protective stop whose cause is gone. Starts no program and moves nothing."""
    from arm import rtde

    _print(vars(rtde.unlock(host)), as_json)


@app.command(
    epilog="Examples:  steer ur run 192.168.56.101 rows.npy  ·  "
    "steer ur run 192.168.56.101 rows.npy --motion-scale 0.1 --arm  ·  steer ur run HOST rows.npy --kind joint_abs "
    "--rotation none --motion-scale 1"
)
def run(
    host: Host,
    rows: Annotated[
        Path, typer.Argument(help="Action rows, a .npy file of float32 [T, dims]; the last is the gripper's.")
    ],
    kind: Annotated[
        str, typer.Option(help="ee_delta, joint_delta or joint_abs, as the checkpoint declares.")
    ] = "ee_delta",
    rotation: Annotated[str, typer.Option(help="axis_angle, rpy or none.")] = "axis_angle",
    frame: Annotated[str, typer.Option(help="Of ee_delta: base, base_link, ur_base or tool0.")] = "base",
    rate: Annotated[float, typer.Option(help="Rows a second.", min=0.1, max=100.0)] = 20.0,
    position_scale: Annotated[float, typer.Option(help="Metres a step at 1.0.", min=0.0, max=1.0)] = 0.05,
    rotation_scale: Annotated[float, typer.Option(help="Radians a step at 1.0.", min=0.0, max=10.0)] = 0.5,
    motion_scale: Annotated[float, typer.Option(help="Part of each delta that is executed.", min=0.001, max=1.0)] = 0.2,
    watchdog: Annotated[
        float, typer.Option(help="Seconds of silence after which the controller ends the program.", min=0.05, max=10.0)
    ] = 0.2,
    settings: Settings = "ur5e",
    arm: Annotated[bool, typer.Option("--arm", help="Move the arm. Without it nothing is started or sent.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run action rows through the motion core: what the arm would do, or with --arm what it does.

    Ctrl-C brakes. The exit code is 1 when the motion core stopped before the last row.
    """
    from arm.actions import ActionReader
    from arm.motion import MotionCore
    from arm.settings import load_settings
    from steer_runtime.types import ActionSpace

    actions = _read_rows(rows)
    space = ActionSpace(
        kind=kind,  # type: ignore[arg-type]
        rotation=rotation,  # type: ignore[arg-type]
        frame=frame,
        position_scale_m=position_scale,
        rotation_scale_rad=rotation_scale,
        rate_hz=rate,
        gripper_open=-1.0,
        gripper_close=1.0,
        dims=actions.shape[1],
    )
    limits = load_settings(settings)
    reader = ActionReader(space, limits, motion_scale)
    planned: list[JointMotion] = []
    with _port(host, control=arm, watchdog_s=watchdog) as port:
        start = _first_state(port, program=arm)
        core = MotionCore(limits, reader, port, planned.append)
        done = _drive(core, port, actions, rate, arm)
        _settle(limits.motion.horizon_s)
        end = port.read()
        told = core.state()
        counters = {**told.counters, **port.counters}
    summary = {
        "armed": arm,
        "rows": done,
        "of": len(actions),
        "plans": len(planned),
        "moved_rad": (end.positions - start.positions).round(5).tolist() if end is not None else None,
        "would_move_rad": (planned[-1].positions[-1] - start.positions).round(5).tolist() if planned else None,
        "stopped": f"{told.code}: {told.sentence}" if told.code else "",
        "counters": counters,
    }
    _print(summary, as_json)
    if done < len(actions):
        raise typer.Exit(1)


def _drive(core: MotionCore, port: RtdePort, actions: np.ndarray, rate_hz: float, arm: bool) -> int:
    """Feed the rows at their rate; returns how many were fed before the core stopped. Brakes on the way out."""
    from arm.ticker import Ticker

    failures: list[SteerError] = []
    if arm:
        core.arm(time.monotonic())
    ticker = Ticker(core, port, failures.append)
    due = time.monotonic()
    done = 0
    try:
        for row in actions:
            if core.state().mode == "stopped":
                break
            core.accept(row, time.monotonic())
            done += 1
            due += 1.0 / rate_hz
            time.sleep(max(0.0, due - time.monotonic()))
        core.hold(time.monotonic())
        _settle(core.settings.motion.horizon_s)
    finally:
        ticker.close()
        core.disarm(time.monotonic())
    return done


def _settle(seconds: float) -> None:
    """Time in which what was sent comes to rest."""
    time.sleep(seconds)


@contextmanager
def _port(host: str, *, control: bool, watchdog_s: float = 0.2) -> Iterator[RtdePort]:
    """A port that is halted and closed whatever ends the program."""
    from arm.rtde import RtdePort, RtdeSettings

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    port = RtdePort(host, control=control, settings=RtdeSettings(watchdog_s=watchdog_s))
    try:
        yield port
    finally:
        port.halt()
        port.close()
        signal.signal(signal.SIGTERM, before)


def _first_state(port: RtdePort, *, program: bool = False) -> ArmState:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = port.read()
        if found is not None and (found.program_running or not program):
            return found
        if time.monotonic() > deadline:
            what = "no state came" if found is None else "its program did not start"
            raise SteerError(
                "no_arm",
                f"the controller answers, but {what} within {PATIENCE_S:g} s: is the arm on and its brakes free?",
            )
        time.sleep(0.01)


def _read_rows(path: Path) -> np.ndarray:
    """Float32 [T, dims]. Raises SteerError('bad_rows')."""
    import numpy as np

    try:
        actions = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise SteerError("bad_rows", f"{path} holds no array of action rows: {error}") from None
    if actions.ndim != 2 or not len(actions) or actions.dtype.kind != "f":
        raise SteerError(
            "bad_rows", f"{path} holds {actions.dtype} {list(actions.shape)}: expected floats [T >= 1, dims]"
        )
    return actions.astype(np.float32)


def _print(told: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(told))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in told.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {count}" for key, count in value.items() if count)
        if value not in (None, ""):
            table.add_row(name.replace("_", " "), str(value))
    Console(soft_wrap=True).print(table)
