"""What the actions of an inference tell, in units a person can judge, and which of it a direction's name claims.

Invariant: a value is read off one inference at one recorded moment, from noise that is the moment's own; what a policy
cannot tell (the entropy of an action that is no token, the expected value of one that is no choice) is absent, never made up.

Two readings of the same inference: `executed` is what the robot would carry out: the first action of a policy that chooses
tokens (greedy tokens and words, the gripper open or closed), the mean of the actions of a chunk that a flow policy hands on,
each within -1 to 1; `expected` is the mean over the bins of each token and over the words of each slot, which also tells what
a greedy choice hides. What the policy says is chosen greedily in both: words that flip move both in steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np

from steer_runtime.directions.activations import ready
from steer_runtime.directions.direction import Axis, Direction
from steer_runtime.errors import SteerError, nearest
from steer_runtime.moments import Moment
from steer_runtime.types import ActionSpace, Observation, Policy

Reading = Literal["executed", "expected"]
READINGS: tuple[Reading, ...] = get_args(Reading)
Values = dict[str, float]

NEAR = frozenset({"descend", "lower"})
"""Phases in which the hand is close to an object or to where it is put down."""
CARRIED = frozenset({"lift", "carry"})
"""Phases in which the hand holds an object in the air."""


@dataclass(frozen=True)
class Observable:
    """unit: of its values. resolution: differences below this say nothing; the floor of a standardised effect's scale."""

    unit: str
    what: str
    resolution: float


OBSERVABLES: Mapping[str, Observable] = {
    "speed": Observable("m/s", "norm of the translation times the control rate", 0.01),
    "dx": Observable("cm a step", "translation along x of the base", 0.05),
    "dy": Observable("cm a step", "translation along y of the base", 0.05),
    "dz": Observable("cm a step", "translation upwards", 0.05),
    "rotation": Observable("deg a step", "angle turned", 0.1),
    "gripper": Observable("0 closed to 1 open", "opening of the gripper", 0.05),
    "entropy": Observable("nats", "entropy over the bins, mean of the first action's seven tokens", 0.05),
    "near_speed": Observable("m/s", "speed while descending to an object or lowering one", 0.01),
    "far_speed": Observable("m/s", "speed in all other phases", 0.01),
    "carry_dz": Observable("cm a step", "translation upwards while lifting or carrying", 0.05),
    "sideways": Observable("cm a step", "translation at right angles to the unsteered one", 0.05),
}
"""What effects are measured on, beside said_<slot>: the index of the word said in that slot."""
_SAID = Observable("word", "index of the word said", 0.1)

AXES: Mapping[str, tuple[str, float]] = {
    "speed": ("speed", 1.0),
    "height": ("dz", 1.0),
    "careful": ("near_speed", -1.0),
    "gripper": ("gripper", 1.0),
}
"""Axis -> the observable that its positive end claims to move, and the sign with which it does."""
_ENDS: Mapping[str, tuple[str, float]] = {
    **{word: ("speed", 1.0) for word in ("speed", "fast", "faster", "quick", "quicker")},
    **{word: ("speed", -1.0) for word in ("slow", "slower")},
    **{word: ("height", 1.0) for word in ("height", "high", "higher", "up")},
    **{word: ("height", -1.0) for word in ("low", "lower", "down")},
    **{word: ("careful", 1.0) for word in ("careful", "care", "gentle")},
    **{word: ("careful", -1.0) for word in ("careless", "rough")},
    **{word: ("gripper", 1.0) for word in ("gripper", "open")},
    **{word: ("gripper", -1.0) for word in ("close", "closed")},
}
"""Word in a name -> axis and end that it claims."""
_NEGATIVE = frozenset({"negative", "neg", "minus"})

_MOTION = ("dx", "dy", "dz")
_OFF_AXIS: Mapping[str, tuple[str, ...]] = {
    # A change of speed rightly changes dx, dy and dz in proportion; what it must not do is bend the path.
    "speed": ("sideways", "rotation", "gripper", "entropy"),
    "near_speed": ("far_speed", "sideways", "rotation", "gripper", "entropy"),
    "carry_dz": ("dx", "dy", "rotation", "gripper", "entropy"),
}


def off_axis(on: str) -> tuple[str, ...]:
    """The observables that a direction which claims `on` should leave as they are."""
    return _OFF_AXIS.get(on, tuple(o for o in (*_MOTION, "rotation", "gripper", "entropy") if o != on))


def observable(name: str) -> Observable:
    """Raises SteerError('unknown_observable')."""
    if re.fullmatch(r"said_\w+", name):
        return _SAID
    if name not in OBSERVABLES:
        raise SteerError(
            "unknown_observable",
            f"observable {name[:40]!r} is not known: {nearest(name, (*OBSERVABLES, *AXES))}, or said_<slot>",
        )
    return OBSERVABLES[name]


@dataclass(frozen=True)
class Claim:
    """What a direction's name promises: to move `observable` with this sign. axis: what results are grouped by.
    source: how it was told, in words."""

    observable: str
    sign: float
    axis: str
    source: str


def parse_on(text: str) -> Claim:
    """`speed`, `dz`, `-height`: an axis or an observable, with a minus for the other way. Raises 'unknown_observable'."""
    name, sign = text.removeprefix("-"), -1.0 if text.startswith("-") else 1.0
    if name in AXES:
        on, its_sign = AXES[name]
        return Claim(on, sign * its_sign, name, "--on")
    observable(name)
    return Claim(name, sign, name, "--on")


def claim_of(direction: Direction, axes: Iterable[Axis] = ()) -> Claim | None:
    """What a direction claims by the axis it is an end of, else by its name, else by its provenance; None for nothing.

    An axis counts when a word of its name is one of AXES. A name whose words claim different things claims nothing.
    """
    for axis in axes:
        kind = claimed_axis(axis.name)
        if kind is not None and direction.name in (axis.negative, axis.positive):
            end = 1.0 if direction.name == axis.positive else -1.0
            return _claim(kind[0], end * kind[1], f"end of axis {axis.name}")
    told = claimed_axis(direction.name)
    if told is not None:
        return _claim(*told, "its name")
    kind = claimed_axis(str(direction.provenance.get("axis", "")))
    if kind is not None:
        flipped = -1.0 if direction.provenance.get("end") in _NEGATIVE else 1.0
        return _claim(kind[0], flipped * kind[1], "its provenance")
    return None


def claimed_axis(name: str) -> tuple[str, float] | None:
    """(axis, end) that the words of a name agree on, None where they do not; an end ("slow") beats the bare axis ("speed") beside it."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    told = {_ENDS[word] for word in words if word in _ENDS}
    kinds = {axis for axis, _ in told}
    if len(kinds) != 1:
        return None
    (axis,) = kinds
    ends = {_ENDS[word][1] for word in words if word in _ENDS and word not in AXES} or {1.0}
    if len(ends) != 1:
        return None
    flip = -1.0 if _NEGATIVE & set(words) else 1.0
    return axis, flip * next(iter(ends))


def _claim(axis: str, end: float, source: str) -> Claim:
    on, sign = AXES[axis]
    return Claim(on, sign * end, axis, source)


@runtime_checkable
class Considers(Protocol):
    """A policy that tells how it weighed its action (OpenVLAPolicy.consider)."""

    def consider(self, observation: Observation) -> Any: ...


def read(policy: Policy, moment: Moment) -> dict[Reading, Values]:
    """Both readings of one inference at a moment (see `ready`); `expected` is empty for a policy that chooses nothing.

    Raises SteerError as `Policy.infer`, and 'no_observables' for an action space without a hand's motion."""
    ready(policy, moment)
    if not isinstance(policy, Considers):
        chunk = policy.infer(moment.observation)
        # What the hand does over the chunk: rows that shake without going anywhere are no speed, and no robot makes a larger
        # move than that of action 1.
        mean = np.clip(chunk.actions.astype(np.float64), -1.0, 1.0).mean(0)
        return {"executed": {**motion(mean, chunk.space), **_said(chunk.notes)}, "expected": {}}
    considered = policy.consider(moment.observation)
    chunk = considered.chunk
    entropy = {"entropy": float(considered.entropy[0].mean())}
    return {
        "executed": {**motion(chunk.actions[0], chunk.space), **entropy, **_said(chunk.notes)},
        "expected": {
            **motion(considered.mean[0], chunk.space),
            **entropy,
            **{f"said_{slot}": index for slot, index in considered.words.items()},
        },
    }


def motion(action: np.ndarray, space: ActionSpace) -> Values:
    """Observables of one action [dims] of a space of hand motions. Raises SteerError('no_observables')."""
    if space.kind != "ee_delta" or len(action) < 7:
        raise SteerError(
            "no_observables",
            f"an action of kind {space.kind!r} with {len(action)} numbers tells no motion of the hand: expected 'ee_delta' "
            "with 7; score a policy that moves the hand",
        )
    values = [float(v) for v in action]
    step_cm = [100.0 * space.position_scale_m * v for v in values[:3]]
    out = {
        "speed": math.hypot(*step_cm) / 100.0 * space.rate_hz,
        "dx": step_cm[0],
        "dy": step_cm[1],
        "dz": step_cm[2],
        "gripper": (values[6] - space.gripper_close) / (space.gripper_open - space.gripper_close),
    }
    if space.rotation != "none":
        # Exact for an axis and angle; for roll, pitch and yaw it is their norm, right for small steps.
        out["rotation"] = math.degrees(space.rotation_scale_rad * math.hypot(*values[3:6]))
    return out


def _said(notes: Mapping[str, float]) -> Values:
    return {name: float(value) for name, value in notes.items() if name.startswith("said_")}


def derived(
    steered: Mapping[str, np.ndarray], unsteered: Mapping[str, np.ndarray], phases: Sequence[str]
) -> dict[str, np.ndarray]:
    """Read values and what follows from them, each float64 [moments], NaN where a moment does not tell it.

    sideways: |d - (d . u) u|, d the steered translation, u the unit vector of the unsteered one; |d| where that stands still.
    """
    out = {name: np.asarray(values, np.float64) for name, values in steered.items()}
    near, carried = (np.array([phase in wanted for phase in phases], bool) for wanted in (NEAR, CARRIED))
    out["near_speed"] = np.where(near, out["speed"], np.nan)
    out["far_speed"] = np.where(near, np.nan, out["speed"])
    out["carry_dz"] = np.where(carried, out["dz"], np.nan)
    moved = np.stack([out[name] for name in _MOTION], axis=-1)
    course = np.stack([np.asarray(unsteered[name], np.float64) for name in _MOTION], axis=-1)
    size = np.linalg.norm(course, axis=-1, keepdims=True)
    unit = np.divide(course, size, out=np.zeros_like(course), where=size > 0)
    out["sideways"] = np.linalg.norm(moved - (moved * unit).sum(-1, keepdims=True) * unit, axis=-1)
    return out
