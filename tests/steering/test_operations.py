"""Strength blends every operation with the identity."""

from __future__ import annotations

import itertools

import fabricate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_runtime.directions.direction import OPERATIONS, Operation
from steer_runtime.steering.operations import writes
from steering.subjects import neuron_direction

POLICY = fabricate.tiny_policy()
finite = st.floats(-50, 50, width=32)


def changed(op: Operation, strength: float, f: float, alpha: float, low: float = -1.0) -> float:
    bounds = min(low, alpha) if op == "clamp" else None
    direction = neuron_direction(POLICY, neurons=[(0, 0)], alpha=alpha, op=op, low=bounds)
    w = writes(direction, strength)
    return float(np.clip(np.float32(f) * w.scale + w.shift, w.low, w.high)[0])


@given(f=finite, alpha=finite)
def test_full_strength_is_the_operation_itself(f: float, alpha: float) -> None:
    f32, a32 = np.float32(f), np.float32(alpha)
    assert changed("override", 1.0, f, alpha) == a32
    assert changed("add", 1.0, f, alpha) == pytest.approx(f32 + a32, rel=1e-5, abs=1e-5)
    assert changed("scale", 1.0, f, alpha) == pytest.approx(f32 * a32, rel=1e-4, abs=1e-4)
    assert changed("ablate", 1.0, f, alpha) == 0.0
    assert changed("clamp", 1.0, f, alpha) == np.clip(f32, min(np.float32(-1), a32), a32)


@settings(max_examples=60)
@given(op=st.sampled_from(OPERATIONS), f=finite, alpha=finite)
def test_strength_is_continuous_at_zero(op: Operation, f: float, alpha: float) -> None:
    assert changed(op, 1e-7, f, alpha) == pytest.approx(f, abs=2e-3)


@settings(max_examples=60)
@given(op=st.sampled_from(OPERATIONS), f=finite, alpha=finite)
def test_more_strength_never_goes_back(op: Operation, f: float, alpha: float) -> None:
    moved = [abs(changed(op, g, f, alpha) - f) for g in (0.01, 0.25, 0.5, 0.75, 1.0)]
    assert all(b >= a - 1e-3 for a, b in itertools.pairwise(moved))


def test_the_smallest_strength_of_a_clamp_is_finite() -> None:
    w = writes(neuron_direction(POLICY, neurons=[(0, 0)], alpha=2.0, op="clamp", low=1.0), 1e-45)
    assert np.isfinite(w.low).all()
    assert np.isfinite(w.high).all()
