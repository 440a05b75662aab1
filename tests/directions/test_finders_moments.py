"""Finders that watch the policy: each recovers what was planted, refuses what cannot be, and can be found again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fabricate
import numpy as np
import pytest
import torch

from steer_runtime.directions import finders
from steer_runtime.directions.activations import Activations
from steer_runtime.directions.direction import Direction
from steer_runtime.directions.finders import Material, Recipe, attribution, probe, snmf
from steer_runtime.directions.finders.differentiable import observable
from steer_runtime.directions.options import OPTIONS, options_for
from steer_runtime.directions.store import DirectionStore
from steer_runtime.errors import SteerError
from steer_runtime.moments import Moment, save_moments
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.steering.engine import hooks_on
from steer_runtime.steering.offline import OfflineSteering
from steer_runtime.types import Role

RECIPE = Recipe("found", "2026-01-31")
TEXT: frozenset[Role] = frozenset({"text"})
COUNT, WIDTH, D_FF = 60, 32, 64


@pytest.fixture(scope="module")
def policy() -> OpenVLAPolicy:
    return fabricate.tiny_policy()


@pytest.fixture
def file(policy: OpenVLAPolicy, tmp_path: Path) -> Path:
    """Six moments of three episodes, faster and higher with time."""
    path = tmp_path / "moments.safetensors"
    found = [
        Moment(
            fabricate.make_observation(policy, seed=i),
            -1.0,
            "carry",
            {"speed": 0.1 * i, "height": 0.02 * i, "gripper": 1.0},
            f"episode-{i // 2}",
        )
        for i in range(6)
    ]
    save_moments(path, found, {})
    return path


class Planted(Material):
    """Material whose activations are made up. rows: (layer or site, wording) -> float [N, width]."""

    def __init__(
        self,
        policy: OpenVLAPolicy,
        values: Mapping[str, np.ndarray],
        *,
        residual: Callable[[str], np.ndarray] | None = None,
        ffn: Callable[[str], np.ndarray] | None = None,
        tokens: int = 1,
        layer: int = 2,
    ) -> None:
        super().__init__(policy)
        self.values, self.residual, self.ffn, self.tokens, self.layer = values, residual, ffn, tokens, layer

    def digest(self, path: Path) -> str:
        return "0" * 64

    def moments(self, path: Path) -> tuple[Moment, ...]:
        count = len(next(iter(self.values.values())))
        seen = fabricate.make_observation(self.policy)
        told = [{name: float(v[i]) for name, v in self.values.items()} for i in range(count)]
        return tuple(Moment(seen, -1.0, "carry", measured, str(i // 4)) for i, measured in enumerate(told))

    def activations(self, path: Path, span: object, pool: object, *, wording: str = "{}", **_: Any) -> Activations:
        moment = np.repeat(np.arange(len(self.moments(path))), self.tokens)
        ffn = {self.layer: self.ffn(wording).astype(np.float32)} if self.ffn else {}
        residual = {self.layer + 1: self.residual(wording).astype(np.float32)} if self.residual else {}
        return Activations(ffn, residual, moment, {})


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def found(finder: str, material: Material, recipe: Recipe = RECIPE, **options: Any) -> Direction:
    return finders.find(finder, material, recipe, options_for(finder, {"moments": "moments.safetensors", **options}))


def vector(direction: Direction, site: int = 3) -> np.ndarray:
    assert direction.dense is not None
    assert list(direction.dense) == [site]
    return direction.dense[site].astype(np.float64)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


# probe


def test_a_probe_recovers_a_planted_readout_and_its_step_raises_it(policy: OpenVLAPolicy) -> None:
    rows, readout = rng().normal(size=(COUNT * 4, WIDTH)), rng(1).normal(size=WIDTH)
    speed = rows @ readout + 0.1 * rng(2).normal(size=len(rows))
    material = Planted(policy, {"speed": speed}, residual=lambda _: rows)
    direction = found("probe", material, quantity="speed", step=2.0)
    step = vector(direction)
    assert cosine(step, readout) > 0.98
    assert step @ readout == pytest.approx(2.0 * speed.std(), rel=0.03)
    assert direction.provenance["r2"] > 0.98
    inverted = vector(found("probe", material, quantity="speed", step=2.0, invert=True))
    np.testing.assert_allclose(inverted, -step)


def test_a_probe_of_neurons_keeps_the_ones_that_read_and_still_raises(policy: OpenVLAPolicy) -> None:
    rows = rng().normal(size=(COUNT * 4, D_FF)) * np.linspace(0.5, 3.0, D_FF)
    weights = np.zeros(D_FF)
    weights[[5, 9, 40]] = [1.0, -2.0, 0.7]
    material = Planted(policy, {"dz": rows @ weights}, ffn=lambda _: rows)
    direction = found("probe", material, quantity="dz", form="neurons", layers=[2], count=3)
    assert direction.neurons is not None
    assert set(direction.neurons.neuron.tolist()) == {5, 9, 40}
    raised = float(direction.neurons.alpha @ weights[direction.neurons.neuron])
    assert raised == pytest.approx((rows @ weights).std(), rel=0.02)


def test_a_probe_that_reads_nothing_is_refused(policy: OpenVLAPolicy) -> None:
    material = Planted(
        policy, {"speed": rng(1).normal(size=COUNT)}, residual=lambda _: rng().normal(size=(COUNT, WIDTH))
    )
    assert refused(lambda: found("probe", material, quantity="speed")).code == "no_fit"


def test_a_probe_is_judged_on_whole_episodes_left_out() -> None:
    # What tells only which episode it is reads nothing of another one.
    groups = np.repeat(np.arange(10), 6)
    rows = np.eye(10)[groups] + 0.01 * rng().normal(size=(60, 10))
    values = rng(1).normal(size=10)[groups]
    assert probe.read(rows, values, groups).r2 < 0.05
    assert probe.read(rows, values, np.arange(60)).r2 > 0.9
    assert refused(lambda: probe.read(rows, values, np.zeros(60))).code == "few_episodes"


# contrast


def test_a_contrast_of_wordings_is_the_planted_shift(policy: OpenVLAPolicy) -> None:
    shift, base = rng(1).normal(size=WIDTH), rng().normal(size=(COUNT, WIDTH))

    def rows(wording: str) -> np.ndarray:
        return base + shift * {"{}, quickly": 1.5, "{}, slowly": -0.5}[wording]

    material = Planted(policy, {"speed": np.zeros(COUNT)}, residual=rows)
    direction = found("contrast", material, positive=["{}, quickly"], negative=["{}, slowly"])
    np.testing.assert_allclose(vector(direction), 2.0 * shift, rtol=1e-4, atol=1e-4)
    assert direction.provenance["consistency"] > 0.999
    assert direction.span == {"text"}


def test_a_contrast_of_groups_is_the_difference_above_and_below_the_median(policy: OpenVLAPolicy) -> None:
    speed = rng(1).permutation(COUNT).astype(float)
    rows = rng().normal(size=(COUNT, D_FF))
    rows[speed > np.median(speed), 7] += 50.0
    material = Planted(policy, {"speed": speed}, ffn=lambda _: rows)
    direction = found("contrast", material, quantity="speed", form="neurons", layers=[2], count=1)
    assert direction.neurons is not None
    assert direction.neurons.neuron.tolist() == [7]
    assert direction.neurons.alpha[0] == pytest.approx(50.0, abs=1.0)


def test_norm_is_in_mean_norms_of_a_word(policy: OpenVLAPolicy) -> None:
    rows = rng().normal(size=(COUNT, WIDTH))
    material = Planted(
        policy,
        {"speed": rng(1).normal(size=COUNT)},
        residual=lambda _: rows,
        ffn=lambda _: rng(3).normal(size=(COUNT, D_FF)),
    )
    words = policy.unembedding[:64].norm(dim=1).mean()
    dense = found("contrast", material, quantity="speed", norm=2.5)
    assert np.linalg.norm(vector(dense)) == pytest.approx(2.5 * float(words), rel=1e-5)
    sparse = found("contrast", material, quantity="speed", norm=2.5, form="neurons", layers=[2])
    assert sparse.neurons is not None
    weight = policy.towers["lm"].down_projs[2].weight.detach().numpy()  # type: ignore[attr-defined]
    wrote = weight[:, sparse.neurons.neuron] @ sparse.neurons.alpha
    assert np.linalg.norm(wrote) == pytest.approx(2.5 * float(words), rel=1e-4)
    doubled = found("contrast", material, replace(RECIPE, alpha=2.0), quantity="speed", norm=2.5)
    np.testing.assert_allclose(vector(doubled), 2.0 * vector(dense), rtol=1e-5)


# snmf


def test_semi_nmf_recovers_planted_factors() -> None:
    factors = rng().normal(size=(4, 30))
    factors /= np.linalg.norm(factors, axis=1)[:, None]
    # Mostly one factor a row, or the factors could be turned into others that fit as well.
    strengths = np.eye(4)[rng(1).integers(0, 4, 400)] * (1.0 + rng(2).gamma(1.0, size=(400, 1))) + 0.1 * rng(3).random(
        (400, 4)
    )
    rows = strengths @ factors
    got, parts = snmf.factorise(rows, 4, seed=0, iterations=500)
    assert (got >= 0).all()
    assert np.linalg.norm(rows - got @ parts) < 0.02 * np.linalg.norm(rows)
    assert (np.abs(parts @ factors.T).max(axis=0) > 0.95).all()


def test_semi_nmf_never_fits_worse_with_more_updates() -> None:
    rows = rng().normal(size=(80, 20))
    left = [np.linalg.norm(rows - np.matmul(*snmf.factorise(rows, 5, 0, count))) for count in (1, 5, 20, 80)]
    assert left == sorted(left, reverse=True)
    assert refused(lambda: snmf.factorise(rows, 21, 0, 1)).code == "bad_count"


def test_snmf_takes_the_factor_that_goes_with_the_quantity(policy: OpenVLAPolicy) -> None:
    parts = np.zeros((2, D_FF))
    parts[0, [3, 8]], parts[1, [20, 33]] = 1.0, -1.0
    strengths = np.abs(rng().normal(size=(COUNT * 2, 2)))
    speed = strengths[:, 1].reshape(COUNT, 2).mean(1)
    material = Planted(policy, {"speed": speed}, ffn=lambda _: strengths @ parts, tokens=2)
    direction = found("snmf", material, layer=2, quantity="speed", factors=2, count=2)
    assert direction.neurons is not None
    assert set(direction.neurons.neuron.tolist()) == {20, 33}
    assert (direction.neurons.alpha < 0).all()
    other = found("snmf", material, layer=2, quantity="speed", factors=2, count=2, invert=True)
    assert other.neurons is not None
    assert set(other.neurons.neuron.tolist()) == {3, 8}


def test_snmf_takes_the_factor_that_says_the_words(policy: OpenVLAPolicy) -> None:
    weight = policy.towers["lm"].down_projs[2].weight.detach().numpy().astype(np.float64)  # type: ignore[attr-defined]
    wanted = finders.word.difference(Material(policy).basis, ["fast"], ["slow"], policy.unembedding)[0].numpy()
    parts = np.stack([rng().normal(size=D_FF), np.linalg.pinv(weight) @ wanted])
    strengths = np.abs(rng(1).normal(size=(COUNT, 2)))
    material = Planted(policy, {"speed": np.zeros(COUNT)}, ffn=lambda _: strengths @ parts)
    direction = found("snmf", material, layer=2, words=["fast"], against=["slow"], factors=2, form="dense")
    assert cosine(vector(direction), wanted) > 0.95


# pca


def test_pca_recovers_a_planted_component_with_the_sign_of_the_quantity(policy: OpenVLAPolicy) -> None:
    hidden, planted = rng().normal(size=COUNT), rng(1).normal(size=WIDTH)
    planted /= np.linalg.norm(planted)
    loud = rng(2).normal(size=WIDTH)
    loud -= (loud @ planted) * planted
    rows = (
        3.0 * np.outer(hidden, planted)
        + np.outer(rng(3).normal(size=COUNT), loud) * 5
        + 0.05 * rng(4).normal(size=(COUNT, WIDTH))
    )
    material = Planted(policy, {"dz": -hidden}, residual=lambda _: rows)
    direction = found("pca", material, quantity="dz")
    assert cosine(vector(direction), -planted) > 0.97
    assert np.linalg.norm(vector(direction)) == pytest.approx(3.0 * hidden.std(ddof=1), rel=0.05)
    first = found("pca", material, component=0)
    assert abs(cosine(vector(first), loud)) > 0.99
    assert first.provenance["explained"] > 0.5


# attribution


@pytest.mark.parametrize("name", ["speed", "dz", "gripper", "entropy"])
def test_attribution_equals_finite_differences(name: str, tmp_path: Path) -> None:
    policy = fabricate.tiny_policy(dtype=torch.float64)
    moment = Moment(fabricate.make_observation(policy, seed=3), -1.0, "carry")
    material, of = Material(policy), observable(policy, name)
    got = attribution.attribute(material, of, [1], TEXT, [moment])[("ffn", 1)]
    down = policy.towers["lm"].down_projs[1]
    text = torch.tensor(
        [role == "text" for role in policy.model.prefill_roles(len(policy.prompt_ids(moment.observation.instruction)))]
    )

    def value(neuron: int, by: float) -> float:
        def push(module: object, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
            if args[0].shape[1] != len(text):
                return None
            f = args[0].clone()
            f[0, text, neuron] += by
            return (f,)

        handle = down.register_forward_pre_hook(push)  # type: ignore[attr-defined]
        out = float(of(policy.decode(moment.observation)))
        handle.remove()
        return out

    strongest = np.argsort(-np.abs(got.gradient))[:3]
    assert (np.abs(got.gradient[strongest]) > 0).all()
    for neuron in strongest:
        by = 0.02
        numeric = (value(int(neuron), by) - value(int(neuron), -by)) / (2 * by)
        assert got.gradient[neuron] == pytest.approx(numeric, rel=0.03, abs=2e-6)


def test_attributed_neurons_move_what_was_attributed(policy: OpenVLAPolicy, file: Path) -> None:
    material = Material(policy)
    options = options_for("attribution", {"moments": file, "observable": "dz", "count": 10})
    # A tenth of a range each, so that the first order holds.
    direction = finders.find("attribution", material, replace(RECIPE, alpha=0.1), options)
    of = observable(policy, "dz")
    change = []
    for moment in material.moments(file):
        with OfflineSteering(policy, [direction]) as steering, torch.no_grad():
            values = []
            for strength in (0.0, 1.0):
                steering.set({"found": strength} if strength else {})
                values.append(steering.run(lambda seen=moment.observation: float(of(policy.decode(seen))))[0])
            change.append(values[1] - values[0])
    assert np.mean(change) > 0


def test_gradients_leave_nothing_behind(policy: OpenVLAPolicy, file: Path) -> None:
    material = Material(policy)
    found_options = options_for("attribution", {"moments": file, "observable": "speed", "count": 5})
    finders.find("attribution", material, RECIPE, found_options)
    assert hooks_on(policy.model) == 0

    def fail(decoded: object) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attribution.attribute(material, fail, [0], TEXT, material.moments(file))
    assert hooks_on(policy.model) == 0
    assert policy._listener is None


def test_an_unknown_observable_names_the_nearest(policy: OpenVLAPolicy, file: Path) -> None:
    error = refused(lambda: found("attribution", Material(policy), moments=file, observable="sped"))
    assert (error.code, "'speed'" in error.sentence) == ("unknown_observable", True)


# all of them


REAL: Mapping[str, Mapping[str, Any]] = {
    "contrast": {"positive": ["{} fast"], "negative": ["{} slow"], "form": "neurons"},
    "attribution": {"observable": "speed", "count": 5},
    "snmf": {"layer": 1, "quantity": "height", "factors": 3, "count": 4},
    "pca": {"component": 1},
    "token": {"words": ["up"], "against": ["low"]},
    "neurons": {"neurons": [[0, 17], [2, 20]]},
    "word": {"words": ["fast", "quick"], "against": ["slow"], "site": 3, "norm": 5.0},
    "action": {"readout": "size", "count": 7},
}


@pytest.mark.parametrize("finder", REAL)
def test_provenance_finds_the_same_direction_again(finder: str, policy: OpenVLAPolicy, file: Path) -> None:
    told = dict(REAL[finder])
    if "moments" in OPTIONS[finder].model_fields:
        told["moments"] = file
    first = finders.find(finder, Material(policy), RECIPE, options_for(finder, told))
    DirectionStore(file.parent / "store").save(first)
    card = DirectionStore(file.parent / "store").load("found").provenance
    assert str(file.parent) not in json.dumps(first.card())
    again = dict(card["options"])
    if "moments" in again:
        assert again["moments"]["file"] == file.name
        again["moments"] = file
    second = finders.find(card["finder"], Material(policy), RECIPE, options_for(card["finder"], again))
    assert second.hash == first.hash


@pytest.mark.parametrize("finder", sorted(set(REAL) - {"neurons", "snmf"}))
def test_the_ends_of_an_axis_are_opposite(finder: str, policy: OpenVLAPolicy, file: Path) -> None:
    told = dict(REAL[finder])
    if "moments" in OPTIONS[finder].model_fields:
        told["moments"] = file
    negative, positive = finders.find_axis(finder, Material(policy), RECIPE, options_for(finder, told))
    assert (negative.name, positive.name) == ("found-negative", "found-positive")
    if finder == "token":
        assert negative.provenance["words"] == ["low"]
    elif positive.dense is not None:
        np.testing.assert_allclose(vector(negative), -vector(positive), rtol=1e-6)
    else:
        assert positive.neurons is not None
        assert negative.neurons is not None
        np.testing.assert_array_equal(negative.neurons.neuron, positive.neurons.neuron)
        np.testing.assert_allclose(negative.neurons.alpha, -positive.neurons.alpha, rtol=1e-6)


@pytest.mark.parametrize(
    ("finder", "options", "code"),
    [
        ("probe", {"quantity": "sped"}, "unknown_quantity"),
        ("probe", {"quantity": "gripper"}, "no_variation"),
        ("probe", {"quantity": "said_pace"}, "unknown_quantity"),
        ("pca", {"component": 9}, "bad_count"),
        ("pca", {"component": 0, "form": "neurons"}, "bad_option"),
        ("pca", {"component": 0, "site": 7}, "layer_out_of_range"),
        ("contrast", {"quantity": "speed", "layers": [9], "form": "neurons"}, "layer_out_of_range"),
        ("snmf", {"layer": 1, "quantity": "speed", "factors": 90}, "bad_count"),
        ("contrast", {"quantity": "speed", "count": 9999, "form": "neurons"}, "bad_count"),
    ],
)
def test_what_no_finder_can_do_is_refused(
    finder: str, options: Mapping[str, Any], code: str, policy: OpenVLAPolicy, file: Path
) -> None:
    error = refused(lambda: found(finder, Material(policy), moments=file, **options))
    assert error.code == code
    assert error.sentence.count("\n") == 0


@pytest.mark.parametrize(
    ("finder", "options"),
    [
        ("contrast", {}),
        ("contrast", {"positive": ["{} fast"]}),
        ("contrast", {"positive": ["fast"], "negative": ["slow"]}),
        ("contrast", {"quantity": "speed", "positive": ["{} fast"], "negative": ["{} slow"]}),
        ("contrast", {"quantity": "speed", "pool": "each"}),
        ("pca", {}),
        ("snmf", {"layer": 1}),
        ("word", {"words": ["fast"], "against": ["slow"], "count": 3}),
        ("word", {"words": ["fast"], "against": []}),
        ("probe", {"quantity": "speed", "colour": "red"}),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(finder: str, options: Mapping[str, Any]) -> None:
    needs = {"moments": "m.safetensors"} if "moments" in OPTIONS[finder].model_fields else {}
    error = refused(lambda: options_for(finder, {**needs, **options}))
    assert error.code == "bad_option"
    assert finder in error.sentence


def refused(action: Callable[[], object]) -> SteerError:
    with pytest.raises(SteerError) as caught:
        action()
    return caught.value
