"""Self-distillation on text: the pruned model keeps the meaning of its words while it learns to act.

Invariant: the teacher is the unpruned SmolLM2, asked once; its texts are its own samples, so no corpus is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sim.demonstrations import write_atomically
from sim.training.settings import Distillation
from steer_runtime.errors import SteerError

_WRITTEN_AT_ONCE = 32


@dataclass(frozen=True)
class Teaching:
    """ids int64 [N, L]: texts. top int64 [N, L - 1, k], chance float32 [N, L - 1, k]: the teacher's best next tokens after
    each token, their probabilities renormalised."""

    ids: Tensor
    top: Tensor
    chance: Tensor

    @property
    def digest(self) -> str:
        """sha256 of the texts and probabilities."""
        return hashlib.sha256(self.ids.numpy().tobytes() + self.chance.numpy().tobytes()).hexdigest()


@torch.no_grad()
def teach(
    teacher: Any, spec: Distillation, seed: int, bos: int, on_batch: Callable[[int, int], None] | None = None
) -> Teaching:
    """Texts that `teacher` (a causal language model of transformers) samples at temperature 1, and its predictions."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for start in range(0, spec.texts, _WRITTEN_AT_ONCE):
        count = min(_WRITTEN_AT_ONCE, spec.texts - start)
        ids, cache = torch.full((count, 1), bos), None
        last = ids
        while ids.shape[1] < spec.length:
            out = teacher(input_ids=last, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            last = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)
            ids = torch.cat((ids, last), 1)
        texts.append(ids)
        if on_batch is not None:
            on_batch(start + count, spec.texts)
    joined = torch.cat(texts)
    top, chance = [], []
    for part in joined.split(8):
        best = teacher(input_ids=part).logits[:, :-1].softmax(-1).topk(spec.top, -1)
        top.append(best.indices)
        chance.append(best.values / best.values.sum(-1, keepdim=True))
    return Teaching(joined, torch.cat(top), torch.cat(chance))


def kept(path: Path, make: Callable[[], Teaching]) -> Teaching:
    """The teaching stored at `path`, or a new one stored there. Raises SteerError('torn_file', 'disk_full')."""
    if path.is_file():
        try:
            stored = load_file(path)
            return Teaching(stored["ids"], stored["top"], stored["chance"])
        except (SafetensorError, OSError, KeyError) as error:
            raise SteerError("torn_file", f"{path} is damaged ({error}); delete it and run again") from None
    made = make()
    write_atomically(path, save({"ids": made.ids, "top": made.top, "chance": made.chance}))
    return made


def distillation_loss(logits: Tensor, top: Tensor, chance: Tensor) -> Tensor:
    """-sum_k p_k log softmax(logits)_k over the teacher's kept tokens, mean over [B, L - 1]; logits [B, L - 1, words]."""
    chosen = logits.gather(-1, top) - logits.logsumexp(-1, keepdim=True)
    return -(chance * chosen).sum(-1).mean()
