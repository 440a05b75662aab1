"""The pocket Pi0: SmolLM2 in a Gemma's shell as the prefix of transformers' own class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fabricate_pi0
import pytest
import torch
from torch import nn

from steer_runtime.directions.checkpoint_vectors import CheckpointVectors
from steer_runtime.errors import SteerError
from steer_runtime.policies.pi0 import pocket
from steer_runtime.policies.pi0.pocket import assemble, build_pocket_pi0
from steer_runtime.policies.pi0.pocket_spec import PocketPi0Spec
from steer_runtime.policies.pi0.policy import Pi0Policy

LAYERS = (2, 15, 28)
OPTIONS = {"image_size": 56, "vision_hidden": 64, "vision_blocks": 1, "chunk": 4, "euler_steps": 2}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, smollm2: Any) -> Path:
    out = tmp_path_factory.mktemp("pocket") / "pi0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pocket, "load_smollm2", lambda _: smollm2)  # the same objects: reading the GGUF takes 20 s
        return build_pocket_pi0(out, layers=LAYERS, extra_rows=8, **OPTIONS)


@pytest.fixture(scope="module")
def policy(built: Path) -> Pi0Policy:
    return Pi0Policy.from_checkpoint(built)


def _llama_states(source: Any, ids: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
    """Last hidden states of SmolLM2 reduced to some layers, causal."""
    reference = source.model
    hidden = reference.embed_tokens(ids)
    rotary = reference.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    for index, layer in enumerate(nn.ModuleList([reference.layers[i] for i in layers])):
        layer.self_attn.layer_idx = index
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    return reference.norm(hidden)


def _shell_states(network: Any, ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states of the prefix on text alone, causal as SmolLM2 was trained."""
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]
    return network.language_model(input_ids=ids, attention_mask=causal).last_hidden_state


@torch.inference_mode()
def test_the_prefix_computes_what_smollm2_does(policy: Pi0Policy, smollm2: Any) -> None:
    source, tokenizer = smollm2
    ids = torch.tensor([tokenizer.encode("move the arm slowly to the left, then faster to the right")])
    expected = _llama_states(source, ids, LAYERS)
    torch.testing.assert_close(_shell_states(policy.model, ids), expected, atol=5e-5, rtol=1e-5)


@pytest.mark.heavy
@torch.inference_mode()
def test_all_thirty_layers_compute_what_smollm2_does(smollm2: Any) -> None:
    source, tokenizer = smollm2
    network = assemble(PocketPi0Spec(layers=tuple(range(30)), from_base=False, **OPTIONS), source)  # type: ignore[arg-type]
    ids = torch.tensor([tokenizer.encode("move the arm slowly to the left, then faster to the right")])
    expected = _llama_states(source, ids, range(30))
    torch.testing.assert_close(_shell_states(network, ids), expected, atol=1e-4, rtol=1e-4)


def test_its_token_basis_is_smollm2s_up_to_one_factor(policy: Pi0Policy, smollm2: Any) -> None:
    source, tokenizer = smollm2
    torch.testing.assert_close(policy.unembedding[:49152] * 24.0, source.model.embed_tokens.weight)
    assert torch.count_nonzero(policy.unembedding[49152:]) == 0
    assert policy.tokenizer.encode(" speed") == tokenizer.encode(" speed")


def test_what_smollm2_has_is_left_to_its_file(built: Path, policy: Pi0Policy, smollm2: Any) -> None:
    from safetensors import safe_open

    with safe_open(built / "model.safetensors", framework="pt") as file:
        keys = list(file.keys())
    assert not [key for key in keys if ".language_model.layers." in key or key.endswith("lm_head.weight")]
    assert (built / "model.safetensors").stat().st_size < 45e6
    whole = assemble(PocketPi0Spec(layers=LAYERS, extra_rows=8, **OPTIONS), smollm2[0])  # type: ignore[arg-type]
    loaded = dict(policy.model.named_parameters())
    assert all(torch.allclose(value, loaded[name], atol=1e-7) for name, value in whole.named_parameters())


def test_its_files_have_the_hash_of_the_loaded_policy(built: Path, policy: Pi0Policy) -> None:
    files = CheckpointVectors(built)
    assert files.model_hash == policy.model_hash
    torch.testing.assert_close(files.unembedding[:], policy.unembedding)


def test_it_acts_and_says_that_it_is_untrained(policy: Pi0Policy) -> None:
    observation = fabricate_pi0.make_observation()
    chunk = policy.infer(observation)
    assert chunk.actions.shape == (4, 7)
    assert abs(chunk.actions[:, :3]).max() < 1.0
    assert not policy.trained
    assert policy.towers["expert"].d_model == 192
    assert list(policy.towers["prefix"].steerable_layers) == [0, 1]


@pytest.mark.parametrize("changes", [{"layers": [3]}, {"layers": [3, 1]}, {"layers": [0, 30]}, {"expert_width": 191}])
def test_unusable_specifications_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(SteerError) as refused:
        build_pocket_pi0(tmp_path / "out", **changes)
    assert refused.value.code == "bad_pocket"
