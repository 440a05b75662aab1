"""A checkpoint directory says which model it is, as the loaded policy does, without being loaded."""

from __future__ import annotations

import resource
from pathlib import Path

import fabricate
import pytest
import torch
from sparse_checkpoint import save_sparse

from steer_runtime.directions.checkpoint_vectors import CheckpointVectors
from steer_runtime.directions.token_basis import TowerIdentity
from steer_runtime.errors import SteerError
from steer_runtime.policies import weight_hash
from steer_runtime.policies.openvla.checkpoint import save_checkpoint
from steer_runtime.policies.openvla.config import OPENVLA_7B, LMConfig
from steer_runtime.policies.openvla.policy import OpenVLAPolicy

TIED = LMConfig(vocab_rows=384, d_model=32, d_ff=64, layers=3, heads=4, kv_heads=2, tied=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [4 << 30, 40_000])
@pytest.mark.parametrize("tied", [False, True])
def test_the_hash_of_the_files_is_the_hash_of_the_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shard_bytes: int, tied: bool
) -> None:
    monkeypatch.setattr(weight_hash, "BLOCK", 500)  # several blocks a tensor, with a rest
    config = fabricate.tiny_config(**({"lm": TIED} if tied else {}))
    model = fabricate.tiny_model(config, dtype=dtype)
    folder = save_checkpoint(
        model, tmp_path / "c", fabricate.STATISTICS, tokenizer=fabricate.tiny_tokenizer(), shard_bytes=shard_bytes
    )
    live = OpenVLAPolicy.from_checkpoint(folder, "libero_object")
    told: list[tuple[int, int]] = []
    found = CheckpointVectors(folder, hash_progress=lambda done, total: told.append((done, total)))
    assert found.model_hash == live.model_hash
    assert (found.name, found.trained) == (live.config.name, live.trained)
    assert TowerIdentity.of(found.towers["lm"], "") == TowerIdentity.of(live.towers["lm"], "")
    assert told[-1] == (0, 0)  # millions
    assert len(told) > 5


def test_a_directory_that_is_no_whole_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = save_sparse(tmp_path / "c", fabricate.tiny_config())
    CheckpointVectors(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2])
    with pytest.raises(SteerError, match="not a whole safetensors file"):
        CheckpointVectors(folder)
    with pytest.raises(SteerError, match="not a directory"):
        CheckpointVectors(tmp_path / "absent")


@pytest.mark.heavy
def test_a_checkpoint_of_7b_is_identified_within_a_gigabyte(tmp_path: Path) -> None:
    folder = save_sparse(tmp_path / "c", OPENVLA_7B)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = CheckpointVectors(folder)
    assert len(found.model_hash) == 64
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    tower = found.towers["lm"]
    assert (tower.layers, tower.d_model, tower.d_ff) == (32, 4096, 11008)
    assert grown_mb < 500
