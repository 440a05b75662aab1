"""The five operations as one affine clamp per neuron, and how a strength blends each with the identity.

    f' = clamp(f * scale + shift, low, high)        identity: scale 1, shift 0, low -inf, high +inf

With strength g in [0, 1] every operation is the identity at 0, its full self at 1, and continuous in between
(design contract 3; the full override is the intervention of Haon et al., CoRL 2025, arXiv 2509.00328):

    override  f' = f + g (alpha - f)
    add       f' = f + g alpha
    scale     f' = f + g (alpha - 1) f
    ablate    f' = (1 - g) f
    clamp     f' = clamp(f, low - w (1 + |low|), high + w (1 + |high|)),  w = 1/g - 1: bounds that open towards
              infinity as g goes to 0
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from steer_runtime.directions.direction import Direction


@dataclass(frozen=True)
class Writes:
    """Coefficients of K neurons of one tower: flat int64 [K] = layer * d_ff + neuron, the rest float32 [K]."""

    flat: np.ndarray
    scale: np.ndarray
    shift: np.ndarray
    low: np.ndarray
    high: np.ndarray


def writes(direction: Direction, strength: float) -> Writes:
    """Coefficients of a neuron direction at `strength` g in (0, 1]."""
    n = direction.neurons
    assert n is not None
    assert 0.0 < strength <= 1.0
    g = np.float32(strength)
    size = len(n)
    scale = np.ones(size, np.float32)
    shift = np.zeros(size, np.float32)
    low = np.full(size, -np.inf, np.float32)
    high = np.full(size, np.inf, np.float32)
    if direction.op == "override":
        scale[:] = np.float32(1.0) - g
        shift[:] = g * n.alpha
    elif direction.op == "add":
        shift[:] = g * n.alpha
    elif direction.op == "scale":
        scale[:] = np.float32(1.0) + g * (n.alpha - np.float32(1.0))
    elif direction.op == "ablate":
        scale[:] = np.float32(1.0) - g
    else:
        assert n.low is not None
        # In float64: 1/g of a tiny strength would overflow float32 into a NaN further down.
        widen = 1.0 / float(g) - 1.0
        limit = float(np.finfo(np.float32).max)
        low[:] = np.clip(n.low - widen * (1.0 + np.abs(n.low.astype(np.float64))), -limit, limit)
        high[:] = np.clip(n.alpha + widen * (1.0 + np.abs(n.alpha.astype(np.float64))), -limit, limit)
    return Writes(n.layer.astype(np.int64) * direction.d_ff + n.neuron, scale, shift, low, high)
