"""The words that a study's files and tables share."""

from __future__ import annotations

from typing import Literal

Kind = Literal["unsteered", "zero", "direction", "random", "opposite", "prompt", "scale"]
"""What a condition does. zero: a direction at strength 0 through the hooks. random: norm-matched draws of the form and
place of a direction. opposite: its negative. prompt: words put into the instruction. scale: the translation that is executed."""
Status = Literal["done", "errored"]
Meshes = Literal["original", "thin"]
