"""Studies of a tiny random policy by real worker processes: what they find, kills, Ctrl-C, Ray."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import study_world
import yaml

from sim.evaluation.study import crew, records
from sim.evaluation.study.episode import Work
from sim.evaluation.study.journal import JOURNAL_FILE
from steer_runtime.policies import load_policy
from steer_runtime.policies.openvla.policy import OpenVLAPolicy

TWO_TASKS = [{"suite": "libero_object", "tasks": [3, 6], "starts": 2, "limit": study_world.LIMIT}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    policy = load_policy(study_world.policy_file(folder))
    assert isinstance(policy, OpenVLAPolicy)
    study_world.store(folder, policy)
    path = folder / "study.yaml"
    content = study_world.plain("./tiny.yaml", "store", suites=TWO_TASKS, conditions=study_world.CONDITIONS)
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


def environment_of(pid: int | None) -> dict[bytes, bytes]:
    """What the process was started with."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().rstrip(b"\0").split(b"\0")
    return dict(pair.split(b"=", 1) for pair in pairs)  # type: ignore[misc]


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


@pytest.mark.parametrize(("workers", "drawing"), [(1, None), (2, b"0")])
def test_workers_that_share_the_cores_compute_and_draw_in_one_thread_each(
    monkeypatch: pytest.MonkeyPatch, workers: int, drawing: bytes | None
) -> None:
    for name in crew.SHARED:
        monkeypatch.delenv(name, raising=False)
    nothing = Work("no-such-policy", None, "", {}, {"device": "cpu"}, {}, {})
    with crew.processes(workers) as seats:
        refused = [seat.open(nothing).result(120) for seat in seats]
        found = [environment_of(child.pid) for child in multiprocessing.active_children()]
    assert all(refused), "there is no such policy"
    assert len(found) == workers
    for variables in found:
        assert variables.get(b"LP_NUM_THREADS") == drawing
        assert {variables.get(name.encode()) for name in crew.THREADS} == {b"1"}
    assert not crew.SHARED.keys() & os.environ.keys()


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
    assert len(keys) == len(set(keys)) == 2 * study_world.EPISODES


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
    assert len(rows) == lines_of(tmp_path) < 2 * study_world.EPISODES
    assert rows == study_world.rows_of(two_tasks)[: len(rows)]


@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_ray_gives_the_same_rows(config: Path, two_tasks: Path, tmp_path: Path) -> None:
    assert command(config, tmp_path, "--ray", "local", "--workers", "2").wait() == 0
    study_world.require_equal(two_tasks, tmp_path)


@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_two_nodes_of_a_cluster_give_the_same_rows(config: Path, two_tasks: Path, tmp_path: Path) -> None:
    """A head and a second node on the loopback interface, a CPU each, as `ray start` makes them."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        assert command(config, tmp_path, "--ray", nodes.address, "--workers", "2").wait() == 0
    finally:
        nodes.shutdown()
    study_world.require_equal(two_tasks, tmp_path)
    # A worker holds a CPU, so no node had room for both.
    assert set(records.read_episodes(tmp_path).column("worker").to_pylist()) == {0, 1}
