"""Metrics of paths whose answer is known by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sim.evaluation.analysis import metrics
from sim.evaluation.analysis.metrics import Steps, measure

RATE = 20.0


def straight(n: int = 40, step: float = 0.01, **changes: Any) -> Steps:
    """The hand goes along x by `step` m in each of n control steps; nothing is held."""
    eef = np.zeros((n + 1, 3))
    eef[:, 0] = step * np.arange(n + 1)
    base = Steps(
        eef=eef, target=np.full((n + 1, 3), np.nan), action=np.zeros((n, 7)), executed=np.zeros((n, 7)),
        held=np.zeros(n + 1, bool), dose=np.full(n, np.nan), entropy=np.full(n, np.nan), success=None, rate=RATE,
    )  # fmt: skip
    return replace(base, **changes)


def test_straight_path_has_its_speed_displacement_and_length_and_no_jerk() -> None:
    found = measure(straight())
    assert found["speed"] == pytest.approx(20.0)  # 1 cm a step, 20 steps a second
    assert found["displacement"] == pytest.approx(10.0)
    assert found["path"] == pytest.approx(0.4)
    assert found["jerk"] == pytest.approx(0.0, abs=1e-6)


def test_jerk_of_a_cubic_is_its_third_derivative() -> None:
    t = np.arange(30) / RATE
    eef = np.zeros((30, 3))
    eef[:, 2] = 0.5 * t**3  # third derivative: 3 m/s^3
    assert metrics.jerk(straight(29, eef=eef)) == pytest.approx(3.0)
    assert metrics.jerk(straight(2)) is None


def test_way_ends_where_the_object_is_let_go() -> None:
    steps = straight(40)
    eef = steps.eef.copy()
    eef[21:, 0] = eef[20, 0] + 0.05 * np.arange(1, 21)  # five times as fast after letting go
    held = np.zeros(41, bool)
    held[10:21] = True
    target = np.tile([0.1, 0.0, 0.0], (41, 1))
    assert metrics.speed(replace(steps, eef=eef, held=held, target=target)) == pytest.approx(20.0)
    assert metrics.speed(replace(steps, eef=eef)) == pytest.approx((20 * 20 + 100 * 20) / 40)


def test_way_ends_with_success_where_nothing_is_held() -> None:
    steps = straight(40, success=10)
    assert (steps.run, steps.way) == (10, 10)
    assert metrics.path(steps) == pytest.approx(0.1)
    assert metrics.time_to_success(steps) == 0.5
    assert metrics.time_to_success(straight()) is None


def test_near_speed_counts_steps_within_ten_centimetres_before_the_grasp() -> None:
    steps = straight(40)
    eef = steps.eef.copy()
    # From x = 0.3 on 0.5 cm a step: the object stands at 0.395, so from 0.30 the hand is within 10 cm.
    eef[31:, 0] = 0.30 + 0.005 * np.arange(1, 11)
    target = np.tile([0.395, 0.0, 0.0], (41, 1))
    found = replace(steps, eef=eef, target=target)
    assert metrics.near_speed(found) == pytest.approx(10.0)
    assert metrics.far_speed(found) == pytest.approx(20.0)
    held = np.zeros(41, bool)
    held[30:] = True
    assert metrics.near_speed(replace(found, held=held)) is None
    assert metrics.near_speed(straight()) is None  # no object, so none is near


def test_height_is_that_of_the_middle_of_the_way_while_held() -> None:
    n = 40
    target = np.zeros((n + 1, 3))
    target[:, 0] = np.linspace(0, 0.4, n + 1)
    target[1:, 2] = 0.05
    target[8:33, 2] = 0.20  # the middle half and a little more
    held = np.ones(n + 1, bool)
    assert metrics.height(straight(n, target=target, held=held)) == pytest.approx(20.0)
    assert metrics.height(straight(n, target=target)) is None  # never held
    flat = np.zeros((n + 1, 3))
    assert metrics.height(straight(n, target=flat, held=held)) is None  # never lifted


def test_toggles_are_changes_of_the_sign_and_zeros_are_none() -> None:
    executed = np.zeros((40, 7))
    executed[:, 6] = [-1] * 10 + [0] * 5 + [1] * 10 + [0] * 5 + [1] * 5 + [-1] * 5
    assert metrics.toggles(straight(executed=executed)) == 2
    assert metrics.toggles(straight()) == 0


def test_saturation_is_of_the_motion_components_and_leaves_the_gripper_out() -> None:
    action = np.zeros((40, 7))
    action[:, 6] = 1.0
    assert metrics.saturation(straight(action=action)) == 0.0
    action[:, 0] = 1.3
    assert metrics.saturation(straight(action=action)) == pytest.approx(100 / 6)


def test_what_was_not_measured_is_none() -> None:
    found = measure(straight())
    assert found["entropy"] is None
    assert found["dose"] is None
    partly = np.full(40, np.nan)
    partly[:2] = 0.3
    assert metrics.dose(straight(dose=partly)) == pytest.approx(0.3)


def test_first_action_is_told_in_the_units_of_the_whole_episode() -> None:
    action = np.array([0.6, 0.0, 0.8, 0, 0, 0, -1])
    assert metrics.first_action("speed", action, 0.05, RATE) == pytest.approx(100.0)  # 5 cm a step
    assert metrics.first_action("height", action, 0.05, RATE) == pytest.approx(4.0)
    assert metrics.first_action("near_speed", action, 0.05, RATE) is None
    assert metrics.first_action("speed", np.full(7, np.nan), 0.05, RATE) is None


def test_every_metric_says_its_formula_and_units() -> None:
    for name, metric in metrics.METRICS.items():
        told = metric.of.__doc__ or ""
        unit = metric.unit.replace("³", "^3")
        assert len(told) > 40, name
        assert not unit or re.search(re.escape(unit), told), f"{name} does not say {unit}"
