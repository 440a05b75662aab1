"""Wordings: distinct, split by words, free of the words that experiments steer with."""

from __future__ import annotations

import re

import pytest

from sim.wordings import CONCEPTS, RESERVED, SPLITS, Concept, choose, find, instruction_for, say, wordings
from steer_runtime.errors import SteerError

TASK = "pick up the butter and place it in the basket"


@pytest.mark.parametrize("concept", CONCEPTS)
def test_thirty_distinct_wordings_in_both_forms_and_both_splits(concept: Concept) -> None:
    all_of_it = wordings(concept)
    assert len({w.template for w in all_of_it}) == len(all_of_it) >= 30
    for split in ("train", "held_out"):
        assert {"prefix", "suffix"} <= {w.form for w in wordings(concept, split)}
    assert len(wordings(concept, "held_out")) == 6


@pytest.mark.parametrize("concept", CONCEPTS)
def test_no_wording_holds_a_reserved_word(concept: Concept) -> None:
    reserved = frozenset().union(*RESERVED.values())
    for wording in wordings(concept):
        assert not reserved & set(re.findall(r"[a-z]+", wording.template)), wording


@pytest.mark.parametrize("concept", CONCEPTS)
def test_instruction_stands_in_every_wording_once(concept: Concept) -> None:
    assert all(w.say(TASK).count(TASK) == 1 for w in wordings(concept))


def test_same_seed_same_wording_and_only_of_the_asked_split() -> None:
    assert choose(["fast"], 7) == choose(["fast"], 7)
    assert {choose(["slow"], seed, "held_out")[0].split for seed in range(40)} == {"held_out"}
    assert len({choose(["slow"], seed)[0].id for seed in range(200)}) == len(wordings("slow", "train"))


def test_plain_is_bare_in_about_half_of_the_draws() -> None:
    bare = sum(choose([], seed)[0].id == "plain-00" for seed in range(400))
    assert 170 < bare < 250


def test_two_concepts_are_both_said() -> None:
    assert say(TASK, [find("fast-01"), find("high-00")]) == f"quickly {TASK}, carry it high"


def test_instruction_says_its_concepts_in_words_of_the_split() -> None:
    for seed in range(30):
        for split in SPLITS:
            said = instruction_for(TASK, ["slow", "high"], seed, split)
            ways = [say(TASK, [a, b]) for a in wordings("slow", split) for b in wordings("high", split)]
            assert said in ways
    assert instruction_for(TASK, [], 3) == say(TASK, choose([], 3))


def test_unknown_wording_is_named() -> None:
    with pytest.raises(SteerError, match="fast-99") as e:
        find("fast-99")
    assert e.value.code == "unknown_wording"
