"""What an action tells is in the right units, and a name claims what its words say."""

from __future__ import annotations

import math
from dataclasses import replace

import fabricate
import numpy as np
import pytest

from steer_runtime.directions.direction import Axis, Direction
from steer_runtime.directions.observables import claim_of, derived, motion, off_axis, parse_on, read
from steer_runtime.errors import SteerError
from steer_runtime.moments import Moment
from steer_runtime.types import LIBERO_ACTION_SPACE, ActionSpace


def named(name: str, **provenance: object) -> Direction:
    vector = {0: np.ones(4, np.float32)}
    return Direction(
        name=name,
        tower="lm",
        model_hash="a" * 64,
        layers=1,
        d_model=4,
        d_ff=4,
        op="add",
        dense=vector,
        provenance=provenance,
    )


def test_motion_is_in_units_of_the_action_space() -> None:
    told = motion(np.array([0.6, 0.0, -0.8, 0.3, 0.4, 0.0, -1.0]), LIBERO_ACTION_SPACE)
    assert told["speed"] == pytest.approx(0.05 * 20)  # full action: 5 cm a step, 20 steps a second
    assert (told["dx"], told["dy"], told["dz"]) == pytest.approx((3.0, 0.0, -4.0))
    assert told["rotation"] == pytest.approx(math.degrees(0.5 * 0.5))
    assert told["gripper"] == 1.0
    assert motion(np.array([0, 0, 0, 0, 0, 0, 1.0]), LIBERO_ACTION_SPACE)["gripper"] == 0.0


def test_another_sign_of_the_gripper_and_no_rotation_are_read_right() -> None:
    space = replace(LIBERO_ACTION_SPACE, rotation="none", gripper_open=1.0, gripper_close=0.0)
    told = motion(np.array([0, 0, 0, 0, 0, 0, 0.25]), space)
    assert told["gripper"] == 0.25
    assert "rotation" not in told


def test_joint_actions_are_refused() -> None:
    space = ActionSpace("joint_delta", "none", "base", 0.05, 0.5, 20.0, -1.0, 1.0)
    with pytest.raises(SteerError, match="tells no motion of the hand") as caught:
        motion(np.zeros(7), space)
    assert caught.value.code == "no_observables"


@pytest.mark.parametrize(
    ("name", "claim"),
    [
        ("slow", ("speed", -1.0, "speed")),
        ("fast-word-6", ("speed", 1.0, "speed")),
        ("speed-negative", ("speed", -1.0, "speed")),
        ("speed_slow", ("speed", -1.0, "speed")),
        ("height-down.token", ("dz", -1.0, "height")),
        ("up", ("dz", 1.0, "height")),
        ("careful", ("near_speed", -1.0, "careful")),
        ("careful-negative", ("near_speed", 1.0, "careful")),
        ("gripper-close", ("gripper", -1.0, "gripper")),
    ],
)
def test_a_name_claims_what_its_words_say(name: str, claim: tuple[str, float, str]) -> None:
    found = claim_of(named(name))
    assert found is not None
    assert (found.observable, found.sign, found.axis) == claim


@pytest.mark.parametrize("name", ["thing", "upset", "slow-and-high", "fast-slow"])
def test_a_name_of_no_known_or_of_contrary_words_claims_nothing(name: str) -> None:
    assert claim_of(named(name)) is None


def test_the_end_of_an_axis_is_told_by_the_axis_before_the_name() -> None:
    axes = [Axis("speed-7", "one", "fast-two")]
    one = claim_of(named("one"), axes)
    assert one is not None
    assert (one.observable, one.sign) == ("speed", -1.0)
    assert claim_of(named("one"), [Axis("thing", "one", "other")]) is None


def test_provenance_tells_where_the_name_does_not() -> None:
    claim = claim_of(named("thing", axis="height", end="negative"))
    assert claim is not None
    assert (claim.observable, claim.sign, claim.source) == ("dz", -1.0, "its provenance")


def test_on_takes_axes_and_observables_and_refuses_others() -> None:
    assert (parse_on("-height").observable, parse_on("-height").sign) == ("dz", -1.0)
    assert (parse_on("careful").observable, parse_on("careful").sign) == ("near_speed", -1.0)
    assert parse_on("said_pace").observable == "said_pace"
    with pytest.raises(SteerError, match="observable 'sped' is not known: the nearest are 'speed'"):
        parse_on("sped")


@pytest.mark.parametrize("on", ["speed", "near_speed", "dz", "carry_dz", "gripper", "entropy", "said_pace"])
def test_nothing_is_off_its_own_axis(on: str) -> None:
    others = off_axis(on)
    assert on not in others
    assert {"entropy", "rotation", "gripper"} - {on} <= set(others)
    if on == "speed":
        assert not {"dx", "dy", "dz", "near_speed"} & set(others)


def test_derived_values_are_told_at_their_phases_only() -> None:
    still = {"speed": [1.0, 2.0, 3.0], "dx": [1.0, 0.0, 0.0], "dy": [0.0, 0.0, 0.0], "dz": [0.0, 2.0, 0.0]}
    moved = {"speed": [4.0, 5.0, 6.0], "dx": [3.0, 3.0, 3.0], "dy": [4.0, 4.0, 4.0], "dz": [0.0, 9.0, 0.0]}
    out = derived(moved, still, ["descend", "carry", "approach"])
    np.testing.assert_array_equal(out["near_speed"], [4.0, np.nan, np.nan])
    np.testing.assert_array_equal(out["far_speed"], [np.nan, 5.0, 6.0])
    np.testing.assert_array_equal(out["carry_dz"], [np.nan, 9.0, np.nan])
    # Unsteered along x, along z, and at rest: what is left at right angles to it.
    np.testing.assert_allclose(out["sideways"], [4.0, 5.0, 5.0])


def test_the_executed_reading_is_the_action_and_the_expected_one_the_mean_over_bins() -> None:
    policy = fabricate.tiny_policy(seed=3)
    observation = fabricate.make_observation(policy, seed=1)
    told = read(policy, Moment(observation, -1.0, "carry"))
    policy.reset()
    action = policy.infer(observation).actions[0]
    assert told["executed"] | {"entropy": 0} == motion(action, policy.action_space) | {"entropy": 0}
    logits = policy.logits(observation)[:7, 64:320].double()
    weights = logits.softmax(-1).numpy()
    assert told["executed"]["entropy"] == pytest.approx(float(-(weights * np.log(weights)).sum(-1).mean()), rel=1e-5)
    assert told["expected"]["entropy"] == told["executed"]["entropy"]
    # Token 64 + i is bin 255 - i: larger ids mean smaller values, and the last bin shares the last centre.
    centres = policy.actions.centres[np.clip(255 - np.arange(256), 0, 254)]
    mean = policy.statistics.unnormalise(weights @ centres)
    assert told["expected"]["dz"] == pytest.approx(100 * 0.05 * mean[2], rel=1e-5)
    assert told["expected"]["gripper"] == pytest.approx(mean[6], rel=1e-5)
