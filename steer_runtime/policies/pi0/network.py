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

from steer_runtime.policies.objects.heatmap import HeatmapTower
from steer_runtime.policies.objects.proprioception import StateEncoder
from steer_runtime.policies.objects.tokens import ObjectProjector, named
from steer_runtime.policies.pi0.config import GemmaSize, ObjectSight, Pi0Config, SiglipSize


@dataclass(frozen=True)
class Inputs:
    """What the network reads, B samples. Cameras may be ragged: a sample has the first of its row, marked in `cameras`.

    ids int64 [B, P]: image tokens (config.image_token_id), then text, then padding; mask bool [B, P]: no padding.
    pixels [B, C, 3, S, S] in [-1, 1]; cameras bool [B, C]; state [B, state_dim], normalised and padded.
    With objects, ids are BOS, image tokens, state tokens (config.state_token_id), the rest of the text; felt
    [B, STATE_SIZE] is proprioception as `objects.proprioception` has it, None for SigLIP.
    """

    ids: Tensor
    mask: Tensor
    pixels: Tensor
    cameras: Tensor
    state: Tensor
    felt: Tensor | None = None


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
        if config.objects is not None:
            self.pi0.model.vlm.vision_tower = None
            self.pi0.model.vlm.multi_modal_projector = None
            self.objects = ObjectEyes(config.objects, config.prefix.d_model)
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
            if self.config.vision is not None:
                positions = torch.arange(self.config.vision.patches).expand((1, -1))
                vision = self.pi0.model.vlm.vision_tower.embeddings
                vision.position_ids = nn.Buffer(positions, persistent=False)
            self.pi0.embed_action_time.sinusoid_embeds = PI0TimestepEmbeddings(self.pi0.config)

    def embed_prefix(self, inputs: Inputs) -> Tensor:
        """Embeddings [B, P, d_model] of images and text, in the order of the ids."""
        pixels = inputs.pixels.to(self.unembedding.dtype)
        if self.config.objects is None:
            return self.pi0.model.embed_prefix(inputs.ids, pixels, inputs.cameras)
        assert inputs.felt is not None
        geometry = self.objects.heatmap(pixels.flatten(1, 2))
        return self.embed_objects(inputs.ids, geometry, inputs.felt.to(pixels.dtype))

    def embed_objects(self, ids: Tensor, geometry: Tensor, felt: Tensor) -> Tensor:
        """`embed_prefix` of what the small tower sees, [B, C, GEOMETRY], and feels, [B, STATE_SIZE]."""
        sight, config = self.config.objects, self.config
        assert sight is not None
        objects = self.objects.tokens(geometry, felt)
        words = ids.masked_fill(ids >= config.vocab, 0)
        text = self.language_model.embed_tokens(words)  # type: ignore[operator]
        text = text + named(words.tolist(), sight.names).to(text) @ objects.to(text.dtype)
        soft = torch.cat((objects, self.objects.state_encoder(felt)), 1).to(text.dtype)
        return torch.cat((text[:, :1], soft, text[:, 1 + soft.shape[1] :]), 1)

    def read_prefix(self, embeddings: Tensor, mask: Tensor) -> Prefix:
        """One forward of the prefix: every token attends to every other that is no padding, with objects to those before."""
        tokens = mask.shape[1]
        attends = mask[:, None, None, :].expand(-1, 1, tokens, -1)
        if self.config.objects is not None:
            attends = attends & torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
        cache = PrefixCache()
        self.language_model(
            inputs_embeds=self.prefix_entry(embeddings),
            attention_mask=attends,
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


class ObjectEyes(nn.Module):
    """The small tower, and its objects and proprioception as tokens of the prefix."""

    def __init__(self, sight: ObjectSight, d_model: int) -> None:
        super().__init__()
        self.heatmap = HeatmapTower(sight.heatmap, sight.image)
        self.projector = ObjectProjector(len(sight.heatmap.classes), d_model)
        self.state_encoder = StateEncoder(sight.state_tokens, d_model)

    def tokens(self, geometry: Tensor, felt: Tensor) -> Tensor:
        """Object tokens [B, C, d_model] of geometry [B, C, GEOMETRY], told from the hand of felt [B, STATE_SIZE]."""
        return self.projector(geometry, self.state_encoder.normalise(felt), felt[:, :3])


_UNUSED = SiglipSize(hidden=32, mlp=32, layers=1, heads=1, image=32, patch=32)
"""transformers' class always makes a SigLIP; where objects are in its place, this one is thrown away."""


def transformers_config(config: Pi0Config) -> PI0Config:
    """The same architecture in transformers' words."""
    prefix = _gemma(config, config.prefix)
    siglip = config.vision or _UNUSED
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": siglip.hidden,
        "intermediate_size": siglip.mlp,
        "num_hidden_layers": siglip.layers,
        "num_attention_heads": siglip.heads,
        "image_size": siglip.image,
        "patch_size": siglip.patch,
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
