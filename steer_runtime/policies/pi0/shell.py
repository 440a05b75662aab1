"""A Llama's weights inside a Gemma: the same function in the only class that Pi0's prefix can be.

Gemma scales its embedding by sqrt(d_model) and its norms by 1 + weight; so the embedding is divided by sqrt(d_model) and
every norm weight is lowered by 1. Activation (silu), rotary base and head sizes are configuration.

Invariant: with a causal mask the hidden states are the Llama's, up to rounding. The token basis is the Llama's up to one
factor: directions of words keep their direction.
"""

from __future__ import annotations

from torch import Tensor


def in_shell(name: str, value: Tensor) -> Tensor:
    """What the Gemma holds where the Llama holds `value`, by the Llama's parameter name."""
    if name.endswith("embed_tokens.weight"):
        return value / value.shape[-1] ** 0.5
    if name.endswith("norm.weight"):
        return value - 1.0
    return value
