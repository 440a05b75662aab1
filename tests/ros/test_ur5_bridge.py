"""The bridge between a policy and a UR driver on the real graph, against the stand-in: what moves it, and what stops it."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import rclpy
from bridge import FORWARD, BridgeClient, BridgeProcess
from lifecycle_msgs.msg import Transition
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.signals import SignalHandlerOptions
from standin import START_S, StandinProcess, UrClient

from arm.port import JOINT_NAMES
from arm.settings import load_settings
from ros_nodes.convert import ns_from_time
from ros_nodes.ur5_bridge_node import Ur5BridgeNode
from steer_runtime.types import LIBERO_ACTION_SPACE

SUCCESS = TransitionCallbackReturn.SUCCESS
SETTINGS = load_settings()
HORIZON_S = SETTINGS.motion.horizon_s
GRACE_S = 0.15
"""Between a motion's end and its being seen: the last message on its way, joint states every 8 ms, a busy machine."""
REST_RAD_S = 0.01


@pytest.fixture(scope="module")
def standin(third_domain: int) -> Iterator[StandinProcess]:
    with StandinProcess(third_domain) as process:
        yield process


@pytest.fixture(scope="module")
def bridge_process(third_domain: int) -> Iterator[BridgeProcess]:
    with BridgeProcess(third_domain) as process:
        yield process


@pytest.fixture(scope="module")
def sides(third_domain: int) -> Iterator[tuple[BridgeClient, UrClient]]:
    with BridgeClient(third_domain) as client, UrClient(third_domain) as ur:
        yield client, ur


@pytest.fixture
def ur(standin: StandinProcess, sides: tuple[BridgeClient, UrClient]) -> UrClient:
    """An arm at rest whose program runs."""
    _, ur = sides
    ur.wait_up()
    ur.recover()
    return ur


@pytest.fixture
def bridge(bridge_process: BridgeProcess, ur: UrClient, sides: tuple[BridgeClient, UrClient]) -> BridgeClient:
    """An active bridge in its dry run, with fresh frames."""
    client, _ = sides
    client.filming = {"agentview", "wrist"}
    client.wait_acting()
    client.reset_estop()
    client.wait_state(estop=False)
    assert client.arm(on=False).success
    client.wait_state(mode="dry_run")
    home(ur)
    client.wait(lambda: time.monotonic() - client.frames[-1][0] < 0.5, what="fresh frames")
    return client


def home(ur: UrClient) -> None:
    """Back to where the stand-in began."""
    start = np.array([0.0, -np.pi / 2, np.pi / 2, -np.pi / 2, -np.pi / 2, 0.0])
    if np.abs(ur.positions - start).max() > 1e-2:
        ur.follow([2.0, 2.1], np.array([start, start]))
        ur.wait(lambda: np.abs(ur.positions - start).max() < 1e-2, what="home")
    ur.wait_rest()


def moving(bridge: BridgeClient, ur: UrClient, seconds: float = 4.0) -> None:
    """Armed, and under way for a while. A machine that is too busy for the driver's messages stops it: then once more."""
    deadline = time.monotonic() + 120.0
    while time.monotonic() < deadline:
        bridge.must_arm()
        assert ur.call("/ur5_standin/reset_peaks").success
        bridge.move(seconds=seconds)
        bridge.wait(
            lambda: np.abs(ur.velocities).max() > 0.1 or bridge.state()["mode"] != "armed", 60.0, "motion or a stop"
        )
        if bridge.state()["mode"] == "armed":
            return
        assert_still_armed(bridge.state())
    raise AssertionError("the arm was never under way: the machine is too busy")


def executed(bridge: BridgeClient) -> int:
    """Rows that the bridge has taken and not dropped."""
    counters = bridge.state()["counters"]
    return int(counters.get("rows", 0) - counters.get("dropped_rows", 0))


def assert_still_armed(state: dict[str, Any]) -> None:
    """Unless the machine was too busy for the driver's messages, which stops the arm as it should."""
    assert state["mode"] == "armed" or state["code"] in ("state_silent", "not_following"), state


def wait_over(bridge: BridgeClient) -> None:
    """Until the chunk is: used up, or stale where a busy machine has run its steps late."""
    bridge.wait(lambda: bridge.status().held in ("used up", "stale"), what="the end of the chunk")


def rest_after(ur: UrClient, since_s: float) -> float:
    """Seconds from a moment of the steady clock to the last joint state in which the arm still moved, by its own stamps."""
    ur.wait(lambda: ur.joints[-1][0] > since_s + 1.0, what="a second of joint states")
    since_ns = time.time_ns() - round((time.monotonic() - since_s) * 1e9)
    stamped = ((ns_from_time(m.header.stamp), np.abs(m.velocity).max()) for _, m in ur.joints)
    moved = [stamp_ns for stamp_ns, speed in stamped if stamp_ns >= since_ns and speed > REST_RAD_S]
    assert np.abs(ur.velocities).max() < REST_RAD_S
    return max(moved, default=since_ns) / 1e9 - since_ns / 1e9


def assert_limits_kept(ur: UrClient) -> None:
    """By the stand-in's own account of its joints and TCP."""
    peaks = ur.peaks()
    assert (peaks[:6] <= np.array(SETTINGS.limits.joint_speed_rad_s)).all(), peaks
    assert peaks[12] <= SETTINGS.limits.tcp_speed_m_s, peaks


def test_it_describes_the_arm_as_the_checkpoint_declares(bridge: BridgeClient) -> None:
    told = bridge.description()
    assert (told.robot, told.lockstep, told.space) == ("ur5", False, LIBERO_ACTION_SPACE)
    assert told.joint_names[:6] == JOINT_NAMES
    assert [(c.name, c.width, c.height) for c in told.cameras] == [("agentview", 32, 32), ("wrist", 32, 32)]


def test_frames_are_whole_of_one_stamp_and_in_base_link(bridge: BridgeClient, ur: UrClient) -> None:
    count = len(bridge.frames)
    bridge.wait(lambda: len(bridge.frames) > count + 3 and bridge.images, what="frames")
    shown = {ns_from_time(m.header.stamp) for _, m in bridge.images}
    pose = bridge.frames[-2][1]
    assert ns_from_time(pose.header.stamp) in shown
    assert pose.header.frame_id == "base_link"
    # The driver tells its TCP in the controller's `base`, which is turned by 180 degrees.
    driver = ur.poses[-1][1].pose.position
    assert (pose.pose.position.x, pose.pose.position.y) == pytest.approx((-driver.x, -driver.y), abs=1e-3)


def test_in_the_dry_run_actions_are_planned_and_never_sent(bridge: BridgeClient, ur: UrClient) -> None:
    planned, sent, before = len(bridge.planned), len(bridge.sent), ur.positions
    bridge.move(seconds=1.0)
    bridge.wait(lambda: len(bridge.planned) > planned + 10, what="plans")
    wait_over(bridge)
    assert len(bridge.sent) == sent
    np.testing.assert_allclose(ur.positions, before, atol=1e-3)


def test_armed_it_moves_as_told_within_every_limit(bridge: BridgeClient, ur: UrClient) -> None:
    begin, rows = bridge.frames[-1][1].pose.position, bridge.state()["counters"].get("rows", 0)
    moving(bridge, ur, seconds=1.5)
    wait_over(bridge)
    ur.wait_rest()
    count, told = len(bridge.frames), len(bridge.told)
    bridge.wait(lambda: len(bridge.frames) > count + 2 and len(bridge.told) > told + 1, what="a frame and a state")
    end, state = bridge.frames[-1][1].pose.position, bridge.state()
    # A row is a hundredth of a metre to the left; where messages came late the arm was slower.
    asked_m = 0.01 * (state["counters"]["rows"] - rows)
    assert 0.03 < end.y - begin.y < asked_m + 0.02
    assert (end.x, end.z) == pytest.approx((begin.x, begin.z), abs=0.01)
    assert_limits_kept(ur)
    assert_still_armed(state)


@pytest.mark.fault(28)
def test_a_protective_stop_drops_what_waits_and_demands_arming(bridge: BridgeClient, ur: UrClient) -> None:
    moving(bridge, ur)
    assert ur.call("/ur5_standin/protective_stop").success
    bridge.wait_state(mode="stopped", code="program_stopped")
    sent = len(bridge.sent)
    assert not bridge.arm().success
    ur.recover()
    bridge.move(seconds=1.0)
    bridge.wait(lambda: bridge.state()["counters"].get("dropped_rows", 0) > 5, what="dropped rows")
    # A message that was on its way may still come, none that was made after the stop.
    assert len(bridge.sent) <= sent + 2
    assert np.abs(ur.velocities).max() < REST_RAD_S
    bridge.must_arm()
    bridge.move(seconds=1.0)
    ur.wait_moving(0.05)


@pytest.mark.fault(29)
def test_a_speed_slider_shrinks_the_steps_and_nothing_is_caught_up(bridge: BridgeClient, ur: UrClient) -> None:
    ur.slide(30.0)
    ur.wait(lambda: ur.scaling[-1][1].data < 31.0, what="the slider")
    before, begun = bridge.frames[-1][1].pose.position.y, executed(bridge)
    moving(bridge, ur, seconds=1.5)
    wait_over(bridge)
    ur.slide(100.0)
    ur.wait_rest()
    count = len(bridge.frames)
    bridge.wait(lambda: len(bridge.frames) > count + 2, what="a frame")
    went = bridge.frames[-1][1].pose.position.y - before
    told = len(bridge.told)
    bridge.wait(lambda: len(bridge.told) > told + 1, what="a state")
    assert 0.02 < went < 0.5 * 0.01 * (executed(bridge) - begun), "about a third of a hundredth of a metre a row"
    assert_limits_kept(ur)


@pytest.mark.fault(31)
def test_a_first_action_that_leads_far_disarms(bridge: BridgeClient, ur: UrClient) -> None:
    bridge.must_arm()
    before = ur.positions
    bridge.move(40 * FORWARD, seconds=0.5)
    bridge.wait_state(mode="stopped", code="first_far")
    np.testing.assert_allclose(ur.positions, before, atol=1e-3)


@pytest.mark.fault(28)
def test_actions_from_before_the_arming_move_nothing(bridge: BridgeClient, ur: UrClient) -> None:
    bridge.move(seconds=3.0)
    bridge.wait(lambda: not bridge.status().held, what="its rows in the dry run")
    before = ur.positions
    bridge.must_arm()
    steps = bridge.status().step
    bridge.wait(lambda: bridge.status().step > steps + 5, what="control steps")
    assert bridge.status().held == "nothing yet"
    np.testing.assert_allclose(ur.positions, before, atol=1e-3)


@pytest.mark.fault(15)
def test_the_emergency_stop_rests_the_arm_within_the_horizon_and_only_its_service_lets_go(
    bridge: BridgeClient, ur: UrClient
) -> None:
    moving(bridge, ur)
    pressed = time.monotonic()
    bridge.press()
    bridge.wait_state(mode="stopped", code="estop")
    assert rest_after(ur, pressed) < HORIZON_S + GRACE_S
    assert not bridge.arm().success
    bridge.reset_estop()
    bridge.wait_state(estop=False, mode="stopped")
    bridge.must_arm()


@pytest.mark.fault(33)
def test_deactivated_in_motion_the_arm_rests_and_the_arming_is_gone(bridge: BridgeClient, ur: UrClient) -> None:
    moving(bridge, ur)
    asked = time.monotonic()
    bridge.change(Transition.TRANSITION_DEACTIVATE)
    assert rest_after(ur, asked) < HORIZON_S + GRACE_S
    assert bridge.wait_state(lifecycle="inactive")["mode"] == "dry_run"
    bridge.change(Transition.TRANSITION_ACTIVATE)
    count = len(bridge.frames)
    bridge.wait(lambda: len(bridge.frames) > count + 2, what="frames")
    assert bridge.state()["mode"] == "dry_run"


@pytest.mark.fault(34)
def test_a_thousand_activations_leave_no_thread_topic_or_timer_behind(other_domain: int) -> None:
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=other_domain, signal_handler_options=SignalHandlerOptions.NO)
    node = Ur5BridgeNode(context=context, parameter_overrides=[Parameter("autostart", value=False)])

    def kept() -> tuple[int, ...]:
        gc.collect()
        topics = (node.subscriptions, node.publishers, node.timers, node.services)
        return threading.active_count(), *(len(list(kind)) for kind in topics)

    def cycle(count: int) -> None:
        for _ in range(count):
            assert node.trigger_activate() == SUCCESS
            assert node.trigger_deactivate() == SUCCESS

    try:
        assert node.trigger_configure() == SUCCESS
        cycle(5)
        before = kept()
        cycle(995)
        assert kept() == before
        for _ in range(20):
            assert node.trigger_cleanup() == SUCCESS
            assert node.trigger_configure() == SUCCESS
        assert kept() == before
    finally:
        node.close()
        node.destroy_node()
        context.try_shutdown()


@pytest.mark.fault(19)
def test_when_actions_end_the_arm_comes_to_rest(bridge: BridgeClient, ur: UrClient) -> None:
    moving(bridge, ur, seconds=1.0)
    wait_over(bridge)
    assert rest_after(ur, time.monotonic()) < HORIZON_S + GRACE_S
    assert_still_armed(bridge.state())


@pytest.mark.fault(24)
def test_a_camera_that_stalls_ends_the_frames_until_it_is_back(bridge: BridgeClient) -> None:
    bridge.filming = {"agentview"}
    bridge.wait(lambda: "wrist" in bridge.state()["waiting_for"], what="the stall to be told")
    count, steps = len(bridge.images), bridge.status().step
    bridge.wait(lambda: bridge.status().step > steps + 5, what="control steps")
    assert len(bridge.images) <= count + 1
    bridge.filming = {"agentview", "wrist"}
    bridge.wait(lambda: len(bridge.images) > count + 3, what="frames")


@pytest.mark.fault(37)
def test_a_second_bridge_does_not_arm_beside_an_armed_one(bridge: BridgeClient, third_domain: int) -> None:
    from std_srvs.srv import SetBool

    bridge.must_arm()
    first = bridge.wait_state(mode="armed")["instance"]
    with BridgeProcess(third_domain, name="ur5_bridge_two"):
        bridge.wait(
            lambda: any('"lifecycle": "active"' in m.data and first not in m.data for _, m in bridge.told[-4:]),
            START_S,
            "the second bridge",
        )

        def refused() -> bool:
            # A busy machine may have stopped the first one meanwhile, and then the second may arm.
            bridge.must_arm()
            answer = bridge.ask(SetBool, "ur5_bridge_two/arm", SetBool.Request(data=True))
            if answer.success:
                bridge.ask(SetBool, "ur5_bridge_two/arm", SetBool.Request(data=False))
            return bool(answer.message.startswith("second_bridge"))

        bridge.wait(refused, what="the refusal")


@pytest.mark.fault(33)
def test_sigterm_in_motion_rests_the_arm_and_ends_with_0(
    ur: UrClient, sides: tuple[BridgeClient, UrClient], third_domain: int, bridge_process: BridgeProcess
) -> None:
    client, _ = sides
    client.arm(on=False)
    _stop_first(bridge_process)
    home(ur)
    with BridgeProcess(third_domain) as process:
        _fresh(client)
        moving(client, ur)
        process.process.terminate()
        ended = time.monotonic()
        assert process.process.wait(10.0) == 0, process.log()
        took_s = time.monotonic() - ended
        assert rest_after(ur, ended) < HORIZON_S + GRACE_S
        assert took_s < 2.0 + GRACE_S
    assert_limits_kept(ur)


@pytest.mark.fault(37)
def test_an_armed_arm_does_not_move_for_the_policy_that_comes_after(
    ur: UrClient, sides: tuple[BridgeClient, UrClient], third_domain: int, bridge_process: BridgeProcess
) -> None:
    client, _ = sides
    _stop_first(bridge_process)
    home(ur)
    with BridgeProcess(third_domain, owner_timeout_s=0.3):
        _fresh(client)
        moving(client, ur, seconds=1.0)
        wait_over(client)
        ur.wait_rest()
        client.must_arm()
        sent = client.state()["counters"]["sent"]
        client.move(instance="its successor")
        state = client.wait_state(mode="stopped", code="policy_changed")
        assert state["counters"]["sent"] <= sent + 1
        # Armed for this one, it moves.
        client.must_arm()
        client.move(instance="its successor")
        client.wait(lambda: client.state()["counters"]["sent"] > sent + 3, what="motion")
        assert client.arm(on=False).success


@pytest.mark.fault(33)
def test_kill_9_in_motion_rests_the_arm_within_the_horizon(
    ur: UrClient, sides: tuple[BridgeClient, UrClient], third_domain: int, bridge_process: BridgeProcess
) -> None:
    client, _ = sides
    _stop_first(bridge_process)
    home(ur)
    with BridgeProcess(third_domain) as process:
        _fresh(client)
        moving(client, ur)
        ur.wait_moving(0.25)
        killed = time.monotonic()
        process.kill()
        rest_s = rest_after(ur, killed)
        print(f"at rest {rest_s:.3f} s after kill -9; horizon {HORIZON_S} s")
        assert rest_s < HORIZON_S + GRACE_S
    assert_limits_kept(ur)


@pytest.mark.fault(35)
@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"motion_scale": 1.0}, "set motion_scale to 0.25 or less"),
        ({"action_frame": "world"}, "this arm knows"),
        ({"arm_settings": "nowhere"}, "cannot be read"),
        ({"gripper": "action"}, "control_msgs is not installed"),
    ],
)
def test_what_does_not_fit_ends_the_process_before_motion(
    parameters: dict[str, object], says: str, other_domain: int
) -> None:
    with BridgeProcess(other_domain, **parameters) as process:
        assert process.process.wait(120.0) == 1
        assert says in process.log()


@pytest.mark.fault(28)
def test_a_driver_that_dies_stops_the_bridge(
    ur: UrClient,
    standin: StandinProcess,
    sides: tuple[BridgeClient, UrClient],
    third_domain: int,
    bridge_process: BridgeProcess,
) -> None:
    client, _ = sides
    _stop_first(bridge_process)
    home(ur)
    with BridgeProcess(third_domain):
        _fresh(client)
        moving(client, ur)
        standin.kill()
        client.wait_state(mode="stopped", code="state_silent")
        assert not client.arm().success


def _stop_first(process: BridgeProcess) -> None:
    """End the module's own bridge: the tests after this bring theirs."""
    if process.process.poll() is None:
        process.process.terminate()
        assert process.process.wait(10.0) == 0


def _fresh(client: BridgeClient) -> None:
    """Forget what an earlier bridge said, and wait for the new one."""
    client.told.clear()
    client.frames.clear()
    client.descriptions.clear()
    client.episodes.clear()
    client.wait_acting()
    client.description()
