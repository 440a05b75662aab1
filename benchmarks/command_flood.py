"""A flood of steering commands against a running policy node: what it does to the control rate.

`python -m benchmarks.command_flood` starts a policy node, sends camera frames at a control rate, and compares the
answers with and without a flood in the same run. It prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ros_nodes.domain import free_domain

LAST_STRENGTH = 0.125
"""Strength of the last command of a flood; no other command of it has this one."""


@dataclass(frozen=True)
class Steadiness:
    """Frames sent at a fixed rate, how many were answered by a chunk, and the longest time between two chunks."""

    sent: int
    answered: int
    rate_hz: float
    worst_gap_s: float


def steady_frames(driver: Any, *, seconds: float, rate_hz: float) -> Steadiness:
    """Send frames through a tests/ros SensorDriver at `rate_hz` for `seconds` and watch the chunks that come back."""
    from ros_nodes.convert import ns_from_time

    begin = time.monotonic()
    stamps = set()
    count = round(seconds * rate_hz)
    for index in range(count):
        left = begin + index / rate_hz - time.monotonic()
        if left > 0:
            time.sleep(left)  # a metronome, not a wait for an event
        stamps.add(driver.send())
    driver.answer(max(stamps), 1.0)
    arrivals = [at for at, chunk in driver.chunks if ns_from_time(chunk.observation_stamp) in stamps]
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    span = arrivals[-1] - arrivals[0] if len(arrivals) > 1 else float("nan")
    return Steadiness(count, len(arrivals), (len(arrivals) - 1) / span, max(gaps, default=float("inf")))


def flood(target: str, *, seconds: float, rate_hz: float) -> int:
    """Send commands for `target` at `rate_hz` for `seconds`; return how many were sent."""
    from ros_nodes.client import SteeringClient

    with SteeringClient(source=flood.__name__) as client:
        client.connect()
        begin = time.monotonic()
        count = round(seconds * rate_hz)
        for index in range(count):
            left = begin + index / rate_hz - time.monotonic()
            if left > 0:
                time.sleep(left)
            client.publish(target, 0.2 + 0.6 * (index % 100) / 100)
        client.wait_verdict(client.publish(target, LAST_STRENGTH), timeout=10.0)
    return count + 1


def main() -> int:
    """Run the comparison, or with --flood-only the flood against a node that runs already."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=1000.0, help="commands a second")
    parser.add_argument("--control-rate", type=float, default=2.0, help="camera frames a second")
    parser.add_argument("--policy", default="pocket-untrained", help="name in configs/policies, or a YAML")
    parser.add_argument("--target", default="slow")
    parser.add_argument("--flood-only", action="store_true")
    wanted = parser.parse_args()
    if wanted.flood_only:
        flood(wanted.target, seconds=wanted.seconds, rate_hz=wanted.rate)
        return 0
    os.environ.setdefault("ROS_DOMAIN_ID", str(free_domain()))
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    return _compare(wanted)


def _compare(wanted: argparse.Namespace) -> int:
    from benchmarks.ros_setup import running_node

    with running_node(wanted.policy) as (client, driver):
        quiet = steady_frames(driver, seconds=wanted.seconds, rate_hz=wanted.control_rate)
        command = [sys.executable, "-m", "benchmarks.command_flood", "--flood-only", "--target", wanted.target]
        process = subprocess.Popen(
            [*command, "--seconds", str(wanted.seconds + 2), "--rate", str(wanted.rate)], cwd=Path(__file__).parents[1]
        )
        try:
            client.wait_state(lambda s: any(a.source == flood.__name__ for a in s.active), timeout=30.0)
            busy = steady_frames(driver, seconds=wanted.seconds, rate_hz=wanted.control_rate)
            process.wait(30.0)
        finally:
            process.kill()
            process.wait()
        counters = client.next_state().counters
    table = Table("", "frames", "answered", "rate (Hz)", "worst gap (ms)", title="control with and without a flood")
    for name, run in (("quiet", quiet), (f"{wanted.rate:g} commands/s", busy)):
        table.add_row(name, str(run.sent), str(run.answered), f"{run.rate_hz:.2f}", f"{run.worst_gap_s * 1e3:.0f}")
    Console().print(table)
    told = (
        "commands",
        "accepted",
        "clamped",
        "refused",
        "missed_commands",
        "suppressed_verdicts",
        "dropped_observations",
    )
    facts = {
        "benchmark": "command_flood",
        "seconds": wanted.seconds,
        "commands_hz": wanted.rate,
        "control_hz": wanted.control_rate,
        "quiet": asdict(quiet),
        "flooded": asdict(busy),
        "extra_worst_gap_s": busy.worst_gap_s - quiet.worst_gap_s,
        "counters": {name: counters.get(name, 0) for name in told},
    }
    print(json.dumps(facts))
    kept = busy.answered >= 0.99 * quiet.answered
    within = busy.worst_gap_s < quiet.worst_gap_s + 1.0 / wanted.control_rate
    return 0 if kept and within else 1


if __name__ == "__main__":
    raise SystemExit(main())
