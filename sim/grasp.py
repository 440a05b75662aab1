"""Where a two-finger hand takes an object from above, given the boxes the scene is made of.

Invariant: the choice is a function of the snapshot alone, and `clear` says whether the hand fits there.

Measured on robosuite's Panda with LIBERO's objects: the grip site lies between the pads, the fingers open along the
hand's y axis (world y at yaw 0) to 7.7 cm, the hand is 21 cm wide along that axis and 6.4 cm across, from 2.4 cm above
the grip site upwards; an object between the fingers meets it 3.3 cm above.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sim.scene import Boxes, Snapshot

MAX_WIDTH = 0.070
"""Widest object that the open fingers (7.7 cm) go round with room to arrive off centre, m."""
PALM = 0.030
"""How far an object may reach above the grip site before it touches the palm, m."""
HAND_HALF_LENGTH, HAND_HALF_DEPTH, HAND_FROM = 0.110, 0.040, 0.030
"""The hand's volume with a few millimetres of margin: along and across the fingers' axis, and its lowest point."""
FINGER_REACH, FINGER_HALF_DEPTH, FINGER_FROM = 0.060, 0.018, -0.015
"""The same for the open fingers."""
RIM_DEPTH = 0.015
"""How deep below a bowl's rim the pads' centre goes, m."""
_GRID = 4


@dataclass(frozen=True)
class Grasp:
    """position [3]: of the grip site. yaw: of the hand about world z from the home pose, in [-pi/2, pi/2], rad.
    width: of the object between the fingers, m. clear: nothing else is where the hand and the open fingers go."""

    position: np.ndarray
    yaw: float
    width: float
    clear: bool


def hand_yaw(rotation: np.ndarray) -> float:
    """Yaw of a hand that points down, rotation [3, 3], in [-pi, pi]; 0 when the fingers open along world y."""
    return float(np.arctan2(rotation[0, 1], -rotation[1, 1]))


def plan(snapshot: Snapshot, target: str) -> Grasp:
    """Best grasp of `target` now: across its narrowest free side, or on its rim when it is hollow and too wide."""
    boxes = snapshot.boxes[target]
    obstacles = _points(snapshot.boxes, target, boxes)
    centre, low, high = boxes.centre, boxes.low, boxes.high
    # When the hand is at the object already, another yaw would be a detour: stay with this one unless it is bad.
    close = float(np.exp(-((np.linalg.norm(snapshot.eef - centre) / 0.08) ** 2)))
    now = hand_yaw(snapshot.rotation)
    body = _body_grasp(boxes, low, high, obstacles, now, close)
    if body.width <= MAX_WIDTH or not _hollow(boxes, centre, high):
        return body
    return _rim_grasp(boxes, centre, obstacles, snapshot.eef, now, close)


def _points(all_boxes: Mapping[str, Boxes], target: str, boxes: Boxes) -> np.ndarray:
    """[n, 3] points of everything but the target, within a hand's reach of it."""
    reach = HAND_HALF_LENGTH + float(np.linalg.norm(boxes.high - boxes.low)) / 2
    out = [np.empty((0, 3))]
    for name, other in all_boxes.items():
        if name == target:
            continue
        near = (np.abs(other.centres - boxes.centre).max(1) - np.linalg.norm(other.halves, axis=1)) < reach
        if near.any():
            out.append(Boxes(other.centres[near], other.rotations[near], other.halves[near]).grid(_GRID))
    return np.concatenate(out)


def _hits(points: np.ndarray, position: np.ndarray, axis: np.ndarray) -> int:
    """How many points lie in the volume of the hand or of the open fingers; axis [2]: the fingers' direction."""
    local = points - position
    along = np.abs(local[:, :2] @ axis)
    across = np.abs(local[:, :2] @ np.array([-axis[1], axis[0]]))
    up = local[:, 2]
    hand = (along < HAND_HALF_LENGTH) & (across < HAND_HALF_DEPTH) & (up > HAND_FROM)
    fingers = (along < FINGER_REACH) & (across < FINGER_HALF_DEPTH) & (up > FINGER_FROM)
    return int((hand | fingers).sum())


def _body_grasp(
    boxes: Boxes, low: np.ndarray, high: np.ndarray, obstacles: np.ndarray, now: float, close: float
) -> Grasp:
    height = high[2] - low[2]
    # Flat things close to what they lie on, tall ones in the upper half, and never deeper than the palm allows.
    up = max(0.012, height * 0.5, height - PALM) if height > 0.045 else max(0.010, height * 0.5)
    z = low[2] + max(up, height - PALM)
    corners = boxes.corners
    band = corners[(corners[..., 2].min(1) < z + 0.015) & (corners[..., 2].max(1) > z - 0.015)]
    band = (band if len(band) else corners).reshape(-1, 3)
    middle = (band[:, :2].max(0) + band[:, :2].min(0)) / 2
    best: tuple[float, Grasp] | None = None
    yaws = _candidates(boxes)
    widths = [float(np.ptp(band[:, :2] @ _finger_axis(yaw))) for yaw in yaws]
    for yaw, width in zip(yaws, widths, strict=True):
        axis = _finger_axis(yaw)
        along = band[:, :2] @ axis
        # Centre the object between the fingers; across them its middle is good enough.
        position = np.array([*(middle + axis * ((along.max() + along.min()) / 2 - middle @ axis)), z])
        hits = _hits(obstacles, position, axis)
        cost = 20.0 * max(0.0, width - MAX_WIDTH + 0.004) + 2.0 * (width - min(widths)) + 0.02 * abs(yaw)
        cost += 0.05 * min(hits, 20) + 0.05 * close * abs(_fold(yaw - now))
        if best is None or cost < best[0]:
            best = cost, Grasp(position, yaw, width, hits == 0 and width <= MAX_WIDTH)
    assert best is not None
    return best[1]


def _rim_grasp(
    boxes: Boxes, centre: np.ndarray, obstacles: np.ndarray, eef: np.ndarray, now: float, close: float
) -> Grasp:
    """Pinch the wall of a hollow object at one of 16 places round it, the fingers pointing outwards."""
    solid = boxes.grid(_GRID)
    offset = solid[:, :2] - centre[:2]
    best: tuple[float, Grasp] | None = None
    for angle in np.linspace(-np.pi, np.pi, 16, endpoint=False):
        axis = np.array([np.cos(angle), np.sin(angle)])
        section = solid[(offset @ axis > 0) & (np.abs(offset @ np.array([-axis[1], axis[0]])) < 0.015)]
        if not len(section):
            continue
        radius = (section[:, :2] - centre[:2]) @ axis
        outer = float(radius.max())
        top = float(section[radius > outer - 0.012, 2].max())
        position = np.array([*(centre[:2] + axis * (outer - 0.005)), top - RIM_DEPTH])
        yaw = _fold(angle - np.pi / 2)
        hits = _hits(obstacles, position, _finger_axis(yaw))
        cost = 0.05 * min(hits, 20) + 0.02 * abs(yaw) + 0.05 * close * abs(_fold(yaw - now))
        # Both sides of the rim are equal but for the way to them.
        cost += 0.3 * float(np.linalg.norm(position[:2] - eef[:2]))
        if best is None or cost < best[0]:
            best = cost, Grasp(position, yaw, 0.01, hits == 0)
    assert best is not None
    return best[1]


def _hollow(boxes: Boxes, centre: np.ndarray, high: np.ndarray) -> bool:
    """Nothing fills the upper half of its middle."""
    middle = np.array([*centre[:2], (centre[2] + high[2]) / 2])
    local = np.einsum("nij,ni->nj", boxes.rotations, middle - boxes.centres)
    return not bool((np.abs(local) <= boxes.halves).all(1).any())


def _candidates(boxes: Boxes) -> list[float]:
    """Yaws worth trying: every 15 degrees, and along the sides of the largest box."""
    largest = int(np.argmax(boxes.halves.prod(1)))
    horizontal = boxes.rotations[largest][:2]  # x, y parts of the three axes
    side = horizontal[:, int(np.argmax(np.linalg.norm(horizontal, axis=0)))]
    turned = float(np.arctan2(side[1], side[0]))
    return [*np.deg2rad(np.arange(-75, 91, 15)), _fold(turned), _fold(turned + np.pi / 2)]


def _finger_axis(yaw: float) -> np.ndarray:
    return np.array([-np.sin(yaw), np.cos(yaw)])


def _fold(angle: float) -> float:
    """To [-pi/2, pi/2): a two-finger hand turned by half a turn is the same hand."""
    return float((angle + np.pi / 2) % np.pi - np.pi / 2)
