"""The verbs of `steer directions`, run as an operator runs them, on a real checkpoint of a few kilobytes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import fabricate
import pytest
from typer.testing import CliRunner, Result

from steer_runtime.cli.directions import app
from steer_runtime.cli.directions.common import parse_neurons, parse_numbers, show_label
from steer_runtime.directions.store import DirectionStore
from steer_runtime.errors import SteerError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policy configuration over a checkpoint in the published layout."""
    folder = tmp_path_factory.mktemp("policy")
    fabricate.save_tiny(folder / "checkpoint")
    path = folder / "tiny.yaml"
    path.write_text("kind: openvla\nname: tiny\ncheckpoint: checkpoint\nsuite: libero_object\n")
    return path


class Shell:
    """Runs verbs in a folder, with the tiny policy where a verb takes one."""

    def __init__(self, config: Path, folder: Path) -> None:
        self.config, self.folder = config, folder

    def __call__(self, verb: str, *arguments: str, policy: bool = True) -> Result:
        given = [verb, *arguments]
        if policy:
            given += ["--policy", str(self.config)]
        if policy and verb != "import":
            given += ["--cache", str(self.folder / "labels")]
        if verb not in ("labels", "search"):
            given += ["--store", str(self.folder / "store")]
        return CliRunner().invoke(app, given)

    @property
    def store(self) -> DirectionStore:
        return DirectionStore(self.folder / "store")


@pytest.fixture
def shell(config: Path, tmp_path: Path) -> Shell:
    return Shell(config, tmp_path)


@pytest.mark.parametrize(
    "verb", ["", "labels", "search", "make token", "make probe", "build", "axis", "import", "show", "list"]
)
def test_help_of_every_verb_has_an_example_and_loads_no_policy(verb: str) -> None:
    script = (
        "import sys\nfrom steer_runtime.cli.directions import app\n"
        f"try: app([*{verb.split()!r}, '--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Example" in done.stdout or not verb


def test_search_shows_the_flat_index_of_each_match(shell: Shell) -> None:
    result = shell("search", "up", "--top", "3")
    assert result.exit_code == 0, result.output
    rows = [line.split("│")[1:4] for line in result.output.splitlines() if line.startswith("│")]
    numbers = [[int(cell) for cell in row] for row in rows if row[0].strip()]  # a folded label goes on in a blank row
    assert len(numbers) == 6  # three whose label says it, three that say it at the low end
    assert all(flat == layer * 64 + neuron for layer, neuron, flat in numbers)


def test_make_saves_the_direction_it_shows(shell: Shell) -> None:
    result = shell(
        "make", "token", "up", "--words", "up,above", "--against", "down,low", "--count", "3", "--alpha", "2.5"
    )
    assert result.exit_code != 0  # 'down' is no word of this vocabulary
    result = shell("make", "token", "up", "--words", "up,above", "--against", "low", "--count", "3", "--alpha", "2.5")
    assert result.exit_code == 0, result.output
    direction = shell.store.load("up")
    assert direction.id in result.output
    assert direction.neurons is not None
    assert direction.neurons.alpha.tolist() == [2.5] * 3


def test_make_takes_neurons_span_operation_and_limit(shell: Shell) -> None:
    arguments = ("lift", "--neurons", "0:17,2:20", "--op", "add", "--span", "text,image", "--max-strength", "0.5")
    assert shell("make", "neurons", *arguments).exit_code == 0
    direction = shell.store.load("lift")
    assert direction.neurons is not None
    assert (direction.neurons.layer.tolist(), direction.neurons.neuron.tolist()) == ([0, 2], [17, 20])
    assert (direction.op, direction.span, direction.max_strength) == ("add", {"text", "image"}, 0.5)


def test_make_takes_dense_words_and_an_axis_joins_the_two(shell: Shell) -> None:
    assert shell("make", "word", "fast", "--words", "fast,quick", "--against", "slow").exit_code == 0
    assert shell("make", "word", "slow", "--words", "slow", "--against", "fast,quick").exit_code == 0
    assert shell("axis", "speed", "--negative", "slow", "--positive", "fast", policy=False).exit_code == 0
    assert [axis.name for axis in shell.store.load_axes()] == ["speed"]
    shown = shell("show", "speed", "--json", policy=False)
    assert json.loads(shown.output)["positive"] == shell.store.load("fast").id


def test_make_axis_saves_both_ends_and_what_joins_them(shell: Shell) -> None:
    result = shell("make", "token", "speed", "--words", "fast,quick", "--against", "slow", "--axis")
    assert result.exit_code == 0, result.output
    (axis,) = shell.store.load_axes()
    assert (axis.name, axis.negative, axis.positive) == ("speed", "speed-negative", "speed-positive")
    ends = [shell.store.load(end) for end in (axis.negative, axis.positive)]
    assert [list(end.provenance["words"]) for end in ends] == [["slow"], ["fast", "quick"]]


def test_every_output_about_an_untrained_policy_says_so(shell: Shell) -> None:
    outputs = {
        "labels": shell("labels", "--neurons", "0-1"),
        "search": shell("search", "up"),
        "make": shell("make", "neurons", "lift", "--neurons", "0:17"),
        "make2": shell("make", "neurons", "drop", "--neurons", "0:18"),
        "axis": shell("axis", "height", "--negative", "drop", "--positive", "lift", policy=False),
        "show": shell("show", "lift", policy=False),
        "show axis": shell("show", "height", policy=False),
        "list": shell("list", policy=False),
    }
    assert {name: result.exit_code for name, result in outputs.items()} == dict.fromkeys(outputs, 0)
    silent = [name for name, result in outputs.items() if "untrained policy" not in " ".join(result.stdout.split())]
    assert silent == []


def test_labels_are_written_as_csv(shell: Shell, tmp_path: Path) -> None:
    assert shell("labels", "--csv", str(tmp_path / "a.csv"), "--layers", "1-2").exit_code == 0
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 64
    assert rows[0]["flat"] == "64"
    assert len(json.loads(rows[0]["label"])) == 10
    assert "untrained policy" in rows[0]["policy"]


def test_show_as_json_carries_the_verified_hash(shell: Shell) -> None:
    shell("make", "neurons", "lift", "--neurons", "0:17")
    shown = json.loads(shell("show", "lift", "--json", policy=False).output)
    assert shown["hash"] == shell.store.load("lift").hash


def test_a_listing_with_a_damaged_file_shows_the_rest_and_fails(shell: Shell) -> None:
    shell("make", "neurons", "lift", "--neurons", "0:17")
    shell("make", "neurons", "drop", "--neurons", "0:18")
    card = next((shell.folder / "store").glob("drop@*.json"))
    card.write_text(card.read_text().replace('"alpha": 4.0', '"alpha": 5.0'))
    result = shell("list", policy=False)
    assert isinstance(result.exception, SteerError)
    assert shell.store.load("lift").id in result.stdout
    assert "drop@" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("neurons", "--neurons", "0-1"), "bad_option"),
        (("neurons", "--neurons", "9:0"), "layer_out_of_range"),
        (("token", "--words", "skyward"), "unknown_word"),
        (("token", "--words", "up", "--layers", "x"), "bad_option"),
        (("token", "--words", "up", "--tower", "expert"), "unknown_tower"),
        (("neurons", "--neurons", "0:1", "--span", "everything"), "bad_span"),
        (("neurons", "--neurons", "0:1", "--op", "explode"), "bad_operation"),
        (("neurons", "--neurons", "0:1", "--alpha", "nan"), "not_finite"),
        (("neurons", "--neurons", "0:1", "--max-strength", "0"), "bad_max_strength"),
        (("word", "--words", "up", "--against", "low", "--count", "3"), "bad_option"),
        (("word", "--words", "up", "--against", "low", "--op", "override"), "bad_operation"),
        (("token", "--words", "up", "--axis"), "no_opposite"),
        (("probe", "--moments", "nowhere.safetensors", "--quantity", "speed"), "no_moments"),
        (("snmf", "--moments", "nowhere.safetensors", "--layer", "1"), "bad_option"),
        (("random", "--like", "nobody"), "unknown_direction"),
    ],
)
def test_make_refuses_what_makes_no_direction(shell: Shell, arguments: tuple[str, ...], code: str) -> None:
    finder, *options = arguments
    result = shell("make", finder, "x", *options)
    assert isinstance(result.exception, SteerError), result.output
    assert result.exception.code == code
    assert shell.store.list() == ()


def test_clusters_of_a_larger_model_are_refused(shell: Shell) -> None:
    published = Path(__file__).parents[2] / "configs" / "clusters" / "corl2025_openvla_clusters.yaml"
    result = shell("import", str(published), "--made-for", "openvla")
    assert isinstance(result.exception, SteerError)
    assert result.exception.code == "other_model"


def test_numbers_are_read_as_lists_and_ranges() -> None:
    assert parse_numbers("3, 26-29", "layers") == [3, 26, 27, 28, 29]
    assert parse_numbers("", "layers") is None
    assert parse_neurons("3:17,4:20") == [(3, 17), (4, 20)]


@pytest.mark.parametrize("text", ["a", "3-", "9-3", "-1", "1:2", "1" * 30])
def test_numbers_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(SteerError):
        parse_numbers(text, "layers")


def test_a_label_cannot_move_the_cursor_or_style_the_table() -> None:
    shown = show_label(["\x1b[2J", " up", "[bold]", "[action: 0.824]"])
    assert shown.plain == "\\x1b[2J, \u2581up, [bold], [action: 0.824]"
    assert shown.spans == []
