"""The demo: its file, its processes, and (heavy) the whole of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ros_nodes.children import Children
from ros_nodes.demo_config import Ur5DemoConfig, choose, config_named, read_config
from steer_runtime.errors import SteerError
from steer_runtime.policies.registry import policy_configs


def test_file_of_the_trained_policy_steers_pace_by_an_axis_of_words() -> None:
    config = read_config(config_named("demo"))
    assert config.policy == "pocket-libero"
    assert [(axis.name, axis.form is not None) for axis in config.axes] == [("speed", True)]
    signs = [c.strength > 0 for c in config.commands if c.set_ == "speed"]
    assert signs == [True, False]
    assert any(c.expect == "refused" for c in config.commands)


@pytest.mark.parametrize(
    ("asked", "trained", "untrained"),
    [
        (None, "pocket-libero", "pocket-untrained"),
        ("openvla", "pocket-libero", "pocket-untrained"),
        ("pi0", "pocket-pi0-libero", "pocket-pi0-untrained"),
    ],
)
def test_without_the_trained_checkpoint_the_untrained_policy_of_the_kind_runs(
    asked: str | None, trained: str, untrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"{trained}.yaml"
    file.write_text("kind: openvla\nname: p\ncheckpoint: there\nsuite: libero_object\n")
    known = {**policy_configs(), trained: file}
    monkeypatch.setattr("steer_runtime.policies.registry.policy_configs", lambda: known)
    (tmp_path / "there").mkdir()
    assert choose(None, asked) == (config_named("demo-untrained"), untrained)
    (tmp_path / "there" / "config.json").touch()
    assert choose(None, asked) == (config_named("demo"), trained)
    # One that is not even configured is one that is not installed.
    known.pop(trained)
    assert choose(None, asked) == (config_named("demo-untrained"), untrained)


def test_any_policy_may_be_named_with_or_without_a_file(tmp_path: Path) -> None:
    assert choose(None, "pocket-libero") == (config_named("demo"), "pocket-libero")
    assert choose(None, "pocket-pi0-untrained") == (config_named("demo-untrained"), "pocket-pi0-untrained")
    mine = tmp_path / "mine.yaml"
    mine.write_text("policy: pocket-untrained\ncommands: []\n")
    assert choose(mine, None) == (mine, "pocket-untrained")
    assert choose(mine, "pi0-libero") == (mine, "pi0-libero")
    with pytest.raises(SteerError, match="unknown"):
        choose(None, "pi1")


def test_shipped_file_is_valid_and_covers_every_kind_of_command() -> None:
    config = read_config(config_named("demo-untrained"))
    assert config.policy == "pocket-untrained"
    assert {c.expect for c in config.commands} == {"applied", "refused"}
    assert any(c.clear_all for c in config.commands)
    assert any(c.clear for c in config.commands)
    assert any(c.ramp_s for c in config.commands)
    axes = {axis.name for axis in config.axes}
    assert any(c.set_ in axes and c.strength < 0 for c in config.commands)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("policy: p\nsurprise: 1\ndirections: []\ncommands: []", "surprise"),
        ("policy: p\ndirections: []\ncommands: [{at: 3, set: up, clear: up}]", "exactly one of set, clear, clear_all"),
        ("policy: p\nsteps: 20\ndirections: []\ncommands: [{at: 19, set: up}]", "before the end"),
        ("policy: p\ndirections: [{name: up}]\ncommands: []", "either words or dense"),
        ("policy: p\naxes: [{name: speed}]\ncommands: []", "negative and positive, or form"),
        ("policy: p\naxes: [{name: speed, form: neurons}]\ncommands: []", "needs layers"),
        ("policy: [", "not readable YAML"),
    ],
)
def test_unusable_file_is_refused_with_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "demo.yaml"
    path.write_text(text)
    with pytest.raises(SteerError, match=said):
        read_config(path)


def test_options_are_checked_like_the_file() -> None:
    with pytest.raises(SteerError, match="before the end"):
        read_config(config_named("demo")).changed({"steps": 10})


def _sleeper(folder: Path) -> None:
    (folder / "sleeper.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")


def _gone(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_children_end_with_the_block(tmp_path: Path) -> None:
    _sleeper(tmp_path)
    with Children(tmp_path / "logs", {"PYTHONPATH": str(tmp_path)}) as children:
        children.start("one", "sleeper", {})
        pid = children._running["one"].pid
        children.check()
    assert _gone(pid)


def test_child_that_ends_is_reported_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit('the arm is missing')\n")
    with Children(tmp_path / "logs", {"PYTHONPATH": str(tmp_path)}) as children:
        children.start("robot", "broken", {})
        children._running["robot"].wait(20)
        with pytest.raises(SteerError, match="the robot process ended with code 1"):
            children.check()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_children_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    _sleeper(tmp_path)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom ros_nodes.children import Children\n"
        "folder = Path(sys.argv[1])\n"
        "children = Children(folder / 'logs', {'PYTHONPATH': str(folder)})\nchildren.start('one', 'sleeper', {})\n"
        "print(children._running['one'].pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    log = tmp_path / "logs" / "one.log"
    while log.stat().st_size == 0:  # the child runs Python by then, so the death signal is set
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert _gone(pid)


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("policy", "inferences", "bins"),
    [pytest.param("pocket-untrained", 70, 256, id="openvla"), pytest.param("pocket-pi0-untrained", 14, 0, id="pi0")],
)
def test_demo_applies_every_command_and_draws_the_report(
    policy: str, inferences: int, bins: int, tmp_path: Path
) -> None:
    out = tmp_path / "demo"
    code = "import typer\nfrom ros_nodes.demo import demo\ntyper.run(demo)"
    result = subprocess.run(
        [sys.executable, "-c", code, "--policy", policy, "--out", str(out)],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        timeout=850,
    )
    assert result.returncode == 0, result.stderr[-2000:]

    from sim import episode

    record = episode.load(out / "episode")
    assert record.faults == ()
    assert record.steps == 70
    assert record.inferences >= 0.9 * inferences
    assert len(record.bin_values) == bins
    assert {c.code for c in record.facts.commands if not c.accepted} == {"unknown_direction"}
    assert policy in (out / "report.html").read_text()[:4000]


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_demo_fails_when_a_command_does_nothing(tmp_path: Path) -> None:
    config = tmp_path / "demo.yaml"
    config.write_text(
        "policy: pocket-untrained\nsteps: 10\nobservations: 1\n"
        "directions:\n  - {name: hurry, dense: [quick, speed], minus: [slow, slower]}\n"
        "commands:\n  - {at: 2, set: nowhere, strength: 0.5}\n  - {at: 4, set: hurry, strength: 0.0}\n"
    )
    code = "import typer\nfrom ros_nodes.demo import demo\ntyper.run(demo)"
    options = ["--config", str(config), "--out", str(tmp_path / "out")]
    result = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, timeout=850)
    assert result.returncode == 1
    assert "nowhere +0.5: it was refused (unknown_direction)" in result.stderr
    assert "hurry +0: the engine's trace shows no write for it" in result.stderr
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_demo_on_the_ur5_steers_it_within_its_limits(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    code = "import typer\nfrom ros_nodes.demo import demo\ntyper.run(demo)"
    options = ["--robot", "ur5", "--out", str(out)]
    result = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, timeout=1150)
    told = json.loads((out / "summary.json").read_text())
    assert told["peak_tcp_speed_m_s"] <= told["ceilings"]["tcp_speed"]
    assert max(told["peak_joint_speed_rad_s"]) <= max(told["ceilings"]["joint_speed"])
    assert sum(phase["distance"] for phase in told["phases"]) > 0.05
    # A machine that starves the stand-in for a quarter of a second makes the bridge stop; too many stops end the run.
    if len(told["stops"]) <= 10:
        assert result.returncode == 0, result.stderr[-2000:]
        assert [phase["label"] for phase in told["phases"]] == ["not steered", "speed -1", "speed +1", "clear speed"]
    assert {"report.html", "demo.mp4", "tcp_speed.png"} <= {file.name for file in out.iterdir()}


def test_file_of_the_ur5_steers_pace_both_ways_and_names_a_policy_that_is_there() -> None:
    config = read_config(config_named("demo-ur5"), Ur5DemoConfig)
    assert config.policy in policy_configs()
    assert [c.strength for c in config.commands if c.set_ == "speed"] == [-1.0, 1.0]
    assert any(c.expect == "refused" for c in config.commands)
    assert choose(config_named("demo-ur5"), None, Ur5DemoConfig) == (config_named("demo-ur5"), config.policy)
    with pytest.raises(SteerError, match="motion_scale"):
        read_config(config_named("demo-ur5"))
