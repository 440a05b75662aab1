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
HAND_HALF_LENGTH, HAND_HALF_DEPTH, HAND_FROM, HAND_TO = 0.108, 0.036, 0.024, 0.20
"""The hand's volume with a few millimetres of margin: along and across the fingers' axis, lowest and highest point."""
FINGER_REACH, FINGER_HALF_DEPTH, FINGER_FROM = 0.060, 0.014, -0.012
"""The same for the open fingers."""
RIM_DEPTH = 0.015
"""How deep below a bowl's rim the pads' centre goes, m."""
RIM_INWARDS = (0.0, 0.008, 0.016)
"""How much nearer to a bowl's middle than its wall the hand may come down, m: the outer finger needs room too."""
RIM_SPARE = 0.004
"""Room beside the open fingers that a grasp on a rim asks for, m: a finger on a drawer's wall holds the arm up."""
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
    obstacles = _obstacles(snapshot.boxes, target, boxes)
    centre, low, high = boxes.centre, boxes.low, boxes.high
    # When the hand is at the object already, another yaw would be a detour: stay with this one unless it is bad.
    close = float(np.exp(-((np.linalg.norm(snapshot.eef - centre) / 0.08) ** 2)))
    now = hand_yaw(snapshot.rotation)
    body = _body_grasp(boxes, low, high, obstacles, now, close)
    if body.width <= MAX_WIDTH or not _hollow(boxes, centre, high):
        return body
    return _rim_grasp(boxes, centre, obstacles, snapshot.eef, snapshot.shoulder, now, close)


def _obstacles(all_boxes: Mapping[str, Boxes], target: str, boxes: Boxes) -> Boxes:
    """The boxes of everything but the target that a hand could meet there."""
    reach = HAND_HALF_LENGTH + float(np.linalg.norm(boxes.high - boxes.low)) / 2
    parts = []
    for name, other in all_boxes.items():
        if name != target:
            near = np.abs(other.centres - boxes.centre).max(1) - np.linalg.norm(other.halves, axis=1) < reach
            parts.append((other.centres[near], other.rotations[near], other.halves[near]))
    if not parts:
        return Boxes(np.empty((0, 3)), np.empty((0, 3, 3)), np.empty((0, 3)))
    return Boxes(*(np.concatenate(p) for p in zip(*parts, strict=True)))


def _hits(obstacles: Boxes, positions: np.ndarray, yaws: np.ndarray, spare: float = 0.0) -> np.ndarray:
    """int [k]: how many boxes the hand and the open fingers meet, for grip-site positions [k, 3] and yaws [k].

    spare: added to the fingers' half sizes, m.
    """
    cos, sin = np.cos(yaws), np.sin(yaws)
    zero, one = np.zeros_like(yaws), np.ones_like(yaws)
    rotations = np.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], -1).reshape(-1, 3, 3)
    found = np.zeros((len(yaws), len(obstacles.centres)), bool)
    for half_length, half_depth, bottom, top in (
        (HAND_HALF_LENGTH, HAND_HALF_DEPTH, HAND_FROM, HAND_TO),
        (FINGER_REACH + spare, FINGER_HALF_DEPTH + spare, FINGER_FROM, HAND_FROM),
    ):
        centres = positions + np.array([0.0, 0.0, (bottom + top) / 2])
        halves = np.array([half_depth, half_length, (top - bottom) / 2])
        found |= _overlap(centres, rotations, halves, obstacles)
    return found.sum(1)


def _overlap(centres: np.ndarray, rotations: np.ndarray, halves: np.ndarray, boxes: Boxes) -> np.ndarray:
    """bool [k, n]: which of k equal boxes (centres [k, 3], rotations [k, 3, 3], halves [3]) meets which of n boxes.

    Separating axis theorem (Gottschalk et al., OBBTree, 1996) with the faces' six normals; leaving the nine edge pairs
    out can only report a near miss as a hit.
    """
    between = boxes.centres[None] - centres[:, None]  # [k, n, 3]
    turn = np.abs(np.einsum("kji,njl->knil", rotations, boxes.rotations))  # cosines between both boxes' axes
    ours = np.abs(np.einsum("kji,knj->kni", rotations, between))
    theirs = np.abs(np.einsum("nji,knj->kni", boxes.rotations, between))
    apart = ours > halves + np.einsum("knil,nl->kni", turn, boxes.halves)
    apart_too = theirs > boxes.halves + np.einsum("knil,i->knl", turn, halves)
    return ~(apart.any(-1) | apart_too.any(-1))


def _body_grasp(boxes: Boxes, low: np.ndarray, high: np.ndarray, obstacles: Boxes, now: float, close: float) -> Grasp:
    height = high[2] - low[2]
    # Flat things close to what they lie on, tall ones in the upper half, and never deeper than the palm allows.
    up = max(0.012, height * 0.5, height - PALM) if height > 0.045 else max(0.010, height * 0.5)
    z = low[2] + max(up, height - PALM)
    corners = boxes.corners
    band = corners[(corners[..., 2].min(1) < z + 0.015) & (corners[..., 2].max(1) > z - 0.015)]
    band = (band if len(band) else corners).reshape(-1, 3)
    middle = (band[:, :2].max(0) + band[:, :2].min(0)) / 2
    yaws = _candidates(boxes)
    axes = np.stack([-np.sin(yaws), np.cos(yaws)], -1)
    along = band[:, :2] @ axes.T
    widths = np.ptp(along, axis=0)
    # Centre the object between the fingers; across them its middle is good enough.
    shift = (along.max(0) + along.min(0)) / 2 - axes @ middle
    positions = np.concatenate([middle + axes * shift[:, None], np.full((len(yaws), 1), z)], 1)
    hits = _hits(obstacles, positions, yaws)
    cost = 20.0 * np.maximum(0.0, widths - MAX_WIDTH + 0.004) + 2.0 * (widths - widths.min()) + 0.02 * np.abs(yaws)
    cost += 0.05 * np.minimum(hits, 20) + 0.05 * close * np.abs(_fold(yaws - now))
    best = int(cost.argmin())
    clear = bool(hits[best] == 0 and widths[best] <= MAX_WIDTH)
    return Grasp(positions[best], float(yaws[best]), float(widths[best]), clear)


def _rim_grasp(
    boxes: Boxes,
    centre: np.ndarray,
    obstacles: Boxes,
    eef: np.ndarray,
    shoulder: np.ndarray,
    now: float,
    close: float,
) -> Grasp:
    """Pinch the wall of a hollow object at one of 16 places round it, the fingers' axis pointing outwards."""
    solid = boxes.grid(_GRID)
    offset = solid[:, :2] - centre[:2]
    positions, angles, shifts = [], [], []
    for angle in np.linspace(-np.pi, np.pi, 16, endpoint=False):
        axis = np.array([np.cos(angle), np.sin(angle)])
        radius = offset @ axis
        section = (radius > 0) & (np.abs(offset @ np.array([-axis[1], axis[0]])) < 0.015)
        if section.any():
            outer = float(radius[section].max())
            top = float(solid[section & (radius > outer - 0.012), 2].max())
            for inwards in RIM_INWARDS:
                positions.append([*(centre[:2] + axis * (outer - 0.005 - inwards)), top - RIM_DEPTH])
                angles.append(angle)
                shifts.append(inwards)
    places, yaws = np.array(positions), _fold(np.array(angles) - np.pi / 2)
    hits = _hits(obstacles, places, yaws, RIM_SPARE)
    # The side of a rim is free to choose, and a hand that stands on a drawer's wall gets no lower: no way there is so
    # much shorter that one which is blocked would be better than one which is not.
    cost = 0.25 * (hits > 0) + 0.05 * np.minimum(hits, 20)
    cost += 0.02 * np.abs(yaws) + 0.05 * close * np.abs(_fold(yaws - now)) + 2.0 * np.array(shifts)
    # All sides of a rim are alike but for the way to them, and near ones leave the arm more reach.
    cost += 0.3 * np.linalg.norm(places[:, :2] - eef[:2], axis=1)
    cost += 0.5 * np.linalg.norm(places[:, :2] - shoulder[:2], axis=1)
    best = int(cost.argmin())
    return Grasp(places[best], float(yaws[best]), 0.01, bool(hits[best] == 0))


def _hollow(boxes: Boxes, centre: np.ndarray, high: np.ndarray) -> bool:
    """Nothing fills the upper half of its middle."""
    middle = np.array([*centre[:2], (centre[2] + high[2]) / 2])
    local = np.einsum("nij,ni->nj", boxes.rotations, middle - boxes.centres)
    return not bool((np.abs(local) <= boxes.halves).all(1).any())


def _candidates(boxes: Boxes) -> np.ndarray:
    """[k] yaws worth trying: every 15 degrees, and along the sides of the largest box."""
    largest = int(np.argmax(boxes.halves.prod(1)))
    horizontal = boxes.rotations[largest][:2]  # x, y parts of the three axes
    side = horizontal[:, int(np.argmax(np.linalg.norm(horizontal, axis=0)))]
    turned = float(np.arctan2(side[1], side[0]))
    return np.array([*np.deg2rad(np.arange(-75, 91, 15)), *_fold(np.array([turned, turned + np.pi / 2]))])


def _fold(angles: np.ndarray) -> np.ndarray:
    """To [-pi/2, pi/2): a two-finger hand turned by half a turn is the same hand."""
    return (angles + np.pi / 2) % np.pi - np.pi / 2
