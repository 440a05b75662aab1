"""Where the objects of an episode stand: as the benchmark has them, nudged, or anywhere the arm can reach.

Invariant: a layout is a settled simulator state and depends only on the scene, the kind, the target and the seed.

The official scenes of libero_object hardly vary (object positions by 0 to 0.6 cm), so success there does not show that
a policy looks or listens; `random` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from sim import grasp, reach
from sim.scene import Boxes, Scene, Snapshot
from steer_runtime.errors import SteerError

Kind = Literal["official", "jitter", "random"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ATTEMPTS = 60
GAP = 0.015
"""Least distance between the circles round two objects, m."""
DROP = 0.003
"""Height from which a placed object settles, m."""
UPRIGHT = 0.95
"""Cosine of the tilt (18 degrees) beyond which a settled object counts as fallen."""
BORDER = 0.02
"""How far inside the arm's reach an object's centre stays, m."""
JITTER = 0.03
"""How far a nudged object moves at most along x and y, m."""
MARGIN_TURN = np.deg2rad(10.0)
"""How far a basket or plate turns at most."""
PARKED = np.array([-1.6, 1.4])
"""Where the twins of an ambiguous target wait, behind the robot and out of both cameras, world x and y, m."""


@dataclass(frozen=True)
class Ground:
    """Where objects may stand: x and y ranges of their centres and the height they stand on, m."""

    x: tuple[float, float]
    y: tuple[float, float]
    height: float


GROUNDS: Mapping[str, Ground] = {
    # The arm stands at x = -0.6; these are the ranges that the suites' own scenes use, widened by some centimetres.
    "libero_floor_manipulation": Ground((-0.22, 0.17), (-0.30, 0.14), 0.0),
    "libero_tabletop_manipulation": Ground((-0.22, 0.12), (-0.24, 0.28), 0.9),
}


@dataclass(frozen=True)
class Layout:
    """state float64 [1 + nq + nv]: settled start. kind, seed and target made it; resampled counts refused draws."""

    state: np.ndarray
    kind: Kind
    seed: int
    target: str
    resampled: int


def targets(scene: Scene) -> tuple[str, ...]:
    """Objects of the scene that the hand can take and the goal can hold, the task's own first."""
    first = scene.task_target
    snapshot = scene.begin(scene.task.initial_states[0])
    out = [first]
    for name in scene.objects:
        if name in (first, scene.goal.owner) or scene.category(name) in ("plate", "basket"):
            continue
        planned = grasp.plan(snapshot, name)
        if planned.width <= grasp.MAX_WIDTH and scene.category(name) not in {scene.category(n) for n in out}:
            out.append(name)
    return tuple(out)


def require_kind(kind: str) -> None:
    """Raises SteerError('unknown_layout')."""
    if kind not in KINDS:
        raise SteerError(
            "unknown_layout", f"layout kind {kind[:40]!r} is not known: expected one of {', '.join(KINDS)}"
        )


def make(scene: Scene, kind: Kind, target: str, seed: int) -> Layout:
    """Draw a layout of one kind for one target.

    official: one of the benchmark's initial states. jitter: the same with every movable object moved by up to 3 cm,
    relations kept. random: every movable object at a random place and turn on the scene's ground, the place's owner
    near where it was, twins of the target's category out of sight. Raises SteerError: 'unknown_target',
    'unknown_layout', 'no_ground' for a scene whose ground is not known, 'no_layout' when nothing valid was drawn.
    """
    if target not in scene.objects:
        raise SteerError(
            "unknown_target",
            f"{scene.task.name!r} has no movable object {target[:80]!r}: expected one of {', '.join(scene.objects)}",
        )
    require_kind(kind)
    rng = np.random.default_rng([seed, *target.encode()])
    states = scene.task.initial_states
    base = states[int(rng.integers(len(states)))]
    if kind == "official":
        scene.begin(base)
        return Layout(scene.state(), kind, seed, target, 0)
    if kind == "random" and scene.domain_name not in GROUNDS:
        raise SteerError(
            "no_ground",
            f"random layouts are not defined for {scene.domain_name}: expected one of {', '.join(sorted(GROUNDS))}; "
            "use --layouts official or jitter",
        )
    settled = scene.begin(base)
    rest = scene.state()
    for attempt in range(ATTEMPTS):
        state = _nudged(scene, rest, rng) if kind == "jitter" else _scattered(scene, settled, rest, target, rng)
        if state is None:
            continue
        after = scene.begin(state, settle=20)
        if _valid(scene, settled, after, state, target):
            return Layout(scene.state(), kind, seed, target, attempt)
    raise SteerError(
        "no_layout",
        f"no valid {kind} layout of {scene.task.name!r} with target {target} was found in {ATTEMPTS} draws of seed {seed};"
        " use another seed",
    )


def _nudged(scene: Scene, rest: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    state = rest.copy()
    for name in scene.objects:
        pose = scene.pose_slice(name)
        state[pose.start : pose.start + 2] += rng.uniform(-JITTER, JITTER, 2)
        state[pose.start + 2] += DROP
    return state


def teleported(
    scene: Scene,
    settled: Snapshot,
    rest: np.ndarray,
    robot: np.ndarray,
    target: str,
    keep: frozenset[str],
    rng: np.random.Generator,
) -> np.ndarray | None:
    """A state to look at, not to simulate: the robot and the objects of `keep` as in the state `robot`, others anywhere.

    settled, rest: a snapshot and state of the scene at rest, for the objects' upright poses. None when there was no room.
    """
    state = robot.copy()
    for name in scene.objects:
        if name not in keep:
            state[scene.pose_slice(name)] = rest[scene.pose_slice(name)]
    scene.show(robot)
    now = scene.snapshot()
    taken = [
        (now.boxes[n].centre[:2], float(np.linalg.norm((now.boxes[n].high - now.boxes[n].low)[:2])) / 2) for n in keep
    ]
    # Nothing stands inside a hand that is low.
    if now.eef[2] < GROUNDS[scene.domain_name].height + 0.20:
        taken.append((now.eef[:2], 0.05))
    return _scattered(scene, settled, state, target, rng, keep=keep, taken=taken)


def _scattered(
    scene: Scene,
    settled: Snapshot,
    rest: np.ndarray,
    target: str,
    rng: np.random.Generator,
    *,
    keep: frozenset[str] = frozenset(),
    taken: list[tuple[np.ndarray, float]] | None = None,
) -> np.ndarray | None:
    """One draw, or None when an object found no room. keep stays; taken: circles (centre, radius) that are occupied."""
    ground = GROUNDS[scene.domain_name]
    state = rest.copy()
    state[1 + scene.sim.model.nq :] = 0.0
    # Fixtures stand where they stand; what moves keeps clear of their boxes.
    walls = [settled.boxes[name] for name in scene.fixtures]
    taken = list(taken or ())
    owner = scene.goal.owner
    # The place first, then the target, so that crowding costs the distractors.
    order = [n for n in (owner, target) if n in scene.objects]
    order += [str(n) for n in rng.permutation([n for n in scene.objects if n not in order])]
    for name in order:
        if name in keep:
            continue
        boxes = settled.boxes[name]
        pose = scene.pose_slice(name)
        half = float(np.linalg.norm((boxes.high - boxes.low)[:2])) / 2
        if name not in (target, owner) and scene.category(name) == scene.category(target):
            state[pose.start : pose.start + 2] = PARKED
            state[pose.start + 2] += DROP - boxes.low[2]
            continue
        moved = name == owner or scene.category(name) in ("basket", "plate")
        for _ in range(80):
            if name == owner and scene.goal.predicate == "in":
                spot, turn = boxes.centre[:2] + rng.uniform(-0.04, 0.04, 2), rng.uniform(-MARGIN_TURN, MARGIN_TURN)
            else:
                spot = np.array([rng.uniform(*ground.x), rng.uniform(*ground.y)])
                turn = rng.uniform(-MARGIN_TURN, MARGIN_TURN) if moved else rng.uniform(-np.pi, np.pi)
            near = np.linalg.norm(spot - settled.shoulder[:2]) < reach.radius(settled.shoulder, ground.height) - BORDER
            free = near and all(np.linalg.norm(spot - c) > half + r + GAP for c, r in taken)
            if free and not any(_near(spot, half + GAP, w) for w in walls):
                break
        else:
            return None
        taken.append((spot, half))
        _put(state, pose, boxes.centre, spot, turn, ground.height + DROP - float(boxes.low[2]))
    return state


def _put(state: np.ndarray, pose: slice, centre: np.ndarray, spot: np.ndarray, turn: float, up: float) -> None:
    """Turn an object about its centre's vertical, move that centre to `spot` and lift it by `up`."""
    position, (w, x, y, z) = state[pose][:3].copy(), state[pose][3:].copy()
    cos, sin = np.cos(turn), np.sin(turn)
    offset = position[:2] - centre[:2]
    c, s = np.cos(turn / 2), np.sin(turn / 2)
    state[pose] = [
        *(spot + np.array([cos * offset[0] - sin * offset[1], sin * offset[0] + cos * offset[1]])),
        position[2] + up,
        *(c * w - s * z, c * x - s * y, c * y + s * x, c * z + s * w),
    ]


def _near(spot: np.ndarray, radius: float, wall: Boxes) -> bool:
    corners = wall.corners.reshape(-1, 3)[:, :2]
    low, high = corners.min(0), corners.max(0)
    return bool(np.linalg.norm(np.maximum(np.maximum(low - spot, spot - high), 0.0)) < radius)


def _valid(scene: Scene, before: Snapshot, after: Snapshot, asked: np.ndarray, target: str) -> bool:
    """Settled where it was put, upright as it was, at rest, and the target can be taken and is not there already."""
    state = scene.state()
    for name in scene.objects:
        pose = scene.pose_slice(name)
        drift = np.linalg.norm(state[pose][:2] - asked[pose][:2])
        if drift > 0.01 or after.speed[name] > 0.05 or _tilt(state[pose][3:], asked[pose][3:]) < UPRIGHT:
            return False
    return grasp.plan(after, target).clear and not scene.satisfied(target)


def _tilt(one: np.ndarray, two: np.ndarray) -> float:
    """Cosine between the directions that were up for one quaternion (w first) and are up for the other."""
    up = np.array([0.0, 0.0, 1.0])
    return float(_rotation(two).T[:, 2] @ (_rotation(one).T @ up))


def _rotation(q: np.ndarray) -> np.ndarray:
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
