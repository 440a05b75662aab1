"""Does an axis move what its words name, more than random directions of the same form and size do?

Invariant: prompts are neutral; every condition sees the same moments or layouts as the unsteered one and is compared to
it in pairs; all steering goes through the engine, by strengths in [-1, 1] of an axis.

Two measures: offline, the policy's actions and words on a bank of moments; closed loop, whole episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sim.evaluation.axis_directions import Draw
from sim.evaluation.bank import CARRIED, NEAR
from sim.evaluation.episodes import Infer, Trial
from sim.policy_actor import tell_gripper
from steer_runtime.errors import SteerError
from steer_runtime.moments import Moment
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.results import Results
from steer_runtime.steering.offline import OfflineSteering
from steer_runtime.types import Observation

OFF = "off"
OFFLINE: Mapping[str, tuple[tuple[str, float], ...]] = {
    "speed": (("motion", 1.0), ("said_pace", 1.0)),
    "height": (("rise", 1.0), ("said_height", 1.0)),
    "careful": (("near_motion", -1.0), ("said_care", -1.0)),
}
"""Axis -> its offline measures, and the sign with which its positive end moves them.

motion: norm of the translation action; near_motion: the same near objects and places; rise: z of the action while
carrying, all means over a chunk; said_<slot>: index of the word said in that slot, for policies that say any.
"""
CLOSED: Mapping[str, tuple[tuple[str, float], ...]] = {
    "speed": (("speed", 1.0),),
    "height": (("height", 1.0),),
    "careful": (("near_speed", -1.0),),
}
"""Axis -> its measures of a whole episode (see `Motion`), and the sign of the positive end."""


@dataclass(frozen=True)
class Condition:
    """One axis at one strength in [-1, 1]; OFF at 0 is the unsteered policy."""

    draw: str
    kind: str
    strength: float

    @property
    def key(self) -> str:
        return OFF if self.draw == OFF else f"{self.draw}@{self.strength:+g}"


def conditions(draws: Sequence[Draw], strengths: Sequence[float]) -> list[Condition]:
    """Unsteered first, then the tested axis at every strength in both signs, then every random draw.

    strengths: above 0, at most 1. Raises SteerError('bad_strength').
    """
    bad = [s for s in strengths if not 0 < s <= 1]
    if bad or not strengths:
        raise SteerError("bad_strength", f"strengths {list(strengths)} are not usable: expected numbers in (0, 1]")
    signed = sorted({sign * s for s in strengths for sign in (-1.0, 1.0)})
    return [Condition(OFF, OFF, 0.0)] + [Condition(d.name, d.kind, s) for d in draws for s in signed]


def only(wanted: Sequence[Condition], strengths: Sequence[float], known: Sequence[float]) -> list[Condition]:
    """The conditions at these strengths, in both signs. Raises SteerError('bad_strength') for one that is not in `known`."""
    strange = [s for s in strengths if s not in known]
    if strange:
        raise SteerError(
            "bad_strength",
            f"random axes were asked for at {strange[0]:g}, where the axis itself is not run: expected some of "
            f"{', '.join(f'{s:g}' for s in known)}",
        )
    return [c for c in wanted if abs(c.strength) in strengths]


class Steered:
    """The policy with all axes of an experiment attached; a context manager. `infer(condition)` steers by it."""

    def __init__(self, policy: OpenVLAPolicy, draws: Sequence[Draw]) -> None:
        self._policy = policy
        directions = [end for draw in draws for end in (draw.positive, draw.negative)]
        self._steering = OfflineSteering(policy, directions, [draw.axis for draw in draws])

    def __enter__(self) -> Steered:
        self._steering.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._steering.__exit__(*error)

    def infer(self, condition: Condition) -> Infer:
        """Inference under this condition, set anew at every inference: other conditions may come between."""

        def infer(observation: Observation) -> Any:
            self._steering.set({} if condition.draw == OFF else {condition.draw: condition.strength})
            return self._steering.run(lambda: self._policy.infer(observation))[0]

        return infer


def run_offline(
    policy: OpenVLAPolicy,
    steered: Steered,
    moments: Sequence[Moment],
    wanted: Sequence[Condition],
    results: Results,
    on_condition: Callable[[Condition], None] | None = None,
) -> list[dict[str, Any]]:
    """Ask about every moment under every condition that the file lacks; one line a condition, values by moment.

    Returns a row per condition and moment: {"draw", "kind", "strength", "pair", measures}.
    """
    for condition in wanted:
        key = f"offline-{condition.key}"
        if key in results.rows:
            continue
        infer = steered.infer(condition)
        columns: dict[str, list[float | None]] = {}
        for moment in moments:
            policy.reset()
            tell_gripper(policy, moment.gripper)
            chunk = infer(moment.observation)
            for name, value in _measures(chunk.actions, chunk.notes, moment.phase).items():
                columns.setdefault(name, []).append(value)
        results.add(key, {"values": columns})
        if on_condition is not None:
            on_condition(condition)
    return [
        {
            "draw": c.draw, "kind": c.kind, "strength": c.strength, "pair": pair,
            **{name: values[pair] for name, values in results.rows[f"offline-{c.key}"]["values"].items()},
        }
        for c in wanted
        for pair in range(len(moments))
    ]  # fmt: skip


def closed_trials(trials: Sequence[Trial], wanted: Sequence[Condition]) -> dict[str, tuple[Trial, Condition]]:
    """Key -> every layout under every condition; `wanted` conditions of random draws may be given fewer layouts."""
    out = {}
    for condition in wanted:
        for trial in trials:
            key = f"closed-{trial.key}-{condition.key}"
            out[key] = (replace(trial, key=key, condition=condition.key), condition)
    return out


def closed_rows(
    rows: Sequence[Mapping[str, Any]], planned: Mapping[str, tuple[Trial, Condition]]
) -> list[dict[str, Any]]:
    """Rows of episodes as `dose_response` reads them; refused layouts are left out."""
    out = []
    for row in rows:
        if "refused" in row:
            continue
        condition = planned[row["key"]][1]
        values = {name: row[name] for name in ("speed", "height", "near_speed")}
        out.append(
            {
                "draw": condition.draw, "kind": condition.kind, "strength": condition.strength, "pair": row["seed"],
                "done": float(row["done"]), **values,
            }
        )  # fmt: skip
    return out


def _measures(actions: np.ndarray, notes: Mapping[str, float], phase: str) -> dict[str, float | None]:
    moved = float(np.linalg.norm(actions[:, :3], axis=1).mean())
    return {
        "motion": moved,
        "near_motion": moved if phase in NEAR else None,
        "rise": float(actions[:, 2].mean()) if phase in CARRIED else None,
        **{name: float(value) for name, value in notes.items() if name.startswith("said_")},
    }
