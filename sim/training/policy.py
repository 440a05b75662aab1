"""Policy training: action tokens from image tokens, proprioception and words.

Invariant: a training forward computes what `OpenVLAModel` computes when it decodes the same tokens (the vision tower is
frozen and its tokens come from a cache); word embeddings stay those of the published SmolLM2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sim.training.demonstration_data import DemonstrationData, normalised, statistics
from sim.training.distillation import Teaching, distillation_loss, label_survival
from sim.training.low_rank import adapt, merge
from sim.training.settings import PolicyTraining
from sim.training.trainer import Order
from steer_runtime.policies.openvla.actions import ActionTokenizer, select_statistics
from steer_runtime.policies.openvla.model import OpenVLAModel
from steer_runtime.policies.openvla.policy import prompt_text

_SCORED = 512
"""Held-out samples that a validation scores, spread evenly."""
_LAYERS = "model.language_model.model.layers"


class PolicyNet(nn.Module):
    """The policy and, apart from its frozen word embeddings, the rows of its action tokens.

    action_rows [n_bins, d_model]: embedding and unembedding of the action tokens, in order of their ids.
    """

    def __init__(self, model: OpenVLAModel, settings: PolicyTraining) -> None:
        super().__init__()
        self.model = model
        self.low = model.config.usable_vocab - model.config.n_bins
        model.requires_grad_(False)
        table = model.language_model.model.embed_tokens.weight
        self.action_rows = nn.Parameter(table[self.low : model.config.usable_vocab].detach().clone())
        model.projector.requires_grad_(True)
        if model.state_encoder is not None:
            model.state_encoder.requires_grad_(True)
            model.state_encoder.mean.requires_grad_(False)
            model.state_encoder.scale.requires_grad_(False)
        lm = settings.language_model
        decoder = model.language_model.model
        if lm.mode == "low_rank":
            adapt(decoder.layers, lm.adapted, lm.rank)
        else:
            for part in (decoder.layers, decoder.norm):
                part.requires_grad_(True)
            for name, parameter in decoder.named_parameters():
                if any(re.search(pattern, name) for pattern in lm.frozen):
                    parameter.requires_grad_(False)
        decoder.embed_tokens.weight.requires_grad_(False)

    def forward(
        self, tokens: Tensor, states: Tensor, prompts: Sequence[Sequence[int]], targets: Tensor, noise: float = 0.0
    ) -> Tensor:
        """Logits [B, T, n_bins] in order of ids, after each of the tokens before it was the right one.

        tokens [B, P, hidden] of the tower, states [B, STATE_SIZE], prompts: ids with BOS first, targets int64 [B, T] rows
        of action_rows. noise: standard deviation added to all embeddings, in units of the word embeddings' own.
        """
        decoder = self.model.language_model.model
        bos = torch.tensor([[prompt[0]] for prompt in prompts])
        longest = max(len(p) for p in prompts) - 1
        rest = torch.tensor([[0] * (longest - len(p) + 1) + list(p[1:]) for p in prompts])
        real = torch.tensor([[0] * (longest - len(p) + 1) + [1] * (len(p) - 1) for p in prompts])
        parts = [decoder.embed_tokens(bos), self.model.projector(tokens)]
        if self.model.state_encoder is not None:
            parts.append(self.model.state_encoder(states))
        seen = sum(part.shape[1] for part in parts)
        parts += [decoder.embed_tokens(rest), self.action_rows[targets[:, :-1]]]
        embeddings = torch.cat(parts, 1)
        if noise:
            spread = decoder.embed_tokens.weight[: self.low].std()
            embeddings = embeddings + noise * spread * torch.randn_like(embeddings)
        ones = torch.ones(len(prompts), seen, dtype=torch.long)
        mask = torch.cat((ones, real, torch.ones_like(targets[:, :-1])), 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        hidden = decoder(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return hidden[:, -targets.shape[1] :] @ self.action_rows.T

    def words(self, ids: Tensor) -> Tensor:
        """Next-token logits [B, L - 1, words] on plain text ids [B, L]."""
        decoder = self.model.language_model.model
        hidden = decoder(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        return hidden @ decoder.embed_tokens.weight[: self.low].T

    @torch.no_grad()
    def settle(self) -> OpenVLAModel:
        """The finished policy: adaptations folded, action rows in the embedding. Training cannot go on after it."""
        merge(self.model)
        table = self.model.language_model.model.embed_tokens.weight
        table[self.low : self.low + len(self.action_rows)] = self.action_rows
        return self.model.requires_grad_(False).eval()


class PolicySubject:
    """A policy, demonstrations to learn from and demonstrations to score it on.

    loss = sum over action tokens of CE(softmax(-(b - y)^2 / (2 s^2)) over bins b, logits), gripper tokens weighted, plus
    the distillation on every so many steps.
    """

    def __init__(
        self,
        settings: PolicyTraining,
        model: OpenVLAModel,
        tokenizer: Any,
        data: DemonstrationData,
        held_out: Mapping[str, DemonstrationData],
        *,
        teaching: Teaching | None = None,
        origin: Mapping[str, str] | None = None,
    ) -> None:
        """origin: name -> hash of the weights that `model` brings along."""
        self._settings, self._data, self._held_out, self._teaching = settings, data, dict(held_out), teaching
        self._origin = dict(origin or {})
        torch.manual_seed(settings.seed)
        config = model.config
        self.table = statistics(data, settings.suite)
        self._statistics = select_statistics(self.table, settings.suite, "the demonstrations")
        if model.state_encoder is not None:
            with torch.no_grad():
                model.state_encoder.mean.copy_(data.states.mean(0))
                model.state_encoder.scale.copy_(data.states.std(0).clamp(min=1e-3))
        self._down_before = [layer.mlp.down_proj.weight.detach().clone() for layer in model.language_model.model.layers]
        self.net = PolicyNet(model, settings)
        self.module: nn.Module = self.net
        self._tokenizer = ActionTokenizer(config.usable_vocab, config.n_bins)
        self._rows = {name: self._targets(part) for name, part in {"train": data, **self._held_out}.items()}
        self._prompts = {
            name: [_prompt(tokenizer, config.lm.bos_token_id, words) for words in part.instructions]
            for name, part in {"train": data, **self._held_out}.items()
        }
        self._order = Order(len(data), settings.batch, settings.seed)
        self._texts = (
            Order(len(teaching.ids), settings.distillation.batch, settings.seed + 1) if teaching is not None else None
        )

    def fingerprint(self) -> Mapping[str, str]:
        taught = self._teaching.digest if self._teaching is not None else ""
        return {"demonstrations_sha256": self._data.digest, "teaching_sha256": taught, **self._origin}

    def rate(self, name: str) -> float:
        return self._settings.language_model.rate if "language_model" in name else 1.0

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        s = self._settings
        indices = self._order.indices(step)
        states = self._data.states[indices]
        assert self.net.model.state_encoder is not None
        states = states + s.state_noise * self.net.model.state_encoder.scale * torch.randn_like(states)
        # The gripper command is a sign; noise would only teach to ignore it.
        states[:, -1] = self._data.states[indices, -1]
        targets = self._rows["train"][indices]
        logits = self.net(
            self._data.tokens[indices].float(), states, self._spoken("train", indices), targets, s.embedding_noise
        )
        action = action_loss(logits, targets, s.smoothing, s.gripper_weight)
        parts = {"action": float(action.detach())}
        total = action
        spec = s.distillation
        if self._teaching is not None and self._texts is not None and spec.weight and step % spec.every == 0:
            texts = self._texts.indices(step // spec.every)
            words = self.net.words(self._teaching.ids[texts])
            distilled = distillation_loss(words, self._teaching.top[texts], self._teaching.chance[texts])
            parts["distillation"] = float(distilled.detach())
            total = total + spec.weight * distilled
        return total, parts

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """Teacher-forced scores: bin_error (bins, mean over motion), action_error (share of full scale), gripper (share
        right), each held-out set; label_survival, mean over layers."""
        self.module.eval()
        scores: dict[str, float] = {}
        for name, data in self._held_out.items():
            chosen = torch.linspace(0, len(data) - 1, min(_SCORED, len(data))).long()
            found = []
            for indices in chosen.split(32):
                targets = self._rows[name][indices]
                logits = self.net(
                    data.tokens[indices].float(), data.states[indices], self._spoken(name, indices), targets
                )
                found.append(logits.argmax(-1).unflatten(1, (-1, 7)))
            rows, right = torch.cat(found), self._rows[name][chosen].unflatten(1, (-1, 7))
            error = (rows - right).abs().float()
            half = self.net.action_rows.shape[0] / 2
            scores[f"{name}/bin_error"] = float(error[..., :6].mean())
            scores[f"{name}/action_error"] = float(error[..., :6].mean() / half)
            scores[f"{name}/gripper"] = float(((rows[..., 6] < half / 2) == (right[..., 6] < half / 2)).float().mean())
        scores["label_survival"] = self.label_survival()
        return scores

    @torch.no_grad()
    def label_survival(self) -> float:
        """Mean over layers of `distillation.label_survival`, on every eighth value vector."""
        decoder = self.net.model.language_model.model
        words = decoder.embed_tokens.weight[: self.net.low]
        shares = [
            label_survival(before[:, ::8], layer.mlp.down_proj.weight[:, ::8], words)
            for before, layer in zip(self._down_before, decoder.layers, strict=True)
            if not torch.equal(before, layer.mlp.down_proj.weight)
        ]
        unchanged = len(self._down_before) - len(shares)
        return (sum(shares) + unchanged) / len(self._down_before)

    def _targets(self, data: DemonstrationData) -> Tensor:
        """int64 [N, 7 * chunk]: rows of the action tokens."""
        ids = self._tokenizer.encode(normalised(data.actions, self._statistics).reshape(-1))
        return torch.from_numpy(ids - self.net.low).reshape(len(data), -1)

    def _spoken(self, name: str, indices: Tensor) -> list[list[int]]:
        data = self._data if name == "train" else self._held_out[name]
        return [self._prompts[name][int(e)] for e in data.episode[indices]]


def action_loss(logits: Tensor, targets: Tensor, smoothing: float, gripper_weight: float) -> Tensor:
    """Cross-entropy to a Gaussian of width `smoothing` bins around the right bin, mean over tokens.

    logits [B, T, n_bins], targets int64 [B, T]; every seventh token is the gripper's, with its own weight.
    """
    bins = torch.arange(logits.shape[-1])
    soft = torch.softmax(-((bins - targets[..., None]) ** 2) / (2 * smoothing**2), -1)
    losses = -(soft * torch.log_softmax(logits, -1)).sum(-1)
    weight = torch.ones(7)
    weight[6] = gripper_weight
    weight = weight.repeat(targets.shape[1] // 7)
    return (losses * weight).sum() / (weight.sum() * len(losses))


def _prompt(tokenizer: Any, bos: int, instruction: str) -> list[int]:
    return [bos, *tokenizer.encode(prompt_text(instruction), add_special_tokens=False)]
