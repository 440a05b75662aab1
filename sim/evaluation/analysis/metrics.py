"""What an episode measured, from its steps as the simulator told them.

Invariant: a metric is a function of one episode's columns in `sim.evaluation.study.records`; nothing asks the policy, and
where there was nothing to measure the answer is None, never zero and never NaN.

Windows. *Way*: from the start until the object is last held (until success, or the end, where none was): what happens
after letting go is no part of the task. *Run*: from the start until success, or the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sim.rollout import middle_height

NEAR = 0.10
"""Distance from the target's centre under which the hand counts as near it, m."""
LIFTED = 0.02
"""Height above its start from which a held object counts as carried, m."""
BOUND = 1.0
"""Largest size of an action component that a robot executes as it is."""

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Steps:
    """One episode. eef [T + 1, 3], target [T + 1, 3] (NaN without one): m. action, executed [T, 7]. held [T + 1] (all False
    without an object). dose, entropy [T], NaN where unknown. success: number of steps at which it first held, or None.
    first [7]: what the policy gave at the start, in the robot's units. rate: control steps a second."""

    eef: np.ndarray
    target: np.ndarray
    action: np.ndarray
    executed: np.ndarray
    held: np.ndarray
    dose: np.ndarray
    entropy: np.ndarray
    success: int | None
    rate: float

    @property
    def run(self) -> int:
        """Control steps until success, or all."""
        return len(self.eef) - 1 if self.success is None else self.success

    @property
    def way(self) -> int:
        """Control steps until the object is last held; `run` where it never was."""
        held = np.flatnonzero(self.held)
        return int(held[-1]) if len(held) else self.run

    @property
    def moved(self) -> np.ndarray:
        """[T] distance of the hand over each control step, m."""
        return np.asarray(np.linalg.norm(np.diff(self.eef, axis=0), axis=1))


@dataclass(frozen=True)
class Metric:
    """unit: of its values. what: formula in words, for people. floor: differences below it say nothing; the least scale by
    which an effect is standardised."""

    unit: str
    what: str
    floor: float
    of: Callable[[Steps], float | None]


def of_columns(columns: Columns, success_step: int | None, rate: float) -> Steps:
    """Steps of one episode from its columns, which begin with the settled start (step 0, no action)."""
    held = np.array([value is True or value == 1 for value in columns["held"].tolist()], dtype=bool)
    return Steps(
        eef=columns["eef_pos"],
        target=columns["target_pos"],
        action=columns["action"][1:],
        executed=columns["executed"][1:],
        held=held,
        dose=columns["dose"][1:].astype(np.float64),
        entropy=columns["entropy"][1:].astype(np.float64),
        success=success_step,
        rate=rate,
    )


def measure(steps: Steps) -> dict[str, float | None]:
    """All of METRICS for one episode."""
    return {name: metric.of(steps) for name, metric in METRICS.items()}


def displacement(s: Steps) -> float | None:
    """mean over the way of ||p[t + 1] - p[t]||, mm a control step; p: grip site."""
    return _mean(1e3 * s.moved[: s.way])


def speed(s: Steps) -> float | None:
    """mean over the way of ||p[t + 1] - p[t]|| * rate, cm/s."""
    return _mean(1e2 * s.rate * s.moved[: s.way])


def near_speed(s: Steps) -> float | None:
    """the same over the steps that begin within NEAR of the target's centre before it is first held, cm/s."""
    return _mean(1e2 * s.rate * s.moved[: s.way][_near(s)])


def far_speed(s: Steps) -> float | None:
    """the same over all other steps of the way, cm/s."""
    return _mean(1e2 * s.rate * s.moved[: s.way][~_near(s)])


def height(s: Steps) -> float | None:
    """mean of z[t] - z[0] of the object's centre while it is held LIFTED above its start, over the middle half of its way
    in the plane, cm; None where it never got that far."""
    z = s.target[:, 2] - s.target[0, 2]
    carried = [(s.target[t, :2], float(1e2 * z[t])) for t in np.flatnonzero(s.held & (z > LIFTED))]
    return middle_height(carried)


def path(s: Steps) -> float | None:
    """sum over the run of ||p[t + 1] - p[t]||, m."""
    return float(s.moved[: s.run].sum()) if s.run else None


def jerk(s: Steps) -> float | None:
    """root mean square over the way of ||p[t] - 3 p[t-1] + 3 p[t-2] - p[t-3]|| * rate^3, m/s^3: the third finite difference,
    the smallest stencil, so that it is exact for a constant jerk and blurs over no more than four steps."""
    if s.way < 3:
        return None
    third = np.diff(s.eef[: s.way + 1], n=3, axis=0) * s.rate**3
    return float(np.sqrt((third**2).sum(1).mean()))


def toggles(s: Steps) -> float | None:
    """number of times that the executed gripper command changes its sign over the run; zeros keep the sign before them."""
    signs = np.sign(s.executed[: s.run, 6])
    signs = signs[signs != 0]
    return float((signs[1:] != signs[:-1]).sum()) if s.run else None


def time_to_success(s: Steps) -> float | None:
    """success step / rate, s; None for an episode that failed, so pairs hold those in which both succeeded."""
    return None if s.success is None else s.success / s.rate


def saturation(s: Steps) -> float | None:
    """share of the six motion components of the policy's actions with |a| >= BOUND over the run, %; the gripper is left out,
    it always stands at an end."""
    inside = s.action[: s.run, :6]
    return float(1e2 * (np.abs(inside) >= BOUND - 1e-6).mean()) if s.run else None


def entropy(s: Steps) -> float | None:
    """mean over the run of the entropy over the action's tokens, nats; None for policies without tokens."""
    return _known_mean(s.entropy[: s.run])


def dose(s: Steps) -> float | None:
    """mean over the run of ||change|| / ||residual stream||, the largest of an inference's sites and tokens; None where it
    was not measured."""
    return _known_mean(s.dose[: s.run])


METRICS: Mapping[str, Metric] = {
    "speed": Metric("cm/s", "speed of the hand", 0.5, speed),
    "near_speed": Metric("cm/s", "speed of the hand near the object", 0.5, near_speed),
    "far_speed": Metric("cm/s", "speed of the hand elsewhere", 0.5, far_speed),
    "displacement": Metric("mm", "displacement of the hand a step", 0.25, displacement),
    "height": Metric("cm", "carrying height", 0.5, height),
    "path": Metric("m", "length of the hand's path", 0.02, path),
    "jerk": Metric("m/s³", "jerk of the hand", 1.0, jerk),
    "toggles": Metric("", "changes of the gripper command", 0.5, toggles),
    "time": Metric("s", "time to success", 0.25, time_to_success),
    "saturation": Metric("%", "share of motion components at the bound", 1.0, saturation),
    "entropy": Metric("nats", "entropy of the action's tokens", 0.05, entropy),
    "dose": Metric("", "dose", 0.01, dose),
}

OFF_AXIS: Mapping[str, tuple[str, ...]] = {
    # Displacement, time and jerk follow from speed, the length of the path from the height: no damage.
    "speed": ("height", "path", "toggles", "entropy"),
    "near_speed": ("far_speed", "height", "path", "toggles", "entropy"),
    "height": ("speed", "near_speed", "jerk", "toggles", "entropy"),
}


def off_axis(metric: str) -> tuple[str, ...]:
    """What a direction that claims `metric` should leave as it is."""
    rest = ("speed", "near_speed", "height", "path", "jerk", "toggles", "entropy")
    return OFF_AXIS.get(metric, tuple(name for name in rest if name != metric))


CLAIMS: Mapping[str, tuple[str, float]] = {
    "speed": ("speed", 1.0),
    "height": ("height", 1.0),
    "careful": ("near_speed", -1.0),
}
"""Axis -> the metric that its positive end claims to move, and the sign with which it does."""


def spreads(unsteered: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Standard deviation of each metric over unsteered episodes, at least its floor; without those that nobody measured.

    Why the floor: a metric that never varies would make any change of it infinite damage.
    """
    out = {}
    for name, metric in METRICS.items():
        values = [value for one in unsteered if (value := one.get(name)) is not None]
        if values:
            out[name] = max(metric.floor, float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)
    return out


def first_action(metric: str, action: np.ndarray, position_scale_m: float, rate: float) -> float | None:
    """The metric's counterpart in one action [7], before any of it moved the robot (open loop); None where it has none.

    speed: ||a[:3]|| * position_scale * rate, cm/s; height: a[2] * position_scale, cm a step. A first state is far from every
    object, so speed near one has no counterpart.
    """
    if not np.isfinite(action).all():
        return None
    if metric == "speed":
        return float(np.linalg.norm(action[:3]) * position_scale_m * rate * 1e2)
    return float(action[2] * position_scale_m * 1e2) if metric == "height" else None


FIRST_UNIT: Mapping[str, str] = {"speed": "cm/s", "height": "cm a step"}


def _near(s: Steps) -> np.ndarray:
    """[way] steps that begin near the target before it is first held; none without a target."""
    held = np.flatnonzero(s.held)
    first = int(held[0]) if len(held) else len(s.eef)
    distance = np.linalg.norm(s.eef - s.target, axis=1)[: s.way]
    return np.asarray((np.nan_to_num(distance, nan=np.inf) < NEAR) & (np.arange(s.way) < first))


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _known_mean(values: np.ndarray) -> float | None:
    return _mean(values[np.isfinite(values)])
