"""Simulated time that does not come, or is set back: the node's watchdogs are steady and its steering ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from builtin_interfaces.msg import Time
from driver import PolicyProcess, SensorDriver
from rosgraph_msgs.msg import Clock

from ros_nodes.client import SteeringClient
from ros_nodes.qos import COMMAND


@pytest.fixture(scope="module")
def simulated(
    policy_yaml: Path, direction_store: Path, third_domain: int
) -> Iterator[tuple[SteeringClient, SensorDriver]]:
    """An active node that was told to use simulated time, on a network without any."""
    parameters = {"use_sim_time": True, "observation_timeout_s": 1.0}
    with (
        PolicyProcess(policy_yaml, direction_store, domain=third_domain, **parameters),
        SensorDriver(domain=third_domain) as driver,
        SteeringClient(domain_id=third_domain) as client,
    ):
        driver.describe()
        client.wait_state(lambda s: s.lifecycle == "active", timeout=180.0)
        driver.wait_matched()
        yield client, driver


@pytest.mark.fault(32)
def test_without_a_clock_the_node_steers_tells_and_watches(simulated: tuple[SteeringClient, SensorDriver]) -> None:
    client, driver = simulated
    driver.ask()
    client.wait_verdict(client.publish("slow", 1.0, ramp_s=0.1, hold_s=0.5))
    client.wait_state(lambda s: any(a.strength == 1.0 for a in s.active))
    client.wait_state(lambda s: s.active == ())
    client.wait_state(lambda s: s.loop_state == "holding")
    driver.ask()


@pytest.mark.fault(32)
def test_a_simulated_clock_that_is_set_back_stops_neither_heartbeat_nor_release(
    simulated: tuple[SteeringClient, SensorDriver],
) -> None:
    client, driver = simulated
    driver.ask()
    clock = driver.node.create_publisher(Clock, "/clock", COMMAND)
    driver.wait(clock.get_subscription_count, what="the node's ear for the clock")
    client.wait_verdict(client.publish("slow", 1.0, hold_s=1.0))
    for seconds in (1000, 1001, 5):
        clock.publish(Clock(clock=Time(sec=seconds)))
    started = time.monotonic()
    client.wait_state(lambda s: s.active == (), timeout=5.0)
    assert time.monotonic() - started < 3.0
    client.wait_state(lambda s: s.loop_state == "holding")
    driver.ask()
    driver.node.destroy_publisher(clock)
