"""Verbs of `steer` against a running node."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from driver import SensorDriver
from steer_msgs.msg import EpisodeStatus
from typer.testing import CliRunner

from ros_nodes.cli import register
from ros_nodes.client import SteeringClient
from ros_nodes.qos import STATUS
from ros_nodes.status import Executed, RobotStatus, status_to_msg
from steer_runtime.errors import SteerError
from steer_runtime.types import SteeringStamp

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    made = typer.Typer()
    register(made)
    return made


@pytest.fixture
def steer(app: typer.Typer, client: SteeringClient) -> object:
    def run(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, list(words))
        if isinstance(result.exception, SteerError):
            raise result.exception
        return result.exit_code, result.output

    return run


def test_list_names_directions_axes_and_the_untrained_policy(steer) -> None:
    code, output = steer("list")
    assert code == 0
    for word in ("slow@", "gentle", "0.5", "speed", "untrained policy"):
        assert word in output
    told = json.loads(steer("list", "--json")[1])
    assert {d["name"] for d in told["directions"]} == {"slow", "fast", "gentle"}
    assert told["trained"] is False


def test_pub_waits_for_the_verdict(steer, client: SteeringClient) -> None:
    code, output = steer("pub", "slow", "0.5", "--ramp", "0.1", "--hold", "30", "--priority", "1", "--span", "text")
    assert code == 0
    assert "accepted" in output
    assert "untrained policy" in output
    state = client.wait_state(lambda s: len(s.active) == 1)
    assert (state.active[0].priority, state.active[0].span) == (1, frozenset(["text"]))
    assert steer("clear", "slow", "--priority", "1")[0] == 0


def test_axis_takes_a_negative_number(steer, client: SteeringClient) -> None:
    assert steer("pub", "speed", "-0.5")[0] == 0
    client.wait_state(lambda s: any(a.commanded == -0.5 for a in s.active))


def test_pub_sends_denoising_steps_and_refuses_what_is_no_range(steer) -> None:
    code, output = steer("pub", "slow", "0.5", "--steps", "0:3")
    assert code == 1
    assert "bad_steps" in output
    for text in ("3", "a:b", "-1:2", "1:2:3"):
        with pytest.raises(SteerError, match="expected A:B"):
            steer("pub", "slow", "0.5", "--steps", text)


def test_refused_command_exits_with_1_and_says_why(steer) -> None:
    code, output = steer("pub", "slwo", "0.5")
    assert code == 1
    assert "refused" in output
    assert "'slow'" in output


def test_state_shows_what_is_active_and_counted(steer, client: SteeringClient) -> None:
    client.wait_verdict(client.publish("slow", 0.5))
    client.wait_state(lambda s: len(s.active) == 1)
    code, output = steer("state")
    assert code == 0
    for word in ("slow@", "untrained policy", "inferences", "active, loop"):
        assert word in output
    told = json.loads(steer("state", "--json")[1])
    assert told["active"][0]["target"] == "slow"
    assert told["robot"] is None


def test_state_names_chunk_and_steering_of_the_robots_last_step(steer, driver: SensorDriver) -> None:
    episode = driver.node.create_publisher(EpisodeStatus, "episode", STATUS)
    try:
        last = Executed("", 7, 3, SteeringStamp(5, 6), 2)
        status = RobotStatus(9, driver.session, "pick", 1, 40, False, False, "free", 3, 4, last, {"late_chunk": 2})
        episode.publish(status_to_msg(status))
        # Each call is a participant of its own, and discovery may take longer than a call waits for a robot.
        heard = (json.loads(steer("state", "--json")[1])["robot"] for _ in range(20))
        robot = next(found for found in heard if found is not None)
        assert robot["last"]["row"] == 3
        shown = (" ".join(steer("state")[1].split()) for _ in range(20))
        output = next(text for text in shown if "none is heard" not in text)
        for words in (
            "row 3 of chunk 7, made under epoch 5, sequence 6, 2 steps after its frame",
            "3 steps held, 4 rows trimmed as late",
            "free, episode 2, control step 40",
            "robot: late_chunk",
        ):
            assert words in output
    finally:
        driver.node.destroy_publisher(episode)


def test_clear_all_clears(steer, client: SteeringClient) -> None:
    client.wait_verdict(client.publish("slow", 0.5))
    assert steer("clear", "--all")[0] == 0
    client.wait_state(lambda s: s.active == ())


def test_a_kept_command_lasts_as_long_as_its_process(client: SteeringClient) -> None:
    words = ["pub", "slow", "0.5", "--keep", "--timeout", "60"]
    # A test run in the background ignores SIGINT, and its children would as well.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from steer_runtime.cli.main import main; main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT)
    try:
        held = client.wait_state(lambda s: any(a.expires_in_s is not None for a in s.active), timeout=60.0)
        assert held.active[0].source == "steer-cli"
        process.send_signal(signal.SIGINT)
        assert process.wait(30.0) == 0
        client.wait_state(lambda s: s.active == ())
    finally:
        process.kill()
        process.wait()


def test_stop_stops_and_reset_lets_go(steer, client: SteeringClient) -> None:
    client.wait_verdict(client.publish("slow", 0.5))
    code, output = steer("stop")
    assert code == 0
    assert "emergency stop" in output
    assert client.wait_state(lambda s: s.loop_state == "stopped").active == ()
    assert "released" in steer("stop", "--reset")[1]
    client.wait_state(lambda s: s.loop_state != "stopped")


def test_keep_and_hold_exclude_each_other(steer) -> None:
    with pytest.raises(SteerError, match="give one of them"):
        steer("pub", "slow", "0.5", "--keep", "--hold", "2")


def test_clear_wants_a_name_or_all(steer) -> None:
    with pytest.raises(SteerError, match="--all"):
        steer("clear")


def test_missing_node_is_one_sentence_and_exit_code_3(app: typer.Typer, driver: SensorDriver) -> None:
    result = CliRunner().invoke(app, ["state", "--namespace", "/nobody", "--timeout", "0.5"])
    assert result.exit_code == 3
    assert "no policy node answered" in result.output
    assert "Traceback" not in result.output


def test_importing_the_verbs_imports_no_ros() -> None:
    code = "import sys, ros_nodes.cli; assert not any(m.split('.')[0] in ('rclpy', 'steer_msgs') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("verb", ["list", "pub", "state", "clear", "stop"])
def test_help_shows_an_example(app: typer.Typer, verb: str) -> None:
    assert f"steer {verb}" in CliRunner().invoke(app, [verb, "--help"], terminal_width=200).output
