"""Comparing labels counts what they share, names what moved most, and refuses models that cannot be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import fabricate
import numpy as np
import pytest
import torch

from steer_runtime.directions.comparison import compare, kept, label_survival, shared_tokens
from steer_runtime.directions.token_basis import Labels, TokenBasis
from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.policy import OpenVLAPolicy


@pytest.fixture
def before(tiny_policy: OpenVLAPolicy) -> Labels:
    rows = {
        (0, 1): [("up", 2.0), ("above", 1.0), ("high", 0.9)],
        (0, 5): [("slow", 9.0), ("slower", 3.0), ("slowly", 2.0)],
        (1, 2): [("fast", 4.0), ("quick", 0.5), ("speed", 0.2)],
    }
    return fabricate.made_labels(tiny_policy, rows)


def changed(labels: Labels, cells: dict[tuple[int, int], list[str]]) -> Labels:
    tokens = labels.tokens.copy()
    for (row, neuron), words in cells.items():
        tokens[row, neuron] = [labels.basis.tokens_of(word)[0] for word in words]
    return replace(labels, tokens=tokens)


def test_shared_tokens_are_counted_whatever_their_order() -> None:
    before = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    after = np.array([[4, 3, 9, 8], [1, 2, 3, 8]])
    assert shared_tokens(before, after).tolist() == [2, 1]
    assert kept(before, after).tolist() == [True, False]


def test_label_survival_counts_value_vectors_whose_words_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    words, before = torch.randn(500, 16, generator=generator), torch.randn(16, 40, generator=generator)
    after = before.clone()
    after[:, :10] = torch.randn(16, 10, generator=generator)
    assert label_survival(before, before, words) == 1.0
    assert 0.74 <= label_survival(before, after, words) <= 0.8
    assert label_survival(before, before * 3, words) == 1.0


def test_a_model_compared_with_itself_has_moved_nothing(before: Labels) -> None:
    found = compare(before, before)
    assert (found.share, found.moved) == (1.0, ())
    assert [(pair.kept, pair.unchanged, pair.lost) for pair in found.layers] == [(8, 8, 0), (8, 8, 0)]


def test_each_layer_counts_what_it_kept_and_lost(before: Labels) -> None:
    after = changed(before, {(0, 1): ["high", "up", "low"], (0, 5): ["left", "right", "open"]})
    found = compare(before, after)
    assert [(pair.kept, pair.unchanged, pair.lost) for pair in found.layers] == [(7, 6, 1), (8, 8, 0)]
    assert found.share == 15 / 16


def test_most_moved_are_the_clearest_labels_that_lost_all(before: Labels) -> None:
    gone = ["left", "right", "open"]
    found = compare(before, changed(before, {(1, 2): gone, (0, 5): gone, (0, 1): ["up", "left", "open"]}), top=3)
    assert [(m.before, m.neuron, m.shared) for m in found.moved] == [(0, 5, 0), (1, 2, 0), (0, 1, 1)]
    assert found.moved[0].label_before == ("slow", "slower", "slowly")
    assert found.moved[0].label_after == ("left", "right", "open")


def test_labels_that_turned_into_actions_are_counted(before: Labels) -> None:
    actions = list(before.basis.action_values)
    tokens = before.tokens.copy()
    tokens[0, 1, :2] = actions[:2]  # two of three
    tokens[0, 5, :1] = actions[:1]  # one of three
    after = replace(before, tokens=tokens)
    assert [pair.became_action for pair in compare(before, after).layers] == [1, 0]
    assert [pair.became_action for pair in compare(after, before).layers] == [0, 0]


def test_layers_are_paired_in_order(before: Labels) -> None:
    swapped = replace(before, layers=(1, 0), tokens=before.tokens[::-1], scores=before.scores[::-1])
    found = compare(before, swapped)
    assert [(pair.before, pair.after) for pair in found.layers] == [(0, 1), (1, 0)]
    assert found.share == 10 / 16


def test_models_of_other_shapes_are_refused(before: Labels) -> None:
    smaller = replace(before, layers=(0,), tokens=before.tokens[:1], scores=before.scores[:1])
    assert refused(lambda: compare(before, smaller)).code == "other_model"


def test_models_with_other_tokenizers_are_refused(before: Labels) -> None:
    class Shouting:
        def __len__(self) -> int:
            return len(before.basis.tokenizer)

        def convert_ids_to_tokens(self, token: int) -> str:
            return str(before.basis.tokenizer.convert_ids_to_tokens(token))

        def decode(self, tokens: list[int]) -> str:
            return str(before.basis.tokenizer.decode(tokens)).upper()

    basis = TokenBasis(before.basis.unembedding, Shouting(), before.basis.action_values)
    error = refused(lambda: compare(before, replace(before, basis=basis)))
    assert error.code == "other_vocabulary"
    assert "'up'" in error.sentence or "reads" in error.sentence


def refused(action: Callable[[], object]) -> SteerError:
    with pytest.raises(SteerError) as caught:
        action()
    return caught.value
