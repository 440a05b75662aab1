"""Policies by configuration file and by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import fabricate
import pytest
import torch
from safetensors.torch import load_file, save_file

from steer_runtime.errors import SteerError
from steer_runtime.policies import load_policy, policy_configs
from steer_runtime.policies.registry import read_policy_file


def _write(path: Path, **changes: object) -> Path:
    values = {"kind": "openvla", "name": "mine", "checkpoint": "weights", "suite": "libero_object", **changes}
    path.write_text("\n".join(f"{key}: {value}" for key, value in values.items()))
    return path


def test_shipped_configurations_parse() -> None:
    shipped = policy_configs()
    assert {"pocket-untrained", "openvla-7b-libero-object"} <= set(shipped)
    for name, path in shipped.items():
        assert read_policy_file(path).name == name


def test_a_file_loads_the_checkpoint_beside_it(tmp_path: Path) -> None:
    fabricate.save_tiny(tmp_path / "weights")
    policy = load_policy(_write(tmp_path / "mine.yaml"), dtype=torch.bfloat16)
    assert (policy.name, policy.unembedding.dtype, policy.trained) == ("mine", torch.bfloat16, False)
    assert policy.options == {"cameras": ["agentview"], "rate_hz": 20.0, "dtype": "bfloat16"}


def test_a_file_may_give_the_control_steps_more_time(tmp_path: Path) -> None:
    fabricate.save_tiny(tmp_path / "weights")
    usual = load_policy(_write(tmp_path / "mine.yaml")).action_space
    slower = load_policy(_write(tmp_path / "mine.yaml", rate_hz=8, camera="front"))
    assert slower.action_space == replace(usual, rate_hz=8.0)
    assert slower.options == {"cameras": ["front"], "rate_hz": 8.0, "dtype": "float32"}
    with pytest.raises(SteerError, match="rate_hz"):
        load_policy(_write(tmp_path / "mine.yaml", rate_hz=0))


def test_what_the_load_left_aside_is_said(tmp_path: Path) -> None:
    file = fabricate.save_tiny(tmp_path / "weights") / "model.safetensors"
    tensors = load_file(file)
    del tensors["vision_backbone.featurizer.norm.bias"]
    save_file(tensors, str(file))
    said: list[str] = []
    load_policy(_write(tmp_path / "mine.yaml"), progress=said.append)
    assert len(said) == 1
    assert "vision_backbone.featurizer.norm.bias" in said[0]


def test_a_checkpoint_that_exists_is_loaded_in_silence(tmp_path: Path) -> None:
    fabricate.save_tiny(tmp_path / "weights")
    said: list[str] = []
    load_policy(_write(tmp_path / "mine.yaml", build="{layers: [0]}"), progress=said.append)
    assert said == []


def test_a_missing_checkpoint_is_refused_with_its_path() -> None:
    with pytest.raises(SteerError, match="openvla-7b-finetuned-libero-object") as refused:
        load_policy("openvla-7b-libero-object")
    assert refused.value.code == "no_checkpoint"


def test_a_suite_the_checkpoint_lacks_is_refused(tmp_path: Path) -> None:
    fabricate.save_tiny(tmp_path / "weights")
    with pytest.raises(SteerError) as refused:
        load_policy(_write(tmp_path / "mine.yaml", suite="libero_goal"))
    assert refused.value.code == "no_statistics"


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(SteerError, match="pocket-untrained") as refused:
        load_policy("pokket-untrained")
    assert refused.value.code == "unknown_policy"


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SteerError) as refused:
        load_policy(tmp_path / "none.yaml")
    assert refused.value.code == "unknown_policy"


@pytest.mark.parametrize(
    "changes",
    [{"speed": 3}, {"kind": "pi0"}, {"dtype": "int8"}, {"name": "../x"}, {"build": "{layers: [3, 1]}"}, {"suite": "["}],
)
def test_unusable_files_are_refused_by_path(tmp_path: Path, changes: dict[str, object]) -> None:
    path = _write(tmp_path / "mine.yaml", **changes)
    with pytest.raises(SteerError, match=r"mine\.yaml") as refused:
        load_policy(path)
    assert refused.value.code == "bad_policy_config"
