"""Shares and means with their intervals, and the lines of the reach table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sim.demonstrations import write_atomically
from sim.intervals import wilson
from steer_runtime.errors import SteerError

DRAWS = 10_000
"""Resamples of a bootstrap interval."""


@dataclass(frozen=True)
class Line:
    """One measured quantity. low, high: 95 % interval, None where none is known. n: episodes, pairs or samples behind it.

    least, aim: what the project set out to reach, None for a quantity without a target. unit: "%" shows shares.
    """

    what: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    unit: str = ""
    least: float | None = None
    aim: float | None = None

    def shown(self) -> tuple[str, str, str, str, str, str]:
        """what, value, interval, n, least, aim as text."""
        interval = "" if self.low is None or self.high is None else f"{self._text(self.low)} to {self._text(self.high)}"
        value = f"{self._text(self.value)} {self.unit if self.unit != '%' else ''}".strip()
        return self.what, value, interval, str(self.n), self._text(self.least), self._text(self.aim)

    def _text(self, value: float | None) -> str:
        if value is None:
            return ""
        if self.unit == "%":
            return f"{value:.1%}"
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def share(what: str, hits: int, n: int, *, least: float | None = None, aim: float | None = None) -> Line:
    """A share of n with Wilson's 95 % interval; value None for n = 0."""
    if n == 0:
        return Line(what, None, n=0, unit="%", least=least, aim=aim)
    low, high = wilson(hits, n)
    return Line(what, hits / n, low, high, n, "%", least, aim)


def bootstrap(
    pairs: Sequence[tuple[float, float]],
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(value, low, high): the statistic of paired samples and its 95 % percentile interval, pairs resampled together.

    statistic: arrays [..., n], [..., n] -> [...]. pairs: at least one; one pair has no interval (low = high = value).
    """
    one, other = np.array(pairs, dtype=np.float64).T
    drawn = np.random.default_rng(seed).integers(len(pairs), size=(DRAWS, len(pairs)))
    spread = statistic(one[drawn], other[drawn])
    low, high = np.quantile(spread, [0.025, 0.975])
    return float(statistic(one, other)), float(low), float(high)


def ratio_of_means(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean of the first over mean of the second, along the last axis."""
    return np.asarray(one.mean(-1) / other.mean(-1))


def mean_difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean of first minus second, along the last axis."""
    return np.asarray((one - other).mean(-1))


def summary_path(results: Path) -> Path:
    """Where the summary of a results file stands."""
    return results.with_suffix(".summary.json")


def write_summary(
    results: Path, configuration: Mapping[str, Any], lines: Sequence[Line], rows: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """Write lines, configuration and the hours that the episodes took, beside the results file."""
    hours = sum(float(row.get("seconds", 0.0)) for row in rows) / 3600
    content = {"configuration": configuration, "hours": round(hours, 3), "lines": [asdict(line) for line in lines]}
    path = summary_path(results)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def read_summary(path: Path) -> tuple[str, float, list[Line]]:
    """(policy, hours, lines) of a summary. Raises SteerError('bad_summary')."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        lines = [Line(**line) for line in content["lines"]]
        return str(content["configuration"]["policy"]["name"]), float(content["hours"]), lines
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SteerError(
            "bad_summary", f"{path} is no summary of `steer eval` ({error}); give files that end in .summary.json"
        ) from None
