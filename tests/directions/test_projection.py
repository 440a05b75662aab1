"""Blocked is the same as whole, at both ends, and what a projection refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_runtime.directions.projection import Blocks, Ends, LayerJob, Spec, mean_row, one_process, project_layer
from steer_runtime.errors import SteerError

BLOCK = st.builds(Blocks, st.integers(4, 40), st.integers(20, 300))


def whole(scores: np.ndarray, k: int) -> Ends:
    """Both ends of a full product [d_ff, vocab]; a stable sort puts the lower id first among equals."""
    high = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    low = np.argsort(scores, axis=1, kind="stable")[:, :k]
    return Ends(high, np.take_along_axis(scores, high, 1), low, np.take_along_axis(scores, low, 1))


def same(ours: Ends, expected: Ends) -> None:
    for name, mine, theirs in zip(Ends._fields, ours, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.integers(1, 50),
    st.integers(1, 260),
    BLOCK,
    st.sampled_from(["float32", "bfloat16"]),
    st.data(),
)
def test_blocked_equals_whole_with_ties_to_the_lower_token(
    seed: int, d_model: int, d_ff: int, vocab: int, blocks: Blocks, dtype: str, data: st.DataObject
) -> None:
    """Small integers make every sum exact and most scores equal to others, so that order among equals shows."""
    k = data.draw(st.integers(1, min(vocab, 12)))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-2, 3, (d_model, d_ff), generator=generator).float()
    rows = torch.randint(-2, 3, (vocab, d_model), generator=generator).float()
    ours = project_layer(weight, rows, Spec("raw", dtype, k), blocks=blocks)  # type: ignore[arg-type]
    same(ours, whole((weight.T @ rows.T).numpy(), k))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), BLOCK, st.sampled_from(["raw", "normed", "centred"]))
def test_every_variant_is_its_formula(seed: int, blocks: Blocks, variant: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 30, generator=generator)
    rows = torch.randn(200, 16, generator=generator) + 1.0
    gamma = torch.rand(16, generator=generator) * 3
    w, u, g = weight.double().numpy(), rows.double().numpy(), gamma.double().numpy()
    scores = {
        "raw": w.T @ u.T,
        "normed": w.T @ np.diag(g) @ u.T,
        "centred": w.T @ (u - u.mean(0)).T,
    }[variant]
    ours = project_layer(weight, rows, Spec(variant), gamma=gamma, mean=mean_row(rows, 7), blocks=blocks)  # type: ignore[arg-type]
    expected = whole(scores, 10)
    np.testing.assert_array_equal(ours.tokens, expected.tokens)
    np.testing.assert_array_equal(ours.low_tokens, expected.low_tokens)
    np.testing.assert_allclose(ours.scores, expected.scores, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours.low_scores, expected.low_scores, rtol=1e-4, atol=1e-4)


def test_blocks_and_threads_do_not_show_in_the_bytes() -> None:
    torch.manual_seed(0)
    weight, rows = torch.randn(64, 20), torch.randn(1000, 64)
    reference = project_layer(weight, rows)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for blocks in (Blocks(1, 1000), Blocks(7, 133)):
                same(project_layer(weight, rows, blocks=blocks), reference)
    finally:
        torch.set_num_threads(before)


def test_bfloat16_finds_what_float32_finds_and_scores_it_in_float32() -> None:
    torch.manual_seed(0)
    weight, rows = torch.randn(128, 200).bfloat16(), torch.randn(20_000, 128).bfloat16()
    exact, fast = project_layer(weight, rows), project_layer(weight, rows, Spec(dtype="bfloat16"))
    assert (exact.tokens == fast.tokens).mean() > 0.999
    agree = exact.tokens == fast.tokens
    np.testing.assert_array_equal(exact.scores[agree], fast.scores[agree])


def test_blocks_of_one_are_blocks_too() -> None:
    weight, rows = torch.randint(-2, 3, (4, 3)).float(), torch.randint(-2, 3, (40, 4)).float()
    same(project_layer(weight, rows, blocks=Blocks(1, 1)), whole((weight.T @ rows.T).numpy(), 10))


def test_zero_vectors_are_labelled_by_the_first_tokens() -> None:
    ends = project_layer(torch.zeros(4, 2), -torch.ones(500, 4), blocks=Blocks(2, 64))
    assert ends.tokens.tolist() == ends.low_tokens.tolist() == [list(range(10))] * 2


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["weight", "rows", "gamma"]),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.integers(0, 10**6),
    BLOCK,
)
def test_a_number_that_is_not_finite_is_refused_wherever_it_is(
    where: str, value: float, seed: int, blocks: Blocks
) -> None:
    parts = {"weight": torch.randn(8, 20), "rows": torch.randn(150, 8), "gamma": torch.rand(8)}
    flat = parts[where].view(-1)
    flat[seed % len(flat)] = value
    assert (
        refused(
            lambda: project_layer(parts["weight"], parts["rows"], Spec("normed"), gamma=parts["gamma"], blocks=blocks)
        )
        == "not_finite"
    )


def test_what_does_not_fit_is_refused() -> None:
    weight, rows = torch.randn(8, 20), torch.randn(50, 8)
    assert refused(lambda: project_layer(weight, torch.randn(50, 9))) == "bad_token_basis"
    assert refused(lambda: project_layer(weight, rows, Spec(top_k=51))) == "bad_token_basis"
    assert refused(lambda: project_layer(weight, rows, Spec("normed"))) == "bad_projection"
    assert refused(lambda: project_layer(weight, rows, Spec("centred"), mean=torch.ones(7))) == "bad_projection"
    assert refused(lambda: Spec("mean")) == "bad_projection"  # type: ignore[arg-type]
    assert refused(lambda: Spec(dtype="float16")) == "bad_projection"  # type: ignore[arg-type]
    assert refused(lambda: Spec(top_k=0)) == "bad_projection"
    assert refused(lambda: Blocks(0, 1)) == "bad_projection"


def test_inputs_are_left_as_they_were() -> None:
    weight, rows, gamma = torch.randn(8, 1), torch.randn(50, 8), torch.rand(8)
    before = weight.clone(), rows.clone()
    project_layer(weight, rows, Spec("normed"), gamma=gamma)
    assert torch.equal(weight, before[0])
    assert torch.equal(rows, before[1])


@pytest.mark.heavy
def test_layers_on_ray_have_the_bytes_of_one_process() -> None:
    pytest.importorskip("ray")
    from steer_runtime.directions.fan_out import on_ray

    torch.manual_seed(0)
    rows = torch.randn(5000, 64)
    jobs = [LayerJob(i, torch.randn(64, 300), rows, Spec(dtype="bfloat16")) for i in range(4)]
    heard: list[float] = []
    there = dict(on_ray("local", workers=2)(jobs, heard.append))
    for layer, ends in one_process(jobs, lambda _: None):
        same(there[layer], ends)
    assert heard[-1] == 4
    bad = LayerJob(0, torch.full((64, 3), float("nan")), rows)
    assert refused(lambda: list(on_ray("local", workers=2)([bad], lambda _: None))) == "not_finite"


def refused(action: object) -> str:
    with pytest.raises(SteerError) as caught:
        action()  # type: ignore[operator]
    return caught.value.code
