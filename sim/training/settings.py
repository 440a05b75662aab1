"""Training configurations: YAML files of `configs/training/`.

Invariant: a configuration says everything that decides the result; unknown keys are refused, and a run can be resumed
only with the configuration that began it (`Common.identity`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from steer_runtime.errors import SteerError

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Common(_Strict):
    """What every training has. Learning rate: linear warm-up, then half a cosine down to `final_rate` of its peak.

    steps: optimiser steps. gradient_norm: clipping. threads: of torch. keep: checkpoints kept. precision: bfloat16 has
    torch's autocast multiply in it (a step took two thirds of the time on a processor with AVX512-BF16), weights stay float32.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    steps: Positive
    batch: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    final_rate: Share = 0.02
    warmup: Annotated[int, Field(ge=0)] = 100
    weight_decay: Weight = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    gradient_norm: Annotated[float, Field(gt=0)] = 1.0
    seed: int = 0
    threads: Positive = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    log_every: Positive = 20
    validate_every: Positive = 500
    checkpoint_every: Positive = 250
    keep: Positive = 2

    def identity(self) -> dict[str, Any]:
        """All that decides the weights, as JSON: not names, threads, what is scored and how often something is written."""
        left_out = {"name", "held_out", "threads", "log_every", "validate_every", "checkpoint_every", "keep"}
        return self.model_dump(mode="json", exclude=left_out)


class TowerSettings(_Strict):
    """Size of the vision tower (see `HeatmapConfig`); its classes are those of the data."""

    image_size: Positive = 128
    hidden: Positive = 192
    blocks: Positive = 4
    heads: Positive = 6


class VisionTraining(Common):
    """`kind: vision`. frames, held_out: recordings of `steer data frames`, or of `steer data record` with pictures,
    below the data directory.

    start: folder of vision weights to begin with. Weights of the loss: place (fractions of the image), position (in
    units of 0.1 m), turn (double and fourfold angles' cosines and sines), presence; the heatmaps' cross-entropy has weight `heat`. brightness, tint, grain: augmentation.
    """

    kind: Literal["vision"]
    frames: tuple[Path, ...]
    held_out: tuple[Path, ...] = ()
    start: Path | None = None
    tower: TowerSettings = TowerSettings()
    heat: Weight = 0.3
    place: Weight = 2.0
    position: Weight = 1.0
    turn: Weight = 0.3
    presence: Weight = 0.1
    brightness: Weight = 0.15
    tint: Weight = 10.0
    grain: Weight = 3.0


class LanguageModelSettings(_Strict):
    """SmolLM2, depth-pruned. layers: kept ones of its 30. mode "full": all weights of the layers are trained but those
    matching `frozen` (regular expressions over parameter names); "low_rank": W + B A of rank `rank` on the linear layers
    matching `adapted`. rate: share of the learning rate.
    """

    layers: tuple[int, ...] = (0, 1, 2, 3, 26, 27, 28, 29)
    mode: Literal["full", "low_rank"] = "full"
    frozen: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rank: Positive = 16
    rate: Share = 0.3


class Distillation(_Strict):
    """Self-distillation on text: cross-entropy to the unpruned model's next-token distribution.

    weight: in the loss; 0 is off. texts: how many the unpruned model writes, once, of `length` tokens; batch: of them a
    step; every: so many steps. top: tokens of the distribution that are kept.
    """

    weight: Weight = 0.0
    texts: Positive = 256
    length: Annotated[int, Field(ge=8, le=512)] = 64
    batch: Positive = 4
    every: Positive = 4
    top: Positive = 64


class PolicyTraining(Common):
    """`kind: policy`. demonstrations, held_out: recordings of `steer data record`, below the data directory.

    vision: folder of vision weights, beside this file or absolute; the tower stays frozen. start: a finished policy to
    go on from, with its action statistics. state_tokens, chunk: of the policy; parallel: its action tokens are decoded in
    one forward. others: further labels of a sample in a step. tell: chance that a prompt says a manner that it could say.
    seen_share: of samples with pictures that are shown as the tower sees
    them, others exactly but for sight_noise (m). smoothing: width of the action targets in bins. embedding_noise:
    standard deviation of the noise on all embeddings, in units of the word embeddings' own; state_noise: on normalised
    proprioception. gripper_weight: of the gripper's token in the loss; word_weight: of the said words;
    value_weight: see `policy.action_loss`.
    """

    kind: Literal["policy"]
    demonstrations: tuple[Path, ...]
    held_out: tuple[Path, ...] = ()
    vision: Path
    start: Path | None = None
    suite: str = "libero_object"
    language_model: LanguageModelSettings = LanguageModelSettings()
    distillation: Distillation = Distillation()
    state_tokens: Positive = 1
    chunk: Positive = 4
    parallel: bool = True
    others: Positive = 3
    tell: Share = 0.6
    seen_share: Share = 0.8
    sight_noise: Weight = 0.01
    smoothing: Annotated[float, Field(gt=0)] = 3.0
    embedding_noise: Weight = 0.1
    state_noise: Weight = 0.02
    gripper_weight: Weight = 1.0
    word_weight: Weight = 0.2
    value_weight: Weight = 2.0

    @field_validator("language_model")
    @classmethod
    def _ascending(cls, lm: LanguageModelSettings) -> LanguageModelSettings:
        if not lm.layers or list(lm.layers) != sorted(set(lm.layers)):
            raise ValueError("layers: expected ascending layers, each once")
        return lm


class ExpertTraining(Common):
    """`kind: expert`: Pi0's action expert on a frozen prefix (knowledge insulation, Driess et al. 2025, arXiv 2505.23705).

    demonstrations, held_out: recordings of `steer data record`, below the data directory. prefix: a finished pocket
    OpenVLA, beside this file or absolute; its language model, vision and projector become the prefix. width, neurons:
    d_model and d_ff of the expert. chunk: actions of one inference. draws: noises of a prompt in a step. others, tell,
    seen_share, sight_noise, state_noise: as for a policy. gripper_weight: of the gripper in the loss; other_weight: of
    further labels.
    """

    kind: Literal["expert"]
    demonstrations: tuple[Path, ...]
    held_out: tuple[Path, ...] = ()
    prefix: Path
    suite: str = "libero_object"
    width: Annotated[int, Field(ge=2, multiple_of=2)] = 320
    neurons: Positive = 1280
    chunk: Positive = 10
    euler_steps: Positive = 10
    draws: Positive = 4
    others: Annotated[int, Field(ge=0)] = 2
    tell: Share = 1.0
    seen_share: Share = 0.9
    sight_noise: Weight = 0.006
    state_noise: Weight = 0.02
    gripper_weight: Weight = 1.0
    other_weight: Weight = 1.0


Settings = TypeVar("Settings", bound=Common)


def read_settings(path: Path, kind: type[Settings]) -> Settings:
    """A checked training file. Raises SteerError('bad_training_config')."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return kind.model_validate(raw)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SteerError("bad_training_config", f"{path} is not readable YAML ({error}); correct the file") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise SteerError(
            "bad_training_config", f"{path}: {where}: {first['msg']} (given {first['input']!r:.80}); correct the file"
        ) from None
