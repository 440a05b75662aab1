"""The stand-in UR5e as a driver on the real graph: names, orders, habits, and what is left when it dies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from standin import StandinProcess, UrClient

from ros_nodes.convert import ns_from_time
from sim.ur5.names import JOINTS, POSITION, VELOCITY
from sim.ur5.truth import read_motion

PAN = np.eye(6)[0]
KNUCKLE = "robotiq_85_left_knuckle_joint"


@pytest.fixture(scope="module")
def standin(other_domain: int) -> Iterator[StandinProcess]:
    with StandinProcess(other_domain, unlock_delay_s=0.2) as process:
        yield process


@pytest.fixture(scope="module")
def listening(other_domain: int) -> Iterator[UrClient]:
    with UrClient(other_domain) as client:
        yield client


@pytest.fixture
def ur(standin: StandinProcess, listening: UrClient) -> UrClient:
    """An arm at rest whose program runs."""
    listening.wait_up()
    listening.recover()
    return listening


def turn(ur: UrClient, by: float, seconds: float) -> np.ndarray:
    """Have the base turn by `by` rad at constant speed; returns where it ends."""
    begin = ur.positions
    ur.follow([seconds, seconds + 0.1], np.array([begin + by * PAN] * 2))
    return begin + by * PAN


def test_joint_states_are_whole_and_not_in_kinematic_order(ur: UrClient) -> None:
    message = ur.joints[-1][1]
    names = list(message.name)
    assert set(names) == {*JOINTS, KNUCKLE}
    assert [name for name in names if name in JOINTS] != list(JOINTS)
    assert len(message.position) == len(message.velocity) == len(message.effort) == 7
    count = len(ur.joints)
    ur.wait(lambda: len(ur.joints) >= count + 50)
    stamps = [ns_from_time(m.header.stamp) for _, m in ur.joints[-50:]]
    # 8 ms apart; a busy machine skips some.
    assert 6e6 < np.median(np.diff(stamps)) < 60e6


def test_tool_pose_is_in_the_controllers_base_frame(ur: UrClient) -> None:
    pose = ur.poses[-1][1]
    assert pose.header.frame_id == "base"
    assert pose.pose.position.x < -0.4


def test_a_late_subscriber_hears_that_the_program_runs(ur: UrClient, other_domain: int) -> None:
    with UrClient(other_domain) as late:
        late.wait(lambda: late.running, what="the latched flag")
        assert late.running[-1][1].data


def test_a_trajectory_in_any_order_of_joints_is_followed_and_held(ur: UrClient) -> None:
    goal = ur.positions + np.array([0.2, 0.1, -0.1, 0.0, 0.0, 0.3])
    order = [3, 0, 5, 1, 4, 2]
    ur.follow([0.8, 0.9], np.array([goal[order]] * 2), names=[JOINTS[i] for i in order])
    ur.wait_moving()
    ur.wait(lambda: np.abs(ur.positions - goal).max() < 2e-3)
    ur.wait_rest()
    held = ur.positions
    count = len(ur.joints)
    ur.wait(lambda: len(ur.joints) > count + 60)
    np.testing.assert_allclose(ur.positions, held, atol=1e-3)


def test_a_stamped_trajectory_has_already_begun(ur: UrClient) -> None:
    begin = ur.positions
    stamp = time.time_ns() - 1_000_000_000
    ur.follow([2.0, 2.1], np.array([begin + 0.4 * PAN] * 2), stamp_ns=stamp)
    ur.wait(lambda: abs(ur.positions[0] - begin[0] - 0.4) < 2e-3)
    arrived_ns = ns_from_time(ur.joints[-1][1].header.stamp)
    assert (arrived_ns - stamp) / 1e9 == pytest.approx(2.0, abs=0.3)


def test_speed_slider_is_told_in_percent_and_stretches_time(ur: UrClient) -> None:
    ur.slide(50.0)
    ur.wait(lambda: ur.scaling[-1][1].data == pytest.approx(50.0, abs=0.1))
    turn(ur, 0.5, 1.0)
    ur.wait(lambda: ur.velocities[0] == pytest.approx(0.25, abs=0.02))
    ur.wait_rest()
    assert ur.peaks()[0] < 0.3


def test_after_unlock_and_play_the_old_motion_goes_on(standin: StandinProcess, ur: UrClient) -> None:
    goal = turn(ur, 1.2, 8.0)
    ur.wait_moving(0.1)
    told = standin.log().count("protective stop: ")
    assert ur.call("/ur5_standin/protective_stop").success
    ur.wait(lambda: not ur.running[-1][1].data)
    ur.wait_rest()
    left = goal[0] - ur.positions[0]
    assert left > 0.1
    ur.wait(lambda: standin.log().count("protective stop: ") == told + 1, what="the warning")
    assert "unlock" in ur.call("/dashboard_client/play").message
    ur.wait(lambda: ur.call("/dashboard_client/unlock_protective_stop").success)
    assert ur.scaling[-1][1].data == 0.0
    assert ur.call("/io_and_status_controller/resend_robot_program").success
    ur.wait(lambda: ur.running[-1][1].data)
    ur.wait(lambda: abs(ur.positions[0] - goal[0]) < 2e-3)
    # Said once a stop, not once a report of it.
    assert standin.log().count("protective stop: ") == told + 1


def test_what_is_sent_while_the_program_stands_is_dropped(ur: UrClient) -> None:
    assert ur.call("/dashboard_client/stop").success
    ur.wait(lambda: not ur.running[-1][1].data)
    turn(ur, 0.5, 0.5)
    count = len(ur.joints)
    ur.wait(lambda: len(ur.joints) > count + 60)
    assert ur.call("/dashboard_client/play").success
    ur.wait(lambda: ur.scaling[-1][1].data > 99.0)
    ur.wait_rest()
    assert ur.peaks()[0] < 0.01


def test_a_forwarded_velocity_goes_on_after_silence(ur: UrClient) -> None:
    ur.activate(VELOCITY)
    begin = ur.positions[0]
    ur.forward(VELOCITY, 0.2 * PAN)
    ur.wait(lambda: ur.positions[0] - begin > 0.3)
    assert ur.velocities[0] == pytest.approx(0.2, abs=0.01)
    ur.forward(VELOCITY, 0.0 * PAN)
    ur.wait_rest()


def test_forwarded_positions_and_the_gripper_are_obeyed(ur: UrClient) -> None:
    ur.activate(POSITION)
    goal = ur.positions - 0.2 * PAN
    ur.forward(POSITION, goal)
    ur.grip(0.8)
    ur.wait(lambda: np.abs(ur.positions - goal).max() < 2e-3)
    ur.wait(lambda: dict(zip(ur.joints[-1][1].name, ur.joints[-1][1].position, strict=True))[KNUCKLE] > 0.7)


@pytest.mark.parametrize("case", ["nan", "joints", "short", "empty", "backwards"])
def test_a_trajectory_that_the_real_controller_refuses_moves_nothing(ur: UrClient, case: str) -> None:
    goal = np.array([ur.positions + 0.3 * PAN] * 2)
    if case == "nan":
        ur.follow([0.3, 0.4], goal * np.nan)
    elif case == "joints":
        ur.follow([0.3, 0.4], goal, names=("elbow_joint",) * 6)
    elif case == "short":
        ur.follow([0.3, 0.4], goal[:, :5])
    elif case == "empty":
        ur.follow([], goal)
    else:
        ur.follow([0.4, 0.3], goal)
    count = len(ur.joints)
    ur.wait(lambda: len(ur.joints) > count + 40)
    assert ur.peaks()[0] < 0.01


def test_pictures_of_both_cameras_share_their_stamp(third_domain: int) -> None:
    with StandinProcess(third_domain, camera_size=64, camera_hz=10.0), UrClient(third_domain) as ur:
        ur.wait_up()
        ur.wait(lambda: all(ur.images.values()), 60.0, "pictures")
        stamps = [{ns_from_time(m.header.stamp) for _, m in images} for images in ur.images.values()]
        assert stamps[0] & stamps[1]
        for images in ur.images.values():
            message = images[-1][1]
            assert (message.width, message.height, message.encoding) == (64, 64, "rgb8")
            assert np.frombuffer(message.data, np.uint8).std() > 10


@pytest.mark.fault(33)
def test_when_the_driver_is_killed_the_arm_brakes_and_keeps_its_log(third_domain: int, tmp_path: Path) -> None:
    log = tmp_path / "motion.npz"
    with StandinProcess(third_domain, log=str(log)) as process, UrClient(third_domain) as ur:
        ur.wait_up()
        turn(ur, 1.6, 8.0)
        ur.wait_moving(0.15)
        killed_s = time.monotonic()
        process.kill()
        ur.wait(log.is_file, what="the log of an arm whose driver died")
    motion = read_motion(log)
    moving = np.abs(motion.velocities).max(axis=1) > 5e-3
    assert moving[motion.time_s < killed_s].any()
    rest_s = motion.time_s[np.flatnonzero(moving)[-1]] - killed_s
    # Some 0.1 s where the machine has time for it; the motion would have gone on for 8 s.
    assert rest_s < 2.0
    assert motion.tcp_speed.max() < 0.15


def test_the_node_ends_with_code_0_and_takes_its_arm_along(third_domain: int, tmp_path: Path) -> None:
    log = tmp_path / "motion.npz"
    with StandinProcess(third_domain, log=str(log)) as process, UrClient(third_domain) as ur:
        ur.wait_up()
        process.process.terminate()
        assert process.process.wait(10.0) == 0
        assert log.is_file()
