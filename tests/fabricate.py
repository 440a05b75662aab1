"""Small random policies of the real architecture, for tests of every layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from steer_runtime.directions.token_basis import Labels, TokenBasis, TowerIdentity
from steer_runtime.policies.openvla.actions import Statistics, select_statistics
from steer_runtime.policies.openvla.checkpoint import save_checkpoint
from steer_runtime.policies.openvla.config import LMConfig, OpenVLAConfig, ViTConfig
from steer_runtime.policies.openvla.model import OpenVLAModel
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.types import Observation

WORDS = [
    "In",
    ":",
    "What",
    "action",
    "should",
    "the",
    "robot",
    "take",
    "to",
    "?",
    "Out",
    "pick",
    "up",
    "place",
    "and",
    "bowl",
    "soup",
    "basket",
    "slow",
    "slowly",
    "slower",
    "fast",
    "faster",
    "quick",
    "speed",
    "high",
    "low",
    "above",
    "below",
    "left",
    "right",
    "open",
    "close",
    "put",
    "it",
    "on",
    "in",
]

STATISTICS = {
    "libero_object": {
        "action": {
            "q01": [-0.5, -0.4, -0.3, -0.1, -0.1, -0.1, 0.0],
            "q99": [0.5, 0.4, 0.3, 0.1, 0.1, 0.1, 1.0],
            "mask": [True, True, True, True, True, True, False],
        }
    }
}


def tiny_config(**changes: object) -> OpenVLAConfig:
    """d_model 32, 3 layers of 64 neurons, 4 patches; usable vocabulary 320 = 64 words and 256 action tokens, 64 pads."""
    values: dict[str, object] = {
        "dino": ViTConfig(hidden=16, depth=3, heads=2, mlp=32, registers=4, class_token=True),
        "siglip": ViTConfig(hidden=24, depth=3, heads=2, mlp=40),
        "lm": LMConfig(vocab_rows=384, d_model=32, d_ff=64, layers=3, heads=4, kv_heads=2),
        "usable_vocab": 320,
        "image_size": 28,
        "append_token_id": None,
        "restrict_to_action_tokens": True,
        "max_prompt_tokens": 48,
        "trained": False,
        "name": "tiny",
    }
    return OpenVLAConfig(**{**values, **changes})  # type: ignore[arg-type]


def tiny_model(
    config: OpenVLAConfig | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> OpenVLAModel:
    """Random weights, norms near one, so that every parameter matters to the output."""
    model = OpenVLAModel(config or tiny_config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1.0 + 0.1 * noise)
            else:
                # Twice the usual scale in the language model, or greedy decoding repeats one token.
                gain = 2.0 if name.startswith("language_model") else 1.0
                parameter.copy_(noise * (0.2 if parameter.ndim < 2 else gain * parameter.shape[-1] ** -0.5))
        # As in the published layout, whose position embedding has no CLS row and which has no mask token.
        model.dino.embeddings.mask_token.zero_()
        model.dino.embeddings.position_embeddings[:, 0].zero_()
    return model.to(dtype).requires_grad_(False).eval()


def tiny_tokenizer(usable_vocab: int = 320, n_bins: int = 256) -> PreTrainedTokenizerFast:
    """Word-level tokenizer with a name for every id below usable_vocab; id 1 is BOS, unknown words are id 0."""
    vocab = {"<unk>": 0, "<s>": 1}
    for word in WORDS:
        vocab.setdefault(word, len(vocab))
    while len(vocab) < usable_vocab - n_bins:
        vocab[f"word{len(vocab)}"] = len(vocab)
    for index in range(n_bins):
        vocab[f"<action_{n_bins - 1 - index}>"] = usable_vocab - n_bins + index
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def tiny_statistics() -> Statistics:
    return select_statistics(STATISTICS, "libero_object", "test statistics")


def tiny_policy(
    config: OpenVLAConfig | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> OpenVLAPolicy:
    """A random OpenVLA of a few ten thousand parameters with real vision, tokenizer and decoding."""
    return OpenVLAPolicy(tiny_model(config, seed=seed, dtype=dtype), tiny_tokenizer(), tiny_statistics())


def save_tiny(directory: Path, *, model: nn.Module | None = None, shard_bytes: int = 4 << 30) -> Path:
    """A checkpoint directory in the published layout, loadable with suite libero_object."""
    source = model or tiny_model()
    assert isinstance(source, OpenVLAModel)
    return save_checkpoint(source, directory, STATISTICS, tokenizer=tiny_tokenizer(), shard_bytes=shard_bytes)


def make_observation(
    policy: OpenVLAPolicy | None = None,
    *,
    instruction: str = "pick up the soup and place it in the basket",
    seed: int = 0,
    value: int | None = None,
    size: int = 256,
    frame_id: int = 0,
) -> Observation:
    """An observation that fits the policy: random pixels, or one grey value; state zeros."""
    if value is None:
        image = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    else:
        image = np.full((size, size, 3), value, dtype=np.uint8)
    camera = policy.camera if policy is not None else "agentview"
    return Observation(
        images={camera: image, "wrist": image},
        state=np.zeros(8),
        instruction=instruction,
        stamp_ns=1_000_000 * (frame_id + 1),
        frame_id=frame_id,
    )


def made_labels(policy: OpenVLAPolicy, rows: dict[tuple[int, int], list[tuple[str, float]]]) -> Labels:
    """Labels of 2 layers x 8 neurons x 3 tokens: the given (word, score) lists, filler elsewhere."""
    basis = TokenBasis.of(policy)
    filler = basis.tokens_of("word40")[0]
    tokens = np.full((2, 8, 3), filler, np.int32)
    scores = np.tile(np.array([0.3, 0.2, 0.1], np.float32), (2, 8, 1))
    for (layer, neuron), label in rows.items():
        for i, (word, score) in enumerate(label):
            tokens[layer, neuron, i], scores[layer, neuron, i] = basis.tokens_of(word)[0], score
    identity = TowerIdentity("lm", policy.model_hash, 2, policy.towers["lm"].d_model, 8)
    return Labels(identity, (0, 1), tokens, scores, basis)
