"""Where the hand takes a bowl that stands between walls; geometry only, no simulator."""

from __future__ import annotations

import numpy as np
import pytest

from sim.grasp import plan
from sim.scene import Boxes, Snapshot

RADIUS, HEIGHT = 0.053, 0.05


def _box(centre: tuple[float, float, float], half: tuple[float, float, float], yaw: float = 0.0) -> Boxes:
    cos, sin = np.cos(yaw), np.sin(yaw)
    rotation = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    return Boxes(np.array([centre]), rotation[None], np.array([half]))


def _bowl() -> Boxes:
    parts = [_box((0.0, 0.0, 0.003), (0.03, 0.03, 0.003))]
    for angle in np.linspace(0.0, 2 * np.pi, 16, endpoint=False):
        wall = RADIUS - 0.004
        parts.append(_box((wall * np.cos(angle), wall * np.sin(angle), HEIGHT / 2), (0.004, 0.011, HEIGHT / 2), angle))
    return Boxes(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("centres", "rotations", "halves")))


def _snapshot(gaps: dict[str, float]) -> Snapshot:
    """The hand over a bowl; gaps: side -> how far outside the bowl's edge a wall stands, m."""
    boxes = {"bowl": _bowl()}
    for side, gap in gaps.items():
        at = RADIUS + gap + 0.005
        x, y = {"near": (-at, 0.0), "far": (at, 0.0), "left": (0.0, at), "right": (0.0, -at)}[side]
        half = (0.005, 0.12, 0.028) if y == 0.0 else (0.12, 0.005, 0.028)
        boxes[side] = _box((x, y, 0.028), half)
    return Snapshot(
        shoulder=np.array([-0.66, 0.0, 0.33]),
        eef=np.array([-0.05, 0.0, 0.3]),
        rotation=np.diag([1.0, -1.0, -1.0]),
        opening=0.077,
        opening_rate=0.0,
        gripper_command=-1.0,
        boxes=boxes,
        speed=dict.fromkeys(boxes, 0.0),
        touching=dict.fromkeys(boxes, frozenset()),
        sites={},
    )


def test_free_bowl_is_taken_at_the_middle_of_its_wall_on_the_near_half() -> None:
    grasp = plan(_snapshot({}), "bowl")
    assert grasp.clear
    assert np.linalg.norm(grasp.position[:2]) == pytest.approx(RADIUS - 0.005, abs=0.004)
    assert grasp.position[0] < 0.02


def test_side_where_the_fingers_fit_is_worth_the_longer_way() -> None:
    assert plan(_snapshot({"near": 0.03, "left": 0.03, "right": 0.03}), "bowl").clear


def test_between_walls_the_hand_comes_down_nearer_to_the_middle() -> None:
    grasp = plan(_snapshot(dict.fromkeys(("near", "far", "left", "right"), 0.03)), "bowl")
    assert grasp.clear
    assert np.linalg.norm(grasp.position[:2]) < RADIUS - 0.015
