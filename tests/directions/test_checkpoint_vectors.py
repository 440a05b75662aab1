"""Labels of a checkpoint's files are those of the loaded model; a folder that is not whole is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fabricate
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from steer_runtime.directions.checkpoint_vectors import CheckpointVectors
from steer_runtime.directions.projection import Ends, LayerJob, one_process
from steer_runtime.directions.token_basis import LabelCache, Labels, TokenBasis
from steer_runtime.directions.units import in_units
from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.config import LMConfig
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.types import LIBERO_ACTION_SPACE

TIED = LMConfig(vocab_rows=384, d_model=32, d_ff=64, layers=3, heads=4, kv_heads=2, tied=True)
PI0 = "model.paligemma_with_expert.paligemma"


def openvla(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> Path:
    model = fabricate.tiny_model(fabricate.tiny_config(**({"lm": TIED} if tied else {})), dtype=dtype)
    return fabricate.save_tiny(folder, model=model)


def pi0(folder: Path, *, drop: str = "", shapes: dict[str, tuple[int, ...]] | None = None) -> Path:
    """A Pi0 prefix in LeRobot's names: 3 layers of 16 x 40, 320 tokens."""
    torch.manual_seed(0)
    sizes: dict[str, tuple[int, ...]] = {
        f"{PI0}.model.language_model.layers.{i}.mlp.down_proj.weight": (16, 40) for i in range(3)
    }
    sizes |= {f"{PI0}.model.language_model.norm.weight": (16,), f"{PI0}.lm_head.weight": (320, 16)}
    # The expert has down_projs too, which are not the prefix's.
    sizes |= {
        f"model.paligemma_with_expert.gemma_expert.model.layers.{i}.mlp.down_proj.weight": (8, 20) for i in range(3)
    }
    sizes |= shapes or {}
    folder.mkdir()
    save_file({k: torch.randn(s).bfloat16() for k, s in sizes.items() if k != drop}, folder / "model.safetensors")
    text = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 40, "vocab_size": 320}
    (folder / "config.json").write_text(json.dumps({"type": "pi0", "vlm_config": {"text_config": text}}))
    fabricate.tiny_tokenizer().save_pretrained(folder)
    return folder


def same(ours: Labels, theirs: Labels) -> None:
    for name in Ends._fields:
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", ["raw", "normed", "centred"])
def test_the_labels_of_the_files_are_those_of_the_loaded_policy(tmp_path: Path, tied: bool, variant: str) -> None:
    folder = openvla(tmp_path / "c", tied=tied)
    live, stored = OpenVLAPolicy.from_checkpoint(folder, "libero_object"), CheckpointVectors(folder)
    ours, theirs = (
        TokenBasis.of(source).project(source.towers["lm"], source.model_hash, variant=variant)  # type: ignore[arg-type, attr-defined]
        for source in (stored, live)
    )
    assert ours.identity == theirs.identity
    assert ours.text(1, 3) == theirs.text(1, 3)
    same(ours, theirs)


def test_the_prefix_of_pi0_is_read_by_lerobots_names(tmp_path: Path) -> None:
    folder = pi0(tmp_path / "pi0")
    stored = CheckpointVectors(folder)
    tensors = load_file(folder / "model.safetensors")
    labels = TokenBasis.of(stored).project(stored.towers["prefix"], stored.model_hash, variant="normed")
    rows = tensors[f"{PI0}.lm_head.weight"].double().numpy()
    gamma = 1.0 + tensors[f"{PI0}.model.language_model.norm.weight"].double().numpy()
    for layer in range(3):
        weight = tensors[f"{PI0}.model.language_model.layers.{layer}.mlp.down_proj.weight"].double().numpy()
        best = np.argsort(-(weight.T * gamma) @ rows.T, axis=1)[:, :10]
        np.testing.assert_array_equal(labels.tokens[layer], best)
    assert stored.action_token_values() == {}


@pytest.mark.parametrize(
    ("drop", "shapes", "code"),
    [
        (f"{PI0}.model.language_model.layers.1.mlp.down_proj.weight", {}, "missing_weights"),
        (f"{PI0}.lm_head.weight", {}, "missing_weights"),
        (f"{PI0}.model.language_model.norm.weight", {}, "missing_weights"),
        ("", {f"{PI0}.lm_head.weight": (320, 15)}, "misshaped_weights"),
        ("", {f"{PI0}.model.language_model.layers.2.mlp.down_proj.weight": (16, 41)}, "misshaped_weights"),
        ("", {f"{PI0}.model.language_model.layers.3.mlp.down_proj.weight": (16, 40)}, "misshaped_weights"),
    ],
)
def test_a_pi0_that_is_not_whole_is_refused(tmp_path: Path, drop: str, shapes: dict, code: str) -> None:
    folder = pi0(tmp_path / "pi0", drop=drop, shapes=shapes)
    assert refused(lambda: CheckpointVectors(folder)).code == code


@pytest.mark.parametrize(
    ("key", "shape", "code"),
    [
        ("language_model.model.layers.1.mlp.down_proj.weight", None, "missing_weights"),
        ("language_model.lm_head.weight", None, "missing_weights"),
        ("language_model.model.layers.1.mlp.down_proj.weight", (32, 63), "misshaped_weights"),
        ("language_model.lm_head.weight", (384, 31), "misshaped_weights"),
    ],
)
def test_an_openvla_that_is_not_whole_is_refused(
    tmp_path: Path, key: str, shape: tuple[int, ...] | None, code: str
) -> None:
    folder = openvla(tmp_path / "c")
    tensors = load_file(folder / "model.safetensors")
    del tensors[key]
    if shape is not None:
        tensors[key] = torch.zeros(shape, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    error = refused(lambda: CheckpointVectors(folder))
    assert error.code == code
    assert key in error.sentence


def test_other_folders_are_refused(tmp_path: Path) -> None:
    assert refused(lambda: CheckpointVectors(tmp_path / "none")).code == "no_checkpoint"
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert refused(lambda: CheckpointVectors(tmp_path)).code == "bad_model_config"


def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    stored = CheckpointVectors(openvla(tmp_path / "c"))
    basis, tower, notices = TokenBasis.of(stored), stored.towers["lm"], []

    def interrupted(jobs, done):  # type: ignore[no-untyped-def]
        yield from one_process(jobs[:2], done)
        raise KeyboardInterrupt

    broken, whole = (LabelCache(tmp_path / name, notices.append) for name in ("broken", "whole"))
    with pytest.raises(KeyboardInterrupt):
        broken.labels(basis, tower, stored.model_hash, run=interrupted)
    again: list[int] = []

    def counted(jobs: list[LayerJob], done):  # type: ignore[no-untyped-def]
        again.extend(job.layer for job in jobs)
        return one_process(jobs, done)

    broken.labels(basis, tower, stored.model_hash, run=counted)  # type: ignore[arg-type]
    whole.labels(basis, tower, stored.model_hash)
    assert again == [2]
    files = sorted(path.relative_to(broken.root) for path in broken.root.rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        assert (broken.root / file).read_bytes() == (whole.root / file).read_bytes()
    assert notices == []


def test_a_cached_label_is_told_apart_by_variant_and_precision(tmp_path: Path) -> None:
    stored = CheckpointVectors(openvla(tmp_path / "c"))
    basis, cache = TokenBasis.of(stored), LabelCache(tmp_path / "labels", print)
    for variant in ("raw", "normed"):
        for dtype in ("float32", "bfloat16"):
            found = cache.labels(basis, stored.towers["lm"], stored.model_hash, variant=variant, dtype=dtype)  # type: ignore[arg-type]
            fresh = basis.project(stored.towers["lm"], stored.model_hash, variant=variant, dtype=dtype)  # type: ignore[arg-type]
            same(found, fresh)
    assert len(list((tmp_path / "labels").iterdir())) == 4


def test_action_values_have_units_by_dimension() -> None:
    """dz: 0.5 (0.5 + 1) (0.3 + 0.3) - 0.3 = 0.15 of 5 cm; rx: 0.05 of 0.5 rad; the gripper's 0.5 closes."""
    texts = in_units(0.5, fabricate.tiny_statistics(), LIBERO_ACTION_SPACE)
    assert texts["dz"] == "dz +0.75 cm"
    assert texts["dx"] == "dx +1.25 cm"
    assert texts["rx"] == "rx +1.4 deg"
    assert texts["gripper"] == "close"
    assert in_units(0.6, fabricate.tiny_statistics(), LIBERO_ACTION_SPACE)["gripper"] == "open"


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shape", ["openvla-7b", "pi0"])
def test_a_layer_of_full_size_is_labelled_in_two_gigabytes(tmp_path: Path, shape: str) -> None:
    from benchmarks.full_shapes import SHAPES

    folder = SHAPES[shape](tmp_path / shape, [0])
    command = [sys.executable, "-m", "benchmarks.projection_full", "--child", str(folder), "bfloat16", "2", "0"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root, env={**os.environ})
    assert json.loads(done.stdout)["peak_gb"] < 2.0


def refused(action: object) -> SteerError:
    with pytest.raises(SteerError) as caught:
        action()  # type: ignore[operator]
    return caught.value
