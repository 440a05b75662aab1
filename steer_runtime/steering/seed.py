"""The seed paper's own intervention, in our words: the reference that the engine must reproduce bit for bit.

Haon, Stocking, Chuang and Tomlin, CoRL 2025, arXiv 2509.00328: at the input f of `down_proj` f[S] := alpha, for all
tokens of all forwards. Their hook lets `down_proj` run and then runs it again on the changed copy; the second product
is what the engine saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from steer_runtime.directions.direction import Direction
from steer_runtime.types import Tower

SEED_ALPHA = 4.0
"""The alpha that the paper writes into OpenVLA (10 for pi0-FAST)."""


@contextmanager
def seed_override(tower: Tower, direction: Direction) -> Iterator[None]:
    """Override a direction's neurons with the paper's hook, as long as the context lasts."""
    n = direction.neurons
    assert n is not None
    handles = []
    for layer in np.unique(n.layer).tolist():
        module = tower.down_projs[layer]
        assert isinstance(module, nn.Module)
        here = n.layer == layer
        hook = _second_product(torch.from_numpy(n.neuron[here]).long(), torch.from_numpy(n.alpha[here]))
        handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _second_product(neurons: Tensor, alpha: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        f = args[0].clone()
        f[..., neurons.to(f.device)] = alpha.to(f)
        bias = getattr(module, "bias", None)
        return nn.functional.linear(f, module.weight, bias)  # type: ignore[arg-type]

    return hook
