"""What a rule of evidence answers: a number with its interval and the n behind it, or words why there is none.

Invariant: nothing here is NaN or infinite; what is not known is None, and `note` says why in words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steer_runtime.errors import SteerError


@dataclass(frozen=True)
class Estimate:
    """value with its 95 % interval low to high. n: episodes, pairs or draws behind it; tasks: clusters they come from."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    tasks: int = 0
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise SteerError("not_finite", f"an estimate's {name} is {number}: expected a finite number or None")


@dataclass(frozen=True)
class PValue:
    """A two-sided p value. unit: what was flipped or counted ("task", "pair"); n: how many of them."""

    p: float | None
    unit: str
    n: int
    note: str = ""

    @property
    def least(self) -> float:
        """The smallest p that n signs can give, 2 / 2^n: above 0.05 the test could not have found anything."""
        return float(2.0 ** (1 - self.n))


def finite(values: Sequence[float], what: str) -> np.ndarray:
    """values as float64 [n]. Raises SteerError('not_finite')."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise SteerError(
            "not_finite",
            f"{what} hold {int((~np.isfinite(array)).sum())} values that are no finite numbers, or are no list: "
            "leave unmeasured pairs out",
        )
    return array


def count(n: int, one: str) -> str:
    """'1 pair', '2 pairs'."""
    return f"{n} {one}{'' if n == 1 else 's'}"
