"""Does the policy move as its prompt says? Each layout once plain, quickly, slowly and high."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sim.evaluation.episodes import Trial, randomised
from sim.evaluation.statistics import Line, bootstrap, mean_difference, ratio_of_means, share
from sim.layouts import Kind
from sim.wordings import Concept

STYLES: Mapping[str, tuple[Concept, ...]] = {
    "plain": (),
    "quickly": ("fast",),
    "slowly": ("slow",),
    "high": ("high",),
    "careful": ("careful",),
}
"""Condition -> what its prompt says; plain is LIBERO's own instruction."""
PAIRED: tuple[str, ...] = ("plain", "quickly", "slowly", "high")
SPEED_LEAST, SPEED_AIM = 1.8, 2.3
HEIGHT_LEAST, HEIGHT_AIM = 0.08, 0.14


def trials(
    tasks: Sequence[int], layouts: int, seed: int, kind: Kind = "random", styles: Sequence[str] = PAIRED
) -> list[Trial]:
    """Every layout in every style."""
    return [
        replace(t, key=f"{t.key}-{style}", concepts=STYLES[style], condition=style)
        for t in randomised(tasks, layouts, seed, kind)
        for style in styles
    ]


def pairs(
    rows: Sequence[Mapping[str, Any]], one: str, other: str, measure: str, *, successful: bool
) -> list[tuple[float, float]]:
    """Values of a measure in two conditions on the same layout, where both have one (and both succeeded)."""
    found: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if "refused" not in row:
            found.setdefault(row["seed"], {})[row["condition"]] = row
    out = []
    for conditions in found.values():
        if one in conditions and other in conditions:
            a, b = conditions[one], conditions[other]
            if a[measure] is None or b[measure] is None or (successful and not (a["done"] and b["done"])):
                continue
            out.append((float(a[measure]), float(b[measure])))
    return out


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Speed ratio and height difference, over pairs that both succeeded and over all; success by condition."""
    lines: list[Line] = []
    for successful, note in ((True, "both succeeded"), (False, "all pairs")):
        speeds = pairs(rows, "quickly", "slowly", "speed", successful=successful)
        least, aim = (SPEED_LEAST, SPEED_AIM) if successful else (None, None)
        what = f"speed, quickly : slowly ({note})"
        value, low, high = bootstrap(speeds, ratio_of_means) if speeds else (None, None, None)
        lines.append(Line(what, value, low, high, len(speeds), least=least, aim=aim))
    for successful, note in ((True, "both succeeded"), (False, "all pairs")):
        heights = pairs(rows, "high", "plain", "height", successful=successful)
        least, aim = (HEIGHT_LEAST, HEIGHT_AIM) if successful else (None, None)
        what = f"carrying height, high minus plain ({note})"
        value, low, high = bootstrap(heights, mean_difference) if heights else (None, None, None)
        lines.append(Line(what, value, low, high, len(heights), "m", least, aim))
    kept = [row for row in rows if "refused" not in row]
    for style in dict.fromkeys(row["condition"] for row in kept):
        mine = [row for row in kept if row["condition"] == style]
        lines.append(share(f"  success, {style}", sum(row["done"] for row in mine), len(mine)))
        for measure in ("speed", "near_speed", "height"):
            known = [row[measure] for row in mine if row[measure] is not None]
            mean = sum(known) / len(known) if known else None
            unit = "m" if measure == "height" else "m/s"
            lines.append(Line(f"    {measure.replace('_', ' ')}, {style}", mean, n=len(known), unit=unit))
    return lines
