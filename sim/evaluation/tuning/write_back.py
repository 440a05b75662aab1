"""What a tuning leaves in the store: a calibrated range with its evidence, on the card of the direction or of a tuned one.

Invariant: a direction whose writes stay the same gets a new card and keeps its name; a choice that changes what is written
becomes a new direction, `<name>-tuned`, and the old one stays as it was. A range that held-out starts did not prove says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sim.evaluation.tuning.held_out import Checked
from sim.evaluation.tuning.plan import EVIDENCE, End, Tuning, bare
from sim.evaluation.tuning.space import shaped
from sim.evaluation.tuning.trials import Told
from steer_runtime.directions.direction import Axis, Direction
from steer_runtime.directions.store import DirectionStore

SUFFIX = "-tuned"


@dataclass(frozen=True)
class Finding:
    """One end: the trial that was chosen, the strengths to write, whether held-out starts proved them."""

    end: End
    trial: Told
    strengths: tuple[float, float]
    verified: bool
    checked: Sequence[Checked]


def write(store: DirectionStore, tuning: Tuning, findings: Sequence[Finding]) -> list[Direction]:
    """Save what was found. Raises SteerError as the store does, before the first file is written where it can."""
    out = []
    names = {}
    for found in findings:
        made = shaped(found.end.direction, found.trial.point)
        same = made is found.end.direction
        name = made.name if same else made.name + SUFFIX
        facts = {**made.provenance, EVIDENCE: evidence(tuning, found)}
        new = replace(made, name=name, calibrated=found.strengths, provenance=facts)
        for old in _standing(store, new):
            store.replace(old, new)
        store.save(new)
        out.append(new)
        names[found.end.name] = new.name
    if store.has_axis(tuning.settings.name) and any(n.endswith(SUFFIX) for n in names.values()):
        axis = store.load_axis(tuning.settings.name)
        ends = names.get("negative", axis.negative), names.get("positive", axis.positive)
        store.save_axis(Axis(axis.name + SUFFIX, *ends))
    return out


def evidence(tuning: Tuning, found: Finding) -> dict[str, Any]:
    """What a card says of how its range came about, as JSON."""
    score = found.trial.outcome.score
    assert score is not None
    return {
        "study": tuning.hash[:16],
        "metric": tuning.claim.metric,
        "sign": found.end.sign,
        "verified": found.verified,
        "trial": found.trial.number,
        "point": found.trial.point.to_jsonable(),
        "tuned_on": {"pairs": score.pairs, "effect": _short(score.effect), "success": _short(score.success), "unsteered": _short(score.unsteered)},
        "margin": tuning.settings.margin,
        "held_out": [_held_out(c) for c in found.checked],
        "simulator": tuning.study.facts["versions"].get("mujoco"),
    }  # fmt: skip


def _held_out(checked: Checked) -> Mapping[str, Any]:
    return {
        "strength": _short(checked.strength),
        "pairs": checked.success.n,
        "change": [_short(v) for v in (checked.change.value, checked.change.low, checked.change.high)],
        "success": [_short(v) for v in (checked.success.value, checked.success.low, checked.success.high)],
        "unsteered": [_short(v) for v in (checked.unsteered.value, checked.unsteered.low, checked.unsteered.high)],
        "difference": [_short(v) for v in (checked.difference.value, checked.difference.low, checked.difference.high)],
        "kept": checked.kept,
        "damage": _short(checked.damage),
        "fails": list(checked.fails),
    }


def _standing(store: DirectionStore, new: Direction) -> list[Direction]:
    """Directions that the new one takes the place of: the same writes, or what an earlier tuning left under the name."""
    mine = [d for d in store.load_all() if d.name == new.name and d.model_hash == new.model_hash]
    return [d for d in mine if bare(d).hash == bare(new).hash or (EVIDENCE in d.provenance and d.name.endswith(SUFFIX))]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
