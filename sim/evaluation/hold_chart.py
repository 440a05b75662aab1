"""Strength and measured quantity against time, and the stair between them, as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sim.evaluation.hold import HoldCondition
from sim.video import color_of
from steer_runtime.setpoint.target import Target

_LAYOUTS = 3
"""Layouts that are drawn, the first ones."""


def draw_hold(
    rows: Sequence[Mapping[str, Any]],
    conditions: Sequence[HoldCondition],
    target: Target,
    steps: Mapping[str, Mapping[str, int]],
    title: str,
    out: Path,
) -> Path:
    """Write the page. conditions: those to draw, one colour each. steps: of `hold_measures.stair`."""
    from plotly.subplots import make_subplots

    size = target.quantity.units[target.unit]
    drawn = [c.key for c in conditions]
    scored = [row for row in rows if "refused" not in row and row["condition"] in drawn]
    seeds = list(dict.fromkeys(row["seed"] for row in scored))[:_LAYOUTS]
    titles = [
        f"layout {i + 1}: {what}"
        for i in range(len(seeds))
        for what in (f"{target.quantity.name}, {target.unit}", "strength")
    ]
    words = list(dict.fromkeys(word for counts in steps.values() for word in counts))
    height = 2 * len(seeds) + 1
    figure = make_subplots(
        rows=height,
        cols=1,
        subplot_titles=[*titles, "what the policy says first, share by strength"],
        vertical_spacing=0.05,
    )
    for row in scored:
        if row["seed"] not in seeds:
            continue
        place = 2 * seeds.index(row["seed"]) + 1
        trace, key = row["trace"], row["condition"]
        shown = [None if v is None else v / size for v in trace["value"]]
        common = {
            "x": trace["t"], "name": key, "legendgroup": key, "line": {"color": color_of(drawn.index(key)), "width": 1.6},
        }  # fmt: skip
        figure.add_scatter(y=shown, showlegend=place == 1, row=place, col=1, **common)
        common["line"] = {**common["line"], "shape": "hv"}
        figure.add_scatter(y=trace["strength"], showlegend=False, row=place + 1, col=1, **common)
    for index in range(len(seeds)):
        line = {"color": "#1f2933", "width": 1, "dash": "dash"}
        figure.add_hline(y=target.value / size, line=line, row=2 * index + 1, col=1)
        figure.update_xaxes(ticksuffix=" s", row=2 * index + 1, col=1)
        figure.update_xaxes(ticksuffix=" s", row=2 * index + 2, col=1)
    for index, word in enumerate(words):
        x = [float(middle) for middle in steps]
        share = [counts.get(word, 0) / sum(counts.values()) for counts in steps.values()]
        figure.add_bar(
            x=x, y=share, name=word or "nothing", marker_color=color_of(index), legend="legend2", row=height, col=1
        )  # fmt: skip
    figure.update_yaxes(tickformat=".0%", row=height, col=1)
    figure.update_layout(
        barmode="stack", height=230 * height, title=title, template="plotly_white", margin={"t": 90, "b": 50},
        legend={"orientation": "v"}, legend2={"y": 0.02, "yanchor": "bottom", "title": "says"},
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(str(out), include_plotlyjs=True)
    return out
