"""The simulated UR5e without ROS: trajectories as the real controller runs them, stops, what it measures of itself."""

from __future__ import annotations

from pathlib import Path

import mujoco
import numpy as np
import pytest

from sim.ur5.arm import Ur5Arm
from sim.ur5.names import CONTROLLERS, JOINTS
from sim.ur5.scene import HOME, PREFIX, Scene, table_scene
from sim.ur5.trajectory import Trajectory, TrajectoryController
from sim.ur5.truth import MotionLog, read_motion
from steer_runtime.errors import SteerError

HOME_Q = np.array(HOME)
PAN = np.eye(6)[0]


@pytest.fixture(scope="module")
def scene() -> Scene:
    return table_scene(meshes=False)


@pytest.fixture
def arm(scene: Scene) -> Ur5Arm:
    return Ur5Arm(scene)


def ramp(joint: int, to: float, seconds: float) -> Trajectory:
    """One joint moves by `to` rad at constant speed from home, then rests."""
    times = np.linspace(0.1, seconds, 11)
    positions = np.repeat(HOME_Q[None], 12, axis=0)
    positions[:11, joint] += to * times / seconds
    positions[11] = positions[10]
    return Trajectory(np.append(times, seconds + 0.1), positions)


def test_base_frames_are_those_of_a_real_ur5e(scene: Scene) -> None:
    """At zero a UR5e's flange is at (0.8172, 0.2329, 0.0628) m in base_link, by UR's DH parameters; Menagerie rounds them."""
    data = mujoco.MjData(scene.model)
    data.qpos[[scene.model.joint(PREFIX + name).qposadr[0] for name in JOINTS]] = 0.0
    mujoco.mj_kinematics(scene.model, data)
    flange = data.site(f"{PREFIX}attachment_site").xpos
    np.testing.assert_allclose(flange, [0.8172, 0.2329, 0.0628], atol=2e-3)


def test_tool_pose_is_told_in_the_controllers_frame(arm: Ur5Arm) -> None:
    measured = arm.measure()
    # In front of the arm in base_link is behind it in `base`; the gripper looks down.
    assert measured.tcp_position[0] < -0.4
    assert 0.2 < measured.tcp_position[2] < 0.5
    x, y, z, w = measured.tcp_quaternion
    assert 2 * (x * z - w * y) == pytest.approx(0.0, abs=1e-6)
    assert 1 - 2 * (x * x + y * y) == pytest.approx(-1.0, abs=1e-6)


def test_an_arm_that_is_told_nothing_holds_still(arm: Ur5Arm) -> None:
    arm.advance(1.0)
    np.testing.assert_allclose(arm.positions, HOME_Q, atol=1e-4)
    assert arm.peaks.values[12] < 1e-3


def test_points_are_passed_at_their_times_and_the_last_is_held(arm: Ur5Arm) -> None:
    arm.follow(ramp(0, 0.5, 1.0))
    arm.advance(0.5)
    assert arm.positions[0] == pytest.approx(HOME_Q[0] + 0.25, abs=5e-3)
    assert arm.velocities[0] == pytest.approx(0.5, rel=0.02)
    arm.advance(2.0)
    np.testing.assert_allclose(arm.positions, HOME_Q + 0.5 * PAN, atol=1e-3)
    assert np.abs(arm.velocities).max() < 1e-3


def test_half_the_speed_slider_takes_twice_the_time(arm: Ur5Arm) -> None:
    arm.slide(0.5)
    arm.advance(0.1)
    arm.follow(ramp(0, 0.5, 1.0))
    arm.advance(1.0)
    assert arm.positions[0] == pytest.approx(HOME_Q[0] + 0.25, abs=5e-3)
    assert arm.velocities[0] == pytest.approx(0.25, rel=0.03)
    arm.advance(1.5)
    assert arm.positions[0] == pytest.approx(HOME_Q[0] + 0.5, abs=1e-3)


def test_a_new_trajectory_begins_where_the_arm_is(arm: Ur5Arm) -> None:
    arm.follow(ramp(0, 0.5, 1.0))
    arm.advance(0.5)
    back = Trajectory(np.array([0.5, 0.6]), np.array([HOME_Q, HOME_Q]))
    arm.follow(back)
    arm.advance(0.25)
    # Halfway from the measured 0.25 rad back to 0, in a straight line.
    assert arm.positions[0] == pytest.approx(HOME_Q[0] + 0.125, abs=6e-3)


def test_a_start_in_the_past_is_entered_where_it_would_be(arm: Ur5Arm) -> None:
    arm.follow(ramp(0, 0.5, 1.0), begun_s=0.2)
    arm.advance(0.8)
    assert arm.positions[0] == pytest.approx(HOME_Q[0] + 0.5, abs=5e-3)
    with pytest.raises(SteerError, match=r"ended 0\.900 s ago"):
        arm.follow(ramp(0, 0.5, 1.0), begun_s=2.0)


def test_trajectories_that_are_sent_again_while_they_run_move_the_arm_smoothly(arm: Ur5Arm) -> None:
    """What a bridge does: a whole short trajectory every 20 ms, each with its start time, some late."""
    speed, random = 0.4, np.random.default_rng(0)
    for tick in range(50):
        late = 0.002 * random.integers(0, 4)
        arm.advance(late)
        ahead = np.minimum(tick * 0.02 + 0.02 * np.arange(1, 16), 1.2)
        positions = np.repeat(HOME_Q[None], 15, axis=0)
        # From rest at 2 rad/s^2 up to the speed.
        positions[:, 0] += np.where(ahead < speed / 2, ahead**2, speed * ahead - speed**2 / 4)
        arm.follow(Trajectory(0.02 * np.arange(1, 16), positions), begun_s=late)
        arm.advance(0.02 - late)
    assert arm.velocities[0] == pytest.approx(speed, rel=0.03)
    assert arm.peaks.values[0] < 1.05 * speed
    assert arm.peaks.values[6] < 2.6


@pytest.mark.parametrize(("stated", "slope"), [(0, 1.0), (1, 1.5), (2, 1.875)])
def test_more_stated_derivatives_make_a_smoother_curve(stated: int, slope: float) -> None:
    """From rest at 0 to rest at 0.5: slopes at half the time of the line, 3 t^2 - 2 t^3, and 10 t^3 - 15 t^4 + 6 t^5."""
    parts = [np.zeros((1, 6))] * stated
    controller = TrajectoryController(np.zeros(6))
    controller.replace(Trajectory(np.array([1.0]), np.full((1, 6), 0.5), *parts), np.zeros(6), np.zeros(6))
    position, velocity = controller.sample(0.5)
    assert position[0] == pytest.approx(0.25)
    assert velocity[0] == pytest.approx(0.5 * slope)


@pytest.mark.parametrize(
    ("times", "positions", "velocities"),
    [
        (np.array([]), np.zeros((0, 6)), None),
        (np.array([0.1, 0.1]), np.zeros((2, 6)), None),
        (np.array([0.1]), np.full((1, 6), np.nan), None),
        (np.array([np.inf]), np.zeros((1, 6)), None),
        (np.array([0.1]), np.zeros((1, 5)), None),
        (np.array([0.1]), np.zeros((1, 6)), np.ones((1, 6))),
    ],
)
def test_what_the_real_controller_refuses_is_refused(
    times: np.ndarray, positions: np.ndarray, velocities: np.ndarray | None
) -> None:
    with pytest.raises(SteerError) as refused:
        Trajectory(times, positions, velocities)
    assert refused.value.code == "bad_trajectory"


def test_after_a_protective_stop_and_play_the_old_motion_goes_on(arm: Ur5Arm) -> None:
    arm.follow(ramp(0, 0.5, 1.0))
    arm.advance(0.5)
    arm.stop_protectively()
    arm.advance(0.3)
    rested = arm.positions[0]
    assert np.abs(arm.velocities).max() < 1e-2
    assert HOME_Q[0] + 0.25 < rested < HOME_Q[0] + 0.3
    assert (arm.measure().program_running, arm.measure().protective_stop) == (False, True)
    with pytest.raises(SteerError, match="not running"):
        arm.follow(ramp(0, 0.1, 1.0))
    with pytest.raises(SteerError, match="unlock it"):
        arm.play()
    with pytest.raises(SteerError, match="5 s after"):
        arm.unlock()
    arm.advance(5.0)
    assert arm.positions[0] == pytest.approx(rested, abs=1e-3)
    arm.unlock()
    arm.advance(0.2)
    assert arm.positions[0] == pytest.approx(rested, abs=1e-3)
    arm.play()
    arm.advance(1.5)
    assert arm.positions[0] == pytest.approx(HOME_Q[0] + 0.5, abs=1e-3)


def test_a_forwarded_velocity_has_no_timeout(arm: Ur5Arm) -> None:
    arm.activate("forward_velocity_controller")
    arm.move_at(np.array([0.2, 0, 0, 0, 0, 0]))
    arm.advance(3.0)
    assert arm.velocities[0] == pytest.approx(0.2, rel=0.02)
    assert arm.positions[0] == pytest.approx(HOME_Q[0] + 0.6, abs=0.01)
    arm.activate("scaled_joint_trajectory_controller")
    arm.advance(0.5)
    assert np.abs(arm.velocities).max() < 1e-2


def test_a_forwarded_position_is_reached_no_faster_than_joints_can(arm: Ur5Arm) -> None:
    arm.activate("forward_position_controller")
    arm.move_to(HOME_Q + PAN)
    arm.advance(0.2)
    assert arm.positions[0] - HOME_Q[0] == pytest.approx(0.6, abs=0.1)
    arm.advance(1.0)
    assert arm.positions[0] == pytest.approx(HOME_Q[0] + 1.0, abs=1e-3)
    assert arm.peaks.values[0] < 1.2 * 3.14


def test_only_the_active_controller_is_listened_to(arm: Ur5Arm) -> None:
    with pytest.raises(SteerError, match="not active"):
        arm.move_at(np.zeros(6))
    arm.activate("forward_position_controller")
    with pytest.raises(SteerError, match="not active"):
        arm.follow(ramp(0, 0.1, 1.0))
    with pytest.raises(SteerError, match="expected one of " + ", ".join(CONTROLLERS)):
        arm.activate("cartesian")


@pytest.mark.parametrize("value", [np.full(6, np.nan), np.zeros(5), np.full(6, np.inf)])
def test_forwarded_numbers_that_are_none_are_refused(arm: Ur5Arm, value: np.ndarray) -> None:
    arm.activate("forward_velocity_controller")
    with pytest.raises(SteerError, match="6 finite numbers"):
        arm.move_at(value)


def test_gripper_closes_to_the_knuckles_end_and_opens(arm: Ur5Arm) -> None:
    arm.grip(0.8)
    arm.advance(1.5)
    assert arm.measure().gripper == pytest.approx(0.8, abs=0.05)
    arm.grip(0.0)
    arm.advance(1.5)
    assert arm.measure().gripper == pytest.approx(0.0, abs=0.05)
    np.testing.assert_allclose(arm.positions, HOME_Q, atol=1e-3)


def test_peaks_are_those_of_the_motion_and_are_forgotten_on_demand(arm: Ur5Arm) -> None:
    arm.follow(ramp(0, 0.3, 1.0))
    arm.advance(1.5)
    peaks = arm.peaks.values
    # The servo overshoots a step of speed.
    assert 0.3 <= peaks[0] < 0.36
    assert peaks[1] < 0.01
    # The hand's way round the base's axis.
    radius = np.linalg.norm(arm.measure().tcp_position[:2])
    assert peaks[12] == pytest.approx(peaks[0] * radius, rel=0.05)
    arm.peaks.reset()
    arm.advance(0.1)
    assert arm.peaks.values.max() < 0.01


def test_a_log_that_was_cut_off_is_read_to_its_last_row(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "motion.npz"
    log = MotionLog(path, ["cube"])
    for row in range(3):
        log.add(row, np.full(6, row), np.zeros(6), np.arange(3), 0.1 * row, np.full((1, 3), row))
    log.flush()
    rows = path.with_name("motion.npz.rows")
    with rows.open("ab") as file:
        file.write(b"torn")
    cut = read_motion(path)
    assert cut.time_s.tolist() == [0.0, 1.0, 2.0]
    assert cut.tcp[2].tolist() == [0.0, 1.0, 2.0]
    log.close()
    assert not rows.exists()
    whole = read_motion(path)
    np.testing.assert_array_equal(whole.positions, cut.positions)
    np.testing.assert_allclose(whole.tcp_speed, [0.0, 0.1, 0.2])
    assert whole.names == ("cube",)
    np.testing.assert_array_equal(whole.things[2], [[2.0, 2.0, 2.0]])


def test_an_arm_that_pushes_against_the_table_stops_protectively(arm: Ur5Arm) -> None:
    down = HOME_Q + 0.9 * np.eye(6)[1]
    arm.follow(Trajectory(np.array([3.0, 3.1]), np.array([down, down])))
    arm.advance(3.5)
    assert arm.measure().protective_stop
    assert np.abs(arm.positions - down).max() > 0.1
