"""Measures of an episode, on snapshots whose motion is known."""

from __future__ import annotations

import numpy as np
import pytest

from sim.evaluation.motion import STILL, Watch
from sim.scene import Boxes, Snapshot

OBJECTS = ("milk_1", "soup_1")
FINGERS = frozenset({"left_finger", "right_finger"})
GROUND = frozenset({"ground"})


def snapshot(eef: tuple[float, float, float], milk: tuple[float, float, float], touching: frozenset[str]) -> Snapshot:
    """The hand, the milk (a cube of 4 cm) and the soup far away, which nothing touches but the ground."""

    def box(centre: tuple[float, float, float]) -> Boxes:
        return Boxes(np.array([centre]), np.eye(3)[None], np.full((1, 3), 0.02))

    return Snapshot(
        shoulder=np.zeros(3),
        eef=np.array(eef),
        rotation=np.eye(3),
        opening=0.04,
        opening_rate=0.0,
        gripper_command=1.0,
        boxes={"milk_1": box(milk), "soup_1": box((0.5, 0.5, 0.02))},
        speed={},
        touching={"milk_1": touching, "soup_1": GROUND},
        sites={},
    )


def carried() -> Watch:
    """1 cm a step down to the milk, up with it, then across at 20 cm in steps of 2 cm, then let go."""
    watch = Watch(snapshot((0, 0, 0.22), (0, 0, 0.02), GROUND), "milk_1", OBJECTS)
    for n in range(1, 21):
        watch.add(snapshot((0, 0, 0.22 - 0.01 * n), (0, 0, 0.02), GROUND), ())
    for n in range(1, 21):
        z = 0.02 + 0.01 * n
        watch.add(snapshot((0, 0, z), (0, 0, z), FINGERS), ())
    for n in range(1, 21):
        watch.add(snapshot((0.02 * n, 0, 0.22), (0.02 * n, 0, 0.22), FINGERS), ())
    return watch


def test_speed_counts_until_the_object_is_let_go() -> None:
    watch = carried()
    for _ in range(100):
        watch.add(snapshot((0.4, 0, 0.22), (0.4, 0, 0.02), GROUND), ())
    # 40 steps of 1 cm and 20 of 2 cm at 20 Hz; the hundred steps of waiting are no part of the way.
    assert watch.motion().speed == pytest.approx((40 * 0.2 + 20 * 0.4) / 60)


def test_height_is_that_of_the_middle_of_the_way() -> None:
    assert carried().motion().height == pytest.approx(0.20)


def test_near_speed_counts_the_last_ten_centimetres_before_the_grasp() -> None:
    watch = Watch(snapshot((0, 0, 0.32), (0, 0, 0.02), GROUND), "milk_1", OBJECTS)
    for z in (0.22, 0.12, 0.10, 0.08):
        watch.add(snapshot((0, 0, z), (0, 0, 0.02), GROUND), ())
    watch.add(snapshot((0, 0, 0.02), (0, 0, 0.02), FINGERS), ())
    # Steps that began within 10 cm: 0.10 to 0.08 m; the one that ends in the grasp is the grasp's.
    assert watch.motion().near_speed == pytest.approx(0.02 * 20)


def test_object_counts_as_lifted_when_held_clear_of_the_ground() -> None:
    watch = Watch(snapshot((0, 0, 0.02), (0, 0, 0.02), GROUND), "soup_1", OBJECTS)
    watch.add(snapshot((0, 0, 0.05), (0, 0, 0.05), FINGERS | GROUND), ())
    watch.add(snapshot((0, 0, 0.03), (0, 0, 0.03), FINGERS), ())
    assert watch.lifted is None
    watch.add(snapshot((0, 0, 0.05), (0, 0, 0.05), FINGERS), ())
    assert watch.lifted == "milk_1"


def test_success_is_done_at_once_and_released_once_it_stays_untouched() -> None:
    watch = carried()
    watch.add(snapshot((0.4, 0, 0.2), (0.4, 0, 0.2), FINGERS), {"milk_1"})
    assert watch.done
    for n in range(STILL):
        assert not watch.released, n
        watch.add(snapshot((0.4, 0, 0.22), (0.4, 0, 0.02), GROUND), {"milk_1"})
    assert watch.released
    assert watch.placed == "milk_1"


def test_what_was_never_carried_has_no_height() -> None:
    watch = Watch(snapshot((0, 0, 0.5), (0, 0, 0.02), GROUND), "milk_1", OBJECTS)
    watch.add(snapshot((0, 0, 0.49), (0, 0, 0.02), GROUND), ())
    motion = watch.motion()
    assert (motion.height, motion.near_speed, motion.lifted, motion.done) == (None, None, None, False)
    assert motion.speed == pytest.approx(0.2)
