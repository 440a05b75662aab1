"""The Pi0 network: transformers' class, and two doors through which all that enters a tower passes.

Invariant: the prefix is read once an inference, and all that leaves it are its keys and values; a denoising step changes
no state, so steps can be repeated, stopped and resumed. Numbers are those of transformers' own `sample_actions`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PI0Config, PI0ForConditionalGeneration
from transformers.models.gemma.modeling_gemma import GemmaRotaryEmbedding
from transformers.models.pi0.modeling_pi0 import PI0TimestepEmbeddings

from steer_runtime.policies.pi0.config import GemmaSize, Pi0Config


@dataclass(frozen=True)
class Inputs:
    """What the network reads, B samples. Cameras may be ragged: a sample has the first of its row, marked in `cameras`.

    ids int64 [B, P]: image tokens (config.image_token_id), then text, then padding; mask bool [B, P]: no padding.
    pixels [B, C, 3, S, S] in [-1, 1]; cameras bool [B, C]; state [B, state_dim], normalised and padded.
    """

    ids: Tensor
    mask: Tensor
    pixels: Tensor
    cameras: Tensor
    state: Tensor


class PrefixCache(DynamicCache):
    """Keys and values of the prefix. Reading a suffix does not store it, so nothing has to be cropped away."""

    kept = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        if not self.kept:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        return torch.cat((layer.keys, key_states), dim=-2), torch.cat((layer.values, value_states), dim=-2)  # type: ignore[union-attr, arg-type]


@dataclass(frozen=True)
class Prefix:
    """What is left of a prefix. mask bool [B, 1, 1 + chunk, P + 1 + chunk] and positions int64 [B, 1 + chunk] of the expert."""

    cache: PrefixCache
    mask: Tensor
    positions: Tensor


class Pi0Network(nn.Module):
    """The whole network. Parameters may be constructed on the meta device; `restore_buffers` then fills the buffers."""

    def __init__(self, config: Pi0Config) -> None:
        super().__init__()
        self.config = config
        self.pi0 = PI0ForConditionalGeneration(transformers_config(config))
        # 263 M parameters at full size that no forward reads.
        self.pi0.model.dit.embed_tokens = None
        self.prefix_entry = nn.Identity()
        self.expert_entry = nn.Identity()

    @property
    def language_model(self) -> nn.Module:
        """The prefix's Gemma."""
        return self.pi0.model.vlm.language_model

    @property
    def expert(self) -> nn.Module:
        """The expert's Gemma."""
        return self.pi0.model.dit

    @property
    def unembedding(self) -> Tensor:
        """Token basis of the prefix, [vocab, d_model], tied to its embedding."""
        return self.language_model.embed_tokens.weight  # type: ignore[return-value, union-attr]

    def restore_buffers(self, device: torch.device | str) -> None:
        """Recompute, in float32, what is derived from the configuration and never stored: frequencies, scales, positions."""
        with torch.device(device):
            for tower in (self.language_model, self.expert):
                tower.rotary_emb = GemmaRotaryEmbedding(tower.config)  # type: ignore[arg-type]
            embedding = self.language_model.embed_tokens
            embedding.embed_scale = nn.Buffer(torch.tensor(embedding.scalar_embed_scale), persistent=False)  # type: ignore[union-attr]
            positions = torch.arange(self.config.vision.patches).expand((1, -1))
            vision = self.pi0.model.vlm.vision_tower.embeddings
            vision.position_ids = nn.Buffer(positions, persistent=False)
            self.pi0.embed_action_time.sinusoid_embeds = PI0TimestepEmbeddings(self.pi0.config)

    def embed_prefix(self, inputs: Inputs) -> Tensor:
        """Embeddings [B, P, d_model] of images and text, in the order of the ids."""
        pixels = inputs.pixels.to(self.unembedding.dtype)
        return self.pi0.model.embed_prefix(inputs.ids, pixels, inputs.cameras)

    def read_prefix(self, embeddings: Tensor, mask: Tensor) -> Prefix:
        """One forward of the prefix: every token attends to every other that is no padding."""
        tokens = mask.shape[1]
        cache = PrefixCache()
        self.language_model(
            inputs_embeds=self.prefix_entry(embeddings),
            attention_mask=mask[:, None, None, :].expand(-1, 1, tokens, -1),
            position_ids=mask.cumsum(-1) - 1,
            past_key_values=cache,
            use_cache=True,
        )
        cache.kept = True
        return Prefix(cache, *self._expert_layout(mask))

    def _expert_layout(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The state attends to the prefix and itself, an action to everything: blocks as published."""
        suffix = self.config.expert_tokens
        inner = torch.ones(suffix, suffix, dtype=torch.bool, device=mask.device)
        inner[0, 1:] = False
        outer = mask[:, None, :].expand(-1, suffix, -1)
        whole = torch.cat((outer, inner[None].expand(len(mask), -1, -1)), dim=-1)
        positions = mask.sum(-1, keepdim=True) + torch.arange(suffix, device=mask.device)
        return whole[:, None], positions

    def velocity(self, prefix: Prefix, state: Tensor, actions: Tensor, time: Tensor) -> Tensor:
        """One forward of the expert: float32 [B, chunk, action_dim], the flow at noisy actions [B, chunk, action_dim].

        time float32 [B], 1 is noise and 0 is actions.
        """
        dtype = self.pi0.action_out_proj.weight.dtype
        embedded = self.pi0.embed_action_time(state.to(dtype), actions.to(dtype), time)
        hidden = self.expert(
            inputs_embeds=self.expert_entry(embedded),
            attention_mask=prefix.mask,
            position_ids=prefix.positions,
            past_key_values=prefix.cache,
            use_cache=True,
        ).last_hidden_state
        return self.pi0.action_out_proj(hidden[:, -self.config.chunk :]).float()


def transformers_config(config: Pi0Config) -> PI0Config:
    """The same architecture in transformers' words."""
    prefix = _gemma(config, config.prefix)
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": config.vision.hidden,
        "intermediate_size": config.vision.mlp,
        "num_hidden_layers": config.vision.layers,
        "num_attention_heads": config.vision.heads,
        "image_size": config.vision.image,
        "patch_size": config.vision.patch,
        "vision_use_head": False,
    }
    made = PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": prefix,
            "vision_config": vision,
            "projection_dim": config.prefix.d_model,
            "image_token_id": config.image_token_id,
        },
        dit_config=_gemma(config, config.expert),
        chunk_size=config.chunk,
        max_state_dim=config.state_dim,
        max_action_dim=config.action_dim,
        num_inference_steps=config.euler_steps,
        min_period=config.min_period,
        max_period=config.max_period,
    )
    made._attn_implementation = "sdpa"
    return made


def _gemma(config: Pi0Config, size: GemmaSize) -> dict[str, object]:
    return {
        "model_type": "gemma",
        "vocab_size": config.vocab,
        "hidden_size": size.d_model,
        "intermediate_size": size.d_ff,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "hidden_act": size.activation,
        "hidden_activation": size.activation,
        "rms_norm_eps": size.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }
