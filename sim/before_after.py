"""Actions of one policy on recorded observations, without and with steering.

Invariant: every condition sees the same observations, with the gripper as it was told then and the same noise where the
policy draws any, through the same engine; the first condition is steering off. What is compared is the first action of
each chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sim.policy_actor import tell_gripper
from steer_runtime.directions.direction import Axis, Direction
from steer_runtime.steering.offline import OfflineSteering
from steer_runtime.types import Observation, Policy


class ComparedPolicy(Policy, Protocol):
    """action_token_values: of the tokens that actions are made of, nothing for a policy that denoises them."""

    def logits(self, observation: Observation) -> torch.Tensor: ...
    def action_token_values(self) -> Mapping[int, float]: ...


@dataclass(frozen=True)
class BeforeAfter:
    """C conditions on O observations; see EpisodeRecord for the arrays. tokens: the most probable action token, zeros (and
    no bins) where actions are no tokens.

    said: the policy's words, by condition and observation; without words where it says none.
    """

    conditions: tuple[str, ...]
    actions: np.ndarray
    tokens: np.ndarray
    bins: np.ndarray
    bin_values: np.ndarray
    said: tuple[tuple[tuple[str, ...], ...], ...]


def before_after(
    policy: ComparedPolicy,
    directions: Sequence[Direction],
    axes: Sequence[Axis],
    observations: Sequence[Observation],
    conditions: Mapping[str, Mapping[str, float]],
    progress: Callable[[int], None] = lambda done: None,
) -> BeforeAfter:
    """Run every condition (name -> target -> strength) and, before them, "off".

    progress hears how many of the (C + 1) O replays are done. Raises SteerError for a refused strength.
    """
    values = policy.action_token_values()
    ids = sorted(values, key=lambda i: (values[i], -i))
    all_conditions: dict[str, Mapping[str, float]] = {"off": {}, **conditions}
    shape = (len(all_conditions), len(observations), policy.action_space.dims)
    actions = np.zeros(shape, np.float32)
    tokens = np.zeros(shape, np.int64)
    bins = np.zeros((*shape, len(ids)), np.float32)
    said: list[tuple[tuple[str, ...], ...]] = []
    done = 0
    with OfflineSteering(policy, directions, axes) as steering:
        for c, strengths in enumerate(all_conditions.values()):
            steering.set(strengths)
            words = []
            for o, observation in enumerate(observations):
                _begin(policy, observation, o)
                chunk, _ = steering.run(lambda seen=observation: policy.infer(seen))  # type: ignore[misc]
                words.append(tuple(word.strip() for word in getattr(policy, "said", ())))
                actions[c, o] = chunk.actions[0]
                if ids:
                    # The inference has moved what the policy remembers on to the end of its chunk.
                    _begin(policy, observation, o)
                    logits, _ = steering.run(lambda seen=observation: policy.logits(seen))  # type: ignore[misc]
                    action_logits = logits.float()[: policy.action_space.dims, ids]
                    tokens[c, o] = np.asarray(ids)[action_logits.argmax(dim=-1).cpu().numpy()]
                    bins[c, o] = torch.softmax(action_logits, dim=-1).cpu().numpy()
                done += 1
                progress(done)
            said.append(tuple(words))
    return BeforeAfter(
        conditions=tuple(all_conditions),
        actions=actions,
        tokens=tokens,
        bins=bins,
        bin_values=np.array([values[i] for i in ids], np.float32),
        said=tuple(said),
    )


def _begin(policy: Policy, observation: Observation, number: int) -> None:
    """The policy as it was before an observation: its gripper as told, its noise that of the observation's number."""
    policy.reset(number)
    if observation.gripper_command is not None:
        tell_gripper(policy, observation.gripper_command)
