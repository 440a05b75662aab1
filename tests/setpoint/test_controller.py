"""Controllers against plants whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from plants import DT, FirstOrder, run, stair

from steer_runtime.errors import SteerError
from steer_runtime.setpoint.controller import PID, Controller, Dithered, Gains, require_usable
from steer_runtime.setpoint.limits import Limiter, StrengthLimits
from steer_runtime.setpoint.loop import SetPointLoop
from steer_runtime.setpoint.meter import SpeedMeter

PI = Gains(proportional=4.0, integral=8.0, tracking_s=0.5)
WIDE = StrengthLimits(-5.0, 5.0, slew_per_s=100.0)


def test_pi_on_a_first_order_plant_follows_the_analytic_closed_loop() -> None:
    # y' = (K u + r - y)/T with u = kp e + ki integral(e) has the characteristic polynomial T s^2 + (1 + K kp) s + K ki.
    plant = FirstOrder(gain=0.05, time_constant=0.5)
    slow = 0.001
    controller, limiter = PID(0.16, PI), Limiter(WIDE)
    y = []
    for _ in range(round(6.0 / slow)):
        strength = limiter.apply(controller.update(plant.y, slow), slow)
        controller.applied(strength)
        y.append(plant.step(strength, slow))
    roots = np.roots([0.5, 1 + 0.05 * 4.0, 0.05 * 8.0])
    t = np.arange(1, len(y) + 1) * slow
    # The error starts at 0.02 with slope -(K kp) e0 / T (u jumps by kp e0) and decays along the two roots.
    e0, slope = 0.02, -0.05 * 4.0 * 0.02 / 0.5
    a = np.linalg.solve(np.array([[1, 1], roots]), np.array([e0, slope]))
    expected = 0.16 - np.real(a[0] * np.exp(roots[0] * t) + a[1] * np.exp(roots[1] * t))
    np.testing.assert_allclose(y, expected, atol=2e-4)


def test_pid_settles_on_the_target_without_a_remaining_error() -> None:
    controller = PID(0.17, Gains(4.0, 8.0, 0.5))
    measured, strength = run(FirstOrder(), controller, Limiter(StrengthLimits(slew_per_s=2.0)), 20.0)
    assert abs(measured[-1] - 0.17) < 1e-3
    assert strength[-1] == pytest.approx((0.17 - 0.14) / 0.05, abs=0.02)
    assert measured.max() < 0.17 * 1.1


def saturated(tracking_s: float) -> tuple[float, float]:
    """(seconds from a reachable target to within 2 % of it, overshoot) after 20 s on one that is out of reach."""
    plant, limiter = FirstOrder(), Limiter(StrengthLimits(slew_per_s=2.0))
    controller = PID(0.25, replace(PI, tracking_s=tracking_s))
    run(plant, controller, limiter, 20.0)
    assert plant.y == pytest.approx(0.19, abs=1e-3)
    controller._target = 0.14
    measured, _ = run(plant, controller, limiter, 40.0)
    off = np.flatnonzero(np.abs(measured - 0.14) > 0.02 * 0.14)
    return (off[-1] + 1) * DT if len(off) else 0.0, float(0.14 - measured.min())


def test_back_calculation_leaves_saturation_at_once_where_a_plain_integral_stays_wound_up() -> None:
    with_it, _ = saturated(0.5)
    without, _ = saturated(math.inf)
    assert with_it < 8.0
    assert without > 3 * with_it


def test_integral_stays_bounded_while_saturated_only_with_back_calculation() -> None:
    integrals = {}
    for tracking_s in (0.5, math.inf):
        controller = PID(0.25, replace(PI, tracking_s=tracking_s))
        run(FirstOrder(), controller, Limiter(StrengthLimits(slew_per_s=2.0)), 60.0)
        integrals[tracking_s] = controller.state["integral"]
    assert abs(integrals[0.5]) < 1.5
    assert integrals[math.inf] > 20.0


def test_a_new_target_does_not_kick_through_the_derivative() -> None:
    outputs = []
    for derivative in (0.0, 5.0):
        controller = PID(0.14, Gains(4.0, 0.0, derivative))
        for _ in range(5):
            controller.update(0.14, DT)
        controller._target = 0.20
        outputs.append(controller.update(0.14, DT))
    assert outputs[0] == outputs[1]


def test_derivative_brakes_while_the_measurement_rises() -> None:
    plain, braked = PID(0.2, Gains(4.0, 0.0)), PID(0.2, Gains(4.0, 0.0, 1.0))
    for y in (0.10, 0.12, 0.14):
        wanted = plain.update(y, DT), braked.update(y, DT)
    assert wanted[1] < wanted[0]


@pytest.mark.parametrize("measured", [math.nan, math.inf, -math.inf])
def test_measurement_that_is_no_number_is_refused_and_changes_nothing(measured: float) -> None:
    controller = PID(0.12, PI)
    controller.update(0.10, DT)
    before = dict(controller.state)
    with pytest.raises(SteerError) as caught:
        controller.update(measured, DT)
    assert caught.value.code == "not_finite"
    assert controller.state == before


def test_without_a_measurement_strength_and_integral_stay_and_no_derivative_comes_of_the_gap() -> None:
    controller = PID(0.12, Gains(4.0, 8.0, 2.0))
    for y in (0.10, 0.11):
        controller.update(y, DT)
        controller.applied(0.05)
    before = controller.state["integral"]
    assert [controller.update(None, DT) for _ in range(50)] == [0.05] * 50
    assert controller.state["integral"] == before
    controller.update(0.30, DT)
    assert controller.state["rate"] == 0.0


def test_negative_gains_hold_by_an_axis_whose_positive_end_lowers_the_quantity() -> None:
    plant = FirstOrder(gain=-0.05)
    measured, _ = run(plant, PID(0.17, Gains(-4.0, -8.0)), Limiter(StrengthLimits()), 20.0)
    assert abs(measured[-1] - 0.17) < 1e-3


BETWEEN = 0.155
"""Between two treads of the stair, 0.14 and 0.17: no strength holds it."""


def on_the_stair(controller: Controller) -> tuple[np.ndarray, np.ndarray]:
    """The second minute on a plant that acts in steps, behind the meter's average and one chunk of delay."""
    plant, limiter = FirstOrder(static=stair, time_constant=0.2), Limiter(StrengthLimits(slew_per_s=4.0))
    measured, strength = run(plant, controller, limiter, 120.0, filter_s=0.5, delay=1)
    half = len(measured) // 2
    return measured[half:], strength[half:]


def average(measured: np.ndarray) -> np.ndarray:
    """What the meter shows of it, but for its first seconds."""
    out, y = [], measured[0]
    for raw in measured:
        y += (1 - math.exp(-DT / 0.5)) * (raw - y)
        out.append(y)
    return np.array(out)[20:]


def test_stair_makes_an_integral_cycle_between_two_treads_with_the_right_mean() -> None:
    measured, strength = on_the_stair(PID(BETWEEN, PI))
    assert abs(measured.mean() - BETWEEN) < 0.002
    assert measured.min() < 0.142
    assert measured.max() > 0.165
    assert np.ptp(strength) < 0.2, "it cycles about the threshold, not over the whole range"


def test_deadband_ends_the_cycle_at_the_price_of_an_error_within_it() -> None:
    measured, strength = on_the_stair(PID(BETWEEN, PI, deadband=0.0155))
    assert np.ptp(strength) < 1e-9
    assert 0.01 < abs(measured.mean() - BETWEEN) <= 0.0155


def test_dither_halves_what_the_cycle_leaves_in_the_average_and_keeps_the_mean() -> None:
    plain, _ = on_the_stair(PID(BETWEEN, PI))
    dithered, _ = on_the_stair(Dithered(PID(BETWEEN, PI), 0.3, 0.8))
    assert abs(dithered.mean() - BETWEEN) < 0.002
    assert average(dithered).std() < 0.6 * average(plain).std()


def test_dither_stands_still_while_nothing_is_measured() -> None:
    controller = Dithered(PID(0.12, PI), 0.3, 0.8)
    controller.applied(controller.update(0.12, DT))
    held = [controller.update(None, DT) for _ in range(10)]
    assert len(set(held)) == 1


class Integral:
    """The least that is a controller: the integral of the error, kept within the range by what was applied."""

    def __init__(self, target: float, gain: float) -> None:
        self._target, self._gain, self._strength = target, gain, 0.0

    @property
    def state(self) -> Mapping[str, float]:
        return {"strength": self._strength}

    def update(self, measured: float | None, dt: float) -> float:
        require_usable(measured, dt)
        if measured is not None:
            self._strength += self._gain * (self._target - measured) * dt
        return self._strength

    def applied(self, strength: float) -> None:
        self._strength = strength

    def reset(self) -> None:
        self._strength = 0.0


class BangBang:
    """Full strength on one side of the target, full strength on the other, and nothing in between."""

    def __init__(self, target: float, size: float, width: float) -> None:
        self._target, self._size, self._width, self._strength = target, size, width, 0.0

    @property
    def state(self) -> Mapping[str, float]:
        return {}

    def update(self, measured: float | None, dt: float) -> float:
        require_usable(measured, dt)
        if measured is not None and abs(measured - self._target) > self._width:
            self._strength = self._size if measured < self._target else -self._size
        return self._strength

    def applied(self, strength: float) -> None:
        pass

    def reset(self) -> None:
        self._strength = 0.0


@pytest.mark.parametrize("controller", [Integral(0.17, 8.0), BangBang(0.17, 1.0, 0.005)])
def test_another_controller_takes_the_place_of_the_pid(controller: Controller) -> None:
    SetPointLoop(SpeedMeter(), controller, StrengthLimits())
    measured, strength = run(FirstOrder(), controller, Limiter(StrengthLimits(slew_per_s=2.0)), 40.0)
    assert np.abs(strength).max() <= 1.0
    assert abs(measured[100:].mean() - 0.17) < 0.01


@pytest.mark.parametrize(
    ("gains", "code"),
    [
        ((math.nan, 1.0), "bad_gains"),
        ((0.0, 0.0), "bad_gains"),
        ((1.0, 1.0, 0.0, -1.0), "bad_gains"),
        ((1.0, 1.0, 0.0, 0.5, 0.0), "bad_gains"),
        ((1.0, 1.0, 0.0, 0.5, math.nan), "bad_gains"),
    ],
)
def test_gains_that_cannot_control_are_refused(gains: tuple[float, ...], code: str) -> None:
    with pytest.raises(SteerError) as caught:
        Gains(*gains)
    assert caught.value.code == code


@pytest.mark.parametrize("dt", [0.0, -0.1, math.nan, math.inf])
def test_time_that_does_not_pass_is_refused(dt: float) -> None:
    with pytest.raises(SteerError) as caught:
        PID(0.12, PI).update(0.1, dt)
    assert caught.value.code == "bad_dt"
