"""One exception for every input we refuse: a stable code for machines, one sentence for people."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SteerError(Exception):
    """Refused input. ``code`` is stable (snake_case); the message says what was given, what was expected, what to do."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Phrase naming the known names closest to `name`, for the end of an error sentence."""
    names = sorted(known)
    if not names:
        return "none is loaded"
    # Bound the work: difflib is quadratic and `name` may come from the network.
    close = difflib.get_close_matches(name[:128], names, n=limit, cutoff=0.4)
    if close:
        return "the nearest are " + ", ".join(repr(n) for n in close)
    return "known are " + ", ".join(repr(n) for n in names[:10]) + (", ..." if len(names) > 10 else "")
