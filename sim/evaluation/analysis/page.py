"""An analysis as one document, and the document as one HTML page that needs nothing else: no network, no script.

Invariant: the page shows numbers of the document and computes none; texts from instructions and names are data, never
markup; the same records give the same bytes, so a report can be checked against its study.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from sim.evaluation.analysis import verdict
from sim.evaluation.analysis.effects import ALPHA, Analysis, Effect, Subject
from sim.evaluation.analysis.measured import Study
from sim.evaluation.analysis.metrics import FIRST_UNIT, METRICS
from sim.evaluation.analysis.paired import RESAMPLES, SEED
from sim.evaluation.analysis.shares import MARGIN
from steer_runtime.directions.files import write_atomically
from steer_runtime.errors import SteerError

SCHEMA = "steer-study-summary/1"
EMBEDDED = 3_000_000
"""Bytes of videos that a page holds; more are linked, beside it."""


def document(study: Study, analysis: Analysis, command: str) -> dict[str, Any]:
    """JSON-able: the verdicts, every number behind them, and what the study ran with."""
    facts = {
        name: value
        for name, value in study.facts.items()
        if name not in ("conditions", "directions", "schema", "settings")
    }
    return {
        "schema": SCHEMA,
        "answers": [_answer(s) for s in analysis.subjects],
        "subjects": [_subject(s, study) for s in analysis.subjects],
        "unsteered": {name: asdict(e) for name, e in analysis.unsteered.items()},
        "success": asdict(analysis.success),
        "released": asdict(analysis.released),
        "zero": {"pairs": analysis.zero[0], "equal": analysis.zero[1]},
        "coverage": _coverage(analysis.coverage),
        "coverage_by_kind": {kind: _coverage(c) for kind, c in analysis.by_kind.items()},
        "incomplete": {n: _coverage(c) for n, c in analysis.groups.items() if c.scored < c.planned},
        "tasks": analysis.tasks,
        "metrics": {name: {"unit": m.unit, "what": m.what} for name, m in METRICS.items()},
        "first_units": dict(FIRST_UNIT),
        "rules": {"alpha": ALPHA, "margin": MARGIN, "resamples": RESAMPLES, "seed": SEED},
        "study": facts,
        "directions": _directions(study),
        "settings": _yaml(study.facts.get("settings")),
        "command": command,
    }


def save(document: Mapping[str, Any], path: Path) -> Path:
    """Write the document as JSON. Raises SteerError('not_written')."""
    write_atomically(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    return path


def render(document: Mapping[str, Any], path: Path, folder: Path) -> Path:
    """Write the page. folder: of the study, where its videos stand. Raises SteerError: 'no_jinja2' where jinja2 or matplotlib
    is missing, 'not_written'."""
    try:
        import jinja2

        from sim.evaluation.analysis import figures

        pictures = {s["name"]: figures.subject(document, s) for s in document["subjects"] if s["claim"] is not None}
    except ModuleNotFoundError as missing:
        raise SteerError(
            "no_jinja2",
            f"the report needs {missing.name}: install the extra `sim`, or read summary.json, which holds every number",
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=_number, signed=_signed, interval=_interval, percent=verdict.percent, points=_points, p=verdict.pvalue, equals=verdict.equals, heat=_heat, capfirst=verdict.capital
    )  # fmt: skip
    shown = {s["name"]: _videos(s, path, folder) for s in document["subjects"]}
    html = environment.get_template("study.html.j2").render(d=document, pictures=pictures, videos=shown)
    write_atomically(path, html.encode())
    return path


def _answer(subject: Subject) -> dict[str, Any]:
    told = verdict.judge(subject)
    return {"name": subject.name, **asdict(told), "shown": verdict.SHOWN[told.does]}


def _subject(subject: Subject, study: Study) -> dict[str, Any]:
    chosen = verdict.judge(subject).chosen
    return {
        "name": subject.name,
        "ids": list(subject.ids),
        "claim": None if subject.claim is None else asdict(subject.claim),
        "slope": asdict(subject.slope),
        "p": asdict(subject.p),
        "adjusted": subject.adjusted,
        "detectable": asdict(subject.detectable),
        "monotone": subject.monotone,
        "doses": [_effect(d) for d in subject.doses],
        "rivals": [_effect(d) for d in subject.rivals],
        "chosen": chosen,
        "notes": _notes(subject),
        "tasks": [
            {
                "task": t.task, "words": t.words, "before": t.before, "success": list(t.success),
                "changes": {label: {"value": v, "n": n, "success": list(s)} for label, (v, n, s) in t.changes.items()},
            }
            for t in subject.tasks
        ],
        "videos": _triples(subject, study, list(chosen.values())),
    }  # fmt: skip


def _notes(subject: Subject) -> list[str]:
    """What is weak about its controls, with the strengths that it is said of."""
    said: dict[str, list[str]] = {}
    for dose in subject.doses:
        if dose.band.note:
            said.setdefault(dose.band.note, []).append(verdict.strength(dose))
    return [f"{note.removesuffix(' at this strength')} at {', '.join(at)}" for note, at in said.items()]


def _effect(effect: Effect) -> dict[str, Any]:
    return {**asdict(effect), "shown": _shown(effect), "short": _short(effect)}


def _shown(effect: Effect) -> str:
    """What a reader calls the condition."""
    if effect.kind == "prompt":
        return f"prompt {_short(effect)}"
    if effect.kind == "scale":
        return f"action\N{NO-BREAK SPACE}{_short(effect)}"
    return f"{'opposite ' if effect.kind == 'opposite' else ''}{verdict.strength(effect)}"


def _short(effect: Effect) -> str:
    """The same where there is little room."""
    if effect.kind == "prompt":
        return "“" + effect.label.removeprefix("prompt:").replace("{}", "").strip(" ,.;:") + "”"
    if effect.kind == "scale":
        return f"{verdict.TIMES}\N{NO-BREAK SPACE}{effect.strength:g}"
    return _shown(effect)


def _coverage(coverage: Any) -> dict[str, Any]:
    return {**asdict(coverage), "missing": coverage.missing, "share": coverage.share}


def _directions(study: Study) -> list[dict[str, Any]]:
    cards = study.facts.get("directions", {})
    ids = sorted({e.direction_id for e in study.episodes if e.kind == "direction" and e.direction_id})
    wanted = ("op", "tower", "span", "model_hash")
    return [{"id": i, **{k: cards[i][k] for k in wanted if k in cards.get(i, {})}} for i in ids]


def _yaml(settings: Any) -> str:
    """The study's file again, without what it left at its default of nothing; empty where the sidecar has none."""
    return yaml.safe_dump(_told(settings), sort_keys=False, width=110, default_flow_style=None) if settings else ""


def _told(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _told(inner) for name, inner in value.items() if inner is not None}
    return [_told(inner) for inner in value] if isinstance(value, list) else value


def _triples(subject: Subject, study: Study, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Starts that were filmed unsteered and under every chosen condition, by the names of the films."""
    from sim.evaluation.study.journal import video_path

    by_pair: dict[str, dict[str, Any]] = {}
    wanted = ["unsteered", *labels]
    for e in study.episodes:
        name = "unsteered" if e.kind == "unsteered" else e.condition
        if name in wanted and e.status == "done":
            film = video_path(study.folder, e.key)
            if film.exists():
                told = {"file": str(film.relative_to(study.folder)), "success": bool(e.success), "key": e.key}
                by_pair.setdefault(e.pair, {})[name] = told
    # The first start that shows all; else the one that shows most, steered ones among them.
    best = max(by_pair.items(), key=lambda item: len(item[1]), default=None)
    if best is None or len(best[1]) < 2:
        return []
    effects = {d.label: _shown(d) for d in subject.doses}
    return [
        {"pair": best[0], "label": name, "shown": effects.get(name, name), **best[1][name]} for name in wanted if name in best[1]
    ]  # fmt: skip


def _videos(subject: Mapping[str, Any], path: Path, folder: Path) -> list[dict[str, Any]]:
    """Films as they stand on the page: embedded where all together are small, else linked relative to it."""
    files = [folder / v["file"] for v in subject["videos"]]
    small = sum(f.stat().st_size for f in files if f.exists()) <= EMBEDDED
    out = []
    for film, told in zip(files, subject["videos"], strict=True):
        if film.exists():
            inside = "data:video/mp4;base64," + base64.b64encode(film.read_bytes()).decode() if small else ""
            out.append({**told, "source": inside or Path(os.path.relpath(film, path.resolve().parent)).as_posix()})
    return out


def _number(value: float | None, digits: int | None = None) -> str:
    return verdict.number(value, digits)


def _signed(value: float | None, digits: int | None = None) -> str:
    return verdict.number(value, digits, sign=True)


def _interval(estimate: Mapping[str, Any], sign: bool = False, scale: float = 1.0, digits: int | None = None) -> str:
    if estimate["low"] is None or estimate["high"] is None:
        return ""
    low, high = (verdict.number(scale * estimate[end], digits, sign) for end in ("low", "high"))
    return f"{low} to {high}"


def _points(estimate: Mapping[str, Any]) -> str:
    return "" if estimate["value"] is None else verdict.number(1e2 * estimate["value"], 0, sign=True)


def _heat(value: float | None) -> str:
    """Background of a standardised change: nothing below 0.2, which is called small (Cohen 1988), full at 2."""
    if value is None or abs(value) < 0.2:
        return ""
    return f"rgba(213, 94, 0, {0.08 + 0.42 * min(1.0, abs(value) / 2):.2f})"
