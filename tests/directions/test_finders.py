"""Every finder returns what its words, neurons or file say, and refuses what this model does not have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import fabricate
import numpy as np
import pytest
import torch

from steer_runtime.directions import finders
from steer_runtime.directions.finders import Recipe
from steer_runtime.directions.token_basis import Labels, TokenBasis, TowerIdentity
from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.policy import OpenVLAPolicy

RECIPE = Recipe("up", "2026-01-31")


@pytest.fixture
def labels(tiny_policy: OpenVLAPolicy) -> Labels:
    return fabricate.made_labels(
        tiny_policy,
        {
            (0, 1): [("up", 2.0), ("slow", 1.0)],
            (0, 5): [("quick", 9.0), ("up", 3.0)],
            (1, 2): [("up", 1.0), ("above", 0.5)],
            (1, 6): [("below", 5.0), ("up", 4.0)],
        },
    )


def test_from_words_overrides_the_best_matches_at_four(labels: Labels) -> None:
    direction = finders.from_words(labels, RECIPE, ["up", "above"], count=2)
    assert direction.neurons is not None
    assert direction.neurons.layer.tolist() == [1, 1]
    assert direction.neurons.neuron.tolist() == [2, 6]
    assert direction.neurons.alpha.tolist() == [4.0, 4.0]
    assert (direction.op, direction.proven) == ("override", False)


def test_from_words_remembers_how_it_was_found(labels: Labels) -> None:
    facts = finders.from_words(labels, RECIPE, ["up"], against=["slow"], count=1).provenance
    assert (facts["finder"], facts["words"], facts["against"]) == ("token", ["up"], ["slow"])
    assert (facts["date"], facts["alpha"]) == ("2026-01-31", 4.0)
    assert facts["neurons"][0]["label"][:2] == ["below", "up"]
    assert set(facts["versions"]) == {"torch", "transformers", "numpy"}


def test_the_same_inputs_make_the_same_direction(labels: Labels) -> None:
    made = [finders.from_words(labels, RECIPE, ["up"]).hash for _ in range(2)]
    assert made[0] == made[1]


def test_words_that_no_label_carries_are_refused(labels: Labels) -> None:
    assert refused(lambda: finders.from_words(labels, RECIPE, ["basket"])).code == "no_match"


@pytest.mark.parametrize(
    ("pairs", "code"),
    [
        ([(2, 0)], "layer_out_of_range"),
        ([(0, 8)], "neuron_out_of_range"),
        ([(0, -1)], "neuron_out_of_range"),
        ([(0, 2**40)], "neuron_out_of_range"),
        ([(0, 1), (0, 1)], "bad_direction"),
        ([], "bad_direction"),
    ],
)
def test_neurons_that_cannot_be_written_are_refused(labels: Labels, pairs: list[tuple[int, int]], code: str) -> None:
    assert refused(lambda: finders.from_neurons(labels.identity, RECIPE, pairs, labels=labels)).code == code


def test_from_neurons_keeps_the_labels_of_its_neurons(labels: Labels) -> None:
    direction = finders.from_neurons(labels.identity, RECIPE, [(0, 5)], labels=labels)
    assert direction.provenance["neurons"][0]["label"][:2] == ["quick", "up"]


@pytest.mark.parametrize(
    ("recipe", "code"),
    [
        (Recipe("up", "", alpha=float("nan")), "not_finite"),
        (Recipe("up", "", alpha=1e300), "not_finite"),
        (Recipe("up", "", op="clamp"), "bad_direction"),
        (Recipe("up", "", op="clamp", alpha=1.0, low=2.0), "bad_direction"),
        (Recipe("up", "", op="ablate", alpha=1.0), "bad_operation"),
        (Recipe("up", "", op="explode"), "bad_operation"),  # type: ignore[arg-type]
        (Recipe("up", "", span=frozenset()), "bad_span"),
        (Recipe("Up!", ""), "bad_name"),
        (Recipe("up", "", max_strength=2.0), "bad_max_strength"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(labels: Labels, recipe: Recipe, code: str) -> None:
    assert refused(lambda: finders.from_neurons(labels.identity, recipe, [(0, 5)])).code == code


def test_ablation_needs_no_alpha(labels: Labels) -> None:
    direction = finders.from_neurons(labels.identity, Recipe("off", "", op="ablate"), [(0, 5)])
    assert direction.neurons is not None
    assert direction.neurons.alpha.tolist() == [0.0]


def test_a_dense_direction_is_the_difference_of_mean_embeddings(tiny_policy: OpenVLAPolicy) -> None:
    identity, basis = identity_of(tiny_policy), TokenBasis.of(tiny_policy)
    recipe = Recipe("quick", "", alpha=3.0)
    direction = finders.dense_from_words(identity, recipe, basis, ["fast", "quick"], ["slow"])
    row = {word: tiny_policy.unembedding[basis.tokens_of(word)[0]].double() for word in ("fast", "quick", "slow")}
    expected = 3.0 * ((row["fast"] + row["quick"]) / 2 - row["slow"])
    assert direction.dense is not None
    assert list(direction.dense) == [0]
    np.testing.assert_allclose(direction.dense[0], expected.numpy(), rtol=1e-5, atol=1e-6)
    assert (direction.op, direction.span) == ("add", {"text"})


def test_a_dense_direction_of_untied_weights_uses_the_input_embedding(tiny_policy: OpenVLAPolicy) -> None:
    identity, basis = identity_of(tiny_policy), TokenBasis.of(tiny_policy)
    table = torch.randn(basis.vocab, identity.d_model, generator=torch.Generator().manual_seed(5))
    direction = finders.dense_from_words(identity, Recipe("quick", ""), basis, ["fast"], ["slow"], embedding=table)
    fast, slow = basis.tokens_of("fast")[0], basis.tokens_of("slow")[0]
    assert direction.dense is not None
    np.testing.assert_array_equal(direction.dense[0], (table[fast] - table[slow]).numpy())


@pytest.mark.parametrize(
    ("positive", "negative", "code"),
    [
        (["fast", "swiftly"], ["slow"], "unknown_word"),
        (["FAST"], ["slow"], "unknown_word"),
        (["fast"], [], "unknown_word"),
        (["fast"], ["fast"], "no_direction"),
    ],
)
def test_words_that_make_no_dense_direction_are_refused(
    tiny_policy: OpenVLAPolicy, positive: list[str], negative: list[str], code: str
) -> None:
    identity, basis = identity_of(tiny_policy), TokenBasis.of(tiny_policy)
    error = refused(lambda: finders.dense_from_words(identity, Recipe("quick", ""), basis, positive, negative))
    assert error.code == code


def test_no_path_of_this_machine_gets_into_a_card(labels: Labels) -> None:
    made = [
        finders.from_words(labels, RECIPE, ["up"]),
        finders.from_neurons(labels.identity, RECIPE, [(0, 1)], labels=labels),
    ]
    for direction in made:
        assert str(Path(__file__).parents[2]) not in json.dumps(direction.card())


def identity_of(policy: OpenVLAPolicy) -> TowerIdentity:
    return TowerIdentity.of(policy.towers["lm"], policy.model_hash)


def refused(action: Callable[[], object]) -> SteerError:
    with pytest.raises(SteerError) as caught:
        action()
    return caught.value
