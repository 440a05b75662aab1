"""The rules of a tuning that need no episode: what a choice writes, what a trial is worth, when it is hopeless, what is refused."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tune_world
import yaml
from hypothesis import HealthCheck, given, settings, strategies

from sim.evaluation.analysis.estimate import Estimate
from sim.evaluation.analysis.metrics import spreads
from sim.evaluation.tuning import words
from sim.evaluation.tuning.held_out import Checked, verified_range
from sim.evaluation.tuning.plan import bare, require_apart
from sim.evaluation.tuning.score import Aim, Pair, Score, Seen, front, hopeless, score
from sim.evaluation.tuning.settings import Search, read_tuning
from sim.evaluation.tuning.space import Point, require, shaped, unchanged
from sim.evaluation.tuning.trials import Outcome
from steer_runtime.directions.direction import Direction, Neurons
from steer_runtime.errors import SteerError
from steer_runtime.types import Tower


def neurons(op: Any = "override") -> Direction:
    made = Neurons(np.array([1, 1, 2, 2], np.int32), np.array([3, 9, 5, 7], np.int32), np.float32([1, -4, 3, 2]))
    return Direction("up", "lm", "0" * 64, 3, 8, 16, op=op, neurons=made, provenance={"finder": "tests"})


def dense(*sites: int) -> Direction:
    vectors = {site: np.full(8, site, np.float32) for site in sites}
    return Direction("up", "lm", "0" * 64, 3, 8, 16, op="add", dense=vectors)


# -- what a choice writes --------------------------------------------------------------------------------------------


def test_a_choice_of_strength_and_ramp_leaves_the_direction_as_it_is() -> None:
    for direction in (neurons(), dense(1, 2)):
        assert shaped(direction, Point(0.3, ramp_s=1.0)) is direction


def test_the_gain_multiplies_what_is_written_and_nothing_else() -> None:
    made = shaped(neurons(), Point(1.0, gain=1.5))
    assert made.neurons is not None
    np.testing.assert_array_equal(made.neurons.alpha, np.float32([1.5, -6, 4.5, 3]))
    np.testing.assert_array_equal(made.neurons.neuron, [3, 9, 5, 7])
    assert (made.proven, made.calibrated) == (False, None)
    assert made.provenance["tuned_from"] == neurons().id
    louder = shaped(dense(1, 2), Point(1.0, gain=2.0)).dense
    assert louder is not None
    np.testing.assert_array_equal(louder[2], np.full(8, 4, np.float32))


def test_layers_are_chosen_first_and_then_the_largest_neurons_in_their_order() -> None:
    two = shaped(neurons(), Point(1.0, neurons=2)).neurons
    assert two is not None
    assert two.neuron.tolist() == [9, 5]
    late = shaped(neurons(), Point(1.0, layers=(2,), neurons=1)).neurons
    assert late is not None
    assert (late.layer.tolist(), late.neuron.tolist()) == ([2], [5])
    span = shaped(neurons(), Point(1.0, span=frozenset({"image"})))
    assert span.span == {"image"}
    assert span.neurons is not None
    np.testing.assert_array_equal(span.neurons.alpha, neurons().neurons.alpha)  # type: ignore[union-attr]


def test_a_single_vector_moves_to_a_site_and_of_several_one_is_kept() -> None:
    moved, kept = shaped(dense(2), Point(1.0, sites=(3,))).dense, shaped(dense(1, 2), Point(1.0, sites=(2,))).dense
    assert moved is not None
    assert kept is not None
    assert {site: vector[0] for site, vector in moved.items()} == {3: 2.0}
    assert {site: vector[0] for site, vector in kept.items()} == {2: 2.0}
    with pytest.raises(SteerError, match=r"sites 1,2 and none at 3"):
        shaped(dense(1, 2), Point(1.0, sites=(3,)))


@pytest.mark.parametrize(
    ("direction", "search", "says"),
    [
        (neurons(), {"sites": [[1]]}, "writes neurons"),
        (neurons(), {"neurons": [2, 9]}, "goes to 9 and .* has 4"),
        (neurons(), {"layers": [[1], [0, 2]]}, "no neuron in layer 0"),
        (neurons("scale"), {"gain": [0.5, 2]}, "no meaning"),
        (neurons("add"), {"gain": [0.5, 2], "strength": [0.1, 1]}, "are one number"),
        (dense(1), {"neurons": [1, 2]}, "is dense"),
        (dense(1), {"layers": [[1]]}, "is dense"),
        (dense(1, 2), {"sites": [[1, 2], [3]]}, "none at 3"),
    ],
)
def test_a_space_that_does_not_apply_is_refused(direction: Direction, search: dict[str, Any], says: str) -> None:
    tower = Tower("lm", [None] * 3, [None] * 4, 8, 16, 10, 1)
    with pytest.raises(SteerError, match=says) as refused:
        require(Search(**search), direction, tower)
    assert refused.value.code == "bad_search"


def test_the_direction_as_it_is_goes_first_where_the_space_holds_it() -> None:
    assert unchanged(Search(strength=(0.2, 0.8), gain=(0.5, 2.0), ramp_s=(0.0, 1.0))) == {
        "strength": 0.8, "gain": 1.0, "ramp_s": 0.0,
    }  # fmt: skip
    assert unchanged(Search(gain=(1.5, 2.0))) is None
    assert unchanged(Search(neurons=(1, 2))) is None


def test_what_a_tuning_writes_into_a_card_is_no_part_of_its_identity() -> None:
    direction = neurons()
    noted = Direction(
        "up", "lm", "0" * 64, 3, 8, 16, neurons=direction.neurons, calibrated=(0.2, 0.5),
        provenance={"finder": "tests", "tuning": {"study": "x"}},
    )  # fmt: skip
    assert bare(noted).hash == direction.hash


# -- what a trial is worth -------------------------------------------------------------------------------------------


def seen(success: bool = True, speed: float | None = 10.0, height: float | None = 20.0) -> Seen:
    return Seen(success, {"speed": speed, "height": height})


AIM = Aim("speed", -1.0, 0.10, 1.0, 3, {"speed": 1.0, "height": 2.0})


def test_the_effect_counts_the_wanted_way_and_damage_in_unsteered_deviations() -> None:
    pairs: list[Pair] = [(seen(speed=7.0, height=21.0), seen()), (seen(False, speed=9.0, height=None), seen())]
    found = score(pairs, AIM)
    assert found == Score(2.0, 0.5, 1.0, 0.5, 0.5, 2, 2, {"height": 0.5})
    assert found.violations(0.10, 1.0) == {"success": pytest.approx(0.4), "damage": pytest.approx(-0.5)}
    assert not found.keeps(0.10, 1.0)
    assert not score([(seen(height=30.0), seen())], AIM).keeps(0.10, 1.0)
    assert score([(seen(height=30.0), seen())], AIM).keeps(0.10, None)


def test_a_trial_over_the_limit_says_what_moved_most_besides() -> None:
    sides = {**AIM.scales, "jerk": 1.0}
    one, other = (Seen(True, {"speed": 10.0, "height": h, "jerk": j}) for h, j in ((14.0, 2.5), (20.0, 0.5)))
    outcome = Outcome("complete", score([(one, other)], replace(AIM, scales=sides)), None, 1)
    trial: dict[str, Any] = {"number": 0, "point": {"strength": 1.0}, "outcome": asdict(outcome), "keeps": False}
    found = {
        "metric": {"unit": "cm/s"}, "settings": {"margin": 0.1, "damage": 1.0},
        "ends": {"positive": {"best": None, "front": [], "trials": [trial]}},
    }  # fmt: skip
    assert words.rows(found, "positive")[0]["why"] == (
        "moves other things by more than 1: most of all carrying height, \N{MINUS SIGN}3.00"
    )
    del trial["outcome"]["score"]["aside"]
    assert words.rows(found, "positive")[0]["why"] == "moves other things by more than 1"


def test_a_metric_that_never_varies_has_its_floor_as_its_scale() -> None:
    still, moving = seen(), [seen(speed=8.0), seen(speed=12.0)]
    assert spreads([still.metrics, still.metrics])["speed"] == 0.5
    assert spreads([one.metrics for one in moving])["speed"] == pytest.approx(np.sqrt(8))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(strategies.lists(strategies.tuples(strategies.booleans(), strategies.booleans()), min_size=1, max_size=12))
def test_a_trial_is_stopped_for_success_only_when_no_ending_could_save_it(outcomes: list[tuple[bool, bool]]) -> None:
    strong = [(seen(a, speed=1.0), seen(b)) for a, b in outcomes]
    for done in range(1, len(strong) + 1):
        left = [other for _, other in strong[done:]]
        # The best ending: every start that is left is won or drawn.
        ending = score([*strong[:done], *((seen(True, speed=1.0), other) for other in left)], AIM)
        assert (hopeless(strong[:done], left, AIM) is not None) == (ending.violations(0.10, None)["success"] > 0)


def test_a_trial_without_effect_is_stopped_after_the_least_pairs_and_a_weak_one_is_not() -> None:
    idle: list[Pair] = [(seen(speed=10.0 + d), seen()) for d in (0.01, -0.01, 0.0)]
    assert hopeless(idle[:2], [seen()], AIM) is None
    assert hopeless(idle, [seen()], AIM) == "it has no effect"
    wrong: list[Pair] = [(seen(speed=13.0 + d), seen()) for d in (0.1, -0.1, 0.0)]
    assert hopeless(wrong, [seen()], AIM) == "it has no effect"
    weak: list[Pair] = [(seen(speed=9.0 + d), seen()) for d in (0.4, -0.4, 0.0)]
    assert hopeless(weak, [seen()], AIM) is None


def test_the_front_holds_what_no_other_beats() -> None:
    def made(effect: float | None, loss: float, damage: float | None) -> Score:
        return Score(effect, 1 - loss, 1.0, loss, damage, 8, 8)

    scores = [
        made(1, 0, 0.1),
        made(2, 0, 0.1),
        made(3, 0.2, 0.1),
        made(2, 0, 0.0),
        made(2.5, 0.2, 0.0),
        made(None, 0, 0),
    ]
    assert front(scores) == [2, 3, 4]


@pytest.mark.parametrize(
    ("verified", "expected"),
    [
        ({1.0: True, 0.75: True, 0.5: True}, (0.5, 1.0)),
        ({1.0: True, 0.75: True, 0.5: False, 0.25: True}, (0.75, 1.0)),
        ({1.0: True, 0.75: False, 0.5: True, 0.25: True}, (0.25, 0.5)),
        ({1.0: False, 0.75: True, 0.5: True, 0.25: False}, (0.5, 0.75)),
        ({1.0: True, 0.75: False, 0.5: True, 0.25: False}, None),
        ({1.0: True}, None),
        ({}, None),
    ],
)
def test_the_range_is_of_the_strongest_neighbours_that_are_verified(
    verified: dict[float, bool], expected: tuple[float, float] | None
) -> None:
    unknown = Estimate(None)
    checked = [
        Checked("positive", s, unknown, unknown, unknown, unknown, "held", None, 9, () if good else ("x",))
        for s, good in sorted(verified.items())
    ]
    assert verified_range(checked) == expected


# -- what a file may say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"search": {"strength": [0.8, 0.2]}}, "search.strength"),
        ({"search": {"strength": [0.1, 1.5]}}, "search.strength"),
        ({"search": {"spans": [["pictures"]]}}, "search.spans"),
        ({"search": {"layers": [[1], [1]]}}, "given twice"),
        ({"search": {"alphas": [1, 2]}}, "search.alphas"),
        ({"on": "sped"}, r"tune\.yaml: on: expected one of .*, or with a - .*nearest .*'speed'.*\(given 'sped'\)"),
        ({"on": "-sped"}, r"nearest .*'speed'.*\(given '-sped'\)"),
        ({"trials": 0}, "trials"),
        ({"margin": 1.0}, "margin"),
        ({"held_out": {"suites": tune_world.SUITES, "shares": [1.0]}}, "held_out.shares"),
        ({"conditions": ["unsteered", "unsteered"]}, "makes its own"),
        ({"store": None}, "no `store`"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = tmp_path / "tune.yaml"
    path.write_text(yaml.safe_dump(tune_world.plain(**changes)))
    with pytest.raises(SteerError, match=says) as refused:
        read_tuning(path)
    assert "\n" not in refused.value.sentence


@pytest.mark.parametrize("key", ["on", "'on'"])
def test_the_metric_may_be_named_with_and_without_quotes(tmp_path: Path, key: str) -> None:
    """`on` alone is true in YAML 1.1."""
    path = tmp_path / "tune.yaml"
    others = {name: value for name, value in tune_world.plain().items() if name != "on"}
    path.write_text(f"{key}: -speed\n{yaml.safe_dump(others)}")
    assert read_tuning(path).on == "-speed"


def test_held_out_starts_that_a_trial_sees_are_refused(tmp_path: Path) -> None:
    require_apart(tune_world.settings(tmp_path))
    overlapping = {"suites": [{"suite": "libero_object", "tasks": [6], "starts": "2-5", "limit": 200}]}
    with pytest.raises(SteerError, match="libero_object/6/official2/seed0 is the start") as refused:
        require_apart(tune_world.settings(tmp_path, held_out=overlapping))
    assert refused.value.code == "overlap"
    # Another seed draws another layout, and is the same official state.
    layouts = [{"suite": "libero_object", "tasks": [3], "layout": "random", "starts": 2, "limit": 60}]
    require_apart(tune_world.settings(tmp_path, suites=layouts, held_out={"suites": layouts, "seeds": [1]}))
    with pytest.raises(SteerError, match="is the start"):
        require_apart(tune_world.settings(tmp_path, held_out={"suites": tune_world.SUITES, "seeds": [1]}))


def test_the_shipped_files_are_good() -> None:
    folder = Path(__file__).parents[2] / "configs" / "tuning"
    files = sorted(folder.glob("*.yaml"))
    assert len(files) >= 2
    for path in files:
        require_apart(read_tuning(path))
