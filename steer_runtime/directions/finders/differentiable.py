"""What a policy does at a moment as one differentiable number.

Invariant: an observable is a function of what an inference computed: the action tokens' and said words' scores, of which the
greedy choices are constants, or the actions that a flow policy denoised, through all of its steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer_runtime.errors import SteerError, nearest

Observable = Callable[[Any], Tensor]
"""Of an inference (`policies.openvla.model.Decoded`, `policies.pi0.denoise.Denoised`), a scalar."""
MOTION = ("speed", "dx", "dy", "dz", "rotation", "gripper")
ENTROPY = "entropy"


def observable(policy: Any, name: str) -> Observable:
    """speed (m/s), dx, dy, dz (m a step), rotation (rad a step), gripper (-1 open, +1 close).

    Of a policy of action tokens: means over the chunk of E[a] = unnormalised sum_b softmax(logits)_b centre_b; beside them
    entropy (nats an action token) and `said_<slot>`, the logit of the slot's last word minus that of its first. Of a flow
    policy: of the mean of the actions that it hands on, as `observables.read` has them.

    Raises SteerError: 'unknown_observable', 'no_gradient' for a policy whose inference cannot be differentiated.
    """
    if not hasattr(policy, "decode"):
        raise SteerError("no_gradient", f"policy {policy.name!r} has no `decode` to differentiate: use another finder")
    if hasattr(policy, "action_basis"):
        return _of_flow(policy, name)
    slots = [f"said_{slot.name}" for slot in policy.config.slots]
    if name in slots:
        place = slots.index(name)
        return lambda decoded: decoded.told[place][-1] - decoded.told[place][0]
    _require_known(name, [*MOTION, ENTROPY, *slots])
    if name == ENTROPY:
        return lambda decoded: _entropy(_action_scores(policy, decoded))
    return lambda decoded: _motion(policy, name, expected_actions(policy, decoded))


def _of_flow(policy: Any, name: str) -> Observable:
    if name == ENTROPY or name.startswith("said_"):
        raise SteerError(
            "unknown_observable",
            f"{policy.name!r} denoises actions: it says no words and weighs no bins, so there is no {name[:40]!r}; expected "
            f"one of {', '.join(MOTION)}",
        )
    _require_known(name, MOTION)
    if policy.delta:
        raise SteerError(
            "no_gradient",
            f"{policy.name!r} adds the state to its actions (`delta`), which is not differentiated here: use another finder",
        )
    return lambda denoised: _motion(policy, name, denoised_actions(policy, denoised).mean(0, keepdim=True))


def _require_known(name: str, known: Any) -> None:
    if name not in known:
        raise SteerError("unknown_observable", f"observable {name[:40]!r} is not known: {nearest(name, known)}")


def expected_actions(policy: Any, decoded: Any) -> Tensor:
    """E[a] of every action of the chunk in the units of the action space, [chunk, dims], the gripper not yet a choice."""
    scores = _action_scores(policy, decoded)
    ids = range(policy.actions.usable_vocab - policy.actions.n_bins, policy.actions.usable_vocab)
    centres = torch.from_numpy(policy.actions.decode(list(ids))).to(scores)
    mean = (scores.softmax(-1) @ centres).reshape(policy.config.chunk, -1)
    low, high = (torch.tensor(side).to(mean) for side in (policy.statistics.q01, policy.statistics.q99))
    mask = torch.tensor(policy.statistics.mask, device=mean.device)
    actions = torch.where(mask, 0.5 * (mean + 1.0) * (high - low) + low, mean)
    # The model's opening, 1 open and 0 closed, as LIBERO commands it.
    return torch.cat((actions[:, :6], 1.0 - 2.0 * actions[:, 6:7]), dim=1)


def denoised_actions(policy: Any, denoised: Any) -> Tensor:
    """The actions that a flow policy hands on, in the units of the action space and within -1 to 1, [action_steps, dims]."""
    actions = denoised.actions[0, : policy.action_steps, : policy.action_space.dims].double()
    dims = actions.shape[1]
    offset = policy.statistics.unnormalise(np.zeros(dims))
    scale = policy.statistics.unnormalise(np.ones(dims)) - offset
    whole = actions * torch.from_numpy(scale).to(actions) + torch.from_numpy(offset).to(actions)
    return whole.clamp(-1.0, 1.0)


def _motion(policy: Any, name: str, actions: Tensor) -> Tensor:
    space = policy.action_space
    way = actions[:, :3] * space.position_scale_m
    if name == "speed":
        return way.norm(dim=1).mean() * space.rate_hz
    if name == "rotation":
        return (actions[:, 3:6] * space.rotation_scale_rad).norm(dim=1).mean()
    if name == "gripper":
        return (2.0 * (actions[:, 6] - space.gripper_open) / (space.gripper_close - space.gripper_open) - 1.0).mean()
    return way[:, ("dx", "dy", "dz").index(name)].mean()


def _entropy(scores: Tensor) -> Tensor:
    logs = scores.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


def _action_scores(policy: Any, decoded: Any) -> Tensor:
    """Scores of the action tokens alone, [T, n_bins], ids ascending."""
    scores, bins, usable = decoded.logits, policy.actions.n_bins, policy.actions.usable_vocab
    return scores if scores.shape[-1] == bins else scores[:, usable - bins : usable]
