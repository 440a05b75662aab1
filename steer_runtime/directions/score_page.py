"""A score as one document, and the document as one HTML page that needs nothing else: no network, no files beside it.

Invariant: the page shows the numbers of the document and computes none; texts from tokens and cards are data, never markup.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steer_runtime.directions.action_basis import ActionBasis
from steer_runtime.directions.direction import Axis, Direction
from steer_runtime.directions.files import write_atomically
from steer_runtime.directions.observables import AXES, observable, off_axis
from steer_runtime.directions.score import content
from steer_runtime.directions.score_summary import DAMAGE_FLOOR, Effect, Point, Score, Summary
from steer_runtime.directions.token_basis import TokenBasis
from steer_runtime.errors import SteerError
from steer_runtime.types import Tower

SCHEMA = "steer-score/1"
NEURONS_SHOWN = 200
"""Neurons of a direction on the page, largest writes first; more would bury the page, and the document says how many there are."""
TOKENS_SHOWN = 10


def document(
    summaries: Sequence[Summary],
    facts: Mapping[str, Any],
    contents: Mapping[str, Any],
    axes: Sequence[Axis],
) -> dict[str, Any]:
    """JSON-able: the readings by name, what each direction writes (`contents` by its hash), and how it was measured.

    facts: policy, moments, controls, strengths, seed, as told by who measured.
    """
    names = list(dict.fromkeys(name for s in summaries for name in s.unsteered))
    return {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **facts,
        "damage_floor": DAMAGE_FLOOR,
        "observables": {n: {"unit": observable(n).unit, "what": observable(n).what} for n in names},
        "claims": {
            axis: {"observable": on, "sign": sign, "off_axis": off_axis(on)} for axis, (on, sign) in AXES.items()
        },
        "axes": [asdict(axis) for axis in axes],
        "directions": {s.direction.hash: _card(s, contents) for s in summaries[0].scores},
        "readings": {s.reading: _reading(s) for s in summaries},
    }


def _card(score: Score, contents: Mapping[str, Any]) -> dict[str, Any]:
    d = score.direction
    return {
        "id": d.id,
        "name": d.name,
        "content": content(d),
        "finder": score.finder,
        "form": "neurons" if d.neurons is not None else "dense",
        "tower": d.tower,
        "op": d.op,
        "span": sorted(d.span),
        "max_strength": d.max_strength,
        "axes": list(score.axes),
        "writes": contents[d.hash],
        "provenance": {k: v for k, v in d.provenance.items() if k not in ("neurons", "versions")},
    }


def _reading(summary: Summary) -> dict[str, Any]:
    return {
        "unsteered": {
            name: {"mean": _short(mean), "scale": _short(scale), "moments": n}
            for name, (mean, scale, n) in summary.unsteered.items()
        },
        "scores": [_score(score) for score in summary.scores],
        "finders": [{k: _short(v) for k, v in asdict(row).items()} for row in summary.finders],
    }


def _score(score: Score) -> dict[str, Any]:
    return {
        "hash": score.direction.hash,
        "claim": None if score.claim is None else asdict(score.claim),
        "best": score.best,
        "monotone": score.monotone,
        "ratio_beaten": _short(score.ratio_beaten),
        "controls_ratio": [_short(r) for r in score.controls_ratio],
        "notes": list(score.notes),
        "points": [_point(point) for point in score.points],
    }


def _point(point: Point) -> dict[str, Any]:
    plain = ("strength", "dose", "control_dose", "writes", "on", "z", "beaten", "damage", "ratio")
    return {
        **{name: _short(getattr(point, name)) for name in plain},
        "effects": {name: _effect(effect) for name, effect in point.effects.items()},
    }


def _effect(effect: Effect) -> dict[str, Any]:
    plain = ("value", "low", "high", "standardised", "z", "beaten", "moved", "mean", "spread")
    return {
        **{name: _short(getattr(effect, name)) for name in plain},
        "controls": [_short(c) for c in effect.controls],
    }


def _short(value: Any) -> Any:
    """Six digits are more than twenty moments can tell, and half the bytes."""
    return float(f"{value:.6g}") + 0.0 if isinstance(value, float) else value  # + 0.0: no negative zero


def contents(direction: Direction, tower: Tower, reader: TokenBasis | ActionBasis) -> dict[str, Any]:
    """What a direction writes, in words: its neurons with alphas and both ends of their labels, largest writes first, or
    per residual site the tokens nearest to the vector and to its opposite. Labels as in `TokenBasis`: raw dot products; in a
    tower without words the dimensions of the action that are raised and lowered, as in `ActionBasis`."""
    if direction.dense is not None:
        sites = sorted(direction.dense)
        vectors = np.stack([direction.dense[site] for site in sites])
        return {
            "basis": tower.basis,
            "sites": [
                {"site": site, "norm": _short(float(np.linalg.norm(vector))), **end}
                for site, vector, end in zip(sites, vectors, _ends(vectors, reader), strict=True)
            ],
        }
    n = direction.neurons
    assert n is not None
    columns = torch.stack(
        [
            tower.down_projs[int(layer)].weight[:, int(neuron)].detach().float().cpu()  # type: ignore[attr-defined]
            for layer, neuron in zip(n.layer, n.neuron, strict=True)
        ]
    )
    size = columns.norm(dim=1) * torch.from_numpy(np.abs(n.alpha))
    order = size.argsort(descending=True, stable=True)[:NEURONS_SHOWN]
    rows = []
    for i, end in zip(order.tolist(), _ends(columns[order].numpy(), reader), strict=True):
        layer, neuron = int(n.layer[i]), int(n.neuron[i])
        row = {
            "layer": layer,
            "neuron": neuron,
            "flat": layer * direction.d_ff + neuron,
            "alpha": _short(float(n.alpha[i])),
        }
        row |= {"write": _short(float(size[i]))} | ({"low": _short(float(n.low[i]))} if n.low is not None else {})
        rows.append({**row, **end})
    return {"basis": tower.basis, "neurons": rows, "count": len(n)}


def _ends(vectors: np.ndarray, reader: TokenBasis | ActionBasis) -> list[dict[str, list[str]]]:
    """tokens: what vectors [K, d_model] say, best first; low_tokens: what their opposites say."""
    return [{"tokens": high, "low_tokens": low} for high, low in reader.ends(vectors, TOKENS_SHOWN)]


def save(document: Mapping[str, Any], path: Path) -> Path:
    """Write the document as JSON. Raises SteerError('not_written')."""
    write_atomically(path, (json.dumps(document, allow_nan=False) + "\n").encode())
    return path


def render(document: Mapping[str, Any], path: Path) -> Path:
    """Write the page of a document. Raises SteerError: 'no_plotly' where plotly or jinja2 is missing, 'not_written'."""
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as missing:
        raise SteerError(
            "no_plotly",
            f"the page needs {missing.name}: install it with `pip install plotly jinja2`, or give --no-page; everything "
            "measured is kept",
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # As the document stands: the page shows observables in the order it names them.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
    html = environment.get_template("score.html.j2").render(document=document, plotly=get_plotlyjs())
    write_atomically(path, html.encode())
    return path
