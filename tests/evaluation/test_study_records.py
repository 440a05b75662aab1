"""The tables of a study: what they hold, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sim.evaluation.study import records
from steer_runtime.errors import SteerError


def columns(n: int = 3, **changes: Any) -> dict[str, Any]:
    return {
        "step": np.arange(n), "eef_pos": np.arange(3 * n, dtype=float).reshape(n, 3), "eef_quat": np.ones((n, 4)),
        "gripper_qpos": np.zeros((n, 2)), "action": np.full((n, 7), np.nan), "executed": np.zeros((n, 7)),
        "target_pos": np.full((n, 3), np.nan), "held": [None, True, False][:n], "success": [False] * n,
        "strength": np.zeros(n), "dose": np.full(n, np.nan), "entropy": np.zeros(n), "inference": np.arange(n),
        "row": np.zeros(n, int), "said": [None, "fast", "slow"][:n], **changes,
    }  # fmt: skip


def test_steps_are_read_as_they_were_written(tmp_path: Path) -> None:
    pq.write_table(records.steps_table("a", columns()), tmp_path / records.STEPS_FILE)
    found = records.columns_of(records.read_steps(tmp_path))
    assert found["key"].tolist() == ["a"] * 3
    np.testing.assert_array_equal(found["eef_pos"], np.arange(9.0).reshape(3, 3))
    assert np.isnan(found["target_pos"]).all()
    assert found["held"].tolist() == [None, True, False]
    assert found["said"].tolist() == [None, "fast", "slow"]


def test_steps_of_some_episodes_and_columns_are_read_alone(tmp_path: Path) -> None:
    with pq.ParquetWriter(tmp_path / records.STEPS_FILE, records.STEPS) as writer:
        for key in ("a", "b"):
            writer.write_table(records.steps_table(key, columns()))
    found = records.read_steps(tmp_path, ["b"], ["key", "step"])
    assert found.column_names == ["key", "step"]
    assert found.column("key").to_pylist() == ["b"] * 3


def test_numbers_that_do_not_exist_are_nan_and_not_zero() -> None:
    required = {f.name: "" if str(f.type) == "string" else 0 for f in records.EPISODES if not f.nullable}
    found = records.columns_of(records.episodes_table([required, {**required, "first_action": [1.0] * 7, "draw": 2}]))
    assert np.isnan(found["first_action"][0]).all()
    assert found["first_action"][1].tolist() == [1.0] * 7
    assert np.isnan(found["draw"][0])
    assert found["success"].tolist() == [None, None]


@pytest.mark.parametrize("changes", [{"eef_pos": np.zeros((3, 4))}, {"height": np.zeros(3)}])
def test_other_shapes_and_columns_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SteerError) as refused:
        records.steps_table("a", columns(**changes))
    assert refused.value.code == "bad_record"


def test_missing_torn_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="give the --out folder of a study") as refused:
        records.read_episodes(tmp_path)
    assert refused.value.code == "no_study"
    (tmp_path / "journal.jsonl").touch()
    with pytest.raises(SteerError, match=r"has a journal and no episodes.parquet yet: .* --tables"):
        records.read_episodes(tmp_path)
    (tmp_path / records.EPISODES_FILE).write_bytes(b"PAR1 but torn")
    with pytest.raises(SteerError, match="no Parquet file"):
        records.read_episodes(tmp_path)
    pq.write_table(records.steps_table("a", columns()), tmp_path / records.EPISODES_FILE)
    with pytest.raises(SteerError, match="expected those of schema"):
        records.read_episodes(tmp_path)
    pq.write_table(records.steps_table("a", columns()), tmp_path / records.STEPS_FILE)
    whole = bytearray((tmp_path / records.STEPS_FILE).read_bytes())
    whole[8:200] = b"x" * 192
    (tmp_path / records.STEPS_FILE).write_bytes(whole)
    with pytest.raises(SteerError, match="is no Parquet file or is torn") as damaged:
        records.read_steps(tmp_path)
    assert "\n" not in damaged.value.sentence
    (tmp_path / records.SIDECAR_FILE).write_text("{}")
    with pytest.raises(SteerError, match="is not of schema"):
        records.read_sidecar(tmp_path)
