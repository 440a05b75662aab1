"""What a direction, an axis or a prompt claims to move, told by its name or its words.

Invariant: a claim is fixed before anything is measured; a name that tells none has none, and is reported without a verdict.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sim.evaluation.analysis.metrics import CLAIMS, METRICS
from steer_runtime.errors import SteerError, nearest


@dataclass(frozen=True)
class Claim:
    """metric moves with this sign when the strength is above 0. source: how that was told, in words."""

    metric: str
    sign: float
    source: str


def parse(texts: Sequence[str]) -> dict[str, Claim]:
    """`name=metric` or `name=-metric`: claims by name of direction or axis. Raises SteerError('bad_claim')."""
    out = {}
    for text in texts:
        name, _, told = text.partition("=")
        metric, sign = told.removeprefix("-"), -1.0 if told.startswith("-") else 1.0
        if not name or metric not in METRICS:
            raise SteerError(
                "bad_claim",
                f"--claim {text[:80]!r} names no metric: expected NAME=METRIC or NAME=-METRIC, {nearest(metric, METRICS)}",
            )
        out[name] = Claim(metric, sign, "--claim")
    return out


def claim_of(name: str, told: Mapping[str, Claim]) -> Claim | None:
    """The claim of a direction or axis: one that was told, else what its name says; None for neither."""
    from steer_runtime.directions.observables import claimed_axis

    if name in told:
        return told[name]
    found = claimed_axis(name.split("@")[0])
    if found is None or found[0] not in CLAIMS:
        return None
    metric, sign = CLAIMS[found[0]]
    return Claim(metric, sign * found[1], "its name")


def claim_of_prompt(wording: str) -> Claim | None:
    """What a wording asks for: "{}, slowly" claims less speed. None where its words ask for nothing that is measured."""
    return claim_of(" ".join(_stems(wording)), {})


def _stems(wording: str) -> list[str]:
    """Words, with adverbs as the adjectives that they are made of."""
    words = re.findall(r"[a-z]+", wording.lower())
    return [w.removesuffix("ly") + ("le" if w == "gently" else "") for w in words]
