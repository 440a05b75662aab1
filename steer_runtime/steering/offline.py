"""Steering without time, for verification and experiments: a strength holds in full from the moment it is set.

Invariant: everything goes through the same engine, admission and hooks as live commands; only the clock is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TypeVar

from steer_runtime.directions.direction import Axis, Direction
from steer_runtime.errors import SteerError
from steer_runtime.steering.command import SteeringCommand
from steer_runtime.steering.engine import SteeringEngine
from steer_runtime.steering.trace import AppliedTarget, TraceRecord
from steer_runtime.types import ROLES, Policy, Role, role_bit

Result = TypeVar("Result")


class OfflineSteering:
    """Context manager: the engine is attached inside and detached after.

    >>> with OfflineSteering(policy, directions) as steering:              # doctest: +SKIP
    ...     steering.set({"up": 1.0})
    ...     logits, record = steering.run(lambda: policy.logits(observation))
    """

    def __init__(
        self, policy: Policy, directions: Sequence[Direction], axes: Sequence[Axis] = (), *, measure_dose: bool = False
    ) -> None:
        self._now_s = 0.0
        self._sequence = 0
        self.engine = SteeringEngine(
            policy,
            directions,
            axes,
            clock=lambda: self._now_s,
            wall_ns=lambda: int(self._now_s * 1e9),
            measure_dose=measure_dose,
        )

    def __enter__(self) -> OfflineSteering:
        self.engine.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.engine.detach()

    def set(self, strengths: Mapping[str, float], *, steps: tuple[int, int] | None = None) -> None:
        """Steer with exactly these targets (direction or axis -> strength), in all forwards or in some (see command).

        Raises SteerError if one is refused.
        """
        self._apply("clear_all", "", 0.0)
        for target, strength in strengths.items():
            self._apply("set", target, strength, steps)
        self._now_s += 1.0  # past every default ramp

    def restore(self, applied: Sequence[AppliedTarget]) -> None:
        """Steer with exactly what an inference ran under, as its trace has it, whatever else was set.

        Raises SteerError if one is refused, 'other_direction' if a target stands for another direction here.
        """
        self._apply("clear_all", "", 0.0)
        for target in applied:
            self._require_same(target)
            span = frozenset(role for role in ROLES if target.span & role_bit(role))
            self._apply("set", target.target, target.strength, target.steps, span)
        self._now_s += 1.0  # past every default ramp

    def run(self, forward: Callable[[], Result]) -> tuple[Result, TraceRecord]:
        """Run one inference under the set strengths; returns its result and the trace of what was written."""
        self.engine.latch()
        result = forward()
        return result, self.engine.finish()

    def _require_same(self, target: AppliedTarget) -> None:
        axis = self.engine.axes.get(target.target)
        name = target.target if axis is None else axis.negative if target.strength < 0 else axis.positive
        here = self.engine.directions.get(name)
        if here is None or here.id != target.direction_id:
            raise SteerError(
                "other_direction",
                f"{target.target!r} stood for {target.direction_id!r} and stands for "
                f"{here.id if here is not None else 'nothing'!r} here: load the same directions",
            )

    def _apply(
        self,
        op: str,
        target: str,
        strength: float,
        steps: tuple[int, int] | None = None,
        span: frozenset[Role] | None = None,
    ) -> None:
        self._sequence += 1
        stamp_ns = int(self._now_s * 1e9)
        verdict = self.engine.apply(
            SteeringCommand(
                "offline",
                0,
                self._sequence,
                stamp_ns,
                op,  # type: ignore[arg-type]
                target,
                strength,
                span=span,
                steps=steps,
            )
        )
        if not verdict.accepted or verdict.code == "clamped":
            raise SteerError(verdict.code, verdict.sentence)
