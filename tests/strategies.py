"""Directions and damage, drawn at random, for property tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from steer_runtime.directions.direction import Direction, Neurons
from steer_runtime.types import ROLES

LAYERS, D_MODEL, D_FF = 5, 6, 16
MODEL = "a" * 64
finite32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
json_facts = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def neuron_direction(name: str = "up", *, alpha: float = 4.0, model: str = MODEL) -> Direction:
    return Direction(
        name=name,
        tower="lm",
        model_hash=model,
        layers=LAYERS,
        d_model=D_MODEL,
        d_ff=D_FF,
        neurons=Neurons(
            np.array([1, 4], np.int32), np.array([0, 15], np.int32), np.array([alpha, alpha], np.float32), None
        ),
        provenance={"finder": "test", "words": ["up"], "date": "2026-01-31"},
    )


@st.composite
def directions(draw: st.DrawFn) -> Direction:
    form = draw(st.sampled_from(["override", "add", "scale", "ablate", "clamp", "dense"]))
    neurons = dense = None
    if form == "dense":
        sites = draw(st.lists(st.integers(0, LAYERS), min_size=1, max_size=3, unique=True))
        dense = {s: np.array(draw(st.lists(finite32, min_size=D_MODEL, max_size=D_MODEL)), np.float32) for s in sites}
    else:
        flat = draw(st.lists(st.integers(0, LAYERS * D_FF - 1), min_size=1, max_size=6, unique=True))
        size = len(flat)
        alpha = np.array(draw(st.lists(finite32, min_size=size, max_size=size)), np.float32)
        low = np.full(size, alpha.min(), np.float32) if form == "clamp" else None
        layer, neuron = (np.array(part, np.int32) for part in zip(*(divmod(f, D_FF) for f in flat), strict=True))
        neurons = Neurons(layer, neuron, alpha, low)
    return Direction(
        name=draw(st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True)),
        tower="lm",
        model_hash=MODEL,
        layers=LAYERS,
        d_model=D_MODEL,
        d_ff=D_FF,
        op="add" if form == "dense" else form,  # type: ignore[arg-type]
        span=draw(st.frozensets(st.sampled_from(ROLES), min_size=1)),
        neurons=neurons,
        dense=dense,
        max_strength=draw(st.floats(0.01, 1.0) | st.just(1)),
        proven=draw(st.booleans()),
        provenance=draw(st.dictionaries(st.text(max_size=8), json_facts, max_size=4)),
        licence=draw(
            st.sampled_from(["NOASSERTION", "Apache-2.0", "MIT OR (GPL-2.0-only WITH Classpath-exception-2.0)"])
        ),
        calibrated=draw(st.none() | st.sampled_from([(0.0, 0.5), (0, 1), (0.25, 1.0)])),
    )


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """One byte changed, dropped or put in, or the end cut off."""
    where, kind = draw(st.floats(0, 1, exclude_max=True)), draw(st.sampled_from(["change", "drop", "insert", "cut"]))
    value = draw(st.integers(1, 255))

    def damage(content: bytes) -> bytes:
        at = int(where * len(content))
        if kind == "change":
            return content[:at] + bytes([content[at] ^ value]) + content[at + 1 :]
        if kind == "insert":
            return content[:at] + bytes([value]) + content[at:]
        return content[:at] + (content[at + 1 :] if kind == "drop" else b"")

    return damage
