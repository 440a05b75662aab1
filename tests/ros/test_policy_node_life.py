"""How a policy node starts, is refused, yields, fails and ends. Each test has nodes of its own, on another domain."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import rclpy
import torch
from diagnostic_msgs.msg import DiagnosticStatus
from driver import PolicyProcess, SensorDriver
from rclpy._rclpy_pybind11 import RCLError
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.signals import SignalHandlerOptions
from subjects_ros import make_direction

from ros_nodes.client import SteeringClient
from ros_nodes.policy_node import PolicyNode
from steer_runtime.directions.store import DirectionStore
from steer_runtime.errors import SteerError
from steer_runtime.steering.command import SteeringCommand
from steer_runtime.types import LIBERO_ACTION_SPACE, ActionChunk, Observation

SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE


@contextmanager
def own_node(domain: int, *, spin: bool = False, **parameters: Any) -> Iterator[PolicyNode]:
    """The real node in this process, so that a test can look into the policy it loaded."""
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=domain, signal_handler_options=SignalHandlerOptions.NO)
    overrides = [Parameter(name, value=value) for name, value in parameters.items()]
    try:
        node = PolicyNode(context=context, parameter_overrides=overrides)
    except SteerError:
        context.try_shutdown()
        raise
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)

    def run() -> None:
        try:
            executor.spin()
        except ExternalShutdownException:
            return

    thread = threading.Thread(target=run, daemon=True)
    if spin:
        thread.start()
    try:
        yield node
    finally:
        executor.shutdown()
        if spin:
            thread.join()
        node.close()
        node.destroy_node()
        context.try_shutdown()


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# -- configure fails loudly -------------------------------------------------------------------------------------------


def write_other_model(store: DirectionStore, policy: Any) -> None:
    store.save(replace(make_direction(policy, "slow", 1.0), model_hash="0" * 64))


def write_other_width(store: DirectionStore, policy: Any) -> None:
    store.save(replace(make_direction(policy, "slow", 1.0), d_ff=4096))


def write_other_depth(store: DirectionStore, policy: Any) -> None:
    store.save(replace(make_direction(policy, "slow", 1.0), layers=32))


def write_torn(store: DirectionStore, policy: Any) -> None:
    path = store.save(make_direction(policy, "slow", 1.0))
    path.write_bytes(path.read_bytes()[:-40])


def write_pickle(store: DirectionStore, policy: Any) -> None:
    path = store.save(make_direction(policy, "slow", 1.0))
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")


@pytest.mark.fault(16)
@pytest.mark.fault(40)
@pytest.mark.parametrize(
    ("write", "said"),
    [
        (write_other_model, "belongs to model 000000000000"),
        (write_other_width, "d_ff"),
        (write_other_depth, "layers"),
        (write_torn, ""),
        (write_pickle, "pickle"),
    ],
)
def test_direction_that_is_not_for_this_model_is_refused_at_configure(
    write: Any, said: str, policy_yaml: Path, loaded_policy: Any, tmp_path: Path, other_domain: int, capfd: Any
) -> None:
    write(DirectionStore(tmp_path), loaded_policy)
    with own_node(other_domain, policy=str(policy_yaml), direction_store=str(tmp_path)) as node:
        assert node.trigger_configure() == FAILURE
        # Some distributions raise for a transition that the present state does not have, others return.
        with suppress(RCLError):
            assert node.trigger_activate() != SUCCESS
        assert node._lifecycle == "unconfigured"
    output = capfd.readouterr().err
    assert "cannot configure" in output
    assert said in output
    assert "Traceback" not in output
    assert not Path("owned").exists(), "nothing of a file may be executed"


@pytest.mark.fault(35)
@pytest.mark.fault(40)
@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"policy": ""}, "'policy' is empty"),
        ({"policy": "nowhere.yaml"}, "nowhere.yaml"),
        ({"policy": "no-such-policy"}, "no-such-policy"),
        ({"direction_store": "/nowhere"}, "/nowhere"),
        ({"directions": ["unheard-of"]}, "direction_store"),
        ({"directions": ["../../secret"], "direction_store": "."}, "../../secret"),
        ({"max_strengths": ["nothing=0.5"]}, "'nothing'"),
        ({"doses": ["slow"]}, "name=number"),
    ],
)
def test_missing_file_or_parameter_is_refused_at_configure(
    parameters: dict[str, Any], said: str, policy_yaml: Path, other_domain: int, capfd: Any
) -> None:
    with own_node(other_domain, **{"policy": str(policy_yaml), **parameters}) as node:
        assert node.trigger_configure() == FAILURE
    output = capfd.readouterr().err
    assert said in output
    assert "Traceback" not in output


def test_named_directions_alone_are_loaded(policy_yaml: Path, direction_store: Path, other_domain: int) -> None:
    parameters = {"policy": str(policy_yaml), "direction_store": str(direction_store), "directions": ["gentle"]}
    with own_node(other_domain, **parameters) as node:
        assert node.trigger_configure() == SUCCESS
        assert node._loaded is not None
        assert list(node._loaded.engine.directions) == ["gentle"]
        assert not node._loaded.engine.axes


@pytest.mark.fault(35)
def test_process_ends_with_one_sentence_when_autostart_is_refused(other_domain: int, tmp_path: Path) -> None:
    with PolicyProcess(tmp_path / "missing.yaml", None, domain=other_domain) as node:
        assert node.process.wait(60.0) == 1
        assert "missing.yaml" in node.log()
        assert "Traceback" not in node.log()


@pytest.mark.fault(35)
@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"observation_timeout_s": 1000.0}, "observation_timeout_s"),
        ({"autostart": "yes"}, "autostart"),
        ({"over_limit": "ignore"}, "clamp, reject"),
    ],
)
def test_bad_parameter_is_refused_at_start(parameters: dict[str, Any], said: str, other_domain: int) -> None:
    with pytest.raises(SteerError, match=said), own_node(other_domain, **parameters):
        pass


# -- handshake --------------------------------------------------------------------------------------------------------


def test_robot_with_another_action_space_is_refused_and_the_right_one_met_later(
    policy_yaml: Path, other_domain: int, capfd: Any
) -> None:
    with own_node(other_domain, policy=str(policy_yaml)) as node:
        assert node.trigger_configure() == SUCCESS
        assert node.trigger_activate() == FAILURE
        assert "no robot has described itself" in capfd.readouterr().err
    with (
        SensorDriver(domain=other_domain) as driver,
        own_node(other_domain, spin=True, policy=str(policy_yaml), autostart=True) as node,
        SteeringClient(domain_id=other_domain) as client,
    ):
        driver.describe(replace(LIBERO_ACTION_SPACE, gripper_open=1.0, rate_hz=10.0))
        client.wait_state(lambda s: s.counters.get("activate_refused", 0) == 1, timeout=30.0)
        output = capfd.readouterr().err
        assert "gripper_open is -1.0 for the policy and 1.0 for the robot" in output
        assert node._loaded is not None
        assert hooks(node._loaded.policy.model) == 0
        driver.session = "session-2"
        driver.describe()
        client.wait_state(lambda s: s.lifecycle == "active", timeout=30.0)


# -- inside the policy ------------------------------------------------------------------------------------------------


@pytest.fixture
def active(
    policy_yaml: Path, direction_store: Path, other_domain: int
) -> Iterator[tuple[PolicyNode, SensorDriver, SteeringClient]]:
    """An active node in this process, its robot and a client."""
    parameters = {"policy": str(policy_yaml), "direction_store": str(direction_store), "autostart": True}
    with (
        SensorDriver(domain=other_domain) as driver,
        own_node(other_domain, spin=True, max_restarts=2, **parameters) as node,
        SteeringClient(domain_id=other_domain) as client,
    ):
        driver.describe()
        client.wait_state(lambda s: s.lifecycle == "active", timeout=30.0)
        driver.wait_matched()
        driver.ask()
        yield node, driver, client


@pytest.mark.fault(23)
@pytest.mark.fault(34)
def test_deactivated_policy_has_no_hooks_and_its_old_weights(
    active: tuple[PolicyNode, SensorDriver, SteeringClient],
) -> None:
    node, driver, client = active
    assert node._loaded is not None
    model = node._loaded.policy.model
    before = weights(model)
    for _ in range(20):
        verdict = client.wait_verdict(client.publish("slow", 1.0, ramp_s=0.0))
        driver.ask(after=lambda c, v=verdict: c.steering_sequence >= v.steering.sequence)
        assert hooks(model) > 0
        assert node.trigger_deactivate() == SUCCESS
        assert hooks(model) == 0
        refused = client.wait_verdict(client.publish("slow", 1.0))
        assert (refused.accepted, refused.code) == (False, "not_active")
        assert node.trigger_activate() == SUCCESS
        client.wait_state(lambda s: s.lifecycle == "active")
        driver.wait_matched()
    assert node.trigger_deactivate() == SUCCESS
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    gone = weakref.ref(model)
    del model
    assert node.trigger_cleanup() == SUCCESS
    gc.collect()
    assert gone() is None


def break_policy(node: PolicyNode) -> Any:
    """A module inside the real policy that raises, as a broken kernel would."""

    def fail(*_: object) -> None:
        raise RuntimeError("device-side assert")

    assert node._loaded is not None
    return node._loaded.policy.towers["lm"].down_projs[0].register_forward_pre_hook(fail)  # type: ignore[attr-defined]


@pytest.mark.fault(17)
def test_policy_that_raises_is_restarted_then_given_up_with_hooks_off(
    active: tuple[PolicyNode, SensorDriver, SteeringClient],
) -> None:
    node, driver, client = active
    assert node._loaded is not None
    model = node._loaded.policy.model
    client.wait_verdict(client.publish("slow", 1.0))
    broken = break_policy(node)
    stamp = driver.send()
    client.wait_state(lambda s: s.counters.get("policy_errors", 0) == 1 and s.active == ())
    assert driver.answer(stamp, 0.1) is None
    broken.remove()
    driver.ask()  # one restart was enough
    broken = break_policy(node)
    for errors in (2, 3):
        driver.send()
        client.wait_state(lambda s, n=errors: s.counters.get("policy_errors", 0) == n)
    client.wait_state(lambda s: s.loop_state == "error")
    broken.remove()
    assert hooks(model) == 0
    status = driver.wait_diagnosis(lambda s: s.level == DiagnosticStatus.ERROR)
    assert "device-side assert" in status.message


@pytest.mark.fault(20)
def test_hook_that_fails_leaves_the_policy_at_baseline_with_an_alarm(
    active: tuple[PolicyNode, SensorDriver, SteeringClient],
) -> None:
    node, driver, client = active
    assert node._loaded is not None
    baseline = driver.ask()
    for site in node._loaded.engine._neurons["lm"]:
        site._layout = None  # type: ignore[assignment]
    verdict = client.wait_verdict(client.publish("slow", 1.0, ramp_s=0.0))
    after = driver.ask(after=lambda c: c.steering_sequence >= verdict.steering.sequence)
    after = driver.ask()
    assert list(after.data) == list(baseline.data)
    state = client.wait_state(lambda s: len(s.alarms) > 0)
    assert "hook" in state.alarms[0]
    driver.wait_diagnosis(lambda s: s.level == DiagnosticStatus.WARN and "hook" in s.message)


def spoil_shape(actions: np.ndarray) -> np.ndarray:
    return actions[:, :6]


def spoil_dtype(actions: np.ndarray) -> np.ndarray:
    return actions.astype(np.float64)


def spoil_value(actions: np.ndarray) -> np.ndarray:
    return np.full_like(actions, np.nan)


def spoil_size(actions: np.ndarray) -> np.ndarray:
    return np.full_like(actions, -np.inf)


@pytest.mark.fault(18)
@pytest.mark.parametrize("spoil", [spoil_shape, spoil_dtype, spoil_value, spoil_size])
def test_actions_that_are_none_are_refused_held_and_recovered_from(
    active: tuple[PolicyNode, SensorDriver, SteeringClient], spoil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, driver, client = active
    assert node._loaded is not None
    policy = node._loaded.policy
    infer = policy.infer

    def spoiled(observation: Observation) -> ActionChunk:
        chunk = infer(observation)
        return replace(chunk, actions=spoil(chunk.actions))

    monkeypatch.setattr(policy, "infer", spoiled)
    stamp = driver.send()
    state = client.wait_state(lambda s: s.counters.get("bad_actions", 0) == 1)
    assert state.loop_state == "holding"
    assert driver.answer(stamp, 0.2) is None
    monkeypatch.undo()
    driver.ask()
    client.wait_state(lambda s: s.loop_state == "running")


@pytest.mark.fault(22)
def test_an_inference_out_of_memory_clears_steering_and_starts_again_clean(
    active: tuple[PolicyNode, SensorDriver, SteeringClient],
) -> None:
    node, driver, client = active
    assert node._loaded is not None
    model = node._loaded.policy.model
    baseline = list(driver.ask().data)
    hooked = hooks(model)
    verdict = client.wait_verdict(client.publish("slow", 1.0, ramp_s=0.0))
    driver.ask(after=lambda c: c.steering_sequence >= verdict.steering.sequence)

    def exhaust(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 7.00 GiB")

    broken = node._loaded.policy.towers["lm"].down_projs[0].register_forward_pre_hook(exhaust)  # type: ignore[attr-defined]
    stamp = driver.send()
    client.wait_state(lambda s: s.counters.get("out_of_memory", 0) == 1 and s.active == ())
    assert driver.answer(stamp, 0.2) is None
    broken.remove()
    assert list(driver.ask().data) == baseline
    assert hooks(model) == hooked


@pytest.mark.fault(36)
def test_a_full_disk_costs_the_trace_and_nothing_else(
    policy_yaml: Path, direction_store: Path, other_domain: int
) -> None:
    parameters = {"policy": str(policy_yaml), "direction_store": str(direction_store), "autostart": True}
    with (
        SensorDriver(domain=other_domain) as driver,
        own_node(other_domain, spin=True, trace_path="/dev/full", **parameters),
        SteeringClient(domain_id=other_domain) as client,
    ):
        driver.describe()
        client.wait_state(lambda s: s.lifecycle == "active", timeout=30.0)
        driver.wait_matched()
        driver.ask()
        verdict = client.wait_verdict(client.publish("slow", 1.0, ramp_s=0.0))
        driver.ask(after=lambda c: c.steering_sequence >= verdict.steering.sequence)
        state = client.wait_state(lambda s: s.counters.get("trace_not_written", 0) >= 2)
        assert (state.loop_state, len(state.active)) == ("running", 1)


@pytest.mark.fault(24)
def test_a_camera_that_freezes_is_refused_until_its_picture_changes(policy_yaml: Path, other_domain: int) -> None:
    with (
        SensorDriver(domain=other_domain) as driver,
        own_node(other_domain, spin=True, policy=str(policy_yaml), autostart=True, freeze_timeout_s=0.5) as node,
        SteeringClient(domain_id=other_domain) as client,
    ):
        driver.describe()
        client.wait_state(lambda s: s.lifecycle == "active", timeout=30.0)
        driver.wait_matched()
        driver.ask()
        deadline = time.monotonic() + 10.0
        while node.complaints.counters.get("frozen_camera", 0) == 0:
            assert time.monotonic() < deadline
            driver.send()
            client.next_state()
        assert driver.answer(driver.send(), 0.3) is None
        driver.image = 255 - driver.image
        stamp = driver.send()
        assert driver.answer(stamp, 10.0) is not None


@pytest.mark.fault(38)
def test_who_comes_late_hears_the_state_that_is(policy_yaml: Path, other_domain: int) -> None:
    # Nobody spins the node: what arrives was said before the client was there.
    with own_node(other_domain, policy=str(policy_yaml)) as node:
        assert node.trigger_configure() == SUCCESS
        with SteeringClient(domain_id=other_domain) as late:
            state = late.connect(10.0)
            assert (state.instance_id, state.lifecycle) == (node.instance_id, "inactive")


def memory_mib() -> float:
    return psutil.Process().memory_info().rss / 2**20


@pytest.mark.fault(34)
@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_a_thousand_cycles_leave_nothing_behind(active: tuple[PolicyNode, SensorDriver, SteeringClient]) -> None:
    node, driver, _ = active
    assert node._loaded is not None
    model = node._loaded.policy.model

    def cycle() -> None:
        assert node.trigger_deactivate() == SUCCESS
        assert hooks(model) == 0
        assert node.trigger_activate() == SUCCESS

    def kept() -> tuple[int, int, int, int, int]:
        gc.collect()
        process = psutil.Process()
        return (
            hooks(model),
            threading.active_count(),
            process.num_fds(),
            len(list(node.subscriptions)),
            len(list(node.publishers)),
        )

    for _ in range(50):
        cycle()
    before, memory = kept(), memory_mib()
    for _ in range(950):
        cycle()
    assert kept() == before
    assert memory_mib() < memory + 20.0
    driver.wait_matched()
    driver.ask()


# -- processes --------------------------------------------------------------------------------------------------------


def assert_ends(node: PolicyProcess, number: signal.Signals) -> None:
    start = time.monotonic()
    node.process.send_signal(number)
    assert node.process.wait(10.0) == 0, node.log()
    assert time.monotonic() - start < 2.0
    assert "Traceback" not in node.log()


@pytest.mark.fault(33)
def test_signal_ends_an_inferring_node_with_code_0_within_two_seconds(policy_yaml: Path, other_domain: int) -> None:
    with SensorDriver(domain=other_domain) as driver, PolicyProcess(policy_yaml, None, domain=other_domain) as node:
        driver.describe()
        driver.wait(lambda: all(p.get_subscription_count() for p in driver.cameras.values()), 60.0, "the node")
        driver.wait_matched()
        driver.ask()
        for _ in range(3):
            driver.send()
        assert_ends(node, signal.SIGTERM)


@pytest.mark.fault(13)
@pytest.mark.fault(37)
def test_second_node_does_not_act_and_a_command_from_before_a_restart_is_gone(
    policy_yaml: Path, direction_store: Path, other_domain: int
) -> None:
    with SensorDriver(domain=other_domain) as driver, SteeringClient(domain_id=other_domain) as client:
        driver.describe()
        with PolicyProcess(policy_yaml, direction_store, domain=other_domain) as elder:
            first = client.wait_state(lambda s: s.lifecycle == "active", timeout=60.0).instance_id
            driver.wait_matched()
            driver.ask()
            client.wait_verdict(client.publish("slow", 1.0))
            with PolicyProcess(policy_yaml, direction_store, domain=other_domain) as younger:
                younger_said = driver.wait(
                    lambda: "this one does not act" in younger.log() or "deactivates itself" in younger.log(), 120.0
                )
                assert younger_said
                driver.chunks.clear()
                stamps = [driver.send() for _ in range(5)]
                assert driver.answer(stamps[-1], 5.0) is not None
                assert {chunk.instance_id for _, chunk in driver.chunks} == {first}
            elder.kill()
        # The dead node's end of the topic looks alive for a while; what is sent now must reach nobody.
        client.send(SteeringCommand(client.source, client.epoch, 10_000, time.time_ns(), "set", "slow", 1.0))
        with PolicyProcess(policy_yaml, direction_store, domain=other_domain) as restarted:
            second = client.wait_state(lambda s: s.instance_id != first and s.lifecycle == "active", timeout=60.0)
            driver.wait_matched()
            driver.ask(after=lambda chunk: chunk.instance_id == second.instance_id)
            state = client.next_state()
            assert state.active == ()
            assert state.counters.get("commands", 0) == 0
            assert_ends(restarted, signal.SIGINT)
