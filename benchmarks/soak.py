"""A long run of robot and policy node under a flood of commands: is the control rate kept, is memory flat, is anything lost?

    python -m benchmarks.soak --minutes 30

A free-running robot at 20 Hz, a policy node with a tiny policy, and 1,000 commands a second, each in a process of its own.
Periods are those of the robot's own stamps. Writes soak.json and soak.png to --out and exits 1 when a promise was not kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.progress import Progress

from ros_nodes.domain import free_domain

ROOT = Path(__file__).parents[1]
PERIOD_TICKS = 1.5
"""p99.9 of the control period, in ticks, is at most this."""
GROWTH = 0.05
"""Memory of a process, as a straight line over the run without its first fifth, grows by at most this share."""


@dataclass
class Samples:
    """What was watched. stamps_ns: of each control step, on the robot's clock; memory_mib: process -> one a second."""

    stamps_ns: list[int] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)  # (episode, step) of each
    held: int = 0
    at_s: list[float] = field(default_factory=list)
    memory_mib: dict[str, list[float]] = field(default_factory=dict)
    commands: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Soaked:
    """The result. unaccounted_commands: sent, and neither judged nor counted as missed; lost_statuses: gaps in the numbers of
    the robot's control steps as heard; growth: process -> share of its memory.
    """

    seconds: float
    control_hz: float
    commands_hz: float
    steps: int
    held: int
    lost_statuses: int
    period_ms: Mapping[str, float]
    commands: Mapping[str, int]
    unaccounted_commands: int
    memory_mib: Mapping[str, tuple[float, float]]
    growth: Mapping[str, float]
    last_command_won: bool
    kept: Mapping[str, bool]


def run(
    *,
    minutes: float,
    control_hz: float = 20.0,
    commands_hz: float = 1000.0,
    out: Path | None = None,
    quiet: bool = False,
) -> Soaked:
    """Soak for so many minutes; writes soak.json and soak.png into `out` if one is given.

    ROS_DOMAIN_ID must be one of its own (see main). Raises SteerError when a node does not come up.
    """
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "ros")]
    import fabricate
    import psutil
    from driver import Listener, NodeProcess, PolicyProcess
    from steer_msgs.msg import EpisodeStatus
    from subjects_ros import make_direction, write_policy

    from benchmarks.command_flood import LAST_STRENGTH, flood
    from ros_nodes.client import SteeringClient
    from ros_nodes.convert import ns_from_time
    from ros_nodes.qos import STATUS
    from steer_runtime.directions.store import DirectionStore
    from steer_runtime.policies import load_policy

    seconds = 60.0 * minutes
    samples = Samples()

    def watch(message: EpisodeStatus) -> None:
        samples.stamps_ns.append(ns_from_time(message.header.stamp))
        samples.steps.append((message.episode, message.step))
        samples.held += bool(message.held)

    with TemporaryDirectory() as folder:
        policy = write_policy(Path(folder), fabricate)
        DirectionStore(Path(folder) / "directions").save(make_direction(load_policy(policy), "slow", 4.0))
        robot_node = [str(ROOT / "tests" / "ros" / "point_robot.py")]
        with (
            PolicyProcess(policy, Path(folder) / "directions") as node,
            NodeProcess(robot_node, {"mode": "free", "rate_hz": control_hz}) as robot,
            Listener("soak") as listener,
            SteeringClient(source="soak") as client,
        ):
            client.wait_state(lambda s: s.lifecycle == "active" and s.counters.get("inferences", 0) > 0, timeout=300.0)
            before = client.next_state(10.0).counters
            listener.node.create_subscription(EpisodeStatus, "episode", watch, STATUS)
            flooding = [sys.executable, "-m", "benchmarks.command_flood", "--flood-only", "--target", "slow"]
            process = subprocess.Popen([*flooding, "--seconds", str(seconds), "--rate", str(commands_hz)], cwd=ROOT)
            try:
                client.wait_state(lambda s: any(a.source == flood.__name__ for a in s.active), timeout=60.0)
                watched = {"policy node": node.process.pid, "robot node": robot.process.pid, "flood": process.pid}
                begin = time.monotonic()
                with Progress(disable=quiet) as progress:
                    task = progress.add_task("soaking", total=seconds)
                    while process.poll() is None:
                        alive = node.process.poll() is None and robot.process.poll() is None
                        if not alive or time.monotonic() - begin > 1.5 * seconds + 120.0:
                            break
                        samples.at_s.append(time.monotonic() - begin)
                        for name, pid in watched.items():
                            resident = (
                                psutil.Process(pid).memory_info().rss / 2**20 if psutil.pid_exists(pid) else np.nan
                            )
                            samples.memory_mib.setdefault(name, []).append(resident)
                        samples.commands.append(client.next_state(30.0).counters.get("commands", 0))
                        progress.update(task, completed=min(time.monotonic() - begin, seconds))
                        time.sleep(max(0.0, len(samples.at_s) - (time.monotonic() - begin)))  # one sample a second
                flooded = process.wait(30.0) == 0
            finally:
                process.kill()
                process.wait()
            # The flood ends once its last command has its verdict.
            state = client.next_state(30.0)
            won = flooded and any(a.commanded == LAST_STRENGTH for a in state.active)
            counters = {name: value - before.get(name, 0) for name, value in state.counters.items()}
    result = _result(samples, counters, seconds, control_hz, commands_hz, won)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "soak.json").write_text(json.dumps(asdict(result), indent=1) + "\n")
        _plot(samples, result, out / "soak.png")
    return result


def _result(
    samples: Samples, counters: Mapping[str, int], seconds: float, control_hz: float, commands_hz: float, won: bool
) -> Soaked:
    periods_ms = np.diff(np.array(samples.stamps_ns, np.int64)) / 1e6
    quantiles = {f"p{q:g}": float(np.percentile(periods_ms, q)) for q in (0.1, 50, 99, 99.9)}
    period_ms = {**quantiles, "largest": float(periods_ms.max()), "mean": float(periods_ms.mean())}
    told = ("commands", "accepted", "clamped", "refused", "missed_commands", "suppressed_verdicts")
    commands = {name: counters.get(name, 0) for name in told}
    sent = round(seconds * commands_hz) + 1
    unaccounted = sent - commands["commands"] - commands["missed_commands"]
    lost = sum(
        max(0, after[1] - before[1] - 1) for before, after in itertools.pairwise(samples.steps) if after[0] == before[0]
    )
    memory = {name: (values[0], values[-1]) for name, values in samples.memory_mib.items() if values}
    growth = {name: growth_of(samples.at_s, values) for name, values in samples.memory_mib.items()}
    expected = seconds * control_hz
    kept = {
        "p99.9 of the period within 1.5 ticks": period_ms["p99.9"] <= PERIOD_TICKS * 1000.0 / control_hz,
        "control rate": len(samples.steps) >= 0.99 * expected,
        "memory flat": all(growth[name] <= GROWTH for name in ("policy node", "robot node")),
        "every command accounted for": unaccounted == 0 and won,
        "no control step lost": lost == 0,
    }
    return Soaked(
        seconds=seconds,
        control_hz=control_hz,
        commands_hz=commands_hz,
        steps=len(samples.steps),
        held=samples.held,
        lost_statuses=lost,
        period_ms=period_ms,
        commands=commands,
        unaccounted_commands=unaccounted,
        memory_mib=memory,
        growth=growth,
        last_command_won=won,
        kept=kept,
    )


def growth_of(at_s: Sequence[float], values: Sequence[float]) -> float:
    """Growth by a least-squares line over all but the first fifth of the samples, as a share of where that line begins."""
    times, sizes = np.array(at_s[: len(values)]), np.array(values)
    settled = np.isfinite(sizes) & (times >= times[-1] / 5)
    if settled.sum() < 3:
        return 0.0
    times, sizes = times[settled], sizes[settled]
    slope, offset = np.polyfit(times, sizes, 1)
    return float(slope * (times[-1] - times[0]) / (slope * times[0] + offset))


def _plot(samples: Samples, result: Soaked, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (periods, memory, commands) = pyplot.subplots(3, 1, figsize=(10, 9), sharex=True)
    stamps = np.array(samples.stamps_ns, np.int64)
    periods.plot((stamps[1:] - stamps[0]) / 1e9, np.diff(stamps) / 1e6, ".", markersize=1.5)
    periods.axhline(PERIOD_TICKS * 1000.0 / result.control_hz, color="tab:red", linewidth=1, label="1.5 ticks")
    periods.set(ylabel="control period (ms)", title=f"p99.9 {result.period_ms['p99.9']:.1f} ms, {result.steps} steps")
    periods.legend(loc="upper right")
    for name, values in samples.memory_mib.items():
        memory.plot(samples.at_s[: len(values)], values, label=f"{name}: {100 * result.growth[name]:+.1f} %")
    memory.set(ylabel="resident memory (MiB)", ylim=(0, None))
    memory.legend(loc="lower right")
    commands.plot(
        samples.at_s[1 : len(samples.commands)],
        np.diff(samples.commands) / np.diff(samples.at_s[: len(samples.commands)]),
    )
    commands.set(ylabel="commands judged a second", xlabel="s", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> int:
    """Soak as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Examples:  python -m benchmarks.soak --minutes 30  ·  python -m benchmarks.soak --minutes 1 --rate 200",
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--control-rate", type=float, default=20.0, help="control steps a second")
    parser.add_argument("--rate", type=float, default=1000.0, help="commands a second")
    parser.add_argument("--out", type=Path, default=Path("out/soak"))
    wanted: Any = parser.parse_args()
    os.environ.setdefault("ROS_DOMAIN_ID", str(free_domain()))
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    result = run(minutes=wanted.minutes, control_hz=wanted.control_rate, commands_hz=wanted.rate, out=wanted.out)
    print(json.dumps(asdict(result)))
    for promise, kept in result.kept.items():
        print(f"{'kept' if kept else 'NOT KEPT'}: {promise}", file=sys.stderr)
    return 0 if all(result.kept.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
