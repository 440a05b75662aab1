"""Object tokens: what the small tower sees of each object class, told relative to the hand, for the language model.

Invariant: a token knows which class it stands for by the words for it, and where the object is from the hand; a policy
that reaches for things needs the difference, and a transformer computes differences of positions badly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steer_runtime.policies.objects.heatmap import GEOMETRY, PARTS
from steer_runtime.policies.objects.proprioception import GAIN, STATE_SIZE

NAMED_OBJECTS = 2
"""Objects that every instruction of a pick-and-place task names: what to take and where to put it."""
_KIND = 32
_WIDTH = 512
_FAR, _NEAR = 0.1, 0.02
"""Scales of the offset from the hand, m: of a reach, and of a grasp (where it saturates)."""


def named(prompts: Sequence[Sequence[int]], words: Sequence[Sequence[int]]) -> Tensor:
    """float32 [B, longest, C]: 1 where a prompt token is the last of a class's name; prompts are aligned to the right."""
    longest = max(len(prompt) for prompt in prompts)
    out = torch.zeros(len(prompts), longest, len(words))
    for row, prompt in enumerate(prompts):
        ids, start = list(prompt), longest - len(prompt)
        for column, name in enumerate(words):
            for end in range(len(name), len(ids) + 1):
                if ids[end - len(name) : end] == list(name):
                    out[row, start + end - 1, column] = 1.0
    return out


class ObjectProjector(nn.Module):
    """Geometry [B, C, GEOMETRY] and normalised proprioception [B, STATE_SIZE] to tokens [B, C, d_model].

    centre [3], m: where objects are on average; set, not trained. name [C, d_model] begins as the words of each class.
    """

    def __init__(self, classes: int, d_model: int) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.kind = nn.Parameter(torch.randn(classes, _KIND) * 0.5)
        self.name = nn.Parameter(torch.zeros(classes, d_model))
        self.fc1 = nn.Linear(GEOMETRY + 6 + STATE_SIZE + _KIND, _WIDTH)
        self.fc2 = nn.Linear(_WIDTH, _WIDTH)
        self.fc3 = nn.Linear(_WIDTH, d_model)

    def forward(self, geometry: Tensor, state: Tensor, hand: Tensor) -> Tensor:
        """hand [B, 3]: position of the grip site in the world, m."""
        place, position, present, wrist_place, wrist_present, turn, wrist_turn = geometry.split(PARTS, -1)
        offset = present * (position - hand[:, None])
        shape = (*geometry.shape[:2], -1)
        told = (
            4 * (place - 0.5), present * (position - self.centre) / _FAR, present, 4 * (wrist_place - 0.5), wrist_present,
            turn, wrist_turn, offset / _FAR, torch.tanh(offset / _NEAR), state[:, None].expand(shape), self.kind.expand(shape),
        )  # fmt: skip
        hidden = nn.functional.gelu(self.fc1(torch.cat(told, -1)))
        hidden = hidden + nn.functional.gelu(self.fc2(hidden))
        return GAIN * (self.fc3(hidden) + self.name)
