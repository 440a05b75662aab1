"""What the engine writes into a running policy, and that it writes nothing else."""

from __future__ import annotations

import dataclasses
import gc
import json
import threading
import weakref

import fabricate
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steer_runtime.directions.direction import Axis, Direction
from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.steering.command import Limits
from steer_runtime.steering.engine import SteeringEngine, hooks_on
from steer_runtime.steering.offline import OfflineSteering
from steer_runtime.steering.seed import seed_override
from steer_runtime.verify import weights_hash
from steering.subjects import Sender, Time, dense_direction, neuron_direction

OBSERVATION = fabricate.make_observation()


@pytest.fixture
def policy() -> OpenVLAPolicy:
    return fabricate.tiny_policy()


def logits(policy: OpenVLAPolicy) -> Tensor:
    return policy.logits(OBSERVATION)


def inputs_of_down_projs(policy: OpenVLAPolicy) -> tuple[list[list[Tensor]], list[torch.utils.hooks.RemovableHandle]]:
    """Record what every down_proj really multiplies, per layer and forward; register after attaching."""
    seen: list[list[Tensor]] = [[] for _ in policy.towers["lm"].down_projs]
    handles = []
    for layer, module in enumerate(policy.towers["lm"].down_projs):
        assert isinstance(module, nn.Module)
        handles.append(module.register_forward_pre_hook(lambda m, args, i=layer: seen[i].append(args[0].clone())))
    return seen, handles


def engine_at(policy: OpenVLAPolicy, time: Time, *directions: Direction, axes: tuple[Axis, ...] = (), **limits: object):
    engine = SteeringEngine(
        policy,
        directions,
        axes,
        clock=time.steady,
        wall_ns=time.wall_ns,
        limits=Limits(**limits),  # type: ignore[arg-type]
    )
    engine.attach()
    return engine


def test_attached_and_idle_is_bit_identical(policy: OpenVLAPolicy) -> None:
    before = logits(policy)
    with OfflineSteering(policy, [neuron_direction(policy)]) as steering:
        off, record = steering.run(lambda: logits(policy))
    assert torch.equal(before, off)
    assert record.sites == ()
    assert record.firings == record.expected_firings == 7 * (3 + 4)


def test_full_override_is_the_seeds_hook_bit_for_bit(policy: OpenVLAPolicy) -> None:
    direction = neuron_direction(policy)
    with OfflineSteering(policy, [direction]) as steering:
        steering.set({"up": 1.0})
        ours, _ = steering.run(lambda: logits(policy))
    with seed_override(policy.towers["lm"], direction):
        theirs = logits(policy)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, logits(policy))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_seeds_hook_is_reproduced_in_half_precision(dtype: torch.dtype) -> None:
    policy = fabricate.tiny_policy(dtype=dtype)
    direction = neuron_direction(policy, alpha=3.7)
    with OfflineSteering(policy, [direction]) as steering:
        steering.set({"up": 1.0})
        ours, _ = steering.run(lambda: logits(policy))
    with seed_override(policy.towers["lm"], direction):
        assert torch.equal(ours, logits(policy))


def test_only_the_named_neurons_change(policy: OpenVLAPolicy) -> None:
    direction = neuron_direction(policy, neurons=[(1, 5), (1, 9)])
    with OfflineSteering(policy, [direction]) as steering:
        steering.set({"up": 0.5})
        seen, handles = inputs_of_down_projs(policy)
        steering.run(lambda: logits(policy))
        steered = seen[1][0]
        for handle in handles:
            handle.remove()
        steering.set({})
        seen, handles = inputs_of_down_projs(policy)
        steering.run(lambda: logits(policy))
        plain = seen[1][0]
        for handle in handles:
            handle.remove()
    untouched = [n for n in range(64) if n not in (5, 9)]
    assert torch.equal(steered[..., untouched], plain[..., untouched])
    # Blending: f + g (alpha - f) with g = 0.5 and alpha = 4.
    torch.testing.assert_close(steered[..., [5, 9]], plain[..., [5, 9]] * 0.5 + 2.0)


def test_a_span_keeps_other_tokens_as_they_are(policy: OpenVLAPolicy) -> None:
    direction = neuron_direction(policy, neurons=[(0, 3)], span=frozenset({"image"}))
    with OfflineSteering(policy, [direction]) as steering:
        seen, handles = inputs_of_down_projs(policy)
        steering.run(lambda: logits(policy))
        plain = [f.clone() for f in seen[0]]
        seen[0].clear()
        steering.set({"up": 1.0})
        _, record = steering.run(lambda: logits(policy))
        for handle in handles:
            handle.remove()
    prefill = seen[0][0][0, :, 3]
    assert torch.equal(prefill[1:5], torch.full((4,), 4.0))  # the four patches follow BOS
    assert torch.equal(prefill[0], plain[0][0, 0, 3])
    assert torch.equal(prefill[5:], plain[0][0, 5:, 3])
    assert record.sites[0].forwards == 1  # the six decoding steps hold action tokens only
    assert record.sites[0].writes == 4


def test_an_action_span_acts_in_decoding_only(policy: OpenVLAPolicy) -> None:
    direction = neuron_direction(policy, neurons=[(0, 3)], span=frozenset({"action"}))
    with OfflineSteering(policy, [direction]) as steering:
        steering.set({"up": 1.0})
        steered, record = steering.run(lambda: logits(policy))
    assert torch.equal(steered[0], logits(policy)[0])
    assert not torch.equal(steered[1:], logits(policy)[1:])
    assert (record.sites[0].forwards, record.sites[0].writes) == (6, 6)


def test_a_command_narrows_the_span(policy: OpenVLAPolicy) -> None:
    time = Time()
    engine = engine_at(policy, time, neuron_direction(policy, neurons=[(0, 3)]))
    assert engine.apply(Sender(time).set("up", 1.0, span=frozenset({"text"}))).accepted
    time.now_s += 1
    engine.latch()
    logits(policy)
    record = engine.finish()
    text = dict(record.tokens)["text"]
    assert record.sites[0].writes == text < sum(dict(record.tokens).values())


def test_a_dense_direction_adds_to_the_residual_stream(policy: OpenVLAPolicy) -> None:
    direction = dense_direction(policy, sites=[0], span=frozenset({"text"}))
    entered: list[Tensor] = []
    with OfflineSteering(policy, [direction]) as steering:
        entry = policy.towers["lm"].residual_sites[0]
        assert isinstance(entry, nn.Module)
        watch = entry.register_forward_hook(lambda m, args, output: entered.append(output.clone()))
        steering.run(lambda: logits(policy))
        steering.set({"drift": 0.5})
        _, record = steering.run(lambda: logits(policy))
        watch.remove()
    plain, steered = entered[0][0], entered[7][0]
    assert direction.dense is not None
    vector = torch.from_numpy(direction.dense[0])
    assert torch.equal(steered[1:5], plain[1:5])
    torch.testing.assert_close(steered[5:], plain[5:] + 0.5 * vector)
    assert [site.kind for site in record.sites] == ["dense"]


def test_dense_directions_add_up(policy: OpenVLAPolicy) -> None:
    a, b = dense_direction(policy, "a", [1], seed=1), dense_direction(policy, "b", [1], seed=2)
    assert a.dense is not None
    assert b.dense is not None
    both = dense_direction(policy, "both", [1])
    summed = Direction(**{**vars(both), "dense": {1: a.dense[1] + b.dense[1]}})
    with OfflineSteering(policy, [a, b, summed]) as steering:
        steering.set({"a": 1.0, "b": 1.0})
        two, _ = steering.run(lambda: logits(policy))
        steering.set({"both": 1.0})
        one, _ = steering.run(lambda: logits(policy))
    torch.testing.assert_close(one, two)


def test_directions_on_different_neurons_add_up(policy: OpenVLAPolicy) -> None:
    a = neuron_direction(policy, "a", [(0, 1)])
    b = neuron_direction(policy, "b", [(2, 2)])
    both = neuron_direction(policy, "both", [(0, 1), (2, 2)])
    with OfflineSteering(policy, [a, b, both]) as steering:
        steering.set({"a": 1.0, "b": 1.0})
        two, _ = steering.run(lambda: logits(policy))
        steering.set({"both": 1.0})
        one, _ = steering.run(lambda: logits(policy))
    assert torch.equal(one, two)


def test_on_the_same_neuron_the_newer_wins_and_the_state_says_so(policy: OpenVLAPolicy) -> None:
    old = neuron_direction(policy, "old", [(0, 1), (0, 2)], alpha=9.0)
    new = neuron_direction(policy, "new", [(0, 1)], alpha=-9.0)
    with OfflineSteering(policy, [old, new]) as steering:
        seen, handles = inputs_of_down_projs(policy)
        steering.set({"old": 1.0, "new": 1.0})
        steering.run(lambda: logits(policy))
        for handle in handles:
            handle.remove()
        shadowed = {active.target: active.shadowed_neurons for active in steering.engine.state().active}
    assert (seen[0][0][..., 1] == -9.0).all()
    assert (seen[0][0][..., 2] == 9.0).all()
    assert shadowed == {"old": 1, "new": 0}


def test_higher_priority_beats_newer(policy: OpenVLAPolicy) -> None:
    time = Time()
    engine = engine_at(
        policy, time, neuron_direction(policy, "a", [(0, 1)], 9.0), neuron_direction(policy, "b", [(0, 1)])
    )
    sender = Sender(time)
    engine.apply(sender.set("a", 1.0, priority=1))
    engine.apply(sender.set("b", 1.0, priority=0))
    time.now_s += 1
    engine.latch()
    seen, _ = inputs_of_down_projs(policy)
    logits(policy)
    assert (seen[0][0][..., 1] == 9.0).all()


def test_an_axis_commands_both_ends(policy: OpenVLAPolicy) -> None:
    slow, fast = neuron_direction(policy, "slow", [(0, 1)], 5.0), neuron_direction(policy, "fast", [(0, 2)], 6.0)
    with OfflineSteering(policy, [slow, fast], [Axis("speed", "slow", "fast")]) as steering:
        for strength, expected in ((-1.0, slow.id), (1.0, fast.id)):
            steering.set({"speed": strength})
            _, record = steering.run(lambda: logits(policy))
            assert record.strengths == ((expected, 1.0),)


def test_a_ramp_advances_once_an_inference(policy: OpenVLAPolicy) -> None:
    time = Time()
    engine = engine_at(policy, time, neuron_direction(policy))
    engine.apply(Sender(time).set("up", 1.0, ramp_s=1.0))
    strengths = []
    for _ in range(5):
        time.now_s += 0.25
        engine.latch()
        time.now_s += 0.0001  # time that passes inside an inference changes nothing
        logits(policy)
        strengths.append(engine.finish().strengths[0][1])
    assert strengths == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0], abs=1e-3)


def test_a_step_change_is_slew_limited(policy: OpenVLAPolicy) -> None:
    time = Time()
    engine = engine_at(policy, time, neuron_direction(policy), max_slew=2.0)
    engine.apply(Sender(time).set("up", 1.0, ramp_s=0.0))
    time.now_s += 0.25
    engine.latch()
    assert engine.state().active[0].strength == pytest.approx(0.5)


def test_a_hold_releases_by_itself(policy: OpenVLAPolicy) -> None:
    time = Time()
    before = logits(policy)
    engine = engine_at(policy, time, neuron_direction(policy), release_s=0.5)
    engine.apply(Sender(time).set("up", 1.0, ramp_s=0.0, hold_s=1.0))
    seen = []
    for moment in (0.5, 1.25, 1.6):
        time.now_s = 100.0 + moment
        engine.latch()
        result = logits(policy)
        seen.append(dict(engine.finish().strengths).get(neuron_direction(policy).id, 0.0))
    assert seen == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)
    assert torch.equal(result, before)
    assert engine.state().active == ()


def test_clear_during_a_ramp_is_exact_at_the_next_latch(policy: OpenVLAPolicy) -> None:
    time = Time()
    before = logits(policy)
    engine = engine_at(policy, time, neuron_direction(policy))
    sender = Sender(time)
    engine.apply(sender.set("up", 1.0, ramp_s=2.0))
    time.now_s += 1.0
    engine.latch()
    assert not torch.equal(logits(policy), before)
    engine.apply(sender.clear("up"))
    engine.latch()
    assert torch.equal(logits(policy), before)


def test_clear_now_cuts_in_at_the_next_forward(policy: OpenVLAPolicy) -> None:
    time = Time()
    engine = engine_at(policy, time, neuron_direction(policy, neurons=[(0, 3)]))
    engine.apply(Sender(time).set("up", 1.0))
    time.now_s += 1
    entry = policy.towers["lm"].residual_sites[0]
    assert isinstance(entry, nn.Module)
    forwards = iter(range(7))
    entry.register_forward_hook(lambda m, args, output: engine.clear_now() if next(forwards) == 3 else None)
    engine.latch()
    logits(policy)
    record = engine.finish()
    assert record.sites[0].forwards == 3
    assert record.interrupted


def test_latched_steering_is_constant_while_commands_arrive(policy: OpenVLAPolicy) -> None:
    time = Time()
    engine = engine_at(policy, time, neuron_direction(policy, neurons=[(0, 3)]))
    sender = Sender(time)
    entry = policy.towers["lm"].residual_sites[0]
    assert isinstance(entry, nn.Module)
    entry.register_forward_hook(lambda m, args, output: engine.apply(sender.set("up", 1.0)) and None)
    before = engine.latch()
    logits(policy)
    assert engine.finish().sites == ()
    time.now_s += 1
    after = engine.latch()
    assert after.sequence == before.sequence + 7
    logits(policy)
    assert engine.finish().sites[0].forwards == 7


def test_commands_from_many_threads_all_get_a_verdict(policy: OpenVLAPolicy) -> None:
    time = Time()
    engine = engine_at(policy, time, neuron_direction(policy))
    verdicts: list[bool] = []

    def send(name: str) -> None:
        sender = Sender(time, name)
        verdicts.extend(engine.apply(sender.set("up", 0.5)).accepted for _ in range(200))

    threads = [threading.Thread(target=send, args=(f"t{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        engine.latch()
        logits(policy)
        engine.finish()
    assert verdicts == [True] * 800
    assert engine.state().steering.sequence == 800


def test_detaching_leaves_no_hook_and_the_same_weights(policy: OpenVLAPolicy) -> None:
    before, hooks, weights = logits(policy), hooks_on(policy.model), weights_hash(policy.model)
    engine = SteeringEngine(policy, [neuron_direction(policy)])
    for _ in range(20):
        engine.attach()
        engine.latch()
        logits(policy)
        engine.finish()
        engine.detach()
    assert hooks_on(policy.model) == hooks
    assert weights_hash(policy.model) == weights
    assert torch.equal(logits(policy), before)


def test_a_detached_engine_is_freed(policy: OpenVLAPolicy) -> None:
    engine = SteeringEngine(policy, [neuron_direction(policy)])
    engine.attach()
    engine.detach()
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None


def test_hooks_that_others_removed_are_an_error(policy: OpenVLAPolicy) -> None:
    engine = SteeringEngine(policy, [neuron_direction(policy)])
    engine.attach()
    module = policy.towers["lm"].down_projs[1]
    assert isinstance(module, nn.Module)
    module._forward_pre_hooks.clear()
    engine.latch()
    logits(policy)
    with pytest.raises(SteerError, match="42 of 49 hook calls"):
        engine.finish()
    assert engine.state().alarms


def test_a_failing_hook_falls_back_to_baseline_with_an_alarm(policy: OpenVLAPolicy) -> None:
    before = logits(policy)
    with OfflineSteering(policy, [neuron_direction(policy, neurons=[(1, 5)])]) as steering:
        steering.set({"up": 1.0})
        steering.engine.latch()
        site = steering.engine._neurons["lm"][1]
        assert site.plan is not None
        # Eight values for one neuron: what a torn buffer would look like.
        site.plan = dataclasses.replace(site.plan, pinned=False, coefficients=torch.zeros(4, 8))
        after = logits(policy)
        steering.engine.finish()
        state = steering.engine.state()
    assert torch.equal(before, after)
    assert state.counters["hook_failures"] == 1
    assert "layer 1 failed and is off" in state.alarms[0]


def test_the_dose_is_the_relative_change_of_the_residual_stream(policy: OpenVLAPolicy) -> None:
    direction = neuron_direction(policy, neurons=[(2, 7)], alpha=6.0, span=frozenset({"image", "text"}))
    outputs: list[Tensor] = []
    layer = policy.towers["lm"].residual_sites[3]
    assert isinstance(layer, nn.Module)
    with OfflineSteering(policy, [direction], measure_dose=True) as steering:
        watch = layer.register_forward_hook(lambda m, args, output: outputs.append(output[0].clone()))
        steering.run(lambda: logits(policy))
        steering.set({"up": 1.0})
        _, record = steering.run(lambda: logits(policy))
        watch.remove()
    # The last layer's change cannot feed back inside the prefill, so its plain and steered outputs are comparable.
    by_hand = ((outputs[7] - outputs[0]).norm(dim=-1) / outputs[0].norm(dim=-1)).max()
    assert record.sites[0].dose == pytest.approx(float(by_hand), rel=1e-3)


def test_gradients_still_flow_when_inputs_need_them(policy: OpenVLAPolicy) -> None:
    direction = neuron_direction(policy, neurons=[(0, 3)])
    with OfflineSteering(policy, [direction]) as steering:
        steering.set({"up": 1.0})
        steering.engine.latch()
        steering.engine.set_roles("lm", ["text"] * 4)
        embeddings = torch.randn(1, 4, 32, requires_grad=True)
        policy.model.step(embeddings, None).sum().backward()
    assert embeddings.grad is not None
    assert torch.isfinite(embeddings.grad).all()


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda p: [neuron_direction(p, model_hash="0" * 64)], "other_model"),
        (lambda p: [neuron_direction(p), neuron_direction(p, alpha=5.0)], "ambiguous_direction"),
        (lambda p: [Direction(**{**vars(neuron_direction(p)), "tower": "expert"})], "unknown_tower"),
    ],
)
def test_directions_that_do_not_fit_are_refused(policy: OpenVLAPolicy, make, code: str) -> None:
    with pytest.raises(SteerError) as caught:
        SteeringEngine(policy, make(policy))
    assert caught.value.code == code


def test_an_axis_of_unknown_directions_is_refused(policy: OpenVLAPolicy) -> None:
    with pytest.raises(SteerError, match="the nearest are 'up'"):
        SteeringEngine(policy, [neuron_direction(policy)], [Axis("height", "up", "upp")])


def test_alpha_beyond_the_towers_dtype_is_refused() -> None:
    policy = fabricate.tiny_policy(dtype=torch.float16)
    with pytest.raises(SteerError, match="too large for torch"):
        SteeringEngine(policy, [neuron_direction(policy, alpha=1e5)])


def test_unannounced_tokens_are_not_steered_by_guess(policy: OpenVLAPolicy) -> None:
    with OfflineSteering(policy, [neuron_direction(policy)]) as steering:
        steering.set({"up": 1.0})
        steering.engine.latch()
        steering.engine.set_roles("lm", ["text"] * 5)
        with torch.inference_mode():
            policy.model.step(torch.zeros(1, 4, 32), None)
        assert any("roles of 5 were announced" in alarm for alarm in steering.engine.state().alarms)


def test_the_trace_is_json(policy: OpenVLAPolicy) -> None:
    with OfflineSteering(policy, [neuron_direction(policy), dense_direction(policy)]) as steering:
        steering.set({"up": 1.0, "drift": 1.0})
        _, record = steering.run(lambda: logits(policy))
    assert json.loads(json.dumps(record.to_jsonable()))["firings"] == record.firings
    assert np.sum([site.writes for site in record.sites]) > 0
