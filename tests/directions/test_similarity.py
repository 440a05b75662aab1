"""Words and labels are compared without what all embeddings share; chance is what random directions give."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from steer_runtime.directions.similarity import SEMANTIC_QUANTILE, WordSpace
from steer_runtime.directions.token_basis import TokenBasis
from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.policy import OpenVLAPolicy

VOCAB, WIDTH, SHARED = 384, 24, 30.0
SLOW, FAST = ("slow", "slowly", "slower"), ("fast", "faster", "quick", "speed")


@pytest.fixture
def basis(tiny_policy: OpenVLAPolicy) -> TokenBasis:
    """Random rows that all share one large direction; the words of SLOW are near one another, and those of FAST."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(VOCAB, WIDTH, generator=generator)
    named = TokenBasis(rows, tiny_policy.tokenizer, tiny_policy.action_token_values())
    for group in (SLOW, FAST):
        topic = 3 * torch.randn(WIDTH, generator=generator)
        for word in group:
            rows[named.tokens_of(word)[0]] += topic
    rows[:, 0] += SHARED * (1 + 0.3 * torch.randn(VOCAB, generator=generator))
    return named


@pytest.fixture
def space(basis: TokenBasis) -> WordSpace:
    return WordSpace.of(basis)


def ids(space: WordSpace, *words: str) -> np.ndarray:
    return np.array([[space.basis.tokens_of(word)[0] for word in words]], np.int32)


def test_tokens_are_compared_by_the_published_formula(basis: TokenBasis, space: WordSpace) -> None:
    words = [t for t in range(len(basis.tokenizer)) if t not in basis.action_values]
    rows = basis.unembedding.double().numpy()
    mean = rows[words].mean(0)
    _, vectors = np.linalg.eigh(np.cov((rows[words] - mean).T, bias=True))
    top = vectors[:, -1:]
    expected = (rows - mean) @ (np.eye(WIDTH) - top @ top.T)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(space.rows(np.arange(VOCAB)).numpy(), expected, atol=1e-4)


def test_what_all_tokens_share_makes_nothing_alike(basis: TokenBasis, space: WordSpace) -> None:
    plain = torch.nn.functional.normalize(basis.unembedding, dim=-1)
    token = ids(space, "bowl", "left")[0]
    assert plain[token[0]] @ plain[token[1]] > 0.9
    rows = space.rows(token)
    assert abs(float(rows[0] @ rows[1])) < 0.5


def test_a_label_of_like_words_is_nearer_than_any_other(space: WordSpace) -> None:
    labels = np.concatenate([ids(space, "slow", "slowly"), ids(space, "fast", "quick"), ids(space, "bowl", "left")])
    nearness = space.nearness(labels, space.words(["slower"]))
    assert nearness.argmax() == 0
    assert nearness[0] > 0.6 > nearness[1:].max()


def test_coherence_is_the_mean_cosine_of_pairs(space: WordSpace) -> None:
    label = ids(space, "slow", "slowly", "bowl", "left")
    rows = space.rows(label[0])
    pairs = [float(rows[i] @ rows[j]) for i in range(4) for j in range(i)]
    assert space.coherence(label)[0] == pytest.approx(np.mean(pairs), abs=1e-5)


def test_random_labels_are_the_best_tokens_of_gaussian_directions(basis: TokenBasis, space: WordSpace) -> None:
    labels = space.random_labels(300, top_k=4, seed=3)
    assert (labels == space.random_labels(300, top_k=4, seed=3)).all()
    assert (labels != space.random_labels(300, top_k=4, seed=4)).any()
    drawn = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(3))
    np.testing.assert_array_equal(labels[:256], (drawn @ basis.unembedding.T).topk(4).indices.numpy())


def test_one_random_label_in_a_hundred_exceeds_chance(tiny_policy: OpenVLAPolicy) -> None:
    rows = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(2))
    space = WordSpace.of(TokenBasis(rows, tiny_policy.tokenizer, tiny_policy.action_token_values()))
    threshold = space.coherence_by_chance(10)
    other = space.coherence(space.random_labels(4096, top_k=10, seed=1))
    assert (other > threshold).mean() == pytest.approx(1 - SEMANTIC_QUANTILE, abs=0.005)


def test_words_of_several_tokens_are_refused(space: WordSpace) -> None:
    assert refused(lambda: space.words(["skyward"])).code == "unknown_word"
    assert refused(lambda: space.words([])).code == "unknown_word"


def test_an_unembedding_that_is_not_finite_is_refused(basis: TokenBasis) -> None:
    basis.unembedding[5, 3] = float("nan")
    assert refused(lambda: WordSpace.of(basis)).code == "not_finite"


def test_labels_of_one_token_have_no_coherence(space: WordSpace) -> None:
    assert refused(lambda: space.coherence(ids(space, "slow"))).code == "bad_token_basis"


def refused(action: Callable[[], object]) -> SteerError:
    with pytest.raises(SteerError) as caught:
        action()
    return caught.value
