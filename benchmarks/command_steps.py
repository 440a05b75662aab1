"""From a steering command to the first control step that was made under it, in control steps of a free-running robot.

`python -m benchmarks.command_steps` runs a policy node and a robot that replans, each in a process of its own, once for
every answer to a change of steering (wait, replan, flush), publishes commands at random moments of an episode, and counts
the robot's control steps until its status names a row whose steering is at or past the verdict's. Prints a table: steps
until then, how many of them were held, and the steps that the chunks came late. On a busy machine inferences are long and
so are the counts: the delay column says so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ros_nodes.domain import free_domain
from steer_runtime.chunk_queue import ON_STEERING

TESTS = Path(__file__).parents[1] / "tests"
EARLY = range(12, 20)
"""Steps of the robot's episodes, which are 40 long, at which commands are published: their answers come before the end."""
START_S = 300.0


@dataclass(frozen=True)
class Reaction:
    """One command: control steps until one made under it, those of them that were held, delay of its chunk (steps)."""

    steps: int
    held: int
    delay: int


def main() -> int:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="pocket-pi0-untrained", help="name in configs/policies, or a YAML")
    parser.add_argument("--tower", default="expert", help="tower that is steered")
    parser.add_argument("--commands", type=int, default=40, help="for each answer")
    parser.add_argument("--replan", type=int, default=5, help="control steps from frame to frame")
    parser.add_argument("--rows", type=int, default=15, help="rows of a chunk that are handed on")
    parser.add_argument("--rate-hz", type=float, default=20.0, help="control steps a second")
    wanted = parser.parse_args()
    os.environ.setdefault("ROS_DOMAIN_ID", str(free_domain()))
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    sys.path[:0] = [str(TESTS), str(TESTS / "ros")]
    with tempfile.TemporaryDirectory() as folder:
        store = _store(wanted.policy, wanted.tower, Path(folder))
        found = {answer: _measure(wanted, store, answer) for answer in ON_STEERING}
    _tell(found)
    return 0


def _store(policy: str, tower: str, folder: Path) -> Path:
    from subjects_ros import make_direction

    from steer_runtime.directions.store import DirectionStore
    from steer_runtime.policies import load_policy

    DirectionStore(folder / "directions").save(make_direction(load_policy(policy), "slow", 4.0, tower_name=tower))
    return folder / "directions"


def _measure(wanted: argparse.Namespace, store: Path, answer: str) -> list[Reaction]:
    from driver import NodeProcess, PolicyDriver, PolicyProcess

    from ros_nodes.client import SteeringClient

    body = {"mode": "free", "rate_hz": wanted.rate_hz, "replan_steps": wanted.replan, "on_steering": answer}
    with (
        PolicyDriver() as watcher,
        SteeringClient(source="benchmark") as client,
        PolicyProcess(
            wanted.policy,
            store,
            action_steps=wanted.rows,
            restart_on_command=answer != "wait",
            observation_timeout_s=10.0,
        ) as policy,
        NodeProcess([str(TESTS / "ros" / "point_robot.py")], body) as robot,
    ):

        def moved() -> bool:
            for process in (policy, robot):
                if process.process.poll() is not None:
                    raise SystemExit(f"a node ended before the first step: {process.log().strip()[-500:]}")
            return bool(watcher.episodes and watcher.status().inference_id)

        watcher.wait(moved, START_S, "a step made by the policy")
        rng = random.Random(0)
        return [
            _react(watcher, client, 0.5 + 0.5 * (index % 2), rng)
            for index in track(range(wanted.commands), description=answer, console=Console(stderr=True))
        ]


def _react(watcher: Any, client: Any, strength: float, rng: random.Random) -> Reaction:
    """Publish one command early in an episode and count until a step carries it; again when the episode ends first."""
    while True:
        watcher.wait(lambda: watcher.status().step in EARLY and watcher.status().inference_id, 60.0, "an early step")
        time.sleep(rng.uniform(0.0, 0.1))
        with watcher.changed:
            before = len(watcher.episodes)
        sequence = client.wait_verdict(client.publish("slow", strength, ramp_s=0.0), 10.0).steering.sequence

        def after(before: int = before) -> list[Any]:
            return [message for _, message in watcher.episodes[before:]]

        def carrying(message: Any, sequence: int = sequence) -> bool:
            return not message.held and message.steering_sequence >= sequence

        watcher.wait(lambda: any(carrying(m) or m.done for m in after()), 60.0, "a step made under the command")
        seen = after()
        first = next(i for i, message in enumerate(seen) if carrying(message) or message.done)
        if not seen[first].done:
            held = sum(bool(message.held) for message in seen[:first])
            return Reaction(first + 1, held, seen[first].delay_steps)


def _tell(found: dict[Any, list[Reaction]]) -> None:
    columns = ("a change of steering", "mean steps", "worst", "of them held, mean", "delay of a chunk, mean")
    table = Table(*columns, title="control steps from a command to the first one made under it")
    facts = {}
    for answer, reactions in found.items():
        steps, held, delay = (np.array([getattr(r, name) for r in reactions]) for name in ("steps", "held", "delay"))
        row = (float(steps.mean()), int(steps.max()), float(held.mean()), float(delay.mean()))
        table.add_row(answer, f"{row[0]:.1f}", str(row[1]), f"{row[2]:.1f}", f"{row[3]:.1f}")
        facts[answer] = dict(zip(("mean", "worst", "held", "delay"), row, strict=True))
    Console().print(table)
    print(json.dumps({"benchmark": "command_steps", "load_average": os.getloadavg()[0], **facts}))


if __name__ == "__main__":
    raise SystemExit(main())
