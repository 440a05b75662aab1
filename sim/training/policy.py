"""Policy training: words and action tokens from what is seen, what is felt and what was asked.

Invariant: a training forward computes what `OpenVLAModel` computes when it decodes the same tokens; the word embeddings
stay those of the published SmolLM2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from sim.manner import CONCEPTS, SLOTS, Manner
from sim.training.demonstration_data import DemonstrationData, normalised, statistics
from sim.training.distillation import Teaching, distillation_loss
from sim.training.low_rank import adapt, merge
from sim.training.samples import further_labels, look, others, worded
from sim.training.settings import PolicyTraining
from sim.training.trainer import Order
from steer_runtime.directions.comparison import label_survival
from steer_runtime.policies.objects.heatmap import PARTS
from steer_runtime.policies.openvla.actions import ActionTokenizer, select_statistics
from steer_runtime.policies.openvla.model import OpenVLAModel
from steer_runtime.policies.openvla.policy import prompt_text

_SCORED = 256
"""Held-out samples that a validation scores, spread evenly."""
_ACTION = 7


class Branch(NamedTuple):
    """What a batch is told and does. prompts: ids with BOS first, said int64 [B, slots]: which word, targets int64 [B, T]
    rows of action_rows; T may be less than the policy's where the tokens are decoded in parallel."""

    prompts: Sequence[Sequence[int]]
    said: Tensor
    targets: Tensor


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
        self, seen: Tensor, states: Tensor, branches: Sequence[Branch], noise: float = 0.0
    ) -> list[tuple[list[Tensor], Tensor]]:
        """For each branch each slot's logits [B, words], and the action tokens' [B, T, n_bins] in order of ids, when all
        before was right.

        seen [B, C, GEOMETRY], states [B, STATE_SIZE]. Branches share what is seen and felt and know nothing of each other:
        each is computed as if it were alone. noise: standard deviation added to all embeddings, in units of the word
        embeddings' own.
        """
        model, config = self.model, self.model.config
        decoder, count = model.language_model.model, len(states)
        assert model.state_encoder is not None
        bos = torch.full((count, 1), config.lm.bos_token_id)
        objects = model.objects(seen, states)
        parts = [decoder.embed_tokens(bos), objects, model.state_encoder(states)]
        prefix = sum(part.shape[1] for part in parts)
        real, branch = [torch.ones(count, prefix, dtype=torch.bool)], [torch.full((prefix,), -1)]
        positions = [torch.arange(prefix).expand(count, -1)]
        for number, (prompts, said, targets) in enumerate(branches):
            longest = max(len(p) for p in prompts) - 1
            ids = torch.tensor([[0] * (longest - len(p) + 1) + list(p[1:]) for p in prompts])
            words = [torch.tensor(slot.ids)[said[:, i : i + 1]] for i, slot in enumerate(config.slots)]
            acting = self.action_rows[targets[:, :-1]]
            if config.parallel:
                acting = model.action_queries[: targets.shape[1]].expand(count, -1, -1)
            text = model.ground(decoder.embed_tokens(ids), objects, ids.tolist())
            parts += [text, decoder.embed_tokens(torch.cat(words, 1)) if words else text[:, :0], acting]
            length = longest + len(words) + acting.shape[1]
            missing = torch.tensor([longest - len(p) + 1 for p in prompts])
            here = torch.arange(length)[None] >= missing[:, None]
            real.append(here)
            branch.append(torch.full((length,), number))
            positions.append((prefix + here.cumsum(1) - 1).clamp(min=0))
        embeddings = torch.cat(parts, 1)
        if noise:
            spread = decoder.embed_tokens.weight[: self.low].std()
            embeddings = embeddings + noise * spread * torch.randn_like(embeddings)
        of = torch.cat(branch)
        order = torch.arange(len(of))
        allowed = (order[:, None] >= order[None]) & ((of[None] == -1) | (of[:, None] == of[None]))
        # On a CPU and sequences this short the plain product is faster in the backward pass than the fused one.
        with sdpa_kernel(SDPBackend.MATH):
            hidden = decoder(
                inputs_embeds=embeddings,
                attention_mask=(allowed & torch.cat(real, 1)[:, None])[:, None],
                position_ids=torch.cat(positions, 1),
                use_cache=False,
            ).last_hidden_state
        out = []
        for part, (_, _, targets) in zip(
            hidden[:, prefix:].split([len(b) for b in branch[1:]], 1), branches, strict=True
        ):
            tokens, acting_length = targets.shape[1], targets.shape[1] - (0 if config.parallel else 1)
            first = part.shape[1] - acting_length - len(config.slots) - 1
            told = [
                part[:, first + i] @ decoder.embed_tokens.weight[torch.tensor(slot.ids)].T
                for i, slot in enumerate(config.slots)
            ]
            out.append((told, part[:, -tokens:] @ self.action_rows.T))
        return out

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

    A step's batch: samples with the episode's own words and whole chunk, and further labels of the same states, other
    targets or other manners, of which only the first action is known.
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
        table: Mapping[str, Any] | None = None,
    ) -> None:
        """origin: name -> hash of the weights that `model` brings along. table: dataset_statistics.json of the policy
        that `model` goes on from, whose scales are kept: its action tokens mean nothing by others."""
        self._settings, self._held_out, self._teaching = settings, dict(held_out), teaching
        self._parts = {"train": data, **self._held_out}
        self._origin = dict(origin or {})
        torch.manual_seed(settings.seed)
        config = model.config
        self.table = statistics(data, settings.suite) if table is None else dict(table)
        self._statistics = select_statistics(self.table, settings.suite, "the demonstrations")
        if table is None:
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
        seen = look(data, indices, s.seen_share, s.sight_noise)
        branches = [self._branch("train", indices, None)]
        branches += [self._branch("train", indices, chosen) for chosen in others(data, indices, s.others)]
        found = self.net(seen, states, [branch for branch, _ in branches], s.embedding_noise)
        actions = [
            action_loss(logits, branch.targets, s.smoothing, s.gripper_weight, s.value_weight)
            for (branch, _), (_, logits) in zip(branches, found, strict=True)
        ]
        # In the episode's own state the height can be seen, so an untold word is learnt from the further labels only.
        words = [
            word_loss(said, branch.said, told, self._word_weight if number else None)
            for number, ((branch, told), (said, _)) in enumerate(zip(branches, found, strict=True))
        ]
        parts = {
            "action": actions[0],
            "word": words[0],
            "other_action": torch.stack(actions[1:]).mean(),
            "other_word": torch.stack(words[1:]).mean(),
        }
        total = (parts["action"] + parts["other_action"] + s.word_weight * (parts["word"] + parts["other_word"])) / 2
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
                pairs = [self._branch(name, indices, None, 1.0), self._branch(name, indices, indices % 8, 1.0)]
                answers = self.net(seen, data.states[indices], [branch for branch, _ in pairs])
                for kind, (branch, told), (words, logits) in zip(("", "other_"), pairs, answers, strict=True):
                    found.setdefault(f"{kind}rows", []).append(logits.argmax(-1).unflatten(1, (-1, _ACTION)))
                    found.setdefault(f"{kind}right", []).append(branch.targets.unflatten(1, (-1, _ACTION)))
                    best = torch.stack([logit.argmax(-1) for logit in words], 1) if words else branch.said
                    found.setdefault("words", []).append((best == branch.said)[_mentioned(branch.said, told)].float())
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
        """Mean over layers of `comparison.label_survival`, on every eighth value vector."""
        decoder = self.net.model.language_model.model
        words = decoder.embed_tokens.weight[: self.net.low]
        shares = [
            label_survival(before[:, ::8], layer.mlp.down_proj.weight[:, ::8], words)
            for before, layer in zip(self._down_before, decoder.layers, strict=True)
            if not torch.equal(before, layer.mlp.down_proj.weight)
        ]
        unchanged = len(self._down_before) - len(shares)
        return (sum(shares) + unchanged) / len(self._down_before)

    def _branch(
        self, name: str, indices: Tensor, chosen: Tensor | None, tell: float | None = None
    ) -> tuple[Branch, Tensor]:
        """A branch and which slots [B, slots] its prompts may tell of: the samples' own labels, or the chosen further ones.

        A sample without such a label gives its own again.
        """
        data, tell = self._parts[name], self._settings.tell if tell is None else tell
        spoken, manners, targets = data.spoken[indices], data.manners[indices], self._rows[name][indices].flatten(1)
        if chosen is not None:
            further = further_labels(data, indices, chosen)
            spoken, manners = further.spoken, further.manners
            rows = self._other_rows[name][indices, further.column]
            targets = torch.where(further.there[:, None], rows, targets[:, :_ACTION])
        told = torch.rand(len(indices), len(SLOTS)) < tell
        prompts = [self._prompt(name, int(t), m, d) for t, m, d in zip(spoken, manners, told, strict=True)]
        return Branch(prompts, manners, targets), told

    def _prompt(self, name: str, spoken: int, manner: Tensor, told: Tensor) -> list[int]:
        """Ids of an instruction in a wording that says the told slots of the manner."""
        text = prompt_text(self.net.model.config, worded(self._parts[name].instructions[spoken], manner, told))
        return [self._bos, *self._tokenizer.encode(text, add_special_tokens=False)]

    def _targets(self, actions: Tensor) -> Tensor:
        """int64 [..., 7] of actions [..., 7]: rows of the action tokens."""
        ids = self._actions.encode(normalised(actions, self._statistics).reshape(-1))
        return torch.from_numpy(ids - self.net.low).reshape(actions.shape)


def action_loss(
    logits: Tensor, targets: Tensor, smoothing: float, gripper_weight: float, value_weight: float = 0.0
) -> Tensor:
    """Cross-entropy to a Gaussian of width `smoothing` bins around the right bin, mean over tokens.

    logits [B, T, n_bins], targets int64 [B, T]; every seventh token is the gripper's, with its own weight. value_weight: of
    |mean bin - right bin| in shares of full scale, whose gradient tells far from near, which the cross-entropy does not.
    """
    bins = torch.arange(logits.shape[-1])
    soft = torch.softmax(-((bins - targets[..., None]) ** 2) / (2 * smoothing**2), -1)
    chance = torch.log_softmax(logits.float(), -1)
    losses = -(soft * chance).sum(-1)
    if value_weight:
        mean = (chance.exp() * bins).sum(-1)
        losses = losses + value_weight * (mean - targets).abs() / (len(bins) / 2)
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


def word_weights(data: DemonstrationData, tell: float, odds: float = 3.0) -> list[Tensor]:
    """A slot's weights [words] that make plain `odds` times as likely as any other word where a prompt says nothing.

    So an untold manner is plain by a margin of log(odds), whatever the slot: what a prompt leaves open, steering may decide.
    """
    manners = data.other_manners[data.other_spoken >= 0]
    out = []
    for i, (slot, default) in enumerate(zip(SLOTS.values(), astuple(Manner()), strict=True)):
        count = torch.bincount(manners[:, i], minlength=len(slot)).float()
        levels = torch.tensor([astuple(Manner()) for _ in slot])
        levels[:, i] = torch.arange(len(slot))
        silent = 1.0 - tell * _mentioned(levels, torch.ones_like(levels, dtype=torch.bool))[:, i].float()
        share = count * silent / (count * silent).sum()
        wanted = torch.ones(len(slot))
        wanted[default] = odds
        wanted /= wanted.sum()
        out.append(torch.where(share > 0, wanted / share.clamp(min=1e-6), 0.0))
    return out


def _mentioned(manners: Tensor, told: Tensor) -> Tensor:
    """bool [B, slots]: whether the prompt says this slot: it is told, and the word is one that prompts can say."""
    sayable = [torch.tensor([i in CONCEPTS[slot] for i in range(len(words))]) for slot, words in SLOTS.items()]
    return torch.stack([can[manners[:, i]] for i, can in enumerate(sayable)], 1) & told


@torch.no_grad()
def _set_scales(model: OpenVLAModel, data: DemonstrationData) -> None:
    """The parameters that are set from the data and not trained."""
    assert model.state_encoder is not None
    model.state_encoder.mean.copy_(data.states.mean(0))
    model.state_encoder.scale.copy_(data.states.std(0).clamp(min=1e-3))
    _, position, present, *_ = data.exact.split(PARTS, -1)
    model.projector.get_parameter("centre").copy_(position[present[..., 0] > 0].mean(0))
