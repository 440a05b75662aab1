"""Checkpoints in the published layout: read whole or refused by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fabricate
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.checkpoint import load_checkpoint, save_checkpoint
from steer_runtime.policies.openvla.config import OPENVLA_7B, emit_config, parse_config
from steer_runtime.policies.openvla.layout import entries, zero_filled
from steer_runtime.policies.openvla.model import OpenVLAModel
from steer_runtime.policies.openvla.policy import OpenVLAPolicy

PUBLISHED_KEYS = {
    key: tuple(shape)
    for key, shape in json.loads((Path(__file__).parents[1] / "data" / "openvla_7b_keys.json").read_text()).items()
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded tiny checkpoint; tests copy it before they damage it."""
    return fabricate.save_tiny(tmp_path_factory.mktemp("saved") / "sharded", shard_bytes=60_000)


@pytest.fixture
def sharded(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def _rewrite(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors and store them as one file."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, str(directory / "model.safetensors"))


def _refusal(directory: Path) -> SteerError:
    with pytest.raises(SteerError) as refused:
        load_checkpoint(directory)
    return refused.value


def test_7b_keys_and_shapes_are_the_published_ones() -> None:
    assert {e.key: e.shape for e in entries(OPENVLA_7B)} == PUBLISHED_KEYS


def test_7b_tensors_fill_every_parameter_exactly() -> None:
    with torch.device("meta"):
        parameters = dict(OpenVLAModel(OPENVLA_7B).named_parameters())
    filled: dict[str, int] = {}
    for entry in entries(OPENVLA_7B):
        for target in entry.targets:
            stop = entry.shape[0] if target.stop is None else target.stop
            rows = (stop - target.start) / entry.shape[0]
            filled[target.parameter] = filled.get(target.parameter, 0) + round(rows * torch.Size(entry.shape).numel())
    sizes = {name: p.numel() for name, p in parameters.items()}
    assert sizes.pop("dino.embeddings.mask_token") == 1024
    sizes["dino.embeddings.position_embeddings"] -= 1024  # the CLS row, which stays zero
    assert filled == sizes
    assert set(zero_filled(OPENVLA_7B)) <= set(parameters)


def test_tiny_layout_has_the_published_key_names() -> None:
    def generic(keys: set[str]) -> set[str]:
        return {".".join("N" if part.isdecimal() else part for part in key.split(".")) for key in keys}

    assert generic({e.key for e in entries(fabricate.tiny_config())}) == generic(set(PUBLISHED_KEYS))


def test_a_published_config_json_is_the_7b_architecture() -> None:
    published = {
        "model_type": "openvla",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "n_action_bins": 256,
        "pad_to_multiple_of": 64,
        "text_config": {"model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16", "vocab_size": 32064},
        "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
        "norm_stats": {},
    }
    config = parse_config(published)
    assert (config.dino, config.siglip, config.lm) == (OPENVLA_7B.dino, OPENVLA_7B.siglip, OPENVLA_7B.lm)
    assert (config.usable_vocab, config.append_token_id, config.restrict_to_action_tokens) == (32000, 29871, False)


def test_config_survives_its_json() -> None:
    for config in (OPENVLA_7B, fabricate.tiny_config()):
        assert parse_config(json.loads(json.dumps(emit_config(config)))) == config


@pytest.mark.parametrize("shard_bytes", [60_000, 4 << 30])
def test_a_loaded_model_computes_what_the_saved_one_did(tmp_path: Path, shard_bytes: int) -> None:
    source = fabricate.tiny_policy()
    directory = fabricate.save_tiny(tmp_path / "checkpoint", model=source.model, shard_bytes=shard_bytes)
    loaded = OpenVLAPolicy.from_checkpoint(directory, "libero_object")
    seen = fabricate.make_observation(source)
    assert torch.equal(loaded.logits(seen), source.logits(seen))
    assert loaded.prompt_ids(seen.instruction) == source.prompt_ids(seen.instruction)
    assert loaded.model_hash == source.model_hash
    assert loaded.report is not None
    assert (loaded.report.not_persistent, loaded.report.absent) == ((), ())


def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    lm = fabricate.tiny_config().lm
    model = fabricate.tiny_model(fabricate.tiny_config(lm=type(lm)(**{**vars(lm), "tied": True})))
    directory = fabricate.save_tiny(tmp_path / "tied", model=model)
    loaded, _ = load_checkpoint(directory)
    assert "language_model.lm_head.weight" not in load_file(directory / "model.safetensors")
    assert loaded.unembedding is loaded.language_model.model.embed_tokens.weight
    assert torch.equal(loaded.unembedding, model.unembedding)


def test_bfloat16_and_its_float32_copy_have_one_hash(tmp_path: Path) -> None:
    directory = fabricate.save_tiny(tmp_path / "bf16", model=fabricate.tiny_model(dtype=torch.bfloat16))
    half = OpenVLAPolicy.from_checkpoint(directory, "libero_object")
    full = OpenVLAPolicy.from_checkpoint(directory, "libero_object", dtype=torch.float32)
    assert (half.unembedding.dtype, full.unembedding.dtype) == (torch.bfloat16, torch.float32)
    assert half.model_hash == full.model_hash
    assert half.model_hash != fabricate.tiny_policy().model_hash


def test_a_bfloat16_policy_acts(tmp_path: Path) -> None:
    policy = fabricate.tiny_policy(dtype=torch.bfloat16)
    assert policy.infer(fabricate.make_observation(policy)).actions.shape == (1, 7)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    gone = sorted(sharded.glob("model-*.safetensors"))[-1]
    gone.unlink()
    error = _refusal(sharded)
    assert error.code == "missing_shard"
    assert gone.name in str(error)


def test_a_missing_tensor_is_named(sharded: Path) -> None:
    key = "vision_backbone.featurizer.blocks.1.attn.qkv.weight"
    _rewrite(sharded, lambda tensors: tensors.__delitem__(key))
    error = _refusal(sharded)
    assert error.code == "missing_weights"
    assert key in str(error)


def test_a_shard_without_its_promised_tensor_is_named(sharded: Path) -> None:
    shard = next(p for p in sorted(sharded.glob("model-*.safetensors")) if "projector.fc1.weight" in load_file(p))
    tensors = load_file(shard)
    del tensors["projector.fc1.weight"]
    save_file(tensors, str(shard))
    error = _refusal(sharded)
    assert error.code == "missing_weights"
    assert shard.name in str(error)
    assert "projector.fc1.weight" in str(error)


def test_an_unexpected_tensor_is_named(sharded: Path) -> None:
    _rewrite(
        sharded, lambda tensors: tensors.update({"language_model.model.layers.3.mlp.down_proj.weight": torch.ones(2)})
    )
    error = _refusal(sharded)
    assert error.code == "unexpected_weights"
    assert "layers.3.mlp.down_proj.weight" in str(error)


def test_a_wrong_shape_is_named_with_both_shapes(sharded: Path) -> None:
    _rewrite(sharded, lambda tensors: tensors.update({"projector.fc3.weight": torch.ones(32, 31)}))
    error = _refusal(sharded)
    assert error.code == "misshaped_weights"
    assert "projector.fc3.weight is [32, 31], expected [32, 32]" in str(error)


def test_many_missing_names_make_one_short_sentence(sharded: Path) -> None:
    def drop_the_language_model(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith("language_model")]:
            del tensors[key]

    _rewrite(sharded, drop_the_language_model)
    assert len(str(_refusal(sharded))) < 700


def test_integer_weights_are_refused(sharded: Path) -> None:
    _rewrite(sharded, lambda tensors: tensors.update({"projector.fc3.bias": torch.ones(32, dtype=torch.int8)}))
    assert "projector.fc3.bias is I8" in str(_refusal(sharded))


def test_derived_entries_are_left_aside_and_reported(sharded: Path) -> None:
    extra = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    _rewrite(sharded, lambda tensors: tensors.update({extra: torch.ones(4)}))
    assert load_checkpoint(sharded)[1].not_persistent == (extra,)


def test_tensors_no_action_needs_may_be_absent_and_are_reported(sharded: Path) -> None:
    key = "vision_backbone.fused_featurizer.attn_pool.latent"
    _rewrite(sharded, lambda tensors: tensors.__delitem__(key))
    assert load_checkpoint(sharded)[1].absent == (key,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
def test_pickles_are_refused_by_name(sharded: Path, name: str) -> None:
    for path in [*sharded.glob("*.safetensors"), sharded / "model.safetensors.index.json"]:
        path.unlink()
    (sharded / name).write_bytes(b"\x80\x04.")
    error = _refusal(sharded)
    assert error.code == "pickle_refused"
    assert name in str(error)


@pytest.mark.parametrize(
    ("shard", "code"), [("pytorch_model.bin", "pickle_refused"), ("../x.safetensors", "torn_file")]
)
def test_an_index_pointing_elsewhere_is_refused(sharded: Path, shard: str, code: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    assert _refusal(sharded).code == code


@pytest.mark.parametrize("keep", [4, 200, -7])
def test_a_torn_file_is_named(sharded: Path, keep: int) -> None:
    torn = sorted(sharded.glob("*.safetensors"))[0]
    torn.write_bytes(torn.read_bytes()[:keep])
    error = _refusal(sharded)
    assert error.code == "torn_file"
    assert torn.name in str(error)


def test_a_garbled_header_is_refused(sharded: Path) -> None:
    garbled = sorted(sharded.glob("*.safetensors"))[0]
    garbled.write_bytes((1 << 62).to_bytes(8, "little") + b"{}" * 100)
    assert _refusal(sharded).code == "torn_file"


@pytest.mark.parametrize(
    "content", ["", "[]", '{"model_type": "llama"}', '{"model_type": "openvla", "text_config": 3}']
)
def test_another_models_configuration_is_refused(sharded: Path, content: str) -> None:
    (sharded / "config.json").write_text(content)
    assert _refusal(sharded).code == "bad_model_config"


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    assert _refusal(tmp_path / "nothing").code == "no_checkpoint"


def test_a_directory_without_weights_is_refused(sharded: Path) -> None:
    for path in [*sharded.glob("*.safetensors"), sharded / "model.safetensors.index.json"]:
        path.unlink()
    assert _refusal(sharded).code == "no_checkpoint"


def test_a_missing_or_torn_tokenizer_is_refused(sharded: Path) -> None:
    for damage in (lambda p: p.write_text("{"), lambda p: p.unlink()):
        damage(sharded / "tokenizer.json")
        with pytest.raises(SteerError) as refused:
            OpenVLAPolicy.from_checkpoint(sharded, "libero_object")
        assert refused.value.code == "no_tokenizer"


def test_saving_never_replaces(sharded: Path) -> None:
    with pytest.raises(SteerError) as refused:
        fabricate.save_tiny(sharded)
    assert refused.value.code == "exists"


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        save_checkpoint(fabricate.tiny_model(), tmp_path / "checkpoint", {}, finish=fail)
    assert list(tmp_path.iterdir()) == []


_MEASURE = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from steer_runtime.policies.openvla.checkpoint import load_checkpoint

def status(field):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(field))

load_checkpoint(Path(sys.argv[1]))
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = status("VmRSS")
model, _ = load_checkpoint(Path(sys.argv[2]))
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print((status("VmHWM") - before) / weights, weights)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's memory accounting")
def test_loading_peaks_below_1_2_times_the_weights(saved: Path, tmp_path: Path) -> None:
    lm = fabricate.tiny_config().lm
    big = fabricate.tiny_config(lm=type(lm)(**{**vars(lm), "d_model": 512, "d_ff": 4096, "layers": 8}))
    with torch.device("meta"):
        model = OpenVLAModel(big)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    directory = fabricate.save_tiny(tmp_path / "big", model=model, shard_bytes=150 << 20)
    assert len(list(directory.glob("*.safetensors"))) == 2
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(saved), str(directory)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    ratio, weights = (float(x) for x in result.stdout.split())
    assert weights > 200 << 20
    assert 0.9 < ratio < 1.2
