"""A catalog file becomes a store, goes on where it stopped, and names the entry that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from steer_runtime.directions import building, finders
from steer_runtime.directions.building import Built, build, read_catalog
from steer_runtime.directions.finders import Material, Recipe
from steer_runtime.directions.options import options_for
from steer_runtime.directions.store import DirectionStore
from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.policy import OpenVLAPolicy

FAST: dict[str, Any] = {"words": ["fast", "quick"], "against": ["slow"]}
ENTRIES: list[dict[str, Any]] = [
    {"name": "speed", "finder": "word", "axis": True, "options": {**FAST, "site": 3, "norm": 2.0}},
    {"name": "lift", "finder": "neurons", "alpha": 2.5, "span": ["text"], "options": {"neurons": [[0, 17]]}},
    {"name": "lift-control", "finder": "random", "options": {"like": "lift", "seed": 3}},
]


def written(folder: Path, entries: Sequence[dict[str, Any]]) -> Path:
    path = folder / "catalog.yaml"
    path.write_text(yaml.safe_dump({"format": "steer-catalog/1", "policy": "tiny", "entries": list(entries)}))
    return path


def built(
    policy: OpenVLAPolicy, folder: Path, entries: Sequence[dict[str, Any]], date: str = "2026-01-31"
) -> list[Built]:
    store = DirectionStore(folder / "store")
    material = Material(policy, stored=lambda ref: store.load(ref))
    return list(build(read_catalog(written(folder, entries)), material, store, date=date, facts={}))


def test_a_build_saves_directions_axes_and_controls(tiny_policy: OpenVLAPolicy, tmp_path: Path) -> None:
    found = built(tiny_policy, tmp_path, ENTRIES)
    assert [(b.entry.name, b.made, len(b.directions)) for b in found] == [
        ("speed", True, 2),
        ("lift", True, 1),
        ("lift-control", True, 1),
    ]
    store = DirectionStore(tmp_path / "store")
    assert [(a.name, a.negative, a.positive) for a in store.load_axes()] == [
        ("speed", "speed-negative", "speed-positive")
    ]
    lift, control = store.load("lift"), store.load("lift-control")
    assert lift.neurons is not None
    assert control.neurons is not None
    assert (lift.neurons.alpha.tolist(), lift.span, control.span) == ([2.5], {"text"}, {"text"})
    assert control.provenance["control_of"] == lift.id


def test_a_build_goes_on_where_it_stopped(
    tiny_policy: OpenVLAPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(tiny_policy, tmp_path, ENTRIES[:1])
    before = {path: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    asked: list[str] = []
    finding = finders.find
    monkeypatch.setattr(finders, "find", lambda *given: (asked.append(given[2].name), finding(*given))[1])
    found = built(tiny_policy, tmp_path, ENTRIES, date="2026-02-28")
    assert [(b.entry.name, b.made) for b in found] == [("speed", False), ("lift", True), ("lift-control", True)]
    assert asked == ["lift", "lift-control"]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_changed_entry_takes_the_place_of_the_one_it_was(tiny_policy: OpenVLAPolicy, tmp_path: Path) -> None:
    built(tiny_policy, tmp_path, ENTRIES)
    changed = {**ENTRIES[1], "alpha": 7.0}
    (found,) = built(tiny_policy, tmp_path, [changed])
    assert found.made
    lift = DirectionStore(tmp_path / "store").load("lift")  # not ambiguous
    assert lift.neurons is not None
    assert lift.neurons.alpha.tolist() == [7.0]


def test_an_entry_that_is_refused_is_named_and_the_rest_is_built(tiny_policy: OpenVLAPolicy, tmp_path: Path) -> None:
    bad = {"name": "odd", "finder": "word", "options": {"words": ["skyward"], "against": ["slow"]}}
    found = built(tiny_policy, tmp_path, [bad, *ENTRIES])
    assert found[0].refused is not None
    assert found[0].refused.code == "unknown_word"
    assert "entry 'odd'" in found[0].refused.sentence
    assert [b.made for b in found[1:]] == [True, True, True]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([{"name": "x", "finder": "wordy"}], "entry 'x'"),
        ([{"name": "x", "finder": "word", "options": {"words": ["fast"]}}], "entry 'x'"),
        ([{"name": "x", "finder": "word", "options": FAST, "op": "explode"}], "entry 'x'"),
        ([{"name": "x", "finder": "word", "options": FAST, "colour": "red"}], "entry 'x'"),
        ([{"name": "x", "finder": "word", "options": FAST}] * 2, "'x'"),
        ([], "entries"),
    ],
)
def test_a_file_that_is_no_catalog_is_refused_by_entry(
    tmp_path: Path, entries: list[dict[str, Any]], said: str
) -> None:
    error = refused(lambda: read_catalog(written(tmp_path, entries)))
    assert error.code == "bad_catalog"
    assert said in error.sentence


@pytest.mark.parametrize("text", ["a: [", "!!python/object/apply:os.getcwd []", "[]", "[" * 20_000])
def test_a_file_that_is_no_yaml_of_ours_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "catalog.yaml").write_text(text)
    assert refused(lambda: read_catalog(tmp_path / "catalog.yaml")).code == "bad_catalog"
    assert refused(lambda: read_catalog(tmp_path / "none.yaml")).code == "no_catalog"


def test_the_shipped_catalog_has_every_axis_from_every_finder() -> None:
    catalog = read_catalog(Path(building.__file__).parents[2] / "configs" / "catalogs" / "pocket-libero.yaml")
    ways = {"token", "word", "word-neurons", "action", "contrast", "attribution", "probe", "snmf", "pca"}
    expected = {f"{axis}-{way}" for axis in ("speed", "height", "careful", "gripper") for way in ways}
    assert {entry.name for entry in catalog.entries} == expected
    # No label says a rough word, so careful has no other end there.
    assert {entry.name for entry in catalog.entries if not entry.axis} == {"careful-token"}


def test_the_catalog_of_the_pocket_pi0_is_what_was_chosen_from_its_sweep() -> None:
    folder = Path(building.__file__).parents[2] / "configs" / "catalogs"
    swept, chosen = (read_catalog(folder / f"pocket-pi0-libero{part}.yaml") for part in ("-sweep", ""))
    assert [e.name for e in chosen.entries] == [e.name for e in swept.entries]
    for mine, theirs in zip(chosen.entries, swept.entries, strict=True):
        assert not mine.sweep
        assert (mine.finder, mine.tower, mine.axis) == (theirs.finder, theirs.tower, True)
        assert mine.options in [variant.options for variant in theirs.variants.values()]
    assert {e.tower for e in chosen.entries} == {"prefix", "expert"}


def test_words_written_by_neurons_write_the_same_vector_with_the_smallest_activations(
    tiny_policy: OpenVLAPolicy,
) -> None:
    material, recipe = Material(tiny_policy), Recipe("fast", "")
    dense = finders.find("word", material, recipe, options_for("word", {**FAST, "site": 2, "norm": 3.0}))
    sparse = finders.find("word", material, recipe, options_for("word", {**FAST, "onto_layer": 1, "norm": 3.0}))
    assert dense.dense is not None
    assert sparse.neurons is not None
    weight = tiny_policy.towers["lm"].down_projs[1].weight.detach().numpy().astype(np.float64)  # type: ignore[attr-defined]
    activations = np.zeros(weight.shape[1])
    activations[sparse.neurons.neuron] = sparse.neurons.alpha
    np.testing.assert_allclose(weight @ activations, dense.dense[2], rtol=1e-3, atol=1e-4)
    # The smallest ones lie in the row space: nothing of them is lost in W^+ W.
    np.testing.assert_allclose(np.linalg.pinv(weight) @ weight @ activations, activations, rtol=1e-3, atol=1e-4)
    few = finders.find("word", material, recipe, options_for("word", {**FAST, "onto_layer": 1, "count": 8}))
    assert few.neurons is not None
    assert len(few.neurons) == 8
    assert 0 < few.provenance["reached"] < 1 == sparse.provenance["reached"]


def test_a_word_vector_is_that_of_the_axis_experiments(
    tiny_policy: OpenVLAPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sim.evaluation import axis_directions

    words = {"speed": (("fast", "quick"), ("slow", "low"))}
    monkeypatch.setattr(axis_directions, "WORDS", words)
    spec = axis_directions.AxisSpec("speed", "dense", ("text",), site=3, size=110.0)
    (draw,) = axis_directions.make(tiny_policy, spec, axis_directions.basis_of(tiny_policy, "speed"), 0, 0)
    options = options_for("word", {"words": words["speed"][0], "against": words["speed"][1], "site": 3, "norm": 110.0})
    mine = finders.find("word", Material(tiny_policy), Recipe("speed", ""), options)
    assert draw.positive.dense is not None
    assert mine.dense is not None
    np.testing.assert_allclose(mine.dense[3], draw.positive.dense[3], rtol=1e-5)


def test_the_action_basis_finds_what_raises_the_values_of_action_tokens(tiny_policy: OpenVLAPolicy) -> None:
    direction = finders.find("action", Material(tiny_policy), Recipe("up", ""), options_for("action", {"count": 5}))
    assert direction.neurons is not None
    values = tiny_policy.action_token_values()
    ids = sorted(values, key=values.__getitem__)
    rows = tiny_policy.unembedding.double()
    raises = rows[ids[-64:]].mean(0) - rows[ids[:64]].mean(0)
    for layer, neuron, alpha in zip(
        direction.neurons.layer, direction.neurons.neuron, direction.neurons.alpha, strict=True
    ):
        column = tiny_policy.towers["lm"].down_projs[layer].weight[:, neuron].double()  # type: ignore[attr-defined]
        assert float(column @ raises) * alpha > 0
    assert (direction.op, direction.span) == ("override", {"action"})
    refusal = refused(
        lambda: finders.find("action", Material(tiny_policy), Recipe("up", ""), options_for("action", {"dimension": 2}))
    )
    assert refusal.code == "no_action_rows"


def refused(action: Callable[[], object]) -> SteerError:
    with pytest.raises(SteerError) as caught:
        action()
    return caught.value
