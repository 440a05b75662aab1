"""Finders in both towers of a Pi0: what is planted is found, and what cannot reach an action or has no words is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fabricate
import fabricate_pi0
import numpy as np
import pytest
import torch

from steer_runtime.directions import finders
from steer_runtime.directions.action_basis import HAND, ActionBasis
from steer_runtime.directions.activations import ready
from steer_runtime.directions.direction import Direction
from steer_runtime.directions.finders import Material, Recipe, attribution
from steer_runtime.directions.finders.differentiable import observable
from steer_runtime.directions.observables import read
from steer_runtime.directions.options import OPTIONS, options_for
from steer_runtime.errors import SteerError
from steer_runtime.moments import Moment, load_moments, save_moments
from steer_runtime.policies.pi0.policy import Pi0Policy
from steer_runtime.steering.engine import hooks_on
from steer_runtime.steering.offline import OfflineSteering

RECIPE = Recipe("found", "2026-01-31")
LAYERS, DEAD = 3, 2
"""Of the tiny Pi0; the last layer of its prefix reaches nothing."""


def made_moments(count: int = 4) -> list[Moment]:
    return [
        Moment(
            fabricate_pi0.make_observation(seed=i, frame_id=i, instruction="pick up the soup"),
            -1.0,
            "carry",
            {"speed": 0.1 * i, "height": 0.02 * i},
            f"episode-{i // 2}",
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def policy() -> Pi0Policy:
    """Its action rows are at right angles and its norms do not scale, so that what a write does can be worked out."""
    made = fabricate_pi0.tiny_policy(seed=1, action_steps=3)
    with torch.no_grad():
        weight = made.model.pi0.action_out_proj.weight
        weight.copy_(torch.linalg.qr(weight.T.double())[0].T)
        made.model.expert.norm.weight.zero_()  # type: ignore[union-attr, operator]
    return made


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moments") / "m.safetensors"
    save_moments(path, made_moments(), {})
    return path


@pytest.fixture(scope="module")
def moments(file: Path) -> list[Moment]:
    return load_moments(file)[0]


def found(finder: str, policy: Pi0Policy, tower: str, recipe: Recipe = RECIPE, **options: Any) -> Direction:
    return finders.find(finder, Material(policy, tower), recipe, options_for(finder, options))


def actions(policy: Pi0Policy, moment: Moment, direction: Direction | None = None, strength: float = 1.0) -> np.ndarray:
    """Mean of the actions that are handed on, from the moment's own noise."""

    def infer() -> np.ndarray:
        ready(policy, moment)
        return policy.infer(moment.observation).actions.astype(np.float64).mean(0)

    if direction is None:
        return infer()
    with OfflineSteering(policy, [direction]) as steering:
        steering.set({direction.name: strength})
        return steering.run(infer)[0]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


# the tower


def test_a_policy_of_several_towers_wants_one_named_and_one_of_one_does_not(policy: Pi0Policy) -> None:
    error = refused(lambda: Material(policy))
    assert error.code == "which_tower"
    assert "prefix, expert" in error.sentence
    assert refused(lambda: Material(policy, "lm")).code == "unknown_tower"
    assert Material(fabricate.tiny_policy()).tower.name == "lm"


def test_material_of_the_other_tower_shares_what_was_read(policy: Pi0Policy, file: Path) -> None:
    material = Material(policy, "prefix")
    seen = material.moments(file)
    assert material.at("expert").moments(file) is seen
    assert material.at("expert").at("prefix") is material


@pytest.mark.parametrize(
    ("finder", "options"),
    [
        ("token", {"words": ["up"]}),
        ("word", {"words": ["fast"], "against": ["slow"]}),
        ("snmf", {"moments": "m", "layer": 0, "words": ["fast"], "factors": 2}),
    ],
)
def test_words_are_refused_in_the_expert(
    finder: str, options: Mapping[str, Any], policy: Pi0Policy, file: Path
) -> None:
    told = {**options, "moments": file} if "moments" in options else dict(options)
    error = refused(lambda: found(finder, policy, "expert", **told))
    assert error.code == "no_token_basis"
    assert "tower 'expert'" in error.sentence
    assert "attribution" in error.sentence  # what to use instead


@pytest.mark.parametrize(
    ("finder", "options"),
    [
        ("token", {"words": ["up"], "layers": [DEAD]}),
        ("neurons", {"neurons": [[0, 1], [DEAD, 1]]}),
        ("word", {"words": ["fast"], "against": ["slow"], "site": LAYERS}),
        ("word", {"words": ["fast"], "against": ["slow"], "onto_layer": DEAD}),
        ("contrast", {"positive": ["{} fast"], "negative": ["{} slow"], "site": LAYERS}),
        ("contrast", {"positive": ["{} fast"], "negative": ["{} slow"], "onto_layer": DEAD}),
        ("contrast", {"positive": ["{} fast"], "negative": ["{} slow"], "form": "neurons", "layers": [0, DEAD]}),
        ("attribution", {"observable": "dz", "layers": [DEAD]}),
        ("attribution", {"observable": "dz", "form": "dense", "site": LAYERS}),
        ("probe", {"quantity": "speed", "site": LAYERS}),
        ("probe", {"quantity": "speed", "form": "neurons", "layers": [DEAD]}),
        ("pca", {"component": 0, "site": LAYERS}),
        ("pca", {"component": 0, "form": "neurons", "layers": [DEAD]}),
        ("snmf", {"quantity": "speed", "layer": DEAD}),
    ],
)
def test_the_dead_layer_of_the_prefix_is_refused_with_its_reason(
    finder: str, options: Mapping[str, Any], policy: Pi0Policy, file: Path
) -> None:
    error = refused(lambda: found(finder, policy, "prefix", **with_moments(finder, options, file)))
    assert error.code == "dead_layer"
    assert "only keys and values leave the prefix" in error.sentence


@pytest.mark.parametrize(
    ("finder", "options"),
    [
        ("token", {"words": ["up", "fast", "slow", "low", "the"], "count": 500}),
        ("contrast", {"positive": ["{} fast"], "negative": ["{} slow"]}),
        ("contrast", {"positive": ["{} fast"], "negative": ["{} slow"], "form": "neurons", "count": 128}),
        ("attribution", {"observable": "speed", "count": 128}),
        ("attribution", {"observable": "speed", "form": "dense"}),
        ("pca", {"component": 0}),
    ],
)
def test_a_dead_layer_is_never_chosen(finder: str, options: Mapping[str, Any], policy: Pi0Policy, file: Path) -> None:
    direction = found(finder, policy, "prefix", **with_moments(finder, options, file))
    if direction.dense is not None:
        assert list(direction.dense) == [DEAD]  # the last site that leaves the prefix
    else:
        assert direction.neurons is not None
        assert direction.neurons.layer.max() == DEAD - 1
    assert actions(policy, made_moments()[0], direction).tolist() != actions(policy, made_moments()[0]).tolist()


def test_a_span_that_a_tower_has_no_token_of_is_refused(policy: Pi0Policy, file: Path) -> None:
    text, action = (replace(RECIPE, span=frozenset({role})) for role in ("text", "action"))
    wordings = {"moments": file, "positive": ["{} fast"], "negative": ["{} slow"]}
    for tower, recipe in (("expert", text), ("prefix", action)):
        assert refused(lambda t=tower, r=recipe: found("contrast", policy, t, r, **wordings)).code == "bad_span"
    assert refused(lambda: found("action", policy, "expert", text, dimension=2)).code == "bad_span"


# noise


def test_a_moment_is_seen_from_the_same_noise_whatever_was_done_before(
    policy: Pi0Policy, moments: list[Moment]
) -> None:
    first = read(policy, moments[1])
    policy.reset(99)
    policy.infer(moments[0].observation)
    assert read(policy, moments[1]) == first
    # Other moments begin from other noise: the same picture, another number in the file.
    other = replace(moments[1].observation, frame_id=7)
    assert read(policy, replace(moments[1], observation=other)) != first


def test_the_two_sides_of_a_contrast_begin_from_the_same_noise(policy: Pi0Policy, file: Path) -> None:
    material = Material(policy, "expert")
    same = [
        material.activations(file, frozenset({"action"}), "mean", wording=wording).residual[LAYERS]
        for wording in ("{}", " {} ")
    ]
    # A space more is the same prompt: what is left between the two sides is noise, and there is none.
    np.testing.assert_array_equal(*same)


# contrast


def test_a_contrast_written_into_the_expert_moves_the_action_as_its_wording_does(
    policy: Pi0Policy, file: Path, moments: list[Moment]
) -> None:
    wordings = {"moments": file, "positive": ["{} fast"], "negative": ["{} slow"]}
    direction = found("contrast", policy, "expert", **wordings)
    assert direction.span == {"action"}
    assert list(direction.dense or {}) == [LAYERS]

    def said(word: str) -> np.ndarray:
        told = [replace(m.observation, instruction=f"pick up the soup {word}") for m in moments]
        return np.mean([actions(policy, replace(m, observation=o)) for m, o in zip(moments, told, strict=True)], axis=0)

    def moved(one: Direction) -> np.ndarray:
        return np.mean([actions(policy, m, one) - actions(policy, m) for m in moments], axis=0)

    wanted = said("fast") - said("slow")
    assert cosine(moved(direction), wanted) > 0.8
    # And about as far: a random write of this norm may go that way, but hardly by as much.
    assert 0.5 < float(moved(direction) @ wanted / (wanted @ wanted)) < 1.5


def test_a_contrast_onto_a_layer_writes_the_same_with_its_strongest_value_vectors(
    policy: Pi0Policy, file: Path
) -> None:
    wordings = {"moments": file, "positive": ["{} fast"], "negative": ["{} slow"]}
    dense = found("contrast", policy, "expert", site=2, **wordings)
    whole = found("contrast", policy, "expert", onto_layer=1, count=48, **wordings)
    few = found("contrast", policy, "expert", onto_layer=1, count=6, **wordings)
    assert whole.neurons is not None
    assert few.neurons is not None
    weight = policy.towers["expert"].down_projs[1].weight.detach().numpy()  # type: ignore[attr-defined]
    wanted = (dense.dense or {})[2]
    np.testing.assert_allclose(weight[:, whole.neurons.neuron] @ whole.neurons.alpha, wanted, rtol=1e-3, atol=1e-5)
    assert set(few.neurons.layer.tolist()) == {1}
    assert few.provenance["reached"] == pytest.approx(
        cosine(weight[:, few.neurons.neuron] @ few.neurons.alpha, wanted), abs=1e-5
    )
    assert 0.5 < few.provenance["reached"] < 1


# action basis


@pytest.mark.parametrize("dimension", range(7))
def test_a_row_of_the_action_basis_raises_its_dimension(
    dimension: int, policy: Pi0Policy, moments: list[Moment]
) -> None:
    direction = found("action", policy, "expert", form="dense", dimension=dimension, norm=3.0)
    assert direction.span == {"action"}
    assert direction.provenance["reads"][0].startswith(f"{HAND[dimension]} +1.00")
    changed = np.mean([actions(policy, m, direction) - actions(policy, m) for m in moments], axis=0)
    scaled = changed / np.array(policy.statistics.action.std)
    assert scaled[dimension] > 0
    assert int(np.argmax(np.abs(scaled))) == dimension
    lowered = found("action", policy, "expert", form="dense", dimension=dimension, norm=3.0, invert=True)
    back = np.mean([actions(policy, m, lowered) - actions(policy, m) for m in moments], axis=0)
    assert back[dimension] < 0


def test_neurons_of_the_action_basis_are_those_that_write_into_the_dimension(policy: Pi0Policy) -> None:
    direction = found("action", policy, "expert", dimension=2, count=5)
    assert direction.neurons is not None
    row = ActionBasis.of(policy).row(2)
    every = np.concatenate(
        [row @ policy.towers["expert"].down_projs[layer].weight.double().numpy() for layer in (1, 2)]  # type: ignore[attr-defined]
    )
    flat = (direction.neurons.layer - 1) * 48 + direction.neurons.neuron
    assert set(flat.tolist()) == set(np.argsort(-np.abs(every))[:5].tolist())
    assert (direction.neurons.alpha * every[flat] > 0).all()


def test_size_in_the_expert_scales_what_writes_into_the_translation(policy: Pi0Policy) -> None:
    larger, smaller = finders.find_axis(
        "action", Material(policy, "expert"), RECIPE, options_for("action", {"readout": "size"})
    )[::-1]
    assert larger.neurons is not None
    assert smaller.neurons is not None
    assert (larger.op, set(larger.neurons.alpha.tolist())) == ("scale", {2.0})
    assert (smaller.op, set(smaller.neurons.alpha.tolist())) == ("scale", {0.0})
    np.testing.assert_array_equal(larger.neurons.neuron, smaller.neurons.neuron)
    rows = ActionBasis.of(policy).rows[:3] * np.array(policy.statistics.action.std)[:3, None]
    sizes = np.concatenate(
        [
            np.linalg.norm(rows @ policy.towers["expert"].down_projs[layer].weight.double().numpy(), axis=0)  # type: ignore[attr-defined]
            for layer in (1, 2)
        ]
    )
    flat = (larger.neurons.layer - 1) * 48 + larger.neurons.neuron
    assert sizes[flat].min() >= np.sort(sizes)[-20] - 1e-6
    assert refused(lambda: found("action", policy, "expert", readout="size", form="dense")).code == "bad_operation"


@pytest.mark.parametrize(
    ("tower", "options"), [("expert", {}), ("expert", {"dimension": 7}), ("prefix", {"dimension": 2}), ("prefix", {})]
)
def test_rows_that_a_tower_has_not_are_refused(tower: str, options: Mapping[str, Any], policy: Pi0Policy) -> None:
    assert refused(lambda: found("action", policy, tower, **options)).code == "no_action_rows"


# attribution


@pytest.mark.parametrize("name", ["speed", "dz", "gripper", "rotation"])
@pytest.mark.parametrize("tower", ["prefix", "expert"])
def test_gradients_through_all_steps_equal_finite_differences(name: str, tower: str) -> None:
    network = fabricate_pi0.tiny_network(seed=2, dtype=torch.float64)
    policy = Pi0Policy(network, fabricate.tiny_tokenizer(), fabricate_pi0.tiny_statistics(), action_steps=3)
    moment, of = made_moments(1)[0], observable(policy, name)
    material = Material(policy, tower)
    got = attribution.attribute(material, of, [1], material.default_span, [moment], sites=[1])
    inside = {"prefix": None, "expert": slice(1, None)}[tower]
    of_tower = policy.towers[tower]
    ids = policy.inputs([moment.observation]).ids[0]
    span = (ids != policy.config.image_token_id) if inside is None else torch.tensor([False] + [True] * 6)

    def value(place: tuple[str, int], vector: torch.Tensor) -> float:
        def on_ffn(module: object, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            return (args[0] + span[:, None] * vector,)

        def on_residual(module: object, args: object, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            changed = h + span[:, None] * vector
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        kind, index = place
        handle = (
            of_tower.down_projs[index].register_forward_pre_hook(on_ffn)  # type: ignore[attr-defined]
            if kind == "ffn"
            else of_tower.residual_sites[index].register_forward_hook(on_residual)  # type: ignore[attr-defined]
        )
        ready(policy, moment)
        with torch.no_grad():
            out = float(of(policy.decode(moment.observation)))
        handle.remove()
        return out

    for place, attributed in got.items():
        for index in np.argsort(-np.abs(attributed.gradient))[:3]:
            vector = torch.zeros(len(attributed.gradient), dtype=torch.float64)
            vector[int(index)] = 1e-3
            numeric = (value(place, vector) - value(place, -vector)) / 2e-3
            assert attributed.gradient[index] == pytest.approx(numeric, rel=0.02, abs=1e-6), place
            assert numeric != 0


@pytest.mark.parametrize("form", ["dense", "neurons"])
@pytest.mark.parametrize("tower", ["prefix", "expert"])
def test_what_is_attributed_moves_it_more_than_random_writes_do(
    form: str, tower: str, policy: Pi0Policy, file: Path, moments: list[Moment]
) -> None:
    told = {"moments": file, "observable": "dz", "form": form, "norm": 0.2, "count": 10}
    direction = found("attribution", policy, tower, **told)
    effects = [
        np.mean([actions(policy, m, one)[2] - actions(policy, m)[2] for m in moments])
        for one in (direction, *finders.controls(direction, policy.towers[tower], 8, seed=0))
    ]
    assert effects[0] > 0
    assert effects[0] > max(effects[1:])


def test_the_attributed_observable_is_the_one_that_is_scored(policy: Pi0Policy, moments: list[Moment]) -> None:
    for name, factor in (("speed", 1.0), ("dx", 100.0), ("dz", 100.0), ("rotation", 180.0 / np.pi)):
        ready(policy, moments[0])
        with torch.no_grad():
            value = float(observable(policy, name)(policy.decode(moments[0].observation)))
        assert read(policy, moments[0])["executed"][name] == pytest.approx(factor * value, rel=1e-5)


def test_what_a_flow_policy_does_not_have_is_refused_by_name(policy: Pi0Policy) -> None:
    for name in ("entropy", "said_pace"):
        error = refused(lambda name=name: observable(policy, name))
        assert (error.code, name in error.sentence) == ("unknown_observable", True)
    assert "'speed'" in refused(lambda: observable(policy, "sped")).sentence
    adding = fabricate_pi0.tiny_policy(delta=True)
    assert refused(lambda: observable(adding, "dz")).code == "no_gradient"


def test_gradients_leave_no_hook_and_no_graph(policy: Pi0Policy, file: Path) -> None:
    found("attribution", policy, "expert", moments=file, observable="speed", count=5)
    assert hooks_on(policy.model) == 0
    assert not policy.decode(made_moments(1)[0].observation).actions.requires_grad


# the rest


@pytest.mark.parametrize("tower", ["prefix", "expert"])
def test_a_probe_and_a_component_are_found_in_both_towers(tower: str, policy: Pi0Policy, file: Path) -> None:
    material = Material(policy, tower)
    component = finders.find("pca", material, RECIPE, options_for("pca", {"moments": file, "component": 0}))
    assert component.span == material.default_span
    site = {"prefix": DEAD, "expert": LAYERS}[tower]
    rows = material.activations(file, material.default_span, "mean").residual[site].astype(np.float64)
    spread = (rows - rows.mean(0)) @ (component.dense or {})[site] / np.linalg.norm((component.dense or {})[site])
    assert np.var(spread) / np.var(rows - rows.mean(0), axis=0).sum() == pytest.approx(
        component.provenance["explained"], abs=1e-3
    )


def test_random_controls_in_the_expert_have_its_place_and_norm(policy: Pi0Policy, file: Path) -> None:
    wordings = {"moments": file, "positive": ["{} fast"], "negative": ["{} slow"]}
    dense = found("contrast", policy, "expert", norm=2.0, **wordings)
    (control,) = finders.controls(dense, policy.towers["expert"], 1, seed=0)
    assert (control.tower, control.span) == ("expert", {"action"})
    assert np.linalg.norm((control.dense or {})[LAYERS]) == pytest.approx(2.0 * ActionBasis.of(policy).unit, rel=1e-5)


def test_a_word_of_the_prefix_is_as_large_as_the_tower_reads_it(policy: Pi0Policy) -> None:
    direction = found("word", policy, "prefix", words=["fast"], against=["slow"], spaced=False)
    material = Material(policy, "prefix")
    fast, slow = (list(dict.fromkeys(material.basis.tokens_of(word))) for word in ("fast", "slow"))
    embed = policy.model.language_model.embed_tokens  # type: ignore[union-attr]
    with torch.no_grad():
        read_in = [embed(torch.tensor(ids)).mean(0).numpy() for ids in (fast, slow)]  # type: ignore[operator]
    np.testing.assert_allclose((direction.dense or {})[0], read_in[0] - read_in[1], rtol=1e-4, atol=1e-6)
    assert material.mean_norm == pytest.approx(
        float(embed(torch.arange(len(policy.tokenizer))).norm(dim=1).mean()),
        rel=1e-4,  # type: ignore[operator]
    )


def with_moments(finder: str, options: Mapping[str, Any], file: Path) -> dict[str, Any]:
    return {**options, **({"moments": file} if "moments" in OPTIONS[finder].model_fields else {})}


def refused(action: Callable[[], object]) -> SteerError:
    with pytest.raises(SteerError) as caught:
        action()
    return caught.value


# several sites, scaled neurons


def test_a_contrast_of_several_sites_writes_each_its_own_difference(policy: Pi0Policy, file: Path) -> None:
    wordings = {"moments": file, "positive": ["{} fast"], "negative": ["{} slow"]}
    both = found("contrast", policy, "expert", sites=[1, 2], **wordings)
    assert both.provenance["site"] == [1, 2]
    for site in (1, 2):
        alone = found("contrast", policy, "expert", site=site, **wordings)
        np.testing.assert_allclose((both.dense or {})[site], (alone.dense or {})[site], rtol=1e-6)
    with pytest.raises(SteerError):
        options_for("contrast", {**wordings, "sites": [1], "site": 1})


def test_scaling_by_attribution_moves_the_observable_both_ways(
    policy: Pi0Policy, file: Path, moments: list[Moment]
) -> None:
    recipe = replace(RECIPE, alpha=1.3)
    raised, lowered = (
        found(
            "attribution", policy, "expert", recipe, moments=file, observable="dz", count=40, write="scale", invert=way
        )
        for way in (False, True)
    )
    assert raised.op == lowered.op == "scale"
    assert raised.neurons is not None
    assert lowered.neurons is not None
    np.testing.assert_allclose(np.unique(raised.neurons.alpha), [0.7, 1.3], rtol=1e-6)
    np.testing.assert_allclose(raised.neurons.alpha + lowered.neurons.alpha, 2.0, rtol=1e-6)

    def dz(direction: Direction | None = None) -> float:
        return float(np.mean([actions(policy, m, direction)[2] for m in moments]))

    assert dz(lowered) < dz() < dz(raised)
    scale = policy.action_space.position_scale_m
    # To first order: the sum of parts. The policy bends, so half to twice of it.
    assert 0.5 < (dz(raised) - dz(lowered)) * scale / (2 * raised.provenance["first_order_effect"]) < 2.0


@pytest.mark.parametrize("options", [{"form": "dense"}, {"norm": 2.0}])
def test_only_neurons_are_scaled_and_by_their_own_factor(options: dict[str, Any], file: Path) -> None:
    with pytest.raises(SteerError, match="write scale"):
        options_for("attribution", {"moments": file, "observable": "dz", "write": "scale", **options})
