"""Proprioception as soft tokens: what the arm feels and what its gripper was last told.

Invariant: equal poses give equal numbers. Axis-angle jumps at half a turn, where a hand that points down lives, so the
rotation enters as two columns of its matrix (Zhou et al. 2019, arXiv 1812.07035).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from steer_runtime.errors import SteerError

STATE_SIZE = 12
"""Position 3 (m), rotation 6, fingers 2 (m), last gripper command 1."""
OPEN = -1.0
"""The gripper command before the first action: LIBERO's open."""
_HIDDEN = 256
GAIN = 30.0
"""Size of soft tokens: beside what a pretrained layer writes into the residual stream (norms of 60 to 2000 in SmolLM2, where a
word's embedding has 3), a small one would be gone after the first."""


class StateEncoder(nn.Module):
    """[B, STATE_SIZE] -> [B, state_tokens, d_model]: a two-layer MLP on (x - mean) / scale.

    mean, scale [STATE_SIZE]: of the training data; they are set, not trained.
    """

    def __init__(self, tokens: int, d_model: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.mean = nn.Parameter(torch.zeros(STATE_SIZE), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(STATE_SIZE), requires_grad=False)
        self.fc1 = nn.Linear(STATE_SIZE, _HIDDEN)
        self.fc2 = nn.Linear(_HIDDEN, tokens * d_model)

    def normalise(self, state: Tensor) -> Tensor:
        """(x - mean) / scale of [B, STATE_SIZE]."""
        return (state - self.mean) / self.scale

    def forward(self, state: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.fc1(self.normalise(state)))
        return GAIN * self.fc2(hidden).unflatten(-1, (self.tokens, -1))


def state_vector(state: np.ndarray, gripper_command: float) -> np.ndarray:
    """float32 [STATE_SIZE] from an observation's state float [8] and the last gripper command (-1 open, +1 close).

    Raises SteerError('bad_state').
    """
    given = np.asarray(state, dtype=np.float64)
    if given.shape != (8,) or not np.all(np.isfinite(given)):
        raise SteerError(
            "bad_state",
            f"the observation's state has shape {list(given.shape)} or is not finite: expected 8 numbers, position 3, "
            "axis-angle 3 and fingers 2",
        )
    return np.concatenate((given[:3], _two_columns(given[3:6]), given[6:], [gripper_command])).astype(np.float32)


def _two_columns(axis_angle: np.ndarray) -> np.ndarray:
    """float64 [6]: the first two columns of the rotation matrix of axis-angle [3], by Rodrigues' formula."""
    angle = float(np.linalg.norm(axis_angle))
    x, y, z = axis_angle / angle if angle > 1e-9 else np.zeros(3)
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    matrix = np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * cross @ cross
    return matrix[:, :2].T.reshape(-1)
