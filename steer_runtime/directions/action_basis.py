"""What a vector in the residual stream of an action expert does to the action, dimension by dimension.

Invariant: a positive product with row i raises dimension i of the action. The expert of a flow policy computes the way from
actions to noise, x_{t - dt} = x_t - dt v (Black et al. 2024, arXiv 2410.24164), so these rows are those of `action_out_proj`
with the opposite sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from steer_runtime.directions.token_basis import TokenBasis
from steer_runtime.errors import SteerError
from steer_runtime.types import ActionSpace, Tower

HAND = ("dx", "dy", "dz", "rx", "ry", "rz", "gripper")
"""Dimensions of an `ee_delta` action; the gripper with the sign of the action space."""
_LEAST = 1e-3
"""Cosines below it are not told."""


@dataclass(frozen=True, eq=False)
class ActionBasis:
    """rows: float64 [dims, d_model] of the action space's dimensions, without padding; names: what each one moves."""

    rows: np.ndarray
    names: tuple[str, ...]

    @classmethod
    def of(cls, policy: Any) -> ActionBasis:
        """Of a flow policy. Raises SteerError('no_action_rows') for one without `action_basis`."""
        matrix = getattr(policy, "action_basis", None)
        if matrix is None:
            raise SteerError(
                "no_action_rows",
                f"{policy.name!r} has no matrix that makes actions: its actions are tokens, whose rows all dimensions share",
            )
        space: ActionSpace = policy.action_space
        rows = -matrix.detach().to("cpu").double().numpy()[: space.dims]
        hand = space.kind == "ee_delta" and space.dims == len(HAND)
        return cls(rows, HAND if hand else tuple(f"action{i}" for i in range(len(rows))))

    @property
    def unit(self) -> float:
        """Mean norm of a row."""
        return float(np.linalg.norm(self.rows, axis=1).mean())

    def row(self, dimension: int) -> np.ndarray:
        """What raises one dimension, float64 [d_model]. Raises SteerError('no_action_rows')."""
        if not 0 <= dimension < len(self.rows):
            raise SteerError(
                "no_action_rows",
                f"dimension {dimension} was asked for: expected 0 to {len(self.rows) - 1} ({', '.join(self.names)})",
            )
        return self.rows[dimension]

    def ends(self, vectors: np.ndarray, count: int) -> list[tuple[list[str], list[str]]]:
        """What each row of [N, d_model] raises and lowers most, as `dz +0.42`: the dimension and the cosine with its row."""
        given = np.asarray(vectors, np.float64)
        sizes = np.linalg.norm(given, axis=1)[:, None] * np.linalg.norm(self.rows, axis=1)
        cosines = np.divide(given @ self.rows.T, sizes, out=np.zeros(sizes.shape), where=sizes > 0)
        out = []
        for row in cosines:
            order = np.argsort(-np.abs(row), kind="stable")
            told = [(row[i] > 0, f"{self.names[i]} {row[i]:+.2f}") for i in order if abs(row[i]) > _LEAST]
            up, down = ([text for raises, text in told if raises == wanted][:count] for wanted in (True, False))
            out.append((up, down))
        return out


def reader_of(policy: Any, tower: Tower) -> TokenBasis | ActionBasis:
    """What the residual stream of a tower is read through."""
    return ActionBasis.of(policy) if tower.basis == "actions" else TokenBasis.of(policy)
