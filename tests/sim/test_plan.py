"""Plans: stable under growth, paired over modulations, refusing what the expert cannot do."""

from __future__ import annotations

import pytest

from sim.plan import PICK_AND_PLACE, episodes
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
