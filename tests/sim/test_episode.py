"""Records of episodes on disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from records import command, small_record

from sim import episode
from steer_runtime.errors import SteerError


def test_record_survives_the_disk(tmp_path: Path) -> None:
    record = small_record()
    again = episode.load(episode.save(record, tmp_path / "episode"))
    assert again.facts == record.facts
    for name in episode._ARRAYS:
        assert np.array_equal(getattr(again, name), getattr(record, name))


def test_pickled_array_is_refused_and_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    folder = episode.save(small_record(), tmp_path / "episode")
    arrays = dict(np.load(folder / "arrays.npz"))
    arrays["state"] = np.array([Trap()], dtype=object)
    np.savez(folder / "arrays.npz", **arrays)
    with pytest.raises(SteerError, match="not an archive of plain arrays"):
        episode.load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04torn", b"\x80\x04K\x01."])
def test_torn_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = episode.save(small_record(), tmp_path / "episode")
    (folder / "arrays.npz").write_bytes(content)
    with pytest.raises(SteerError, match="not an archive of plain arrays"):
        episode.load(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "steer-episode/9"}, "has format"),
        ({"trained": "perhaps"}, "trained"),
        ({"surprise": 1}, "surprise"),
        ({"commands": [{"label": "x"}]}, "commands"),
    ],
)
def test_facts_of_another_form_are_refused(tmp_path: Path, change: dict, said: str) -> None:
    folder = episode.save(small_record(), tmp_path / "episode")
    facts = json.loads((folder / "episode.json").read_text())
    (folder / "episode.json").write_text(json.dumps({**facts, **change}))
    with pytest.raises(SteerError, match=said):
        episode.load(folder)


def test_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="expected the folder of a recorded episode"):
        episode.load(tmp_path / "nowhere")


def test_arrays_that_disagree_in_length_are_refused() -> None:
    record = small_record()
    with pytest.raises(SteerError, match="array 'state'"):
        dataclasses.replace(record, state=record.state[:-1])


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        (command("fast", 1), None),
        (command("fast", 1, first_inference=None), "no action carries its sequence"),
        (command("fast", 1, writes=0), "no write"),
        (command("fast", 1, accepted=False, code="stale"), "was refused"),
        (command("clear", 1, op="clear", writes=0), None),
        (command("clear", 1, op="clear", writes_after=3), "3 values were still written"),
        (command("warp", 1, expected="refused", accepted=False), None),
        (command("warp", 1, expected="refused"), "had to be refused"),
    ],
)
def test_command_counts_as_applied_only_with_action_and_writes(
    outcome: episode.CommandOutcome, fault: str | None
) -> None:
    assert (outcome.fault is None) if fault is None else (fault in (outcome.fault or ""))


def test_strengths_follow_the_engines_trace() -> None:
    assert small_record().strengths["fast"].tolist() == [0, 0, 0.8, 0.8, 0.8, 0.8]
