"""What lets motion through, what stops it, and what it takes to go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from follower import SETTINGS, START, STEP_S, Bench

from arm.port import ArmState
from steer_runtime.errors import SteerError

FORWARD = np.array([0, 1, 0, 0, 0, 0, -1], np.float32)
OPEN, CLOSE = -1.0, 1.0


def _moving(bench: Bench) -> Bench:
    for _ in range(8):
        bench.row(FORWARD)
    assert np.abs(bench.arm.velocities).max() > 0.1
    return bench


def _told(bench: Bench, **changes: Any) -> None:
    """The arm tells its state with something changed."""
    read = bench.arm.read

    def changed() -> ArmState | None:
        state = read()
        return None if state is None else replace(state, **changes)

    bench.arm.read = changed  # type: ignore[method-assign]


def test_the_dry_run_shows_what_it_would_send_and_sends_nothing() -> None:
    bench = Bench(armed=False)
    for _ in range(20):
        bench.row(FORWARD)
    assert bench.core.state().mode == "dry_run"
    assert bench.shown
    assert not bench.arm.sent
    assert not bench.arm.grips
    np.testing.assert_array_equal(bench.arm.positions, START)


def test_the_dry_run_stays_near_an_arm_that_does_not_move() -> None:
    bench = Bench(armed=False)
    for _ in range(60):
        bench.row(FORWARD)
    pose = bench.arm.kinematics.pose
    for motion in bench.shown:
        away = pose(motion.positions[-1]).position - pose(START).position
        assert np.linalg.norm(away) < SETTINGS.motion.reanchor_m + SETTINGS.motion.lead_m


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda b: setattr(b.arm, "running", False), "program_stopped"),
        (lambda b: _told(b, velocities=np.full(6, 0.1)), "not_at_rest"),
        (lambda b: _told(b, tcp_position=np.zeros(3)), "model_mismatch"),
        (lambda b: _told(b, tcp_position=np.full(3, np.nan)), "model_mismatch"),
        (lambda b: _told(b, positions=np.full(6, np.nan)), "bad_state"),
        (lambda b: _told(b, stamp_s=0.0), "state_silent"),
        (lambda b: setattr(b.arm, "read", lambda: None), "no_state"),
        (lambda b: b.core.estop(b.arm.now_s), "estop"),
        (lambda b: setattr(b.arm, "positions", START + np.array([0, 0, -1.0, 0, 0, 0])), "workspace"),
    ],
)
def test_arming_is_refused_with_the_reason(spoil: Callable[[Bench], None], code: str) -> None:
    bench = Bench(armed=False)
    spoil(bench)
    with pytest.raises(SteerError) as refused:
        bench.core.arm(bench.arm.now_s)
    assert refused.value.code == code
    bench.tick(2)
    assert not bench.arm.sent


def test_an_arm_a_little_outside_the_workspace_is_armed_and_goes_inwards_only() -> None:
    bench = Bench(armed=False)
    places, pose = bench.core._places, bench.core.kinematics.pose

    def stands_outside_by(far_m: float) -> None:
        highest = places.box[1].copy()
        highest[1] = pose(START).position[1] - far_m
        places.box = places.box[0], highest

    stands_outside_by(SETTINGS.motion.model_error_m + 0.002)
    with pytest.raises(SteerError, match="stands where it may not"):
        bench.core.arm(bench.arm.now_s)
    stands_outside_by(0.004)
    bench.core.arm(bench.arm.now_s)
    for _ in range(10):
        bench.row(FORWARD)
    assert pose(bench.arm.positions).position[1] <= pose(START).position[1] + 1e-3
    assert bench.counters()["limit_workspace"] > 0
    for _ in range(20):
        bench.row(-FORWARD)
    assert pose(bench.arm.positions).position[1] < places.box[1][1]


@pytest.mark.fault(28)
def test_a_stopped_program_drops_everything_and_demands_arming_at_the_measured_state() -> None:
    bench = _moving(Bench())
    bench.arm.running = False
    bench.tick()
    sent = len(bench.arm.sent)
    for _ in range(10):
        bench.row(FORWARD)
    state = bench.core.state()
    assert (state.mode, state.code) == ("stopped", "program_stopped")
    assert len(bench.arm.sent) == sent
    assert state.counters["dropped_rows"] == 10
    bench.arm.running = True
    bench.arm.advance(0.5)  # what the controller box had left
    for _ in range(5):
        bench.row(FORWARD)
    assert len(bench.arm.sent) == sent
    bench.core.arm(bench.arm.now_s)
    here = bench.arm.positions.copy()
    np.testing.assert_allclose(bench.core.state().target, here)  # type: ignore[arg-type]
    bench.row(FORWARD)
    assert np.abs(bench.arm.sent[sent].positions - here).max() < 0.02


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda b: setattr(b.arm, "silent", True), "state_silent"),
        (lambda b: _told(b, positions=np.full(6, np.nan)), "bad_state"),
        (lambda b: setattr(b.arm, "stuck", True), "not_following"),
    ],
)
def test_an_arm_that_is_not_heard_or_does_not_follow_is_stopped(spoil: Callable[[Bench], None], code: str) -> None:
    bench = _moving(Bench())
    spoil(bench)
    for _ in range(80):
        if bench.core.state().mode == "stopped":
            break
        try:
            bench.row(FORWARD)
        except SteerError:
            bench.tick()
    assert (bench.core.state().mode, bench.core.state().code) == ("stopped", code)
    sent = len(bench.arm.sent)
    bench.tick(5)
    assert len(bench.arm.sent) == sent


def test_an_emergency_stop_brakes_within_the_horizon_and_holds_until_reset_and_arming() -> None:
    bench = _moving(Bench())
    bench.core.estop(bench.arm.now_s)
    bench.arm.advance(SETTINGS.motion.horizon_s + STEP_S)
    assert np.abs(bench.arm.velocities).max() == 0.0
    bench.core.reset_estop()
    assert bench.core.state().mode == "stopped"
    sent = len(bench.arm.sent)
    bench.row(FORWARD)
    assert len(bench.arm.sent) == sent
    bench.core.arm(bench.arm.now_s)
    assert bench.core.state().mode == "armed"


@pytest.mark.fault(28)
def test_with_an_old_state_nothing_new_is_sent_and_the_arm_rests() -> None:
    bench = _moving(Bench())
    bench.arm.silent = True
    bench.arm.advance(SETTINGS.motion.fresh_s)
    sent = len(bench.arm.sent)
    bench.tick(5)
    assert len(bench.arm.sent) == sent
    assert "old_state" in bench.core.state().limited_by
    assert bench.core.state().mode == "armed"
    bench.arm.advance(SETTINGS.motion.horizon_s)
    assert np.abs(bench.arm.velocities).max() == 0.0


@pytest.mark.fault(33)
def test_disarming_in_motion_brakes_within_the_horizon() -> None:
    bench = _moving(Bench())
    bench.core.disarm(bench.arm.now_s)
    bench.arm.advance(SETTINGS.motion.horizon_s + STEP_S)
    assert np.abs(bench.arm.velocities).max() == 0.0
    assert bench.core.state().mode == "dry_run"


@pytest.mark.fault(31)
@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("ee_delta", 50 * FORWARD),
        ("joint_delta", np.array([4, 0, 0, 0, 0, 0, 0], np.float32)),
        ("joint_abs", np.array([*(START + 0.06), 0])),
    ],
)
def test_a_first_command_far_from_the_measured_state_is_refused_and_disarms(kind: str, row: np.ndarray) -> None:
    bench = Bench(kind)
    bench.row(row)
    state = bench.core.state()
    assert (state.mode, state.code) == ("stopped", "first_far")
    assert not bench.arm.sent
    np.testing.assert_array_equal(bench.arm.positions, START)


def test_absolute_joints_are_followed_to_where_they_name() -> None:
    bench = Bench("joint_abs")
    goal = START + np.array([0.04, -0.04, 0.04, 0.04, -0.04, 0.04])
    for _ in range(30):
        bench.row(np.array([*goal, 0]))
    np.testing.assert_allclose(bench.arm.positions, goal, atol=3e-4)


@pytest.mark.fault(21)
def test_absolute_joints_far_off_are_neared_at_the_allowed_speed() -> None:
    bench = Bench("joint_abs")
    bench.row(np.array([*START, 0]))
    far = START + np.array([2.0, 0, 0, 0, 0, 0])
    for _ in range(20):
        bench.row(np.array([*far, 0]))
    turned = bench.arm.positions[0] - START[0]
    assert 0.1 < turned < 1.0 * max(SETTINGS.limits.joint_speed_rad_s)
    # Nothing winds up: once the policy names where the arm is, it comes to rest there.
    here = bench.arm.positions.copy()
    for _ in range(20):
        bench.row(np.array([*here, 0]))
    assert abs(bench.arm.positions[0] - here[0]) < 1e-3


def test_actions_are_added_to_the_measured_pose_once_the_arm_is_elsewhere() -> None:
    bench = _moving(Bench())
    bench.rest()
    bench.arm._line = None  # pushed: the arm is three centimetres off and its controller holds it there
    bench.arm.positions = bench.arm.positions + np.array([0.06, 0, 0, 0, 0, 0])
    bench.core.accept(FORWARD, bench.arm.now_s)
    assert "reanchored" in bench.core.state().limited_by
    np.testing.assert_allclose(bench.core.state().target, bench.arm.positions, atol=0.05)  # type: ignore[arg-type]


def test_the_gripper_follows_the_sign_the_checkpoint_declares() -> None:
    bench = Bench()
    bench.row(np.array([0, 0, 0, 0, 0, 0, OPEN]))
    bench.row(np.array([0, 0, 0, 0, 0, 0, OPEN]))
    bench.row(np.array([0, 0, 0, 0, 0, 0, CLOSE]))
    bench.row(np.array([0, 0, 0, 0, 0, 0, 7.0]))
    assert bench.arm.grips == [1.0, 0.0], "told once for each change, and cut at closed"


@pytest.mark.fault(18)
@pytest.mark.parametrize("row", [np.full(7, np.nan), np.full(7, np.inf), np.ones(6), np.ones((1, 7))])
def test_a_row_that_is_none_is_dropped_and_the_arm_brakes(row: np.ndarray) -> None:
    bench = _moving(Bench())
    with pytest.raises(SteerError) as refused:
        bench.core.accept(row, bench.arm.now_s)
    assert refused.value.code == "bad_row"
    bench.tick(40)
    assert np.abs(bench.arm.velocities).max() < 1e-6
    assert bench.core.state().mode == "armed"
    assert bench.counters()["bad_row"] == 1


def test_a_clock_that_jumped_stops_the_arm() -> None:
    bench = _moving(Bench())
    bench.core.stop("clock_jump", "the wall clock jumped", bench.arm.now_s)
    assert (bench.core.state().mode, bench.core.state().code) == ("stopped", "clock_jump")


def test_a_tick_that_fails_stops_the_arm_and_says_so() -> None:
    import threading

    from arm.ticker import Ticker

    bench = Bench()
    told = threading.Event()

    def broken() -> None:
        raise RuntimeError("the state cannot be read")

    bench.arm.read = broken  # type: ignore[assignment, method-assign]
    ticker = Ticker(bench.core, bench.arm, lambda error: told.set())
    assert told.wait(20.0)
    ticker.close()
    assert (bench.core.state().mode, bench.core.state().code) == ("stopped", "internal_error")
    assert bench.arm.halts >= 1
