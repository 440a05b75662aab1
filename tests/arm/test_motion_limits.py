"""No row, however it was made, brings a trajectory or the arm past a limit."""

from __future__ import annotations

import numpy as np
import pytest
from follower import EE_DELTA, SETTINGS, START, STEP_S, Bench, Follower
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arm.limits import PlaceLimits
from arm.port import JointMotion
from steer_runtime.errors import SteerError

LIMITS = SETTINGS.limits
WINDOW_S = 0.04
"""Over which an acceleration is measured: two of the trajectory's points."""
TIGHT = 1.001

number = st.one_of(
    st.floats(-1, 1),
    st.sampled_from([1.0, -1.0, 0.0, 1e-12, 1e3, -1e3, 1e30, -3e38, float("nan"), float("inf"), float("-inf")]),
)
wild = st.lists(number, min_size=7, max_size=7).map(lambda r: np.array(r, np.float32))
steady = st.tuples(st.lists(st.floats(-1, 1), min_size=7, max_size=7), st.integers(1, 12), st.booleans()).map(
    lambda t: [np.array(t[0], np.float32) * (-1.0 if t[2] and i % 2 else 1.0) for i in range(t[1])]
)
rows = st.lists(st.one_of(wild.map(lambda r: [r]), steady), min_size=1, max_size=6).map(
    lambda parts: [row for part in parts for row in part]
)


def _sampled(motion: JointMotion, start: np.ndarray) -> np.ndarray:
    """Positions [n, 6] of a trajectory every 2 ms, from where the arm was."""
    times = np.arange(0.0, motion.horizon_s + STEP_S / 2, STEP_S)
    points = np.concatenate([start[None], motion.positions])
    return np.stack([np.interp(times, np.r_[0.0, motion.times_s], column) for column in points.T], axis=1)


def assert_within_limits(track: np.ndarray, arm: Follower, tight: float = TIGHT, *, steady: bool = True) -> None:
    """Positions [n, 6], 2 ms apart: ranges, joint and TCP speeds, workspace; accelerations too where the arm's own speed
    scaling was steady."""
    assert np.isfinite(track).all()
    margin = LIMITS.joint_margin_rad
    assert (track >= np.array(LIMITS.joint_lowest_rad) + margin - 1e-9).all()
    assert (track <= np.array(LIMITS.joint_highest_rad) - margin + 1e-9).all()
    speed = np.diff(track, axis=0) / STEP_S
    assert (np.abs(speed) <= np.array(LIMITS.joint_speed_rad_s) * tight).all()
    steps = round(WINDOW_S / STEP_S)
    if steady and len(speed) > steps:
        change = np.abs(speed[steps:] - speed[:-steps]) / WINDOW_S
        assert (change <= np.array(LIMITS.joint_acceleration_rad_s2) * tight).all(), change.max()
    tcp = np.array([arm.kinematics.pose(joints).position for joints in track])
    assert np.linalg.norm(np.diff(tcp, axis=0), axis=1).max() / STEP_S <= LIMITS.tcp_speed_m_s * tight
    # The way between two allowed joints is a line for them and a shallow arc for the TCP.
    assert (tcp >= np.array(SETTINGS.workspace.lowest_m) - 1e-3).all()
    assert (tcp <= np.array(SETTINGS.workspace.highest_m) + 1e-3).all()


@pytest.mark.fault(18)
@pytest.mark.fault(21)
@pytest.mark.parametrize("kind", ["ee_delta", "joint_delta", "joint_abs"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    wanted=rows,
    pace=st.sampled_from([1.0, 1.0, 0.3, 0.0]),
    late=st.lists(st.sampled_from([0.0, 0.004, 0.008]), min_size=1),
)
def test_no_rows_bring_the_arm_or_a_trajectory_past_a_limit(
    kind: str, wanted: list[np.ndarray], pace: float, late: list[float]
) -> None:
    bench = Bench(kind)
    arm, core = bench.arm, bench.core
    starts: list[np.ndarray] = []
    keep = arm.send

    def send(motion: JointMotion) -> None:
        starts.append(arm.positions.copy())
        keep(motion)

    arm.send = send  # type: ignore[method-assign]
    for index, row in enumerate(wanted):
        if index == len(wanted) // 2:
            arm.pace = pace
        moved = row.astype(np.float64)
        if kind == "joint_abs":
            moved[:-1] += arm.positions  # absolute joints near and far from where the arm is
        if np.isfinite(moved).all():
            bench.row(moved, late[index % len(late)])
        else:
            with pytest.raises(SteerError, match="NaN or infinite"):
                bench.row(moved)
            bench.tick(2)
        if core.state().mode == "stopped":
            core.disarm(arm.now_s)
            arm.advance(0.4)
            if core.state().mode != "armed" and arm.pace == 1.0:
                core.arm(arm.now_s)
    arm.pace = 1.0
    bench.rest()
    assert_within_limits(np.array(arm.track), arm, steady=pace == 1.0)
    places = PlaceLimits(SETTINGS, arm.kinematics)
    for motion, start in zip(arm.sent, starts, strict=True):
        assert motion.horizon_s <= SETTINGS.motion.horizon_s
        assert_within_limits(_sampled(motion, start), arm)
        assert places.broken(motion.positions[-1]) == ""
    assert np.abs(arm.velocities).max() < 1e-6


def _drive(bench: Bench, row: list[float], count: int) -> None:
    for _ in range(count):
        bench.row(np.array(row))


def test_steady_rows_move_the_tcp_at_the_speed_they_ask_for() -> None:
    bench = Bench()
    before = bench.arm.kinematics.pose(bench.arm.positions).position
    _drive(bench, [0, 0.5, 0, 0, 0, 0, -1], 40)
    tcp = np.array([bench.arm.kinematics.pose(joints).position for joints in bench.arm.track[-250:]])
    # Half of 0.05 m, five times slower: 0.005 m in 0.05 s.
    assert np.linalg.norm(tcp[-1] - tcp[0]) / (249 * STEP_S) == pytest.approx(0.1, rel=0.03)
    bench.rest()
    after = bench.arm.kinematics.pose(bench.arm.positions).position
    assert after[1] - before[1] == pytest.approx(40 * 0.005, abs=0.012)
    assert np.abs(after - before)[[0, 2]].max() < 2e-3


@pytest.mark.parametrize(
    ("row", "axis"), [([1, 0, 0, 0, 0, 0, 0], 0), ([0, 1, 0, 0, 0, 0, 0], 1), ([0, 0, 1, 0, 0, 0, 0], 2)]
)
def test_an_ee_delta_moves_along_the_axis_of_base_link(row: list[float], axis: int) -> None:
    bench = Bench()
    before = bench.arm.kinematics.pose(bench.arm.positions)
    _drive(bench, row, 5)
    bench.rest()
    twist = before.twist_to(bench.arm.kinematics.pose(bench.arm.positions))
    assert int(np.argmax(np.abs(twist[:3]))) == axis
    assert twist[axis] > 0.03
    assert np.abs(np.delete(twist, axis)).max() < 2e-3


def test_rows_that_stop_coming_leave_the_arm_at_rest_within_the_horizon() -> None:
    bench = Bench()
    _drive(bench, [0, 1, 0, 0, 0, 0, -1], 10)
    assert np.abs(bench.arm.velocities).max() > 0.1
    bench.arm.advance(SETTINGS.motion.horizon_s)  # no tick any more: the bridge has died
    bench.arm.advance(STEP_S)
    assert np.abs(bench.arm.velocities).max() == 0.0


@pytest.mark.fault(19)
def test_a_hold_brakes_at_once_and_never_repeats_the_last_velocity() -> None:
    bench = Bench()
    _drive(bench, [0, 1, 0, 0, 0, 0, -1], 10)
    moving = np.abs(bench.arm.velocities).max()
    bench.core.hold(bench.arm.now_s)
    speeds = []
    for _ in range(40):
        bench.tick()
        speeds.append(np.abs(bench.arm.velocities).max())
    # The last hundredth of the speed fades out.
    assert speeds[round(SETTINGS.motion.horizon_s / SETTINGS.motion.tick_s)] < moving / 50
    assert speeds[-1] == 0.0
    assert all(later <= earlier + 1e-9 for earlier, later in zip([moving, *speeds], speeds, strict=False))


@pytest.mark.fault(29)
def test_half_the_speed_scaling_halves_the_motion_and_nothing_is_caught_up() -> None:
    whole, half = Bench(), Bench()
    half.arm.pace = 0.5
    for bench in (whole, half):
        _drive(bench, [0, 0.5, 0, 0, 0, 0, -1], 30)
        bench.arm.pace = 1.0
        bench.rest(60)

    def moved(bench: Bench) -> float:
        end = bench.arm.kinematics.pose(bench.arm.positions).position[1]
        return float(end - bench.arm.kinematics.pose(bench.arm.track[0]).position[1])

    assert moved(half) == pytest.approx(moved(whole) / 2, rel=0.15)


@pytest.mark.fault(29)
def test_at_scaling_zero_rows_do_not_wind_up() -> None:
    bench = Bench()
    _drive(bench, [0, 0.5, 0, 0, 0, 0, -1], 5)
    bench.arm.pace = 0.0
    _drive(bench, [0, 0.5, 0, 0, 0, 0, -1], 100)
    stood = bench.arm.kinematics.pose(bench.arm.positions).position
    bench.arm.pace = 1.0
    bench.rest(60)
    went = np.linalg.norm(bench.arm.kinematics.pose(bench.arm.positions).position - stood)
    assert went < 0.03, "only the braking that was under way is left"


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    ("row", "code"),
    [
        ([0, 0, -1, 0, 0, 0, 0], "limit_workspace"),
        ([1, 0, 0, 0, 0, 0, 0], "limit_singularity_slow"),
        ([0, 0, 1, 0, 0, 0, 0], "limit_singularity_slow"),
    ],
)
def test_rows_into_a_wall_are_scaled_then_stopped_with_a_code(row: list[float], code: str) -> None:
    bench = Bench()
    _drive(bench, row, 120)
    assert bench.counters().get(code, 0) > 0, bench.counters()
    assert np.abs(bench.arm.velocities).max() < 0.02
    assert_within_limits(np.array(bench.arm.track), bench.arm)
    assert bench.arm.kinematics.condition(bench.arm.positions) < LIMITS.condition_stop
    # And back out again.
    before = bench.arm.kinematics.pose(bench.arm.positions).position
    _drive(bench, [-v for v in row], 30)
    assert np.linalg.norm(bench.arm.kinematics.pose(bench.arm.positions).position - before) > 0.05


@pytest.mark.fault(30)
def test_a_joint_stops_before_its_range_ends() -> None:
    bench = Bench("joint_delta", start=np.array([*START[:5], 5.5]))
    _drive(bench, [0, 0, 0, 0, 0, 1, 0], 80)
    assert bench.counters()["limit_joint_range"] > 0
    assert bench.arm.positions[5] == pytest.approx(LIMITS.joint_highest_rad[5] - LIMITS.joint_margin_rad, abs=0.02)
    assert_within_limits(np.array(bench.arm.track), bench.arm)


@pytest.mark.fault(30)
@pytest.mark.parametrize(("sign", "code"), [(1, "limit_table"), (-1, "limit_workspace")])
def test_no_link_comes_near_another_or_the_table(sign: int, code: str) -> None:
    bench = Bench("joint_delta")
    _drive(bench, [0, 0, sign, 0, 0, 0, 0], 60)
    assert bench.counters().get(code, 0) > 0, bench.counters()
    links, table = bench.arm.kinematics.clearance(bench.arm.positions)
    assert min(links, table) >= LIMITS.clearance_m


@pytest.mark.fault(30)
def test_a_link_keeps_its_distance_from_the_others() -> None:
    bench = Bench("joint_delta", start=np.array([0.0, -2.2, 1.6, -1.0, -1.57, 0.0]))
    _drive(bench, [0, 0, 1, 0, 0, 0, 0], 50)  # the elbow folds the forearm onto the upper arm
    assert bench.counters().get("limit_self_collision", 0) > 0, bench.counters()
    links, table = bench.arm.kinematics.clearance(bench.arm.positions)
    assert min(links, table) >= LIMITS.clearance_m


@pytest.mark.parametrize("rotation", ["axis_angle", "rpy"])
def test_a_rotation_turns_the_tool_about_its_axis(rotation: str) -> None:
    from dataclasses import replace

    from arm.actions import ActionReader
    from arm.motion import MotionCore

    bench = Bench(armed=False)
    reader = ActionReader(replace(EE_DELTA, rotation=rotation), SETTINGS, 0.2)  # type: ignore[arg-type]
    bench.core = MotionCore(SETTINGS, reader, bench.arm)
    bench.core.arm(bench.arm.now_s)
    before = bench.arm.kinematics.pose(bench.arm.positions)
    _drive(bench, [0, 0, 0, 0, 0, 0.1, 0], 20)
    bench.rest()
    twist = before.twist_to(bench.arm.kinematics.pose(bench.arm.positions))
    assert twist[5] == pytest.approx(20 * 0.1 * 0.5 * 0.2, rel=0.1)
    assert np.abs(twist[:5]).max() < 3e-3
