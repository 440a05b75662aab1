"""Set points in the simulator: conditions, what a loop is shown, how traces are judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fabricate
import numpy as np
import pytest

from sim.evaluation.episodes import Trial
from sim.evaluation.hold import (
    FIXED,
    HeldAxis,
    HeldPolicy,
    HoldCondition,
    hold_conditions,
    hold_trials,
    run_held,
    sample_of,
)
from sim.evaluation.hold_chart import draw_hold
from sim.evaluation.hold_measures import best_fixed, measures_of, outcomes, stair, summarise
from steer_runtime.directions.direction import Axis, Direction, Neurons
from steer_runtime.directions.store import DirectionStore
from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.policy import TOWER, OpenVLAPolicy
from steer_runtime.setpoint.limits import StrengthLimits
from steer_runtime.setpoint.presets import tuning
from steer_runtime.setpoint.target import parse_target
from steer_runtime.types import LIBERO_ACTION_SPACE, ActionChunk, Observation

TARGET = parse_target("speed", ["0.12", "m/s"])
PERIOD_NS = 200_000_000


@pytest.fixture(scope="module")
def policy() -> OpenVLAPolicy:
    return fabricate.tiny_policy(fabricate.tiny_config(chunk=2))


def end(policy: OpenVLAPolicy, name: str, sign: float, **changes: Any) -> Direction:
    tower = policy.towers[TOWER]
    values = {
        "op": "override",
        "neurons": Neurons(np.zeros(3, np.int32), np.arange(3, dtype=np.int32), np.full(3, sign * 2.0, np.float32)),
        **changes,
    }
    return Direction(name, TOWER, policy.model_hash, tower.layers, tower.d_model, tower.d_ff, **values)


@pytest.fixture(scope="module")
def axis(policy: OpenVLAPolicy) -> HeldAxis:
    negative, positive = end(policy, "slow", -1.0), end(policy, "fast", 1.0, max_strength=0.8, calibrated=(0.1, 0.6))
    return HeldAxis(Axis("speed", "slow", "fast"), negative, positive)


def observation(frame: int, x: float, *, fingers: float = 0.04) -> Observation:
    state = np.array([x, 0.0, 0.3, 0.0, 0.0, 0.0, fingers, -fingers])
    images = {
        name: np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8) for name in ("agentview", "wrist")
    }
    return Observation(images, state, "pick up the soup", stamp_ns=frame * PERIOD_NS, frame_id=frame)


def test_conditions_are_unsteered_then_fixed_then_loops_then_each_strong_scale() -> None:
    made = hold_conditions((-1.0, 0.0, 0.7), ("pid",), (2.0,), ("pid",))
    assert [c.key for c in made] == ["off", "fixed-1", "fixed+0.7", "pid", "fixed-2-x2", "fixed+2-x2", "pid-x2"]


@pytest.mark.parametrize("scale", [1.0, 0.5, -2.0, float("nan"), 1000.0])
def test_scale_that_is_not_strong_is_refused(scale: float) -> None:
    with pytest.raises(SteerError) as caught:
        hold_conditions((), (), (scale,), ())
    assert caught.value.code == "bad_scale"


def test_range_of_a_loop_is_what_the_cards_have_shown(axis: HeldAxis) -> None:
    assert (axis.low, axis.high) == (-1.0, 0.6)


def test_scaled_axis_has_its_alphas_times_the_factor_and_names_of_its_own(axis: HeldAxis) -> None:
    strong = axis.scaled(3.0)
    assert strong.axis == Axis("speed-x3", "slow-x3", "fast-x3")
    assert strong.positive.neurons is not None
    assert strong.positive.neurons.alpha.tolist() == [6.0] * 3
    assert strong.positive.provenance["of"] == axis.positive.id
    assert axis.scaled(1.0) is axis


def test_operation_that_cannot_be_made_stronger_is_refused(policy: OpenVLAPolicy) -> None:
    ablating = HeldAxis(Axis("a", "b", "c"), end(policy, "b", 1.0, op="ablate"), end(policy, "c", 1.0))
    with pytest.raises(SteerError) as caught:
        ablating.scaled(2.0)
    assert caught.value.code == "not_scalable"


def test_axis_is_read_from_a_store(tmp_path: Path, axis: HeldAxis, policy: OpenVLAPolicy) -> None:
    store = DirectionStore(tmp_path)
    store.save_all([axis.negative, axis.positive])
    store.save_axis(axis.axis)
    found = HeldAxis.load(store, "speed", policy.model_hash)
    assert found.axis == axis.axis
    assert (found.negative.hash, found.positive.hash) == (axis.negative.hash, axis.positive.hash)


def test_sample_is_what_a_node_would_be_told() -> None:
    made = sample_of(observation(3, 0.1, fingers=0.02), LIBERO_ACTION_SPACE, 1.0)
    assert (made.time_s, made.opening, made.closed) == (pytest.approx(0.6), pytest.approx(0.04), True)
    assert made.position.tolist() == [0.1, 0.0, 0.3]
    assert sample_of(observation(0, 0.0), LIBERO_ACTION_SPACE, None).closed is None
    assert sample_of(observation(0, 0.0), LIBERO_ACTION_SPACE, -1.0).closed is False


def ride(held: HeldPolicy, condition: HoldCondition, speed: float, frames: int = 12) -> list[ActionChunk]:
    """Chunks of an episode in which the hand goes straight, whatever the policy does."""
    infer = held.infer_for(condition, tuning(condition.kind, "speed") if condition.closed else None)
    return [infer(observation(k, speed * k * PERIOD_NS / 1e9)) for k in range(frames)]


def test_loop_moves_the_strength_towards_the_target_within_its_limits_and_logs_it(
    policy: OpenVLAPolicy, axis: HeldAxis
) -> None:
    limits = StrengthLimits(axis.low, axis.high, slew_per_s=1.0)
    with HeldPolicy(policy, axis, [1.0], TARGET, limits) as held:
        ride(held, HoldCondition("pid"), 0.05)
        slow = held.log
        ride(held, HoldCondition("pid"), 0.30)
        fast = held.log
    for log, sign in ((slow, 1.0), (fast, -1.0)):
        strengths = np.array(log["strength"])
        assert strengths[0] == 0.0
        assert strengths[-1] * sign > 0.3
        assert np.abs(np.diff(strengths)).max() <= 1.0 * 0.2 + 1e-5
        assert strengths.min() >= axis.low
        assert strengths.max() <= axis.high
        measured = [value for value in log["value"] if value is not None]
        assert measured == pytest.approx([0.05 if sign > 0 else 0.30] * len(measured))
        assert log["dose"][-1] > 0
    assert slow["why"][0] == "first sample"


def test_fixed_and_unsteered_conditions_are_measured_by_the_same_meter(policy: OpenVLAPolicy, axis: HeldAxis) -> None:
    with HeldPolicy(policy, axis, [1.0, 2.0], TARGET, StrengthLimits(axis.low, axis.high)) as held:
        off = ride(held, HoldCondition("off"), 0.1)
        assert set(held.log["strength"]) == {0.0}
        assert {v for v in held.log["value"] if v is not None} == {0.1}
        ride(held, HoldCondition(FIXED, -2.0, 2.0), 0.1)
        assert {v for v in held.log["value"] if v is not None} == {0.1}
        assert set(held.log["strength"]) == {-2.0}
    policy.reset(None)
    plain = [policy.infer(observation(k, 0.1 * k * PERIOD_NS / 1e9)) for k in range(12)]
    assert all(np.array_equal(a.actions, b.actions) for a, b in zip(off, plain, strict=True))


def test_strength_one_at_a_scale_writes_what_its_alphas_say(policy: OpenVLAPolicy, axis: HeldAxis) -> None:
    with HeldPolicy(policy, axis, [3.0], TARGET, StrengthLimits(axis.low, axis.high)) as held:
        strong = ride(held, HoldCondition(FIXED, -3.0, 3.0), 0.1, 1)[0]
    by_hand = HeldAxis(axis.axis, end(policy, "slow", -3.0), axis.positive)
    with HeldPolicy(policy, by_hand, [1.0], TARGET, StrengthLimits()) as held:
        same = ride(held, HoldCondition(FIXED, -1.0), 0.1, 1)[0]
    assert np.array_equal(strong.actions, same.actions)


def test_dose_that_exceeds_its_limit_is_counted_and_cut_back_at_once(policy: OpenVLAPolicy, axis: HeldAxis) -> None:
    with HeldPolicy(policy, axis, [1.0], TARGET, StrengthLimits(axis.low, axis.high)) as held:
        ride(held, HoldCondition("pid"), 0.30)
        free = max(held.log["dose"])
    with HeldPolicy(policy, axis, [1.0], TARGET, StrengthLimits(axis.low, axis.high, dose=free / 2)) as held:
        ride(held, HoldCondition("pid"), 0.30)
        doses = np.array(held.log["dose"])
        counters = held.counters
    exceeded = np.flatnonzero(doses > free / 2)
    assert doses.max() > 0
    assert counters["limit: dose"] > 0
    # Doses of a policy that answers itself are not quite in proportion, so that the limit may be seen from above once.
    assert len(exceeded) == counters.get("limit: dose_exceeded", 0) <= 1


def test_every_layout_runs_under_every_condition_and_lines_carry_the_trace(
    policy: OpenVLAPolicy, axis: HeldAxis
) -> None:
    conditions = hold_conditions((0.5,), ("pid",), (), ())
    planned = hold_trials([Trial("layout0", 0, "random", 7), Trial("layout1", 1, "random", 8)], conditions)
    assert list(planned)[:3] == ["hold-layout0-off", "hold-layout0-fixed+0.5", "hold-layout0-pid"]
    assert {trial.seed for trial, _ in planned.values()} == {7, 8}

    def run(infer_for, also) -> list[dict[str, Any]]:
        rows = []
        for trial, _ in planned.values():
            infer = infer_for(trial)
            for k in range(4):
                infer(observation(k, 0.02 * k))
            rows.append({"key": trial.key, **also(trial)})
        return rows

    with HeldPolicy(policy, axis, [1.0], TARGET, StrengthLimits(axis.low, axis.high)) as held:
        rows = run_held(held, planned, {"pid": tuning("pid", "speed")}, run)
    assert [len(row["trace"]["t"]) for row in rows] == [4] * 6
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert rows[2]["loop"]["updates"] == 4
    assert rows[0]["loop"] == {}


def trace(values: list[float | None], strengths: list[float] | None = None, said: str = "usually") -> dict[str, Any]:
    n = len(values)
    return {
        "t": [0.2 * k for k in range(n)], "value": values, "raw": values, "why": [""] * n,
        "strength": strengths or [0.0] * n, "dose": [0.0] * n, "said": [said] * n,
    }  # fmt: skip


def test_measures_of_a_step_that_overshoots_and_settles() -> None:
    held = measures_of(trace([None, 0.06, 0.09, 0.15, 0.13, 0.12, 0.12, None]), 0.12)
    assert held.settling_s == pytest.approx(0.6)
    assert held.overshoot == pytest.approx(0.03 / 0.12)
    assert held.bias == pytest.approx(np.mean([-0.06, -0.03, 0.03, 0.01, 0, 0]))
    assert held.rmse == pytest.approx(np.sqrt(np.mean(np.square([0.06, 0.03, 0.03, 0.01, 0, 0]))))
    assert held.within == pytest.approx(3 / 6)
    assert held.measurable == pytest.approx(6 / 8)


def test_episode_that_ends_outside_the_band_has_not_settled() -> None:
    assert measures_of(trace([0.12, 0.12, 0.20]), 0.12).settling_s is None


def test_overshoot_is_beyond_the_target_as_seen_from_the_start() -> None:
    assert measures_of(trace([0.20, 0.16, 0.13]), 0.12).overshoot == 0.0
    assert measures_of(trace([0.20, 0.16, 0.09]), 0.12).overshoot == pytest.approx(0.25)


def test_nothing_measurable_is_no_error_of_zero() -> None:
    held = measures_of(trace([None, None]), 0.12)
    assert (held.rmse, held.bias, held.settling_s, held.measurable) == (None, None, None, 0.0)


def row(condition: str, seed: int, values: list[float | None], done: bool = True, **changes: Any) -> dict[str, Any]:
    said = changes.pop("said", "usually")
    strengths = changes.pop("strengths", None)
    return {
        "condition": condition, "seed": seed, "task_id": seed, "done": done, "trace": trace(values, strengths, said),
        **changes,
    }  # fmt: skip


def experiment() -> tuple[list[dict[str, Any]], list[HoldCondition]]:
    conditions = hold_conditions((-0.5,), ("pid",), (2.0,), ("pid",))
    rows = []
    for seed in range(8):
        rows += [
            row("off", seed, [0.16] * 6),
            row("fixed-0.5", seed, [0.14] * 6, strengths=[-0.5] * 6, said="calmly"),
            row("pid", seed, [0.13 + 0.001 * seed] * 6, strengths=[-0.1, -0.2, -0.3, -0.4, -0.5, -0.5]),
            row("fixed-2-x2", seed, [0.02] * 6, done=seed == 0, strengths=[-2.0] * 6),
            row("fixed+2-x2", seed, [0.25] * 6),
            row("pid-x2", seed, [0.13] * 6),
        ]
    return [*rows, {"condition": "off", "seed": 99, "task_id": 0, "refused": "no layout"}], conditions


def test_summary_tells_each_condition_the_pairs_and_the_lost_episodes() -> None:
    rows, conditions = experiment()
    found = outcomes(rows, 0.12)
    assert len(found) == 48
    assert best_fixed(found, conditions) == "fixed-0.5"
    lines = {line.what: line for line in summarise(found, conditions, "cm/s", 0.01)}
    against = lines["pid minus fixed-0.5: error (RMSE)"]
    assert against.value == pytest.approx(-0.65)
    assert against.high is not None
    assert against.high < 0
    lost = next(line for what, line in lines.items() if what.startswith("fixed-2-x2 against off"))
    assert "won 0, lost 7" in lost.what
    assert lost.value == pytest.approx(2 * 0.5**7)
    assert any(what.startswith("pid-x2 against fixed-2-x2: pairs won 7, lost 0") for what in lines)
    assert not any(what.startswith("pid-x2 against fixed-0.5") for what in lines)
    assert lines["off: error (RMSE)"].value == pytest.approx(4.0)


def test_stair_counts_what_was_said_at_each_strength_of_the_axis_itself() -> None:
    rows, conditions = experiment()
    steps = stair(rows, conditions)
    assert steps["-0.5"] == {"calmly": 48, "usually": 16}
    assert steps["-0.4"] == {"usually": 8}
    assert "-2" not in steps


def test_page_holds_every_condition_drawn_and_loads_nothing(tmp_path: Path) -> None:
    rows, conditions = experiment()
    page = draw_hold(rows, conditions, TARGET, stair(rows, conditions), "a title", tmp_path / "hold.html")
    text = page.read_text()
    assert all(f'"{c.key}"' in text for c in conditions)
    assert "a title" in text
    assert 'src="http' not in text
