"""What is measured, what is not, and what the loop does then."""

from __future__ import annotations

import math

import numpy as np
import pytest

from steer_runtime.errors import SteerError
from steer_runtime.setpoint.controller import PID, Gains
from steer_runtime.setpoint.limits import StrengthLimits
from steer_runtime.setpoint.loop import SetPointLoop
from steer_runtime.setpoint.meter import HeightMeter, MeterSettings, Reading, Sample, SpeedMeter
from steer_runtime.setpoint.presets import CONTROLLERS, make_loop, make_meter, tuning
from steer_runtime.setpoint.target import parse_target

DT = 0.2
OPEN, GRIPPED = 0.08, 0.04


def sample(time_s: float, x: float = 0.0, z: float = 0.0, opening: float = OPEN, closed: bool | None = False) -> Sample:
    return Sample(time_s, np.array([x, 0.0, z]), opening, closed)


def straight(meter: SpeedMeter, speed: float, seconds: float) -> Reading:
    reading = Reading(None)
    for k in range(round(seconds / DT) + 1):
        reading = meter.add(sample(k * DT, x=speed * k * DT))
    return reading


def test_speed_is_way_over_time() -> None:
    assert straight(SpeedMeter(), 0.12, 2.0).value == pytest.approx(0.12)


def test_average_follows_a_step_with_its_time_constant_whatever_the_sampling() -> None:
    for dt in (0.05, 0.2):
        meter = SpeedMeter(MeterSettings(time_constant_s=0.5))
        x, t = 0.0, 0.0
        meter.add(sample(t))
        values = []
        for speed, seconds in ((0.1, 2.0), (0.2, 0.6)):
            for _ in range(round(seconds / dt)):
                x, t = x + speed * dt, t + dt
                values.append(meter.add(sample(t, x=x)).value)
        assert values[-1] == pytest.approx(0.2 - 0.1 * math.exp(-0.6 / 0.5), abs=1e-6)


def test_speed_is_not_measured_while_the_gripper_moves_and_shortly_after() -> None:
    meter = SpeedMeter()
    straight(meter, 0.1, 1.0)
    moving = meter.add(sample(1.2, x=0.1, opening=0.06, closed=True))
    resting = meter.add(sample(1.4, x=0.1, opening=0.06, closed=True))
    again = meter.add(sample(1.6, x=0.12, opening=0.06, closed=True))
    assert (moving.value, moving.why) == (None, "gripper moves")
    assert (resting.value, resting.why) == (None, "gripper moves")
    assert again.value == pytest.approx(0.1), "the time it stood still to grip is not part of the average"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_position_that_is_no_number_is_skipped_and_said(bad: float) -> None:
    meter = SpeedMeter()
    straight(meter, 0.1, 1.0)
    assert meter.add(sample(1.2, x=bad)) == Reading(None, "not finite")
    assert meter.add(sample(1.4, x=0.14)).value == pytest.approx(0.1)


def test_hand_that_stands_says_nothing_of_its_pace() -> None:
    meter = SpeedMeter()
    straight(meter, 0.1, 1.0)
    assert meter.add(sample(1.2, x=0.101)).why == "hand stands still"
    assert meter.add(sample(1.4, x=0.121)).value == pytest.approx(0.1)


def test_hand_stands_below_a_quarter_of_a_slow_target() -> None:
    meter = make_meter(parse_target("speed", ["20", "mm/s"]))
    meter.add(sample(0.0))
    assert meter.add(sample(DT, x=0.006 * DT)).value == pytest.approx(0.006)
    assert meter.add(sample(2 * DT, x=0.010 * DT)).why == "hand stands still"


def test_gap_and_clock_that_goes_back_give_no_speed() -> None:
    meter = SpeedMeter()
    straight(meter, 0.1, 1.0)
    assert meter.add(sample(5.0, x=9.0)).why == "gap between samples"
    assert meter.add(sample(5.0, x=9.0)).why == "clock does not advance"
    assert meter.add(sample(1.0, x=0.0)).why == "clock does not advance"
    assert meter.add(sample(1.2, x=0.02)).value is not None


def carried(meter: HeightMeter, height: float) -> list[Reading]:
    """Close on something at z 0.05, lift it straight, carry it sideways, lower it, let go."""
    out, t = [], 0.0
    path = [
        *[(0.0, 0.05, OPEN, False)] * 2,
        (0.0, 0.05, 0.06, True),
        *[(0.0, 0.05, GRIPPED, True)] * 3,
        *[(0.0, 0.05 + height * s, GRIPPED, True) for s in (0.25, 0.5, 0.75, 1.0)],
        *[(0.05 * s, 0.05 + height, GRIPPED, True) for s in range(1, 8)],
        *[(0.35, 0.05 + height * s, GRIPPED, True) for s in (0.6, 0.2)],
        *[(0.35, 0.05 + height * 0.2, OPEN, False)] * 2,
    ]
    for x, z, opening, closed in path:
        out.append(meter.add(sample(t, x=x, z=z, opening=opening, closed=closed)))
        t += DT
    return out


def test_height_is_measured_while_something_is_carried_sideways_and_never_else() -> None:
    readings = carried(HeightMeter(), 0.25)
    measured = [r.value for r in readings if r.value is not None]
    assert len(measured) == 7
    assert measured == pytest.approx([0.25] * 7)
    whys = [r.why for r in readings]
    assert {"nothing carried", "lifting or lowering", "gripper moves"} <= set(whys)


def test_empty_hand_carries_nothing() -> None:
    meter = HeightMeter()
    for k in range(20):
        reading = meter.add(sample(k * DT, x=0.05 * k, z=0.02 * k, opening=0.001, closed=True))
        assert reading.value is None


def test_height_needs_the_gripper_command() -> None:
    meter = HeightMeter()
    meter.add(sample(0.0, closed=None))
    assert meter.add(sample(DT, x=0.1, closed=None)).why == "gripper command unknown"


def loop() -> SetPointLoop:
    return SetPointLoop(SpeedMeter(), PID(0.12, Gains(4.0, 8.0, 0.5)), StrengthLimits(slew_per_s=2.0))


def test_loop_holds_the_strength_while_nothing_is_measurable_and_counts_why() -> None:
    closed = loop()
    t = x = 0.0
    for _ in range(10):
        closed.see(sample(t, x=x))
        moved = closed.act()
        t, x = t + DT, x + 0.06 * DT
    assert moved.held == ""
    assert moved.strength > 0
    held = []
    for opening in (0.06, 0.04, 0.04):
        closed.see(sample(t, x=x, opening=opening, closed=True))
        held.append(closed.act())
        t += DT
    assert {step.strength for step in held} == {moved.strength}
    assert {step.held for step in held} == {"gripper moves"}
    assert closed.counters["held: gripper moves"] == 3
    assert closed.counters["held: first sample"] == 1
    assert closed.counters["updates"] == 13


def test_loop_moves_nothing_without_a_newer_sample() -> None:
    closed = loop()
    for k in range(6):
        closed.see(sample(k * DT, x=0.06 * k * DT))
        last = closed.act()
    again = closed.act()
    assert (again.strength, again.held) == (last.strength, "no newer sample")


def test_loop_holds_on_a_meter_that_gives_nan() -> None:
    class Broken:
        def add(self, given: Sample) -> Reading:
            return Reading(math.nan)

        def reset(self) -> None:
            pass

    closed = SetPointLoop(Broken(), PID(0.12, Gains(4.0, 8.0)), StrengthLimits())
    for k in range(5):
        closed.see(sample(k * DT))
        step = closed.act()
        assert (step.strength, step.held) == (0.0, "not finite")


def test_reset_begins_another_episode_at_rest() -> None:
    closed = loop()
    first = []
    for _ in range(2):
        strengths = []
        for k in range(15):
            closed.see(sample(k * DT, x=0.06 * k * DT))
            strengths.append(closed.act().strength)
        first.append(strengths)
        closed.reset()
        assert closed.strength == 0.0
    assert first[0] == first[1]


def test_dose_that_was_seen_bounds_the_loop_even_while_it_holds() -> None:
    closed = SetPointLoop(
        SpeedMeter(), PID(0.5, Gains(40.0, 8.0)), StrengthLimits(slew_per_s=50.0, dose=0.2, trial=0.1)
    )
    for k in range(4):
        closed.see(sample(k * DT, x=0.01 * k))
        step = closed.act()
        closed.saw_dose(step.strength, 0.5 * abs(step.strength))
    assert step.strength == pytest.approx(0.4)
    closed.saw_dose(0.4, 0.4)
    assert closed.act().strength == pytest.approx(0.2)


@pytest.mark.parametrize("kind", CONTROLLERS)
@pytest.mark.parametrize(("quantity", "value"), [("speed", "0.12 m/s"), ("height", "25 cm")])
def test_every_preset_builds_a_loop(kind: str, quantity: str, value: str) -> None:
    made = make_loop(parse_target(quantity, value.split()), tuning(kind, quantity), StrengthLimits())
    assert made.act().strength == 0.0


@pytest.mark.parametrize(
    ("quantity", "words", "value", "shown"),
    [
        ("speed", ["0.12", "m/s"], 0.12, "0.12 m/s"),
        ("speed", ["12cm/s"], 0.12, "12 cm/s"),
        ("height", ["25", "cm"], 0.25, "25 cm"),
        ("height", [".25m"], 0.25, "0.25 m"),
        ("height", ["1e2", "mm"], 0.1, "100 mm"),
    ],
)
def test_target_is_read_with_its_unit(quantity: str, words: list[str], value: float, shown: str) -> None:
    target = parse_target(quantity, words)
    assert target.value == pytest.approx(value)
    assert target.shown == shown


@pytest.mark.parametrize(
    ("quantity", "words", "code"),
    [
        ("pace", ["1", "m/s"], "unknown_quantity"),
        ("speed", ["0.12"], "no_unit"),
        ("speed", ["0.12", "m"], "unknown_unit"),
        ("height", ["12", "cm/s"], "unknown_unit"),
        ("speed", ["fast"], "bad_target"),
        ("speed", ["nan", "m/s"], "bad_target"),
        ("speed", ["0", "m/s"], "bad_target"),
        ("speed", ["-0.1", "m/s"], "bad_target"),
        ("speed", ["1e999", "m/s"], "bad_target"),
        ("speed", ["12", "m/s"], "bad_target"),
        ("height", [], "bad_target"),
    ],
)
def test_target_without_a_usable_number_and_unit_is_refused(quantity: str, words: list[str], code: str) -> None:
    with pytest.raises(SteerError) as caught:
        parse_target(quantity, words)
    assert caught.value.code == code


def test_controller_of_another_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(SteerError, match="'pid'"):
        tuning("pi", "speed")
