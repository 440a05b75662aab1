"""Search finds what the labels say, mean or point to, in the order it promises, and refuses words that are no tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import fabricate
import numpy as np
import pytest
import torch

from steer_runtime.directions import index
from steer_runtime.directions.similarity import WordSpace
from steer_runtime.directions.token_basis import Labels, TokenBasis
from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.policy import OpenVLAPolicy


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


def test_search_ranks_by_matching_tokens_then_by_score(labels: Labels) -> None:
    found = index.search(labels, ["up", "above"])
    assert [(m.layer, m.neuron, m.matches, m.rank, m.score) for m in found] == [
        (1, 2, 2, 0, 1.0),
        (1, 6, 1, 1, 4.0),
        (0, 5, 1, 1, 3.0),
        (0, 1, 1, 0, 2.0),
    ]


def test_search_leaves_out_vectors_that_say_both(labels: Labels) -> None:
    found = index.search(labels, ["up"], against=["below", "slow"])
    assert [(m.layer, m.neuron) for m in found] == [(0, 5), (1, 2)]


def test_search_finds_what_a_loop_over_the_texts_finds(tiny_policy: OpenVLAPolicy) -> None:
    labels = TokenBasis.of(tiny_policy).project(tiny_policy.towers["lm"], tiny_policy.model_hash)
    expected = {
        (layer, neuron)
        for layer in labels.layers
        for neuron in range(labels.identity.d_ff)
        if {t.strip().casefold() for t in labels.text(layer, neuron)} & {"fast", "quick"}
    }
    assert expected
    assert {(m.layer, m.neuron) for m in index.search(labels, ["Fast", " quick"])} == expected


def test_a_word_that_is_no_token_is_refused_by_name(labels: Labels) -> None:
    error = refused(lambda: index.search(labels, ["up", "skyward"]))
    assert error.code == "unknown_word"
    assert "'skyward'" in error.sentence


def test_search_needs_words(labels: Labels) -> None:
    assert refused(lambda: index.search(labels, [])).code == "unknown_word"


def vectors(policy: OpenVLAPolicy) -> Callable[[int], torch.Tensor]:
    return lambda layer: policy.towers["lm"].down_projs[layer].weight  # type: ignore[return-value]


def by_hand(labels: Labels, plus: list[str], minus: list[str], policy: OpenVLAPolicy) -> dict[tuple[int, int], float]:
    """Projection of every value vector, one at a time and in float64."""
    rows = labels.basis.unembedding.double()

    def mean(words: list[str]) -> torch.Tensor:
        return torch.stack([rows[list(labels.basis.tokens_of(word))].mean(0) for word in words]).mean(0)

    direction = mean(plus) - mean(minus)
    return {
        (layer, neuron): float(vectors(policy)(layer)[:, neuron].double() @ direction / direction.norm())
        for layer in labels.layers
        for neuron in range(labels.identity.d_ff)
    }


def test_near_ranks_by_the_likeness_of_label_and_words(labels: Labels) -> None:
    space = WordSpace.of(labels.basis)
    found = index.near(labels, space, ["up", "above"], top=100)
    assert len(found) == 16
    assert [n.cosine for n in found] == sorted((n.cosine for n in found), reverse=True)
    query = space.words(["up", "above"])
    for n in found:
        label = space.rows(labels.tokens[n.layer, n.neuron]).mean(0)
        assert n.cosine == pytest.approx(float(label @ query / label.norm()), abs=1e-5)
    assert (found[0].layer, found[0].neuron) == (1, 2)


def test_value_vectors_that_say_the_word_come_before_those_near_it(labels: Labels) -> None:
    found = index.near(labels, WordSpace.of(labels.basis), ["above"], top=5, says=["quick"], against=["below"])
    assert (found[0].layer, found[0].neuron, found[0].matches) == (0, 5, 1)
    assert [n.matches for n in found[1:]] == [0, 0, 0, 0]
    assert (1, 6) not in [(n.layer, n.neuron) for n in found]


def test_the_low_end_is_found_by_what_it_says(labels: Labels) -> None:
    basis = labels.basis
    low = np.full_like(labels.tokens, basis.tokens_of("word50")[0])
    low[1, 3, :2] = basis.tokens_of("slow")[0], basis.tokens_of("slower")[0]
    both = replace(labels, low_tokens=low, low_scores=-labels.scores)
    (found,) = index.near(both, WordSpace.of(basis), ["slow", "slower"], top=1)
    assert (found.layer, found.neuron, found.sign) == (1, 3, -1)
    assert found.label[:2] == ("slow", "slower")
    assert found.other == tuple(labels.text(1, 3))
    turned = index.negated(both)
    assert turned is not None
    assert [(m.layer, m.neuron, m.score) for m in index.search(turned, ["slower"])] == [(1, 3, pytest.approx(0.2))]
    assert index.negated(labels) is None


def test_a_contrast_projects_onto_the_difference_of_the_words(tiny_policy: OpenVLAPolicy) -> None:
    labels = TokenBasis.of(tiny_policy).project(tiny_policy.towers["lm"], tiny_policy.model_hash)
    found = index.contrast(labels, vectors(tiny_policy), ["fast", "quick"], ["slow"], top=4)
    expected = by_hand(labels, ["fast", "quick"], ["slow"], tiny_policy)
    ranked = sorted(expected, key=lambda pair: -expected[pair])
    assert [(n.layer, n.neuron) for n in found.plus] == ranked[:4]
    assert [(n.layer, n.neuron) for n in found.minus] == ranked[::-1][:4]
    for n in (*found.plus, *found.minus):
        assert n.projection == pytest.approx(expected[n.layer, n.neuron], rel=1e-4)
        length = float(vectors(tiny_policy)(n.layer)[:, n.neuron].norm())
        assert n.cosine == pytest.approx(n.projection / length, rel=1e-4)


def test_an_opposite_contrast_swaps_the_ends(tiny_policy: OpenVLAPolicy) -> None:
    labels = TokenBasis.of(tiny_policy).project(tiny_policy.towers["lm"], tiny_policy.model_hash)
    there = index.contrast(labels, vectors(tiny_policy), ["fast"], ["slow"], top=5)
    back = index.contrast(labels, vectors(tiny_policy), ["slow"], ["fast"], top=5)
    assert [(n.layer, n.neuron) for n in there.plus] == [(n.layer, n.neuron) for n in back.minus]


def test_chance_is_about_the_nearest_of_as_many_random_vectors(tiny_policy: OpenVLAPolicy) -> None:
    labels = TokenBasis.of(tiny_policy).project(tiny_policy.towers["lm"], tiny_policy.model_hash)
    count, width = labels.tokens.shape[0] * labels.tokens.shape[1], labels.identity.d_model
    drawn = torch.randn(50, count, width, generator=torch.Generator().manual_seed(0))
    nearest = torch.nn.functional.normalize(drawn, dim=-1)[..., 0].max(1).values.mean()
    chance = index.contrast(labels, vectors(tiny_policy), ["fast"], ["slow"], top=1).chance
    assert chance == pytest.approx(float(nearest), rel=0.05)


def test_a_contrast_without_a_side_or_difference_is_refused(tiny_policy: OpenVLAPolicy, labels: Labels) -> None:
    assert refused(lambda: index.contrast(labels, vectors(tiny_policy), ["up"], [], top=1)).code == "unknown_word"
    assert refused(lambda: index.contrast(labels, vectors(tiny_policy), ["up"], ["up"], top=1)).code == "no_direction"


def test_value_vectors_that_are_not_finite_are_refused(labels: Labels) -> None:
    def broken(layer: int) -> torch.Tensor:
        return torch.full((labels.identity.d_model, labels.identity.d_ff), float("nan"))

    assert refused(lambda: index.contrast(labels, broken, ["up"], ["below"], top=1)).code == "not_finite"


def refused(action: Callable[[], object]) -> SteerError:
    with pytest.raises(SteerError) as caught:
        action()
    return caught.value
