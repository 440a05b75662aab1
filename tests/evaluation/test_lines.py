"""From episodes to the lines of the reach table: shares, chance levels, pairs, intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sim.evaluation import grounding, manner, success
from sim.evaluation.statistics import bootstrap, ratio_of_means, share


def row(**changes: Any) -> dict[str, Any]:
    values = {"task_id": 0, "seed": 0, "target": "milk_1", "targets": 5, "done": True, "released": True}
    measured = {"lifted": "milk_1", "placed": "milk_1", "speed": 0.2, "near_speed": 0.1, "height": 0.2}
    return {**values, **measured, "condition": "plain", **changes}


def test_share_has_wilsons_interval_and_none_without_episodes() -> None:
    line = share("success", 48, 50)
    # Wilson (1927) at 95 %, worked by hand.
    assert (line.value, line.low, line.high) == pytest.approx((0.96, 0.8654, 0.9890), abs=1e-3)
    assert share("success", 0, 0).value is None


def test_refused_layouts_are_no_failures() -> None:
    refused = {"task_id": 1, "refused": "no valid layout"}
    lines = {line.what: line for line in success.summarise([row(), row(done=False, released=False), refused], "random")}
    assert (lines["success, random layouts"].value, lines["success, random layouts"].n) == (0.5, 2)
    assert lines["success, random layouts"].least == 0.45


def test_right_object_is_told_of_those_that_lifted_one_and_of_all() -> None:
    rows = [row(), row(target="soup_1"), row(lifted=None, placed=None)]
    lines = {line.what: line for line in grounding.summarise(rows, 2)}
    assert lines["right object, of episodes that lifted one"].value == 1 / 2
    assert lines["  of all episodes"].value == 1 / 3
    assert lines["  by chance, any object alike"].value == pytest.approx(1 / 5)
    assert lines["  deaf to words, at most"].value == 1 / 2


def test_grounding_asks_for_different_objects_on_one_layout() -> None:
    trials = grounding.trials((3, 4), 6, 7, 2)
    assert [(t.task_id, t.asked) for t in trials] == [(3, 0), (3, 1), (4, 0), (4, 1), (3, 0), (3, 1)]
    assert trials[0].seed == trials[1].seed != trials[4].seed
    assert len({t.key for t in trials}) == 6


def test_longer_plan_begins_with_the_shorter_one() -> None:
    assert manner.trials((0, 1), 9, 5)[:8] == manner.trials((0, 1), 2, 5)


def test_manner_pairs_equal_layouts_in_which_both_succeeded() -> None:
    rows = [
        row(seed=1, condition="quickly", speed=0.3),
        row(seed=1, condition="slowly", speed=0.1),
        row(seed=2, condition="quickly", speed=0.9),
        row(seed=2, condition="slowly", speed=0.1, done=False),
        row(seed=3, condition="quickly", speed=0.9),
    ]
    lines = {line.what: line for line in manner.summarise(rows)}
    assert lines["speed, quickly : slowly (both succeeded)"].value == pytest.approx(3.0)
    assert lines["speed, quickly : slowly (both succeeded)"].n == 1
    assert lines["speed, quickly : slowly (all pairs)"].value == pytest.approx(6.0)


def test_bootstrap_interval_covers_the_value_and_shrinks_with_pairs() -> None:
    rng = np.random.default_rng(0)
    noisy = [(2.0 + a, 1.0 + b) for a, b in rng.normal(0, 0.1, (400, 2))]
    value, low, high = bootstrap(noisy, ratio_of_means)
    assert low < 2.0 < high
    assert low < value < high
    _, few_low, few_high = bootstrap(noisy[:20], ratio_of_means)
    assert high - low < few_high - few_low
    # The standard error of a ratio of means, by the delta method: 2 * sqrt((0.1/2)^2 + (0.1/1)^2) / sqrt(400).
    assert high - low == pytest.approx(2 * 1.96 * 2 * np.hypot(0.05, 0.1) / 20, rel=0.15)
