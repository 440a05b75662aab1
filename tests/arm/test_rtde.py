"""A UR arm without ROS, against a controller's protocols in a process of their own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arm_fakes import Fake, free_address

from arm.port import ArmState, JointMotion
from arm.rtde import RtdePort, RtdeSettings, in_base_link
from steer_runtime.errors import SteerError

PATIENCE_S = 60.0
PATIENT = RtdeSettings(watchdog_s=3.0)
"""For a machine that is busy with other things: what the watchdog does is tested by itself."""


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    controller = Fake(free_address(), tmp_path / "told.json")
    yield controller
    controller.end()


def wait(ready: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := ready()):
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.01)
    return found


def state(port: RtdePort) -> ArmState:
    found = wait(port.read, "a state")
    assert isinstance(found, ArmState)
    return found


def to(port: RtdePort, turned: float, horizon_s: float = 0.3) -> JointMotion:
    """Turn the first joint by so much, and rest."""
    here = state(port).positions
    there = here + np.array([turned, 0, 0, 0, 0, 0])
    half = (here + there) / 2
    times = np.array([horizon_s / 3, 2 * horizon_s / 3, horizon_s])
    return JointMotion(times, np.stack([half, there, there]))


def test_a_port_that_only_reads_starts_nothing_on_the_controller(fake: Fake) -> None:
    port = RtdePort(fake.address, control=False)
    now = state(port)
    np.testing.assert_allclose(now.positions, [0.0, -1.57, 1.57, -1.57, -1.57, 0.0])
    assert not now.velocities.any()
    # The controller's base is turned by pi about z against base_link.
    np.testing.assert_allclose(now.tcp_position, [0.49, 0.13, 0.49])
    assert np.linalg.norm(now.tcp_quaternion) == pytest.approx(1.0)
    assert (now.program_running, now.speed_scaling, now.gripper) == (False, 1.0, None)
    first = now.stamp_s
    wait(lambda: state(port).stamp_s > first, "a newer state")
    port.send(to(port, 0.1))
    port.halt()
    assert port.counters["dropped_motions"] == 1
    with pytest.raises(SteerError, match="only reads"):
        port.restart()
    port.close()
    told = fake.told()
    assert told["scripts"] == 0
    assert told["targets"] == []


def test_a_motion_is_followed_in_small_steps_and_ends_at_rest(fake: Fake) -> None:
    port = RtdePort(fake.address, control=True, settings=PATIENT)
    wait(lambda: state(port).program_running, "the program")
    port.send(to(port, 0.06))
    wait(lambda: port.counters.get("finished_motions"), "the end of the motion")
    wait(lambda: abs(state(port).positions[0] - 0.06) < 1e-3, "the arm to arrive")
    port.close()
    port.close()
    told = fake.told()
    targets = np.array(told["targets"])[:, 1:]
    assert len(targets) > 10
    steps = np.abs(np.diff(targets[:, 0], prepend=0.0))
    assert steps.max() < 0.06
    assert targets[-1][0] == pytest.approx(0.06)
    assert "servo stop" in [what for _, what in told["events"]]
    assert not told["program"]


def test_a_newer_motion_replaces_the_running_one_without_a_jump(fake: Fake) -> None:
    port = RtdePort(fake.address, control=True, settings=PATIENT)
    wait(lambda: state(port).program_running, "the program")
    port.send(to(port, 0.2, horizon_s=2.0))
    wait(lambda: state(port).positions[0] > 0.02, "motion")
    port.send(to(port, -0.05, horizon_s=1.0))
    wait(lambda: port.counters.get("finished_motions"), "the end")
    counters = port.counters
    port.close()
    assert counters["replaced_motions"] == 1
    assert np.array(fake.told()["targets"])[:, 1].max() < 0.15
    assert counters["finished_motions"] == 1


def test_a_halt_stops_the_arm_where_it_is(fake: Fake) -> None:
    port = RtdePort(fake.address, control=True, settings=PATIENT)
    wait(lambda: state(port).program_running, "the program")
    port.send(to(port, 1.0, horizon_s=10.0))
    wait(lambda: state(port).positions[0] > 0.01, "motion")
    port.halt()
    wait(lambda: "servo stop" in fake.events(), "the stop")
    wait(lambda: not np.abs(state(port).velocities).max() > 1e-6, "rest")
    at = state(port).positions[0]
    assert at < 0.9
    port.halt()
    port.send(to(port, 0.02))
    wait(lambda: port.counters.get("finished_motions"), "motion after a halt")
    port.close()


@pytest.mark.fault(28)
def test_after_a_protective_stop_nothing_is_sent_until_somebody_restarts(fake: Fake) -> None:
    port = RtdePort(fake.address, control=True, settings=PATIENT)
    wait(lambda: state(port).program_running, "the program")
    port.send(to(port, 1.0, horizon_s=10.0))
    wait(lambda: state(port).positions[0] > 0.01, "motion")
    fake.order("protective_stop")
    wait(lambda: not state(port).program_running, "the stop to be seen")
    wait(lambda: port.counters.get("dropped_motions", 0) >= 1, "the motion to be dropped")
    sent = len(fake.told()["targets"])
    port.send(to(port, 0.1))
    fake.order("unlock")
    assert not state(port).program_running
    assert len(fake.told()["targets"]) == sent
    port.restart()
    wait(lambda: state(port).program_running, "the program after the restart")
    assert len(fake.told()["targets"]) == sent
    port.send(to(port, 0.02))
    wait(lambda: port.counters.get("finished_motions"), "motion after the restart")
    port.close()


@pytest.mark.fault(29)
def test_the_speed_slider_slows_a_motion_and_stops_it(fake: Fake) -> None:
    port = RtdePort(fake.address, control=True, settings=PATIENT)
    wait(lambda: state(port).program_running, "the program")
    fake.order("slider=0.0")
    wait(lambda: state(port).speed_scaling == 0.0, "the slider")
    port.send(to(port, 0.5, horizon_s=1.0))
    wait(lambda: port.counters.get("points", 0) > 20, "points")
    assert state(port).positions[0] == pytest.approx(0.0, abs=1e-6)
    fake.order("slider=0.5")
    wait(lambda: state(port).positions[0] > 0.01, "slow motion")
    assert state(port).speed_scaling == pytest.approx(0.5)
    port.close()


PROGRAM = """
import sys, time
import numpy as np
from arm.port import JointMotion
from arm.rtde import RtdePort, RtdeSettings
port = RtdePort(sys.argv[1], control=True, settings=RtdeSettings(watchdog_s=1.0))
while port.read() is None or not port.read().program_running:
    time.sleep(0.01)
here = port.read().positions
there = here + np.array([2.0, 0, 0, 0, 0, 0])
port.send(JointMotion(np.array([19.0, 20.0]), np.stack([there, there])))
print("moving", flush=True)
time.sleep(60)
"""


@pytest.mark.fault(33)
def test_an_arm_whose_sender_is_killed_comes_to_rest_by_itself(fake: Fake) -> None:
    sender = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, fake.address],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    watcher = RtdePort(fake.address, control=False)
    try:
        wait(lambda: state(watcher).positions[0] > 0.05, "motion")
    finally:
        sender.kill()
        sender.wait(5.0)
    killed_s = time.monotonic()
    wait(lambda: "program ended: watchdog" in fake.events(), "the watchdog")
    told = fake.told()
    motion = np.array(told["motion"])
    after = motion[motion[:, 0] > killed_s + 0.3]
    assert np.ptp(after[:, 1]) < 1e-3
    assert after[-1, 1] < 1.9
    watcher.close()


def test_a_lost_connection_leaves_a_state_that_ages_and_no_exception(fake: Fake) -> None:
    port = RtdePort(fake.address, control=True, settings=PATIENT)
    wait(lambda: state(port).program_running, "the program")
    fake.end()
    last = state(port).stamp_s
    wait(lambda: time.monotonic() - state(port).stamp_s > 0.5, "the state to age")
    assert state(port).stamp_s - last < 0.5
    port.send(JointMotion(np.array([0.1]), np.zeros((1, 6))))
    port.halt()
    port.close()


def test_no_controller_is_one_sentence() -> None:
    with pytest.raises(SteerError, match="cannot be read"):
        RtdePort("127.0.79.1", control=False)


def test_the_controllers_base_is_turned_into_base_link() -> None:
    position, quaternion = in_base_link([0.1, 0.2, 0.3, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(position, [-0.1, -0.2, 0.3])
    np.testing.assert_allclose(np.abs(quaternion), [0.0, 0.0, 1.0, 0.0], atol=1e-12)
    # Pointing down in base, with the tool's x along base's x: in base_link its x points the other way.
    _, quaternion = in_base_link([0.0, 0.0, 0.0, np.pi, 0.0, 0.0])
    x, y, z, w = quaternion
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    np.testing.assert_allclose(rotation, [[-1, 0, 0], [0, 1, 0], [0, 0, -1]], atol=1e-12)
