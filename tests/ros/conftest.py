"""ROS tests: real nodes over DDS, each in a process of its own, on a domain of this test process."""

from __future__ import annotations

import os

from ros_nodes.domain import free_domain

# Before anything imports rclpy: other test processes on this machine must not hear us.
os.environ["ROS_DOMAIN_ID"] = str(free_domain())
os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"

from collections.abc import Iterator
from pathlib import Path

import fabricate
import pytest
from driver import PolicyProcess, SensorDriver
from subjects_ros import make_direction, write_policy

from ros_nodes.client import SteeringClient
from steer_runtime.directions.direction import Axis
from steer_runtime.directions.store import DirectionStore
from steer_runtime.policies.openvla.policy import OpenVLAPolicy


@pytest.fixture(scope="session")
def policy_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of a tiny random policy with a real checkpoint beside it."""
    return write_policy(tmp_path_factory.mktemp("policy"), fabricate)


@pytest.fixture(scope="session")
def loaded_policy(policy_yaml: Path) -> OpenVLAPolicy:
    """What the node loads from policy_yaml."""
    from steer_runtime.policies import load_policy

    return load_policy(policy_yaml)


@pytest.fixture(scope="session")
def direction_store(tmp_path_factory: pytest.TempPathFactory, loaded_policy: OpenVLAPolicy) -> Path:
    """Directions slow, fast, gentle (limit 0.5) and the axis speed from slow to fast."""
    root = tmp_path_factory.mktemp("directions")
    store = DirectionStore(root)
    store.save(make_direction(loaded_policy, "slow", 40.0))
    store.save(make_direction(loaded_policy, "fast", -40.0))
    store.save(make_direction(loaded_policy, "gentle", 20.0, max_strength=0.5))
    store.save_axis(Axis("speed", negative="slow", positive="fast"))
    return root


@pytest.fixture(scope="session")
def policy_process(policy_yaml: Path, direction_store: Path) -> Iterator[PolicyProcess]:
    """One active policy node for all tests that do not end one; it activates once the driver has described a robot."""
    with PolicyProcess(policy_yaml, direction_store, observation_timeout_s=1.0, max_slew_per_s=2.0) as process:
        yield process


@pytest.fixture(scope="session")
def driver() -> Iterator[SensorDriver]:
    """The robot's side of the topics, in the hands of the test."""
    with SensorDriver() as node:
        yield node


@pytest.fixture(scope="session")
def shared_client() -> Iterator[SteeringClient]:
    with SteeringClient(source="tests") as client:
        yield client


@pytest.fixture
def client(policy_process: PolicyProcess, driver: SensorDriver, shared_client: SteeringClient) -> SteeringClient:
    """A connected client of an active node that steers nothing."""
    driver.describe()
    shared_client.wait_state(lambda state: state.lifecycle == "active", timeout=180.0)
    driver.wait_matched()
    driver.ask()
    cleared = shared_client.wait_verdict(shared_client.clear())
    assert cleared.accepted
    shared_client.wait_state(lambda state: state.steering.sequence >= cleared.steering.sequence)
    return shared_client


@pytest.fixture(scope="session")
def other_domain() -> int:
    """A network of its own, for tests that start and end nodes."""
    return free_domain(besides=[int(os.environ["ROS_DOMAIN_ID"])])


@pytest.fixture(scope="session")
def third_domain(other_domain: int) -> int:
    """Where neither the shared nodes nor a robot on `other_domain` are heard."""
    return free_domain(besides=[int(os.environ["ROS_DOMAIN_ID"]), other_domain])
