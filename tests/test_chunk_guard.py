"""The guard on whole chunks: what it lets through is within the limits, and what was within is untouched."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from steer_runtime.chunk_guard import ROUNDING, ChunkGuard, ChunkLimits
from steer_runtime.errors import SteerError
from steer_runtime.types import LIBERO_ACTION_SPACE, ActionChunk

TOLERANCE = 4 * ROUNDING


def chunk(actions: Any) -> ActionChunk:
    return ActionChunk(np.asarray(actions, np.float32), LIBERO_ACTION_SPACE, {})


def along_x(*values: float, gripper: float = 1.0) -> ActionChunk:
    rows = np.zeros((len(values), 7))
    rows[:, 0], rows[:, 6] = values, gripper
    return chunk(rows)


def test_a_chunk_within_the_limits_is_the_same_object() -> None:
    guard = ChunkGuard(ChunkLimits(bound=1.0, step=0.5, jerk=0.6))
    given_chunk = along_x(0.0, 0.4, 0.8, 0.8)
    checked, excess = guard.check(given_chunk)
    assert checked is given_chunk
    assert excess is None


@pytest.mark.parametrize(
    ("limits", "values", "wanted", "named"),
    [
        ({"bound": 0.5}, (0.2, 0.9, -2.0), (0.2, 0.5, -0.5), "bound 2"),
        ({"step": 0.25}, (0.0, 1.0, 1.0), (0.0, 0.25, 0.5), "step 1"),
        ({"jerk": 0.1}, (0.0, 0.1, 0.5), (0.0, 0.1, 0.3), "jerk 0.3"),
    ],
)
def test_each_limit_clamps_to_the_nearest_motion_and_says_by_how_much(
    limits: dict[str, float], values: tuple[float, ...], wanted: tuple[float, ...], named: str
) -> None:
    checked, excess = ChunkGuard(ChunkLimits(**limits)).check(along_x(*values))
    assert checked.actions[:, 0] == pytest.approx(wanted)
    assert np.all(checked.actions[:, 6] == 1.0)
    assert excess is not None
    assert named in excess.sentence
    assert list(excess.limits) == list(limits)


def test_the_first_row_is_held_to_the_last_chunk() -> None:
    guard = ChunkGuard(ChunkLimits(step=0.25))
    guard.check(along_x(0.0))
    checked, _ = guard.check(along_x(1.0))
    assert checked.actions[0, 0] == pytest.approx(0.25)
    guard.reset()
    checked, excess = guard.check(along_x(1.0))
    assert (float(checked.actions[0, 0]), excess) == (1.0, None)


def test_a_chunk_that_replans_may_go_on_from_any_row_of_the_last() -> None:
    guard = ChunkGuard(ChunkLimits(step=0.25))
    guard.check(along_x(0.0, 0.2, 0.4, 0.6))
    assert guard.check(along_x(0.3, 0.5))[1] is None


def test_a_veto_refuses_the_whole_chunk_and_forgets_what_came_before() -> None:
    guard = ChunkGuard(ChunkLimits(step=0.25, on_excess="veto"))
    guard.check(along_x(0.0))
    with pytest.raises(SteerError, match=r"step 1 .*expected at most 0\.25.*refused") as refused:
        guard.check(along_x(1.0))
    assert refused.value.code == "chunk_vetoed"
    assert guard.check(along_x(1.0))[1] is None


def test_the_gripper_may_jump() -> None:
    guard = ChunkGuard(ChunkLimits(bound=0.5, step=0.1, jerk=0.1))
    rows = np.zeros((3, 7))
    rows[:, 6] = (-1.0, 1.0, -1.0)
    assert guard.check(chunk(rows))[1] is None


@pytest.mark.parametrize("name", ["bound", "step", "jerk"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_limit_that_is_none_is_refused(name: str, value: float) -> None:
    with pytest.raises(SteerError, match=name):
        ChunkLimits(**{name: value})  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(
    chunks=st.lists(
        st.integers(1, 6).flatmap(lambda n: arrays(np.float32, (n, 7), elements=st.floats(-8, 8, width=32))),
        min_size=1,
        max_size=4,
    ),
    bound=st.floats(0.1, 2.0),
    step=st.floats(0.05, 2.0),
    jerk=st.floats(0.05, 2.0),
)
def test_whatever_comes_in_bounds_and_steps_hold_in_every_row(
    chunks: list[np.ndarray], bound: float, step: float, jerk: float
) -> None:
    guard = ChunkGuard(ChunkLimits(bound=bound, step=step, jerk=jerk))
    before: np.ndarray | None = None
    for actions in chunks:
        motion = guard.check(chunk(actions))[0].actions[:, :-1].astype(np.float64)
        assert np.abs(motion).max() <= bound + TOLERANCE
        assert np.abs(np.diff(motion, axis=0)).max(initial=0.0) <= step + TOLERANCE
        if before is not None:
            assert np.abs(before - motion[0]).max(axis=1).min() <= step + TOLERANCE
        inside = np.all(np.abs(motion) < bound - TOLERANCE, axis=1)
        bent = np.abs(np.diff(motion, n=2, axis=0)).max(axis=1, initial=0.0)
        free_of_bounds = inside[2:] if len(motion) > 2 else np.empty(0, bool)
        assert np.all(bent[free_of_bounds] <= jerk + TOLERANCE)
        before = motion
