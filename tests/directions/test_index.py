"""Search finds what the labels say, in the order it promises, and refuses words that are no tokens."""

from __future__ import annotations

from collections.abc import Callable

import fabricate
import pytest

from steer_runtime.directions import index
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


def refused(action: Callable[[], object]) -> SteerError:
    with pytest.raises(SteerError) as caught:
        action()
    return caught.value
