"""The OpenVLA network on transformers' own layers: the vision, a projector, a Llama, greedy decoding.

Invariant: one inference is one vision pass and exactly `config.forwards` language-model forwards (the published model: 7),
and every token that enters the language model passes `embedding_entry` first, so that a hook there sees the whole
sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.dinov2_with_registers.configuration_dinov2_with_registers import Dinov2WithRegistersConfig
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersEmbeddings,
    Dinov2WithRegistersLayer,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipVisionEmbeddings

from steer_runtime.policies.objects.heatmap import HeatmapTower
from steer_runtime.policies.objects.proprioception import StateEncoder
from steer_runtime.policies.objects.tokens import ObjectProjector, named
from steer_runtime.policies.openvla.config import OpenVLAConfig
from steer_runtime.types import Role

Announce = Callable[[list[Role]], None]


class DinoTower(nn.Module):
    """DINOv2 with registers: [B, 3, S, S] -> [B, patches, hidden], block depth - 2, prefix tokens dropped, no norm."""

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__()
        vit = config.vits[0]
        hf = Dinov2WithRegistersConfig(
            hidden_size=vit.hidden,
            num_hidden_layers=vit.depth,
            num_attention_heads=vit.heads,
            mlp_ratio=vit.mlp // vit.hidden,
            num_register_tokens=vit.registers,
            image_size=config.image_size,
            patch_size=config.patch,
            layer_norm_eps=1e-6,
        )
        hf._attn_implementation = "sdpa"
        self.prefix = 1 + vit.registers
        self.embeddings = Dinov2WithRegistersEmbeddings(hf)
        self.layers = nn.ModuleList(Dinov2WithRegistersLayer(hf) for _ in range(vit.depth - 1))

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.embeddings(pixels)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden[:, self.prefix :]


class SiglipTower(nn.Module):
    """SigLIP: [B, 3, S, S] -> [B, patches, hidden], output of block depth - 2, no norm, exact GELU."""

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__()
        vit = config.vits[1]
        hf = SiglipVisionConfig(
            hidden_size=vit.hidden,
            intermediate_size=vit.mlp,
            num_hidden_layers=vit.depth,
            num_attention_heads=vit.heads,
            image_size=config.image_size,
            patch_size=config.patch,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        )
        hf._attn_implementation = "sdpa"
        self.embeddings = SiglipVisionEmbeddings(hf)
        self.layers = nn.ModuleList(SiglipEncoderLayer(hf) for _ in range(vit.depth - 1))

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.embeddings(pixels)
        for layer in self.layers:
            hidden = layer(hidden, None)
        return hidden


class Projector(nn.Module):
    """Patch features to the language model: fc3(gelu(fc2(gelu(fc1(x))))), exact GELU, first width 4x the input's."""

    def __init__(self, vision: int, d_model: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision, 4 * vision)
        self.fc2 = nn.Linear(4 * vision, d_model)
        self.fc3 = nn.Linear(d_model, d_model)

    def forward(self, features: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.fc1(features))
        return self.fc3(nn.functional.gelu(self.fc2(hidden)))


@dataclass(frozen=True)
class Decoded:
    """One inference. tokens int64 [T], the action tokens, T = config.action_tokens; logits float32 [T, vocab_rows], or
    [T, n_bins] of the action tokens alone. said: id of each slot's word; told: float32 logits of each slot's words."""

    tokens: Tensor
    logits: Tensor
    said: tuple[int, ...]
    told: tuple[Tensor, ...]


class OpenVLAModel(nn.Module):
    """The whole network. Parameters may be constructed on the meta device; `restore_buffers` then fills the buffers."""

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__()
        self.config = config
        lm = config.lm
        if config.heatmap is not None:
            self.heatmap = HeatmapTower(config.heatmap, config.image_size)
        else:
            self.dino = DinoTower(config)
            self.siglip = SiglipTower(config)
        self.projector = (
            Projector(config.vision_width, lm.d_model)
            if config.heatmap is None
            else ObjectProjector(len(config.heatmap.classes), lm.d_model)
        )
        self.state_encoder = StateEncoder(config.state_tokens, lm.d_model) if config.state_tokens else None
        if config.parallel:
            self.action_queries = nn.Parameter(torch.randn(config.action_tokens, lm.d_model) * 0.02)
        self.embedding_entry = nn.Identity()
        self.llama_config = LlamaConfig(
            vocab_size=lm.vocab_rows,
            hidden_size=lm.d_model,
            intermediate_size=lm.d_ff,
            num_hidden_layers=lm.layers,
            num_attention_heads=lm.heads,
            num_key_value_heads=lm.kv_heads,
            rope_parameters={"rope_type": "default", "rope_theta": lm.rope_theta},
            rms_norm_eps=lm.rms_norm_eps,
            max_position_embeddings=lm.max_positions,
            tie_word_embeddings=lm.tied,
            bos_token_id=lm.bos_token_id,
        )
        self.llama_config._attn_implementation = "sdpa"
        self.language_model = LlamaForCausalLM(self.llama_config)
        if lm.tied:
            self.language_model.lm_head.weight = self.language_model.model.embed_tokens.weight

    def restore_buffers(self, device: torch.device | str) -> None:
        """Recompute what is derived from the configuration and never stored: rotary frequencies, position ids."""
        with torch.device(device):
            self.language_model.model.rotary_emb = LlamaRotaryEmbedding(self.llama_config)
            if self.config.heatmap is None:
                position_ids = torch.arange(self.config.patches).expand((1, -1))
                self.siglip.embeddings.register_buffer("position_ids", position_ids, persistent=False)

    @property
    def unembedding(self) -> Tensor:
        """Token basis of the language model, [vocab_rows, d_model]."""
        return self.language_model.lm_head.weight

    def vision(self, pixels: Tensor, state: Tensor | None = None) -> Tensor:
        """Image embeddings [B, patches, d_model] of pixels [B, 6, S, S].

        Published: three channels for DINO, three for SigLIP. Small tower: three of each camera, the wrist's last; its
        tokens are told from the hand, whose state [B, STATE_SIZE] they need.
        """
        if self.config.heatmap is not None:
            assert state is not None
            return self.objects(self.heatmap(pixels), state)
        features = torch.cat((self.dino(pixels[:, :3]), self.siglip(pixels[:, 3:])), dim=2)
        return self.projector(features)

    def objects(self, geometry: Tensor, state: Tensor) -> Tensor:
        """Image embeddings [B, classes, d_model] of what the small tower sees, [B, classes, GEOMETRY]."""
        assert self.state_encoder is not None
        return self.projector(geometry, self.state_encoder.normalise(state), state[:, :3])

    def ground(self, text: Tensor, objects: Tensor, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Prompt embeddings [B, n, d_model] with the object's token added where its name ends; prompts: their ids."""
        if not self.config.names:
            return text
        return text + named(prompts, self.config.names).to(text) @ objects.to(text.dtype)

    def embed(self, pixels: Tensor, prompt_ids: Tensor, state: Tensor | None = None) -> Tensor:
        """Prefill embeddings [B, patches + state_tokens + n, d_model]: BOS, image, state, rest of the prompt ids [B, n].

        state [B, STATE_SIZE] (see `proprioception`) where the configuration has state tokens, None where it has none.
        """
        text = self.language_model.model.embed_tokens(prompt_ids)
        image = self.vision(pixels, state).to(text.dtype)
        text = self.ground(text, image, prompt_ids.tolist())
        parts = [text[:, :1], image]
        if self.state_encoder is not None:
            assert state is not None
            parts.append(self.state_encoder(state).to(text.dtype))
        return torch.cat((*parts, text[:, 1:]), dim=1)

    def prefill_roles(self, prompt_tokens: int) -> list[Role]:
        """Role of each prefill token, in order."""
        config = self.config
        seen: list[Role] = [*["image"] * config.patches, *["state"] * config.state_tokens]  # type: ignore[list-item]
        return ["text", *seen, *["text"] * (prompt_tokens - 1)]  # type: ignore[list-item]

    def forward_tokens(self, embeddings: Tensor, cache: DynamicCache | None) -> Tensor:
        """One causal language-model forward: last hidden states of the embeddings, both [B, T, d_model]."""
        entered = self.embedding_entry(embeddings)
        return self.language_model.model(
            inputs_embeds=entered, past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state

    def step(self, embeddings: Tensor, cache: DynamicCache | None, rows: slice | None = None) -> Tensor:
        """One causal language-model forward: logits [B, rows] after the last of the embeddings [B, T, d_model].

        rows: the part of the vocabulary to score, None for all of it.
        """
        return self._scores(self.forward_tokens(embeddings, cache)[:, -1], rows)

    def _scores(self, hidden: Tensor, rows: slice | None) -> Tensor:
        return (
            self.language_model.lm_head(hidden)
            if rows is None
            else nn.functional.linear(hidden, self.unembedding[rows])
        )

    def decode(
        self,
        pixels: Tensor,
        prompt_ids: Tensor,
        announce: Announce | None = None,
        *,
        state: Tensor | None = None,
        all_logits: bool = True,
    ) -> Decoded:
        """Greedy tokens and their logits, for one observation.

        pixels [1, 6, S, S], prompt_ids int64 [1, n], state as in `embed`. `announce` hears the token roles before each
        forward: said words are text. The logits are the network's own; `restrict_to_action_tokens` only narrows the
        choice of the token. With all_logits False a restricted policy scores its action tokens only: half the work of a
        pocket policy.
        """
        config = self.config
        low, high = 0, config.lm.vocab_rows
        if config.restrict_to_action_tokens:
            low, high = config.usable_vocab - config.n_bins, config.usable_vocab
        only_choices = config.restrict_to_action_tokens and not all_logits
        rows = slice(low, high) if only_choices else None
        table = self.language_model.model.embed_tokens
        cache = DynamicCache(config=self.llama_config)
        embeddings = self.embed(pixels, prompt_ids, state)
        roles: list[Role] = self.prefill_roles(prompt_ids.shape[1])

        def forward() -> Tensor:
            if announce is not None:
                announce(roles)
            return self.forward_tokens(embeddings, cache)

        said, told = [], []
        for slot in config.slots:
            hidden = forward()[:, -1]
            ids = torch.tensor(slot.ids, device=hidden.device)
            scores = nn.functional.linear(hidden, self.unembedding[ids])
            word = ids[scores.argmax(-1)]
            said.append(word)
            told.append(scores[0].float())
            embeddings, roles = table(word[:, None]), ["text"]
        if config.parallel:
            embeddings = torch.cat((embeddings, self.action_queries[None].to(embeddings.dtype)), 1)
            roles = [*roles, *["action"] * config.action_tokens]  # type: ignore[list-item]
            scores = self._scores(forward()[0, -config.action_tokens :], rows)
            choices = scores if only_choices else scores[:, low:high]
            return Decoded(choices.argmax(-1) + low, scores.float(), tuple(int(w) for w in said), tuple(told))
        tokens, logits = [], []
        for index in range(config.action_tokens):
            scores = self._scores(forward()[:, -1], rows)
            choices = scores if only_choices else scores[:, low:high]
            token = choices.argmax(dim=-1) + low
            tokens.append(token)
            logits.append(scores.float())
            if index + 1 < config.action_tokens:
                embeddings, roles = table(token[:, None]), ["action"]
        return Decoded(torch.cat(tokens), torch.cat(logits), tuple(int(w) for w in said), tuple(told))
