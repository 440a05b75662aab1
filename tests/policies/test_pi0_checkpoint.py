"""Pi0 checkpoints: LeRobot's key layout, every key accounted for; statistics of both kinds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import fabricate_pi0
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from steer_runtime.directions.checkpoint_vectors import CheckpointVectors
from steer_runtime.directions.token_basis import TokenBasis
from steer_runtime.errors import SteerError
from steer_runtime.policies.pi0.checkpoint import load_checkpoint
from steer_runtime.policies.pi0.config import PI0, parse_config
from steer_runtime.policies.pi0.layout import NEVER_READ, ours_of, published_of
from steer_runtime.policies.pi0.network import Pi0Network, transformers_config
from steer_runtime.policies.pi0.policy import Pi0Policy
from steer_runtime.policies.pi0.statistics import add_state, read_statistics

LEROBOT_STATS = "policy_preprocessor_step_5_normalizer_processor.safetensors"


def _edit(directory: Path, change) -> Path:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, str(file))
    return directory


def _rewrite_config(directory: Path, **changes: object) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return fabricate_pi0.save_tiny(tmp_path / "pi0")


def test_what_is_saved_comes_back_to_the_bit(saved: Path) -> None:
    ours, report = load_checkpoint(saved)
    source = fabricate_pi0.tiny_network()
    assert ours.config == source.config
    assert set(dict(ours.named_parameters())) == set(dict(source.named_parameters()))
    assert all(torch.equal(p, dict(source.named_parameters())[n]) for n, p in ours.named_parameters())
    assert report.noteworthy == ""
    observation = fabricate_pi0.make_observation()
    again = Pi0Policy.from_checkpoint(saved)
    assert torch.equal(again.logits(observation), fabricate_pi0.tiny_policy().logits(observation))
    assert again.model_hash == fabricate_pi0.tiny_policy().model_hash


def test_the_layout_is_lerobots(saved: Path) -> None:
    keys = set(load_file(saved / "model.safetensors"))
    root = "model.paligemma_with_expert."
    assert {
        "model.state_proj.weight",
        "model.action_in_proj.bias",
        "model.action_time_mlp_out.weight",
        "model.action_out_proj.weight",
        f"{root}paligemma.lm_head.weight",
        f"{root}paligemma.model.language_model.layers.2.mlp.down_proj.weight",
        f"{root}paligemma.model.vision_tower.vision_model.embeddings.patch_embedding.weight",
        f"{root}paligemma.model.multi_modal_projector.linear.bias",
        f"{root}gemma_expert.model.layers.0.self_attn.q_proj.weight",
        f"{root}gemma_expert.model.norm.weight",
    } <= keys
    assert all(key.startswith("model.") for key in keys)


@pytest.mark.parametrize("form", ["no leading model.", "no vision_model.", "both names of the embedding"])
def test_other_spellings_of_the_layout_load_the_same(saved: Path, form: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            value = tensors.pop(key)
            if form == "no leading model.":
                key = key.removeprefix("model.")
            elif form == "no vision_model.":
                key = key.replace("vision_tower.vision_model.", "vision_tower.")
            elif form == "both names of the embedding" and key.endswith("paligemma.lm_head.weight"):
                tensors[key.replace("lm_head", "model.language_model.embed_tokens")] = value.clone()
            tensors[key] = value

    loaded, _ = load_checkpoint(_edit(saved, change))
    source = dict(fabricate_pi0.tiny_network().named_parameters())
    assert all(torch.equal(parameter, source[name]) for name, parameter in loaded.named_parameters())


def test_the_experts_vocabulary_is_named_and_not_read(saved: Path) -> None:
    head = "model.paligemma_with_expert.gemma_expert.lm_head.weight"
    network, report = load_checkpoint(_edit(saved, lambda tensors: tensors.update({head: torch.ones(384, 16)})))
    assert head in report.noteworthy
    assert "pi0.model.dit.embed_tokens.weight" not in dict(network.named_parameters())


def test_transformers_own_class_loads_the_same_file(saved: Path) -> None:
    from transformers import PI0ForConditionalGeneration

    theirs, info = PI0ForConditionalGeneration.from_pretrained(
        saved, config=transformers_config(fabricate_pi0.tiny_config()), dtype=torch.float32, output_loading_info=True
    )
    # The expert's embedding, which neither reads, is the one thing that LeRobot's files need not hold.
    assert set(info["missing_keys"]) <= {"model.dit.embed_tokens.weight"}
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    ours = {n.removeprefix("pi0."): p for n, p in load_checkpoint(saved)[0].named_parameters()}
    assert all(torch.equal(p, ours[n]) for n, p in theirs.named_parameters() if n != "model.dit.embed_tokens.weight")


def test_a_full_size_layout_has_every_published_key() -> None:
    with torch.device("meta"):
        network = Pi0Network(PI0)
    shapes = {published_of(name): tuple(p.shape) for name, p in network.named_parameters()}
    root = "model.paligemma_with_expert."
    assert shapes[f"{root}paligemma.lm_head.weight"] == (257152, 2048)
    assert shapes[f"{root}paligemma.model.language_model.layers.17.mlp.down_proj.weight"] == (2048, 16384)
    assert shapes[f"{root}gemma_expert.model.layers.17.mlp.down_proj.weight"] == (1024, 4096)
    assert shapes[f"{root}gemma_expert.model.layers.0.self_attn.k_proj.weight"] == (256, 1024)
    vision = f"{root}paligemma.model.vision_tower.vision_model."
    assert shapes[f"{vision}encoder.layers.26.mlp.fc1.weight"] == (4304, 1152)
    assert shapes["model.state_proj.weight"] == (1024, 32)
    assert shapes["model.action_out_proj.weight"] == (32, 1024)
    # 18 layers of 9 tensors and a norm in each tower, the embedding; 27 blocks of 16, embeddings 3, norm 2; projector 2; heads 10.
    assert len(shapes) == 2 * (18 * 9 + 1) + 1 + 27 * 16 + 3 + 2 + 2 + 10
    assert {ours_of(key) for key in shapes} == set(dict(network.named_parameters()))
    assert not any(NEVER_READ.match(key) for key in shapes)


def test_lerobots_and_openpis_configurations_are_the_published_size(tmp_path: Path) -> None:
    lerobot = {
        "type": "pi0",
        "chunk_size": 50,
        "n_action_steps": 50,
        "paligemma_variant": "gemma_2b",
        "num_inference_steps": 10,
    }
    openpi = {
        "action_dim": 32,
        "action_horizon": 50,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
    }
    assert parse_config(openpi, tmp_path) == PI0
    parsed = parse_config(lerobot, tmp_path)
    assert (parsed.prefix, parsed.expert, parsed.chunk, parsed.action_steps) == (PI0.prefix, PI0.expert, 50, 50)


def test_what_transformers_itself_saves_loads(tmp_path: Path) -> None:
    from transformers import PI0ForConditionalGeneration

    torch.manual_seed(0)
    config = fabricate_pi0.tiny_config(max_cameras=3)
    theirs = PI0ForConditionalGeneration(transformers_config(config))
    theirs.save_pretrained(tmp_path / "saved")
    network, report = load_checkpoint(tmp_path / "saved")
    ours = {name.removeprefix("pi0."): p for name, p in network.named_parameters()}
    for name, parameter in theirs.named_parameters():
        if name != "model.dit.embed_tokens.weight":
            assert torch.equal(parameter, ours[name]), name
    assert dataclasses.replace(network.config, trained=False, name="tiny-pi0", bos_token_id=1) == config
    assert report.absent == ()


def test_shards_and_their_index_load(tmp_path: Path) -> None:
    directory = fabricate_pi0.save_tiny(tmp_path / "pi0", shard_bytes=20_000)
    assert len(list(directory.glob("*.safetensors"))) > 3
    load_checkpoint(directory)


def _drop(key: str):
    return lambda tensors: tensors.pop(key)


def _put(key: str, *shape: int):
    return lambda tensors: tensors.update({key: torch.ones(shape)})


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (_drop("model.action_out_proj.bias"), "missing_weights", "model.action_out_proj.bias"),
        (_drop("model.paligemma_with_expert.paligemma.lm_head.weight"), "missing_weights", "lm_head"),
        (_put("model.something.weight", 3), "unexpected_weights", "model.something.weight"),
        (_put("model.state_proj.weight", 16, 8), "misshaped_weights", r"\[16, 8\], expected \[16, 9\]"),
        (_put("state_proj.bias", 16), "unexpected_weights", "twice"),
        (lambda t: t.update({"model.state_proj.bias": torch.ones(16, dtype=torch.int8)}), "misshaped_weights", "I8"),
    ],
)
def test_every_key_is_accounted_for(saved: Path, change, code: str, named: str) -> None:
    with pytest.raises(SteerError, match=named) as refused:
        load_checkpoint(_edit(saved, change))
    assert refused.value.code == code


@pytest.mark.parametrize(("kind", "sister"), [("pi05", "pi0.5"), ("pi0_fast", "pi0-FAST"), ("pi0fast", "pi0-FAST")])
def test_a_sister_is_refused_by_its_configuration(saved: Path, kind: str, sister: str) -> None:
    with pytest.raises(SteerError, match=f"checkpoint of {sister}, which is not supported yet") as refused:
        load_checkpoint(_rewrite_config(saved, type=kind))
    assert refused.value.code == "not_supported"


def test_a_sister_is_refused_by_its_tensors(saved: Path) -> None:
    with pytest.raises(SteerError, match=r"checkpoint of pi0\.5, which is not supported yet"):
        load_checkpoint(_edit(saved, _put("model.time_mlp_in.weight", 16, 16)))

    def without_expert(tensors: dict[str, torch.Tensor]) -> None:
        for key in [k for k in tensors if "paligemma.model" not in k]:
            del tensors[key]

    with pytest.raises(SteerError, match="checkpoint of pi0-FAST, which is not supported yet"):
        load_checkpoint(_edit(fabricate_pi0.save_tiny(saved.parent / "fast"), without_expert))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"type": "act"}, "expected 'pi0'"),
        ({"normalization_mapping": {"STATE": "QUANTILES"}}, "STATE by QUANTILES: expected MEAN_STD"),
        ({"paligemma_variant": "gemma_9b"}, "gemma_9b"),
        ({"chunk_size": "many"}, "not a Pi0 configuration"),
        ({"steer_runtime": {"colour": 1}}, "colour"),
    ],
)
def test_unusable_configurations_are_refused(saved: Path, changes: dict[str, object], named: str) -> None:
    with pytest.raises(SteerError, match=named) as refused:
        load_checkpoint(_rewrite_config(saved, **changes))
    assert refused.value.code == "bad_model_config"


def test_its_files_have_the_hash_and_the_labels_of_the_loaded_policy(saved: Path) -> None:
    loaded, files = Pi0Policy.from_checkpoint(saved), CheckpointVectors(saved)
    assert files.model_hash == loaded.model_hash
    assert (files.name, files.trained) == (loaded.name, loaded.trained)
    torch.testing.assert_close(files.final_norm, loaded.final_norm)
    ours, theirs = (
        TokenBasis.of(source).project(source.towers["prefix"], source.model_hash, top_k=5) for source in (files, loaded)
    )
    assert ours.identity == theirs.identity
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)


# -- statistics -----------------------------------------------------------------------------------------------------------


def _lerobot(path: Path, **changes: object) -> Path:
    arrays: dict[str, np.ndarray] = {
        "observation.state.mean": np.full(8, 0.5, np.float32),
        "observation.state.std": np.full(8, 2.0, np.float32),
        "action.mean": np.arange(7, dtype=np.float32),
        "action.std": np.full(7, 3.0, np.float32),
        "action.count": np.array([7.0], np.float32),
    }
    for key, value in changes.items():
        key = key.replace("__", ".")
        if value is None:
            del arrays[key]
        else:
            arrays[key] = np.asarray(value, np.float32)
    save_numpy(arrays, str(path))
    return path


def test_lerobots_statistics_are_preferred_and_used_as_there(saved: Path) -> None:
    _lerobot(saved / LEROBOT_STATS)
    statistics = read_statistics(saved)
    assert statistics.source == LEROBOT_STATS
    np.testing.assert_allclose(statistics.normalise_state(np.full(8, 4.5)), np.full(8, 2.0), rtol=1e-7)
    np.testing.assert_allclose(statistics.unnormalise(np.ones((2, 7))), np.tile(np.arange(7) + 3.0, (2, 1)))


def test_openpis_statistics_add_their_epsilon_both_ways(saved: Path) -> None:
    statistics = read_statistics(saved)
    state = statistics.normalise_state(np.full(8, 1.1))
    np.testing.assert_allclose(state, np.full(8, 1.0 / (0.5 + 1e-6)), rtol=1e-12)
    actions = np.random.default_rng(0).normal(size=(6, 7))
    np.testing.assert_allclose(statistics.normalise_action(statistics.unnormalise(actions)), actions, atol=1e-12)
    assert statistics.unnormalise(np.zeros(7))[1] == pytest.approx(0.1)


def test_statistics_padded_to_the_models_size_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "norm_stats.json"
    padded = {"mean": [1.0] * 8 + [0.0] * 24, "std": [2.0] * 8 + [0.0] * 24}
    path.write_text(json.dumps({"norm_stats": {"state": padded, "actions": padded}}))
    statistics = read_statistics(tmp_path)
    assert statistics.normalise_state(np.ones(8)).tolist() == [0.0] * 8
    assert statistics.unnormalise(np.zeros((1, 7))).tolist() == [[1.0] * 7]


def test_openpis_assets_are_found_and_several_are_refused(saved: Path) -> None:
    own = saved / "norm_stats.json"
    (saved / "assets" / "libero").mkdir(parents=True)
    own.rename(saved / "assets" / "libero" / "norm_stats.json")
    assert len(read_statistics(saved).state) == 8
    (saved / "assets" / "droid").mkdir()
    (saved / "assets" / "droid" / "norm_stats.json").write_text("{}")
    with pytest.raises(SteerError, match="several data sets") as refused:
        read_statistics(saved)
    assert refused.value.code == "no_statistics"
    assert len(read_statistics(saved, saved / "assets" / "libero" / "norm_stats.json").action) == 7


def test_without_statistics_there_is_no_policy(saved: Path) -> None:
    (saved / "norm_stats.json").unlink()
    with pytest.raises(SteerError, match=r"has no statistics .*: actions would be unscaled") as refused:
        Pi0Policy.from_checkpoint(saved)
    assert refused.value.code == "no_statistics"


@pytest.mark.parametrize(
    "changes",
    [
        {"action__std": None},
        {"observation.state__mean": None},
        {"action__std": [1.0] * 6},
        {"action__std": [-1.0] * 7},
        {"action__mean": [float("nan")] * 7},
        {"action__mean": [], "action__std": []},
    ],
)
def test_unusable_statistics_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    _lerobot(tmp_path / LEROBOT_STATS, **changes)
    with pytest.raises(SteerError) as refused:
        read_statistics(tmp_path)
    assert refused.value.code == "no_statistics"


@pytest.mark.parametrize("content", ["[", "{}", '{"norm_stats": {"state": {"mean": [1]}}}', '{"norm_stats": 3}'])
def test_a_torn_norm_stats_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "norm_stats.json").write_text(content)
    with pytest.raises(SteerError, match=r"norm_stats\.json") as refused:
        read_statistics(tmp_path)
    assert refused.value.code == "no_statistics"


def test_the_delta_transform_adds_the_state_to_all_but_the_gripper() -> None:
    actions, state = np.zeros((2, 7)), np.arange(1.0, 9.0)
    moved = add_state(actions, state)
    assert moved.tolist() == [[1, 2, 3, 4, 5, 6, 0]] * 2
    assert not actions.any()
