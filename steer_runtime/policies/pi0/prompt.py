"""The prompt of Pi0: image tokens, BOS, the cleaned task, a line end; several of unequal length as one batch.

Invariant: the text is the published one, token for token (openpi `PaligemmaTokenizer`, LeRobot); padding is masked, and
stands at the end, so that a prompt's numbers do not depend on its neighbours in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from steer_runtime.errors import SteerError
from steer_runtime.policies.pi0.config import Pi0Config


def cleaned(task: str) -> str:
    """The task without outer space, underscores and line ends (openpi `PaligemmaTokenizer.tokenize`)."""
    return task.strip().replace("_", " ").replace("\n", " ").replace("\r", " ")


def text_ids(tokenizer: PreTrainedTokenizerFast, config: Pi0Config, instruction: str) -> list[int]:
    """BOS, the cleaned instruction, a line end; with objects the lower-case instruction in its prompt.

    Raises SteerError('bad_instruction') for an empty or too long one.
    """
    # Bound the tokenizer's work before it starts: an instruction may come from the network.
    limit = 32 * config.max_prompt_tokens
    task = cleaned(instruction)
    if not task.strip() or len(task) > limit:
        raise SteerError(
            "bad_instruction",
            f"the instruction has {len(task)} characters: expected 1 to {limit}, not only spaces",
        )
    sight = config.objects
    text = f"{task}\n" if sight is None else sight.prompt.replace("{instruction}", task.lower())
    ids = [config.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    if len(ids) > config.max_prompt_tokens:
        raise SteerError(
            "bad_instruction",
            f"the instruction makes a prompt of {len(ids)} tokens: expected at most {config.max_prompt_tokens}; shorten it",
        )
    foreign = [i for i in ids if not 0 <= i < config.vocab]
    if foreign:
        raise SteerError(
            "no_tokenizer",
            f"the tokenizer gives token {foreign[0]} and the model has {config.vocab}: expected this checkpoint's tokenizer.json",
        )
    return ids


def batch(config: Pi0Config, texts: Sequence[Sequence[int]], cameras: Sequence[int]) -> tuple[Tensor, Tensor]:
    """ids int64 [B, P] and mask bool [B, P] of texts behind the image tokens of their own number of cameras."""
    rows = [_row(config, text, count) for text, count in zip(texts, cameras, strict=True)]
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)
    mask = torch.tensor([[i < len(row) for i in range(longest)] for row in rows])
    return ids, mask


def _row(config: Pi0Config, text: Sequence[int], cameras: int) -> list[int]:
    sight = config.objects
    if sight is not None:
        seen = [config.image_token_id] * len(sight.heatmap.classes) + [config.state_token_id] * sight.state_tokens
        return [text[0], *seen, *text[1:]]
    assert config.vision is not None
    return [config.image_token_id] * (cameras * config.vision.patches) + list(text)
