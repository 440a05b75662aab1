"""Directions for the tiny policy, and a clock that tests move by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from steer_runtime.directions.direction import Direction, Neurons, Operation
from steer_runtime.steering.command import SteeringCommand
from steer_runtime.types import ALL_ROLES, Policy, Role


def neuron_direction(
    policy: Policy,
    name: str = "up",
    neurons: Sequence[tuple[int, int]] = ((0, 3), (1, 5), (1, 9), (2, 60)),
    alpha: float = 4.0,
    *,
    op: Operation = "override",
    span: frozenset[Role] = ALL_ROLES,
    low: float | None = None,
    max_strength: float = 1.0,
    model_hash: str | None = None,
) -> Direction:
    tower = policy.towers["lm"]
    return Direction(
        name=name,
        tower="lm",
        model_hash=policy.model_hash if model_hash is None else model_hash,
        layers=tower.layers,
        d_model=tower.d_model,
        d_ff=tower.d_ff,
        op=op,
        span=span,
        neurons=Neurons(
            np.array([layer for layer, _ in neurons], np.int32),
            np.array([neuron for _, neuron in neurons], np.int32),
            np.full(len(neurons), alpha, np.float32),
            None if low is None else np.full(len(neurons), low, np.float32),
        ),
        max_strength=max_strength,
    )


def dense_direction(
    policy: Policy, name: str = "drift", sites: Sequence[int] = (0, 2), span: frozenset[Role] = ALL_ROLES, seed: int = 0
) -> Direction:
    tower = policy.towers["lm"]
    rng = np.random.default_rng(seed)
    return Direction(
        name=name,
        tower="lm",
        model_hash=policy.model_hash,
        layers=tower.layers,
        d_model=tower.d_model,
        d_ff=tower.d_ff,
        op="add",
        span=span,
        dense={site: rng.normal(size=tower.d_model).astype(np.float32) for site in sites},
    )


class Time:
    """A steady clock and a wall clock in step; both move only when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def steady(self) -> float:
        return self.now_s

    def wall_ns(self) -> int:
        return int(self.now_s * 1e9)


class Sender:
    """One source of commands, numbering them as a client does."""

    def __init__(self, time: Time, source: str = "operator", epoch: int = 1) -> None:
        self.time, self.source, self.epoch, self.sequence = time, source, epoch, 0

    def set(self, target: str, strength: float, **fields: object) -> SteeringCommand:
        return self._command("set", target, strength, **fields)

    def clear(self, target: str, **fields: object) -> SteeringCommand:
        return self._command("clear", target, 0.0, **fields)

    def clear_all(self, **fields: object) -> SteeringCommand:
        return self._command("clear_all", "", 0.0, **fields)

    def _command(self, verb: str, name: str, value: float, **fields: object) -> SteeringCommand:
        self.sequence += 1
        values = {
            "source": self.source,
            "epoch": self.epoch,
            "sequence": self.sequence,
            "stamp_ns": self.time.wall_ns(),
            "op": verb,
            "target": name,
            "strength": value,
        }
        return SteeringCommand(**{**values, **fields})  # type: ignore[arg-type]
