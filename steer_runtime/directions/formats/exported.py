"""What an export gives: the bytes of a file, and what a reader of that file will not know."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Exported:
    """content: the file. losses: clauses, one for each thing that the format cannot hold and that changes what the
    direction does; they are written into the file too. Empty: nothing is lost.
    """

    content: bytes
    losses: tuple[str, ...] = ()
