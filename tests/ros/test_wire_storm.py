"""Storms of bytes on the wire: whatever is published as a command, the node answers, steers and remembers as before."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import psutil
import pytest
from driver import PolicyProcess, SensorDriver
from rclpy.publisher import Publisher
from rclpy.serialization import serialize_message
from std_msgs.msg import String
from steer_msgs.msg import SteeringCommand as SteeringCommandMsg

from ros_nodes.client import SteeringClient
from ros_nodes.command_json import command_to_json
from ros_nodes.convert import time_from_ns
from ros_nodes.qos import COMMAND
from steer_runtime.steering.command import SteeringCommand

TARGETS = ("slow", "fast", "gentle", "speed", "slow@000000000000", "slwo", "", "x" * 300)
STRENGTHS = (0.0, 0.5, -0.5, 1.0, 5.0, 1e300, float("nan"), float("inf"), -0.0)
BURST = 8
"""Messages between two pauses; the subscription keeps ten."""


class Wire:
    """Generated messages, some right, some damaged, some no messages at all."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.sequence = 0

    def command(self) -> SteeringCommandMsg:
        """A message whose every field is right or not."""
        rng = self.rng
        self.sequence += 1
        message = SteeringCommandMsg(
            source=str(rng.choice(["storm", "storm-2", "", "s" * 200])),
            epoch=int(rng.integers(0, 3)),
            sequence=self.sequence if rng.random() < 0.8 else int(rng.integers(0, 2**63)),
            op=int(rng.integers(0, 256)) if rng.random() < 0.1 else int(rng.integers(0, 3)),
            target=str(rng.choice(TARGETS)),
            strength=float(rng.choice(STRENGTHS)),
            ramp_s=float(rng.choice([-1.0, 0.0, 0.5, float("nan"), 1e9])),
            hold_s=float(rng.choice([0.0, 0.2, float("nan"), -1.0, 1e9])),
            priority=int(rng.integers(-128, 128)),
            span=int(rng.integers(0, 256)) if rng.random() < 0.2 else 0,
            step_begin=int(rng.integers(0, 5)) if rng.random() < 0.1 else 0,
            step_end=int(rng.integers(0, 2**32)) if rng.random() < 0.1 else 0,
        )
        shift = float(rng.choice([0.0, 0.0, 0.0, -5.0, 5.0]))
        message.header.stamp = time_from_ns(time.time_ns() + int(shift * 1e9))
        return message

    def text(self) -> String:
        """A JSON command, as it is or with characters changed."""
        self.sequence += 1
        command = SteeringCommand("storm-json", 1, self.sequence, time.time_ns(), "set", "slow", 0.5)
        characters = list(command_to_json(command))
        for _ in range(int(self.rng.integers(0, 4))):
            characters[int(self.rng.integers(0, len(characters)))] = chr(int(self.rng.integers(1, 0xD7FF)))
        return String(data="".join(characters))

    def damaged(self, content: bytes) -> bytes:
        """The same with bytes changed or an end cut off, or bytes that never were a message."""
        kind = self.rng.integers(0, 4)
        if kind == 0:
            return bytes(content)
        if kind == 1:
            return bytes(content[: int(self.rng.integers(0, len(content)))])
        if kind == 2:
            return self.rng.bytes(int(self.rng.integers(0, 400)))
        changed = bytearray(content)
        for _ in range(int(self.rng.integers(1, 6))):
            changed[int(self.rng.integers(0, len(changed)))] = int(self.rng.integers(0, 256))
        return bytes(changed)


def resident_mib(process: PolicyProcess) -> float:
    return psutil.Process(process.process.pid).memory_info().rss / 2**20


def storm(wire: Wire, typed: Publisher, text: Publisher, count: int, alive: Callable[[], bool]) -> None:
    """Publish `count` messages as bytes, no faster than they can be taken."""
    for index in range(count):
        if index % 4 == 3:
            text.publish(wire.damaged(serialize_message(wire.text())))
        else:
            typed.publish(wire.damaged(serialize_message(wire.command())))
        if index % BURST == BURST - 1:
            time.sleep(0.004)  # the pace at which the node takes them, not a wait for it
            assert alive()


def weather(client: SteeringClient, driver: SensorDriver, process: PolicyProcess, count: int) -> tuple[float, float]:
    """A storm of `count` messages and all that must hold after it; returns the node's memory (MiB) early and late."""
    typed = driver.node.create_publisher(SteeringCommandMsg, "command", COMMAND)
    driver.wait(lambda: typed.get_subscription_count() and driver.json.get_subscription_count(), what="the node's ears")
    wire = Wire(seed=count)
    baseline = np.array(driver.ask().data)

    def alive() -> bool:
        return process.process.poll() is None

    storm(wire, typed, driver.json, count // 5, alive)
    client.next_state(30.0)
    early = resident_mib(process)
    storm(wire, typed, driver.json, count - count // 5, alive)
    driver.node.destroy_publisher(typed)
    state = client.next_state(30.0)
    assert state.counters["commands"] > 0
    assert len(state.counters) < 120, "codes of refusals are a fixed set"
    assert len(state.active) <= 4
    assert all(np.isfinite(np.array(chunk.data)).all() for _, chunk in driver.chunks)
    cleared = client.wait_verdict(client.clear(), timeout=30.0)
    assert cleared.accepted
    after = driver.ask(after=lambda chunk: chunk.steering_sequence >= cleared.steering.sequence)
    assert np.array_equal(np.array(after.data), baseline)
    accepted = client.wait_verdict(client.publish("slow", 0.5), timeout=30.0)
    assert accepted.accepted
    assert alive()
    return early, resident_mib(process)


@pytest.mark.fault(12)
def test_a_short_storm_of_bytes_changes_nothing(
    client: SteeringClient, driver: SensorDriver, policy_process: PolicyProcess
) -> None:
    weather(client, driver, policy_process, 400)
    assert "Traceback" not in policy_process.log()


@pytest.mark.fault(12)
@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_a_long_storm_of_bytes_changes_nothing_and_leaves_memory_flat(
    client: SteeringClient, driver: SensorDriver, policy_process: PolicyProcess
) -> None:
    early, late = weather(client, driver, policy_process, 20_000)
    assert late < early + 20.0, "MiB of the node"
