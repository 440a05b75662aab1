"""What is held: a measured quantity, its unit and the value it should have.

Invariant: a Target that exists is in SI units, finite, above zero and within what a robot arm can do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from steer_runtime.errors import SteerError, nearest

QuantityName = Literal["speed", "height"]


@dataclass(frozen=True)
class Quantity:
    """A measured quantity. units: unit -> its size in `si`. most: above it a target is a mistake, in `si`."""

    name: QuantityName
    si: str
    units: Mapping[str, float]
    most: float
    meaning: str


QUANTITIES: Mapping[str, Quantity] = {
    "speed": Quantity(
        "speed", "m/s", {"m/s": 1.0, "cm/s": 0.01, "mm/s": 0.001}, 2.0, "speed of the end effector while it moves"
    ),
    "height": Quantity(
        "height", "m", {"m": 1.0, "cm": 0.01, "mm": 0.001}, 2.0, "height of what is carried above where it was gripped"
    ),
}
_TEXT = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(\S.*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """value: in SI units. unit: the one it was given in, for people."""

    quantity: Quantity
    value: float
    unit: str

    @property
    def shown(self) -> str:
        """As it was given: '0.12 m/s'."""
        return self.show(self.value)

    def show(self, value: float) -> str:
        """Any value of this quantity in the unit of the target."""
        return f"{value / self.quantity.units[self.unit]:.4g} {self.unit}"


def parse_target(quantity: str, words: Sequence[str]) -> Target:
    """A target from the words of a command line: ("speed", ["0.12", "m/s"]) or ("height", ["25cm"]).

    Raises SteerError: unknown_quantity, no_unit, unknown_unit, bad_target.
    """
    known = QUANTITIES.get(quantity)
    if known is None:
        raise SteerError(
            "unknown_quantity", f"quantity {quantity[:40]!r} cannot be held: {nearest(quantity, QUANTITIES)}"
        )
    text = " ".join(words).strip()
    units = " or ".join(known.units)
    found = _TEXT.fullmatch(text)
    if found is None:
        raise SteerError(
            "bad_target",
            f"{text[:40]!r} is no target for {quantity}: expected a number and its unit, such as 0.12 {known.si}",
        )
    number, unit = found.groups()
    if unit is None:
        raise SteerError("no_unit", f"{quantity} {number[:40]} has no unit: expected {units} behind the number")
    if unit not in known.units:
        raise SteerError("unknown_unit", f"{unit[:40]!r} is no unit of {quantity}: expected {units}")
    value = float(number) * known.units[unit]
    if not (math.isfinite(value) and 0 < value <= known.most):
        raise SteerError(
            "bad_target",
            f"a {quantity} of {text[:40]} cannot be held: expected above 0 and at most {known.most:g} {known.si}",
        )
    return Target(known, value, unit)
