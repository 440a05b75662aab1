"""`steer directions search | cluster | layers | compare`, run as an operator runs them, on a checkpoint of a few kilobytes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import fabricate
import pytest
import torch
from typer.testing import CliRunner, Result

from steer_runtime.cli.directions import app
from steer_runtime.directions import share_page
from steer_runtime.errors import SteerError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies, tiny.yaml and other.yaml, of the same shapes and other weights; value vectors 3 and 4 of every layer
    of tiny say `word44` to `word55`, which are alike."""
    folder = tmp_path_factory.mktemp("policy")
    for name, seed in (("tiny", 0), ("other", 1)):
        model = fabricate.tiny_model(seed=seed)
        if name == "tiny":
            generator = torch.Generator().manual_seed(5)
            topic = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
            shared = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
            model.language_model.lm_head.weight[44:56] += 2.5 * topic
            # The common direction that comparisons take out; without it they would take out the topic.
            model.language_model.lm_head.weight[:64] += 3 * torch.randn(64, 1, generator=generator) * shared
            for layer in model.language_model.model.layers:
                layer.mlp.down_proj.weight[:, 3:5] = topic[:, None]
        fabricate.save_tiny(folder / name, model=model)
        text = f"kind: openvla\nname: {name}\ncheckpoint: {name}\nsuite: libero_object\n"
        (folder / f"{name}.yaml").write_text(text)
    return folder


def run(folder: Path, verb: str, *arguments: str, policy: bool = True) -> Result:
    given = [verb, *arguments, "--cache", str(folder / "labels")]
    return CliRunner().invoke(app, [*given, "--policy", str(folder / "tiny.yaml")] if policy else given)


def rows(result: Result) -> list[list[str]]:
    """Cells of every first line of a row; a folded cell goes on in a line with a blank first cell."""
    lines = [line.split("│")[1:-1] for line in result.output.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line] for line in lines if line[0].strip()]


def test_help_of_every_verb_has_an_example_and_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom steer_runtime.cli.directions import app\n"
        "for verb in ('search', 'cluster', 'layers', 'compare'):\n"
        "    try: app([verb, '--help'])\n    except SystemExit: pass\n"
        "assert not {'torch', 'sklearn', 'scipy', 'plotly'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Example") == 4


def test_near_takes_every_word_up_to_the_next_option(folder: Path) -> None:
    spread = run(folder, "search", "up", "--near", "slow", "slower", "--layers", "1-2", "--top", "6")
    commas = run(folder, "search", "up", "--near", "slow,slower", "--layers", "1-2", "--top", "6")
    assert spread.exit_code == 0, spread.output
    assert rows(spread) == rows(commas)
    assert len(rows(spread)) == 6
    assert {row[0] for row in rows(spread)} <= {"1", "2"}
    assert "near slow, slower" in " ".join(spread.output.split())


def test_words_may_stand_last_behind_two_dashes(folder: Path) -> None:
    tail = ["--policy", str(folder / "tiny.yaml"), "--cache", str(folder / "labels"), "--top", "4"]
    last = CliRunner().invoke(app, ["search", "--near", "slow", "slower", *tail, "--", "up"])
    assert last.exit_code == 0, last.output
    assert rows(last) == rows(run(folder, "search", "up", "--near", "slow", "slower", "--top", "4"))


def test_a_contrast_shows_both_ends(folder: Path) -> None:
    result = run(folder, "search", "--contrast", "fast", "quick", "--minus", "slow", "--top", "3")
    assert result.exit_code == 0, result.output
    projections = [float(row[3]) for row in rows(result)]
    assert projections[:3] == sorted(projections[:3], reverse=True)
    assert projections[3:] == sorted(projections[3:])
    assert min(projections[:3]) > 0 > max(projections[3:])
    assert all(int(row[2]) == 64 * int(row[0]) + int(row[1]) for row in rows(result))


@pytest.mark.parametrize(
    "arguments",
    [
        ("search", "up", "--near", "slow", "--top", "5"),
        ("search", "--contrast", "fast", "--minus", "slow", "--top", "5"),
        ("cluster", "--words", "word50"),
        ("layers",),
    ],
)
def test_a_checkpoint_answers_what_its_loaded_policy_answers(folder: Path, arguments: tuple[str, ...]) -> None:
    files = run(folder, *arguments, "--checkpoint", str(folder / "tiny"), policy=False)
    assert files.exit_code == 0, files.output
    assert rows(files) == rows(run(folder, *arguments))


def test_two_sources_at_once_are_refused(folder: Path) -> None:
    result = run(folder, "search", "up", "--checkpoint", str(folder / "tiny"))
    assert isinstance(result.exception, SteerError)
    assert result.exception.code == "bad_option"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((), "bad_option"),
        (("--against", "slow"), "bad_option"),
        (("--contrast", "fast"), "bad_option"),
        (("--minus", "slow"), "bad_option"),
        (("--near", "up", "--contrast", "fast", "--minus", "slow"), "bad_option"),
        (("--near", "skyward"), "unknown_word"),
        (("--near", "up", "--against", "skyward"), "unknown_word"),
        (("up", "--near", "slow", "--layers", "9"), "layer_out_of_range"),
    ],
)
def test_search_refuses_what_asks_for_nothing(folder: Path, arguments: tuple[str, ...], code: str) -> None:
    result = run(folder, "search", *arguments)
    assert isinstance(result.exception, SteerError), result.output
    assert result.exception.code == code


def test_clusters_are_listed_with_their_name_and_members(folder: Path) -> None:
    result = run(folder, "cluster", "--words", "word50", "word51")
    assert result.exit_code == 0, result.output
    ((name, size, _, layers, members),) = rows(result)
    assert {f"word{i}" for i in range(44, 56)} & set(name.split(", "))
    shown = re.findall(r"\d+:\d+", members)
    assert (int(size), layers) == (len(shown), "0, 1, 2")
    assert set(shown) >= {f"{layer}:{neuron}" for layer in range(3) for neuron in (3, 4)}
    assert "untrained policy" in " ".join(result.output.split())


def test_layers_are_drawn_on_a_page_of_its_own(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "layers.html"
    result = run(folder, "layers", "--out", str(page))
    assert result.exit_code == 0, result.output
    assert [row[:2] for row in rows(result)] == [["0", "64"], ["1", "64"], ["2", "64"]]
    text = page.read_text()
    assert "Plotly.newPlot" in text
    assert not re.search(r"<(script|link)[^>]+(src|href)=", text)  # nothing is fetched
    assert "tiny (untrained policy)" in text


def test_a_drawing_that_cannot_be_made_is_refused_before_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(folder, "layers", "--out", str(tmp_path / "layers.png"))
    assert isinstance(result.exception, SteerError)
    assert result.exception.code == "bad_option"
    monkeypatch.setattr(share_page, "find_spec", lambda name: None)
    result = run(folder, "layers", "--out", str(tmp_path / "layers.html"))
    assert isinstance(result.exception, SteerError)
    assert result.exception.code == "missing_extra"
    assert list(tmp_path.iterdir()) == []


def test_two_checkpoints_are_compared_layer_by_layer(folder: Path) -> None:
    tiny, other = str(folder / "tiny.yaml"), str(folder / "other.yaml")
    same = run(folder, "compare", tiny, str(folder / "tiny"), policy=False)
    assert [row[3:5] for row in rows(same)] == [["64 (100.0%)", "64 (100.0%)"]] * 3
    result = run(
        folder, "compare", tiny, other, "--layers-before", "0-1", "--layers-after", "1-2", "--top", "2", policy=False
    )
    assert result.exit_code == 0, result.output
    assert [row[:3] for row in rows(result)[:2]] == [["0", "1", "64"], ["1", "2", "64"]]
    assert len(rows(result)) == 4
    uneven = run(folder, "compare", tiny, other, "--layers-before", "0-1", policy=False)
    assert isinstance(uneven.exception, SteerError)
    assert uneven.exception.code == "other_model"
