"""Range, slew and dose of a strength are kept whatever a controller wants."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_runtime.errors import SteerError
from steer_runtime.setpoint.limits import LEAST, Limiter, StrengthLimits

WANTED = st.lists(
    st.tuples(st.floats(-1e6, 1e6, allow_nan=False), st.floats(0.0, 5.0)),
    min_size=1,
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(WANTED, st.floats(-3, 0), st.floats(0.01, 3), st.floats(0.01, 20))
def test_range_and_slew_are_never_exceeded(
    wanted: list[tuple[float, float]], low: float, high: float, slew: float
) -> None:
    limiter = Limiter(StrengthLimits(low, high, slew))
    for value, dt in wanted:
        before = limiter.strength
        strength = limiter.apply(value, dt)
        assert low <= strength <= high
        assert abs(strength - before) <= slew * dt * (1 + 1e-9) + 1e-12


@settings(max_examples=60, deadline=None)
@given(WANTED, st.floats(0.05, 2.0), st.floats(0.05, 5.0), st.floats(0.05, 5.0), st.floats(0.1, 50))
def test_dose_is_never_exceeded_however_little_is_known_beforehand(
    wanted: list[tuple[float, float]], limit: float, negative: float, positive: float, slew: float
) -> None:
    # The trial strength is small enough for either end, as it must be chosen.
    trial = max(LEAST, min(1.0, limit / max(negative, positive)))
    limiter = Limiter(StrengthLimits(-2.0, 2.0, slew, dose=limit, trial=trial))
    for value, dt in wanted:
        before = limiter.strength
        strength = limiter.apply(value, dt)
        dose = abs(strength) * (negative if strength < 0 else positive)
        assert dose <= limit * (1 + 1e-9)
        assert abs(strength - before) <= slew * dt * (1 + 1e-9) + 1e-12
        limiter.saw(strength, dose)
    assert "dose_exceeded" not in limiter.counters


@settings(max_examples=60, deadline=None)
@given(WANTED, st.lists(st.floats(0.0, 5.0), min_size=30, max_size=30))
def test_after_a_dose_was_seen_no_strength_goes_beyond_what_it_allows(
    wanted: list[tuple[float, float]], doses: list[float]
) -> None:
    limiter = Limiter(StrengthLimits(dose=0.5, trial=0.1))
    worst = {-1: 0.0, 1: 0.0}
    for (value, dt), dose in zip(wanted, doses, strict=False):
        before = limiter.strength
        strength = limiter.apply(value, dt)
        end = -1 if strength < 0 else 1
        allowed = 0.5 / worst[end] if worst[end] else 0.1
        assert abs(strength) <= allowed * (1 + 1e-9)
        # Faster than the slew limit only to come back under a limit.
        assert abs(strength - before) <= 2.0 * dt + 1e-9 or abs(strength) < abs(before)
        limiter.saw(strength, dose * abs(strength))
        if abs(strength) >= LEAST:
            worst[end] = max(worst[end], dose)


def test_what_limited_is_counted() -> None:
    limiter = Limiter(StrengthLimits(slew_per_s=1.0, dose=0.2, dose_per_strength=(0.4, 0.4)))
    limiter.apply(3.0, 0.1)
    assert limiter.strength == pytest.approx(0.1)
    limiter.saw(0.1, 0.3)
    counters = limiter.counters
    assert (counters["range"], counters["slew"], counters["dose"], counters["dose_exceeded"]) == (1, 1, 1, 1)
    assert limiter.apply(3.0, 0.1) == pytest.approx(0.2 / 3.0), "the dose that was seen at 0.1 is 3 a strength"


@pytest.mark.parametrize("wanted", [math.nan, math.inf])
def test_strength_that_is_no_number_is_refused_and_nothing_moves(wanted: float) -> None:
    limiter = Limiter(StrengthLimits())
    limiter.apply(0.1, 0.2)
    with pytest.raises(SteerError) as caught:
        limiter.apply(wanted, 0.2)
    assert caught.value.code == "not_finite"
    assert limiter.strength == 0.1


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"low": 0.2}, "bad_range"),
        ({"high": math.nan}, "bad_range"),
        ({"low": 0.0, "high": 0.0}, "bad_range"),
        ({"slew_per_s": 0.0}, "bad_slew"),
        ({"slew_per_s": math.nan}, "bad_slew"),
        ({"dose": 0.0}, "bad_dose"),
        ({"dose": 0.1, "dose_per_strength": (-1.0, 0.0)}, "bad_dose"),
        ({"trial": 0.0}, "bad_dose"),
    ],
)
def test_limits_that_bound_nothing_are_refused(values: dict[str, float], code: str) -> None:
    with pytest.raises(SteerError) as caught:
        StrengthLimits(**values)  # type: ignore[arg-type]
    assert caught.value.code == code
