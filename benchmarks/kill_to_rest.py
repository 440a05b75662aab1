"""kill -9 of each process of a steered arm while it moves: how long until the arm is at rest.

`python -m benchmarks.kill_to_rest` starts a policy node, the bridge and the stand-in UR5e, arms it, kills one process after
the other in mid-motion, and writes the times, from the arm's own log, as JSON. The commander's death must not stop the
arm but end its steering: for it the time is that until nothing is steered.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ros_nodes.domain import free_domain

VICTIMS = ("commander", "policy", "bridge", "driver")
"""In the order in which they are killed; policy node and bridge are started again."""
REST_RAD_S = 0.01
"""A joint that is slower rests."""
WATCHED_S = 2.0
"""After a kill the arm is watched for so long."""


@dataclass(frozen=True)
class Death:
    """One kill. at_s: when, steady clock. speed_rad_s: of the fastest joint then. seconds: until the arm was at rest, for the
    commander until nothing was steered; inf: it was not within the time watched."""

    victim: str
    at_s: float
    speed_rad_s: float
    seconds: float
    until: str


def kill_each(rig: Any, target: str) -> dict[str, tuple[float, float]]:
    """Kill every victim of a tests/ros ArmRig in turn while the arm moves; `target` is what the commander steers.

    Returns victim -> (when, steady clock s; for the commander: seconds until nothing was steered, else NaN).
    """
    from ros_nodes.client import SteeringClient

    killed: dict[str, tuple[float, float]] = {}
    with SteeringClient(source="watcher", domain_id=rig.domain) as client:
        commander = rig.start_commander(target)
        client.wait_state(lambda state: bool(state.active), timeout=60.0)
        rig.wait_moving()
        at_s = time.monotonic()
        commander.kill()
        client.wait_state(lambda state: not state.active, timeout=60.0)
        killed["commander"] = at_s, time.monotonic() - at_s
    for victim, process, again in (
        ("policy", rig.policy, rig.start_policy),
        ("bridge", rig.bridge, rig.start_bridge),
        ("driver", rig.standin, None),
    ):
        rig.wait_moving()
        at_s = time.monotonic()
        process.kill()
        killed[victim] = at_s, float("nan")
        if again is None:
            rig.watch.wait(rig.log.is_file, 30.0, "the log of an arm whose driver died")
        else:
            rig.ur.wait(lambda at_s=at_s: rig.ur.joints[-1][0] > at_s + WATCHED_S, 30.0, "joint states after the kill")
            again()
    return killed


def deaths(killed: dict[str, tuple[float, float]], motion: Any) -> tuple[Death, ...]:
    """What the arm's log (sim.ur5.truth.Motion) says about each kill."""
    return tuple(_death(victim, *when, motion) for victim, when in killed.items())


def _death(victim: str, at_s: float, released_s: float, motion: Any) -> Death:
    speed = np.abs(motion.velocities).max(axis=1)
    after = (motion.time_s >= at_s) & (motion.time_s < at_s + WATCHED_S)
    before = speed[motion.time_s < at_s]
    fastest = float(before[-1]) if len(before) else 0.0
    if victim == "commander":
        return Death(victim, at_s, fastest, released_s, "nothing is steered")
    moving = motion.time_s[after][speed[after] > REST_RAD_S]
    seconds = float(moving[-1] - at_s) if len(moving) else 0.0
    if len(moving) and moving[-1] >= motion.time_s[after][-1] and victim != "driver":
        seconds = float("inf")
    return Death(victim, at_s, fastest, seconds, "the arm is at rest")


@contextmanager
def _rig(folder: Path) -> Iterator[Any]:
    """An ArmRig of tests/ros with a tiny random policy and a direction `slow`."""
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    tests = Path(__file__).parents[1] / "tests"
    sys.path[:0] = [str(tests), str(tests / "ros")]
    import fabricate
    from rig import ArmRig
    from subjects_ros import make_direction, write_policy

    from steer_runtime.directions.store import DirectionStore
    from steer_runtime.policies import load_policy

    policy = write_policy(folder, fabricate)
    DirectionStore(folder / "directions").save(make_direction(load_policy(policy), "slow", 4.0))
    with ArmRig(policy, folder / "directions", free_domain(), folder) as rig:
        yield rig


def main() -> int:
    """Run it; exit code 1 when the arm did not come to rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out/kill_to_rest.json"))
    options = parser.parse_args()
    from sim.ur5.truth import read_motion

    found: list[Death] = []
    for repeat in range(options.repeats):
        print(f"round {repeat + 1} of {options.repeats}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder, _rig(Path(folder)) as rig:
            killed = kill_each(rig, "slow")
            found += deaths(killed, read_motion(rig.log))
    table = Table("killed", "until", "seconds", "joint speed at the kill, rad/s")
    for victim in VICTIMS:
        mine = [death for death in found if death.victim == victim]
        table.add_row(
            victim,
            mine[0].until,
            ", ".join(f"{death.seconds:.3f}" for death in mine),
            ", ".join(f"{death.speed_rad_s:.2f}" for death in mine),
        )
    Console().print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps([asdict(death) for death in found], indent=2) + "\n", encoding="utf-8")
    print(options.out)
    return int(not all(np.isfinite(death.seconds) for death in found))


if __name__ == "__main__":
    raise SystemExit(main())
