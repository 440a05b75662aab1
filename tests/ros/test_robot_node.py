"""The robot's side: nothing moves but by a checked row of the one policy that holds the lease."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from driver import NodeProcess, PolicyDriver, PolicyProcess

from ros_nodes.client import SteeringClient
from ros_nodes.convert import ns_from_time
from ros_nodes.recorder import Recorder

FORWARD = np.array([[1, 0, 0, 0, 0, 0, 1]], np.float32)


def robot(domain: int, **parameters: Any) -> NodeProcess:
    return NodeProcess([str(Path(__file__).parent / "point_robot.py")], parameters, domain)


def x(driver: PolicyDriver) -> float:
    return float(driver.frames[-1][1].pose.position.x)


def step_to(driver: PolicyDriver, action: np.ndarray, **chunk: Any) -> float:
    """Act on the newest frame and return x of the frame after it."""
    before = driver.frames[-1][1].header.stamp
    driver.act(action, **chunk)
    assert driver.moved_on(before, 20.0), "the next frame did not come"
    return x(driver)


@pytest.fixture(scope="module")
def lockstep(other_domain: int) -> Iterator[PolicyDriver]:
    """A lockstep robot that gives a policy 1.5 s to answer and 1 s to come back."""
    parameters = {"mode": "lockstep", "action_timeout_s": 1.5, "owner_timeout_s": 1.0}
    with PolicyDriver(other_domain) as driver, robot(other_domain, **parameters):
        yield driver


@pytest.fixture
def policy_side(lockstep: PolicyDriver) -> PolicyDriver:
    """The lockstep robot with a fresh frame in an episode that has steps left, owned by instance "a"."""
    lockstep.description()
    lockstep.wait(lambda: lockstep.frames, what="a frame")
    # Another instance may hold the lease, and an episode may be near its end: act until neither is so.
    while True:
        before = lockstep.frames[-1][1].header.stamp
        lockstep.act(0 * FORWARD)
        moved = lockstep.moved_on(before, 2.5)
        # Its status follows a frame.
        lockstep.wait(lambda: lockstep.status().header.stamp == lockstep.frames[-1][1].header.stamp, what="a status")
        if moved and lockstep.status().step < 30:
            return lockstep


def test_robot_describes_itself_and_its_pictures_match(policy_side: PolicyDriver) -> None:
    told = policy_side.description()
    assert (told.robot, told.lockstep) == ("point", True)
    assert [(c.name, c.width, c.height) for c in told.cameras] == [("agentview", 64, 64), ("wrist", 64, 64)]
    assert policy_side.images[-1][1].header.stamp == policy_side.frames[-1][1].header.stamp


def test_each_answer_moves_it_exactly_one_step(policy_side: PolicyDriver) -> None:
    start, step = x(policy_side), policy_side.status().step
    assert step_to(policy_side, FORWARD) == pytest.approx(start + 0.05)
    assert step_to(policy_side, FORWARD) == pytest.approx(start + 0.10)
    policy_side.wait(lambda: policy_side.status().step == step + 2)


def test_a_chunk_is_executed_whole_and_shows_one_frame(policy_side: PolicyDriver) -> None:
    start, step, frames = x(policy_side), policy_side.status().step, len(policy_side.frames)
    assert step_to(policy_side, np.repeat(FORWARD, 4, axis=0), inference_id=9) == pytest.approx(start + 0.20)
    policy_side.wait(lambda: policy_side.status().step == step + 4)
    assert len(policy_side.frames) == frames + 1
    last = policy_side.status()
    assert (last.held, last.inference_id, last.row, last.delay_steps) == ("", 9, 3, 0)


def refused_as(driver: PolicyDriver, code: str, action: np.ndarray, **chunk: Any) -> None:
    """The chunk is counted under `code` and the robot has not moved by it."""
    start, before = x(driver), driver.counters().get(code, 0)
    driver.act(action, **chunk)
    # The status comes with the next step: the hold at the latest.
    driver.wait(lambda: driver.counters().get(code, 0) > before, 5.0, code)
    assert x(driver) == pytest.approx(start)


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    ("code", "action", "chunk"),
    [
        ("not_finite", FORWARD * math.nan, {}),
        ("bad_shape", np.ones((1, 6), np.float32), {}),
        ("bad_rate", FORWARD, {"rate_hz": 50.0}),
        ("other_session", FORWARD, {"session_id": "elsewhere"}),
        ("late_chunk", FORWARD, {"stamp_ns": 1_000_000_000}),
        ("second_policy", FORWARD, {"instance": "b"}),
    ],
)
def test_chunk_that_must_not_move_it_is_refused_and_counted(
    policy_side: PolicyDriver, code: str, action: np.ndarray, chunk: dict[str, Any]
) -> None:
    refused_as(policy_side, code, action, **chunk)


@pytest.mark.fault(19)
def test_without_an_answer_it_holds_with_its_gripper_and_goes_on_later(policy_side: PolicyDriver) -> None:
    start = step_to(policy_side, FORWARD)
    policy_side.wait(lambda: policy_side.status().step > 0)
    held = policy_side.status().hold_steps
    policy_side.wait(lambda: policy_side.status().hold_steps > held, 5.0, "a hold")
    assert policy_side.status().held == "no answer"
    assert x(policy_side) == pytest.approx(start)
    assert step_to(policy_side, FORWARD) == pytest.approx(start + 0.05)


def test_other_policy_may_take_over_once_the_first_is_silent(policy_side: PolicyDriver) -> None:
    start = step_to(policy_side, FORWARD, instance="a")
    policy_side.wait(lambda: time.monotonic() - policy_side.frames[-1][0] > 1.1, 5.0, "the end of the lease")
    assert step_to(policy_side, FORWARD, instance="b") == pytest.approx(start + 0.05)


@pytest.mark.fault(19)
def test_free_running_robot_executes_rows_on_the_clock_then_holds(third_domain: int) -> None:
    with PolicyDriver(third_domain) as driver, robot(third_domain, mode="free", rate_hz=10.0):
        driver.description()
        driver.wait(lambda: driver.status().hold_steps >= 3, what="holds before any policy")
        assert x(driver) == 0.0
        assert not driver.description().lockstep
        held = driver.status().hold_steps
        driver.act(np.repeat(FORWARD, 4, axis=0))
        driver.wait(lambda: x(driver) == pytest.approx(0.2), what="four steps")
        driver.wait(lambda: driver.status().hold_steps >= held + 3, what="holds after the chunk")
        assert x(driver) == pytest.approx(0.2)
        refused_as(driver, "stale_chunk", FORWARD, stamp_ns=time.time_ns() - 5_000_000_000)


def test_free_running_robot_asks_every_few_steps_and_executes_each_row_at_its_own(third_domain: int) -> None:
    with PolicyDriver(third_domain) as driver, robot(third_domain, mode="free", rate_hz=5.0, replan_steps=3):
        driver.description()
        driver.wait(lambda: driver.frames, what="a frame")
        ramp = np.zeros((8, 7), np.float32)
        ramp[:, 0] = 0.01 * np.arange(8)
        driver.act(ramp)
        asked_at = [driver.status().step]
        while len(asked_at) < 3:
            before = driver.frames[-1][1].header.stamp
            assert driver.moved_on(before, 10.0), "the next frame did not come"
            stamp = driver.frames[-1][1].header.stamp
            driver.wait(lambda stamp=stamp: driver.status().header.stamp == stamp, what="its status")  # type: ignore[misc]
            asked_at.append(driver.status().step)
            driver.act(ramp)
        # The next frame is shown three steps after the last one, however many actions still wait.
        assert asked_at[2] - asked_at[1] == 3
        refused_as_late = driver.counters().get("late_chunk", 0)
        driver.act(ramp, stamp_ns=1_000_000_000 + time.time_ns() - 10**9 - 1)
        driver.wait(lambda: driver.counters().get("late_chunk", 0) > refused_as_late, what="a refusal")


def test_status_of_a_free_running_robot_names_the_chunk_of_every_step(third_domain: int) -> None:
    with PolicyDriver(third_domain) as driver, robot(third_domain, mode="free", rate_hz=10.0, replan_steps=3):
        driver.description()
        # Early in an episode of 40 steps, with a frame that will not be shown again for ten.
        driver.wait(lambda: driver.frames and 2 <= driver.status().step < 15, what="steps before any chunk")
        assert driver.status().held == "nothing yet"
        assert driver.moved_on(driver.frames[-1][1].header.stamp, 10.0), "the next frame did not come"
        ramp = np.zeros((6, 7), np.float32)
        ramp[:, 0] = 0.01 * np.arange(6)
        stamp = driver.frames[-1][1].header.stamp
        shown = driver.status().step
        # Late on purpose: rows whose step is over must be trimmed, and counted. (The status of the frame comes after it.)
        driver.wait(lambda: driver.status().step >= shown + 3, what="steps after the frame")
        driver.act(ramp, stamp_ns=ns_from_time(stamp), inference_id=41, steering_epoch=7, steering_sequence=8)
        first = driver.wait(
            lambda: next((m for _, m in driver.episodes if m.inference_id == 41), None), what="a step of the chunk"
        )
        driver.wait(lambda: driver.status().held == "used up", what="the end of the chunk")
        mine = [m for _, m in driver.episodes if m.inference_id == 41]
        assert [m.row for m in mine] == list(range(first.row, 6))
        assert first.delay_steps == first.row == first.trimmed_rows >= 2
        assert {(m.steering_epoch, m.steering_sequence, m.delay_steps) for m in mine} == {(7, 8, first.delay_steps)}
        assert {(m.inference_id, m.row) for _, m in driver.episodes if m.held} == {(0, 0)}
        moved = [b.step - a.step for a, b in pairwise(mine)]
        assert moved == [1] * (len(mine) - 1)
        driver.wait(lambda: driver.counters().get("queue_trimmed_rows") == first.row, what="the count of trimmed rows")


def test_an_accepted_command_flushes_what_waits(third_domain: int) -> None:
    from steer_msgs.msg import SteeringVerdict

    from ros_nodes.convert import verdict_to_msg
    from ros_nodes.qos import VERDICT
    from steer_runtime.steering.command import Verdict
    from steer_runtime.types import SteeringStamp

    parameters = {"mode": "free", "rate_hz": 5.0, "replan_steps": 8, "on_steering": "flush"}
    with PolicyDriver(third_domain) as driver, robot(third_domain, **parameters):
        verdicts = driver.node.create_publisher(SteeringVerdict, "verdict", VERDICT)
        driver.description()
        driver.wait(lambda: driver.frames and verdicts.get_subscription_count(), what="a frame and its ear")
        driver.act(np.repeat(FORWARD, 30, axis=0))
        driver.wait(
            lambda: driver.status().step > 0 and driver.status().hold_steps < driver.status().step, what="a step"
        )
        frames, held = len(driver.frames), driver.status().hold_steps
        accepted = Verdict(True, "accepted", "", "a", 1, 1, SteeringStamp(0, 2), 1.0)
        verdicts.publish(verdict_to_msg(accepted, time.time_ns()))
        driver.wait(lambda: driver.status().hold_steps > held, what="a hold")
        assert driver.status().held == "flushed"
        driver.wait(lambda: len(driver.frames) > frames, what="the frame that the next chunk is made from")


def test_policy_node_runs_a_lockstep_episode_one_inference_a_step(
    policy_yaml: Path, direction_store: Path, third_domain: int
) -> None:
    with (
        PolicyDriver(third_domain) as watcher,
        Recorder(domain_id=third_domain) as recorder,
        SteeringClient(domain_id=third_domain) as client,
        PolicyProcess(policy_yaml, direction_store, domain=third_domain),
        robot(third_domain, mode="lockstep", episodes=1) as body,
    ):
        assert body.process.wait(240.0) == 0, body.log()
        assert "after 40 steps; 0 were held" in body.log()
        assert watcher.status().done
        state = client.wait_state(lambda s: s.counters.get("inferences", 0) >= 40)
        assert state.counters["inferences"] == 40
        assert len({ns_from_time(m.header.stamp) for _, m in watcher.frames}) == 40
        assert recorder.wait(lambda: recorder.end is not None, 10.0)
        assert (len(recorder.actions), recorder.commanded, recorder.end[1]) == (40, 40, 40)
        # Its cameras are subscribed to once the robot has described itself: it may miss the first frame.
        assert all(action.observation_ns in recorder.observations for action in recorder.actions[1:])
        told = [recorder.observations[action.observation_ns].gripper_command for action in recorder.actions[1:]]
        assert told == [float(chunk[-1, 6]) for chunk in recorder.chunks[:-1]]
