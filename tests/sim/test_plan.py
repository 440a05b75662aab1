"""Plans: stable under growth, paired over modulations, refusing what the expert cannot do."""

from __future__ import annotations

from collections import Counter

import pytest

from sim.manner import PLAIN, Manner
from sim.plan import PICK_AND_PLACE, ROUND, episodes, in_rounds
from steer_runtime.errors import SteerError

STYLES = ("plain", "quickly", "slowly", "high")


def test_longer_plan_begins_with_the_shorter_one() -> None:
    short = episodes("libero_object", "random", STYLES, 30, 3)
    assert episodes("libero_object", "random", STYLES, 90, 3)[:30] == short


def test_modulations_share_a_layout_and_layouts_differ() -> None:
    plan = episodes("libero_object", "random", STYLES, 80, 0)
    groups = [plan[i : i + 4] for i in range(0, 80, 4)]
    assert all(len({(e.task_id, e.target_index, e.seed) for e in g}) == 1 for g in groups)
    assert all([e.style for e in g] == list(STYLES) for g in groups)
    assert len({g[0].seed for g in groups}) == 20


def test_every_task_and_several_targets_come_up() -> None:
    plan = episodes("libero_object", "random", ("plain",), 60, 0)
    assert {e.task_id for e in plan} == set(PICK_AND_PLACE["libero_object"])
    assert {e.target_index % 6 for e in plan if e.task_id == 2} == set(range(6))


def test_named_modulations_have_their_manner() -> None:
    plan = episodes("libero_object", "random", STYLES, 4, 0)
    assert [e.manner for e in plan] == [PLAIN, Manner(pace=4), Manner(pace=0), Manner(height=2)]


def test_drawn_manners_have_every_pace_in_five_and_are_plain_otherwise_in_two_of_three() -> None:
    plan = episodes("libero_object", "random", ("mix",), 1000, 3)
    assert all({e.manner.pace for e in plan[i : i + 5]} == set(range(5)) for i in range(0, 1000, 5))
    # Half of them, and a third of the others.
    for shares in (Counter(e.manner.height for e in plan), Counter(e.manner.care for e in plan)):
        assert 620 < shares[1] < 710
        assert min(shares[0], shares[2]) > 130
    paces_of_a_task = Counter((e.task_id, e.manner.pace) for e in plan)
    assert min(paces_of_a_task.values()) > 8
    assert len(paces_of_a_task) == 50
    assert episodes("libero_object", "random", ("mix",), 60, 3) == plan[:60]


def test_mixed_layouts_are_mostly_random_and_shared_by_the_modulations() -> None:
    plan = episodes("libero_object", "mixed", STYLES, 2000, 5)
    kinds = Counter(e.layout for e in plan)
    assert set(kinds) == {"random", "official", "jitter"}
    assert 0.62 < kinds["random"] / 2000 < 0.78
    assert all(len({e.layout for e in plan[i : i + 4]}) == 1 for i in range(0, 2000, 4))


def test_rounds_hold_the_plan_and_keep_tasks_even_whenever_a_run_stops() -> None:
    plan = episodes("libero_object", "mixed", ("mix",), 230, 0)
    rounds = in_rounds(plan)
    order = [e for batch in rounds for e in batch]
    assert sorted(order, key=lambda e: e.index) == plan
    assert all(len({e.task_id for e in batch}) == 1 for batch in rounds)
    for stop in range(1, 230):
        counts = Counter(e.task_id for e in order[:stop])
        assert max(counts.values()) - min(counts.get(t, 0) for t in range(10)) <= ROUND


def test_two_seeds_share_no_layout() -> None:
    one, two = (episodes("libero_object", "random", ("plain",), 500, seed) for seed in (0, 1))
    assert not {e.seed for e in one} & {e.seed for e in two}


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"suite": "libero_10"}, "unknown_suite"),
        ({"layout": "tidy"}, "unknown_layout"),
        ({"styles": ("plain", "sideways")}, "unknown_style"),
        ({"styles": ()}, "unknown_style"),
        ({"count": 0}, "bad_count"),
        ({"suite": "libero_spatial", "tasks": (5,)}, "task_out_of_range"),
    ],
)
def test_what_cannot_be_planned_is_refused(changed: dict, code: str) -> None:
    asked = {"suite": "libero_object", "layout": "random", "styles": STYLES, "count": 4, "seed": 0} | changed
    with pytest.raises(SteerError) as e:
        episodes(**asked)
    assert e.value.code == code
