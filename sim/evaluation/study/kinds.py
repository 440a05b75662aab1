"""The words that a study's files and tables share."""

from __future__ import annotations

from typing import Literal

Kind = Literal["unsteered", "zero", "direction", "random", "random_words", "opposite", "prompt", "scale"]
"""What a condition does. zero: a direction at strength 0 through the hooks. random: norm-matched draws of the form and
place of a direction; random_words: likewise, each a difference of random words of the token basis. opposite: its negative.
prompt: words put into the instruction. scale: the translation that is executed."""
CONTROLS: tuple[Kind, ...] = ("random", "random_words")
"""What an effect is held against, each kind apart."""
Status = Literal["done", "errored"]
Meshes = Literal["original", "thin"]
