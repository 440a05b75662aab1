"""From steered and unsteered measurements to a verdict: effect against strength, beside random directions.

Rules. Effect: mean over pairs (one moment or one layout) of steered minus unsteered. Two thresholds at a signed strength,
each over the random draws of a kind there: the 95th percentile of the size of their effects, whatever its sign (a random
direction that pushes the wrong way counts as much as one that pushes the right way), and the 95th percentile of their
effects in the direction that the axis's words name (one that lifts says nothing against an axis that lowers). An axis
works at a strength when its effect, in the direction its words name, is beyond the thresholds of every kind of random
draw; both readings are told, and the stricter one, of sizes, is what `beyond` means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sim.evaluation.axis import OFF
from sim.evaluation.statistics import Line, bootstrap, mean_difference
from sim.intervals import wilson

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Dose:
    """The axis at one strength. mean: of the measure; effect: paired difference to unsteered, low, high: its 95 % interval
    (bootstrap over pairs). random: kind of draw -> 95th percentile of the size of the effects of its draws; directed: the
    same of their effects in the wanted direction (negative where all draws push the other way); draws: how many those are.

    beyond, beyond_directed: effect in the wanted direction and larger than every threshold of either kind. success: share,
    of n closed-loop episodes.
    """

    strength: float
    mean: float
    effect: float
    low: float
    high: float
    pairs: int
    random: Mapping[str, float]
    directed: Mapping[str, float]
    draws: Mapping[str, int]
    beyond: bool
    beyond_directed: bool
    success: float | None
    n: int


@dataclass(frozen=True)
class Response:
    """All doses of one measure. unsteered: its mean. rho: Spearman's correlation of strength and mean, unsteered included
    as 0, times the wanted sign; below 1 where doses do alike. baseline: success of the unsteered policy, of so many episodes.
    """

    measure: str
    sign: float
    unsteered: float
    doses: tuple[Dose, ...]
    rho: float
    baseline: float | None
    episodes: int

    @property
    def monotone(self) -> bool:
        """No dose undoes what a smaller one did; a policy that acts by words climbs a stair, so equals are allowed."""
        curve = sorted([(0.0, self.unsteered), *((d.strength, d.mean) for d in self.doses)])
        means = [self.sign * mean for _, mean in curve]
        return means[-1] > means[0] and all(b >= a for a, b in pairwise(means))

    @property
    def works(self) -> bool:
        """Beyond random in both directions at some strength."""
        return any(d.beyond for d in self.doses if d.strength > 0) and any(
            d.beyond for d in self.doses if d.strength < 0
        )

    @property
    def safe(self) -> bool | None:
        """Some strength works and keeps success within 10 points; None without episodes."""
        if self.baseline is None:
            return None
        return any(d.beyond and d.success is not None and d.success >= self.baseline - 0.10 for d in self.doses)


def respond(rows: Sequence[Row], axis: str, measure: str, sign: float) -> Response | None:
    """The dose-response of one measure; None when nothing was measured. rows: see `axis.run_offline`, `closed_rows`."""
    from scipy.stats import spearmanr

    table: dict[tuple[str, float], dict[Any, float]] = {}
    done: dict[tuple[str, float], list[float]] = {}
    kinds: dict[str, str] = {}
    for row in rows:
        key = (row["draw"], row["strength"])
        kinds[row["draw"]] = row["kind"]
        if "done" in row:
            done.setdefault(key, []).append(row["done"])
        if row.get(measure) is not None:
            table.setdefault(key, {})[row["pair"]] = float(row[measure])
    still = table.get((OFF, 0.0), {})
    strengths = sorted(s for draw, s in table if draw == axis)
    if not still or not strengths:
        return None

    def pairs(draw: str, strength: float) -> list[tuple[float, float]]:
        steered = table.get((draw, strength), {})
        return [(steered[pair], still[pair]) for pair in steered if pair in still]

    doses = []
    for strength in strengths:
        mine = pairs(axis, strength)
        if not mine:
            continue
        effect, low, high = bootstrap(mine, mean_difference)
        towards = sign * float(np.sign(strength))
        effects: dict[str, list[float]] = {}
        for draw, kind in kinds.items():
            if draw not in (OFF, axis) and (theirs := pairs(draw, strength)):
                effects.setdefault(kind, []).append(towards * float(np.mean([a - b for a, b in theirs])))
        random = {kind: float(np.quantile(np.abs(values), 0.95)) for kind, values in effects.items()}
        directed = {kind: float(np.quantile(values, 0.95)) for kind, values in effects.items()}
        wanted = effect * towards
        ended = done.get((axis, strength), [])
        doses.append(
            Dose(
                strength=strength,
                mean=float(np.mean([a for a, _ in mine])),
                effect=effect,
                low=low,
                high=high,
                pairs=len(mine),
                random=random,
                directed=directed,
                draws={kind: len(values) for kind, values in effects.items()},
                beyond=bool(random) and wanted > max(random.values()),
                # An effect the wrong way is never one of the axis, however far random draws push.
                beyond_directed=bool(directed) and wanted > max(0.0, *directed.values()),
                success=float(np.mean(ended)) if ended else None,
                n=len(ended),
            )
        )
    if not doses:
        return None
    unsteered = float(np.mean(list(still.values())))
    curve = [(0.0, unsteered), *((d.strength, d.mean) for d in doses)]
    means = [mean for _, mean in curve]
    # A flat curve has no order.
    rho = float(spearmanr([s for s, _ in curve], means).statistic) * sign if len(set(means)) > 1 else 0.0
    ended = done.get((OFF, 0.0), [])
    return Response(measure, sign, unsteered, tuple(doses), rho, float(np.mean(ended)) if ended else None, len(ended))


def summarise(responses: Sequence[Response]) -> list[Line]:
    """The verdict on each measure and its doses as lines."""
    lines = []
    for r in responses:
        for ends, name in ((1.0, "up"), (-1.0, "down")):
            mine = [d for d in r.doses if d.strength * ends > 0]
            tested = [d for d in mine if d.random]
            lines.append(
                Line(
                    f"{r.measure}: strengths beyond random, {name}",
                    sum(d.beyond for d in tested),
                    n=len(tested),
                    least=1,
                )
            )
            held = sum(d.beyond_directed for d in tested)
            lines.append(Line("  the same, against random effects that way alone", held, n=len(tested), least=1))
        lines.append(
            Line("  monotone (no dose undoes a smaller one)", float(r.monotone), n=len(r.doses) + 1, least=1.0)
        )
        lines.append(Line("  Spearman's rho", r.rho, n=len(r.doses) + 1))
        lines.append(Line("  unsteered", r.unsteered, n=r.doses[0].pairs))
        for d in r.doses:
            lines.append(Line(f"  {d.strength:+g}: effect", d.effect, d.low, d.high, d.pairs))
            for kind, size in d.random.items():
                lines.append(Line(f"    95 % of {kind}, size", size, n=d.draws[kind]))
                lines.append(Line(f"    95 % of {kind}, this way", d.directed[kind], n=d.draws[kind]))
            if d.success is not None:
                low, high = wilson(round(d.success * d.n), d.n)
                lines.append(Line("    success", d.success, low, high, d.n, "%"))
        if r.baseline is not None:
            lines.append(Line("  success, unsteered", r.baseline, n=r.episodes, unit="%"))
            lines.append(Line("  some strength works and keeps success within 10 points", float(bool(r.safe))))
    return lines


def draw_chart(responses: Sequence[Response], title: str, out: Path) -> Path:
    """HTML page: a panel a measure, the axis with its intervals over strength, and the band of each kind of random draw."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=len(responses), cols=1, subplot_titles=[r.measure for r in responses])
    for row, r in enumerate(responses, start=1):
        x = [d.strength for d in r.doses]
        for kind in dict.fromkeys(k for d in r.doses for k in d.random):
            known = [d for d in r.doses if kind in d.random]
            for side in (1.0, -1.0):
                figure.add_scatter(
                    x=[d.strength for d in known], y=[r.unsteered + side * d.random[kind] for d in known],
                    name=f"{kind}, 95 %", legendgroup=kind, showlegend=row == 1 and side > 0,
                    line={"dash": "dot", "color": _COLOURS.get(kind, "#7b8794")}, row=row, col=1,
                )  # fmt: skip
        error = {
            "symmetric": False,
            "array": [d.high - d.effect for d in r.doses],
            "arrayminus": [d.effect - d.low for d in r.doses],
        }
        figure.add_scatter(
            x=x, y=[r.unsteered + d.effect for d in r.doses], error_y=error, name="axis", legendgroup="axis",
            showlegend=row == 1, line={"color": "#0072b2"}, row=row, col=1,
        )  # fmt: skip
        figure.add_hline(y=r.unsteered, line={"width": 1, "color": "#7b8794"}, row=row, col=1)
    figure.update_xaxes(title_text="strength", row=len(responses), col=1)
    figure.update_layout(height=340 * len(responses), title=title, template="plotly_white")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(str(out), include_plotlyjs=True)
    return out


_COLOURS = {"random neurons": "#d55e00", "gaussian": "#e69f00", "random words": "#cc79a7"}
