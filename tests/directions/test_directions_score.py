"""A score is the effect that there is: exact where it can be worked out by hand, nothing where nothing was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fabricate
import numpy as np
import pytest
import torch

from steer_runtime.directions.direction import Axis, Direction, Neurons
from steer_runtime.directions.observables import Claim, motion
from steer_runtime.directions.score import OFF, Condition, Plan, choose, content, measure, measurements, plan, spread
from steer_runtime.directions.score_summary import DAMAGE_FLOOR, POOLED, Score, Summary, summarise
from steer_runtime.directions.store import DirectionStore
from steer_runtime.errors import SteerError
from steer_runtime.moments import Moment, load_moments, save_moments
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.types import Observation

TARGET = 64 + 40  # an action token: bin 255 - 40
SPEED = Claim("speed", 1.0, "speed", "test")


@pytest.fixture(scope="module")
def policy() -> OpenVLAPolicy:
    """A tiny policy whose final norm has unit gain and one of whose action tokens points far along one coordinate."""
    made = fabricate.tiny_policy(seed=5)
    with torch.no_grad():
        made.model.language_model.model.norm.weight.fill_(1.0)
        made.unembedding[64:320, 0] = 0.0
        made.unembedding[TARGET] = 0.0
        made.unembedding[TARGET, 0] = 3.0
    return made


@pytest.fixture(scope="module")
def file(policy: OpenVLAPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    phases = ["approach", "descend", "lift", "lower"]
    moments = [
        Moment(fabricate.make_observation(policy, seed=i, size=64), -1.0, phases[i], episode=f"demo_{i % 3}")
        for i in range(4)
    ]
    path = tmp_path_factory.mktemp("moments") / "m.safetensors"
    save_moments(path, moments, {})
    return path


@pytest.fixture(scope="module")
def moments(file: Path) -> list[Moment]:
    return load_moments(file)[0]


def dense(policy: OpenVLAPolicy, vector: np.ndarray, site: int = 3, name: str = "fast", **changes: Any) -> Direction:
    base: dict[str, Any] = {
        "name": name, "tower": "lm", "model_hash": policy.model_hash, "layers": 3, "d_model": 32, "d_ff": 64, "op": "add",
        "dense": {site: vector.astype(np.float32)}, "provenance": {"finder": "planted"},
    }  # fmt: skip
    return Direction(**(base | changes))


def neurons(policy: OpenVLAPolicy, alpha: float = 8.0, **changes: Any) -> Direction:
    written = Neurons(np.array([1, 2], np.int32), np.array([5, 9], np.int32), np.array([alpha, -alpha], np.float32))
    return Direction(
        **{
            "name": "up", "tower": "lm", "model_hash": policy.model_hash, "layers": 3, "d_model": 32, "d_ff": 64,
            "neurons": written, "provenance": {"finder": "token"}, **changes,
        }
    )  # fmt: skip


def planted(policy: OpenVLAPolicy, **changes: Any) -> Direction:
    """Far along the coordinate that the target token alone reads: every action token becomes the target."""
    return dense(policy, 1e5 * np.eye(32)[0], **changes)


def run(
    policy: OpenVLAPolicy, moments: Sequence[Moment], file: Path, wanted: Plan, out: Path, **options: Any
) -> tuple[dict[str, Any], list[Summary]]:
    with measurements(out, policy, file, range(len(moments))) as done:
        measure(policy, moments, wanted, done)
        rows = dict(done.rows)
    return rows, [summarise(rows, wanted, moments, r, **options) for r in ("executed", "expected")]  # type: ignore[arg-type]


def test_a_planted_direction_has_the_effect_worked_out_by_hand(
    policy: OpenVLAPolicy, moments: list[Moment], file: Path, tmp_path: Path
) -> None:
    wanted = plan(policy, [planted(policy)], [1.0], 0, 0)
    _, (executed, expected) = run(policy, moments, file, wanted, tmp_path / "m.jsonl")
    # Bin 255 - 40 = 215 of linspace(-1, 1, 256), unnormalised by the quantiles +-0.5, 0.4, 0.3 of the test statistics.
    bin_value = -1 + (215 + 0.5) * 2 / 255
    dx, dy, dz = (5.0 * bin_value * half for half in (0.5, 0.4, 0.3))  # 5 cm a step at action 1
    still = [motion(policy.infer(m.observation).actions[0], policy.action_space) for m in moments]
    point = executed.scores[0].points[0]
    by_hand = {"dx": dx, "dy": dy, "dz": dz, "speed": float(np.hypot(np.hypot(dx, dy), dz)) / 100 * 20, "gripper": 1.0}
    for name, value in by_hand.items():
        wanted_effect = value - np.mean([s[name] for s in still])
        assert point.effects[name].value == pytest.approx(wanted_effect, abs=1e-5), name
    near = [s["speed"] for s, m in zip(still, moments, strict=True) if m.phase in ("descend", "lower")]
    assert point.effects["near_speed"].value == pytest.approx(by_hand["speed"] - np.mean(near), abs=1e-5)
    # All weight on one coordinate: rms norm makes it sqrt(32), the target's logit 3 sqrt(32) against 255 zeros.
    logits = np.zeros(256)
    logits[0] = 3 * np.sqrt(32)
    weights = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    off = executed.unsteered["entropy"][0]
    assert point.effects["entropy"].value + off == pytest.approx(float(-(weights * np.log(weights)).sum()), abs=1e-3)
    assert expected.scores[0].points[0].effects["dx"].value == pytest.approx(dx - expected.unsteered["dx"][0], abs=2e-3)


def test_strength_zero_has_exactly_no_effect(
    policy: OpenVLAPolicy, moments: list[Moment], file: Path, tmp_path: Path
) -> None:
    wanted = plan(policy, [planted(policy), neurons(policy)], [0.0, 1.0], 2, 0)
    _, summaries = run(policy, moments, file, wanted, tmp_path / "m.jsonl")
    for score in (s for summary in summaries for s in summary.scores):
        nothing, something = score.points
        assert {e.value for e in nothing.effects.values()} == {0.0}
        assert {c for e in nothing.effects.values() for c in e.controls} == {0.0}
        assert {e.z for e in nothing.effects.values()} == {None}  # no control moved: no z, and no infinity
        assert (nothing.dose, nothing.writes, nothing.damage) == (0.0, 0, 0.0)
        assert something.dose > 0
        assert something.writes > 0
        assert score.best == 1  # strength 0 is never the best


def test_z_scores_and_shares_equal_a_direct_computation(
    policy: OpenVLAPolicy, moments: list[Moment], file: Path, tmp_path: Path
) -> None:
    direction = dense(policy, np.random.default_rng(2).standard_normal(32) * 8)
    wanted = plan(policy, [direction], [0.5, 1.0], 4, 3)
    rows, (executed, expected) = run(policy, moments, file, wanted, tmp_path / "m.jsonl", on=SPEED)
    for summary in (executed, expected):
        for point in summary.scores[0].points:
            for name in ("speed", "dz", "entropy"):
                off = np.array(rows[OFF][summary.reading][name])

                def effect(d: Direction, off: np.ndarray = off, name: str = name, s: Summary = summary) -> float:
                    return float((np.array(rows[Condition(d, point.strength).key][s.reading][name]) - off).mean())  # noqa: B023

                mine, theirs = effect(direction), np.array([effect(c) for c in wanted.controls[content(direction)]])
                assert point.effects[name].value == pytest.approx(mine)
                assert point.effects[name].standardised == pytest.approx(mine / max(off.std(), 0.01), rel=0.5)
                assert point.effects[name].z == pytest.approx((mine - theirs.mean()) / theirs.std(ddof=1))
                assert point.effects[name].beaten == np.mean(np.abs(theirs) < abs(mine))
            speed = point.effects["speed"]
            assert point.z == speed.z
            assert point.beaten == np.mean([c < speed.value for c in speed.controls])
            assert point.dose == np.mean(rows[Condition(direction, point.strength).key]["dose"])


def test_an_interrupted_run_goes_on_and_equals_an_uninterrupted_one(
    policy: OpenVLAPolicy, moments: list[Moment], file: Path, tmp_path: Path
) -> None:
    wanted = plan(policy, [planted(policy), neurons(policy)], [0.5, 1.0], 2, 0)
    whole, summaries = run(policy, moments, file, wanted, tmp_path / "whole.jsonl")

    def stop_at(done: int, _: int) -> None:
        if done == 11:
            raise KeyboardInterrupt

    torn = tmp_path / "torn.jsonl"
    with pytest.raises(KeyboardInterrupt), measurements(torn, policy, file, range(4)) as opened:
        measure(policy, moments, wanted, opened, stop_at)
    assert len(torn.read_text().splitlines()) == 1 + 2  # the head, and two conditions of four moments
    seen: list[tuple[int, int]] = []
    with measurements(torn, policy, file, range(4)) as opened:
        measure(policy, moments, wanted, opened, lambda *told: seen.append(told))
        assert opened.rows == whole
    assert seen[-1] == ((len(whole) - 2) * 4,) * 2
    again, resumed = run(policy, moments, file, wanted, torn)
    assert again == whole
    assert resumed == summaries


def test_nothing_is_measured_twice_and_more_strengths_add(
    policy: OpenVLAPolicy, moments: list[Moment], file: Path, tmp_path: Path
) -> None:
    direction = neurons(policy)
    first, _ = run(policy, moments, file, plan(policy, [direction], [1.0], 2, 0), tmp_path / "m.jsonl")
    # Another name and other facts write the same: measured already.
    renamed = replace(direction, name="other", provenance={})
    more, _ = run(policy, moments, file, plan(policy, [direction, renamed], [0.5, 1.0], 3, 0), tmp_path / "m.jsonl")
    assert first.items() <= more.items()
    assert len(first) == 1 + 3
    assert len(more) == 1 + 2 * 4


def test_dense_directions_of_one_site_and_norm_share_controls_and_others_do_not(policy: OpenVLAPolicy) -> None:
    one, opposite = dense(policy, np.full(32, 2.0)), dense(policy, np.full(32, -2.0), name="slow")
    nearly = dense(policy, np.full(32, 2.0 * 1.0001), name="a")
    larger, elsewhere = dense(policy, np.full(32, 3.0), name="b"), dense(policy, np.full(32, 2.0), site=2, name="c")
    text = dense(policy, np.full(32, 2.0), name="d", span=frozenset({"text"}))
    made = plan(policy, [one, opposite, nearly, larger, elsewhere, text], [1.0], 2, 0).controls
    keys = {d.name: [content(c) for c in made[content(d)]] for d in (one, opposite, nearly, larger, elsewhere, text)}
    assert keys["fast"] == keys["slow"] == keys["a"]
    assert len({tuple(k) for k in keys.values()}) == 4
    control = made[content(one)][0]
    assert control.dense is not None
    norm = np.linalg.norm(one.dense[3])  # type: ignore[index]
    assert np.linalg.norm(control.dense[3]) == pytest.approx(norm, rel=5e-3)


def test_a_direction_without_tokens_to_write_to_says_so(
    policy: OpenVLAPolicy, moments: list[Moment], file: Path, tmp_path: Path
) -> None:
    silent = planted(policy, span=frozenset({"state"}))
    _, (executed, _) = run(policy, moments, file, plan(policy, [silent], [1.0], 2, 0), tmp_path / "m.jsonl")
    notes = " ".join(executed.scores[0].notes)
    assert "it wrote nothing" in notes
    assert "no control moved anything" in notes


def test_a_strength_that_breaks_the_policy_is_told_and_left_out(
    policy: OpenVLAPolicy, moments: list[Moment], file: Path, tmp_path: Path
) -> None:
    # Twice 2e38 overflows float32 on the way through the layers.
    broken = dense(policy, np.eye(32)[0], dense={site: (2e38 * np.eye(32)[0]).astype(np.float32) for site in (0, 1)})
    rows, (executed, _) = run(policy, moments, file, plan(policy, [broken], [1.0], 0, 0), tmp_path / "m.jsonl")
    assert "not finite" in rows[Condition(broken, 1.0).key]["refused"]
    assert executed.scores[0].points == ()
    assert any("refused to act" in note for note in executed.scores[0].notes)


def test_measuring_leaves_the_policy_as_it_was(
    policy: OpenVLAPolicy, moments: list[Moment], file: Path, tmp_path: Path
) -> None:
    before = policy.logits(moments[0].observation)
    run(policy, moments, file, plan(policy, [neurons(policy)], [1.0], 1, 0), tmp_path / "m.jsonl")
    assert torch.equal(policy.logits(moments[0].observation), before)


@pytest.mark.parametrize("strengths", [[], [1.5], [-0.1], [float("nan")], [0.0]])
def test_strengths_out_of_range_are_refused(policy: OpenVLAPolicy, strengths: list[float]) -> None:
    with pytest.raises(SteerError, match="expected numbers in 0 to 1, at least one above 0") as caught:
        plan(policy, [planted(policy)], strengths, 2, 0)
    assert caught.value.code == "bad_strength"


def test_other_moments_are_refused_for_the_same_measurements(
    policy: OpenVLAPolicy, moments: list[Moment], file: Path, tmp_path: Path
) -> None:
    with measurements(tmp_path / "m.jsonl", policy, file, [0, 1]):
        pass
    with pytest.raises(SteerError, match=r"moments\.used"), measurements(tmp_path / "m.jsonl", policy, file, [0]):
        pass


def test_directions_are_chosen_by_name_by_axis_and_all(policy: OpenVLAPolicy, tmp_path: Path) -> None:
    store = DirectionStore(tmp_path)
    for name, sign in (("fast", 1), ("slow", -1)):
        store.save(dense(policy, np.full(32, sign * 2.0), name=name))
    store.save_axis(Axis("speed", "slow", "fast"))
    store.save(dense(policy, np.ones(32), name="foreign", model_hash="b" * 64))
    ends, axes = choose(store, ["speed", "fast"], policy)
    assert ([d.name for d in ends], [a.name for a in axes]) == (["slow", "fast"], ["speed"])
    assert [d.name for d in choose(store, [], policy)[0]] == ["fast", "slow"]
    assert choose(store, ["fast"], policy)[1] == []
    with pytest.raises(SteerError, match="belongs to model bbbb") as caught:
        choose(store, ["foreign"], policy)
    assert caught.value.code == "other_model"
    with pytest.raises(SteerError, match="'fats' is not in"):
        choose(store, ["fats"], policy)
    with pytest.raises(SteerError, match="holds no direction of tiny"):
        choose(DirectionStore(tmp_path / "empty"), [], policy)


def test_moments_are_taken_in_even_steps() -> None:
    moments = [Moment(Observation({}, np.zeros(8), "x", i, i), -1.0, "carry") for i in range(12)]
    assert spread(moments, None) == list(range(12))
    assert spread(moments, 3) == [2, 6, 10]
    assert spread(moments, 12) == list(range(12))
    with pytest.raises(SteerError, match="expected 1 to 12"):
        spread(moments, 13)


# -- summaries of rows made by hand -------------------------------------------------------------------------------------


def row(speed: Sequence[float], dz: Sequence[float], dx: float = 2.0, dose: float = 0.5) -> dict[str, Any]:
    count = len(speed)
    flat = {"dx": [dx] * count, "dy": [0.0] * count, "rotation": [1.0] * count, "gripper": [1.0] * count}
    return {
        "executed": {"speed": list(speed), "dz": list(dz), "entropy": [2.0] * count, **flat},
        "expected": {},
        "dose": [dose] * count,
        "writes": 3,
    }


def fake(name: str, finder: str, mark: float) -> Direction:
    return Direction(
        name=name, tower="lm", model_hash="a" * 64, layers=1, d_model=2, d_ff=2, op="add",
        dense={0: np.array([mark, 1.0], np.float32)}, provenance={"finder": finder},
    )  # fmt: skip


def summary(
    effects: Sequence[tuple[Direction, Sequence[Any]]],
    off: dict[str, Any],
    strengths: Sequence[float] = (1.0,),
    controls: int = 0,
    episodes: Sequence[str] | None = None,
    on: Claim | None = SPEED,
) -> Summary:
    """effects: a direction and its rows by strength, then those of each control by strength."""
    count = len(off["dose"])
    names = episodes or [f"e{i}" for i in range(count)]
    moments = [Moment(Observation({}, np.zeros(8), "x", i, i), -1.0, "carry", episode=names[i]) for i in range(count)]
    rows: dict[str, Any] = {OFF: off}
    mine, theirs = [], {}
    for at, (direction, told) in enumerate(effects):
        mine.append(direction)
        drawn = tuple(fake(f"random-{at}-{i}", "random", 100.0 * (at + 1) + i) for i in range(controls))
        theirs[content(direction)] = drawn
        conditions = [Condition(d, s) for d in (direction, *drawn) for s in strengths]
        rows |= {c.key: r for c, r in zip(conditions, told, strict=True)}
    return summarise(rows, Plan(tuple(mine), theirs, tuple(strengths)), moments, "executed", on=on)


STILL = row([0.2, 0.4, 0.2, 0.4], [0.0, 1.0, 0.0, 1.0])  # speed: standard deviation 0.1; dz: 0.5


def only(of: Summary) -> Score:
    (score,) = of.scores
    return score


def test_on_axis_and_ratio_are_in_standard_deviations_of_the_unsteered_policy() -> None:
    score = only(summary([(fake("a", "f", 1), [row([0.5, 0.7, 0.5, 0.7], [0.0, 1.0, 0.0, 1.0])])], STILL))
    point = score.points[0]
    assert point.on == pytest.approx(3.0)
    assert point.damage == 0.0
    assert point.ratio == pytest.approx(3.0 / DAMAGE_FLOOR)
    assert (point.z, point.beaten, score.ratio_beaten) == (None, None, None)  # nothing to hold it against


def test_damage_that_points_both_ways_does_not_cancel() -> None:
    claim = Claim("gripper", 1.0, "gripper", "test")
    score = only(summary([(fake("a", "f", 1), [row([0.2, 0.4, 0.2, 0.4], [0.5, 0.5, 0.5, 0.5])])], STILL, on=claim))
    point = score.points[0]
    assert point.effects["dz"].value == 0.0
    assert point.damage == pytest.approx(np.sqrt(1 / 5))  # dz off by one standard deviation, of five observables


def test_an_interval_counts_episodes_not_moments() -> None:
    gains = np.array([0.0, 0.1, 0.2, 0.4])
    few = [row(0.3 + gains, [0.0] * 4)]
    many = [row(np.repeat(0.3 + gains, 5), [0.0] * 20)]
    one = only(summary([(fake("a", "f", 1), few)], row([0.3] * 4, [0.0] * 4)))
    other = only(
        summary([(fake("a", "f", 1), many)], row([0.3] * 20, [0.0] * 20), episodes=[f"e{i // 5}" for i in range(20)])
    )
    a, b = one.points[0].effects["speed"], other.points[0].effects["speed"]
    assert (a.low, a.high) == pytest.approx((b.low, b.high))
    assert a.low is not None
    assert a.high is not None
    assert a.low < a.value < a.high
    single = only(summary([(fake("a", "f", 1), few)], row([0.3] * 4, [0.0] * 4), episodes=["same"] * 4))
    assert (single.points[0].effects["speed"].low, single.points[0].effects["speed"].high) == (None, None)


@pytest.mark.parametrize(
    ("curve", "monotone"), [([0.1, 0.1, 0.3], True), ([0.1, 0.05, 0.3], False), ([0, 0, 0], False)]
)
def test_monotone_means_that_no_strength_undoes_a_smaller_one(curve: list[float], monotone: bool) -> None:
    rows = [row([0.3 + gain] * 4, [0.0] * 4) for gain in curve]
    score = only(summary([(fake("a", "f", 1), rows)], row([0.3] * 4, [0.0] * 4), strengths=(0.25, 0.5, 1.0)))
    assert score.monotone is monotone


def test_the_finder_with_the_most_effect_for_its_damage_comes_first_with_controls_among_them() -> None:
    clean = [row([0.4, 0.6, 0.4, 0.6], [0.0, 1.0, 0.0, 1.0], dx=2.2)]
    strong_and_wild = [row([0.7, 0.9, 0.7, 0.9], [3.0, 1.0, -3.0, 1.0], dx=9.0)]
    backwards = [row([0.1, 0.3, 0.1, 0.3], [0.0, 1.0, 0.0, 1.0])]
    weak = [row([0.21, 0.41, 0.21, 0.41], [2.0, 1.0, -2.0, 1.0]), row([0.2, 0.4, 0.2, 0.4], [2.0, -1.0, 2.0, -1.0])]
    out = summary(
        [
            (fake("a", "wild", 1), strong_and_wild + weak),
            (fake("b", "clean", 2), clean + weak),
            (fake("c", "wrong", 3), backwards + weak),
        ],
        STILL,
        controls=2,
    )
    assert [r.finder for r in out.finders] == ["clean", "wild", POOLED, "wrong"]
    assert [s.direction.name for s in out.scores] == ["b", "a", "c"]
    best, pooled = out.finders[0], out.finders[2]
    assert (best.directions, best.works, best.beaten, best.ratio_beaten) == (1, 1, 1.0, 1.0)
    assert (pooled.directions, pooled.z) == (6, None)
    assert out.finders[3].ratio < 0
    assert out.finders[3].works == 0


def test_best_strengths_are_chosen_for_controls_as_well() -> None:
    rows = [row([0.3, 0.5, 0.3, 0.5], [0, 1, 0, 1], dx=3.0), row([0.4, 0.6, 0.4, 0.6], [0, 1, 0, 1], dx=9.0)]
    control = [row([0.2, 0.4, 0.2, 0.4], [0, 1, 0, 1]), row([0.3, 0.5, 0.3, 0.5], [0, 1, 0, 1], dx=3.0)]
    score = only(summary([(fake("a", "f", 1), rows + control)], STILL, strengths=(0.5, 1.0), controls=1))
    assert score.best == 0
    assert score.controls_ratio == pytest.approx((score.points[0].ratio,))  # its best is at the other strength
    assert score.ratio_beaten == 0.0


def test_a_claim_that_no_moment_tells_is_refused_or_noted() -> None:
    near = Claim("near_speed", -1.0, "careful", "test")
    with pytest.raises(SteerError, match="none of the 4 moments tells 'near_speed'"):
        summary([(fake("a", "f", 1), [STILL])], STILL, on=near)
    noted = only(summary([(fake("careful", "f", 1), [STILL])], STILL, on=None))
    assert noted.claim is None
    assert "it claims near_speed, which no moment tells" in noted.notes


def test_a_direction_that_claims_nothing_still_has_effects() -> None:
    out = summary([(fake("thing", "f", 1), [row([0.5] * 4, [0.0] * 4)])], STILL, on=None)
    assert only(out).claim is None
    assert only(out).points[0].effects["speed"].value == pytest.approx(0.2)
    assert out.finders == ()
