"""Manners: words, what the expert does about them, and what prompts say."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sim.expert import Style
from sim.manner import PLAIN, SLOTS, Manner, draw
from sim.rollout import STYLES, Assignment
from steer_runtime.errors import SteerError


def test_plain_is_the_middle_word_of_each_slot_and_says_nothing() -> None:
    assert Manner() == PLAIN == STYLES["plain"]
    assert PLAIN.words() == ("usually", "level", "ordinary")
    assert PLAIN.concepts() == ()
    assert PLAIN.style() == Style(speed=0.65, height=0.20, near_speed=0.75 * 0.65)


def test_pace_orders_speeds_and_care_is_a_share_of_them() -> None:
    styles = [Manner(pace=pace, care=0).style() for pace in range(5)]
    assert [s.speed for s in styles] == sorted(s.speed for s in styles)
    assert [s.near_speed for s in styles] == pytest.approx([0.35 * s.speed for s in styles])
    assert Manner(height=0, care=2).style() == Style(0.65, None, None)


@pytest.mark.parametrize(
    ("manner", "concepts"),
    [
        (Manner(0, 1, 1), ("slow",)),
        (Manner(4, 2, 0), ("fast", "high", "careful")),
        (Manner(1, 0, 2), ()),
        (Manner(3, 1, 1), ()),
    ],
)
def test_only_the_ends_are_said(manner: Manner, concepts: tuple[str, ...]) -> None:
    assert manner.concepts() == concepts


@pytest.mark.parametrize("indices", [(5, 1, 1), (2, 3, 1), (2, 1, -1)])
def test_index_of_no_word_is_refused(indices: tuple[int, int, int]) -> None:
    with pytest.raises(SteerError, match="no word's index") as e:
        Manner(*indices)
    assert e.value.code == "bad_manner"


def test_draws_cover_every_word_and_are_plain_half_of_the_time_and_more() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw(rng) for _ in range(2000)]
    for slot, words in SLOTS.items():
        counts = Counter(getattr(m, slot) for m in drawn)
        assert set(counts) == set(range(len(words)))
    assert max(abs(n - 400) for n in Counter(m.pace for m in drawn).values()) < 80
    assert 0.62 < np.mean([m.height == 1 for m in drawn]) < 0.71


def test_given_manner_overrides_the_named_style_and_a_mere_label_needs_one() -> None:
    assert Assignment("milk_1", "quickly").how == Manner(pace=4)
    assert Assignment("milk_1", "quickly", manner=Manner(pace=1)).how == Manner(pace=1)
    with pytest.raises(SteerError) as e:
        Assignment("milk_1", "mix")
    assert e.value.code == "unknown_style"
