"""The fast tokenizer of a checkpoint, from its file alone: no network, no remote code."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from steer_runtime.errors import SteerError


def load_tokenizer(directory: Path, name: str = "tokenizer.json") -> PreTrainedTokenizerFast:
    """The fast tokenizer of a checkpoint's `tokenizer.json`; no network, no remote code. Raises SteerError('no_tokenizer')."""
    path = directory / name
    if not path.is_file():
        raise SteerError("no_tokenizer", f"{directory} has no {name}: download it with the checkpoint")
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # the tokenizers library raises bare Exception for any malformed file
        raise SteerError("no_tokenizer", f"{path} is not a tokenizer file ({error}); download it again") from None
