"""Results files: one configuration, one line an episode, nothing finished is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from steer_runtime.errors import SteerError
from steer_runtime.results import results

CONFIGURATION = {"command": "success", "policy": {"name": "pocket", "sha256": "ab"}, "tasks": (0, 1), "seed": 3}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    where = tmp_path / "eval" / "pocket-success.jsonl"
    with results(where, CONFIGURATION) as file:
        file.add("task0-state0", {"done": True})
        file.add("task1-state0", {"done": False})
    return where


def test_second_run_goes_on(path: Path) -> None:
    with results(path, CONFIGURATION) as file:
        assert [row["done"] for row in file.rows.values()] == [True, False]
        file.add("task0-state1", {"done": True})
    with results(path, CONFIGURATION) as file:
        assert list(file.rows) == ["task0-state0", "task1-state0", "task0-state1"]


def test_line_that_broke_off_is_cut_and_what_was_finished_stays(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"key": "task0-state1", "do')
    with results(path, CONFIGURATION) as opened:
        assert list(opened.rows) == ["task0-state0", "task1-state0"]
        opened.add("task0-state1", {"done": True})
    with results(path, CONFIGURATION) as opened:
        assert opened.rows["task0-state1"]["done"]


def test_other_configuration_is_refused_and_named(path: Path) -> None:
    other = {**CONFIGURATION, "policy": {"name": "pocket", "sha256": "cd"}}
    with pytest.raises(SteerError, match=r"policy\.sha256 'ab' \(now 'cd'\)") as caught, results(path, other):
        pass
    assert caught.value.code == "other_configuration"


def test_damaged_line_is_named(path: Path) -> None:
    path.write_text(path.read_text().replace('{"key": "task0-state0"', "x"))
    with pytest.raises(SteerError, match="line 2") as caught, results(path, CONFIGURATION):
        pass
    assert caught.value.code == "torn_file"


def test_file_of_another_kind_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(SteerError, match="not one of a results file"), results(path, CONFIGURATION):
        pass
    assert path.read_text() == '{"step": 1}\n'


def test_second_writer_is_refused(path: Path) -> None:
    with results(path, CONFIGURATION), pytest.raises(SteerError) as caught, results(path, CONFIGURATION):
        pass
    assert caught.value.code == "in_use"
