"""`steer ur` against a controller's protocols in a process of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arm_fakes import Fake, free_address
from typer.testing import CliRunner

from arm.cli import app
from arm.kinematics import Kinematics
from arm.settings import load_settings

CONFIG = Path(__file__).parents[2] / "configs" / "robots" / "ur5e.yaml"
HOME = np.array([0.0, -1.57, 1.57, -1.57, -1.57, 0.0])


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    """A controller whose tool is where the model has it."""
    controller = Fake(free_address(), tmp_path / "told.json")
    x, y, z = Kinematics(load_settings()).pose(HOME).position
    controller.order(f"tcp={-x},{-y},{z},0,3.14159,0")
    yield controller
    controller.end()


def steer(*words: str) -> tuple[int, Any]:
    """Exit code, and what was printed as JSON."""
    result = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    return result.exit_code, json.loads(lines[-1])


def patient(tmp_path: Path) -> list[str]:
    """Options for a machine that is busy with other things."""
    text = CONFIG.read_text().replace("state_timeout_s: 0.25", "state_timeout_s: 1.0")
    (tmp_path / "patient.yaml").write_text(text)
    return ["--settings", str(tmp_path / "patient.yaml"), "--watchdog", "5"]


def rows(tmp_path: Path, steps: int = 20) -> Path:
    """Up by up to 1 cm a row at 0.2 of the motion."""
    actions = np.zeros((steps, 7), np.float32)
    actions[:, 2] = 1.0
    actions[:, 6] = -1.0
    path = tmp_path / "rows.npy"
    np.save(path, actions)
    return path


def test_the_state_is_told_and_the_model_compared(fake: Fake) -> None:
    code, told = steer("state", fake.address)
    assert code == 0
    assert told["positions_rad"] == pytest.approx(HOME)
    assert told["model_agrees"]
    assert (told["robot_mode"], told["safety_status"], told["program"]) == ("RUNNING", "NORMAL", "STOPPED")
    assert told["remote_control"]
    fake.order("tcp=0.1,0.1,0.1,0,0,0")
    assert not steer("state", fake.address)[1]["model_agrees"]
    assert fake.told()["scripts"] == 0


def test_a_protective_stop_is_released_once_its_cause_is_gone(fake: Fake) -> None:
    fake.order("protective_stop")
    fake.order("cause")
    assert steer("state", fake.address)[1]["safety_status"] == "PROTECTIVE_STOP"
    result = CliRunner().invoke(app, ["unlock", fake.address])
    assert "does not release its stop" in str(result.exception)
    fake.order("no_cause")
    code, told = steer("unlock", fake.address)
    assert (code, told["safety_status"], told["program"]) == (0, "NORMAL", "STOPPED")
    assert fake.told()["scripts"] == 0


def test_rows_run_dry_unless_armed(fake: Fake, tmp_path: Path) -> None:
    code, told = steer("run", fake.address, str(rows(tmp_path)))
    assert (code, told["rows"], told["armed"]) == (0, 20, False)
    assert np.abs(told["would_move_rad"]).max() > 1e-3
    assert not np.any(told["moved_rad"])
    heard = fake.told()
    assert (heard["scripts"], heard["targets"]) == (0, [])


def test_armed_rows_move_the_arm_slowly_and_leave_it_at_rest(fake: Fake, tmp_path: Path) -> None:
    code, told = steer("run", fake.address, str(rows(tmp_path)), "--arm", *patient(tmp_path))
    assert (code, told["rows"], told["stopped"]) == (0, 20, "")
    heard = fake.told()
    targets = np.array(heard["targets"])[:, 1:]
    kinematics = Kinematics(load_settings())
    height = kinematics.pose(targets[-1]).position[2] - kinematics.pose(HOME).position[2]
    assert 0.02 < height < 0.21
    motion = np.array(heard["motion"])
    assert np.abs(motion[-1, 1:] - motion[-20, 1:]).max() < 1e-4
    assert not heard["program"]


def test_an_arm_that_is_not_where_the_model_has_it_is_not_armed(fake: Fake, tmp_path: Path) -> None:
    fake.order("tcp=0.1,0.1,0.1,0,0,0")
    result = CliRunner().invoke(app, ["run", fake.address, str(rows(tmp_path)), "--arm"])
    assert result.exit_code != 0
    assert "set the same TCP" in str(result.exception)
    assert fake.told()["targets"] == []


def test_a_file_without_rows_is_one_sentence(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "rows.npy").write_text("no array")
    result = CliRunner().invoke(app, ["run", fake.address, str(tmp_path / "rows.npy")])
    assert "holds no array" in str(result.exception)
