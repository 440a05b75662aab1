"""The hold node beside a real policy node over DDS: it holds, and lets go whatever becomes of it."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from driver import JOINTS, NodeProcess, SensorDriver
from sensor_msgs.msg import JointState
from std_msgs.msg import Header
from steer_msgs.msg import EpisodeStatus
from steer_msgs.msg import SteeringState as SteeringStateMsg

from ros_nodes.client import NodeState, SteeringClient
from ros_nodes.convert import joints_to_msg, pose_to_msg, time_from_ns
from ros_nodes.qos import LATCHED, SENSOR, STATUS

ROOT = Path(__file__).parents[2]
RATE_HZ = 20.0
EXPIRY_S = 0.6
RELEASE_S = 0.5
"""How long the shared policy node takes to fade what has expired: 1 / its max_slew_per_s."""
SLACK_S = 5.0
"""States come every 0.2 s and this machine may be busy."""


class MovingRobot:
    """A hand that goes straight at 0.10 m/s plus 0.10 m/s times the strength in force, a frame every 50 ms."""

    def __init__(self, driver: SensorDriver) -> None:
        node = driver.node
        self._driver = driver
        self.gripper = node.create_publisher(JointState, "gripper_state", SENSOR)
        self.status = node.create_publisher(EpisodeStatus, "episode", STATUS)
        self._heard = node.create_subscription(SteeringStateMsg, "state", self._on_state, LATCHED)
        self._ended, self.quiet = threading.Event(), threading.Event()
        self.strength, self.speed, self.speeds = 0.0, 0.1, list[float]()
        self.episode, self.done, self.nan = 0, False, False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MovingRobot:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        node = self._driver.node
        node.destroy_subscription(self._heard)
        for publisher in (self.gripper, self.status):
            node.destroy_publisher(publisher)

    def _on_state(self, message: SteeringStateMsg) -> None:
        self.strength = next((a.strength for a in message.active if a.target == "speed"), 0.0)

    def _run(self) -> None:
        step, x = 0, 0.0
        while not self._ended.wait(1 / RATE_HZ):
            if self.quiet.is_set():
                continue
            wanted = 0.10 + 0.10 * self.strength
            self.speed += (1 - math.exp(-0.05 / 0.2)) * (wanted - self.speed)
            self.speeds.append(self.speed)
            step, x = step + 1, x + self.speed / RATE_HZ
            stamp = time_from_ns(time.time_ns())
            position = np.array([math.nan if self.nan else x, 0.0, 0.3])
            self._driver.pose.publish(pose_to_msg(position, np.array([1.0, 0, 0, 0]), stamp, "world"))
            self.gripper.publish(joints_to_msg(JOINTS[-2:], [0.04, -0.04], stamp))
            told = EpisodeStatus(
                header=Header(stamp=stamp), session_id="session-1", episode=self.episode, step=step, mode="free"
            )
            told.done = self.done
            self.status.publish(told)


def hold(**parameters: Any) -> NodeProcess:
    values = {
        "target": "'0.16 m/s'", "axis": "speed", "expiry_s": EXPIRY_S, "keepalive_s": 0.1, **parameters,
    }  # fmt: skip
    return NodeProcess(["-m", "ros_nodes.hold_node"], values)


def strength_in(state: NodeState) -> float:
    return next((a.strength for a in state.active if a.target == "speed"), 0.0)


def held_by_node(state: NodeState, least: float = 0.2) -> bool:
    return any(a.source.startswith("hold:") and a.target == "speed" and a.strength > least for a in state.active)


@pytest.fixture
def robot(client: SteeringClient, driver: SensorDriver) -> Iterator[MovingRobot]:
    with MovingRobot(driver) as moving:
        yield moving


def test_speed_is_held_at_the_target_on_the_real_graph(client: SteeringClient, robot: MovingRobot) -> None:
    with hold() as node:
        client.wait_state(lambda s: held_by_node(s, 0.4), timeout=40.0)
        deadline = time.monotonic() + 30.0
        while time.monotonic() < deadline:
            time.sleep(0.5)
            recent = robot.speeds[-40:]
            if abs(np.mean(recent) - 0.16) < 0.005 and np.std(recent) < 0.01:
                break
        else:
            raise AssertionError(f"speeds end with {np.round(robot.speeds[-20:], 3)}; {node.log()}")
        assert all(a.expires_in_s is not None for a in client.next_state().active), (
            "every command must expire by itself"
        )


def test_strength_returns_to_rest_within_the_expiry_when_the_node_is_killed(
    client: SteeringClient, robot: MovingRobot
) -> None:
    with hold(target="'0.5 m/s'") as node:
        held = client.wait_state(held_by_node, timeout=40.0)
        assert all(a.expires_in_s is not None and a.expires_in_s <= EXPIRY_S for a in held.active)
        node.process.send_signal(signal.SIGKILL)
        node.process.wait(SLACK_S)
        client.wait_state(lambda s: not s.active, timeout=EXPIRY_S + RELEASE_S + SLACK_S)
        assert strength_in(client.next_state()) == 0.0


def test_node_that_is_asked_to_end_lets_the_axis_go(client: SteeringClient, robot: MovingRobot) -> None:
    with hold(target="'0.5 m/s'", expiry_s=30.0) as node:
        client.wait_state(held_by_node, timeout=40.0)
        node.process.terminate()
        assert node.process.wait(10.0) == 0
        client.wait_state(lambda s: not s.active, timeout=5.0)


def test_silent_robot_lets_the_strength_go_and_it_begins_anew_at_rest(
    client: SteeringClient, robot: MovingRobot
) -> None:
    with hold(target="'0.5 m/s'", expiry_s=30.0, silence_s=1.0):
        client.wait_state(held_by_node, timeout=40.0)
        robot.quiet.set()
        client.wait_state(lambda s: not s.active, timeout=1.0 + SLACK_S)
        robot.quiet.clear()
        client.wait_state(lambda s: held_by_node(s, 0.05), timeout=10.0)


def test_measurement_that_is_no_number_moves_nothing(client: SteeringClient, robot: MovingRobot) -> None:
    with hold(target="'0.5 m/s'", strength_high=0.5):
        # At its limit, where nothing is on its way any more.
        client.wait_state(lambda s: held_by_node(s, 0.4999), timeout=40.0)
        robot.nan = True
        before = strength_in(client.next_state())
        for _ in range(5):
            state = client.next_state()
        # The ramp to the limit may still have its last ten-thousandth to go.
        assert strength_in(state) == pytest.approx(before, abs=2e-4)
        assert strength_in(state) <= 0.5


def test_end_of_an_episode_lets_go(client: SteeringClient, robot: MovingRobot) -> None:
    with hold(target="'0.5 m/s'", expiry_s=30.0):
        client.wait_state(held_by_node, timeout=40.0)
        robot.done = True
        client.wait_state(lambda s: not s.active, timeout=SLACK_S)


def test_axis_that_the_policy_node_has_not_ends_the_node_with_the_nearest(
    client: SteeringClient, robot: MovingRobot
) -> None:
    with hold(axis="sped") as node:
        assert node.process.wait(40.0) == 1
        assert "no axis 'sped'" in node.log()
        assert "'speed'" in node.log()


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"target": "'0.12 m'"}, "'m' is no unit of speed"),
        ({"expiry_s": 0.15}, "at least twice keepalive_s"),
        ({"dose_limit": 0.2}, "give the dose at strength 1"),
    ],
)
def test_parameters_that_hold_nothing_are_one_sentence(parameters: dict[str, Any], said: str) -> None:
    with hold(**parameters) as node:
        assert node.process.wait(40.0) == 1
        assert said in node.log()
        assert "Traceback" not in node.log()


def steer(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from steer_runtime.cli.main import main; main()", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=90, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_verb_refuses_a_target_without_a_unit_before_it_looks_for_a_node() -> None:
    ended = steer("hold", "speed", "0.12")
    assert ended.returncode != 0
    assert "no unit" in ended.stderr + ended.stdout


def test_verb_says_that_no_node_is_there() -> None:
    ended = steer("hold", "speed", "0.12", "m/s", "--namespace", "/nobody", "--timeout", "1")
    assert ended.returncode == 3
    assert "no policy node" in ended.stderr + ended.stdout
