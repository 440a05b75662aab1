"""Scores: intervals against published values, pairs on equal layouts, grouping by modulation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sim.intervals import wilson
from sim.plan import episodes
from sim.rollout import Outcome
from sim.score import Scored, paired, summary

OUTCOME = Outcome("butter_1", "plain", True, True, 100, 0.2, 0.15, 0)


def _scored(outcomes: dict[int, Outcome]) -> list[Scored]:
    plan = episodes("libero_object", "random", ("quickly", "slowly"), len(outcomes), 0)
    return [Scored(plan[i], "butter_1", o, 0) for i, o in outcomes.items()]


def test_wilson_interval_is_the_textbooks() -> None:
    # Wilson (1927) score interval for 48 of 50 at 95 %, worked by hand: (0.8654, 0.9890).
    assert wilson(48, 50) == pytest.approx((0.8654, 0.9890), abs=1e-3)
    assert wilson(0, 0) == (0.0, 1.0)


def test_only_layouts_where_both_ended_well_are_paired() -> None:
    scored = _scored(
        {
            0: replace(OUTCOME, speed=0.2),
            1: replace(OUTCOME, speed=0.1),
            2: replace(OUTCOME, speed=0.3),
            3: replace(OUTCOME, speed=0.1, released=False),
        }
    )
    assert paired(scored, "quickly", "slowly", lambda o: o.speed) == [(0.2, 0.1)]


def test_summary_counts_released_and_averages_what_ended_well() -> None:
    scored = _scored(
        {0: OUTCOME, 1: OUTCOME, 2: replace(OUTCOME, released=False, steps=400), 3: replace(OUTCOME, steps=200)}
    )
    rows = {r.style: r for r in summary(scored)}
    assert list(rows) == ["quickly", "slowly", "all"]
    assert (rows["quickly"].released, rows["quickly"].episodes, rows["quickly"].steps) == (1, 2, 100)
    assert (rows["all"].released, rows["all"].done) == (3, 4)
    assert rows["slowly"].steps == 150
