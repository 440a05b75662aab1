"""Fixtures of the policies' room."""

from __future__ import annotations

from typing import Any

import pytest

from steer_runtime.policies.pocket import find_gguf, load_smollm2


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """SmolLM2 and its tokenizer from the GGUF, read once for all tests: that takes 20 s."""
    return load_smollm2(find_gguf())
