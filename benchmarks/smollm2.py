"""SmolLM2-135M as a bare language model with the shape of a policy: the subject of the speed ratios."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from steer_runtime.directions.direction import Direction, Neurons
from steer_runtime.policies.pocket import find_gguf, load_smollm2
from steer_runtime.types import LIBERO_ACTION_SPACE, ActionChunk, Observation, Role, TokenRoles, Tower

PREFILL = 280
"""Tokens of an OpenVLA prompt: BOS, 256 patches and about 23 words (project facts on OpenVLA)."""


class LanguageModel:
    """All 30 layers in float32; satisfies what the engine needs of a policy."""

    name = "SmolLM2-135M"
    trained = True
    action_space = LIBERO_ACTION_SPACE
    model_hash = "benchmark"

    def __init__(self) -> None:
        self.lm, _ = load_smollm2(find_gguf())
        self.entry = nn.Identity()
        decoder = self.lm.model
        self.model = decoder
        config = decoder.config
        self.towers = {
            "lm": Tower(
                name="lm",
                down_projs=[layer.mlp.down_proj for layer in decoder.layers],
                residual_sites=[self.entry, *decoder.layers],
                d_model=config.hidden_size,
                d_ff=config.intermediate_size,
                max_tokens=512,
                firings_per_inference=1,
            )
        }
        self._listener: TokenRoles | None = None
        generator = torch.Generator().manual_seed(0)
        self.embeddings = torch.randn(1, PREFILL, config.hidden_size, generator=generator) * 0.1

    def reset(self, seed: int | None = None) -> None: ...

    def infer(self, observation: Observation) -> ActionChunk:
        raise NotImplementedError("a bare language model has no actions")

    def announce_roles_to(self, listener: TokenRoles | None) -> None:
        self._listener = listener

    def announce(self, roles: Sequence[Role]) -> None:
        if self._listener is not None:
            self._listener.set_roles("lm", roles)

    def forward(self, embeddings: Tensor, cache: Cache | None = None) -> Tensor:
        """Last hidden states [1, T, d_model]."""
        output = self.model(inputs_embeds=self.entry(embeddings), past_key_values=cache, use_cache=cache is not None)
        return output.last_hidden_state

    def prefill(self) -> Tensor:
        """One forward of the whole prompt."""
        self.announce(PROMPT_ROLES)
        return self.forward(self.embeddings)

    def decode(self, cache: DynamicCache) -> Tensor:
        """One cached single-token step; the cache is cut back so that every repeat does the same work."""
        self.announce(("action",))
        hidden = self.forward(self.embeddings[:, :1], cache)
        cache.crop(-1)
        return hidden

    def filled_cache(self) -> DynamicCache:
        """A cache that holds the prompt."""
        cache = DynamicCache(config=self.model.config)
        self.announce(PROMPT_ROLES)
        self.forward(self.embeddings, cache)
        return cache


PROMPT_ROLES: tuple[Role, ...] = ("text", *["image"] * 256, *["text"] * (PREFILL - 257))  # type: ignore[assignment]


def overrides(tower: Tower, layers: Sequence[int], per_layer: int, name: str, alpha: float = 4.0) -> Direction:
    """Random neurons, `per_layer` in each of `layers`, overridden with alpha."""
    rng = np.random.default_rng(0)
    neurons = np.concatenate([rng.choice(tower.d_ff, per_layer, replace=False) for _ in layers])
    return Direction(
        name=name,
        tower="lm",
        model_hash="benchmark",
        layers=tower.layers,
        d_model=tower.d_model,
        d_ff=tower.d_ff,
        neurons=Neurons(
            np.repeat(np.asarray(layers, np.int32), per_layer),
            neurons.astype(np.int32),
            np.full(len(neurons), alpha, np.float32),
        ),
    )


def dense(tower: Tower, sites: Sequence[int], name: str) -> Direction:
    """A random vector a residual site, of the size of a token embedding."""
    rng = np.random.default_rng(1)
    return Direction(
        name=name,
        tower="lm",
        model_hash="benchmark",
        layers=tower.layers,
        d_model=tower.d_model,
        d_ff=tower.d_ff,
        op="add",
        dense={site: rng.normal(0, 0.1, tower.d_model).astype(np.float32) for site in sites},
    )
