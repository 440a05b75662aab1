"""The emergency stop of a running policy node: pulled by anyone, let go by its own service alone."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from driver import SensorDriver
from rclpy.qos import QoSProfile
from std_msgs.msg import Bool
from std_srvs.srv import Trigger

from ros_nodes.client import SteeringClient
from ros_nodes.qos import COMMAND, LATCHED, SENSOR


@pytest.fixture
def steered(client: SteeringClient, driver: SensorDriver) -> Iterator[tuple[SteeringClient, SensorDriver, np.ndarray]]:
    """A node that is steered, with the actions it gave before; let go of again afterwards."""
    baseline = np.array(driver.ask().data)
    verdict = client.wait_verdict(client.publish("slow", 1.0, ramp_s=0.0))
    driver.ask(after=lambda chunk: chunk.steering_sequence >= verdict.steering.sequence)
    yield client, driver, baseline
    client.reset_stop()
    client.wait_state(lambda s: s.loop_state != "stopped")


def pull_by_service(client: SteeringClient, driver: SensorDriver) -> None:
    assert "emergency stop" in client.ask(Trigger, "estop", Trigger.Request()).message


def pull_by_topic(client: SteeringClient, driver: SensorDriver, quality: QoSProfile) -> None:
    publisher = driver.node.create_publisher(Bool, "estop", quality)
    driver.wait(lambda: publisher.get_subscription_count() >= 1, what="the node's ear for stops")
    publisher.publish(Bool(data=True))
    deadline = time.monotonic() + 10
    while client.next_state().loop_state != "stopped":
        assert time.monotonic() < deadline
        if quality is SENSOR:  # one sent once with best effort may be lost
            publisher.publish(Bool(data=True))
    for _ in range(2):
        client.next_state()  # what is still on its way arrives before the reset
    driver.node.destroy_publisher(publisher)


@pytest.mark.fault(15)
@pytest.mark.parametrize("way", ["verb", "service", "reliable", "latched", "best effort"])
def test_a_stop_silences_steering_and_actions_until_it_is_reset(
    steered: tuple[SteeringClient, SensorDriver, np.ndarray], way: str
) -> None:
    client, driver, baseline = steered
    if way == "verb":
        assert "emergency stop" in client.stop()
    elif way == "service":
        pull_by_service(client, driver)
    else:
        pull_by_topic(client, driver, {"reliable": COMMAND, "latched": LATCHED, "best effort": SENSOR}[way])
    stopped = client.wait_state(lambda s: s.loop_state == "stopped")
    assert stopped.active == ()
    assert "emergency stop" in stopped.alarms[-1]
    refused = client.wait_verdict(client.publish("slow", 1.0))
    assert (refused.accepted, refused.code) == (False, "stopped")
    silent = driver.send()
    counted = client.wait_state(lambda s: s.counters.get("withheld_observations", 0) > 0)
    assert driver.answer(silent, 0.3) is None
    status = driver.wait_diagnosis(lambda s: s.level == DiagnosticStatus.ERROR)
    assert "reset_estop" in status.message
    assert counted.counters["emergency_stops"] >= 1
    assert "released" in client.reset_stop()
    assert np.array_equal(np.array(driver.ask().data), baseline), "what was steered stays off"


@pytest.mark.fault(15)
def test_false_on_the_topic_lets_nothing_go(steered: tuple[SteeringClient, SensorDriver, np.ndarray]) -> None:
    client, driver, _ = steered
    pull_by_service(client, driver)
    heard: list[tuple[float, Bool]] = []
    listening = driver.node.create_subscription(Bool, "estop", driver.keep(heard), LATCHED)
    driver.wait(lambda: heard and heard[-1][1].data, what="the latched stop")
    publisher = driver.node.create_publisher(Bool, "estop", LATCHED)
    driver.wait(lambda: publisher.get_subscription_count() >= 2, what="the node's ears")
    publisher.publish(Bool(data=False))
    driver.wait(lambda: not heard[-1][1].data, what="the false one")
    assert client.next_state().loop_state == "stopped"
    assert client.next_state().loop_state == "stopped"
    driver.node.destroy_publisher(publisher)
    driver.node.destroy_subscription(listening)


@pytest.mark.fault(15)
def test_a_stop_in_mid_ramp_holds_back_the_chunk_that_is_being_made(
    client: SteeringClient, driver: SensorDriver
) -> None:
    driver.ask()
    client.wait_verdict(client.publish("slow", 1.0, ramp_s=20.0))
    client.wait_state(lambda s: any(a.strength > 0.02 for a in s.active))
    client.stop()
    stopped_at = time.monotonic()
    for _ in range(5):
        driver.send()
    client.wait_state(lambda s: s.loop_state == "stopped" and s.active == ())
    client.next_state()
    # A chunk handed to the network just before may still arrive just after.
    assert [at for at, _ in driver.chunks if at > stopped_at + 0.2] == []
    client.reset_stop()
    driver.ask()
