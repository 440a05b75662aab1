"""Expert training: flow matching of whole chunks on the frozen prefix's keys and values.

    x_t = t noise + (1 - t) a,  loss = |v(x_t, t) - (noise - a)|^2,  t = 0.001 + 0.999 Beta(1.5, 1)
                                                              (Black et al. 2024, arXiv 2410.24164, appendix B; openpi)

Invariant: a training forward computes what `denoise` computes of the same tokens; the prefix learns nothing, so that what
its token basis says of it stays true (knowledge insulation, Driess et al. 2025, arXiv 2505.23705).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sim.manner import SLOTS
from sim.training.demonstration_data import DemonstrationData
from sim.training.pi0_assembly import ACTION, learns
from sim.training.samples import further_labels, look, others, worded
from sim.training.settings import ExpertTraining
from sim.training.trainer import Order
from steer_runtime.policies.pi0.network import Pi0Network, Prefix, PrefixCache
from steer_runtime.policies.pi0.policy import GRIPPER
from steer_runtime.policies.pi0.prompt import batch, text_ids

_SCORED = 256
"""Held-out samples that a validation scores, spread evenly."""
_NARROWEST = 0.05
"""Least standard deviation of an action's dimension: one that hardly moves is not to turn noise into full scale."""
_ALPHA, _FLOOR = 1.5, 0.001


class Asked(NamedTuple):
    """A prompt of each sample and the actions it asks for. ids int64, mask bool [B, P]; actions float32 [B, chunk, 7],
    normalised; known float32 [B, chunk]: 1 where an action is a label, 0 where it only fills."""

    ids: Tensor
    mask: Tensor
    actions: Tensor
    known: Tensor


class ExpertSubject:
    """A Pi0's expert, demonstrations to learn from and demonstrations to score it on.

    A step's batch: samples with their episode's own words and whole chunk, and `others` further labels of the same
    states, other targets or manners, of which only the first action is known: the rest of their chunk repeats it and
    does not count.
    """

    def __init__(
        self,
        settings: ExpertTraining,
        network: Pi0Network,
        tokenizer: Any,
        data: DemonstrationData,
        held_out: Mapping[str, DemonstrationData],
        *,
        origin: Mapping[str, str] | None = None,
    ) -> None:
        """origin: name -> hash of the weights that `network` brings along."""
        self._settings, self._held_out, self._tokenizer = settings, dict(held_out), tokenizer
        self._parts = {"train": data, **self._held_out}
        self._origin = dict(origin or {})
        self.network = network
        self.module: nn.Module = network
        network.requires_grad_(False)
        for parameter in learns(network).values():
            parameter.requires_grad_(True)
        self.table = norm_stats(data)
        state, action = self.table["norm_stats"]["state"], self.table["norm_stats"]["actions"]
        self._state = torch.tensor(state["mean"]), torch.tensor(state["std"])
        self._action = torch.tensor(action["mean"]), torch.tensor(action["std"])
        self._order = Order(len(data), settings.batch, settings.seed)

    def fingerprint(self) -> Mapping[str, str]:
        return {"demonstrations_sha256": self._parts["train"].digest, **self._origin}

    def rate(self, name: str) -> float:
        return 1.0

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        s, data = self._settings, self._parts["train"]
        indices = self._order.indices(step)
        _, scale = self._state
        felt = data.states[indices] + s.state_noise * scale * torch.randn(len(indices), len(scale))
        # The gripper command is a sign; noise would only teach to ignore it.
        felt[:, -1] = data.states[indices, -1]
        seen = look(data, indices, s.seen_share, s.sight_noise)
        asked = [self._ask("train", indices, None, s.tell)]
        asked += [self._ask("train", indices, chosen, s.tell) for chosen in others(data, indices, s.others)]
        errors = self._flow_errors(asked, seen, felt)
        losses = [self._weighed(error, branch) for error, branch in zip(errors, asked, strict=True)]
        parts = {"action": losses[0]}
        total = losses[0]
        if s.others:
            parts["other_action"] = torch.stack(losses[1:]).mean()
            total = (total + s.other_weight * parts["other_action"]) / (1 + s.other_weight)
        return total, {name: float(part.detach()) for name, part in parts.items()}

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """Denoised from one fixed noise a sample, each held-out set: own chunk and (other_) first action of another target
        or manner; action_error (mean over motion, share of a full action), gripper (share right)."""
        self.network.eval()
        scores: dict[str, float] = {}
        for name, data in self._held_out.items():
            every = torch.linspace(0, len(data) - 1, min(_SCORED, len(data))).long()
            found: dict[str, list[Tensor]] = {}
            for indices in every.split(32):
                seen = torch.where(data.seen[indices].isnan(), data.exact[indices], data.seen[indices])
                for kind, chosen in (("", None), ("other_", indices % 8)):
                    asked = self._ask(name, indices, chosen, 1.0)
                    got, right = (
                        self._actions(a) for a in (self._denoised(asked, seen, data.states[indices]), asked.actions)
                    )
                    real = asked.known > 0
                    found.setdefault(f"{kind}error", []).append((got - right).abs()[..., :GRIPPER][real])
                    found.setdefault(f"{kind}same", []).append(((got * right)[..., GRIPPER] > 0)[real].float())
            for kind in ("", "other_"):
                scores[f"{name}/{kind}action_error"] = float(torch.cat(found[f"{kind}error"]).mean())
                scores[f"{name}/{kind}gripper"] = float(torch.cat(found[f"{kind}same"]).mean())
        return scores

    def _ask(self, name: str, indices: Tensor, chosen: Tensor | None, tell: float) -> Asked:
        data, config = self._parts[name], self.network.config
        spoken, manners = data.spoken[indices], data.manners[indices]
        actions, known = data.actions[indices], torch.ones(len(indices), config.chunk)
        if chosen is not None:
            further = further_labels(data, indices, chosen)
            spoken, manners = further.spoken, further.manners
            first = data.other_actions[indices, further.column][:, None].expand(-1, config.chunk, -1)
            actions = torch.where(further.there[:, None, None], first, actions)
            known[further.there, 1:] = 0.0
        told = torch.rand(len(indices), len(SLOTS)) < tell
        texts = [
            text_ids(self._tokenizer, config, worded(data.instructions[int(t)], m, d))
            for t, m, d in zip(spoken, manners, told, strict=True)
        ]
        ids, mask = batch(config, texts, [config.max_cameras] * len(texts))
        mean, scale = self._action
        return Asked(ids, mask, (actions - mean) / scale, known)

    def _flow_errors(self, asked: Sequence[Asked], seen: Tensor, felt: Tensor) -> list[Tensor]:
        """Squared errors [B * draws, chunk, 7] of each branch's flow."""
        draws, whole = self._settings.draws, _joined(asked)
        count = len(asked)
        prefix = self._read(whole, seen.repeat(count, 1, 1), felt.repeat(count, 1), draws)
        actions = whole.actions.repeat_interleave(draws, 0)
        noise = torch.randn_like(actions)
        # Beta(a, 1) by inversion: one draw from torch's generator.
        time = _FLOOR + (1 - _FLOOR) * torch.rand(len(actions)) ** (1 / _ALPHA)
        at = time[:, None, None]
        state = self._normalised(felt).repeat(count, 1).repeat_interleave(draws, 0)
        # On a CPU and sequences this short the plain product is faster in the backward pass than the fused one.
        with sdpa_kernel(SDPBackend.MATH):
            flow = self.network.velocity(prefix, state, at * noise + (1 - at) * actions, time)
        return list(((flow - (noise - actions)) ** 2).chunk(count))

    @torch.no_grad()
    def _read(self, asked: Asked, seen: Tensor, felt: Tensor, draws: int = 1) -> Prefix:
        """The prefix of each prompt, `draws` times over."""
        network = self.network
        read = network.read_prefix(network.embed_objects(asked.ids, seen, felt), asked.mask)
        cache = PrefixCache()
        for number, layer in enumerate(read.cache.layers):
            keys, values = (part.repeat_interleave(draws, 0) for part in (layer.keys, layer.values))  # type: ignore[union-attr]
            cache.update(keys, values, number)
        cache.kept = True
        return Prefix(cache, read.mask.repeat_interleave(draws, 0), read.positions.repeat_interleave(draws, 0))

    def _denoised(self, asked: Asked, seen: Tensor, felt: Tensor) -> Tensor:
        config = self.network.config
        prefix, state = self._read(asked, seen, felt), self._normalised(felt)
        noise = torch.randn(config.chunk, config.action_dim, generator=torch.Generator().manual_seed(0))
        actions, dt = noise.expand(len(felt), -1, -1), 1.0 / config.euler_steps
        for step in range(config.euler_steps):
            actions = actions - dt * self.network.velocity(
                prefix, state, actions, torch.full((len(felt),), 1 - step * dt)
            )
        return actions

    def _normalised(self, felt: Tensor) -> Tensor:
        mean, scale = self._state
        return (felt - mean) / scale

    def _actions(self, normalised: Tensor) -> Tensor:
        mean, scale = self._action
        return normalised * scale + mean

    def _weighed(self, errors: Tensor, asked: Asked) -> Tensor:
        weight = torch.ones(ACTION)
        weight[GRIPPER] = self._settings.gripper_weight
        known = asked.known.repeat_interleave(self._settings.draws, 0)[..., None] * weight
        return (errors * known).sum() / known.sum()


def norm_stats(data: DemonstrationData) -> dict[str, Any]:
    """norm_stats.json (openpi) of the states and the expert's actions."""
    actions = data.actions[:, 0].numpy().astype(np.float64)
    states = data.states.numpy().astype(np.float64)
    parts = {"state": (states, 1e-3), "actions": (actions, _NARROWEST)}
    return {
        "norm_stats": {
            name: {"mean": values.mean(0).tolist(), "std": np.maximum(values.std(0), least).tolist()}
            for name, (values, least) in parts.items()
        }
    }


def _joined(asked: Sequence[Asked]) -> Asked:
    """Several as one, padded at the end to the longest prompt."""
    longest = max(branch.ids.shape[1] for branch in asked)

    def padded(part: Tensor) -> Tensor:
        return torch.nn.functional.pad(part, (0, longest - part.shape[1]))

    return Asked(
        torch.cat([padded(branch.ids) for branch in asked]),
        torch.cat([padded(branch.mask) for branch in asked]),
        torch.cat([branch.actions for branch in asked]),
        torch.cat([branch.known for branch in asked]),
    )
