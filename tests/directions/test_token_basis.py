"""Labels are what the full multiplication says, and a cache never passes off anything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from steer_runtime.directions.projection import Blocks
from steer_runtime.directions.token_basis import LabelCache, Labels, TokenBasis, TowerIdentity
from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.types import Tower

MODEL = "c" * 64
LAYERS, D_MODEL, D_FF, VOCAB = 3, 12, 20, 384


def random_tower(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tower:
    torch.manual_seed(seed)
    layers = [nn.Linear(D_FF, D_MODEL, bias=False, dtype=dtype) for _ in range(LAYERS)]
    return Tower("lm", layers, [nn.Identity()] * (LAYERS + 1), D_MODEL, D_FF, 8, 1)


def random_basis(policy: OpenVLAPolicy, dtype: torch.dtype = torch.float32) -> TokenBasis:
    rows = torch.randn(VOCAB, D_MODEL, generator=torch.Generator().manual_seed(1)).to(dtype)
    return TokenBasis(rows, policy.tokenizer, policy.action_token_values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1, 7, D_FF, 4096])
def test_labels_are_the_largest_of_the_whole_product(
    tiny_policy: OpenVLAPolicy, dtype: torch.dtype, block: int
) -> None:
    """The published method in one line: for each column w of W_down, the tokens t with the largest w . E[t]."""
    tower, basis = random_tower(dtype), random_basis(tiny_policy, dtype)
    labels = basis.project(tower, MODEL, top_k=10, blocks=Blocks(block, 100))
    embedding = basis.unembedding.double().numpy()
    for layer in range(LAYERS):
        weight = tower.down_projs[layer].weight.detach().double().numpy()  # type: ignore[attr-defined]
        scores = weight.T @ embedding.T
        best = np.argsort(-scores, axis=1)[:, :10]
        np.testing.assert_array_equal(labels.tokens[layer], best)
        np.testing.assert_allclose(labels.scores[layer], np.take_along_axis(scores, best, 1), rtol=1e-5, atol=1e-6)


def test_the_labels_of_a_policy_are_those_of_its_own_weights(tiny_policy: OpenVLAPolicy) -> None:
    tower = tiny_policy.towers["lm"]
    labels = TokenBasis.of(tiny_policy).project(tower, tiny_policy.model_hash, top_k=1)
    vector = tiny_policy.model.language_model.model.layers[2].mlp.down_proj.weight[:, 17]
    assert labels.tokens[2, 17, 0] == (tiny_policy.unembedding @ vector).argmax()


def test_chosen_layers_have_the_labels_they_have_among_all(tiny_policy: OpenVLAPolicy) -> None:
    tower, basis = random_tower(), random_basis(tiny_policy)
    some, every = basis.project(tower, MODEL, layers=[2, 0]), basis.project(tower, MODEL)
    assert some.text(2, 5) == every.text(2, 5)
    assert some.text(0, 5) == every.text(0, 5)


def test_progress_reaches_the_whole(tiny_policy: OpenVLAPolicy) -> None:
    heard: list[tuple[int, int]] = []
    random_basis(tiny_policy).project(
        random_tower(), MODEL, blocks=Blocks(8, 100), progress=lambda *done: heard.append(done)
    )
    assert heard[0][0] < D_FF
    assert heard[-1] == (LAYERS * D_FF, LAYERS * D_FF)
    assert heard == sorted(heard)


def test_action_tokens_are_shown_as_their_bin_centre(tiny_policy: OpenVLAPolicy) -> None:
    token, value = next(iter(tiny_policy.action_token_values().items()))
    assert TokenBasis.of(tiny_policy).text(token) == f"[action: {value:.3f}]"


def test_padding_rows_have_a_text_of_their_own(tiny_policy: OpenVLAPolicy) -> None:
    assert TokenBasis.of(tiny_policy).text(VOCAB - 1) == f"[row {VOCAB - 1}]"


def test_a_weight_that_is_not_finite_is_refused(tiny_policy: OpenVLAPolicy) -> None:
    tower = random_tower()
    with torch.no_grad():
        tower.down_projs[1].weight[3, 4] = float("nan")  # type: ignore[attr-defined]
    assert refused(lambda: random_basis(tiny_policy).project(tower, MODEL)).code == "not_finite"


def test_a_basis_of_another_width_is_refused(tiny_policy: OpenVLAPolicy) -> None:
    basis = TokenBasis(torch.randn(VOCAB, D_MODEL + 1), tiny_policy.tokenizer)
    assert refused(lambda: basis.project(random_tower(), MODEL)).code == "bad_token_basis"


@pytest.mark.parametrize("layers", [[LAYERS], [-1], []])
def test_layers_that_do_not_exist_are_refused(tiny_policy: OpenVLAPolicy, layers: list[int]) -> None:
    basis = random_basis(tiny_policy)
    assert refused(lambda: basis.project(random_tower(), MODEL, layers=layers)).code == "layer_out_of_range"


def test_a_neuron_without_labels_is_refused(tiny_policy: OpenVLAPolicy) -> None:
    labels = random_basis(tiny_policy).project(random_tower(), MODEL, layers=[1])
    assert refused(lambda: labels.text(0, 0)).code == "layer_out_of_range"
    assert refused(lambda: labels.text(1, D_FF)).code == "neuron_out_of_range"
    assert refused(lambda: labels.text(1, -1)).code == "neuron_out_of_range"


def test_words_are_found_whatever_their_case_and_space(tiny_policy: OpenVLAPolicy) -> None:
    basis = TokenBasis.of(tiny_policy)
    (token,) = basis.tokens_of(" UP")
    assert basis.text(token) == "up"


def test_an_unknown_word_is_answered_with_the_nearest(tiny_policy: OpenVLAPolicy) -> None:
    error = refused(lambda: TokenBasis.of(tiny_policy).tokens_of("slowish"))
    assert error.code == "unknown_word"
    assert "'slow'" in error.sentence


def test_flat_indices_are_layer_times_width_plus_neuron() -> None:
    identity = TowerIdentity("lm", MODEL, 32, 4096, 11008)
    assert identity.flat(21, 6514) == 237682
    assert identity.unflat(237682) == (21, 6514)


class Cached:
    """A cache in a folder, with the notices it gave."""

    def __init__(self, root: Path, policy: OpenVLAPolicy) -> None:
        self.notices: list[str] = []
        self.cache = LabelCache(root, self.notices.append)
        self.basis, self.tower = random_basis(policy), random_tower()
        self.computed: list[int] = []

    def labels(self, *, layers: list[int] | None = None, model: str = MODEL, top_k: int = 10) -> Labels:
        self.computed.clear()
        return self.cache.labels(
            self.basis,
            self.tower,
            model,
            layers=layers,
            top_k=top_k,
            progress=lambda done, _: self.computed.append(done),
        )


@pytest.fixture
def cached(tmp_path: Path, tiny_policy: OpenVLAPolicy) -> Cached:
    return Cached(tmp_path / "labels", tiny_policy)


def test_a_cache_hit_computes_nothing_and_says_the_same(cached: Cached) -> None:
    first = cached.labels()
    assert cached.computed
    second = cached.labels()
    assert cached.computed == []
    assert cached.notices == []
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(first.scores, second.scores)


def test_only_the_layers_that_are_missing_are_computed(cached: Cached) -> None:
    cached.labels(layers=[0, 2])
    cached.labels()
    assert cached.computed[-1] == D_FF


@pytest.mark.parametrize("change", [{"model": "d" * 64}, {"top_k": 5}])
def test_another_model_or_label_size_is_another_entry(cached: Cached, change: dict) -> None:
    cached.labels()
    cached.labels(**change)
    assert cached.computed[-1] == LAYERS * D_FF
    assert cached.notices == []


def test_labels_of_a_model_whose_hash_shares_the_folder_are_not_used(cached: Cached) -> None:
    cached.labels()
    cached.labels(model=MODEL[:16] + "e" * 48)
    assert cached.computed[-1] == LAYERS * D_FF
    assert cached.cache.discarded == LAYERS


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "text"])
def test_a_damaged_entry_is_computed_again_and_said_so(cached: Cached, damage: str) -> None:
    good = cached.labels()
    path = cached.cache.path(good.identity, 1)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
    path.write_bytes({"torn": content[:-9], "flipped": content, "empty": b"", "text": b"labels"}[damage])
    again = cached.labels()
    np.testing.assert_array_equal(good.tokens, again.tokens)
    np.testing.assert_array_equal(good.scores, again.scores)
    assert cached.computed[-1] == D_FF
    assert (cached.cache.discarded, len(cached.notices)) == (1, 1)
    assert "layer-001" in cached.notices[0]


def refused(action: object) -> SteerError:
    with pytest.raises(SteerError) as caught:
        action()  # type: ignore[operator]
    return caught.value
