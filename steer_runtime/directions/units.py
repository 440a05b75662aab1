"""What a normalised action value means on the robot, dimension by dimension: "dz +1.2 cm".

An action token stands for one normalised value. Which motion that is depends on the dimension it is said for and on the
dataset's statistics, so one token has seven meanings, and a value vector that favours the token favours no one of them
by itself.

Invariant: the numbers are those that the policy would send for the token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.actions import libero_gripper
from steer_runtime.types import ActionSpace

_ROTATION = {"axis_angle": ("rx", "ry", "rz"), "rpy": ("roll", "pitch", "yaw")}


class Unnormalises(Protocol):
    """Statistics of a dataset (`openvla.actions.Statistics`)."""

    def unnormalise(self, values: np.ndarray) -> np.ndarray: ...


def dimensions(space: ActionSpace) -> tuple[str, ...]:
    """Names of an action's dimensions, in order. Raises SteerError('no_units') for a space without units of its own."""
    if space.kind != "ee_delta" or space.rotation not in _ROTATION or space.dims != 7:
        raise SteerError(
            "no_units",
            f"actions of kind {space.kind!r} with rotation {space.rotation!r} and {space.dims} dimensions have no named "
            "units here: expected end-effector deltas of 7",
        )
    return ("dx", "dy", "dz", *_ROTATION[space.rotation], "gripper")


def in_units(
    value: float,
    statistics: Unnormalises,
    space: ActionSpace,
    *,
    gripper: Callable[[float], float] = libero_gripper,
) -> dict[str, str]:
    """Dimension -> text of one control step, such as {"dz": "dz +1.2 cm", "rx": "rx -3.0 deg", "gripper": "close"}.

    value: normalised, in [-1, 1]. Position: unnormalised x position_scale_m; rotation: unnormalised x
    rotation_scale_rad; gripper: the command that the policy makes of the unnormalised value.
    Raises SteerError('no_units').
    """
    names = dimensions(space)
    actions = np.asarray(statistics.unnormalise(np.full(7, float(value))), np.float64)
    texts = [f"{n} {a * space.position_scale_m * 100:+.2f} cm" for n, a in zip(names[:3], actions[:3], strict=True)]
    turns = actions[3:6] * math.degrees(space.rotation_scale_rad)
    texts += [f"{n} {a:+.1f} deg" for n, a in zip(names[3:6], turns, strict=True)]
    texts.append("close" if gripper(float(actions[6])) == space.gripper_close else "open")
    return dict(zip(names, texts, strict=True))
