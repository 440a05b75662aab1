"""What leaves in another project's format comes back the same, or what is lost is told; hostile files are refused."""

from __future__ import annotations

import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from strategies import D_FF, D_MODEL, LAYERS, MODEL, damages, directions, neuron_direction

from steer_runtime.directions.direction import Direction
from steer_runtime.directions.finders.recipe import Recipe
from steer_runtime.directions.formats.clusters import from_clusters, to_clusters
from steer_runtime.directions.formats.control_vector import from_control_vector, to_control_vector
from steer_runtime.directions.formats.tensors import from_tensors, to_tensors
from steer_runtime.directions.token_basis import TowerIdentity
from steer_runtime.errors import SteerError
from steer_runtime.types import ALL_ROLES

IDENTITY = TowerIdentity("lm", MODEL, LAYERS, D_MODEL, D_FF)
NOTHING = Recipe("", "2026-01-31")
NAMED = Recipe("up", "2026-01-31")
VECTOR = np.arange(D_MODEL, dtype=np.float32)


def dense(*sites: int, span: frozenset = ALL_ROLES) -> Direction:
    vectors = {site: VECTOR + site for site in sites}
    return replace(neuron_direction(), neurons=None, dense=vectors, op="add", span=span)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exchange")


@settings(max_examples=50, deadline=None)
@given(direction=directions())
def test_safetensors_bring_any_direction_back(direction: Direction, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("out") / "x.safetensors"
    exported = to_tensors(direction)
    path.write_bytes(exported.content)
    assert exported.losses == ()
    assert from_tensors(path, IDENTITY, NOTHING).hash == direction.hash


@settings(max_examples=50, deadline=None)
@given(direction=directions())
def test_a_control_vector_brings_a_dense_direction_back_or_says_why_not(
    direction: Direction, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if direction.dense is None or min(direction.dense) < 2:
        assert refused(lambda: to_control_vector(direction)).code == "not_exportable"
        return
    path = tmp_path_factory.mktemp("out") / "x.gguf"
    exported = to_control_vector(direction)
    path.write_bytes(exported.content)
    assert bool(exported.losses) == (direction.span != ALL_ROLES)
    assert from_control_vector(path, IDENTITY, NOTHING).hash == direction.hash


@settings(max_examples=50, deadline=None)
@given(direction=directions(), labelled=st.booleans(), data=st.data())
def test_a_cluster_file_brings_indices_labels_and_alpha_back_or_says_why_not(
    direction: Direction, labelled: bool, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if direction.neurons is None or direction.op != "override":
        assert refused(lambda: to_clusters([direction], labelled=labelled)).code == "not_exportable"
        return
    n = direction.neurons
    flat = [int(layer) * D_FF + int(neuron) for layer, neuron in zip(n.layer, n.neuron, strict=True)]
    words = st.lists(st.text(max_size=6), max_size=3)
    labels = data.draw(st.lists(words, min_size=len(flat), max_size=len(flat)))
    direction = replace(direction, provenance={"flat": flat, "labels": labels})
    path = tmp_path_factory.mktemp("out") / "x.yaml"
    exported = to_clusters([direction], labelled=labelled)
    path.write_bytes(exported.content)
    recipe = replace(NAMED, alpha=float(n.alpha[0]))
    (back,) = from_clusters(path, IDENTITY, recipe, made_for=(LAYERS, D_FF)).directions
    assert back.neurons is not None
    assert (back.name, back.neurons.layer.tolist(), back.neurons.neuron.tolist()) == (
        direction.name,
        n.layer.tolist(),
        n.neuron.tolist(),
    )
    assert back.provenance.get("labels") == (labels if labelled else None)
    whole = direction.span == ALL_ROLES and len(set(n.alpha.tolist())) == 1
    assert bool(exported.losses) == (not whole)
    assert whole <= np.array_equal(back.neurons.alpha, n.alpha)


def test_the_published_cluster_files_survive_the_round_trip(folder: Path) -> None:
    published = Path(__file__).parents[2] / "configs" / "clusters" / "corl2025_openvla_clusters.yaml"
    identity = TowerIdentity("lm", "f" * 64, 32, 4096, 11008)
    first = from_clusters(published, identity, NAMED).directions
    path = folder / "again.yaml"
    path.write_bytes(to_clusters(first, labelled=True).content)
    second = from_clusters(path, identity, NAMED).directions
    facts = [[(d.name, d.provenance["flat"], d.provenance["labels"]) for d in found] for found in (first, second)]
    assert facts[0] == facts[1]


def test_direction_n_is_the_output_of_layer_n(folder: Path) -> None:
    writer = gguf.GGUFWriter(folder / "v.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", 2)
    writer.add_array("some.list", ["a", "b"])
    for layer in (1, 4):
        writer.add_tensor(f"direction.{layer}", VECTOR + layer)
    write(writer)
    direction = from_control_vector(folder / "v.gguf", IDENTITY, replace(NAMED, alpha=2.0))
    assert direction.dense is not None
    assert {site: vector.tolist() for site, vector in direction.dense.items()} == {
        2: (2 * (VECTOR + 1)).tolist(),
        5: (2 * (VECTOR + 4)).tolist(),
    }
    assert (direction.op, direction.span, direction.model_hash) == ("add", ALL_ROLES, MODEL)
    assert direction.provenance["model_hint"] == "llama"
    assert direction.provenance["sha256"]


def test_other_programs_read_our_control_vector(folder: Path) -> None:
    (folder / "v.gguf").write_bytes(to_control_vector(dense(2, 5, span=frozenset({"text"}))).content)
    reader = gguf.GGUFReader(folder / "v.gguf")
    fields = {key: reader.fields[key].contents() for key in reader.fields}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.layer_count"] == 2
    assert fields["controlvector.model_hint"]
    assert "text tokens only" in fields["steer.loss"]
    assert {t.name: t.data.tolist() for t in reader.tensors} == {
        "direction.1": (VECTOR + 2).tolist(),
        "direction.4": (VECTOR + 5).tolist(),
    }
    assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 for t in reader.tensors)


def test_plain_safetensors_name_layers_or_sites(folder: Path) -> None:
    half = torch.arange(D_MODEL, dtype=torch.bfloat16)
    save_torch({"layer.1": half, "site.0": half.float(), "layers.4": half.half()}, folder / "v.safetensors")
    direction = from_tensors(folder / "v.safetensors", IDENTITY, NAMED)
    assert direction.dense is not None
    assert {site: vector.tolist() for site, vector in direction.dense.items()} == dict.fromkeys(
        (0, 2, 5), VECTOR.tolist()
    )


def test_plain_safetensors_hold_neurons(folder: Path) -> None:
    numbers = {"layer": np.array([1, 4]), "neuron": np.array([0, 15]), "alpha": np.array([2, -3], np.float32)}
    save_file(numbers, folder / "v.safetensors")
    direction = from_tensors(folder / "v.safetensors", IDENTITY, replace(NAMED, op="add"))
    assert direction.neurons is not None
    assert (direction.op, direction.neurons.layer.dtype, direction.neurons.alpha.tolist()) == ("add", np.int32, [2, -3])


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ({"layer.9": VECTOR}, "layer_out_of_range"),
        ({"layer.1": VECTOR[:-1]}, "other_model"),
        ({"layer.1": VECTOR[None]}, "other_model"),
        ({"layer.1": VECTOR, "site.2": VECTOR}, "bad_file"),
        ({"../x": VECTOR}, "bad_file"),
        ({"layer.1": VECTOR.astype(np.float64)}, "bad_file"),
        ({"layer.1": VECTOR * np.nan}, "not_finite"),
        ({}, "bad_direction"),
        ({"layer": np.array([1]), "neuron": np.array([2])}, "bad_file"),
        ({"layer": np.array([1]), "neuron": np.array([1 << 40]), "alpha": VECTOR[:1]}, "bad_file"),
        ({"layer": np.array([1]), "neuron": np.array([D_FF]), "alpha": VECTOR[:1]}, "neuron_out_of_range"),
        ({"layer": np.array([[1]]), "neuron": np.array([[1]]), "alpha": VECTOR[None, :1]}, "bad_direction"),
    ],
)
def test_safetensors_that_are_no_direction_are_refused(folder: Path, tensors: dict, code: str) -> None:
    save_file(tensors, folder / "v.safetensors")
    assert refused(lambda: from_tensors(folder / "v.safetensors", IDENTITY, NAMED)).code == code


def test_a_direction_of_another_model_is_refused(folder: Path) -> None:
    direction = dense(2)
    (folder / "v.gguf").write_bytes(to_control_vector(direction).content)
    (folder / "v.safetensors").write_bytes(to_tensors(direction).content)
    other = replace(IDENTITY, model_hash="b" * 64)
    assert refused(lambda: from_control_vector(folder / "v.gguf", other, NOTHING)).code == "other_model"
    assert refused(lambda: from_tensors(folder / "v.safetensors", other, NOTHING)).code == "other_model"
    narrow = replace(IDENTITY, d_model=D_MODEL - 1)
    assert refused(lambda: from_tensors(folder / "v.safetensors", narrow, NOTHING)).code == "other_model"


def test_a_file_with_its_card_takes_no_other_wishes(folder: Path) -> None:
    (folder / "v.safetensors").write_bytes(to_tensors(dense(2)).content)
    for wish in ({"name": "down"}, {"alpha": 2.0}, {"op": "add"}, {"max_strength": 0.5}, {"licence": "MIT"}):
        error = refused(lambda wish=wish: from_tensors(folder / "v.safetensors", IDENTITY, replace(NOTHING, **wish)))
        assert error.code == "bad_option"


@pytest.mark.parametrize(("sites", "place"), [((0, 2), "site 0"), ((1, 2), "site 1")])
def test_a_site_that_a_control_vector_cannot_hold_is_refused_with_the_reason(
    sites: tuple[int, ...], place: str
) -> None:
    error = refused(lambda: to_control_vector(dense(*sites)))
    assert error.code == "not_exportable"
    assert place in error.sentence


def test_what_a_cluster_file_loses_is_told_and_written_into_it() -> None:
    narrow = replace(neuron_direction(), span=frozenset({"text"}))
    exported = to_clusters([narrow], labelled=False)
    assert exported.losses == (f"{narrow.id}: written on text tokens only",)
    assert f"# lost: {exported.losses[0]}" in exported.content.decode()
    assert f"# {narrow.id}: override, --alpha 4, --made-for {LAYERS}x{D_FF}" in exported.content.decode()


def test_directions_that_share_no_flat_index_make_no_cluster_file() -> None:
    wide = replace(neuron_direction("wide"), d_ff=D_FF + 1)
    assert refused(lambda: to_clusters([neuron_direction(), wide], labelled=True)).code == "not_exportable"
    assert (
        refused(lambda: to_clusters([neuron_direction(), neuron_direction()], labelled=True)).code == "not_exportable"
    )
    assert refused(lambda: to_clusters([], labelled=True)).code == "not_exportable"


READERS = {
    "x.gguf": lambda path: from_control_vector(path, IDENTITY, NOTHING),
    "x.safetensors": lambda path: from_tensors(path, IDENTITY, NOTHING),
    "x.yaml": lambda path: from_clusters(path, IDENTITY, NAMED, made_for=(LAYERS, D_FF)).directions,
}


def written_by_others(path: Path) -> bytes:
    """A file of each format without our card, so without a hash."""
    if path.suffix == ".gguf":
        writer = gguf.GGUFWriter(path, "controlvector")
        writer.add_string("controlvector.model_hint", "llama")
        writer.add_array("some.list", [1, 2, 3])
        writer.add_array("some.words", ["a", "b"])
        writer.add_tensor("direction.2", VECTOR)
        write(writer)
    elif path.suffix == ".safetensors":
        save_file({"layer.2": VECTOR, "site.0": VECTOR}, path, metadata={"by": "another"})
    else:
        path.write_text("up: {1: ['up', 'Up'], 17: [above]}\nblank: {}\ndown:\n  - 3\n  - 0x12\n")
    return path.read_bytes()


@settings(max_examples=250, deadline=None)
@given(damage=damages(), name=st.sampled_from(sorted(READERS)))
def test_a_damaged_file_of_another_program_is_read_or_refused_in_a_sentence(
    damage: Callable[[bytes], bytes], name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("in") / name
    path.write_bytes(damage(written_by_others(path)))
    said = outcome(lambda: READERS[name](path))
    assert isinstance(said, Direction | tuple) or is_one_sentence(said)


@settings(max_examples=150, deadline=None)
@given(damage=damages(), name=st.sampled_from(["x.gguf", "x.safetensors"]))
def test_a_damaged_file_of_ours_is_never_another_direction(
    damage: Callable[[bytes], bytes], name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    direction = dense(2, 4)
    export = to_control_vector if name == "x.gguf" else to_tensors
    content = export(direction).content
    path = tmp_path_factory.mktemp("in") / name
    path.write_bytes(damage(content))
    assume(path.read_bytes() != content)
    found = outcome(lambda: READERS[name](path))
    # A byte of padding, or of a field that no reader needs, may change.
    assert is_one_sentence(found) or found.hash == direction.hash


@settings(max_examples=150, deadline=None)
@example(content=b"(:", head=b"")  # YAML: one cluster, called "(", of nothing
@given(content=st.binary(max_size=200), head=st.sampled_from([b"", b"GGUF\x03\0\0\0", b"{", b"\x08\0\0\0\0\0\0\0{}"]))
def test_any_bytes_are_refused_in_a_sentence(
    content: bytes, head: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("in")
    for name, read in READERS.items():
        (folder / name).write_bytes(head + content)
        assert is_one_sentence(outcome(lambda path=folder / name, read=read: read(path)))


def test_claimed_lengths_cost_nothing(folder: Path) -> None:
    def field(kind: int, rest: bytes) -> bytes:
        return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind) + rest

    claims = {
        "tensors": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0),
        "fields": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60),
        "array of bytes": field(9, struct.pack("<IQ", 0, 1 << 60)),
        "array of texts": field(9, struct.pack("<IQ", 8, 1 << 60)),
        "array of arrays": field(9, struct.pack("<IQ", 9, 1 << 60)),
        "text": field(8, struct.pack("<Q", 1 << 60)),
        "alignment": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 17) + b"general.alignment"
        + struct.pack("<II", 4, 1 << 31),
    }  # fmt: skip
    for claim, content in claims.items():
        (folder / "x.gguf").write_bytes(content)
        error = refused(lambda: from_control_vector(folder / "x.gguf", IDENTITY, NAMED))
        assert error.code == "bad_gguf", claim


@pytest.mark.parametrize("changes", [{"architecture": "llama"}, {"tensor": "blk.0.x"}, {"values": np.ones((2, 3))}])
def test_a_gguf_of_something_else_is_refused(folder: Path, changes: dict) -> None:
    writer = gguf.GGUFWriter(folder / "x.gguf", changes.get("architecture", "controlvector"))
    values = np.asarray(changes.get("values", VECTOR), np.float32)
    writer.add_tensor(changes.get("tensor", "direction.1"), values)
    write(writer)
    assert refused(lambda: from_control_vector(folder / "x.gguf", IDENTITY, NAMED)).code == "bad_gguf"


class Executed:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.mkdir, (self.proof,))


@pytest.mark.parametrize("name", sorted(READERS))
def test_pickles_and_archives_are_refused_and_nothing_executed(folder: Path, name: str) -> None:
    payload = pickle.dumps(Executed(folder / "proof"))
    (folder / "member").write_bytes(payload)

    def zipped(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("../../escape", payload)

    def tarred(path: Path) -> None:
        with tarfile.open(path, "w") as archive:
            archive.add(folder / "member", "../../escape")

    for make in (zipped, tarred, lambda path: path.write_bytes(payload)):
        make(folder / name)
        refused(lambda: READERS[name](folder / name))
    assert not (folder / "proof").exists()
    assert not (folder.parent.parent / "escape").exists()


def test_a_pipe_does_not_block_an_import(folder: Path) -> None:
    import os

    os.mkfifo(folder / "x.gguf")
    assert refused(lambda: from_control_vector(folder / "x.gguf", IDENTITY, NAMED)).code == "bad_file"


def test_a_carried_card_that_was_edited_is_refused(folder: Path) -> None:
    content = to_tensors(replace(dense(2), max_strength=0.5)).content
    edited = content.replace(b'\\"max_strength\\": 0.5', b'\\"max_strength\\": 0.9')
    assert edited != content
    (folder / "x.safetensors").write_bytes(edited)
    assert refused(lambda: from_tensors(folder / "x.safetensors", IDENTITY, NOTHING)).code == "hash_mismatch"
    assert json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def outcome(action: Callable[[], object]) -> object:
    """What an action gives: its result, or the error it is refused with. Any other exception is a failure."""
    try:
        return action()
    except SteerError as error:
        return error


def is_one_sentence(said: object) -> bool:
    return isinstance(said, SteerError) and "\n" not in said.sentence and len(said.sentence) < 600


def refused(action: Callable[[], object]) -> SteerError:
    with pytest.raises(SteerError) as caught:
        action()
    return caught.value
