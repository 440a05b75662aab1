"""Axes of words against random ones: how they are made, what the engine does with them, how they are judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fabricate
import numpy as np
import pytest

from sim.demonstrations import build, dump, write_atomically
from sim.evaluation import axis, axis_directions
from sim.evaluation.axis_directions import AxisSpec, Draw, basis_of, make
from sim.evaluation.bank import BankSpec, bank, bank_path, recorded_moments
from sim.evaluation.dose_response import draw_chart, respond, summarise
from sim.record import PHASES
from steer_runtime.errors import SteerError
from steer_runtime.moments import QUANTITIES, Moment
from steer_runtime.policies.openvla.policy import TOWER, OpenVLAPolicy
from steer_runtime.results import results

NEURONS = AxisSpec("speed", "neurons", ("text", "action"), layers=(1, 2), count=6, alpha=3.0)
DENSE = AxisSpec("speed", "dense", ("text",), site=1, size=2.0)


@pytest.fixture(scope="module")
def policy() -> OpenVLAPolicy:
    return fabricate.tiny_policy(fabricate.tiny_config(chunk=2))


def written(policy: OpenVLAPolicy, draw: Draw) -> np.ndarray:
    """What the positive end at strength 1 writes into the residual stream in all: sum of alpha_i w_i, [d_model]."""
    neurons = draw.positive.neurons
    assert neurons is not None
    down = policy.towers[TOWER].down_projs
    columns = [down[la].weight[:, n].numpy() for la, n in zip(neurons.layer, neurons.neuron, strict=True)]  # type: ignore[attr-defined]
    return np.stack(columns, 1) @ neurons.alpha


def test_axis_is_made_of_the_words_that_are_one_token(policy: OpenVLAPolicy) -> None:
    basis = basis_of(policy, "speed")
    assert basis.used == {"positive": ("faster", "quick", "speed"), "negative": ("slow", "slower")}
    assert set(basis.left_out) == {"rapid", "speedy", "gradual", "steady"}
    rows = {word: policy.unembedding[policy.tokenizer.convert_tokens_to_ids(word)] for word in ("slow", "slower")}
    fast = [policy.unembedding[policy.tokenizer.convert_tokens_to_ids(w)] for w in ("faster", "quick", "speed")]
    wanted = sum(fast) / 3 - (rows["slow"] + rows["slower"]) / 2
    np.testing.assert_allclose(basis.difference, wanted, rtol=1e-5, atol=1e-6)


def test_end_without_a_word_is_refused(policy: OpenVLAPolicy) -> None:
    with pytest.raises(SteerError, match=r"none of (beneath|above), ") as caught:
        basis_of(policy, "height")
    assert caught.value.code == "unknown_word"


def test_neurons_are_those_that_write_most_along_the_words_with_their_sign(policy: OpenVLAPolicy) -> None:
    basis = basis_of(policy, "speed")
    first = make(policy, NEURONS, basis, 0, 0)[0]
    neurons = first.positive.neurons
    assert neurons is not None
    down = policy.towers[TOWER].down_projs
    every = {
        (layer, n): float(basis.difference @ down[layer].weight[:, n])  # type: ignore[attr-defined]
        for layer in (1, 2)
        for n in range(64)
    }
    best = sorted(every, key=lambda k: -abs(every[k]))[:6]
    assert set(zip(neurons.layer.tolist(), neurons.neuron.tolist(), strict=True)) == set(best)
    assert all(
        alpha == 3.0 * np.sign(every[layer, n])
        for layer, n, alpha in zip(neurons.layer.tolist(), neurons.neuron.tolist(), neurons.alpha, strict=True)
    )
    assert float(basis.difference.numpy() @ written(policy, first)) > 0


def test_random_neurons_write_with_the_axis_norm(policy: OpenVLAPolicy) -> None:
    draws = make(policy, NEURONS, basis_of(policy, "speed"), 4, 0)
    norms = [float(np.linalg.norm(written(policy, draw))) for draw in draws]
    np.testing.assert_allclose(norms, norms[0], rtol=1e-4)
    assert [draw.kind for draw in draws] == ["words", *["random neurons"] * 4]


def test_dense_draws_have_the_given_size_and_opposite_ends(policy: OpenVLAPolicy) -> None:
    basis = basis_of(policy, "speed")
    draws = make(policy, DENSE, basis, 3, 0)
    assert [d.kind for d in draws] == ["words", *["gaussian"] * 3, *["random words"] * 3]
    for draw in draws:
        assert draw.positive.dense is not None
        assert draw.negative.dense is not None
        vector = draw.positive.dense[1]
        assert np.linalg.norm(vector) == pytest.approx(2.0 * basis.mean_norm, rel=1e-4)
        np.testing.assert_array_equal(draw.negative.dense[1], -vector)
    assert len({draw.positive.hash for draw in draws}) == len(draws)


@pytest.mark.parametrize("spec", [NEURONS, DENSE], ids=["neurons", "dense"])
def test_more_draws_leave_the_others_as_they_are(policy: OpenVLAPolicy, spec: AxisSpec) -> None:
    basis = basis_of(policy, "speed")
    few = {d.name: d.positive.hash for d in make(policy, spec, basis, 2, 5)}
    many = {d.name: d.positive.hash for d in make(policy, spec, basis, 3, 5)}
    assert few.items() <= many.items()


def test_layers_and_sites_out_of_range_are_refused(policy: OpenVLAPolicy) -> None:
    basis = basis_of(policy, "speed")
    for spec in (AxisSpec("speed", "neurons", ("text",), layers=(3,)), AxisSpec("speed", "dense", ("text",), site=4)):
        with pytest.raises(SteerError) as caught:
            make(policy, spec, basis, 0, 0)
        assert caught.value.code == "layer_out_of_range"


def moments(policy: OpenVLAPolicy) -> list[Moment]:
    phases = ("approach", "descend", "carry", "lower")
    return [Moment(fabricate.make_observation(policy, seed=i), -1.0, p) for i, p in enumerate(phases)]


@pytest.mark.parametrize("spec", [NEURONS, DENSE], ids=["neurons", "dense"])
def test_offline_run_steers_only_where_it_says_and_goes_on(
    policy: OpenVLAPolicy, spec: AxisSpec, tmp_path: Path
) -> None:
    draws = make(policy, spec, basis_of(policy, "speed"), 1, 0)
    asked = moments(policy)
    plain = [policy.infer(m.observation).actions for m in asked]
    few, many = axis.conditions(draws[:1], (1.0,)), axis.conditions(draws, (0.5, 1.0))
    ran: list[list[str]] = []
    for wanted in (few, many):
        ran.append([])
        with results(tmp_path / "r.jsonl", {}) as file, axis.Steered(policy, draws) as steered:
            rows = axis.run_offline(policy, steered, asked, wanted, file, lambda c: ran[-1].append(c.key))
    assert ran[0] == ["off", "speed@-1", "speed@+1"]
    assert len(ran[1]) == len(many) - 3
    still = {row["pair"]: row for row in rows if row["draw"] == "off"}
    for pair, actions in enumerate(plain):
        assert still[pair]["motion"] == pytest.approx(float(np.linalg.norm(actions[:, :3], axis=1).mean()))
    steered_rows = [row for row in rows if row["draw"] == "speed" and row["strength"] == 1.0]
    assert any(row["motion"] != still[row["pair"]]["motion"] for row in steered_rows)
    assert [row["rise"] is None for row in steered_rows] == [True, True, False, True]
    assert [row["near_motion"] is None for row in steered_rows] == [True, False, True, False]
    # Detached: the policy is as it was.
    np.testing.assert_array_equal(policy.infer(asked[0].observation).actions, plain[0])


def measured(effects: dict[tuple[str, float], float], **more: Any) -> list[dict[str, Any]]:
    """Rows over eight pairs that differ by pair, with the given effect of each (draw, strength)."""
    kinds = {"off": "off", "speed": "words"}
    return [
        {
            "draw": draw, "kind": kinds.get(draw, "gaussian"), "strength": strength, "pair": pair,
            "motion": 0.5 + 0.1 * pair + effect, **more,
        }
        for (draw, strength), effect in {("off", 0.0): 0.0, **effects}.items()
        for pair in range(8)
    ]  # fmt: skip


def random_effects(size: float) -> dict[tuple[str, float], float]:
    """Twenty draws at +-0.5 and +-1 whose effects lie evenly in +-size times the strength."""
    return {(f"gaussian-{i}", s): size * s * (i - 9.5) / 9.5 for i in range(20) for s in (-1.0, -0.5, 0.5, 1.0)}


def test_axis_beyond_random_in_both_directions_works_and_is_monotone() -> None:
    mine = {("speed", s): 0.3 * s for s in (-1.0, -0.5, 0.5, 1.0)}
    response = respond(measured({**mine, **random_effects(0.2)}), "speed", "motion", 1.0)
    assert response is not None
    assert response.works
    assert response.monotone
    assert response.rho == pytest.approx(1.0)
    assert [d.effect for d in response.doses] == pytest.approx([-0.3, -0.15, 0.15, 0.3])
    # Pairs differ by up to 0.7, their differences do not: the interval is that of pairs.
    assert response.doses[-1].high - response.doses[-1].low < 1e-9
    # 95th percentile of |effect| of twenty even draws in +-0.2: between the 18th and the largest pair of sizes.
    assert response.doses[-1].random["gaussian"] == pytest.approx(0.2, rel=0.02)


def test_wrong_direction_and_random_size_do_not_count() -> None:
    backwards = {("speed", s): -0.3 * s for s in (-1.0, -0.5, 0.5, 1.0)}
    response = respond(measured({**backwards, **random_effects(0.2)}), "speed", "motion", 1.0)
    assert response is not None
    assert not response.works
    assert not response.monotone
    assert response.rho == pytest.approx(-1.0)
    weak = {("speed", s): 0.15 * s for s in (-1.0, -0.5, 0.5, 1.0)}
    response = respond(measured({**weak, **random_effects(0.2)}), "speed", "motion", 1.0)
    assert response is not None
    assert not response.works
    # A measure that the positive end lowers.
    response = respond(measured({**backwards, **random_effects(0.2)}), "speed", "motion", -1.0)
    assert response is not None
    assert response.works


@pytest.mark.parametrize(("effects", "monotone"), [((-0.3, 0.0, 0.2, 0.2), True), ((-0.3, -0.1, 0.2, 0.1), False)])
def test_a_stair_is_monotone_and_a_dose_that_turns_back_is_not(effects: tuple[float, ...], monotone: bool) -> None:
    stair = {("speed", s): e for s, e in zip((-1.0, -0.5, 0.5, 1.0), effects, strict=True)}
    response = respond(measured({**stair, **random_effects(0.1)}), "speed", "motion", 1.0)
    assert response is not None
    assert response.monotone is monotone


def test_random_effects_of_one_side_are_held_against_that_side_alone() -> None:
    mine = {("speed", s): 0.1 * s for s in (-1.0, 1.0)}
    # Every random draw pushes up by 0.2 at either end, or not at all.
    drawn = {(f"gaussian-{i}", s): 0.2 * (i % 2) for i in range(20) for s in (-1.0, 1.0)}
    response = respond(measured({**mine, **drawn}), "speed", "motion", 1.0)
    assert response is not None
    down, up = response.doses
    assert (down.beyond, down.beyond_directed) == (False, True)
    assert (up.beyond, up.beyond_directed) == (False, False)
    assert (down.directed["gaussian"], up.directed["gaussian"]) == pytest.approx((0.0, 0.2))
    held = [line.value for line in summarise([response]) if "that way alone" in line.what]
    assert held == [0, 1]


def test_axis_without_random_draws_proves_nothing() -> None:
    response = respond(measured({("speed", -1.0): -0.3, ("speed", 1.0): 0.3}), "speed", "motion", 1.0)
    assert response is not None
    assert not response.works


def test_success_must_hold_at_a_strength_that_works() -> None:
    rows = measured({("speed", -1.0): -0.3, ("speed", 1.0): 0.3, **random_effects(0.2)}, done=1.0)
    response = respond(rows, "speed", "motion", 1.0)
    assert response is not None
    assert response.safe
    failing = [{**row, "done": 0.0} if row["draw"] == "speed" else row for row in rows]
    response = respond(failing, "speed", "motion", 1.0)
    assert response is not None
    assert response.works
    assert not response.safe


def test_chart_and_lines_show_every_dose(tmp_path: Path) -> None:
    mine = {("speed", s): 0.3 * s for s in (-1.0, -0.5, 0.5, 1.0)}
    response = respond(measured({**mine, **random_effects(0.2)}), "speed", "motion", 1.0)
    assert response is not None
    page = draw_chart([response], "pocket", tmp_path / "axis.html").read_text()
    assert "gaussian, 95 %" in page
    what = [line.what for line in summarise([response])]
    assert [w for w in what if w.endswith("effect")] == [f"  {s}: effect" for s in ("-1", "-0.5", "+0.5", "+1")]


def test_random_axes_run_only_where_the_axis_does(policy: OpenVLAPolicy) -> None:
    drawn = axis.conditions(make(policy, DENSE, basis_of(policy, "speed"), 1, 0)[1:], (0.5, 1.0))
    kept = axis.only(drawn, (1.0,), (0.5, 1.0))
    assert {c.strength for c in kept} == {-1.0, 1.0}
    assert {c.draw for c in kept} == {c.draw for c in drawn} - {axis.OFF}
    with pytest.raises(SteerError, match=r"asked for at 0\.7, .* expected some of 0\.5, 1") as caught:
        axis.only(drawn, (0.7,), (0.5, 1.0))
    assert caught.value.code == "bad_strength"


def test_unusable_strengths_are_refused() -> None:
    for strengths in ((), (0.0,), (1.5,)):
        with pytest.raises(SteerError) as caught:
            axis.conditions([], strengths)
        assert caught.value.code == "bad_strength"


def recording(folder: Path, *, pictures: bool = True) -> Path:
    """One episode in the real format: forty steps, a picture every fourth, all phases in turn."""
    steps, stored = 80, np.arange(0, 80, 4)
    images = np.random.default_rng(0).integers(0, 255, (len(stored), 32, 32, 3), dtype=np.uint8)
    arrays = {
        "obs/ee_states": np.linspace(0, 1, steps * 6).reshape(steps, 6),
        "obs/gripper_states": np.tile([0.04, -0.04], (steps, 1)),
        "obs/gripper_command": np.where(np.arange(steps) < 40, -1.0, 1.0),
        "obs/image_index": stored.astype(np.int32),
        "expert_actions": np.tile(np.linspace(-1, 1, steps)[:, None], (1, 7)),
        "privileged/phase": (np.arange(steps) * len(PHASES) // steps).astype(np.uint8),
    }
    if pictures:
        arrays |= {"obs/agentview_rgb": images, "obs/eye_in_hand_rgb": images[::-1].copy()}
    attributes = {
        "num_samples": steps,
        "base_instruction": "pick up the soup",
        "language_instruction": "pick up the soup slowly",
        "phase_names": dump(list(PHASES)),
    }
    content = build("demo_0", arrays, attributes, {})
    write_atomically(folder / "episodes" / "task" / "demo_0.hdf5", content)
    return folder


def test_bank_holds_every_part_and_is_the_same_when_read_again(tmp_path: Path) -> None:
    spec = BankSpec(moments=8, episodes=1, recording=str(recording(tmp_path / "recording")))
    path = bank_path(tmp_path, spec, (0,))
    first = bank(spec, path, (0,))
    again = bank(spec, path, (0,))
    assert {m.phase for m in first} >= {"approach", "descend", "lower"}
    assert {m.phase for m in first} <= {"approach", "descend", "lift", "carry", "lower"}
    for one, two in zip(first, again, strict=True):
        assert (one.phase, one.gripper) == (two.phase, two.gripper)
        np.testing.assert_array_equal(one.observation.images["wrist"], two.observation.images["wrist"])
        np.testing.assert_array_equal(one.observation.state, two.observation.state)
    # The gripper command is that of the moment, and pictures are turned as policies see them.
    step = {float(s[0]): i for i, s in enumerate(np.linspace(0, 1, 480).reshape(80, 6))}
    recorded = np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), dtype=np.uint8)
    for moment in first:
        index = step[float(moment.observation.state[0])]
        assert moment.gripper == (-1.0 if index < 40 else 1.0)
        np.testing.assert_array_equal(moment.observation.images["agentview"], recorded[index // 4][::-1, ::-1])


def test_moments_of_a_recording_say_how_the_hand_moved(tmp_path: Path) -> None:
    folder = recording(tmp_path / "recording")
    for moment in recorded_moments(BankSpec(moments=8, episodes=1, recording=str(folder))):
        # The recording's hand moves by 1/479 along each of x, y, z per number, six numbers a step.
        way = 6 / 479
        assert [moment.measured[n] for n in ("dx", "dy", "dz")] == pytest.approx([way] * 3)
        assert moment.measured["speed"] == pytest.approx(way * 3**0.5 * 20)
        assert moment.measured["height"] == pytest.approx(moment.observation.state[2] - 2 / 479)
        assert moment.measured["rotation"] > 0
        assert set(moment.measured) == set(QUANTITIES)
        assert moment.episode == "task/demo_0"


def test_bank_of_a_recording_without_pictures_is_refused(tmp_path: Path) -> None:
    spec = BankSpec(moments=8, episodes=1, recording=str(recording(tmp_path / "recording", pictures=False)))
    with pytest.raises(SteerError) as caught:
        bank(spec, bank_path(tmp_path, spec, (0,)), (0,))
    assert caught.value.code == "no_pictures"


def test_torn_bank_is_named(tmp_path: Path) -> None:
    spec = BankSpec(moments=8, episodes=1, recording=str(recording(tmp_path / "recording")))
    path = bank_path(tmp_path, spec, (0,))
    bank(spec, path, (0,))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(SteerError, match="damaged") as caught:
        bank(spec, path, (0,))
    assert caught.value.code == "torn_file"


def test_words_of_every_axis_are_kept_from_training() -> None:
    from sim.wordings import CONCEPTS, wordings

    said = {word for c in CONCEPTS for w in wordings(c) for word in w.template.replace(",", " ").split()}
    for positive, negative in axis_directions.WORDS.values():
        assert not said & {*positive, *negative}
    assert json.dumps(axis_directions.WORDS)
