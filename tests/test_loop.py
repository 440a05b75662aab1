"""The inference loop: newest in, stamped out, safe when the policy is not."""

from __future__ import annotations

import dataclasses
import queue
import threading

import fabricate
import numpy as np
import pytest
import torch
from steering.subjects import neuron_direction
from torch import nn

from steer_runtime.errors import SteerError
from steer_runtime.loop import InferenceLoop, LoopEvent
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.steering.command import SteeringCommand
from steer_runtime.steering.engine import SteeringEngine, hooks_on
from steer_runtime.types import ActionChunk, Observation

WAIT_S = 20.0


class Bench:
    """A loop around a policy with everything it says collected."""

    def __init__(self, policy: OpenVLAPolicy, **options: int) -> None:
        self.policy = policy
        self.engine = SteeringEngine(policy, [neuron_direction(policy)])
        self.chunks: queue.Queue[ActionChunk] = queue.Queue()
        self.events: queue.Queue[LoopEvent] = queue.Queue()
        self.loop = InferenceLoop(policy, self.engine, self.chunks.put, self.events.put, **options)

    def __enter__(self) -> Bench:
        self.loop.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.loop.stop()

    def submit(self, frame_id: int = 0, **fields: object) -> None:
        self.loop.submit(fabricate.make_observation(self.policy, frame_id=frame_id, **fields))  # type: ignore[arg-type]

    def chunk(self) -> ActionChunk:
        return self.chunks.get(timeout=WAIT_S)

    def event(self) -> LoopEvent:
        return self.events.get(timeout=WAIT_S)


def test_every_action_is_stamped() -> None:
    with Bench(fabricate.tiny_policy()) as bench:
        bench.submit(frame_id=3)
        first = bench.chunk()
        verdict = bench.engine.apply(SteeringCommand("me", 1, 1, bench.engine._wall_ns(), "set", "up", 1.0))
        bench.submit(frame_id=4)
        second = bench.chunk()
    assert (first.frame_id, second.frame_id) == (3, 4)
    assert second.inference_id == first.inference_id + 1
    assert second.observation_stamp_ns == 5_000_000
    assert second.steering == verdict.steering
    assert first.steering.sequence < second.steering.sequence
    assert first.age_s > 0


def test_the_newest_observation_wins_and_drops_are_counted() -> None:
    bench = Bench(fabricate.tiny_policy())
    entry = bench.policy.towers["lm"].residual_sites[0]
    assert isinstance(entry, nn.Module)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*args: object) -> None:
        inside.set()
        assert go_on.wait(WAIT_S)

    entry.register_forward_hook(wait)
    with bench:
        bench.submit(frame_id=1)
        assert inside.wait(WAIT_S)
        for frame_id in (2, 3, 4):
            bench.submit(frame_id=frame_id)
        go_on.set()
        assert [bench.chunk().frame_id, bench.chunk().frame_id] == [1, 4]
        assert bench.loop.counters["dropped_observations"] == 2


def test_a_bad_observation_is_refused_and_the_loop_goes_on() -> None:
    with Bench(fabricate.tiny_policy()) as bench:
        observation = fabricate.make_observation(bench.policy)
        images = {name: np.zeros((5, 7), np.float32) for name in observation.images}
        bench.loop.submit(type(observation)(**{**vars(observation), "images": images}))
        assert bench.event().code == "bad_image"
        assert bench.loop.state == "holding"
        bench.submit()
        bench.chunk()
        assert bench.loop.state == "running"
        assert bench.loop.counters["refused_observations"] == 1


def test_a_failing_policy_restarts_then_stays_off_without_hooks() -> None:
    bench = Bench(fabricate.tiny_policy(), max_restarts=2)
    broken = [True]
    bench.policy.model.projector.register_forward_pre_hook(lambda m, args: 1 / 0 if broken[0] else None)
    hooks = hooks_on(bench.policy.model)
    with bench:
        bench.submit()
        assert bench.event().code == "policy_restarted"
        broken[0] = False
        bench.submit()
        bench.chunk()  # it recovers
        broken[0] = True
        bench.submit()
        assert bench.event().code == "policy_restarted"
        bench.submit()
        last = bench.event()
        assert (last.code, last.fatal) == ("policy_failed", True)
        assert bench.loop.state == "error"
        assert hooks_on(bench.policy.model) == hooks
    assert bench.loop.state == "error"


def test_a_restart_clears_steering() -> None:
    bench = Bench(fabricate.tiny_policy())
    failures = iter([True])
    bench.policy.model.projector.register_forward_pre_hook(lambda m, args: 1 / 0 if next(failures, False) else None)
    with bench:
        bench.engine.apply(SteeringCommand("me", 1, 1, bench.engine._wall_ns(), "set", "up", 1.0))
        bench.submit()
        assert "steering is cleared" in bench.event().sentence
        bench.submit()
        bench.chunk()
        assert bench.engine.state().active == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_actions_that_are_not_finite_are_never_handed_on(value: float) -> None:
    bench = Bench(fabricate.tiny_policy())
    statistics = bench.policy.statistics
    bench.policy.statistics = dataclasses.replace(statistics, q99=(value, *statistics.q99[1:]))
    with bench:
        bench.submit()
        assert bench.event().code == "bad_action"
        assert bench.chunks.empty()
        assert bench.loop.counters["bad_actions"] == 1


def test_stopping_leaves_the_policy_as_it_was() -> None:
    policy = fabricate.tiny_policy()
    hooks = hooks_on(policy.model)
    before = policy.logits(fabricate.make_observation(policy))
    with Bench(policy) as bench:
        bench.submit()
        bench.chunk()
    assert hooks_on(policy.model) == hooks
    assert bench.loop.state == "idle"
    assert torch.equal(before, policy.logits(fabricate.make_observation(policy)))


def test_a_second_start_is_refused() -> None:
    with Bench(fabricate.tiny_policy()) as bench, pytest.raises(SteerError, match="runs already"):
        bench.loop.start()


def test_what_a_policy_notes_as_wrong_is_counted() -> None:
    class Noting:
        """The tiny policy, with a note of every kind on its chunks."""

        def __init__(self) -> None:
            self.inner = fabricate.tiny_policy()

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

        def infer(self, observation: Observation) -> ActionChunk:
            notes = {"out_of_range_tokens": 2.0, "unknown_object": 1.0, "said_pace": 4.0}
            return dataclasses.replace(self.inner.infer(observation), notes=notes)

    with Bench(Noting()) as bench:  # type: ignore[arg-type]
        for frame in range(3):
            bench.submit(frame_id=frame)
            bench.chunk()
        counters = bench.loop.counters
    assert (counters["out_of_range_tokens"], counters["unknown_object"], counters["inferences"]) == (6, 3, 3)
    assert "said_pace" not in counters
