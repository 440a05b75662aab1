"""A recorded episode as one HTML file that needs nothing else: no network, no files beside it.

Invariant: everything shown is computed from the record; what was not measured is said to be missing.
"""

from __future__ import annotations

import base64
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from sim import video
from sim.episode import ACTION_NAMES, RATE_HZ, CommandOutcome, EpisodeRecord

BIN_DIMS = (0, 1, 2, 6)
"""Action dimensions whose bin probabilities are drawn: the three translations and the gripper."""
BIN_GROUP = 4
"""Neighbouring bins summed for drawing: 64 columns instead of 256, each wide enough to see."""
OFF_COLOR = "#7b8794"
KINDS = {"neurons": "layer", "dense": "residual site"}
_FONT = {"family": "system-ui, sans-serif", "size": 13, "color": "#1f2933"}


@dataclass(frozen=True)
class LatencyRow:
    """Milliseconds from publishing a command to each stage; None where the stage did not happen."""

    label: str
    verdict: float | None
    latched: float | None
    action: float | None
    executed: float | None
    inferences: int | None


@dataclass(frozen=True)
class DifferenceRow:
    """How one condition differs from steering off on the same observations.

    means [7]: mean action minus mean action without steering. changed: share of action tokens that differ.
    variation: mean total variation distance of the bin probabilities, 0 (equal) to 1 (disjoint). Both mean nothing where
    actions are no tokens. said: words with counts.
    """

    condition: str
    means: tuple[float, ...]
    changed: float
    variation: float
    said: str


@dataclass(frozen=True)
class StretchRow:
    """The episode between two commands. first, last: control steps, from 1. speed: of the hand, mean, m/s, None when only
    one frame shows it. said: words with counts."""

    since: str
    first: int
    last: int
    speed: float | None
    said: str


def render(record: EpisodeRecord, path: Path) -> Path:
    """Write the report of a record to `path` (its folder is made if needed) and return it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        facts=record.facts,
        steps=record.steps,
        inferences=record.inferences,
        video_pace=video.frame_rate(record) * record.steps / (RATE_HZ * max(1, record.inferences)),
        stretches=stretches(record),
        off_said=counted(record.facts.condition_said[0]) if record.facts.condition_said else "",
        faults=record.faults,
        video=base64.b64encode(video.encode(record)).decode(),
        poster=base64.b64encode(video.poster(record)).decode(),
        plotly=get_plotlyjs(),
        timeline=_div(timeline(record), "timeline"),
        actions=_div(action_figure(record), "actions") if record.facts.conditions else "",
        bins=_div(bin_figure(record), "bins") if record.facts.conditions and len(record.bin_values) else "",
        observations=len(record.replayed),
        differences=differences(record),
        latencies=latencies(record.facts.commands),
        medians=median_row(latencies(record.facts.commands)),
        trace=[_trace_row(t) for t in record.facts.trace],
        untraced=sorted({int(i) for i in record.inference} - {int(t["inference_id"]) for t in record.facts.trace}),
        action_names=ACTION_NAMES,
        age_ms=float(np.median(record.age_s) * 1e3) if record.inferences else 0.0,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".html", delete=False, encoding="utf-8") as file:
        file.write(html)
    Path(file.name).chmod(0o644)
    os.replace(file.name, path)
    return path


def latencies(commands: Sequence[CommandOutcome]) -> list[LatencyRow]:
    """One row a command, times counted from its publishing."""

    def since(command: CommandOutcome, moment: int | None) -> float | None:
        return None if moment is None else (moment - command.published_ns) / 1e6

    return [
        LatencyRow(
            c.label,
            since(c, c.verdict_ns),
            since(c, c.latched_ns),
            since(c, c.action_ns),
            since(c, c.executed_ns),
            c.inferences,
        )
        for c in commands
    ]


def median_row(rows: Sequence[LatencyRow]) -> LatencyRow:
    """Medians over the commands that reached each stage."""

    def median(values: Sequence[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return float(np.median(known)) if known else None

    inferences = median([r.inferences for r in rows])
    return LatencyRow(
        "median",
        median([r.verdict for r in rows]),
        median([r.latched for r in rows]),
        median([r.action for r in rows]),
        median([r.executed for r in rows]),
        None if inferences is None else round(inferences),
    )


def differences(record: EpisodeRecord) -> list[DifferenceRow]:
    """Each condition against the first one (steering off), on identical observations."""
    if not record.facts.conditions:
        return []
    off_actions, off_tokens, off_bins = record.actions[0], record.tokens[0], record.bins[0]
    return [
        DifferenceRow(
            name,
            tuple(float(v) for v in (record.actions[i] - off_actions).mean(axis=0)),
            float((record.tokens[i] != off_tokens).mean()),
            # Total variation distance: half the L1 distance of two distributions.
            float(0.5 * np.abs(record.bins[i] - off_bins).sum(axis=-1).mean()),
            counted(record.facts.condition_said[i]) if record.facts.condition_said else "",
        )
        for i, name in enumerate(record.facts.conditions)
        if i > 0
    ]


def stretches(record: EpisodeRecord) -> list[StretchRow]:
    """What hand and words did from each applied command until the next one took effect."""
    if not record.inferences:
        return []
    applied = [c for c in record.facts.commands if c.accepted and c.first_step is not None]
    begins = [("start", 0)] + [(c.label, int(c.first_step or 0)) for c in applied]
    ends = [step for _, step in begins[1:]] + [record.steps]
    out = []
    for (label, begin), end in zip(begins, ends, strict=True):
        inside = np.flatnonzero((record.step >= begin) & (record.step < end))
        if not len(inside):
            continue
        # A pair of frames belongs to the stretch that made the actions between them.
        pairs = inside[inside < len(record.speed)]
        lasted = np.diff(record.step)[pairs]
        speed = float(np.average(record.speed[pairs], weights=lasted)) if len(pairs) else None
        words = counted([record.facts.said[i] for i in inside]) if record.facts.said else ""
        out.append(StretchRow(label, begin + 1, end, speed, words))
    return out


def counted(said: Sequence[Sequence[str]]) -> str:
    """Words of several inferences, a slot after the other, each with how often it was said."""
    slots = [Counter(words).most_common() for words in zip(*said, strict=True)]
    return "; ".join(", ".join(f"{word} {n}" for word, n in slot) for slot in slots)


def timeline(record: EpisodeRecord) -> go.Figure:
    """Strengths, the hand's speed, action components, and a mark for each command; x is the control step."""
    x = np.arange(1, record.steps + 1)
    titles = ("strength of each direction", "speed of the hand, m/s", "translation of the action", "rotation of the action", "gripper")  # fmt: skip
    figure = make_subplots(
        rows=5, cols=1, shared_xaxes=True, vertical_spacing=0.055, row_heights=[0.26, 0.2, 0.22, 0.18, 0.14],
        subplot_titles=titles,
    )  # fmt: skip
    # A strength holds from its inference on, to the end of the episode for the last one.
    starts = np.append(record.step + 1, record.steps + 1)
    for index, (name, values) in enumerate(record.strengths.items()):
        if values.any():
            line = {"shape": "hv", "width": 2.5, "color": video.color_of(index)}
            held = np.append(values, values[-1])
            figure.add_scatter(x=starts, y=held, name=name, line=line, mode="lines", legend="legend", row=1, col=1)
    # Up to the last frame: what comes after it was not seen.
    figure.add_scatter(
        x=record.step + 1, y=np.append(record.speed, record.speed[-1:]), name="hand", mode="lines",
        line={"shape": "hv", "width": 2, "color": video.INK}, text=[video.says(words) for words in record.facts.said],
        showlegend=False, row=2, col=1,
    )  # fmt: skip
    for dim, name in enumerate(ACTION_NAMES):
        row, legend = (3, "legend2") if dim < 3 else (4, "legend3") if dim < 6 else (5, "legend4")
        line = {"width": 1.5, "color": video.color_of(dim % 3 if dim < 6 else 6)}
        figure.add_scatter(
            x=x, y=record.action[:, dim], name=name, line=line, mode="lines", legend=legend, row=row, col=1
        )
    for number, command in enumerate(record.facts.commands, start=1):
        at = command.step + 1 if command.first_step is None else command.first_step + 1
        color = "#7b8794" if command.accepted else "#b91c1c"
        figure.add_vline(x=at, line={"dash": "dot", "width": 1, "color": color})
        figure.add_annotation(
            x=at, y=1.0, yref="y domain", yanchor="bottom", yshift=1, text=f"<b>{number}</b>", showarrow=False,
            hovertext=command.label, font={"size": 11, "color": color},
        )  # fmt: skip
    figure.update_yaxes(range=[-0.04, 1.08], row=1, col=1)
    figure.update_yaxes(rangemode="tozero", row=2, col=1)
    figure.update_xaxes(title_text="control step", row=5, col=1)
    places = {"legend": 1.0, "legend2": 0.53, "legend3": 0.305, "legend4": 0.11}
    figure.update_layout(
        height=960, showlegend=True, **{k: {"y": y, "yanchor": "top", "x": 1.01} for k, y in places.items()}
    )
    for annotation in figure.layout.annotations[: len(titles)]:
        annotation.update(x=0, xanchor="left", yshift=14, font={"size": 13, "color": "#52606d"})
    return _styled(figure)


def action_figure(record: EpisodeRecord) -> go.Figure:
    """Un-normalised actions on the same observations: a panel a dimension, a column a condition, bars for means."""
    figure = make_subplots(rows=1, cols=7, subplot_titles=ACTION_NAMES, horizontal_spacing=0.035)
    colors = condition_colors(record)
    spread = np.linspace(-0.28, 0.28, record.actions.shape[1]) if record.actions.shape[1] > 1 else np.zeros(1)
    for index, name in enumerate(record.facts.conditions):
        for dim in range(7):
            values = record.actions[index, :, dim]
            dots = {"color": colors[index], "size": 5, "opacity": 0.75}
            bar = {"symbol": "line-ew", "size": 17, "line": {"width": 3, "color": colors[index]}}
            shared = {"name": name, "legendgroup": name, "mode": "markers"}
            figure.add_scatter(
                x=index + spread, y=values, marker=dots, showlegend=dim == 0, row=1, col=dim + 1, **shared
            )
            figure.add_scatter(x=[index], y=[values.mean()], marker=bar, showlegend=False, row=1, col=dim + 1, **shared)
    figure.update_xaxes(showticklabels=False, showgrid=False, zeroline=False)
    figure.update_yaxes(tickfont={"size": 10})
    figure.update_layout(height=320, legend={"orientation": "h", "y": -0.06, "x": 0})
    return _styled(figure)


def bin_figure(record: EpisodeRecord) -> go.Figure:
    """Mean probability of the action bins, in groups of BIN_GROUP: a row a condition, a column a dimension.

    The grey area, the same in every row, is steering off.
    """
    conditions, colors = record.facts.conditions, condition_colors(record)
    rows = max(1, len(conditions) - 1)
    figure = make_subplots(
        rows=rows, cols=len(BIN_DIMS), shared_xaxes=True, vertical_spacing=0.05, horizontal_spacing=0.04,
        column_titles=[ACTION_NAMES[d] for d in BIN_DIMS],
    )  # fmt: skip
    starts = np.arange(0, len(record.bin_values), BIN_GROUP)
    means = np.add.reduceat(record.bins.mean(axis=1), starts, axis=-1)
    centres = np.array([record.bin_values[s : s + BIN_GROUP].mean() for s in starts])
    for row in range(1, rows + 1):
        for col, dim in enumerate(BIN_DIMS, start=1):
            for index in dict.fromkeys((0, min(row, len(conditions) - 1))):
                figure.add_scatter(
                    x=centres, y=means[index, dim], name=conditions[index], legendgroup=conditions[index],
                    showlegend=col == 1 and (row == 1 or index > 0), mode="lines", fill="tozeroy",
                    fillcolor=_faded(colors[index], 0.4 if index == 0 else 0.15),
                    line={"width": 1.6 if index else 0.8, "color": colors[index], "shape": "hvh"}, row=row, col=col,
                )  # fmt: skip
    figure.update_xaxes(title_text="bin (normalised action)", row=rows)
    figure.update_yaxes(rangemode="tozero", tickfont={"size": 10}, nticks=4)
    figure.update_layout(height=130 * rows + 110, legend={"orientation": "h", "y": -60 / (130 * rows), "x": 0})
    return _styled(figure)


def condition_colors(record: EpisodeRecord) -> list[str]:
    """A colour a condition: grey for off, and that of the direction which the condition's target commands."""
    index_of = {direction.id: i for i, direction in enumerate(record.facts.directions)}
    direction_of = {
        f"{c.target} {c.applied_strength:+g}": c.direction_id for c in record.facts.commands if c.op == "set"
    }
    return [
        OFF_COLOR if i == 0 else video.color_of(index_of.get(direction_of.get(name, ""), len(index_of) + i))
        for i, name in enumerate(record.facts.conditions)
    ]


def _faded(color: str, alpha: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _styled(figure: go.Figure) -> go.Figure:
    return figure.update_layout(template="plotly_white", font=_FONT, margin={"l": 48, "r": 16, "t": 36, "b": 40})


def _div(figure: go.Figure, name: str) -> str:
    return figure.to_html(
        full_html=False, include_plotlyjs=False, include_mathjax=False, div_id=name,
        config={"displayModeBar": False, "responsive": True},
    )  # fmt: skip


def _trace_row(trace: Any) -> dict[str, Any]:
    """One line of the trace table."""
    sites = [
        f"{s['tower']} {KINDS[s['kind']]} {s['layer']}"
        + (f": {', '.join(map(str, s['neurons']))}" if s["neurons"] else ": dense")
        for s in trace.get("sites", ())
    ]
    kinds = Counter(s["kind"] for s in trace.get("sites", ()))
    return {
        "inference": trace["inference_id"],
        "sequence": trace["steering"]["sequence"],
        "strengths": [f"{name.split('@')[0]} {value:.2f}" for name, value in trace.get("strengths", {}).items()],
        "summary": ", ".join(f"{n} {KINDS[kind]}{'s' * (n > 1)}" for kind, n in kinds.items()) or "none",
        "sites": sites,
        "tokens": ", ".join(f"{role} {count}" for role, count in trace.get("tokens", {}).items() if count),
        "writes": sum(s["writes"] for s in trace.get("sites", ())),
        "firings": f"{trace['firings']} / {trace['expected_firings']}",
    }
