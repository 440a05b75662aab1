"""Policy training: words and action tokens from what is seen, what is felt and what was asked.

Invariant: a training forward computes what `OpenVLAModel` computes when it decodes the same tokens; the word embeddings
stay those of the published SmolLM2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from sim.manner import SLOTS, Manner
from sim.training.demonstration_data import DemonstrationData, normalised, statistics
from sim.training.distillation import Teaching, distillation_loss, label_survival
from sim.training.low_rank import adapt, merge
from sim.training.settings import PolicyTraining
from sim.training.trainer import Order
from sim.wordings import instruction_for
from steer_runtime.policies.openvla.actions import ActionTokenizer, select_statistics
from steer_runtime.policies.openvla.model import OpenVLAModel
from steer_runtime.policies.openvla.policy import prompt_text
from steer_runtime.policies.openvla.vision_heatmap import geometry

_SCORED = 512
"""Held-out samples that a validation scores, spread evenly."""
_ACTION = 7
_OUTLIER = 0.05
"""Standard deviation of a badly seen object's position, m."""


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
        if model.config.heatmap is not None:
            model.projector.centre.requires_grad_(False)
        if model.config.parallel:
            model.action_queries.requires_grad_(True)
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
        self,
        seen: Tensor,
        states: Tensor,
        prompts: Sequence[Sequence[int]],
        said: Tensor,
        targets: Tensor,
        noise: float = 0.0,
    ) -> tuple[list[Tensor], Tensor]:
        """Each slot's logits [B, words], and the action tokens' [B, T, n_bins] in order of ids, when all before was right.

        seen [B, C, GEOMETRY], states [B, STATE_SIZE], prompts: ids with BOS first, said int64 [B, slots]: which word,
        targets int64 [B, T] rows of action_rows; T may be less than the policy's where the tokens are decoded in parallel.
        noise: standard deviation added to all embeddings, in units of the word embeddings' own.
        """
        model, config = self.model, self.model.config
        decoder = model.language_model.model
        assert model.state_encoder is not None
        tokens = targets.shape[1]
        longest = max(len(p) for p in prompts) - 1
        ids = torch.tensor([[0] * (longest - len(p) + 1) + list(p[1:]) for p in prompts])
        real = torch.tensor([[0] * (longest - len(p) + 1) + [1] * (len(p) - 1) for p in prompts])
        bos = torch.tensor([[prompt[0]] for prompt in prompts])
        words = [torch.tensor(slot.ids)[said[:, i : i + 1]] for i, slot in enumerate(config.slots)]
        acting = self.action_rows[targets[:, :-1]]
        if config.parallel:
            acting = model.action_queries[:tokens].expand(len(prompts), -1, -1)
        parts = [decoder.embed_tokens(bos), model.objects(seen, states), model.state_encoder(states)]
        parts += [decoder.embed_tokens(torch.cat((ids, *words), 1)), acting]
        embeddings = torch.cat(parts, 1)
        if noise:
            spread = decoder.embed_tokens.weight[: self.low].std()
            embeddings = embeddings + noise * spread * torch.randn_like(embeddings)
        before = torch.ones(len(prompts), sum(part.shape[1] for part in parts[:3]), dtype=torch.long)
        after = torch.ones(len(prompts), len(words) + acting.shape[1], dtype=torch.long)
        mask = torch.cat((before, real, after), 1)
        # On a CPU and sequences this short the plain product is faster in the backward pass than the fused one.
        with sdpa_kernel(SDPBackend.MATH):
            hidden = decoder(
                inputs_embeds=embeddings,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
            ).last_hidden_state
        first = hidden.shape[1] - acting.shape[1] - len(words) - 1
        told = [
            hidden[:, first + i] @ decoder.embed_tokens.weight[torch.tensor(slot.ids)].T
            for i, slot in enumerate(config.slots)
        ]
        return told, hidden[:, -tokens:] @ self.action_rows.T

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

    A step's batch: samples with the episode's own words and whole chunk, and as many further labels of the same states,
    other targets or other manners, of which only the first action is known.
    loss = CE of the action tokens to softmax(-(b - y)^2 / (2 s^2)) over bins b, gripper tokens weighted,
    + word_weight * CE of the said words, + the distillation on every so many steps.
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
        self._settings, self._held_out, self._teaching = settings, dict(held_out), teaching
        self._parts = {"train": data, **self._held_out}
        self._origin = dict(origin or {})
        torch.manual_seed(settings.seed)
        config = model.config
        self.table = statistics(data, settings.suite)
        self._statistics = select_statistics(self.table, settings.suite, "the demonstrations")
        if not self._origin.get("start_sha256"):
            _set_scales(model, data)
        self._down_before = [layer.mlp.down_proj.weight.detach().clone() for layer in model.language_model.model.layers]
        self.net = PolicyNet(model, settings)
        self.module: nn.Module = self.net
        self._tokenizer, self._bos = tokenizer, config.lm.bos_token_id
        self._actions = ActionTokenizer(config.usable_vocab, config.n_bins)
        self._rows = {name: self._targets(part.actions) for name, part in self._parts.items()}
        self._other_rows = {name: self._targets(part.other_actions) for name, part in self._parts.items()}
        self._word_weight = word_weights(data, settings.tell)
        self._order = Order(len(data), settings.batch, settings.seed)
        self._texts = (
            Order(len(teaching.ids), settings.distillation.batch, settings.seed + 1) if teaching is not None else None
        )

    def fingerprint(self) -> Mapping[str, str]:
        taught = self._teaching.digest if self._teaching is not None else ""
        return {"demonstrations_sha256": self._parts["train"].digest, "teaching_sha256": taught, **self._origin}

    def rate(self, name: str) -> float:
        return self._settings.language_model.rate if "language_model" in name else 1.0

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        s, data = self._settings, self._parts["train"]
        indices = self._order.indices(step)
        encoder = self.net.model.state_encoder
        assert encoder is not None
        states = data.states[indices]
        states = states + s.state_noise * encoder.scale * torch.randn_like(states)
        # The gripper command is a sign; noise would only teach to ignore it.
        states[:, -1] = data.states[indices, -1]
        seen = self._look(indices)
        told = torch.rand(len(indices), len(SLOTS)) < s.tell
        prompts = [
            self._prompt("train", int(data.spoken[i]), data.manners[i], told[row])
            for row, i in enumerate(indices.tolist())
        ]
        targets = self._rows["train"][indices].flatten(1)
        words, logits = self.net(seen, states, prompts, data.manners[indices], targets, s.embedding_noise)
        action = action_loss(logits, targets, s.smoothing, s.gripper_weight)
        # In the episode's own state the height can be seen, so an untold word is learnt from the further labels only.
        word = word_loss(words, data.manners[indices], told, None)

        chosen = self._others("train", indices)
        there = (data.other_spoken[indices, chosen] >= 0).nonzero()[:, 0]
        indices, chosen = indices[there], chosen[there]
        manners = data.other_manners[indices, chosen]
        told = torch.rand(len(indices), len(SLOTS)) < s.tell
        prompts = [
            self._prompt("train", int(data.other_spoken[i, k]), manners[row], told[row])
            for row, (i, k) in enumerate(zip(indices.tolist(), chosen.tolist(), strict=True))
        ]
        targets = self._other_rows["train"][indices, chosen]
        words, logits = self.net(seen[there], states[there], prompts, manners, targets, s.embedding_noise)
        other = action_loss(logits, targets, s.smoothing, s.gripper_weight)
        other_word = word_loss(words, manners, told, self._word_weight)
        parts = {"action": action, "word": word, "other_action": other, "other_word": other_word}
        total = (action + other) / 2 + s.word_weight * (word + other_word) / 2
        spec = s.distillation
        if self._teaching is not None and self._texts is not None and spec.weight and step % spec.every == 0:
            texts = self._texts.indices(step // spec.every)
            written = self.net.words(self._teaching.ids[texts])
            distilled = distillation_loss(written, self._teaching.top[texts], self._teaching.chance[texts])
            parts["distillation"] = distilled
            total = total + spec.weight * distilled
        return total, {name: float(part.detach()) for name, part in parts.items()}

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """Scores with the right words, each held-out set, own chunk and (other_) first action of another target or manner:
        bin_error (bins, mean over motion), action_error (share of full scale), gripper (share right); words (share of the
        words that the prompt tells); label_survival, mean over layers."""
        self.module.eval()
        scores: dict[str, float] = {}
        for name, data in self._held_out.items():
            every = torch.linspace(0, len(data) - 1, min(_SCORED, len(data))).long()
            found: dict[str, list[Tensor]] = {}
            for indices in every.split(32):
                seen = torch.where(data.seen[indices].isnan(), data.exact[indices], data.seen[indices])
                chosen = self._others(name, indices)
                there = data.other_spoken[indices, chosen] >= 0
                chosen = torch.where(there, chosen, 0)
                for kind, spoken, manners, targets in (
                    ("", data.spoken[indices], data.manners[indices], self._rows[name][indices].flatten(1)),
                    (
                        "other_", data.other_spoken[indices, chosen], data.other_manners[indices, chosen],
                        self._other_rows[name][indices, chosen],
                    ),
                ):  # fmt: skip
                    told = torch.ones(len(indices), len(SLOTS), dtype=torch.bool)
                    prompts = [self._prompt(name, int(t), m, d) for t, m, d in zip(spoken, manners, told, strict=True)]
                    words, logits = self.net(seen, data.states[indices], prompts, manners, targets)
                    found.setdefault(f"{kind}rows", []).append(logits.argmax(-1).unflatten(1, (-1, _ACTION)))
                    found.setdefault(f"{kind}right", []).append(targets.unflatten(1, (-1, _ACTION)))
                    mentioned = _mentioned(manners, told)
                    best = torch.stack([logit.argmax(-1) for logit in words], 1) if words else manners
                    found.setdefault("words", []).append((best == manners)[mentioned].float())
            half = self.net.action_rows.shape[0] / 2
            for kind in ("", "other_"):
                rows, right = torch.cat(found[f"{kind}rows"]), torch.cat(found[f"{kind}right"])
                error = (rows - right).abs().float()
                scores[f"{name}/{kind}bin_error"] = float(error[..., :6].mean())
                scores[f"{name}/{kind}action_error"] = float(error[..., :6].mean() / half)
                same = (rows[..., 6] < half / 2) == (right[..., 6] < half / 2)
                scores[f"{name}/{kind}gripper"] = float(same.float().mean())
            scores[f"{name}/words"] = float(torch.cat(found["words"]).mean())
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

    def _look(self, indices: Tensor) -> Tensor:
        """What the policy is shown: the tower's view, or the exact one with errors like the tower's."""
        data, s = self._parts["train"], self._settings
        exact, seen = data.exact[indices], data.seen[indices]
        blurred = disturbed(exact, s.sight_noise)
        use = (torch.rand(len(indices)) < s.seen_share) & ~seen.isnan().flatten(1).any(1)
        return torch.where(use[:, None, None], seen.nan_to_num(), blurred)

    def _others(self, name: str, indices: Tensor) -> Tensor:
        """int64 [B]: one further label of each sample, by torch's generator in training."""
        data = self._parts[name]
        count = (data.other_spoken[indices] >= 0).sum(1).clamp(min=1)
        if name == "train":
            return (torch.rand(len(indices)) * count).long()
        return indices % count

    def _prompt(self, name: str, spoken: int, manner: Tensor, told: Tensor) -> list[int]:
        """Ids of an instruction in a wording that says the told slots of the manner."""
        plain = astuple(Manner())
        levels = [int(m) if bool(t) else p for m, t, p in zip(manner, told, plain, strict=True)]
        seed = int(torch.randint(2**31, ()))
        words = instruction_for(self._parts[name].instructions[spoken], Manner(*levels).concepts(), seed)
        text = prompt_text(self.net.model.config, words)
        return [self._bos, *self._tokenizer.encode(text, add_special_tokens=False)]

    def _targets(self, actions: Tensor) -> Tensor:
        """int64 [..., 7] of actions [..., 7]: rows of the action tokens."""
        ids = self._actions.encode(normalised(actions, self._statistics).reshape(-1))
        return torch.from_numpy(ids - self.net.low).reshape(actions.shape)


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


def word_loss(words: Sequence[Tensor], manners: Tensor, told: Tensor, weights: Sequence[Tensor] | None) -> Tensor:
    """Cross-entropy of each slot's logits [B, words] to the manner's word, mean over samples and slots.

    A slot that the prompt tells of counts once. One that it does not counts with weights[slot][word], or not at all.
    """
    if not words:
        return manners.new_zeros((), dtype=torch.float32)
    mentioned = _mentioned(manners, told)
    losses = []
    for i, logits in enumerate(words):
        weight = mentioned[:, i].float()
        if weights is not None:
            weight = torch.where(mentioned[:, i], 1.0, weights[i][manners[:, i]])
        losses.append((weight * functional.cross_entropy(logits, manners[:, i], reduction="none")).mean())
    return torch.stack(losses).mean()


def word_weights(data: DemonstrationData, tell: float, plain: float = 0.6) -> list[Tensor]:
    """A slot's weights [words] that make plain's share `plain` where a prompt says nothing, the rest even.

    So an untold manner is plain by default, and another word takes little: what a prompt leaves open, steering may decide.
    """
    manners = data.other_manners[data.other_spoken >= 0]
    out = []
    for i, (slot, default) in enumerate(zip(SLOTS.values(), astuple(Manner()), strict=True)):
        count = torch.bincount(manners[:, i], minlength=len(slot)).float()
        levels = torch.tensor([astuple(Manner()) for _ in slot])
        levels[:, i] = torch.arange(len(slot))
        silent = 1.0 - tell * _mentioned(levels, torch.ones_like(levels, dtype=torch.bool))[:, i].float()
        share = count * silent / (count * silent).sum()
        wanted = torch.full((len(slot),), (1 - plain) / (len(slot) - 1))
        wanted[default] = plain
        out.append(torch.where(share > 0, wanted / share.clamp(min=1e-6), 0.0))
    return out


def _mentioned(manners: Tensor, told: Tensor) -> Tensor:
    """bool [B, slots]: prompts say the ends of the slots only (`Manner.concepts`)."""
    ends = torch.zeros_like(told)
    ends[:, 0] = (manners[:, 0] == 0) | (manners[:, 0] == len(SLOTS["pace"]) - 1)
    ends[:, 1] = manners[:, 1] == len(SLOTS["height"]) - 1
    ends[:, 2] = manners[:, 2] == 0
    return ends & told


def disturbed(exact: Tensor, size: float) -> Tensor:
    """Geometry [B, C, GEOMETRY] with errors as a tower makes them; size: of a position, m, one object in 25 far worse."""
    place, position, present, wrist_place, wrist_present = exact.split((2, 3, 1, 2, 1), -1)
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
    )


@torch.no_grad()
def _set_scales(model: OpenVLAModel, data: DemonstrationData) -> None:
    """The parameters that are set from the data and not trained."""
    assert model.state_encoder is not None
    model.state_encoder.mean.copy_(data.states.mean(0))
    model.state_encoder.scale.copy_(data.states.std(0).clamp(min=1e-3))
    there = data.exact[..., 5] > 0
    centre = model.projector.get_parameter("centre")
    centre.copy_(data.exact[..., 2:5][there].mean(0))
