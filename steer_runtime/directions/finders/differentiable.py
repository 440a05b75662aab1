"""What a policy does at a moment as one differentiable number.

Invariant: an observable is a function of the action tokens' and said words' scores; the greedy choices are constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steer_runtime.errors import SteerError, nearest

Observable = Callable[[Any], Tensor]
"""Of a decoded inference (see `policies.openvla.model.Decoded`), a scalar."""
MOTION = ("speed", "dx", "dy", "dz", "rotation", "gripper", "entropy")


def observable(policy: Any, name: str) -> Observable:
    """speed (m/s), dx, dy, dz (m a step), rotation (rad a step), gripper (-1 open, +1 close), entropy (nats an action
    token), all means over the chunk of E[a] = unnormalised sum_b softmax(logits)_b centre_b; `said_<slot>`: logit of the
    slot's last word minus that of its first.

    Raises SteerError: 'unknown_observable', 'no_gradient' for a policy whose inference cannot be differentiated.
    """
    if not hasattr(policy, "decode"):
        raise SteerError("no_gradient", f"policy {policy.name!r} has no `decode` to differentiate: use another finder")
    slots = [f"said_{slot.name}" for slot in policy.config.slots]
    if name in slots:
        place = slots.index(name)
        return lambda decoded: decoded.told[place][-1] - decoded.told[place][0]
    if name not in MOTION:
        raise SteerError(
            "unknown_observable", f"observable {name[:40]!r} is not known: {nearest(name, [*MOTION, *slots])}"
        )
    if name == "entropy":
        return lambda decoded: _entropy(_action_scores(policy, decoded))
    return lambda decoded: _motion(policy, name, expected_actions(policy, decoded))


def expected_actions(policy: Any, decoded: Any) -> Tensor:
    """E[a] of every action of the chunk, [chunk, dims], unnormalised, the gripper as the model's opening (1 open, 0 closed)."""
    scores = _action_scores(policy, decoded)
    ids = range(policy.actions.usable_vocab - policy.actions.n_bins, policy.actions.usable_vocab)
    centres = torch.from_numpy(policy.actions.decode(list(ids))).to(scores)
    mean = (scores.softmax(-1) @ centres).reshape(policy.config.chunk, -1)
    low, high = (torch.tensor(side).to(mean) for side in (policy.statistics.q01, policy.statistics.q99))
    mask = torch.tensor(policy.statistics.mask, device=mean.device)
    return torch.where(mask, 0.5 * (mean + 1.0) * (high - low) + low, mean)


def _motion(policy: Any, name: str, actions: Tensor) -> Tensor:
    space = policy.action_space
    way = actions[:, :3] * space.position_scale_m
    if name == "speed":
        return way.norm(dim=1).mean() * space.rate_hz
    if name == "rotation":
        return (actions[:, 3:6] * space.rotation_scale_rad).norm(dim=1).mean()
    if name == "gripper":
        return (1.0 - 2.0 * actions[:, 6]).mean()
    return way[:, ("dx", "dy", "dz").index(name)].mean()


def _entropy(scores: Tensor) -> Tensor:
    logs = scores.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


def _action_scores(policy: Any, decoded: Any) -> Tensor:
    """Scores of the action tokens alone, [T, n_bins], ids ascending."""
    scores, bins, usable = decoded.logits, policy.actions.n_bins, policy.actions.usable_vocab
    return scores if scores.shape[-1] == bins else scores[:, usable - bins : usable]
