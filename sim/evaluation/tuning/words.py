"""A tuning in words: tables and sentences that the command line and the page share.

Invariant: every number comes from the document; what is not known is a dash, and an unverified range is called that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sim.evaluation.analysis.metrics import METRICS
from sim.evaluation.analysis.verdict import DASH, number, percent
from sim.evaluation.tuning.write_back import SUFFIX

Found = Mapping[str, Any]
_NAMES = {"gain": "gain", "neurons": "neurons", "layers": "layers", "sites": "sites", "span": "on", "ramp_s": "ramp"}


def point(values: Found) -> str:
    """ "strength 0.42, gain 1.3, layers 3 4, on image text"."""
    parts = [f"strength {values['strength']:.3g}"]
    for key, name in _NAMES.items():
        if key in values:
            value = values[key]
            shown = " ".join(map(str, value)) if isinstance(value, list) else f"{value:.3g}"
            parts.append(f"{name} {shown}{' s' * (key == 'ramp_s')}")
    return ", ".join(parts)


def rows(found: Found, end: str, most: int | None = None) -> list[dict[str, str]]:
    """Trials, the largest effect within the limits first."""
    its = found["ends"][end]
    unit = found["metric"]["unit"]
    ordered = sorted(its["trials"], key=_order)
    out = []
    for trial in ordered if most is None else ordered[:most]:
        outcome = trial["outcome"]
        score = outcome["score"] or {}
        marks = ["best"] * (trial["number"] == its["best"]) + ["front"] * (trial["number"] in its["front"])
        why = outcome["why"] or ("" if trial["keeps"] or outcome["state"] == "running" else _passed(found, score))
        out.append(
            {
                "trial": f"{trial['number']}{' ' * bool(marks)}{', '.join(marks)}",
                "choice": point(trial["point"]),
                f"effect {unit}".strip(): number(score.get("effect"), sign=True),
                "success": percent(score.get("success")),
                "unsteered": percent(score.get("unsteered")),
                "damage": number(score.get("damage")),
                "pairs": str(score.get("pairs", DASH)),
                "state": outcome["state"],
                "why": why,
            }
        )
    return out


def checked_rows(found: Found) -> list[dict[str, str]]:
    """Held-out strengths."""
    unit = found["metric"]["unit"]
    out = []
    for c in (found["held_out"] or {}).get("checked", ()):
        out.append(
            {
                "end": c["end"],
                "strength": f"{c['strength']:.3g}",
                f"change {unit}".strip(): _with_interval(c["change"]),
                "success, %": _with_interval(c["success"], 100.0),
                "unsteered, %": _with_interval(c["unsteered"], 100.0),
                "difference, points": _with_interval(c["difference"], 100.0, sign=True),
                "damage": number(c["damage"]),
                "pairs": str(c["success"]["n"]),
                "verified": "yes" if not c["fails"] else "no: " + "; ".join(c["fails"]),
            }
        )
    return out


def answers(found: Found) -> list[str]:
    """One sentence an end."""
    out = []
    metric = found["metric"]
    for end, its in found["ends"].items():
        wanted = "raise" if its["sign"] > 0 else "lower"
        counts = _counts(its)
        if its["best"] is None:
            out.append(
                f"{its['direction']}: no trial of {counts} was seen to {wanted} the {metric['what']} within the limits."
            )
            continue
        best = next(t for t in its["trials"] if t["number"] == its["best"])
        score = best["outcome"]["score"]
        change = score["effect"] * its["sign"]
        text = (
            f"{its['direction']}: trial {best['number']} of {counts} ({point(best['point'])}) changes the {metric['what']} by "
            f"{number(change, sign=True)} {metric['unit']} on {score['pairs']} starts, success {percent(score['success'])} "
            f"against {percent(score['unsteered'])}"
        )
        out.append(f"{text}; {_verdict(found, end)}.")
    return out


def _verdict(found: Found, end: str) -> str:
    held = found["held_out"]
    if held is None or end not in held["ranges"]:
        return "not checked on held-out starts yet"
    low, high = held["ranges"][end]["strengths"]
    span = f"strengths {low:.3g} to {high:.3g}"
    if held["ranges"][end]["verified"]:
        return f"{span} are verified on held-out starts"
    fails = sorted({why for c in held["checked"] if c["end"] == end for why in c["fails"]})
    name = found["ends"][end]["direction"].split("@")[0]
    mine = [id for id in held["written"] if id.split("@")[0] in (name, name + SUFFIX)]
    written = " and were written all the same" if mine else ""
    return f"{span} are not verified{': ' if fails else ''}{', '.join(fails)}{written}"


def _counts(its: Found) -> str:
    states = [t["outcome"]["state"] for t in its["trials"]]
    other = [f"{states.count(s)} {s}" for s in ("pruned", "errored", "running") if s in states]
    return f"{len(states)}{' (' + ', '.join(other) + ')' if other else ''}"


def _order(trial: Found) -> tuple[int, float, int]:
    score = trial["outcome"]["score"]
    effect = (score or {}).get("effect")
    rank = 0 if trial["keeps"] else {"complete": 1, "pruned": 2, "errored": 3}.get(trial["outcome"]["state"], 4)
    return rank, -(effect if effect is not None else 0.0), trial["number"]


def _passed(found: Found, score: Found) -> str:
    limits = found["settings"]
    out = []
    if score and score["loss"] > limits["margin"] + 1e-9:
        out.append(f"loses {percent(score['loss'])} of success")
    if score and limits["damage"] is not None and (score["damage"] or 0.0) > limits["damage"]:
        out.append(f"moves other things by more than {limits['damage']:g}{_most(score.get('aside') or {})}")
    return "; ".join(out)


def _most(aside: Mapping[str, float]) -> str:
    """Which metric moved most besides, in standard deviations."""
    if not aside:
        return ""
    name = max(aside, key=lambda metric: abs(aside[metric]))
    return f": most of all {METRICS[name].what}, {number(aside[name], sign=True)}"


def _with_interval(e: Found, scale: float = 1.0, sign: bool = False) -> str:
    if e["value"] is None:
        return DASH
    digits = 0 if scale == 100.0 else None
    text = number(scale * e["value"], digits, sign)
    if e["low"] is None:
        return text
    return f"{text} ({number(scale * e['low'], digits, sign)} to {number(scale * e['high'], digits, sign)})"
