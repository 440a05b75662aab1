"""How far the arm reaches with the hand pointing down, and how to stay clear of its straight elbow.

Invariant: pure geometry of the Panda's links. With the elbow straight the arm cannot be pulled in by small Cartesian
steps (the Jacobian loses the radial direction), so a hand that gets there stays there; whoever drives it keeps away.

Link lengths are Franka's Denavit-Hartenberg parameters (Franka Control Interface documentation): upper arm 0.316 m and
forearm 0.384 m, each with an elbow offset of 0.0825 m, wrist offset 0.088 m, flange 0.107 m; robosuite's grip site is
0.097 m below the flange.
"""

from __future__ import annotations

import numpy as np

WRIST_OFFSET = 0.088
"""The hand hangs this much further out than the wrist, m."""
WRIST_ABOVE_GRIP = 0.107 + 0.097
"""The wrist is this much higher than the grip site, m."""
STRAIGHT = float(np.hypot(0.316, 0.0825) + np.hypot(0.384, 0.0825))
"""Distance from shoulder to wrist with the elbow straight: 0.719 m."""
FURTHEST = STRAIGHT - 0.014
"""Furthest that a goal may be, shoulder to wrist, m."""
STRETCHED = STRAIGHT - 0.024
"""From here on the hand is drawn in, m."""


def stretch(shoulder: np.ndarray, position: np.ndarray) -> float:
    """Distance from shoulder to wrist when the grip site is at `position` [3] and the hand points down, m."""
    out = float(np.linalg.norm(position[:2] - shoulder[:2])) - WRIST_OFFSET
    return float(np.hypot(out, position[2] + WRIST_ABOVE_GRIP - shoulder[2]))


def radius(shoulder: np.ndarray, height: float, furthest: float = FURTHEST) -> float:
    """Furthest horizontal distance from the shoulder's axis that a grip site at `height` reaches, m."""
    up = height + WRIST_ABOVE_GRIP - shoulder[2]
    return WRIST_OFFSET + float(np.sqrt(max(furthest**2 - up**2, 0.0)))


def within(shoulder: np.ndarray, position: np.ndarray) -> np.ndarray:
    """The position [3], drawn in horizontally to what is within reach at its height."""
    offset = position[:2] - shoulder[:2]
    distance, limit = float(np.linalg.norm(offset)), radius(shoulder, float(position[2]))
    if distance <= limit:
        return position
    return np.array([*(shoulder[:2] + offset * (limit / distance)), position[2]])


def drawn_in(shoulder: np.ndarray, position: np.ndarray, move: np.ndarray, gain: float) -> np.ndarray:
    """A translation action [3] at `position`, its outward part replaced by an inward one where the arm is stretched.

    gain: action per metre beyond STRETCHED.
    """
    beyond = stretch(shoulder, position) - STRETCHED
    if beyond <= 0.0:
        return move
    outward = position[:2] - shoulder[:2]
    outward = outward / max(float(np.linalg.norm(outward)), 1e-9)
    inward = min(float(move[:2] @ outward), 0.0) - gain * beyond
    flat = move[:2] - outward * float(move[:2] @ outward) + outward * inward
    return np.array([*flat, move[2]])
