"""The log of a run: one JSON object a line, from which learning curves are drawn.

Invariant: steps ascend; a run resumed from step s drops what was logged after s, since it will be computed again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from sim.demonstrations import write_atomically
from steer_runtime.errors import SteerError

Row = Mapping[str, Any]
_COLUMNS = 3


class Log:
    """Appends rows {"step": int, name: number, ...} to a file and flushes each."""

    def __init__(self, path: Path, *, resumed_at: int) -> None:
        self._path = path
        kept = [row for row in read_log(path) if row["step"] <= resumed_at] if path.exists() else []
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def add(self, row: Row) -> None:
        """Raises SteerError('disk_full')."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise SteerError(
                "disk_full",
                f"{self._path} cannot be written ({error.strerror}); the last checkpoint is safe: free some space and run "
                "the same command again",
            ) from None


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole rows; a last line that broke off is left out. Raises SteerError('no_log')."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SteerError("no_log", f"{path} is not a readable log ({error}); give the folder of a run") from None
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def plot(runs: Sequence[Path], out: Path) -> Path:
    """HTML page with one panel a quantity and one line a run, over steps; returns `out`. Raises SteerError('no_log')."""
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots

    logs = {name: read_log(run / "log.jsonl") for name, run in _named(runs).items()}
    names = sorted({k for rows in logs.values() for row in rows for k in row if k not in ("step", "seconds")})
    if not names:
        raise SteerError("no_log", f"the logs of {', '.join(logs)} hold nothing to draw yet; let the run go on")
    height = -(-len(names) // _COLUMNS)
    figure = make_subplots(rows=height, cols=_COLUMNS, subplot_titles=names, vertical_spacing=0.3 / height)
    shown = set()
    for index, name in enumerate(names):
        for colour, (run, rows) in zip(cycle(qualitative.Safe), logs.items(), strict=False):
            points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
            if not points:
                continue
            figure.add_scatter(
                x=[p[0] for p in points], y=[p[1] for p in points], name=run, legendgroup=run, line={"color": colour},
                showlegend=run not in shown, row=index // _COLUMNS + 1, col=index % _COLUMNS + 1,
            )  # fmt: skip
            shown.add(run)
    figure.update_layout(
        height=240 * height, title="over steps", template="plotly_white", legend={"orientation": "h", "y": 1.04}
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(str(out), include_plotlyjs=True)
    return out


def _named(runs: Sequence[Path]) -> dict[str, Path]:
    """Each run under the shortest end of its path that no other run has."""
    paths = list(dict.fromkeys(run.resolve() for run in runs))
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        named = {"/".join(path.parts[-parts:]): path for path in paths}
        if len(named) == len(paths):
            return named
    raise AssertionError("different paths have different names")
