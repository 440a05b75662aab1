"""What a training step is shown and told of a sample: sight with the tower's errors, further labels, a wording.

Invariant: chance comes from torch's generator alone, which the trainer seeds for each step.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import NamedTuple

import torch
from torch import Tensor

from sim.manner import Manner
from sim.training.demonstration_data import DemonstrationData
from sim.wordings import instruction_for
from steer_runtime.policies.objects.heatmap import PARTS, geometry

_OUTLIER = 0.05
"""Standard deviation of a badly seen object's position, m."""
_TURN = 0.15
"""Standard deviation of a seen object's turn, rad."""


def look(data: DemonstrationData, indices: Tensor, seen_share: float, sight_noise: float) -> Tensor:
    """Geometry [B, C, GEOMETRY]: the tower's view, or the exact one with errors like the tower's (sight_noise, m).

    seen_share: of samples with pictures that are shown as the tower sees them.
    """
    exact, seen = data.exact[indices], data.seen[indices]
    blurred = disturbed(exact, sight_noise)
    use = (torch.rand(len(indices)) < seen_share) & ~seen.isnan().flatten(1).any(1)
    return torch.where(use[:, None, None], seen.nan_to_num(), blurred)


def others(data: DemonstrationData, indices: Tensor, count: int) -> list[Tensor]:
    """count times int64 [B]: different further labels of each sample."""
    order = torch.rand(len(indices), data.other_spoken.shape[1]).argsort(1)
    return [order[:, i % order.shape[1]] for i in range(count)]


class Further(NamedTuple):
    """A further label of each sample, its own where there is none. there bool [B]; column int64 [B], into the data's other_*;
    spoken int64 [B]; manners int64 [B, slots]."""

    there: Tensor
    column: Tensor
    spoken: Tensor
    manners: Tensor


def further_labels(data: DemonstrationData, indices: Tensor, chosen: Tensor) -> Further:
    """The chosen (int64 [B], modulo how many there are) further labels of the samples."""
    column = chosen % data.other_spoken.shape[1]
    other = data.other_spoken[indices, column]
    there = other >= 0
    manners = torch.where(there[:, None], data.other_manners[indices, column], data.manners[indices])
    return Further(there, column, torch.where(there, other, data.spoken[indices]), manners)


def worded(instruction: str, manner: Tensor, told: Tensor) -> str:
    """The instruction in a wording, drawn, that says the told slots (bool [slots]) of the manner (int64 [slots])."""
    plain = astuple(Manner())
    levels = [int(m) if bool(t) else p for m, t, p in zip(manner, told, plain, strict=True)]
    return instruction_for(instruction, Manner(*levels).concepts(), int(torch.randint(2**31, ())))


def disturbed(exact: Tensor, size: float) -> Tensor:
    """Geometry [B, C, GEOMETRY] with errors as a tower makes them; size: of a position, m, one object in 25 far worse."""
    place, position, present, wrist_place, wrist_present, turn, wrist_turn = exact.split(PARTS, -1)
    bad = (torch.rand_like(present) < 0.04).float()
    spread = size + bad * _OUTLIER
    flip = (torch.rand_like(wrist_present) < 0.04).float()
    close = (wrist_present - flip).abs()
    close = (close + 0.1 * torch.randn_like(close)).clamp(0, 1)
    # A fifth of the picture's width is about 0.2 m on the ground.
    return geometry(
        place + spread * torch.randn_like(place),
        position + spread * torch.randn_like(position) * torch.tensor([1.0, 1.0, 0.7]),
        present[..., 0],
        wrist_place + 2 * size * torch.randn_like(wrist_place),
        close[..., 0],
        _turned(turn, _TURN),
        _turned(wrist_turn, _TURN / 2),
    )


def _turned(bearings: Tensor, size: float) -> Tensor:
    """Bearings [..., 4] off by an angle of standard deviation `size`, rad; the less sure, the smaller."""
    double, fourfold = bearings.split(2, -1)
    off = size * torch.randn_like(double[..., :1])
    sure = torch.rand_like(off)
    return sure * torch.cat((_rotated(double, 2 * off), _rotated(fourfold, 4 * off)), -1)


def _rotated(pair: Tensor, angle: Tensor) -> Tensor:
    """(cos a, sin a) [..., 2] turned by angle [..., 1]."""
    x, y = pair.split(1, -1)
    return torch.cat((angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y), -1)
