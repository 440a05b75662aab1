"""Random controls: the same form, place and size as a direction, and nothing else of it."""

from __future__ import annotations

import numpy as np
import pytest

from steer_runtime.directions.direction import Direction, Neurons
from steer_runtime.directions.finders import controls
from steer_runtime.directions.finders.random import pair_controls, word_controls, write_norm
from steer_runtime.directions.token_basis import TokenBasis
from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.policy import OpenVLAPolicy


def made(policy: OpenVLAPolicy, **form: object) -> Direction:
    tower = policy.towers["lm"]
    return Direction("up", "lm", policy.model_hash, tower.layers, tower.d_model, tower.d_ff, **form)  # type: ignore[arg-type]


def neurons(low: bool = False) -> Neurons:
    return Neurons(
        np.array([0, 2, 0, 2, 2], np.int32),
        np.array([3, 5, 7, 9, 11], np.int32),
        np.array([4.0, -2.0, 1.0, 3.0, 0.5], np.float32),
        np.array([-9.0, -8.0, -7.0, -6.0, -5.0], np.float32) if low else None,
    )


@pytest.mark.parametrize("op", ["override", "add"])
def test_random_neurons_write_as_much_in_each_layer(tiny_policy: OpenVLAPolicy, op: str) -> None:
    tower = tiny_policy.towers["lm"]
    direction = made(tiny_policy, neurons=neurons(), op=op, span=frozenset({"text"}))
    found = controls(direction, tower, 5, seed=3)
    assert len({c.hash for c in found}) == len({c.name for c in found}) == 5
    for control in found:
        assert (control.op, control.span, control.model_hash) == (op, {"text"}, direction.model_hash)
        assert control.neurons is not None
        for layer, count in ((0, 2), (2, 3)):
            at = control.neurons.layer == layer
            assert at.sum() == count
            assert not set(control.neurons.neuron[at]) & set(neurons().neuron[neurons().layer == layer])
            size = write_norm(tower, layer, control.neurons.neuron[at], control.neurons.alpha[at])
            before = neurons().layer == layer
            wanted = write_norm(tower, layer, neurons().neuron[before], neurons().alpha[before])
            assert size == pytest.approx(wanted, rel=1e-5)


def test_what_writes_by_the_activation_keeps_its_numbers(tiny_policy: OpenVLAPolicy) -> None:
    (control,) = controls(made(tiny_policy, neurons=neurons(low=True), op="clamp"), tiny_policy.towers["lm"], 1, seed=0)
    assert control.neurons is not None
    assert control.neurons.low is not None
    pairs = set(zip(control.neurons.low.tolist(), control.neurons.alpha.tolist(), strict=True))
    assert pairs == {(-9.0, 4.0), (-8.0, -2.0), (-7.0, 1.0), (-6.0, 3.0), (-5.0, 0.5)}


def test_random_vectors_have_the_norm_of_each_site(tiny_policy: OpenVLAPolicy) -> None:
    width = tiny_policy.towers["lm"].d_model
    dense = {0: np.ones(width, np.float32), 3: np.full(width, 5.0, np.float32)}
    direction = made(tiny_policy, dense=dense, op="add")
    for control in controls(direction, tiny_policy.towers["lm"], 3, seed=1):
        assert control.dense is not None
        for site, vector in dense.items():
            assert np.linalg.norm(control.dense[site]) == pytest.approx(np.linalg.norm(vector), rel=1e-5)
            cosine = control.dense[site] @ vector / np.linalg.norm(vector) ** 2
            assert abs(cosine) < 0.9


def test_a_seed_decides_the_draws_and_more_draws_leave_them(tiny_policy: OpenVLAPolicy) -> None:
    direction, tower = made(tiny_policy, neurons=neurons()), tiny_policy.towers["lm"]
    three = [c.hash for c in controls(direction, tower, 3, seed=1)]
    assert [c.hash for c in controls(direction, tower, 5, seed=1)][:3] == three
    assert not set(three) & {c.hash for c in controls(direction, tower, 3, seed=2)}


def test_pairs_are_differences_between_two_moments_of_the_norm_of_each_site(tiny_policy: OpenVLAPolicy) -> None:
    width = tiny_policy.towers["lm"].d_model
    direction = made(tiny_policy, dense={0: np.ones(width, np.float32), 3: np.full(width, 5.0, np.float32)}, op="add")
    rows = {site: np.random.default_rng(site).standard_normal((6, width)) for site in (0, 3)}
    found = pair_controls(direction, rows, 5, seed=1)
    assert len({c.hash for c in found}) == 5
    for control in found:
        first, second = control.provenance["pair"]
        assert first != second
        for site, vector in (direction.dense or {}).items():
            step = rows[site][first] - rows[site][second]
            wanted = step * np.linalg.norm(vector) / np.linalg.norm(step)
            np.testing.assert_allclose((control.dense or {})[site], wanted, rtol=1e-5, atol=1e-6)
    assert [c.hash for c in pair_controls(direction, rows, 3, seed=1)] == [c.hash for c in found[:3]]


def test_pairs_need_a_vector_and_two_different_moments(tiny_policy: OpenVLAPolicy) -> None:
    width = tiny_policy.towers["lm"].d_model
    dense = made(tiny_policy, dense={0: np.ones(width, np.float32)}, op="add")
    for direction, rows, code in (
        (made(tiny_policy, neurons=neurons()), {}, "bad_operation"),
        (dense, {0: np.ones((1, width))}, "bad_count"),
        (dense, {0: np.ones((4, width))}, "bad_count"),
    ):
        with pytest.raises(SteerError) as caught:
            pair_controls(direction, rows, 1, seed=0)
        assert caught.value.code == code


def test_random_words_are_differences_of_embeddings_of_the_norm_of_each_site(tiny_policy: OpenVLAPolicy) -> None:
    width, basis = tiny_policy.towers["lm"].d_model, TokenBasis.of(tiny_policy)
    direction = made(tiny_policy, dense={0: np.ones(width, np.float32), 3: np.full(width, 5.0, np.float32)}, op="add")
    found = word_controls(direction, basis, 2, 5, seed=1)
    assert len({c.hash for c in found}) == 5
    table = basis.unembedding.numpy()
    words = {basis.text(int(token)).strip(): int(token) for token in basis.plain_words}
    for control in found:
        ends = control.provenance["words"], control.provenance["against"]
        assert [len(end) for end in ends] == [2, 2]
        assert len({*ends[0], *ends[1]}) == 4
        high, low = (table[[words[word] for word in end]].mean(0) for end in ends)
        for site, vector in (direction.dense or {}).items():
            wanted = (high - low) * np.linalg.norm(vector) / np.linalg.norm(high - low)
            np.testing.assert_allclose((control.dense or {})[site], wanted, rtol=1e-4, atol=1e-6)
    assert [c.hash for c in word_controls(direction, basis, 2, 3, seed=1)] == [c.hash for c in found[:3]]
    assert not {c.hash for c in found} & {c.hash for c in word_controls(direction, basis, 2, 5, seed=2)}


def test_random_words_need_a_vector_and_words_enough(tiny_policy: OpenVLAPolicy) -> None:
    basis = TokenBasis.of(tiny_policy)
    dense = made(tiny_policy, dense={0: np.ones(tiny_policy.towers["lm"].d_model, np.float32)}, op="add")
    for direction, words, code in (
        (made(tiny_policy, neurons=neurons()), 2, "bad_operation"),
        (dense, 1 + len(basis.plain_words) // 2, "bad_token_basis"),
    ):
        with pytest.raises(SteerError) as caught:
            word_controls(direction, basis, words, 1, seed=0)
        assert caught.value.code == code
