"""A store returns what was saved, or refuses the file in one sentence. Files are data from a stranger."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as safetensors_save
from strategies import D_FF, D_MODEL, LAYERS, MODEL, damages, directions, neuron_direction

from steer_runtime.directions.card import MAX_CARD_BYTES
from steer_runtime.directions.direction import Axis, Direction
from steer_runtime.directions.store import MAX_TENSOR_BYTES, DirectionStore
from steer_runtime.directions.token_basis import TowerIdentity
from steer_runtime.errors import SteerError
from steer_runtime.types import Tower


@settings(max_examples=60, deadline=None)
@given(direction=directions())
def test_what_is_loaded_is_what_was_saved(direction: Direction, tmp_path_factory: pytest.TempPathFactory) -> None:
    store = DirectionStore(tmp_path_factory.mktemp("store"))
    store.save(direction)
    loaded = store.load(direction.id)
    assert loaded.card() == direction.card()
    assert {k: v.tobytes() for k, v in loaded.tensors().items()} == {
        k: v.tobytes() for k, v in direction.tensors().items()
    }
    assert loaded.hash == direction.hash


def test_identity_is_the_content(tmp_path: Path) -> None:
    store = DirectionStore(tmp_path)
    store.save(neuron_direction(alpha=4.0))
    store.save(neuron_direction(alpha=4.0))
    store.save(neuron_direction(alpha=5.0))
    assert len(store.list()) == 2


def test_a_name_and_a_hash_prefix_both_find_a_direction(tmp_path: Path) -> None:
    store = DirectionStore(tmp_path)
    store.save(direction := neuron_direction())
    prefixes = ("up", f"up@{direction.hash[:4]}", direction.id, f"up@{direction.hash}")
    assert [store.load(ref).hash for ref in prefixes] == [direction.hash] * 4


def test_a_full_hash_that_differs_past_the_file_name_is_not_found(tmp_path: Path) -> None:
    store = DirectionStore(tmp_path)
    store.save(direction := neuron_direction())
    other = f"up@{direction.hash[:12]}{'0' * 52}"
    with pytest.raises(SteerError):
        store.load(other)


def test_saving_leaves_no_partial_files(tmp_path: Path) -> None:
    store = DirectionStore(tmp_path)
    store.save(direction := neuron_direction())
    assert sorted(os.listdir(tmp_path)) == [f"{direction.id}.json", f"{direction.id}.safetensors"]


def test_a_name_of_two_directions_is_ambiguous(tmp_path: Path) -> None:
    store = DirectionStore(tmp_path)
    for alpha in (4.0, 5.0):
        store.save(neuron_direction(alpha=alpha))
    assert refused(lambda: store.load("up")).code == "ambiguous_name"


def test_the_model_chooses_among_directions_of_one_name(tmp_path: Path) -> None:
    store = DirectionStore(tmp_path)
    for model in (MODEL, "b" * 64):
        store.save(neuron_direction(model=model))
    assert store.load("up", model_hash="b" * 64).model_hash == "b" * 64


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    store = DirectionStore(tmp_path)
    store.save(neuron_direction("upward"))
    error = refused(lambda: store.load("upwrd"))
    assert error.code == "unknown_direction"
    assert "'upward'" in error.sentence


@pytest.mark.parametrize(
    "ref", ["../up", "up/../../x", "/etc/passwd", "up\x00", "Up", "up@zz", "", "a" * 300, "..", "a..b"]
)
def test_a_ref_that_is_no_name_never_reaches_the_file_system(tmp_path: Path, ref: str) -> None:
    assert refused(lambda: DirectionStore(tmp_path / "absent").load(ref)).code == "bad_name"


def test_each_direction_is_verified_against_the_tower_that_it_names(tmp_path: Path) -> None:
    store = DirectionStore(tmp_path)
    for name, tower in (("up", "prefix"), ("down", "expert")):
        store.save(replace(neuron_direction(name), tower=tower))
    prefix = TowerIdentity("prefix", MODEL, LAYERS, D_MODEL, D_FF)
    assert store.verify() == store.verify((prefix, replace(prefix, tower="expert"))) == ()
    smaller = replace(prefix, tower="expert", d_ff=D_FF - 1)
    ((name, reason),) = store.verify((prefix, smaller))
    assert (name.split("@")[0], "tower 'expert' has" in reason) == ("down", True)
    ((name, reason),) = store.verify((prefix,))
    assert (name.split("@")[0], "for tower 'expert': expected one of prefix" in reason) == ("down", True)


def test_a_direction_of_another_model_is_refused_by_the_tower(tmp_path: Path) -> None:
    store = DirectionStore(tmp_path)
    store.save(neuron_direction())
    tower = Tower("lm", [None] * LAYERS, [None] * (LAYERS + 1), D_MODEL, D_FF, 8, 1)
    loaded = store.load("up")
    loaded.require_fits(tower, MODEL)
    assert refused(lambda: loaded.require_fits(tower, "b" * 64)).code == "other_model"


@pytest.mark.parametrize(
    "facts", [{"x": float("nan")}, {"x": float("inf")}, {"x": {1: 2, "a": 3}}, {"x": np.float32(1)}, {"x": b""}]
)
def test_provenance_that_json_would_change_is_refused_and_nothing_written(tmp_path: Path, facts: dict) -> None:
    store = DirectionStore(tmp_path / "store")
    direction = replace(neuron_direction(), provenance=facts)
    assert refused(lambda: store.save(direction)).code == "bad_provenance"
    assert not (tmp_path / "store").exists()


def test_a_full_disk_is_one_sentence_and_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert refused(lambda: DirectionStore(tmp_path).save(neuron_direction())).code == "not_written"
    assert os.listdir(tmp_path) == []


# Hostile files: each case gets the path of good tensors and of the good card, and spoils one.


class Executed:
    """Unpickling this creates a file: the proof that something was executed."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (os.mkdir, (str(self.proof),))


def torn(tensors: Path, card: Path) -> None:
    tensors.write_bytes(tensors.read_bytes()[:-3])


def torn_in_the_header(tensors: Path, card: Path) -> None:
    tensors.write_bytes(tensors.read_bytes()[:20])


def empty(tensors: Path, card: Path) -> None:
    tensors.write_bytes(b"")


def giant_header(tensors: Path, card: Path) -> None:
    tensors.write_bytes((1 << 60).to_bytes(8, "little") + tensors.read_bytes()[8:])


def header_larger_than_the_file(tensors: Path, card: Path) -> None:
    tensors.write_bytes((200_000).to_bytes(8, "little") + tensors.read_bytes()[8:])


def with_header(tensors: Path, header: bytes, payload: bytes) -> None:
    tensors.write_bytes(len(header).to_bytes(8, "little") + header + payload)


def header_lies_about_the_shape(tensors: Path, card: Path) -> None:
    content = tensors.read_bytes()
    length = int.from_bytes(content[:8], "little")
    lie = content[8 : 8 + length].replace(b'"shape":[2]', b'"shape":[9]')
    assert lie != content[8 : 8 + length]
    with_header(tensors, lie, content[8 + length :])


def header_lies_about_the_offsets(tensors: Path, card: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 40]}
    with_header(tensors, json.dumps({"alpha": entry}).encode(), b"\0" * 8)


def header_with_a_key_twice(tensors: Path, card: Path) -> None:
    entry = b'"alpha":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    with_header(tensors, b"{" + entry + b"," + entry + b"}", b"\0" * 8)


def header_nested_deeply(tensors: Path, card: Path) -> None:
    with_header(tensors, b'{"alpha":' + b"[" * 50_000 + b"]" * 50_000 + b"}", b"")


def metadata_outside_the_hash(tensors: Path, card: Path) -> None:
    tensors.write_bytes(safetensors_save(neuron_direction().tensors(), metadata={"note": "x"}))


def a_pickle(tensors: Path, card: Path) -> None:
    tensors.write_bytes(pickle.dumps(Executed(tensors.parent / "executed")))


def a_zip_with_a_pickle(tensors: Path, card: Path) -> None:
    tensors.unlink()
    with zipfile.ZipFile(tensors, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Executed(tensors.parent / "executed")))


def a_pickle_for_a_card(tensors: Path, card: Path) -> None:
    card.write_bytes(pickle.dumps(Executed(tensors.parent / "executed")))


def float64_values(tensors: Path, card: Path) -> None:
    arrays = neuron_direction().tensors()
    tensors.write_bytes(safetensors_save({**arrays, "alpha": arrays["alpha"].astype(np.float64)}))


def not_finite(tensors: Path, card: Path) -> None:
    arrays = neuron_direction().tensors()
    tensors.write_bytes(safetensors_save({**arrays, "alpha": np.array([np.nan, 1], np.float32)}))


def neuron_out_of_range(tensors: Path, card: Path) -> None:
    arrays = neuron_direction().tensors()
    tensors.write_bytes(safetensors_save({**arrays, "neuron": np.array([0, D_FF], np.int32)}))


def other_alpha(tensors: Path, card: Path) -> None:
    tensors.write_bytes(safetensors_save(neuron_direction(alpha=9.0).tensors()))


def an_extra_tensor(tensors: Path, card: Path) -> None:
    arrays = neuron_direction().tensors()
    tensors.write_bytes(safetensors_save({**arrays, "low": arrays["alpha"]}))


def a_tensor_with_a_path_for_a_name(tensors: Path, card: Path) -> None:
    arrays = neuron_direction().tensors()
    tensors.write_bytes(safetensors_save({**arrays, "../../x": arrays["alpha"]}))


def larger_than_any_direction(tensors: Path, card: Path) -> None:
    with tensors.open("r+b") as file:
        file.truncate(MAX_TENSOR_BYTES + 1)


def a_link_out_of_the_store(tensors: Path, card: Path) -> None:
    outside = tensors.parent.parent / "outside.safetensors"
    tensors.rename(outside)
    tensors.symlink_to(outside)


def a_pipe(tensors: Path, card: Path) -> None:
    tensors.unlink()
    os.mkfifo(tensors)


def no_card(tensors: Path, card: Path) -> None:
    card.unlink()


def no_tensors(tensors: Path, card: Path) -> None:
    tensors.unlink()


def changed_card(**changes: object) -> Callable[[Path, Path], None]:
    def spoil(tensors: Path, card: Path) -> None:
        card.write_text(json.dumps({**json.loads(card.read_text()), **changes}))

    return spoil


def card_text(text: bytes) -> Callable[[Path, Path], None]:
    return lambda tensors, card: card.write_bytes(text) and None


def card_with_a_key_twice(tensors: Path, card: Path) -> None:
    card.write_text(card.read_text().rstrip().removesuffix("}") + ', "name": "up"}')


def card_with_an_overflowing_number(tensors: Path, card: Path) -> None:
    card.write_text(card.read_text().replace('"max_strength": 1.0', '"max_strength": 1e999'))


HOSTILE: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    f.__name__: (f, code)
    for f, code in (
        (torn, "bad_file"),
        (torn_in_the_header, "bad_file"),
        (empty, "bad_file"),
        (giant_header, "bad_file"),
        (header_larger_than_the_file, "bad_file"),
        (header_lies_about_the_shape, "bad_file"),
        (header_lies_about_the_offsets, "bad_file"),
        (header_with_a_key_twice, "bad_card"),
        (header_nested_deeply, "bad_card"),
        (metadata_outside_the_hash, "bad_file"),
        (a_pickle, "bad_file"),
        (a_zip_with_a_pickle, "bad_file"),
        (a_pickle_for_a_card, "bad_card"),
        (float64_values, "bad_file"),
        (not_finite, "not_finite"),
        (neuron_out_of_range, "neuron_out_of_range"),
        (other_alpha, "hash_mismatch"),
        (an_extra_tensor, "bad_file"),
        (a_tensor_with_a_path_for_a_name, "bad_file"),
        (larger_than_any_direction, "bad_file"),
        (a_link_out_of_the_store, "bad_file"),
        (a_pipe, "bad_file"),
        (no_card, "missing_card"),
        (no_tensors, "bad_file"),
        (card_with_a_key_twice, "bad_card"),
    )
} | {
    "card_of_another_format": (changed_card(format="steer-direction/1"), "bad_card"),
    "card_with_an_unknown_key": (changed_card(code="import os"), "bad_card"),
    "card_with_a_traversing_name": (changed_card(name="../../up"), "bad_card"),
    "card_with_another_name": (changed_card(name="down"), "bad_card"),
    "card_with_text_for_a_number": (changed_card(layers="5"), "bad_card"),
    "card_with_a_flag_for_a_number": (changed_card(layers=True), "bad_card"),
    "card_with_no_model": (changed_card(model_hash="../../x"), "bad_card"),
    "card_with_other_provenance": (changed_card(provenance={"words": ["down"]}), "hash_mismatch"),
    "card_claiming_proof": (changed_card(proven=True), "hash_mismatch"),
    "card_with_an_unknown_role": (changed_card(span=["everything"]), "bad_span"),
    "card_with_a_huge_limit": (changed_card(max_strength=1e300), "bad_max_strength"),
    "card_with_another_licence": (changed_card(licence="MIT"), "hash_mismatch"),
    "card_with_a_licence_that_is_a_path": (changed_card(licence="../LICENSE"), "bad_licence"),
    "card_claiming_a_range": (changed_card(calibrated=[0.0, 1.0]), "hash_mismatch"),
    "card_with_a_range_of_three": (changed_card(calibrated=[0.0, 0.5, 1.0]), "bad_card"),
    "card_with_a_range_backwards": (changed_card(calibrated=[1.0, 0.0]), "bad_calibrated"),
    "card_that_lies_about_its_layers": (changed_card(writes={"neurons": 2, "layers": [0]}), "hash_mismatch"),
    "card_with_another_hash": (changed_card(hash="0" * 64), "hash_mismatch"),
    "card_with_nan": (changed_card(provenance={"x": float("nan")}), "bad_card"),
    "card_with_an_overflowing_number": (card_with_an_overflowing_number, "bad_card"),
    "card_with_a_number_of_a_million_digits": (card_text(b'{"layers": ' + b"9" * 1_000_000 + b"}"), "bad_card"),
    "card_nested_forty_deep": (changed_card(provenance=json.loads('{"a":' * 40 + "1" + "}" * 40)), "bad_card"),
    "card_nested_past_the_stack": (card_text(b"[" * 500_000), "bad_card"),
    "card_that_is_a_list": (card_text(b"[]"), "bad_card"),
    "card_in_no_encoding": (card_text(b"\xff\xfe\x00{"), "bad_card"),
    "card_larger_than_any": (card_text(b" " * (MAX_CARD_BYTES + 1)), "bad_file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_and_nothing_executed(tmp_path: Path, case: str) -> None:
    spoil, code = HOSTILE[case]
    store = DirectionStore(tmp_path / "store")
    tensors = store.save(neuron_direction())
    spoil(tensors, tensors.with_suffix(".json"))
    error = refused(lambda: store.load("up"))
    assert error.code == code, error.sentence
    assert "\n" not in error.sentence
    assert len(error.sentence) < 500
    assert not (tmp_path / "store" / "executed").exists()


@pytest.mark.parametrize("case", HOSTILE)
def test_a_listing_names_a_hostile_file_and_still_shows_the_good_one(tmp_path: Path, case: str) -> None:
    store = DirectionStore(tmp_path / "store")
    tensors = store.save(neuron_direction())
    store.save(good := neuron_direction("good"))
    HOSTILE[case][0](tensors, tensors.with_suffix(".json"))
    problems = {entry.id: entry.problem for entry in store.list()}
    assert problems[good.id] is None
    assert problems[tensors.stem]


@pytest.mark.parametrize(
    ("spoil", "phrase"),
    [
        (torn, "is torn"),
        (giant_header, "claims a header of 1152921504606846976 bytes"),
        (a_pickle, "is a Python pickle"),
        (a_zip_with_a_pickle, "is a zip archive"),
        (a_link_out_of_the_store, "is a symbolic link"),
        (a_pipe, "is not a regular file"),
        (no_card, "has no card"),
        (float64_values, "is F64: expected F32"),
        (larger_than_any_direction, f"is larger than {MAX_TENSOR_BYTES} bytes"),
        (other_alpha, "were changed after it was made"),
    ],
)
def test_each_refusal_says_what_is_wrong(tmp_path: Path, spoil: Callable[[Path, Path], None], phrase: str) -> None:
    store = DirectionStore(tmp_path / "store")
    tensors = store.save(neuron_direction())
    spoil(tensors, tensors.with_suffix(".json"))
    assert phrase in refused(lambda: store.load("up")).sentence


def test_a_file_under_the_name_of_another_content_is_refused(tmp_path: Path) -> None:
    store = DirectionStore(tmp_path)
    old, new = neuron_direction(alpha=4.0), neuron_direction(alpha=5.0)
    store.save(old)
    for suffix in (".json", ".safetensors"):
        os.rename(tmp_path / f"{old.id}{suffix}", tmp_path / f"{new.id}{suffix}")
    assert refused(lambda: store.load("up")).code == "hash_mismatch"


def test_an_absent_store_is_empty(tmp_path: Path) -> None:
    store = DirectionStore(tmp_path / "absent")
    assert (store.list(), store.load_all(), store.load_axes()) == ((), (), ())


def test_an_axis_joins_two_directions(tmp_path: Path) -> None:
    store = DirectionStore(tmp_path)
    for name in ("slow", "fast"):
        store.save(neuron_direction(name))
    store.save_axis(axis := Axis("speed", "slow", "fast"))
    assert store.load_axes() == (axis,)
    assert store.load_axis("speed") == axis


@pytest.mark.parametrize(
    ("axis", "code"),
    [
        (Axis("../speed", "slow", "fast"), "bad_name"),
        (Axis("speed", "slow", "fsat"), "unknown_direction"),
        (Axis("speed", "slow", "slow"), "bad_axis"),
        (Axis("speed", "slow", "other"), "bad_axis"),
        (Axis("fast", "slow", "fast"), "name_taken"),
    ],
)
def test_an_axis_that_cannot_be_commanded_is_refused(tmp_path: Path, axis: Axis, code: str) -> None:
    store = DirectionStore(tmp_path)
    for name in ("slow", "fast"):
        store.save(neuron_direction(name))
    store.save(neuron_direction("other", model="b" * 64))
    assert refused(lambda: store.save_axis(axis)).code == code
    assert store.load_axes() == ()


def test_an_axis_whose_end_is_gone_is_refused(tmp_path: Path) -> None:
    store = DirectionStore(tmp_path)
    for name in ("slow", "fast"):
        store.save(neuron_direction(name))
    store.save_axis(Axis("speed", "slow", "fast"))
    store.save_axis(Axis("speed2", "fast", "slow"))
    for path in tmp_path.glob("fast@*"):
        path.unlink()
    assert refused(store.load_axes).code == "unknown_direction"


def test_a_direction_cannot_take_the_name_of_an_axis(tmp_path: Path) -> None:
    store = DirectionStore(tmp_path)
    for name in ("slow", "fast"):
        store.save(neuron_direction(name))
    store.save_axis(Axis("speed", "slow", "fast"))
    assert refused(lambda: store.save(neuron_direction("speed"))).code == "name_taken"


@settings(max_examples=150, deadline=None)
@given(direction=directions(), damage=damages(), suffix=st.sampled_from([".json", ".safetensors"]))
def test_a_byte_changed_in_any_file_of_a_direction_is_refused(
    direction: Direction, damage: Callable[[bytes], bytes], suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = DirectionStore(tmp_path_factory.mktemp("store"))
    path = store.save(direction).with_name(direction.id + suffix)
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assume(path.read_bytes() != content)  # of two equal bytes side by side either may go
    refused(lambda: store.load(direction.name))
    assert [entry.direction for entry in store.list()] == [None]


def test_every_byte_of_an_axis_file_counts(tmp_path: Path) -> None:
    store = DirectionStore(tmp_path)
    for name in ("slow", "slov", "fast"):
        store.save(neuron_direction(name))
    path = store.save_axis(Axis("speed", "slow", "fast"))
    content = path.read_bytes()
    for at in range(len(content)):
        for value in (content[at] ^ 1, ord(" "), ord("\n")):
            if value != content[at]:
                path.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
                refused(store.load_axes)
        path.write_bytes(content[:at])
        refused(store.load_axes)
    path.write_bytes(content)
    assert store.load_axis("speed").negative == "slow"


def test_a_card_holds_what_a_catalog_asks_for(tmp_path: Path) -> None:
    store = DirectionStore(tmp_path)
    direction = replace(neuron_direction(), licence="MIT", calibrated=(0.25, 0.75))
    card = json.loads(store.save(direction).with_suffix(".json").read_text())
    assert card["writes"] == {"neurons": 2, "layers": [1, 4], "alpha": [4.0, 4.0]}
    assert (card["licence"], card["calibrated"]) == ("MIT", [0.25, 0.75])
    assert (card["hash"], card["model_hash"]) == (direction.hash, MODEL)
    assert card["provenance"]["finder"] == "test"


def test_a_card_of_the_first_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    store = DirectionStore(tmp_path)
    card = store.save(neuron_direction()).with_suffix(".json")
    card.write_text(card.read_text().replace("steer-direction/2", "steer-direction/1"))
    assert "make the direction again with `steer directions make`" in refused(lambda: store.load("up")).sentence


def refused(action: Callable[[], object]) -> SteerError:
    with pytest.raises(SteerError) as caught:
        action()
    return caught.value
