"""The desk admits good commands and refuses bad ones whole, each with a reason."""

from __future__ import annotations

import math

import fabricate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_runtime.directions.direction import Axis
from steer_runtime.errors import SteerError
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


def test_only_listed_sources_steer_and_anybody_may_stop(time: Time) -> None:
    engine = engine_at(time, sources=frozenset({"anna", "hold:*"}))
    anna, ben = Sender(time, "anna"), Sender(time, "ben")
    assert engine.apply(Sender(time, "hold:host:17").set("speed", 0.5)).accepted
    assert engine.apply(anna.clear_all()).accepted
    refused = engine.apply(ben.set("up", 0.5))
    assert (refused.accepted, refused.code) == (False, "source_not_allowed")
    assert "'anna'" in refused.sentence
    assert engine.apply(anna.set("up", 0.5)).accepted
    assert engine.apply(ben.clear("up")).code == "source_not_allowed"
    assert engine.state().active[0].source == "anna"
    assert engine.apply(ben.clear_all()).accepted
    assert engine.state().active == ()


def test_a_refused_source_does_not_use_up_its_numbers(time: Time) -> None:
    engine = engine_at(time, sources=frozenset({"anna"}))
    ben = Sender(time, "ben")
    engine.apply(ben.set("up", 0.5, sequence=50))
    assert engine.apply(ben.clear_all(sequence=1)).accepted


def test_what_a_silent_source_holds_is_released_over_the_release_time(time: Time) -> None:
    engine, sender = engine_at(time, source_timeout_s=1.0, release_s=0.5), Sender(time)
    engine.apply(sender.set("up", 0.5))
    engine.apply(sender.set("speed", 0.5, hold_s=60.0))
    time.now_s += 0.9
    engine.apply(sender.set("up", 0.5))  # any admitted command shows that the source lives
    time.now_s += 0.9
    assert [a.strength for a in engine.state().active] == [0.5, 0.5]
    engine.apply(sender.set("nothing-like-it", 0.5))  # a refused one does not
    time.now_s += 0.35
    assert [round(a.strength, 3) for a in engine.state().active] == [0.25, 0.25]
    time.now_s += 0.26
    assert engine.state().active == ()


def test_a_living_source_does_not_outlast_its_hold(time: Time) -> None:
    engine, sender = engine_at(time, source_timeout_s=1.0), Sender(time)
    engine.apply(sender.set("up", 0.5, hold_s=1.5))
    for _ in range(4):
        time.now_s += 0.5
        engine.apply(sender.set("speed", 0.5))
    assert [a.target for a in engine.state().active] == ["speed"]


@pytest.mark.parametrize(
    ("limits", "largest", "why"),
    [
        ({"max_strength": 0.4}, 0.4, "this robot"),
        ({"max_strengths": {"fast": 0.3}}, 0.3, "for it"),
        ({"max_dose": 0.1, "doses": {"fast": 0.5}}, 0.2, "a dose of 0.1"),
        ({"max_dose": 0.1, "doses": {"slow": 0.5}}, 1.0, ""),
    ],
)
def test_limits_of_the_robot_clamp_or_refuse_and_say_which(
    time: Time, limits: dict[str, object], largest: float, why: str
) -> None:
    engine = engine_at(time, **limits)
    assert engine.largest_strength("fast") == pytest.approx(largest)
    verdict = engine.apply(Sender(time).set("speed", 1.0))
    assert (verdict.accepted, verdict.applied_strength) == (True, pytest.approx(largest))
    if largest == 1.0:
        assert verdict.code == "accepted"
        return
    assert verdict.code == "clamped"
    assert why in verdict.sentence
    refused = engine_at(time, **limits, over_limit="reject").apply(Sender(time).set("speed", 1.0))
    assert (refused.accepted, refused.code) == (False, "over_limit")
    assert why in refused.sentence


@pytest.mark.parametrize("limits", [{"max_strengths": {"fest": 0.3}}, {"doses": {"fast": math.nan}}])
def test_a_limit_of_what_is_not_loaded_or_that_is_none_is_refused(time: Time, limits: dict[str, object]) -> None:
    with pytest.raises(SteerError, match="fast"):
        engine_at(time, **limits)


def test_backing_off_leaves_releases_alone_and_scales_what_is_applied(time: Time) -> None:
    engine, sender = engine_at(time, release_s=1.0), Sender(time)
    engine.apply(sender.set("up", 0.8, ramp_s=0.1, hold_s=1.0))
    engine.apply(sender.set("speed", 1.0, ramp_s=4.0))
    time.now_s += 1.5  # one is half released, the other not half way
    engine.back_off(0.5, "tested", "too far")
    time.now_s += 0.25
    strengths = {a.target: (a.strength, a.commanded, a.backed_off) for a in engine.state().active}
    assert strengths["up"][0] == pytest.approx(0.2)
    assert strengths["speed"] == pytest.approx((0.1875, 0.1875, 0.1875))
    assert engine.state().counters["tested"] == 1
    assert engine.state().alarms == ("too far",)


def test_what_is_backed_off_to_nothing_is_not_lifted_by_a_repetition(time: Time) -> None:
    engine, sender = engine_at(time), Sender(time)
    engine.apply(sender.set("up", 0.5, ramp_s=0.0))
    time.now_s += 1.0
    engine.back_off(0.0, "tested", "far too far")
    time.now_s += 1.0
    assert engine.apply(sender.set("up", 0.5, ramp_s=0.0)).code == "clamped"
    time.now_s += 1.0
    assert engine.state().active[0].strength < 1e-5
