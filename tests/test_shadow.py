"""Shadow inference: measures how far steering moves actions, bounds it, and leaves no trace of itself."""

from __future__ import annotations

import dataclasses
import math
import queue
import time
from typing import Any

import fabricate
import fabricate_pi0
import numpy as np
import pytest
from steering.subjects import Sender, Time, dense_direction, neuron_direction

from steer_runtime.chunk_guard import ChunkGuard, ChunkLimits
from steer_runtime.errors import SteerError
from steer_runtime.loop import InferenceLoop, LoopEvent
from steer_runtime.shadow import Shadow, ShadowSettings, compare
from steer_runtime.steering.command import Limits
from steer_runtime.steering.engine import SteeringEngine
from steer_runtime.types import LIBERO_ACTION_SPACE, ActionChunk

WAIT_S = 60.0


class Bench:
    """A loop with guard and shadow over the tiny policy, on a clock moved by hand."""

    def __init__(
        self, *, shadow: ShadowSettings | None = None, guard: ChunkLimits | None = None, limits: Limits | None = None
    ) -> None:
        self.policy = fabricate.tiny_policy()
        self.time = Time()
        self.sender = Sender(self.time)
        self.engine = SteeringEngine(
            self.policy,
            [neuron_direction(self.policy, alpha=60.0), dense_direction(self.policy)],
            clock=self.time.steady,
            wall_ns=self.time.wall_ns,
            limits=limits,
        )
        self.chunks: queue.Queue[ActionChunk] = queue.Queue()
        self.events: queue.Queue[LoopEvent] = queue.Queue()
        self.loop = InferenceLoop(
            self.policy,
            self.engine,
            self.chunks.put,
            self.events.put,
            guard=None if guard is None else ChunkGuard(guard),
            shadow=None if shadow is None else Shadow(self.policy, self.engine, shadow),
        )

    def __enter__(self) -> Bench:
        self.loop.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.loop.stop(WAIT_S)

    def command(self, target: str, strength: float, **fields: object) -> Any:
        verdict = self.engine.apply(self.sender.set(target, strength, **fields))
        self.time.now_s += 5.0
        return verdict

    def infer(self, frame: int = 0) -> np.ndarray:
        self.loop.submit(fabricate.make_observation(self.policy, seed=frame))
        return self.chunks.get(timeout=WAIT_S).actions

    def after_shadows(self, count: int) -> None:
        """Until so many shadows have been measured."""
        deadline = time.monotonic() + WAIT_S
        while self.loop.counters["shadow_inferences"] < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def steered_run(shadow: ShadowSettings | None) -> list[np.ndarray]:
    with Bench(shadow=shadow) as bench:
        out = [bench.infer(0)]
        bench.command("up", 1.0)
        out += [bench.infer(1), bench.infer(2)]
        bench.engine.clear_now()
        return [*out, bench.infer(3)]


def test_actions_are_bit_identical_with_and_without_shadows() -> None:
    plain = steered_run(None)
    for every in (0, 1, 2):
        shadowed = steered_run(ShadowSettings(every=every))
        assert all(np.array_equal(a, b) for a, b in zip(plain, shadowed, strict=True)), every


def test_a_shadow_is_the_unsteered_inference_from_the_same_start() -> None:
    policy = fabricate.tiny_policy()
    observation = fabricate.make_observation(policy)
    expected = policy.infer(observation).actions
    with Bench(shadow=ShadowSettings(every=1)) as bench:
        bench.command("up", 1.0)
        steered = bench.infer()
        bench.after_shadows(1)
        assert bench.loop._shadow is not None
        assert bench.loop._shadow.last is not None
        assert bench.loop._shadow.last.most == pytest.approx(float(np.abs(steered - expected)[:, :-1].max()))
        assert len(bench.engine.trace) == 1


def test_nothing_steered_has_no_shadow_and_every_second_steered_inference_has_one() -> None:
    with Bench(shadow=ShadowSettings(every=2)) as bench:
        for frame in range(3):
            bench.infer(frame)
        assert bench.loop.counters["shadow_inferences"] == 0
        bench.command("up", 0.5)
        for frame in range(4):
            bench.infer(frame)
        bench.after_shadows(2)
    assert bench.loop.counters["shadow_inferences"] == 2


@pytest.mark.fault(21)
def test_past_the_bound_strengths_fall_until_another_strength_is_sent() -> None:
    with Bench(shadow=ShadowSettings(every=1, bound=1e-3)) as bench:
        bench.command("up", 1.0)
        moved = float(np.abs(bench.infer() - bench_unsteered())[:, :-1].max())
        assert moved > 1e-3, "the direction must move the actions for this test to say anything"
        bench.after_shadows(1)
        bench.time.now_s += 5.0
        state = bench.engine.state()
        assert state.counters["shadow_backed_off"] == 1
        assert state.active[0].strength == pytest.approx(1e-3 / moved)
        assert state.active[0].backed_off == pytest.approx(1e-3 / moved)
        assert "steering moved an action by" in state.alarms[-1]
        repeated = bench.command("up", 1.0)
        assert repeated.code == "clamped"
        assert "backed off" in repeated.sentence
        assert bench.engine.state().active[0].strength == pytest.approx(1e-3 / moved)
        bench.command("up", 0.9)
        assert bench.engine.state().active[0].strength == pytest.approx(0.9)


def bench_unsteered() -> np.ndarray:
    policy = fabricate.tiny_policy()
    return policy.infer(fabricate.make_observation(policy)).actions


def test_a_dose_past_the_limit_backs_off_to_where_it_fits() -> None:
    with Bench(limits=Limits(max_dose=0.05)) as bench:
        bench.command("drift", 1.0)
        for _ in range(4):
            bench.infer()
            bench.time.now_s += 5.0
        doses = [max(s.dose for s in record.sites if s.dose is not None) for record in bench.engine.trace]
        # In proportion to the strength but for what the change itself does to the stream it is related to.
        assert doses[0] > 0.1
        assert doses[1] < 0.06
        assert doses[-1] <= 0.05 * 1.001
        assert bench.engine.state().counters["dose_backed_off"] >= 1


@pytest.mark.fault(21)
def test_a_chunk_past_the_guard_is_clamped_or_vetoed_and_counted() -> None:
    observed = float(np.abs(bench_unsteered()[:, :-1]).max())
    with Bench(guard=ChunkLimits(bound=observed / 2)) as bench:
        assert np.abs(bench.infer()[:, :-1]).max() == pytest.approx(observed / 2)
        assert bench.loop.counters["clamped_chunks"] == 1
        assert "bound" in bench.engine.state().alarms[-1]
    with Bench(guard=ChunkLimits(bound=observed / 2, on_excess="veto")) as bench:
        bench.loop.submit(fabricate.make_observation(bench.policy))
        assert bench.events.get(timeout=WAIT_S).code == "chunk_vetoed"
        assert bench.chunks.empty()
        assert (bench.loop.counters["vetoed_chunks"], bench.loop.state) == (1, "holding")


def test_a_flow_policy_repeats_its_noise_and_its_memory() -> None:
    policy = fabricate_pi0.tiny_policy()
    observation = fabricate_pi0.make_observation()
    memory = policy.memory()
    first = policy.infer(observation).actions
    after = policy.memory()
    policy.remember(memory)
    assert np.array_equal(policy.infer(observation).actions, first)
    policy.remember(after)
    assert not np.array_equal(policy.infer(observation).actions, first)


def test_a_policy_that_cannot_repeat_an_inference_has_no_shadow() -> None:
    class Forgetful:
        name = "forgetful"

    with pytest.raises(SteerError, match="leave the shadow off"):
        Shadow(Forgetful(), None, ShadowSettings(every=1))  # type: ignore[arg-type]


def test_comparing_counts_turned_grippers_apart_from_motion() -> None:
    rows = np.zeros((2, 7), np.float32)
    other = rows.copy()
    other[:, 6], other[1, 2] = (1.0, 1.0), 0.25
    rows[:, 6] = (-1.0, 1.0)
    one, two = (ActionChunk(r, LIBERO_ACTION_SPACE, {}) for r in (rows, other))
    assert dataclasses.astuple(compare(one, two)) == (0.25, 1)
    assert math.isinf(ShadowSettings().bound)
