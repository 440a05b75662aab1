"""A tuning as one HTML page without network or script: the answer, the front, how trials went, what held-out starts said.

Invariant: the page shows numbers of the document and computes none; the same document gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sim.evaluation.analysis.figures import AXIS, BAND, FAINT, INK, LOST, RIVAL, STYLE, uri
from sim.evaluation.analysis.verdict import MINUS
from sim.evaluation.tuning.words import answers, checked_rows, rows
from steer_runtime.directions.files import write_atomically
from steer_runtime.errors import SteerError

FILE = "tuning.html"
Found = Mapping[str, Any]


def render(found: Found, folder: Path) -> Path:
    """Write the page beside the document. Raises SteerError: 'no_jinja2' where jinja2 or matplotlib is missing,
    'not_written'."""
    try:
        import jinja2
        from matplotlib import rc_context
    except ModuleNotFoundError as missing:
        raise SteerError(
            "no_jinja2",
            f"the page needs {missing.name}: install the extra `sim`, or read tuning.json, which holds every number",
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    with rc_context(STYLE):
        ends = [
            {
                "name": end, "direction": its["direction"], "front": _front(found, end), "course": _course(found, end),
                "rows": rows(found, end),
            }
            for end, its in found["ends"].items()
        ]  # fmt: skip
    html = environment.get_template("tuning.html.j2").render(
        d=found, answers=answers(found), ends=ends, checked=checked_rows(found)
    )
    path = folder / FILE
    write_atomically(path, html.encode())
    return path


def _front(found: Found, end: str) -> str:
    """Success and off-axis damage against the effect; the front is of all three."""
    its = found["ends"][end]
    scored = [t for t in its["trials"] if t["outcome"]["score"] and t["outcome"]["score"]["effect"] is not None]
    figure, (above, below) = _figure(2, 1, (9.2, 6.0), sharex=True)
    limits = found["settings"]
    kinds: Sequence[tuple[str, Any, dict[str, Any]]] = (
        ("stopped early", lambda t: t["outcome"]["state"] == "pruned", {"marker": "x", "color": FAINT, "alpha": 0.8}),
        ("passes a limit", lambda t: t["outcome"]["state"] == "complete" and not t["keeps"], {"marker": "o", "edgecolors": LOST, "facecolors": "white"}),
        ("within the limits", lambda t: t["keeps"], {"marker": "o", "color": AXIS}),
    )  # fmt: skip
    for label, of, style in kinds:
        mine = [t for t in scored if of(t)]
        for axis, value in ((above, _success), (below, _damage)):
            shown = [t for t in mine if value(t) is not None]
            axis.scatter([_effect(t) for t in shown], [value(t) for t in shown], s=34, label=label if mine else None, zorder=3, **style)  # fmt: skip
    best_of = sorted((t for t in scored if t["number"] in its["front"]), key=_effect)
    for axis, value in ((above, _success), (below, _damage)):
        points = [(_effect(t), value(t)) for t in best_of if value(t) is not None]
        axis.plot([x for x, _ in points], [y for _, y in points], color=BAND, linewidth=1.1, zorder=2, label="front" if points else None)  # fmt: skip
        for t in best_of:
            if value(t) is not None:
                axis.annotate(str(t["number"]), (_effect(t), value(t)), xytext=(4, 4), textcoords="offset points", fontsize=7.5, color=FAINT)  # fmt: skip
        chosen = [t for t in scored if t["number"] == its["best"]]
        axis.scatter([_effect(t) for t in chosen], [value(t) for t in chosen], s=170, marker="*", color=RIVAL, edgecolors=INK, linewidths=0.6, zorder=5, label="best" if chosen else None)  # fmt: skip
        axis.axvline(0, color=FAINT, linewidth=0.8)
    base = next((t["outcome"]["score"]["unsteered"] for t in scored if t["outcome"]["state"] == "complete"), None)
    if base is not None:
        above.axhline(base, color=FAINT, linewidth=0.8)
        above.axhline(base - limits["margin"], color=LOST, linewidth=1, linestyle=(0, (4, 3)), label=f"{100 * limits['margin']:.0f} points below unsteered")  # fmt: skip
    above.set_ylim(-0.05, 1.08)
    above.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")
    above.set_ylabel("episodes that succeed")
    above.set_title("Success")
    if limits["damage"] is not None:
        below.axhline(limits["damage"], color=LOST, linewidth=1, linestyle=(0, (4, 3)))
    below.set_ylim(bottom=0)
    below.set_ylabel("standard deviations")
    below.set_title("Off-axis damage")
    below.set_xlabel(_wanted(found, its))
    above.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return uri(figure)


def _course(found: Found, end: str) -> str:
    """The effect after each pair, trial by trial, and the effect of trials in their order."""
    its = found["ends"][end]
    figure, (left, right) = _figure(1, 2, (9.2, 2.9))
    for t in its["trials"]:
        if t["effects"]:
            colour = AXIS if t["keeps"] else FAINT if t["outcome"]["state"] == "pruned" else LOST
            best = t["number"] == its["best"]
            x = range(1, len(t["effects"]) + 1)
            left.plot(x, t["effects"], color=RIVAL if best else colour, linewidth=2.2 if best else 1, alpha=1 if best else 0.6, zorder=4 if best else 2)  # fmt: skip
            left.plot(x[-1], t["effects"][-1], "x" if t["outcome"]["state"] == "pruned" else ".", color=RIVAL if best else colour, zorder=4)  # fmt: skip
    left.axhline(0, color=FAINT, linewidth=0.8)
    left.set_xlabel("pairs run (a cross: stopped)")
    left.set_ylabel(found["metric"]["unit"])
    left.set_title("Effect while a trial runs")
    left.xaxis.get_major_locator().set_params(integer=True)
    kept = [t for t in its["trials"] if t["keeps"]]
    other = [t for t in its["trials"] if not t["keeps"] and _effect(t) is not None]
    right.plot([t["number"] for t in other], [t["point"]["strength"] for t in other], "x", color=FAINT, label="others")
    right.plot([t["number"] for t in kept], [t["point"]["strength"] for t in kept], "o", color=AXIS, label="within the limits")  # fmt: skip
    right.set_ylim(0, 1.05)
    right.set_xlabel("trial")
    right.set_title("Strength tried")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return uri(figure)


def _figure(rows_: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows_, columns, **options)
    for axis in axes:
        axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}".replace("-", MINUS))
    return figure, axes


def _wanted(found: Found, its: Found) -> str:
    metric = found["metric"]
    way = "rise" if its["sign"] > 0 else "fall"
    unit = f", {metric['unit']}" if metric["unit"] else ""
    return f"{way} of the {metric['what']}, mean over pairs{unit}"


def _effect(trial: Found) -> Any:
    return (trial["outcome"]["score"] or {}).get("effect")


def _success(trial: Found) -> Any:
    return trial["outcome"]["score"]["success"]


def _damage(trial: Found) -> Any:
    return trial["outcome"]["score"]["damage"]
