"""Episodes in a scene: who acts, what it costs, what came of it.

Invariant: an episode is decided by its `Assignment` (scene, target, manner, layout, noise seed) and the actor; the expert
is asked in every step whoever acts, so that recordings and corrections (DAgger) carry clean labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sim import layouts
from sim.expert import Decision, decide
from sim.grasp import hand_yaw
from sim.manner import Manner
from sim.scene import Scene, Snapshot
from steer_runtime.errors import SteerError, nearest

STYLES: Mapping[str, Manner] = {
    "plain": Manner(),
    "quickly": Manner(pace=4),
    "slowly": Manner(pace=0),
    "high": Manner(height=2),
    "low": Manner(height=0),
    "careful": Manner(care=0),
    "roughly": Manner(care=2),
    "quickly-high": Manner(pace=4, height=2),
    "slowly-high": Manner(pace=0, height=2),
}
"""Named modulations."""
MIX = "mix"
"""Name of a modulation that is drawn for each episode."""
BASIC_STYLES: tuple[str, ...] = ("plain", "quickly", "slowly", "high")
STEP_LIMIT = 800
"""Steps after which an expert's episode counts as failed; slow, high and careful takes 400, disturbed 500."""
REST_STEPS = 4
"""Steps recorded after the retreat: staying is to be learnt too."""


@dataclass(frozen=True)
class Assignment:
    """What an episode is about. target: object name. style: a key of STYLES. noise_seed: of the executed noise.
    manner: overrides the named style, which is then a mere label.

    Raises SteerError('unknown_style') when neither says how.
    """

    target: str
    style: str = "plain"
    noise_seed: int = 0
    manner: Manner | None = None

    def __post_init__(self) -> None:
        if self.manner is None and self.style not in STYLES:
            raise SteerError("unknown_style", f"modulation {self.style!r} is not known: {nearest(self.style, STYLES)}")

    @property
    def how(self) -> Manner:
        """The manner given, or that of the named style."""
        return STYLES[self.style] if self.manner is None else self.manner


@dataclass(frozen=True)
class Noise:
    """Noise on executed actions, as in DART (Laskey et al. 2017, arXiv 1703.09327): labels stay clean.

    position, rotation: standard deviations of the translation and rotation actions. correlation: of one step's noise
    with the last one's, so that it moves the arm off its way. gripper: chance a step that the gripper command flips.
    """

    position: float = 0.0
    rotation: float = 0.0
    correlation: float = 0.7
    gripper: float = 0.0

    def stream(self, seed: int) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
        """Per step a function from the clean action [7] to the executed one."""
        rng = np.random.default_rng([seed, 0xDA27])
        scale = np.array([self.position] * 3 + [self.rotation] * 3)
        fresh = np.sqrt(1.0 - self.correlation**2)
        drift = rng.standard_normal(6) * scale
        while True:
            flip = rng.random() < self.gripper
            yield (
                lambda clean, drift=drift, flip=flip: np.clip(  # type: ignore[misc]
                    np.array([*(clean[:6] + drift), -clean[6] if flip else clean[6]]), -1.0, 1.0
                )
            )
            drift = self.correlation * drift + fresh * rng.standard_normal(6) * scale


@dataclass(frozen=True)
class Step:
    """One control step as it is about to be taken: clean is the expert's action, executed what is sent, both [7]."""

    index: int
    snapshot: Snapshot
    expert: Decision
    executed: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """What came of an episode.

    done: LIBERO's predicate held at some step. released: at the end it holds, the fingers are open and off the object
    and the hand has gone up. steps: until the hand rests above the place, or all. speed: mean speed of the grip site
    from the start to the release, m/s. height: mean height of the object's underside above the ground it stood on while
    it was carried through the middle half of its way, m (NaN when it never was). drops: times it was held, lost and not
    yet at the place.
    """

    target: str
    style: str
    done: bool
    released: bool
    steps: int
    speed: float
    height: float
    drops: int


Actor = Callable[[Snapshot, Decision], np.ndarray]
"""Chooses the action [7] to execute from what is seen and the expert's advice."""


def follow(noise: Noise, seed: int, speed: float = 1.0) -> Actor:
    """The expert itself, its actions disturbed; noise shrinks with a speed below 1, as a slow policy's errors do."""
    share = min(speed, 1.0)
    scaled = replace(noise, position=noise.position * share, rotation=noise.rotation * share)
    stream = scaled.stream(seed)
    return lambda _, advice: next(stream)(advice.action)


def run(
    scene: Scene,
    layout: layouts.Layout,
    assignment: Assignment,
    *,
    actor: Actor | None = None,
    on_step: Callable[[Step], None] | None = None,
    step_limit: int = STEP_LIMIT,
) -> Outcome:
    """One episode from a settled layout. on_step is called before each step, while the scene shows its snapshot."""
    style = assignment.how.style()
    actor = actor or follow(Noise(), assignment.noise_seed)
    snapshot = scene.begin(layout.state, settle=0)
    target = assignment.target
    measure = _Measure(snapshot, target)
    done, rested, index = False, 0, 0
    while index < step_limit and rested < REST_STEPS:
        advice = decide(snapshot, target, scene.goal, style)
        rested += advice.phase == "rest"
        executed = np.asarray(actor(snapshot, advice), dtype=np.float64)
        if on_step is not None:
            on_step(Step(index, snapshot, advice, executed))
        scene.step(executed)
        done = done or scene.satisfied(target)
        snapshot = scene.snapshot()
        measure.add(snapshot)
        index += 1
    released = scene.satisfied(target) and rested >= REST_STEPS and not _fingered(snapshot, target)
    speed, height, drops = measure.result(released)
    return Outcome(target, assignment.style, done, released, index, speed, height, drops)


def _fingered(snapshot: Snapshot, target: str) -> bool:
    return bool(snapshot.touching[target] & {"left_finger", "right_finger", "robot"})


def middle_height(carried: Sequence[tuple[np.ndarray, float]]) -> float | None:
    """Mean height over the middle half of the way of what was carried; None where it did not pass there.

    carried: place [2] and height of each step, in order, m.
    """
    if not carried:
        return None
    places, heights = np.array([place for place, _ in carried]), np.array([height for _, height in carried])
    way = places[-1] - places[0]
    share = (places - places[0]) @ way / max(float(way @ way), 1e-9)
    middle = (share > 0.25) & (share < 0.75)
    return float(heights[middle].mean()) if middle.any() else None


class _Measure:
    """Speed, carrying height and drops of a running episode, from what is seen."""

    def __init__(self, first: Snapshot, target: str) -> None:
        self._target = target
        self._ground = float(first.boxes[target].low[2])
        self._eef = [first.eef]
        self._carried: list[tuple[int, np.ndarray, float]] = []
        self._was_held = False
        self._drops = 0

    def add(self, snapshot: Snapshot) -> None:
        self._eef.append(snapshot.eef)
        held = snapshot.squeezed(self._target) and snapshot.airborne(self._target)
        if held:
            boxes = snapshot.boxes[self._target]
            self._carried.append((len(self._eef) - 1, boxes.centre[:2], float(boxes.low[2]) - self._ground))
        self._drops += self._was_held and not _fingered(snapshot, self._target)
        self._was_held = held

    def result(self, released: bool) -> tuple[float, float, int]:
        if not self._carried:
            path = np.array(self._eef)
            return float(np.linalg.norm(np.diff(path, axis=0), axis=1).mean() * 20), float("nan"), self._drops
        end = self._carried[-1][0]
        path = np.array(self._eef[: end + 1])
        height = middle_height([(place, height) for _, place, height in self._carried])
        speed = float(np.linalg.norm(np.diff(path, axis=0), axis=1).mean() * 20)
        # The last loss of contact of an episode that ended well is the release.
        return speed, float("nan") if height is None else height, max(self._drops - int(released), 0)


def scatter_arm(scene: Scene, layout: layouts.Layout, seed: int, steps: int = 30) -> layouts.Layout:
    """The layout with the arm driven at random for a while first: states that no demonstration starts from."""
    rng = np.random.default_rng([seed, 0xA2])
    scene.begin(layout.state, settle=0)
    push = rng.uniform(-1.0, 1.0, 3)
    for _ in range(steps):
        turn = -hand_yaw(scene.snapshot().rotation) if rng.random() < 0.5 else 0.0
        scene.step(np.array([*push, 0.0, 0.0, np.clip(turn, -0.3, 0.3), rng.choice([-1.0, 1.0])]))
        if rng.random() < 0.1:
            push = rng.uniform(-1.0, 1.0, 3)
    return replace(layout, state=scene.state())
