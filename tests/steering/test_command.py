"""The desk admits good commands and refuses bad ones whole, each with a reason."""

from __future__ import annotations

import math

import fabricate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_runtime.directions.direction import Axis
from steer_runtime.steering.command import Limits, SteeringCommand
from steer_runtime.steering.engine import SteeringEngine
from steering.subjects import Sender, Time, neuron_direction

POLICY = fabricate.tiny_policy()


@pytest.fixture
def time() -> Time:
    return Time()


def engine_at(time: Time, **limits: object) -> SteeringEngine:
    directions = [
        neuron_direction(POLICY, "up", [(0, 1)], max_strength=0.8),
        neuron_direction(POLICY, "slow", [(0, 2)], max_strength=0.5),
        neuron_direction(POLICY, "fast", [(0, 3)]),
    ]
    return SteeringEngine(
        POLICY,
        directions,
        [Axis("speed", "slow", "fast")],
        clock=time.steady,
        wall_ns=time.wall_ns,
        limits=Limits(**limits),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf, 1e300, 10**400])
def test_strengths_that_are_no_float32_are_refused(time: Time, strength: float) -> None:
    verdict = engine_at(time).apply(Sender(time).set("up", strength))
    assert (verdict.accepted, verdict.code) == (False, "not_finite")


def test_an_unknown_direction_names_the_nearest(time: Time) -> None:
    verdict = engine_at(time).apply(Sender(time).set("fst", 0.5))
    assert verdict.code == "unknown_direction"
    assert "'fast'" in verdict.sentence


def test_a_direction_may_be_named_with_its_hash(time: Time) -> None:
    engine, sender = engine_at(time), Sender(time)
    assert engine.apply(sender.set(engine.directions["up"].id, 0.5)).accepted
    assert engine.apply(sender.set("up@000000000000", 0.5)).code == "unknown_direction"


def test_over_the_limit_is_clamped_and_said(time: Time) -> None:
    engine, sender = engine_at(time), Sender(time)
    verdict = engine.apply(sender.set("up", 5.0))
    assert (verdict.accepted, verdict.code, verdict.applied_strength) == (True, "clamped", 0.8)
    assert engine.apply(sender.set("speed", -1.0)).applied_strength == -0.5
    assert engine.apply(sender.set("up", -0.5)).applied_strength == 0.0
    assert engine.state().counters["clamped"] == 3


def test_over_the_limit_is_refused_when_the_policy_says_so(time: Time) -> None:
    engine = engine_at(time, over_limit="reject")
    assert engine.apply(Sender(time).set("up", 0.81)).code == "over_limit"
    assert engine.state().active == ()


def test_stale_and_future_stamps_are_refused(time: Time) -> None:
    engine, sender = engine_at(time), Sender(time)
    assert engine.apply(sender.set("up", 0.5, stamp_ns=time.wall_ns() - 2 * 10**9)).code == "stale"
    assert engine.apply(sender.set("up", 0.5, stamp_ns=time.wall_ns() + 2 * 10**9)).code == "future"


def test_duplicates_and_older_ones_are_ignored(time: Time) -> None:
    engine, sender = engine_at(time), Sender(time)
    assert engine.apply(sender.set("up", 0.5, sequence=7)).accepted
    assert engine.apply(sender.set("up", 0.1, sequence=7)).code == "duplicate"
    assert engine.apply(sender.set("up", 0.1, sequence=6)).code == "duplicate"
    assert engine.state().active[0].commanded == 0.5


def test_an_older_session_is_ignored(time: Time) -> None:
    engine = engine_at(time)
    assert engine.apply(Sender(time, epoch=5).set("up", 0.5)).accepted
    assert engine.apply(Sender(time, epoch=4).set("up", 0.1, sequence=99)).code == "old_epoch"
    assert engine.apply(Sender(time, epoch=6).set("up", 0.2)).accepted  # numbers start again in a new session


def test_priority_then_newest_owns_a_target(time: Time) -> None:
    engine = engine_at(time)
    anna, ben = Sender(time, "anna"), Sender(time, "ben")
    assert engine.apply(anna.set("up", 0.5, priority=2)).accepted
    refused = engine.apply(ben.set("up", 0.1, priority=1))
    assert refused.code == "other_owner"
    assert "'anna'" in refused.sentence
    assert engine.apply(ben.clear("up", priority=1)).code == "other_owner"
    assert engine.apply(ben.set("up", 0.1, priority=2)).accepted
    assert engine.state().active[0].source == "ben"


def test_anyone_may_clear_everything(time: Time) -> None:
    engine = engine_at(time)
    engine.apply(Sender(time, "anna").set("up", 0.5, priority=9))
    assert engine.apply(Sender(time, "ben").clear_all()).accepted
    assert engine.state().active == ()


def test_a_refused_command_changes_nothing(time: Time) -> None:
    engine, sender = engine_at(time), Sender(time)
    engine.apply(sender.set("up", 0.5))
    before = engine.state()
    for bad in (
        sender.set("up", math.nan),
        sender.set("nope", 0.1),
        sender.set("up", 0.1, ramp_s=-1.0),
        sender.set("up", 0.1, hold_s=math.inf),
        sender.set("up", 0.1, span=frozenset()),
        sender.set("up", 0.1, span=frozenset({"sound"})),
        sender.set("u\0p", 0.1),
        sender.set("x" * 10**6, 0.1),
        sender.set("up", "0.1"),  # type: ignore[arg-type]
        sender.set("up", True),
        sender.set("up", 0.1, source=""),
        sender.set("up", 0.1, op="explode"),
        sender.set("up", 0.1, priority=2**70),
        sender.set("up", 0.1, sequence=1.5),
    ):
        verdict = engine.apply(bad)
        assert not verdict.accepted, bad
        assert len(verdict.sentence) < 400
    after = engine.state()
    assert (after.steering, after.active) == (before.steering, before.active)
    assert after.counters["refused"] == 14


def test_too_many_targets_are_refused(time: Time) -> None:
    engine, sender = engine_at(time, max_targets=1), Sender(time)
    assert engine.apply(sender.set("up", 0.5)).accepted
    assert engine.apply(sender.set("speed", 0.5)).code == "too_many_targets"
    assert engine.apply(sender.set("up", 0.4)).accepted


def test_a_ramp_starts_where_the_strength_is(time: Time) -> None:
    engine, sender = engine_at(time), Sender(time)
    engine.apply(sender.set("speed", 1.0, ramp_s=2.0))
    time.now_s += 1.0
    engine.apply(sender.set("speed", -0.5, ramp_s=1.0))
    strengths = []
    for _ in range(3):
        strengths.append(engine.state().active[0].strength)
        time.now_s += 0.5
    assert strengths == pytest.approx([0.5, 0.0, -0.5])


def test_sequence_counts_accepted_changes_only(time: Time) -> None:
    engine, sender = engine_at(time), Sender(time)
    first = engine.apply(sender.set("up", 0.5)).steering
    engine.apply(sender.set("up", math.nan))
    second = engine.apply(sender.set("up", 0.6)).steering
    assert second.sequence == first.sequence + 1
    assert second.epoch == first.epoch


@settings(max_examples=200, deadline=None)
@given(
    fields=st.fixed_dictionaries(
        {
            "source": st.one_of(st.text(max_size=200), st.none()),
            "epoch": st.one_of(st.integers(), st.floats()),
            "sequence": st.one_of(st.integers(), st.text(max_size=5)),
            "stamp_ns": st.integers(-(2**70), 2**70),
            "op": st.one_of(st.sampled_from(["set", "clear", "clear_all"]), st.text(max_size=10)),
            "target": st.one_of(st.text(max_size=200), st.integers()),
            "strength": st.one_of(st.floats(), st.integers(), st.text(max_size=3), st.none()),
            "ramp_s": st.one_of(st.none(), st.floats(), st.text(max_size=3)),
            "hold_s": st.one_of(st.none(), st.floats()),
            "priority": st.one_of(st.integers(), st.booleans()),
        }
    )
)
def test_no_command_makes_the_engine_raise(fields: dict[str, object]) -> None:
    time = Time()
    verdict = engine_at(time).apply(SteeringCommand(**fields))  # type: ignore[arg-type]
    assert verdict.accepted or verdict.sentence
