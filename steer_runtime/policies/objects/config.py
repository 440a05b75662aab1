"""Shape of the small vision tower that the pocket policies see with.

Invariant: what decides a tensor's shape is in it, and nothing else is.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeatmapConfig:
    """The small tower of `heatmap`, in place of published vision. classes: object classes, one token each.

    hidden: width on the coarsest grid; the convolutions before it have an eighth, a quarter and a half of it. blocks,
    heads: of the transformer there.
    """

    classes: tuple[str, ...]
    hidden: int = 192
    blocks: int = 4
    heads: int = 6

    def problems(self, image_size: int) -> list[str]:
        """What does not fit together, for pictures of image_size pixels a side; nothing when all does."""
        problems = []
        if not self.classes or len(set(self.classes)) != len(self.classes):
            problems.append("heatmap needs object classes, each once")
        if self.hidden % 64 or self.hidden % self.heads:
            problems.append(f"heatmap hidden {self.hidden} is not a multiple of 64 and of its {self.heads} heads")
        if image_size % 32:
            problems.append(f"image_size {image_size} is not a multiple of 32, as the heatmap tower needs")
        if self.blocks < 1:
            problems.append("heatmap needs a block")
        return problems
