"""What a tuning found, as one JSON document: trials, the best of each direction, the front, and later what held-out starts said.

Invariant: the document is made of the trials as they are kept and nothing else; the best trial keeps every limit and is the
one with the largest effect among those; none is named where none moves the metric by more than its floor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sim.evaluation.analysis.metrics import METRICS
from sim.evaluation.tuning.plan import Tuning
from sim.evaluation.tuning.score import front
from sim.evaluation.tuning.space import shaped
from sim.evaluation.tuning.trials import Told
from steer_runtime.directions.files import write_atomically
from steer_runtime.errors import SteerError

SCHEMA = "steer-tuning/1"
FILE = "tuning.json"
_KEYS = frozenset(
    ("hash", "name", "metric", "starts", "settings", "policy", "versions", "reference_simulator", "shared", "ends", "held_out")
)  # fmt: skip
_END_KEYS = frozenset(("direction", "sign", "best", "front", "trials"))
_HELD_OUT_KEYS = frozenset(("checked", "ranges", "written"))


def best(trials: Sequence[Told], tuning: Tuning) -> Told | None:
    """The trial to use; of equal ones the first."""
    floor = METRICS[tuning.claim.metric].floor
    moving = [t for t in trials if keeps(t, tuning) and _effect(t) > floor]
    return max(moving, key=lambda t: (_effect(t), -t.number)) if moving else None


def keeps(trial: Told, tuning: Tuning) -> bool:
    """Whether a trial ran to its end and kept every limit."""
    score = trial.outcome.score
    whole = trial.outcome.state == "complete" and score is not None
    return whole and score.keeps(tuning.settings.margin, tuning.settings.damage)  # type: ignore[union-attr]


def document(tuning: Tuning, trials: Mapping[str, Sequence[Told]]) -> dict[str, Any]:
    """JSON-able."""
    metric = METRICS[tuning.claim.metric]
    ends = {}
    for end in tuning.ends:
        told = trials[end.name]
        scored = [t for t in told if t.outcome.score is not None and t.outcome.state == "complete"]
        chosen = best(told, tuning)
        ends[end.name] = {
            "direction": end.direction.id,
            "sign": end.sign,
            "best": None if chosen is None else chosen.number,
            "front": [scored[i].number for i in front([t.outcome.score for t in scored if t.outcome.score is not None])],
            "trials": [
                {
                    "number": t.number, "point": t.point.to_jsonable(), "writes": shaped(end.direction, t.point).id,
                    "outcome": asdict(t.outcome), "effects": list(t.effects), "retry_of": t.retry_of,
                    "keeps": keeps(t, tuning),
                }
                for t in told
            ],
        }  # fmt: skip
    return {
        "schema": SCHEMA,
        "hash": tuning.hash,
        "name": tuning.settings.name,
        "metric": {"name": tuning.claim.metric, "what": metric.what, "unit": metric.unit, "sign": tuning.claim.sign, "floor": metric.floor},
        "starts": len(tuning.study.planned),
        "planned": tuning.settings.trials,
        "settings": tuning.settings.decides,
        "policy": tuning.study.facts["policy"],
        "versions": tuning.study.facts["versions"],
        "reference_simulator": tuning.study.facts["reference_simulator"],
        "shared": dict(tuning.settings.shared),
        "ends": ends,
        "held_out": None,
    }  # fmt: skip


def save(found: Mapping[str, Any], folder: Path) -> Path:
    """Raises SteerError('not_written')."""
    path = folder / FILE
    write_atomically(path, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    return path


def carried(found: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The document with what held-out starts said before, as far as the folder's document has it of the same choices: ends of the
    same tuning whose best trial is still the same. What was written into cards is kept whole, since the cards still have it."""
    try:
        before = load(folder)
    except SteerError:  # the first one, or one that is written anew
        return dict(found)
    held = before["held_out"]
    if held is None or before["hash"] != found["hash"]:
        return dict(found)
    ends, now = before["ends"], found["ends"]
    same = {end for end in held["ranges"] if end in now and now[end]["best"] == ends[end]["best"]}
    if not same:
        return dict(found)
    kept = {
        "checked": [c for c in held["checked"] if c["end"] in same],
        "ranges": {end: its for end, its in held["ranges"].items() if end in same},
    }
    return {**found, "held_out": {**held, **kept}}


def load(folder: Path) -> dict[str, Any]:
    """Raises SteerError: 'no_tuning', 'bad_record' for one that lacks something."""
    path = folder / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise SteerError(
            "no_tuning", f"{path} cannot be read ({why}): give the --out folder of `steer tune run`"
        ) from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise SteerError("no_tuning", f"{path} is not of schema {SCHEMA}: run `steer tune run` again in another --out")
    if not _whole(found):
        raise SteerError(
            "bad_record", f"{path} is not a whole tuning.json: run `steer tune run` again, which writes it anew"
        )
    return found


def _whole(found: Mapping[str, Any]) -> bool:
    ends, held = found.get("ends"), found.get("held_out")
    parts = [(found, _KEYS), *((its, _END_KEYS) for its in (ends.values() if isinstance(ends, dict) else [None]))]
    if held is not None:
        parts.append((held, _HELD_OUT_KEYS))
    return all(isinstance(part, dict) and part.keys() >= keys for part, keys in parts)


def _effect(trial: Told) -> float:
    score = trial.outcome.score
    return 0.0 if score is None or score.effect is None else score.effect
