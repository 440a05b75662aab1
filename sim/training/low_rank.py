"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685) by torch's own parametrisation: W' = W + B A / rank.

Invariant: before the first step W' equals W (B is zero), and `merge` leaves a plain Linear of the same output.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from steer_runtime.errors import SteerError


class LowRank(nn.Module):
    """W [out, in] -> W + B A / rank, A [rank, in] normal with variance 1 / in, B [out, rank] zero."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, columns) * columns**-0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))
        self.rank = rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a / self.rank


def adapt(module: nn.Module, patterns: Sequence[str], rank: int) -> list[str]:
    """Adapt every Linear whose name matches a pattern; returns their names. Raises SteerError('nothing_adapted')."""
    chosen = [
        (name, part)
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and any(re.search(p, name) for p in patterns)
    ]
    if not chosen:
        raise SteerError("nothing_adapted", f"no linear layer matches {list(patterns)}: mend `adapted`")
    for _, part in chosen:
        part.weight.requires_grad_(False)
        rows, columns = part.weight.shape
        parametrize.register_parametrization(part, "weight", LowRank(rows, columns, rank))
    return [name for name, _ in chosen]


def merge(module: nn.Module) -> None:
    """Fold every adaptation into its weight."""
    for part in list(module.modules()):
        if parametrize.is_parametrized(part, "weight"):
            parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)
