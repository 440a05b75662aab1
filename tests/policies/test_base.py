"""Checkpoints that leave frozen weights to the published SmolLM2 file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fabricate import STATISTICS

from steer_runtime.errors import SteerError
from steer_runtime.policies.base import BaseConfig, layer_tensors, read_base
from steer_runtime.policies.objects.config import HeatmapConfig
from steer_runtime.policies.openvla.checkpoint import load_checkpoint, save_checkpoint
from steer_runtime.policies.openvla.config import LMConfig, OpenVLAConfig, emit_config, parse_config
from steer_runtime.policies.openvla.model import OpenVLAModel
from steer_runtime.policies.pocket import find_gguf, load_smollm2, smollm2_base

LAYERS = (2,)


@pytest.fixture(scope="module")
def base() -> BaseConfig:
    return smollm2_base(LAYERS)


def _config(base: BaseConfig) -> OpenVLAConfig:
    return OpenVLAConfig(
        lm=LMConfig(49152 + 320, 576, 1536, 1, 9, 3, tied=True),
        usable_vocab=49152 + 256,
        heatmap=HeatmapConfig(classes=("milk",), hidden=64, blocks=1, heads=2),
        base=base,
        image_size=64,
        state_tokens=1,
        append_token_id=None,
    )


def test_its_tensors_are_those_that_transformers_reads(base: BaseConfig) -> None:
    source, _ = load_smollm2(find_gguf())
    theirs = source.state_dict()
    for name, value in read_base(replace(base, tensors=tuple(layer_tensors(1))), 9, 3):
        key = name.removeprefix("language_model.").replace("layers.0", "layers.2")
        assert torch.equal(value, theirs[key]), name


def test_a_checkpoint_with_a_base_is_small_and_comes_back_bit_for_bit(base: BaseConfig, tmp_path: Path) -> None:
    config = _config(replace(base, tensors=("language_model.model.norm.weight",)))
    torch.manual_seed(0)
    model = OpenVLAModel(config).requires_grad_(False)
    parameters = dict(model.named_parameters())
    for name, value in read_base(config.base, 9, 3):  # type: ignore[arg-type]
        parameters[name][: len(value)] = value
    save_checkpoint(model, tmp_path / "saved", STATISTICS)
    assert (tmp_path / "saved" / "model.safetensors").stat().st_size < 24_000_000
    loaded, _ = load_checkpoint(tmp_path / "saved")
    assert parse_config(emit_config(config)) == config
    assert all(torch.equal(parameters[name], p) for name, p in loaded.named_parameters())


def test_another_file_and_a_missing_package_are_refused(base: BaseConfig) -> None:
    for changed, code in ((replace(base, sha256="0" * 64), "other_base"), (replace(base, module="no_such"), "no_base")):
        with pytest.raises(SteerError) as refused:
            next(read_base(changed, 9, 3))
        assert refused.value.code == code
