"""A tiny pocket OpenVLA of the real classes, and a stop in the middle of a training."""

from __future__ import annotations

import os
import signal

import fabricate
import torch
from torch import nn

from sim.manner import SLOTS
from sim.training import trainer
from sim.training.assembly import PROMPT, initialise
from steer_runtime.policies.objects.config import HeatmapConfig
from steer_runtime.policies.openvla.config import LMConfig, Slot
from steer_runtime.policies.openvla.model import OpenVLAModel

HEAT = HeatmapConfig(classes=("soup", "basket", "milk"), hidden=64, blocks=1, heads=2)
SLOT_WORDS = tuple(
    Slot(name, words, tuple(range(at, at + len(words))))
    for (name, words), at in zip(SLOTS.items(), (40, 46, 50), strict=True)
)


def tiny_model(parallel: bool = True) -> OpenVLAModel:
    lm = LMConfig(vocab_rows=384, d_model=32, d_ff=64, layers=3, heads=4, kv_heads=2, tied=True)
    config = fabricate.tiny_config(
        dino=None, siglip=None, heatmap=HEAT, lm=lm, image_size=64, state_tokens=2, chunk=2, trained=True,
        names=((6,), (8,), (7,)), slots=SLOT_WORDS, parallel=parallel, prompt=PROMPT,
    )  # fmt: skip
    torch.manual_seed(0)
    model = OpenVLAModel(config)
    # The size of a trained model's word embeddings, relative to its width.
    nn.init.normal_(model.language_model.model.embed_tokens.weight, std=0.3)
    initialise(model)
    return model.eval()


def stop_at(step: int):  # type: ignore[no-untyped-def]
    def on_step(progress: trainer.Progress) -> None:
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step
