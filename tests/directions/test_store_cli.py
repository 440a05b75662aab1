"""Catalog verbs as an operator runs them: import, export, list, verify, on a checkpoint of a few kilobytes."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import fabricate
import pytest
from sparse_checkpoint import save_sparse, write_sparse
from typer.testing import CliRunner, Result

from steer_runtime.cli.directions import app
from steer_runtime.directions.direction import Axis
from steer_runtime.directions.store import DirectionStore
from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.config import OPENVLA_7B, LMConfig, ViTConfig
from steer_runtime.policies.openvla.policy import OpenVLAPolicy

CLUSTERS = Path(__file__).parents[2] / "configs" / "clusters"
PUBLISHED, PI0_FAST = CLUSTERS / "corl2025_openvla_clusters.yaml", CLUSTERS / "corl2025_pi0fast_clusters.yaml"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "checkpoint"
    fabricate.save_tiny(folder)
    return folder


@pytest.fixture
def shell(checkpoint: Path, tmp_path: Path) -> Shell:
    return Shell(checkpoint, tmp_path)


class Shell:
    """Runs verbs on a store in a folder, and makes directions of the checkpoint through `import`."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.checkpoint, self.folder = checkpoint, folder
        self.store = DirectionStore(folder / "store")

    def __call__(self, verb: str, *arguments: object, model: bool = False) -> Result:
        given = [verb, *map(str, arguments), "--store", str(self.folder / "store")]
        return CliRunner().invoke(app, [*given, *(["--checkpoint", str(self.checkpoint)] if model else [])])

    def clusters(self, text: str = "up: {70: [up, Up], 3: [above]}\ndown: {5: [low]}\nblank: {}\n") -> Result:
        (self.folder / "clusters.yaml").write_text(text)
        return self("import", self.folder / "clusters.yaml", "--made-for", "3x64", "--licence", "MIT", model=True)


def test_help_of_every_verb_has_an_example_and_loads_no_torch() -> None:
    script = (
        "import sys\nfrom steer_runtime.cli.directions import app\n"
        "for verb in ('import', 'export', 'verify', 'annotate'):\n"
        "    try: app([verb, '--help'])\n    except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Example") == 4


def test_clusters_become_directions_of_a_checkpoint_that_is_never_loaded(shell: Shell) -> None:
    result = shell.clusters()
    assert result.exit_code == 0, result.output
    assert "without neurons, so not saved: blank" in result.output
    up = shell.store.load("up")
    assert up.neurons is not None
    assert (up.neurons.layer.tolist(), up.neurons.neuron.tolist()) == ([1, 0], [6, 3])
    assert (up.licence, up.provenance["finder"], up.provenance["file"]) == ("MIT", "import", "clusters.yaml")
    live = OpenVLAPolicy.from_checkpoint(shell.checkpoint, "libero_object")
    up.require_fits(live.towers["lm"], live.model_hash)


@pytest.mark.parametrize("name", ["out.yaml", "out.safetensors"])
def test_what_is_exported_can_be_imported_again(shell: Shell, name: str) -> None:
    shell.clusters()
    before = shell.store.load("up")
    assert shell("export", "up", "--to", shell.folder / name).exit_code == 0
    for path in (shell.folder / "store").iterdir():
        path.unlink()
    sizes = ("--made-for", "3x64") if name.endswith("yaml") else ()
    result = shell("import", shell.folder / name, *sizes, model=True)
    assert result.exit_code == 0, result.output
    after = shell.store.load("up")
    assert after.tensors().keys() == before.tensors().keys()
    assert all(after.tensors()[k].tolist() == v.tolist() for k, v in before.tensors().items())
    assert (after.hash == before.hash) == name.endswith("safetensors")


def test_a_control_vector_travels_both_ways(shell: Shell) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"layer.1": np.ones(32, np.float32)}, shell.folder / "v.safetensors")
    arguments = ("--name", "lift", "--span", "text", "--alpha", "2")
    assert shell("import", shell.folder / "v.safetensors", *arguments, model=True).exit_code == 0
    lift = shell.store.load("lift")
    assert lift.dense is not None
    assert lift.dense[2].tolist() == [2.0] * 32
    refused = shell("export", "lift", "--to", shell.folder / "v.gguf")
    assert code(refused) == "lossy"
    assert not (shell.folder / "v.gguf").exists()
    told = shell("export", "lift", "--to", shell.folder / "v.gguf", "--lossy")
    assert told.exit_code == 0
    assert "every token" in told.stderr
    assert shell("import", shell.folder / "v.gguf", model=True).exit_code == 0
    assert [entry.id for entry in shell.store.list()] == [lift.id]


def test_export_writes_over_nothing(shell: Shell) -> None:
    shell.clusters()
    for make in (lambda path: path.write_text("mine"), lambda path: path.symlink_to(shell.folder / "elsewhere.yaml")):
        target = shell.folder / f"{len(list(shell.folder.iterdir()))}.yaml"
        make(target)
        assert code(shell("export", "up", "--to", target)) == "exists"
    assert not (shell.folder / "elsewhere.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("x.pt",), "bad_format"),
        (("x.zip",), "bad_format"),
        (("x.tar.gz",), "bad_format"),
        (("x.yaml",), "bad_option"),  # without --made-for
        (("x.yaml", "--made-for", "3 x 64"), "bad_option"),
        (("x.yaml", "--made-for", "32x11008"), "other_model"),
        (("x.yaml", "--made-for", "3x64", "--name", "up"), "bad_option"),
        (("x.gguf", "--made-for", "3x64"), "bad_option"),
        (("x.gguf", "--name", "../up"), "bad_gguf"),
        (("absent.gguf",), "bad_file"),
        (("x.yaml", "--made-for", "3x64", "--tower", "expert"), "unknown_tower"),
        (("x.yaml", "--made-for", "3x64", "--licence", "../x"), "bad_licence"),
        (("x.yaml", "--made-for", "3x64", "--policy", "pocket-untrained"), "bad_option"),
    ],
)
def test_import_refuses_what_it_cannot_mean(shell: Shell, arguments: tuple[str, ...], expected: str) -> None:
    for name in ("x.pt", "x.zip", "x.tar.gz", "x.gguf"):
        (shell.folder / name).write_bytes(b"")
    (shell.folder / "x.yaml").write_text("up: [1]\n")
    assert code(shell("import", shell.folder / arguments[0], *arguments[1:], model=True)) == expected
    assert not (shell.folder / "store").exists()


def test_import_needs_a_model(shell: Shell) -> None:
    (shell.folder / "x.yaml").write_text("up: [1]\n")
    assert code(shell("import", shell.folder / "x.yaml", "--made-for", "3x64")) == "bad_option"


def test_one_bad_cluster_keeps_the_whole_file_out(shell: Shell) -> None:
    assert code(shell.clusters("up: [1]\n../down: [2]\n")) == "bad_name"
    assert not (shell.folder / "store").exists()
    shell.clusters("up: [1]\ndown: [2]\n")
    shell("axis", "height", "--negative", "down", "--positive", "up")
    before = sorted(p.name for p in (shell.folder / "store").iterdir())
    assert code(shell.clusters("left: [1]\nheight: [2]\n")) == "name_taken"
    assert sorted(p.name for p in (shell.folder / "store").iterdir()) == before


def test_verify_is_quiet_about_a_good_store(shell: Shell) -> None:
    shell.clusters()
    shell("axis", "height", "--negative", "down", "--positive", "up")
    result = shell("verify", model=True)
    assert result.exit_code == 0, result.output
    assert "2 directions and 1 axes" in result.stdout


def flip_card(store: Path) -> None:
    card = next(store.glob("up@*.json"))
    card.write_text(card.read_text().replace('"MIT"', '"Zlib"'))


def flip_axis(store: Path) -> None:
    axis = store / "height.axis.json"
    axis.write_text(axis.read_text().replace('"up"', '"down"'))


def lose_an_end(store: Path) -> None:
    for path in store.glob("up@*"):
        path.unlink()


def leave_a_pickle(store: Path) -> None:
    (store / "up.pkl").write_bytes(pickle.dumps({}))


def leave_an_archive(store: Path) -> None:
    with zipfile.ZipFile(store / f"up@{'0' * 12}.zip", "w") as archive:
        archive.writestr("../../escape", b"x")


def leave_a_half_written_file(store: Path) -> None:
    (store / ".x.part").write_bytes(b"")


def link_out(store: Path) -> None:
    card = next(store.glob("up@*.json"))
    card.rename(store.parent / "card.json")
    card.symlink_to(store.parent / "card.json")


@pytest.mark.parametrize(
    "spoil", [flip_card, flip_axis, lose_an_end, leave_a_pickle, leave_an_archive, leave_a_half_written_file, link_out]
)
def test_verify_names_each_problem_and_fails(shell: Shell, spoil: Callable[[Path], None]) -> None:
    shell.clusters()
    shell("axis", "height", "--negative", "down", "--positive", "up")
    spoil(shell.folder / "store")
    result = shell("verify")
    assert code(result) == "bad_store"
    assert len(result.stderr.strip().splitlines()) >= 1
    assert not (shell.folder.parent / "escape").exists()


def test_verify_of_a_folder_that_is_not_there_fails(shell: Shell) -> None:
    assert code(shell("verify")) == "bad_store"


def test_verify_refuses_directions_of_another_model(shell: Shell, tmp_path: Path) -> None:
    shell.clusters()
    assert shell("verify").exit_code == 0
    other = save_sparse(tmp_path / "other", fabricate.tiny_config())
    result = shell("verify", "--checkpoint", other)
    assert code(result) == "bad_store"
    assert result.stderr.count("belongs to model") == 2


def test_a_card_learns_what_was_shown_and_the_axis_follows(shell: Shell) -> None:
    shell.clusters()
    shell("axis", "height", "--negative", "down", "--positive", "up")
    before = shell.store.load("up")
    shown = ("--calibrated", "0.25,0.8", "--max-strength", "0.8", "--proven", "--evidence", "report.html")
    result = shell("annotate", "up", *shown)
    assert result.exit_code == 0, result.output
    after = shell.store.load("up")
    assert (after.calibrated, after.max_strength, after.proven) == ((0.25, 0.8), 0.8, True)
    assert (after.provenance["evidence"], after.licence) == ("report.html", before.licence)
    assert [d.id for d in shell.store.load_all() if d.name == "up"] == [after.id]
    assert shell.store.load_axis("height").positive == "up"
    assert shell("verify").exit_code == 0
    again = shell("annotate", "up", *shown)
    assert "already" in again.output
    assert shell.store.load("up").hash == after.hash


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--calibrated", "0.2,0.8"), "bad_option"),  # without evidence
        (("--proven",), "bad_option"),
        (("--calibrated", "high", "--evidence", "x"), "bad_option"),
        (("--calibrated", "0.8,0.2", "--evidence", "x"), "bad_calibrated"),
        (("--max-strength", "2"), "bad_max_strength"),
        (("--licence", "a/b"), "bad_licence"),
    ],
)
def test_a_card_takes_no_claim_that_means_nothing(shell: Shell, arguments: tuple[str, ...], expected: str) -> None:
    shell.clusters()
    before = shell.store.load("up").id
    assert code(shell("annotate", "up", *arguments)) == expected
    assert shell.store.load("up").id == before


def test_an_axis_that_names_a_hash_keeps_its_end(shell: Shell) -> None:
    shell.clusters()
    up = shell.store.load("up")
    shell.store.save_axis(Axis("height", "down", f"up@{up.hash[:6]}"))
    assert code(shell("annotate", "up", "--licence", "Zlib")) == "bad_axis"
    assert shell("verify").exit_code == 0


def test_exit_code_is_two_and_nothing_like_a_traceback(shell: Shell) -> None:
    (shell.folder / "store").mkdir()
    leave_a_pickle(shell.folder / "store")
    script = "from steer_runtime.cli.main import main; main()"
    command = [sys.executable, "-c", script, "directions", "verify", "--store", str(shell.folder / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "up.pkl" in done.stderr
    assert "Traceback" not in done.stderr


def test_list_shows_good_axes_beside_bad_files(shell: Shell) -> None:
    shell.clusters()
    shell.store.save_axis(Axis("height", "down", "up"))
    shell.store.save_axis(Axis("depth", "up", "down"))
    flip_axis(shell.folder / "store")
    result = shell("list")
    assert code(result) == "bad_store"
    assert "axis depth: up - down" in result.stdout
    assert "height" in result.stderr
    assert "MIT" in result.stdout


def test_the_published_clusters_belong_to_a_checkpoint_of_7b_shape(shell: Shell, tmp_path: Path) -> None:
    """Layers and neurons as in the 7B, but narrow, so that its zeros are hashed in a second."""
    thin = fabricate.tiny_config(
        lm=LMConfig(vocab_rows=384, d_model=8, d_ff=11008, layers=32, heads=4, kv_heads=4),
        dino=ViTConfig(hidden=16, depth=2, heads=2, mlp=32, registers=4, class_token=True),
    )
    folder = save_sparse(tmp_path / "thin", thin)
    result = shell("import", PUBLISHED, "--made-for", "openvla", "--checkpoint", folder)
    assert result.exit_code == 0, result.output
    assert {d.name for d in shell.store.load_all()} == {"up_10", "up_20", "careful_10_full"}
    assert shell("verify", "--checkpoint", folder).exit_code == 0


def test_the_pi0_fast_clusters_belong_to_a_prefix_of_its_shape(shell: Shell, tmp_path: Path) -> None:
    root = "model.paligemma_with_expert.paligemma.model.language_model"
    shapes = {f"{root}.layers.{i}.mlp.down_proj.weight": [8, 16384] for i in range(18)}
    shapes |= {f"{root}.embed_tokens.weight": [32, 8], f"{root}.norm.weight": [8]}
    sizes = {"num_hidden_layers": 18, "hidden_size": 8, "intermediate_size": 16384, "vocab_size": 32}
    folder = tmp_path / "pi0"
    folder.mkdir()
    write_sparse(folder / "model.safetensors", shapes)
    (folder / "config.json").write_text(json.dumps({"type": "pi0", "vlm_config": {"text_config": sizes}}))
    arguments = ("--made-for", "pi0fast", "--alpha", "10", "--checkpoint", folder)
    assert code(shell("import", PI0_FAST, *arguments, "--tower", "expert")) == "unknown_tower"
    result = shell("import", PI0_FAST, *arguments, "--tower", "prefix")
    assert result.exit_code == 0, result.output
    high = shell.store.load("high_cluster")
    assert high.neurons is not None
    assert (high.tower, high.neurons.layer.tolist(), set(high.neurons.alpha.tolist())) == (
        "prefix",
        [15, 15, 2],
        {10.0},
    )
    verified = shell("verify", "--checkpoint", folder)
    assert verified.exit_code == 0, verified.output


@pytest.mark.heavy
def test_the_published_clusters_belong_to_a_checkpoint_of_openvla_7b(shell: Shell, tmp_path: Path) -> None:
    folder = save_sparse(tmp_path / "7b", OPENVLA_7B)
    result = shell("import", PUBLISHED, "--made-for", "openvla", "--checkpoint", folder)
    assert result.exit_code == 0, result.output
    up = shell.store.load("up_10")
    assert (up.layers, up.d_model, up.d_ff) == (32, 4096, 11008)
    assert shell("verify", "--checkpoint", folder).exit_code == 0


def test_show_as_json_carries_licence_and_range(shell: Shell) -> None:
    shell.clusters()
    shown = json.loads(shell("show", "up", "--json").output)
    assert (shown["licence"], shown["calibrated"]) == ("MIT", None)


def code(result: Result) -> str:
    assert isinstance(result.exception, SteerError), result.output
    return result.exception.code
