"""Holding a set point in LIBERO: a loop that moves an axis's strength against fixed strengths and the unsteered policy.

Invariant: every condition runs the same layouts with the same meter, and sees no more than a policy node's neighbour
would: the hand's position and the gripper at each inference. Only the strength differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sim.evaluation.episodes import Infer, Trial
from steer_runtime.directions.direction import Axis, Direction
from steer_runtime.directions.store import DirectionStore
from steer_runtime.errors import SteerError
from steer_runtime.policies import LoadedPolicy
from steer_runtime.setpoint.limits import StrengthLimits
from steer_runtime.setpoint.loop import SetPointLoop
from steer_runtime.setpoint.meter import Sample
from steer_runtime.setpoint.presets import Tuning, make_loop, make_meter
from steer_runtime.setpoint.target import Target
from steer_runtime.steering.offline import OfflineSteering
from steer_runtime.types import ActionChunk, ActionSpace, Observation

OFF = "off"
FIXED = "fixed"
_SCALABLE = ("override", "add")


@dataclass(frozen=True)
class HoldCondition:
    """kind: OFF, FIXED, or the name of a controller. strength: of FIXED, in units of the axis as its card has it.

    scale: how many times its alphas the axis may have here; a controller's range is the axis's own times this.
    """

    kind: str
    strength: float = 0.0
    scale: float = 1.0

    @property
    def key(self) -> str:
        if self.kind == OFF:
            return OFF
        what = f"fixed{self.strength:+g}" if self.kind == FIXED else self.kind
        return what if self.scale == 1.0 else f"{what}-x{self.scale:g}"

    @property
    def closed(self) -> bool:
        """Whether a controller moves the strength."""
        return self.kind not in (OFF, FIXED)


def hold_conditions(
    fixed: Sequence[float], controllers: Sequence[str], strong: Sequence[float], strong_controllers: Sequence[str]
) -> list[HoldCondition]:
    """Unsteered, the fixed strengths, the controllers; then at each strong scale both ends fixed and the strong controllers.

    Raises SteerError('bad_scale') for a strong scale that is not above 1.
    """
    bad = [k for k in strong if not 1 < k <= 100]
    if bad:
        raise SteerError(
            "bad_scale", f"a scale of {bad[0]:g} is not strong: expected above 1 and at most 100, such as 2,3"
        )
    out = [HoldCondition(OFF)]
    out += [HoldCondition(FIXED, s) for s in fixed if s]
    out += [HoldCondition(kind) for kind in controllers]
    for k in strong:
        out += [HoldCondition(FIXED, end * k, k) for end in (-1.0, 1.0)]
        out += [HoldCondition(kind, 0.0, k) for kind in strong_controllers]
    return out


@dataclass(frozen=True)
class HeldAxis:
    """An axis with its ends, as it is or with its alphas scaled. low, high: strengths that its cards allow."""

    axis: Axis
    negative: Direction
    positive: Direction

    @classmethod
    def load(cls, store: DirectionStore, name: str, model_hash: str) -> HeldAxis:
        """The axis called `name` of the store. Raises SteerError: as `DirectionStore.load_axis` and `load`."""
        axis = store.load_axis(name)
        ends = (store.load(end, model_hash=model_hash) for end in (axis.negative, axis.positive))
        return cls(axis, *ends)

    @property
    def low(self) -> float:
        return -_most(self.negative)

    @property
    def high(self) -> float:
        return _most(self.positive)

    def scaled(self, factor: float) -> HeldAxis:
        """The same axis under another name with `factor` times its alphas or vectors. Raises SteerError('not_scalable')."""
        if factor == 1.0:
            return self
        negative, positive = (_scaled(end, factor) for end in (self.negative, self.positive))
        name = f"{self.axis.name}-x{factor:g}"
        return HeldAxis(Axis(name, negative.name, positive.name), negative, positive)


def _most(direction: Direction) -> float:
    """Largest strength whose effect was shown, else the largest that the card allows."""
    return direction.max_strength if direction.calibrated is None else direction.calibrated[1]


def _scaled(direction: Direction, factor: float) -> Direction:
    if direction.op not in _SCALABLE:
        raise SteerError(
            "not_scalable",
            f"{direction.id!r} has operation {direction.op!r}: expected {' or '.join(_SCALABLE)} to make it stronger",
        )
    neurons, dense = direction.neurons, direction.dense
    k = np.float32(factor)
    return replace(
        direction,
        name=f"{direction.name}-x{factor:g}",
        neurons=None if neurons is None else replace(neurons, alpha=neurons.alpha * k),
        dense=None if dense is None else {site: vector * k for site, vector in dense.items()},
        max_strength=1.0,
        calibrated=None,
        provenance={**direction.provenance, "scaled": factor, "of": direction.id},
    )


def sample_of(observation: Observation, space: ActionSpace, told: float | None) -> Sample:
    """What a meter needs of an observation. told: the last gripper command, None before the first."""
    state = observation.state
    opened = None if told is None else abs(told - space.gripper_open) < abs(told - space.gripper_close)
    return Sample(
        time_s=observation.stamp_ns / 1e9,
        position=np.asarray(state[:3], dtype=np.float64),
        opening=float(state[6] - state[7]),
        closed=None if opened is None else not opened,
    )


class HeldPolicy:
    """A policy with an axis attached at every scale of an experiment; a context manager.

    `infer_for(trial, condition)` is inference under a condition; `log` then holds what happened in that episode.
    limits: for scale 1; at scale k the range of the strength, not the slew, is k times as wide.
    """

    def __init__(
        self, policy: LoadedPolicy, axis: HeldAxis, scales: Sequence[float], target: Target, limits: StrengthLimits
    ) -> None:
        self._policy, self._target, self._limits = policy, target, limits
        self._axes = {k: axis.scaled(k) for k in {1.0, *scales}}
        ends = [end for held in self._axes.values() for end in (held.negative, held.positive)]
        self._steering = OfflineSteering(policy, ends, [held.axis for held in self._axes.values()], measure_dose=True)
        self.log: dict[str, list[Any]] = {}
        self.counters: Mapping[str, int] = {}

    def __enter__(self) -> HeldPolicy:
        self._steering.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._steering.__exit__(*error)

    def infer_for(self, condition: HoldCondition, chosen: Tuning | None) -> Infer:
        """Inference of one episode. chosen: of the controller, of a condition that has one."""
        loop = self._loop(condition, chosen)
        meter = make_meter(self._target, chosen.meter if chosen else None)
        self.log = log = {name: list[Any]() for name in ("t", "value", "raw", "why", "strength", "dose", "said")}
        self.counters = {}
        told: list[float | None] = [None]

        def infer(observation: Observation) -> ActionChunk:
            sample = sample_of(observation, self._policy.action_space, told[0])
            if loop is None:
                reading, strength, why = meter.add(sample), condition.strength, ""
            else:
                loop.see(sample)
                step = loop.act()
                reading, strength, why = step.reading, step.strength, step.held
            chunk, dose = self._run(condition, strength, observation)
            if loop is not None:
                loop.saw_dose(strength, dose)
                self.counters = loop.counters
            told[0] = float(chunk.actions[-1, -1])
            said = [str(word).strip() for word in getattr(self._policy, "said", ())]
            entry = (sample.time_s, reading.value, reading.raw, why or reading.why, strength, dose, " ".join(said))
            for name, value in zip(log, entry, strict=True):
                log[name].append(round(value, 5) if isinstance(value, float) else value)
            return chunk

        return infer

    def _loop(self, condition: HoldCondition, chosen: Tuning | None) -> SetPointLoop | None:
        if not condition.closed:
            return None
        if chosen is None:
            raise SteerError("unknown_controller", f"condition {condition.key!r} has no tuning; give one")
        limits = self._limits
        k = condition.scale
        return make_loop(self._target, chosen, replace(limits, low=limits.low * k, high=limits.high * k))

    def _run(self, condition: HoldCondition, strength: float, observation: Observation) -> tuple[ActionChunk, float]:
        """(chunk, largest dose of all sites) under a strength."""
        name = self._axes[condition.scale].axis.name
        self._steering.set({name: strength / condition.scale} if strength else {})
        chunk, record = self._steering.run(lambda: self._policy.infer(observation))
        return chunk, max((site.dose or 0.0 for site in record.sites), default=0.0)


def hold_trials(
    layouts: Sequence[Trial], conditions: Sequence[HoldCondition]
) -> dict[str, tuple[Trial, HoldCondition]]:
    """Key -> every layout under every condition, layout by layout, so that what is finished is always paired."""
    out = {}
    for trial in layouts:
        for condition in conditions:
            key = f"hold-{trial.key}-{condition.key}"
            out[key] = (replace(trial, key=key, condition=condition.key), condition)
    return out


def run_held(
    held: HeldPolicy,
    planned: Mapping[str, tuple[Trial, HoldCondition]],
    tunings: Mapping[str, Tuning],
    run: Callable[[Callable[[Trial], Infer], Callable[[Trial], Mapping[str, Any]]], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Rows of the planned episodes; `run` is `sim.evaluation.episodes.run_trials` but for infer_for and also."""

    def infer_for(trial: Trial) -> Infer:
        condition = planned[trial.key][1]
        return held.infer_for(condition, tunings.get(condition.kind))

    def also(trial: Trial) -> Mapping[str, Any]:
        return {"trace": held.log, "loop": dict(held.counters)}

    return run(infer_for, also)
