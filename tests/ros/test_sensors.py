"""Sensor faults: the node holds, says so, and goes on by itself."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from driver import JOINTS, SensorDriver
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from sensor_msgs.msg import Image

from ros_nodes.client import SteeringClient
from ros_nodes.convert import ns_from_time


def counted(client: SteeringClient, name: str, more_than: int = 0) -> int:
    return client.wait_state(lambda s: s.counters.get(name, 0) > more_than, timeout=10.0).counters[name]


def count(client: SteeringClient, name: str) -> int:
    return client.next_state().counters.get(name, 0)


@pytest.mark.fault(24)
@pytest.mark.parametrize("skip", [("agentview",), ("agentview", "wrist", "joints")], ids=["one camera", "all"])
def test_silence_is_held_reported_and_recovered_from(
    client: SteeringClient, driver: SensorDriver, skip: tuple[str, ...]
) -> None:
    deadline = time.monotonic() + 10
    while client.state().loop_state != "holding":  # the other sensors go on
        assert time.monotonic() < deadline
        driver.send(skip=skip)
        client.next_state()
    status = driver.wait_diagnosis(lambda s: s.level == DiagnosticStatus.WARN)
    assert "no new observation" in status.message
    silent = len(driver.chunks)
    client.next_state()
    assert len(driver.chunks) == silent
    driver.ask()
    client.wait_state(lambda s: s.loop_state == "running")
    # Alarms of other tests of this node may stand in place of "running".
    driver.wait_diagnosis(lambda s: "no new observation" not in s.message)


def spoil_size(message: Image) -> None:
    message.width, message.step = 32, 96
    message.data = message.data[: 32 * 96]


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda m: setattr(m, "encoding", "bgr8"), id="encoding"),
        pytest.param(lambda m: setattr(m, "step", 10), id="step"),
        pytest.param(spoil_size, id="size"),
    ],
)
def test_wrong_image_is_refused_and_counted(
    client: SteeringClient, driver: SensorDriver, spoil: Callable[[Image], None]
) -> None:
    before = count(client, "bad_image")
    stamp = driver.send(change=spoil)
    counted(client, "bad_image", before)
    assert driver.answer(stamp, 0.3) is None
    driver.ask()


@pytest.mark.fault(26)
def test_stamp_that_jumps_back_is_dropped(client: SteeringClient, driver: SensorDriver) -> None:
    driver.ask()
    before = count(client, "stamp_jumped_back")
    stamp = driver.send(time.time_ns() - 60_000_000_000)
    counted(client, "stamp_jumped_back", before)
    assert driver.answer(stamp, 0.3) is None
    driver.ask()


@pytest.mark.fault(32)
def test_robot_clock_that_stays_set_back_is_taken_and_steering_cleared(
    client: SteeringClient, driver: SensorDriver
) -> None:
    driver.ask()
    client.wait_verdict(client.publish("slow", 0.5))
    past, deadline = time.time_ns() - 3_600_000_000_000, time.monotonic() + 15
    while driver.answer(driver.send(past + time.monotonic_ns() % 1_000_000_000_000), 0.2) is None:
        assert time.monotonic() < deadline
    assert client.wait_state(lambda s: s.active == ()).counters["clock_resets"] >= 1
    driver.ask()


@pytest.mark.fault(27)
def test_joints_are_taken_by_name_and_a_missing_one_is_refused(client: SteeringClient, driver: SensorDriver) -> None:
    shuffled = ("another", *reversed(JOINTS))
    deadline = time.monotonic() + 10
    while driver.answer(driver.send(joint_names=shuffled), 1.0) is None:
        assert time.monotonic() < deadline
    before = count(client, "missing_joint")
    stamp = driver.send(joint_names=JOINTS[:-1])
    counted(client, "missing_joint", before)
    assert driver.answer(stamp, 0.3) is None


@pytest.mark.fault(39)
def test_parameter_out_of_range_is_refused_while_running(client: SteeringClient, driver: SensorDriver) -> None:
    service = driver.node.create_client(SetParameters, "policy/set_parameters")
    assert service.wait_for_service(10.0)

    def set_to(name: str, value: float) -> tuple[bool, str]:
        future = service.call_async(SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()]))
        driver.wait(future.done, 5.0, "the parameter service")
        result = future.result().results[0]
        return result.successful, result.reason

    ok, reason = set_to("observation_timeout_s", 1000.0)
    assert not ok
    assert "range" in reason
    assert not set_to("default_ramp_s", 1.0)[0]  # read-only
    assert set_to("observation_timeout_s", 1.0)[0]


@pytest.mark.fault(38)
def test_repeated_frame_gets_the_same_answer_again_without_an_inference(
    client: SteeringClient, driver: SensorDriver
) -> None:
    chunk = driver.ask()
    before = client.next_state().counters
    stamp = ns_from_time(chunk.observation_stamp)
    deadline, seen = time.monotonic() + 5, len(driver.chunks)
    while len(driver.chunks) == seen:
        assert time.monotonic() < deadline
        driver.send(stamp)
        client.next_state()
    assert driver.chunks[-1][1] == chunk
    assert count(client, "inferences") == before["inferences"]


def test_robot_that_starts_anew_is_met_anew_with_steering_off(client: SteeringClient, driver: SensorDriver) -> None:
    client.wait_verdict(client.publish("slow", 0.5))
    driver.session = f"session-{time.time_ns()}"
    driver.describe()
    client.wait_state(lambda s: s.active == ())
    driver.wait_matched()
    assert driver.ask().session_id == driver.session
