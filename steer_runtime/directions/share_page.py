"""The page that shows what the value vectors of each layer say: bars, definitions, examples.

Invariant: one file that needs no network; every text of a model is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from steer_runtime.directions.files import write_atomically
from steer_runtime.directions.shares import BY_CHANCE, LayerShare
from steer_runtime.directions.token_basis import Labels
from steer_runtime.errors import SteerError

_TOKENS, _LONGEST = 6, 24  # of a label, and letters of a token, that the page shows
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1080px;padding:0 1rem;color:#1b1f24}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse;width:100%}
th,td{text-align:left;overflow-wrap:anywhere;vertical-align:top;padding:.35rem .6rem;border-top:1px solid #d0d7de}
td.n{width:4rem;white-space:nowrap;font-variant-numeric:tabular-nums}code{font-size:.85em;color:#57606a}"""


def require_plotly(out: Path) -> None:
    """Raises SteerError: 'bad_option' for a file that is no page, 'missing_extra' without plotly."""
    if out.suffix != ".html":
        raise SteerError("bad_option", f"{out.name[:80]!r} is no page: expected a name that ends in .html")
    if find_spec("plotly") is None:
        raise SteerError(
            "missing_extra", "plotly is not installed: install the extra `sim`, pip install 'steer-runtime[sim]'"
        )


def write_share_page(out: Path, title: str, labels: Labels, shares: Sequence[LayerShare], threshold: float) -> None:
    """Write the page of `shares`. Raises as `require_plotly`, and SteerError('not_written')."""
    require_plotly(out)
    chart = _figure(shares).to_html(full_html=False, include_plotlyjs=True, config={"displaylogo": False})
    k = labels.tokens.shape[-1]
    actions = any(share.action_examples for share in shares)
    heading = "<th>action labels</th>" if actions else ""
    rows = "".join(_row(labels, share, actions) for share in shares)
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>
{chart}
<p>A value vector is <b>semantic</b> when the {k} tokens of its label are more alike than those of
{1 - BY_CHANCE:.0%} of random directions: mean pairwise cosine of their embeddings, without what all embeddings share,
above {threshold:.3f}. So {BY_CHANCE:.0%} is chance (dashed). It is an <b>action</b> vector when at least half of those
tokens are action tokens.</p>
<h2>What they say</h2><table><tr><th>layer</th><th>most coherent labels</th>{heading}</tr>{rows}</table>
</body></html>"""
    try:
        write_atomically(out, page.encode())
    except OSError as why:
        raise SteerError("not_written", f"{out} could not be written ({why.strerror})") from why


def _figure(shares: Sequence[LayerShare]) -> Any:
    import plotly.graph_objects as go

    names = [str(share.layer) for share in shares]
    figure = go.Figure()
    for name, colour, values, counts in (
        ("semantic", "#2f6fdb", [s.semantic_share for s in shares], [s.semantic for s in shares]),
        ("action", "#e0632b", [s.action_share for s in shares], [s.action for s in shares]),
    ):
        figure.add_bar(
            name=name,
            x=names,
            y=values,
            marker_color=colour,
            customdata=list(zip(counts, [s.vectors for s in shares], strict=True)),
            hovertemplate="layer %{x}: %{customdata[0]} of %{customdata[1]} " + name + " (%{y:.1%})<extra></extra>",
            text=[f"{value:.1%}" if value else "" for value in values] if len(shares) <= 12 else None,
            textposition="outside",
        )
    figure.add_hline(
        y=BY_CHANCE, line_dash="dash", line_color="#57606a", annotation_text="chance", annotation_position="top left"
    )
    figure.update_layout(
        barmode="group",
        template="plotly_white",
        height=440,
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        legend={"orientation": "h", "y": 1.08},
        xaxis={"title": "layer", "type": "category"},
        yaxis={"title": "share of value vectors", "tickformat": ".0%", "rangemode": "tozero"},
    )
    return figure


def _row(labels: Labels, share: LayerShare, actions: bool) -> str:
    def said(neurons: Sequence[int]) -> str:
        lines = (
            f"<code>{share.layer}:{neuron}</code> {escape(' · '.join(map(_shown, text[:_TOKENS])))}"
            for neuron in neurons
            for text in [labels.text(share.layer, neuron)]
        )
        return "<br>".join(lines)

    second = f"<td>{said(share.action_examples)}</td>" if actions else ""
    return f'<tr><td class="n">{share.layer}</td><td>{said(share.examples)}</td>{second}</tr>'


def _shown(token: str) -> str:
    text = token.strip() or repr(token)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
