"""Clusters hold value vectors that say the same, carry the words they share as names, and come out the same every time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from steer_runtime.directions import clustering
from steer_runtime.directions.clustering import clusters
from steer_runtime.directions.shares import action_share, is_semantic, shares
from steer_runtime.directions.similarity import WordSpace
from steer_runtime.directions.token_basis import Labels, TokenBasis, TowerIdentity
from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.policy import OpenVLAPolicy

SPEED = ("fast", "faster", "quick", "speed")
SLOW = ("slow", "slowly", "slower")
PLACES = ("left", "right", "above", "below")
D_FF, WIDTH, TOP_K = 40, 48, 3


@pytest.fixture
def labels(tiny_policy: OpenVLAPolicy) -> Labels:
    """Two layers: neurons 0-5 say speed, 6-9 slow, 10-13 places, 14-17 actions, the rest random tokens.

    The words of each topic have like embeddings; every other token is on its own.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(384, WIDTH, generator=generator)
    basis = TokenBasis(rows, tiny_policy.tokenizer, tiny_policy.action_token_values())
    for topic in (SPEED, SLOW, PLACES):
        shared = 3 * torch.randn(WIDTH, generator=generator)
        for word in topic:
            rows[basis.tokens_of(word)[0]] += shared
    rows[:, 0] += 30 * torch.randn(384, generator=generator)  # the common direction that is taken out
    draw = np.random.default_rng(0)
    others = [t for t in range(40, 64) if basis.text(t).startswith("word")]
    tokens = draw.choice(others, (2, D_FF, TOP_K)).astype(np.int32)
    for first, last, pool in (
        (0, 6, [basis.tokens_of(w)[0] for w in SPEED]),
        (6, 10, [basis.tokens_of(w)[0] for w in SLOW]),
        (10, 14, [basis.tokens_of(w)[0] for w in PLACES]),
        (14, 18, list(basis.action_values)),
    ):
        for row in range(2):
            for neuron in range(first, last):
                tokens[row, neuron] = draw.choice(pool, TOP_K, replace=False)
    identity = TowerIdentity("lm", "c" * 64, 2, WIDTH, D_FF)
    return Labels(identity, (0, 1), tokens, np.ones(tokens.shape, np.float32), basis)


@pytest.fixture
def space(labels: Labels) -> WordSpace:
    return WordSpace.of(labels.basis)


THRESHOLD = 0.5


def test_each_topic_is_one_cluster_over_all_layers(labels: Labels, space: WordSpace) -> None:
    found = clusters(labels, space, THRESHOLD)
    assert (len(found[0].members), {n for _, n in found[0].members}) == (12, set(range(6)))
    rest = [frozenset(n for _, n in c.members) for c in found[1:]]
    assert set(rest) == {frozenset(range(6, 10)), frozenset(range(10, 14))}
    assert {layer for c in found for layer, _ in c.members} == {0, 1}


def test_a_cluster_is_named_by_words_of_its_own(labels: Labels, space: WordSpace) -> None:
    for cluster in clusters(labels, space, THRESHOLD):
        topic = next(topic for topic in (SPEED, SLOW, PLACES) if cluster.name.split(", ")[0] in topic)
        assert set(cluster.name.split(", ")) <= set(topic)
        assert 1 <= len(cluster.name.split(", ")) <= 3


def test_a_name_prefers_what_marks_this_cluster_off() -> None:
    """Both hold `the` as often as their own word; what the other does not hold comes first."""
    names = clustering._names([[["the", "slow"], ["the", "slow"]], [["the", "fast"], ["the", "fast"]]])
    assert [name.split(", ")[0] for name in names] == ["slow", "fast"]


def test_a_name_is_no_word_that_few_labels_hold() -> None:
    (name,) = clustering._names([[["slow", "zebra"], ["slow", "x"], ["slow", "y"]]])
    assert name == "slow"


def test_the_likeness_of_a_cluster_is_the_mean_cosine_of_its_pairs(labels: Labels, space: WordSpace) -> None:
    for cluster in clusters(labels, space, THRESHOLD):
        rows = space.labels(np.stack([labels.tokens[layer, neuron] for layer, neuron in cluster.members]))
        cosines = (rows @ rows.T).numpy()[np.triu_indices(len(rows), 1)]
        assert cluster.alike == pytest.approx(cosines.mean(), abs=1e-4)


def test_words_choose_the_clusters_that_hold_them(labels: Labels, space: WordSpace) -> None:
    found = clusters(labels, space, THRESHOLD, words=["slower"])
    assert [{n for _, n in c.members} for c in found] == [set(range(6, 10))]


def test_clusters_are_the_same_in_every_run(labels: Labels, space: WordSpace) -> None:
    assert clusters(labels, space, THRESHOLD) == clusters(labels, space, THRESHOLD)


def test_more_labels_than_fit_at_once_are_parted_and_all_are_kept(
    labels: Labels, space: WordSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {m for c in clusters(labels, space, THRESHOLD, smallest=1) for m in c.members}
    monkeypatch.setattr(clustering, "_AT_ONCE", 10)
    parted = clusters(labels, space, THRESHOLD, smallest=1)
    assert max(len(c.members) for c in parted) <= 10
    assert {m for c in parted for m in c.members} == whole
    assert sum(len(c.members) for c in parted) == len(whole)
    assert parted == clusters(labels, space, THRESHOLD, smallest=1)


def test_labels_that_say_nothing_are_refused(labels: Labels, space: WordSpace) -> None:
    assert refused(lambda: clusters(labels, space, 0.9999)).code == "no_match"


@pytest.mark.parametrize("options", [{"alike": 0.0}, {"alike": 1.0}, {"smallest": 0}])
def test_options_that_make_no_clusters_are_refused(labels: Labels, space: WordSpace, options: dict) -> None:
    assert refused(lambda: clusters(labels, space, THRESHOLD, **options)).code == "bad_option"


def test_an_action_vector_is_no_semantic_one(labels: Labels, space: WordSpace) -> None:
    semantic, action = is_semantic(labels, space, -1.0), action_share(labels) >= 0.5
    assert action[:, 14:18].all()
    assert action.sum() == 8
    assert not (semantic & action).any()


def test_shares_count_each_layer(labels: Labels, space: WordSpace) -> None:
    found = shares(labels, space, THRESHOLD, examples=3)
    assert [s.layer for s in found] == [0, 1]
    for share in found:
        assert (share.vectors, share.action, share.semantic) == (D_FF, 4, 14)
        assert share.action_tokens == pytest.approx(4 / D_FF)
        assert set(share.examples) <= set(range(14))
        assert len(share.examples) == 3
        assert set(share.action_examples) <= set(range(14, 18))
        coherence = space.coherence(labels.tokens[share.layer])
        assert coherence[share.examples[0]] == coherence[:14].max()


def refused(action: Callable[[], object]) -> SteerError:
    with pytest.raises(SteerError) as caught:
        action()
    return caught.value
