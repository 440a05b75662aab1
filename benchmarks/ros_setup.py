"""What the ROS benchmarks run against: a policy node process, and the robot's side of it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ros_nodes.client import SteeringClient

TESTS = Path(__file__).parents[1] / "tests"


@contextmanager
def running_node(policy: str, **parameters: Any) -> Iterator[tuple[SteeringClient, Any]]:
    """An active node with a policy (a name in configs/policies or a YAML), a client of it, and a SensorDriver it answers.

    The direction "slow" that it knows writes twenty random neurons: its cost is that of any direction.
    """
    sys.path[:0] = [str(TESTS), str(TESTS / "ros")]
    from driver import PolicyProcess, SensorDriver
    from subjects_ros import make_direction

    from steer_runtime.directions.store import DirectionStore
    from steer_runtime.policies import load_policy

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store = DirectionStore(root / "directions")
        store.save(make_direction(load_policy(policy), "slow", 4.0))
        with (
            PolicyProcess(policy, root / "directions", **parameters) as process,
            SensorDriver() as driver,
            SteeringClient(source="benchmark") as client,
        ):
            driver.describe()
            client.connect(60.0)
            client.wait_state(lambda state: state.lifecycle == "active", timeout=60.0)
            driver.wait_matched()
            driver.ask()
            assert process.process.poll() is None
            yield client, driver
