"""Plots of a subject as SVG pictures: how its metric answers to strength, and what success that costs.

Invariant: a picture shows numbers of the document and computes none; the same document gives the same bytes. SVG with
glyphs as shapes prints sharp and looks alike on every machine, and needs no script.
"""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from sim.evaluation.analysis.verdict import DRAWS, MINUS

INK, FAINT, LINE = "#1f2933", "#52606d", "#d5dae0"
AXIS, BAND, RIVAL, OPPOSITE, LOST = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b91c1c"
BANDS = {"random": BAND, "random_words": "#7b5ea7"}
COLOURS = {"direction": AXIS, "prompt": RIVAL, "scale": "#e69f00", "opposite": OPPOSITE}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": FAINT, "ytick.color": FAINT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#edf0f3", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "svg.fonttype": "path", "svg.hashsalt": "steer", "axes.titlesize": 10, "axes.titlelocation": "left",
    "axes.titleweight": "bold", "legend.frameon": False, "legend.fontsize": 8.5, "axes.unicode_minus": True,
}  # fmt: skip
Row = Mapping[str, Any]


def subject(document: Row, subject: Row) -> str:
    """data: URI of an SVG: change over strength above, success below; prompts, scaling and the opposite at the right."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    doses, rivals = subject["doses"], subject["rivals"]
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 6.4), layout="constrained")
        if rivals:
            wide = min(4.6, 0.35 + 0.66 * len(rivals))
            axes = figure.subplots(2, 2, sharey="row", width_ratios=[8.6 - wide, wide])
            left, right = axes[:, 0], axes[:, 1]
        else:
            left, right = figure.subplots(2, 1), None
        _effects(left[0], document, subject, doses)
        _success(left[1], doses)
        for axis in left:
            axis.set_xlabel("strength")
            axis.set_xticks(sorted({0.0, *(d["strength"] for d in doses)}))
            axis.xaxis.set_major_formatter(lambda v, _: f"{v:+g}".replace("-", MINUS) if v else "0")
        left[0].sharex(left[1])
        if right is not None:
            _points(right[0], rivals, lambda d: d["change"])
            right[0].set_title("Rivals")
            _points(right[1], rivals, lambda d: d["success"])
            _margin(right[1], doses or rivals)
            right[0].axhline(0, color=FAINT, linewidth=1)
            for axis in right:
                _names(axis, rivals)
        # Last: room for the legend above everything that is drawn.
        low, high = left[0].get_ylim()
        left[0].set_ylim(low, high + 0.16 * (high - low))
        return uri(figure)


def _effects(axis: Any, document: Row, subject: Row, doses: Sequence[Row]) -> None:
    metric = subject["claim"]["metric"]
    unit, what = document["metrics"][metric]["unit"], document["metrics"][metric]["what"]
    level = document["unsteered"][metric]["value"]
    before = "unsteered" if level is None else f"unsteered: {level:.3g} {unit}".strip()
    axis.axhline(0, color=FAINT, linewidth=1, label=before)
    for kind, draw in DRAWS.items():
        banded = [(d["strength"], band) for d in doses for band in d["bands"] if band["kind"] == kind]
        if not banded:
            continue
        # No strength, no push: the band closes at 0, where it is not measured.
        curve = sorted([(0.0, 0.0), *((at, band["size"]) for at, band in banded)])
        x, size = [s for s, _ in curve], [v for _, v in curve]
        draws = max(band["draws"] for _, band in banded)
        color = BANDS[kind]
        axis.fill_between(x, [-v for v in size], size, color=color, alpha=0.14, linewidth=0, label=f"95 % of {draws} {draw}s")  # fmt: skip
        for at, band in banded:
            axis.plot([at] * len(band["effects"]), band["effects"], ".", color=color, alpha=0.45, markersize=4, zorder=2)  # fmt: skip
    known = [d for d in doses if d["change"]["value"] is not None]
    curve = sorted([(0.0, 0.0), *((d["strength"], d["change"]["value"]) for d in known)])
    axis.plot([s for s, _ in curve], [v for _, v in curve], color=AXIS, linewidth=1.6, label=subject["name"], zorder=3)
    _bars(axis, [d["strength"] for d in known], [d["change"] for d in known], AXIS)
    axis.set_ylabel(f"change, {unit}" if unit else "change")
    axis.set_title(f"Change of {what}")
    axis.legend(loc="upper center", ncols=3, columnspacing=1.2, handletextpad=0.5)


def _success(axis: Any, doses: Sequence[Row]) -> None:
    known = [d for d in doses if d["success"]["value"] is not None]
    _margin(axis, known)
    base = known[0]["baseline"]["value"] if known else None
    curve = sorted(
        [*(((0.0, base),) if base is not None else ()), *((d["strength"], d["success"]["value"]) for d in known)]
    )
    axis.plot([s for s, _ in curve], [v for _, v in curve], color=AXIS, linewidth=1.6)
    _bars(axis, [d["strength"] for d in known], [d["success"] for d in known], AXIS)
    for kind, face, marker, text in (
        ("held", AXIS, "o", "kept within the margin"),
        ("undecided", "white", "o", "not shown either way"),
        ("lost", LOST, "X", "lost by more"),
    ):
        mine = [d for d in known if d["non_inferiority"]["verdict"] == kind]
        if mine:
            axis.plot(
                [d["strength"] for d in mine], [d["success"]["value"] for d in mine], marker, markerfacecolor=face,
                markeredgecolor=LOST if kind == "lost" else AXIS, markersize=7.5, label=text, zorder=5, linewidth=0,
            )  # fmt: skip
    axis.set_ylim(-0.04, 1.06)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axis.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")
    axis.set_ylabel("episodes that succeed")
    axis.set_title("Success")
    axis.legend(loc="best", handletextpad=0.4)


def _margin(axis: Any, doses: Sequence[Row]) -> None:
    """Lines at the success of the unsteered episodes and the margin below."""
    if not doses or doses[0]["baseline"]["value"] is None:
        return
    base, margin = doses[0]["baseline"]["value"], doses[0]["non_inferiority"]["margin"]
    axis.axhline(base, color=FAINT, linewidth=1)
    axis.axhline(
        base - margin,
        color=LOST,
        linewidth=1,
        linestyle=(0, (4, 3)),
        label=f"{100 * margin:.0f} points below unsteered",
    )


def _points(axis: Any, rows: Sequence[Row], of: Any) -> None:
    for kind, colour in COLOURS.items():
        mine = [(i, of(d)) for i, d in enumerate(rows) if d["kind"] == kind and of(d)["value"] is not None]
        _bars(axis, [i for i, _ in mine], [e for _, e in mine], colour)


def _bars(axis: Any, x: Sequence[float], estimates: Sequence[Row], colour: str) -> None:
    """Values with their intervals."""
    if not x:
        return
    values = [e["value"] for e in estimates]
    low = [v - (e["low"] if e["low"] is not None else v) for v, e in zip(values, estimates, strict=True)]
    high = [(e["high"] if e["high"] is not None else v) - v for v, e in zip(values, estimates, strict=True)]
    axis.errorbar(x, values, yerr=[low, high], fmt="o", color=colour, markersize=5, capsize=3, elinewidth=1.3, zorder=4)


def _names(axis: Any, rivals: Sequence[Row]) -> None:
    axis.set_xlim(-0.6, len(rivals) - 0.4)
    axis.set_xticks(range(len(rivals)), [wrapped(d["short"]) for d in rivals], fontsize=8)
    axis.grid(axis="x", visible=False)


def wrapped(text: str, width: int = 10) -> str:
    """At most three lines, of whole words."""
    lines = textwrap.wrap(text, width, break_long_words=False)
    return "\n".join(lines[:3]) + ("…" if len(lines) > 3 else "")


def uri(figure: Any) -> str:
    """data: URI of a figure, as an SVG."""
    sink = io.BytesIO()
    figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(sink.getvalue()).decode()
