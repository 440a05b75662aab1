"""Do the value vectors of the trained policy still say what the published language model's say?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from sim.evaluation.statistics import Line
from steer_runtime.directions.comparison import label_survival
from steer_runtime.errors import SteerError
from steer_runtime.policies.base import EMBEDDING, PREFIX, BaseConfig, read_base
from steer_runtime.policies.openvla.policy import TOWER, OpenVLAPolicy
from steer_runtime.policies.pocket import SMOLLM2_LAYERS

LEAST, AIM = 0.70, 0.85


def late_layers(base: BaseConfig) -> tuple[int, ...]:
    """The policy's layers that come from the later half of the published model: those that name words."""
    return tuple(i for i, published in enumerate(base.layers) if 2 * published >= SMOLLM2_LAYERS)


def require_base(policy: OpenVLAPolicy, base: BaseConfig | None) -> BaseConfig:
    """The given base, or the one that the checkpoint names. Raises SteerError: 'no_base', 'bad_layers'."""
    found = base or policy.config.base
    if found is None:
        raise SteerError(
            "no_base",
            f"the checkpoint of {policy.name} does not say which published layers it began with: give --kept, "
            "for example 0-3,26-29",
        )
    if len(found.layers) != policy.config.lm.layers:
        raise SteerError(
            "bad_layers",
            f"{len(found.layers)} published layers were named for the {policy.config.lm.layers} layers of {policy.name}: "
            "expected as many",
        )
    return found


def survival(
    policy: OpenVLAPolicy,
    base: BaseConfig,
    layers: Sequence[int],
    *,
    on_layer: Callable[[int, float], None] | None = None,
) -> dict[int, float]:
    """Layer of the policy -> share of its value vectors whose top-10 tokens overlap the published ones' by half or more.

    Token basis: the published word embeddings. Raises SteerError: 'layer_out_of_range', and those of `read_base`.
    """
    lm = policy.config.lm
    bad = [layer for layer in layers if not 0 <= layer < lm.layers]
    if bad or not layers:
        given = f"layer {bad[0]}" if bad else "no layer"
        raise SteerError("layer_out_of_range", f"{given} was given: expected some of 0 to {lm.layers - 1}")
    names = {f"{PREFIX}layers.{layer}.mlp.down_proj.weight": layer for layer in layers}
    # Only what is compared is read.
    published = dict(read_base(replace(base, tensors=tuple(names)), lm.heads, lm.kv_heads))
    words = published.pop(EMBEDDING)
    out = {}
    for name, layer in names.items():
        mine = policy.towers[TOWER].down_projs[layer].weight  # type: ignore[attr-defined]
        out[layer] = label_survival(published[name], mine.detach().to("cpu", torch.float32), words)
        if on_layer is not None:
            on_layer(layer, out[layer])
    return out


def summarise(policy: OpenVLAPolicy, base: BaseConfig, shares: dict[int, float]) -> list[Line]:
    """All layers together, and each; it is a count of all vectors, so there is no interval."""
    d_ff = policy.config.lm.d_ff
    mean = sum(shares.values()) / len(shares)
    lines = [Line("value vectors that kept their words", mean, n=d_ff * len(shares), unit="%", least=LEAST, aim=AIM)]
    for layer, value in shares.items():
        lines.append(Line(f"  layer {layer} (published {base.layers[layer]})", value, n=d_ff, unit="%"))
    return lines
