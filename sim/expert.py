"""A scripted expert that picks one object and places it: the teacher of the pocket policies.

Invariant: `decide` is a function of the snapshot, the goal and the style alone. It has no clock, no phase counter and no
memory, so a policy that sees one observation can imitate it, and it can label any state that a policy gets into. Every
phase ends by something that can be seen: the opening of the fingers, where the object is, what it touches.

Read as a list of cases, first match wins:

| case | seen | does |
|---|---|---|
| rest, retreat | object delivered, not held | opens, goes straight up, stays |
| falling | object let go over the place, still moving | opens, waits |
| release | held, over the place and low enough | opens |
| lower | held, over the place | goes down |
| lift, carry | held | up to carrying height, then across |
| squeeze | fingers round the object, closing | closes |
| descend, approach | otherwise | opens, comes from above through a funnel |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sim import reach
from sim.grasp import Grasp, hand_yaw, plan
from sim.scene import Boxes, Goal, Snapshot

Phase = Literal["approach", "descend", "squeeze", "lift", "carry", "lower", "release", "falling", "retreat", "rest"]
POSITION_GAIN = 20.0
"""Action per metre of error: full speed beyond 5 cm, which is one step's displacement at action 1.0 in OSC_POSE."""
ROTATION_GAIN = 2.0
"""Action per radian of error: 0.5 rad a step at action 1.0."""
LEAST_MOVE = 0.06
"""Smallest action towards a goal that is not reached: below it the arm creeps under 1 mm a step."""
FINGERS_OPEN = 0.077
"""Distance between the fully open fingers, m."""
ACROSS = 0.009
"""How far the object's middle may be from the pads' across the fingers, m: a pad is 1.6 cm wide."""
OPEN = 0.070
"""Opening from which the fingers count as open, m (7.7 cm at most)."""
SHUT = 0.003
"""Opening under which the closed fingers hold nothing, m."""
COLUMN = 0.04
"""How near to the place's middle, m, an object may start to come down."""
FITS_INSIDE, FITS_ON = 0.02, 0.012
"""How near it has to be to go below a container's rim, or to be put down on something, m."""
RIM_MARGIN = 0.03
"""Height above the place's rim at which an object crosses it, m."""
PASSING_MARGIN = 0.02
"""Height above other things at which the hand or what it holds passes over them, m."""
NEAR = 0.10
"""Distance from the grasp, and from where the object is let go, m, within which `Style.near_speed` holds."""
HOVER = 0.08
"""How far over the object's top the hand waits until it is above it, m."""


@dataclass(frozen=True)
class Style:
    """How the task is done.

    speed: cap on the norm of the translation action; 1.0 moves 0.25 m/s, and no axis goes beyond 1. height: how far
    above the place's ground the object's underside is carried, m; None carries it as low as the way allows.
    near_speed: cap within 10 cm of the grasp and of where the object is let go; on the way up and across it goes at
    speed.
    """

    speed: float = 0.65
    height: float | None = None
    near_speed: float | None = None


@dataclass(frozen=True)
class Decision:
    """What the expert does in a snapshot: action float64 [7] in LIBERO's action space, and the case that chose it."""

    action: np.ndarray
    phase: Phase


@dataclass(frozen=True)
class Place:
    """Geometry of a goal: where an object's centre goes and how high its underside may be.

    centre [2]. rim, ground: heights an object passes over and comes to rest on, m. reach: half extents [2] within
    which a centre counts as over it. inside: a container (release within) or a surface (release on it).
    """

    centre: np.ndarray
    rim: float
    ground: float
    reach: np.ndarray
    inside: bool


def place_of(snapshot: Snapshot, goal: Goal) -> Place:
    """Read the goal's geometry from the snapshot."""
    if goal.predicate == "in":
        boxes = snapshot.boxes[goal.owner]
        half = (boxes.high - boxes.low)[:2] / 2
        return Place(boxes.centre[:2], float(boxes.high[2]), float(boxes.low[2]), half - 0.02, True)
    if goal.place in snapshot.boxes:
        boxes = snapshot.boxes[goal.place]
        # `check_ontop` wants the bodies within 3 cm of each other: a square of 2 cm half sides has its corners at 2.8 cm.
        return Place(boxes.centre[:2], float(boxes.high[2]), float(boxes.high[2]), np.full(2, 0.020), False)
    site = snapshot.sites[goal.place]
    return Place(site[:2], float(site[2]), float(site[2]), np.full(2, 0.035), False)


def decide(snapshot: Snapshot, target: str, goal: Goal, style: Style) -> Decision:
    """The expert's action in any state. target: a movable object's name; goal: see `Scene.goal`."""
    place = place_of(snapshot, goal)
    boxes = snapshot.boxes[target]
    centre, low = boxes.centre, float(boxes.low[2])
    held = snapshot.squeezed(target)
    let_go = snapshot.gripper_command < 0
    over = bool((np.abs(centre[:2] - place.centre) <= place.reach).all())
    arrived = low < place.rim - 0.01 if place.inside else goal.owner in snapshot.touching[target]
    delivered = over and arrived
    if over and not held and (let_go or delivered):
        if delivered and (snapshot.speed[target] < 0.3 or snapshot.opening > OPEN):
            return _retreat(snapshot, boxes, place, style)
        if snapshot.speed[target] > 0.03 or (snapshot.opening < OPEN and snapshot.airborne(target)):
            return _act(snapshot, "falling", snapshot.eef, None, -1.0, style, 0.0)
    if held and (not snapshot.touching[target] & {"ground"} or not let_go or over):
        return _deliver(snapshot, target, boxes, place, goal, style)
    return _take(snapshot, target, boxes, place, style)


def _retreat(snapshot: Snapshot, boxes: Boxes, place: Place, style: Style) -> Decision:
    if snapshot.opening < OPEN - 0.01:
        # Fingers that still touch the object would take it along.
        return _act(snapshot, "release", snapshot.eef, None, -1.0, style, 0.0)
    top = max(place.rim, float(boxes.high[2])) + 0.14
    if snapshot.eef[2] > top - 0.02:
        return _act(snapshot, "rest", snapshot.eef, None, -1.0, style, 0.0)
    return _act(snapshot, "retreat", np.array([*snapshot.eef[:2], top + 0.03]), None, -1.0, style, style.speed)


def _deliver(snapshot: Snapshot, target: str, boxes: Boxes, place: Place, goal: Goal, style: Style) -> Decision:
    """The object is between the fingers: up, across, down, open."""
    eef, low = snapshot.eef, float(boxes.low[2])
    below = eef[2] - low
    # Aim with the object, not with the hand: what is held may have slipped or tilted.
    aim = place.centre - (boxes.centre[:2] - eef[:2])
    off = float(np.linalg.norm(aim - eef[:2]))
    crossing = place.rim + RIM_MARGIN
    way = _highest_on_the_way(snapshot, boxes, aim - eef[:2], (target, goal.owner))
    carry = max(crossing, way + PASSING_MARGIN)
    if style.height is not None:
        carry = max(carry, _ground(snapshot, place, goal) + style.height)
    # The hand is wider than the basket: its lowest part, 3 cm above the grip site, stays above the rim.
    rest = max(place.rim - 0.035 - below, place.ground + 0.015) if place.inside else place.ground + 0.003
    yaw = 0.0 if place.inside else hand_yaw(snapshot.rotation)
    near = _near(style, eef, np.array([*aim, rest + below]))
    if off < COLUMN:
        fits = off < (FITS_INSIDE if place.inside else FITS_ON)
        # Opening has begun already: do not close again for a few millimetres.
        slack = 0.025 if snapshot.gripper_command < 0 else 0.008
        landed = not place.inside and goal.owner in snapshot.touching[target] and low < rest + 0.03
        sunk = place.inside and low < place.rim - 0.02 and not snapshot.airborne(target)
        if (fits or low < place.rim - 0.02) and (low < rest + slack or landed or sunk):
            return _act(snapshot, "release", eef, yaw, -1.0, style, 0.0)
        # Come down and nearer at once, but not below the rim before it fits.
        down = rest if fits or low < place.rim - 0.02 else min(crossing, carry)
        return _act(snapshot, "lower", np.array([*aim, down + below]), yaw, 1.0, style, style.speed, near)
    if low < carry - 0.015:
        # Start across only in the last centimetres of the rise, so that nothing is swept away at a low height.
        share = float(np.clip((low - (carry - 0.05)) / 0.03, 0.0, 1.0)) if snapshot.airborne(target) else 0.0
        goal_xy = eef[:2] + share * (aim - eef[:2])
        # The grip settles in the first centimetres: a jerk now would lose the object.
        gentle = style.speed if snapshot.airborne(target) else min(style.speed, 0.3)
        firm = abs(snapshot.opening_rate) < 0.06
        if not firm and not snapshot.airborne(target):
            return _act(snapshot, "squeeze", eef, None, 1.0, style, 0.0)
        return _act(snapshot, "lift", np.array([*goal_xy, carry + below + 0.01]), None, 1.0, style, gentle)
    return _act(snapshot, "carry", np.array([*aim, carry + below]), yaw, 1.0, style, style.speed, near)


def _take(snapshot: Snapshot, target: str, boxes: Boxes, place: Place, style: Style) -> Decision:
    """The object is not held: come from above, go round it, close."""
    grasp = plan(snapshot, target)
    eef = snapshot.eef
    error = grasp.position[:2] - eef[:2]
    off = float(np.linalg.norm(error))
    up = float(eef[2] - grasp.position[2])
    turn = abs(_half_turn(grasp.yaw - hand_yaw(snapshot.rotation)))
    closing = snapshot.gripper_command > 0
    # Once the fingers close, they push the object and the arm a little: keep on unless it is really lost.
    slack = 2.0 if closing else 1.0
    pressing = "robot" in snapshot.touching[target] and 0.0 < up < 0.03  # the palm is on it: no lower
    beyond = _beyond_reach(error, grasp, slack)
    around = beyond == 0.0 and (abs(up) < 0.010 * slack or pressing) and turn < 0.15 * slack
    wide = snapshot.opening > (SHUT if closing else min(OPEN, grasp.width + 0.004))
    if around and wide:
        return _act(snapshot, "squeeze", grasp.position, grasp.yaw, 1.0, style, min(style.speed, 0.2))
    hover = float(boxes.high[2]) + HOVER
    travel = max(hover, _highest_on_the_way_of_hand(snapshot, target, grasp) + PASSING_MARGIN + 0.015)
    # A funnel: the further aside (or turned, or with the fingers shut), the higher the hand has to be.
    aside = beyond / 0.3 + max(turn - 0.12, 0.0) * 0.2
    ready = snapshot.opening > OPEN or (snapshot.opening > grasp.width + 0.004 and up < 0.0)
    floor = grasp.position[2] + aside if ready else hover
    height = float(np.clip(floor, grasp.position[2], travel if off > 0.03 else hover))
    near = _near(style, eef, grasp.position)
    if height <= grasp.position[2] + 0.05 and off < 0.02:
        goal = np.array([*grasp.position[:2], height])
        return _act(snapshot, "descend", goal, grasp.yaw, -1.0, style, style.speed, near)
    # Too low to go aside: rise first.
    share = float(np.clip(1.0 - (height - eef[2] - 0.01) / 0.04, 0.0, 1.0))
    goal = np.array([*(eef[:2] + share * (grasp.position[:2] - eef[:2])), height])
    return _act(snapshot, "approach", goal, grasp.yaw, -1.0, style, style.speed, near)


def _near(style: Style, eef: np.ndarray, position: np.ndarray) -> float | None:
    """The cap near `position`; None beyond. Slow from carrying height on would take half of an episode."""
    return style.near_speed if float(np.linalg.norm(position - eef)) < NEAR else None


def _beyond_reach(error: np.ndarray, grasp: Grasp, slack: float) -> float:
    """How much further the object's middle is from the hand's than the open fingers allow, m; error [2]: towards it."""
    axis = np.array([-np.sin(grasp.yaw), np.cos(grasp.yaw)])
    along, across = abs(float(error @ axis)), abs(float(error @ np.array([axis[1], -axis[0]])))
    room = max((FINGERS_OPEN - grasp.width) / 2 - 0.002, 0.004)
    return float(np.hypot(max(along - room * slack, 0.0), max(across - ACROSS * slack, 0.0)))


def _act(
    snapshot: Snapshot,
    phase: Phase,
    position: np.ndarray,
    yaw: float | None,
    gripper: float,
    style: Style,
    cap: float,
    near: float | None = None,
) -> Decision:
    """Proportional control to a grip-site position and yaw, hand pointing down; yaw None keeps the present one."""
    cap = cap if near is None else min(cap, near)
    error = reach.within(snapshot.shoulder, position) - snapshot.eef
    move = error * POSITION_GAIN
    size = float(np.linalg.norm(move))
    if size > cap:
        move *= cap / size
    elif 0.02 < size < LEAST_MOVE:
        move *= LEAST_MOVE / size
    if cap > 0.0:
        move = reach.drawn_in(snapshot.shoulder, snapshot.eef, move, POSITION_GAIN)
    turn = _rotation_error(snapshot.rotation, hand_yaw(snapshot.rotation) if yaw is None else yaw) * ROTATION_GAIN
    bound = max(style.speed if near is None else near, 0.2)
    turn *= min(1.0, bound / max(float(np.linalg.norm(turn)), 1e-9))
    return Decision(np.clip(np.array([*move, *turn, gripper]), -1.0, 1.0), phase)


def _rotation_error(rotation: np.ndarray, yaw: float) -> np.ndarray:
    """[3] axis-angle in world axes from the hand's rotation to one that points down with this yaw, shorter way round."""
    yaw = hand_yaw(rotation) + _half_turn(yaw - hand_yaw(rotation))
    cos, sin = np.cos(yaw), np.sin(yaw)
    wanted = np.array([[cos, sin, 0.0], [sin, -cos, 0.0], [0.0, 0.0, -1.0]])
    difference = wanted @ rotation.T
    axis = np.array(
        [
            difference[2, 1] - difference[1, 2],
            difference[0, 2] - difference[2, 0],
            difference[1, 0] - difference[0, 1],
        ]
    )
    sine, cosine = float(np.linalg.norm(axis)) / 2, (float(np.trace(difference)) - 1) / 2
    if sine < 1e-9:
        return np.zeros(3)
    return axis / (2 * sine) * float(np.arctan2(sine, cosine))


def _half_turn(angle: float) -> float:
    """To [-pi/2, pi/2): the shorter way for a hand with two equal fingers."""
    return float((angle + np.pi / 2) % np.pi - np.pi / 2)


def _ground(snapshot: Snapshot, place: Place, goal: Goal) -> float:
    return float(snapshot.boxes[goal.owner].low[2]) if goal.owner in snapshot.boxes else place.ground


def _highest_on_the_way(snapshot: Snapshot, boxes: Boxes, way: np.ndarray, ignore: tuple[str, ...]) -> float:
    """Highest point of other things in the strip that the held object sweeps along `way` [2], m; -inf when free."""
    half = float(np.linalg.norm((boxes.high - boxes.low)[:2])) / 2 + 0.02
    return _highest(snapshot, boxes.centre[:2], way, half, ignore)


def _highest_on_the_way_of_hand(snapshot: Snapshot, target: str, grasp: Grasp) -> float:
    """The same for the fingers on their way to the grasp."""
    return _highest(snapshot, snapshot.eef[:2], grasp.position[:2] - snapshot.eef[:2], FINGERS_HALF, (target,))


FINGERS_HALF = 0.06
"""Half the width of the strip that the open fingers sweep, m."""


def _highest(snapshot: Snapshot, start: np.ndarray, way: np.ndarray, half: float, ignore: tuple[str, ...]) -> float:
    length = float(np.linalg.norm(way))
    direction = way / length if length > 1e-6 else np.array([1.0, 0.0])
    highest = -np.inf
    for name, boxes in snapshot.boxes.items():
        if name in ignore:
            continue
        corners = boxes.corners.reshape(-1, 3)
        along = (corners[:, :2] - start) @ direction
        across = np.abs((corners[:, :2] - start) @ np.array([-direction[1], direction[0]]))
        within = (along > -0.02) & (along < length + 0.02) & (across < half)
        if within.any():
            highest = max(highest, float(corners[within, 2].max()))
    return float(highest)
