"""How a task is done, as three slots of words: pace, height and care.

Invariant: a manner is a choice of one word a slot, and everything else about it (the expert's style, what prompts say)
follows from that choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

import numpy as np

from sim.expert import Style
from sim.wordings import Concept
from steer_runtime.errors import SteerError

SLOTS: Mapping[str, tuple[str, ...]] = {
    "pace": ("slowly", "calmly", "usually", "quickly", "fast"),
    "height": ("below", "level", "high"),
    "care": ("carefully", "ordinary", "wildly"),
}
"""Slot -> its words; a manner holds their indices. Along their slot's axis of the token basis
(`sim.evaluation.axis_directions.WORDS`) the plain word lies between the ends, with room on both sides: "normally" would
lie by "slowly"."""
CONCEPTS: Mapping[str, Mapping[int, Concept]] = {
    "pace": {0: "slow", len(SLOTS["pace"]) - 1: "fast"},
    "height": {len(SLOTS["height"]) - 1: "high"},
    "care": {0: "careful"},
}
"""Slot -> index of a word -> what prompts call it; words without one are said by no prompt."""
SPEEDS: tuple[float, ...] = (0.33, 0.48, 0.65, 0.9, 1.25)
"""Pace -> cap on the norm of the translation action."""
HEIGHTS: tuple[float | None, ...] = (None, 0.20, 0.35)
"""Height -> of the carried object's underside above the place's ground, m; None: as low as the way allows."""
NEAR_SHARES: tuple[float | None, ...] = (0.35, 0.75, None)
"""Care -> speed near objects and places as a share of the pace's speed; None: no slower there."""
PLAIN_SHARE = 0.5
"""Chance that a drawn manner's height, and its care, are plain whatever the even draw says."""


@dataclass(frozen=True)
class Manner:
    """Indices into SLOTS; the default is plain. Raises SteerError('bad_manner') for an index that names no word."""

    pace: int = 2
    height: int = 1
    care: int = 1

    def __post_init__(self) -> None:
        for (slot, words), index in zip(SLOTS.items(), astuple(self), strict=True):
            if not 0 <= index < len(words):
                raise SteerError(
                    "bad_manner",
                    f"{slot} {index} is no word's index: expected 0 to {len(words) - 1} ({', '.join(words)})",
                )

    def style(self) -> Style:
        """What the scripted expert does about it."""
        speed, share = SPEEDS[self.pace], NEAR_SHARES[self.care]
        return Style(speed, HEIGHTS[self.height], None if share is None else share * speed)

    def words(self) -> tuple[str, str, str]:
        """One word a slot, in the order of SLOTS."""
        return SLOTS["pace"][self.pace], SLOTS["height"][self.height], SLOTS["care"][self.care]

    def concepts(self) -> tuple[Concept, ...]:
        """What prompts say of it: the ends of the slots only, nothing of what lies between."""
        said = [CONCEPTS[slot].get(index) for slot, index in zip(SLOTS, astuple(self), strict=True)]
        return tuple(concept for concept in said if concept is not None)


PLAIN = Manner()


def draw(rng: np.random.Generator) -> Manner:
    """A manner at random: pace even over its words, height and care plain with PLAIN_SHARE, else even."""
    pace = int(rng.integers(len(SPEEDS)))
    return Manner(pace, _plain_or(rng, PLAIN.height, len(HEIGHTS)), _plain_or(rng, PLAIN.care, len(NEAR_SHARES)))


def _plain_or(rng: np.random.Generator, plain: int, count: int) -> int:
    even = int(rng.integers(count))
    return plain if rng.random() < PLAIN_SHARE else even
