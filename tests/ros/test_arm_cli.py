"""`steer arm` and `steer stop` at a running bridge, without a policy node."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import typer
from bridge import BridgeClient, BridgeProcess
from standin import StandinProcess, UrClient
from typer.testing import CliRunner

from ros_nodes import cli


@pytest.fixture(scope="module")
def armable(third_domain: int) -> Iterator[tuple[BridgeClient, UrClient]]:
    sides = BridgeClient(third_domain), UrClient(third_domain)
    with StandinProcess(third_domain), BridgeProcess(third_domain), sides[0] as client, sides[1] as ur:
        ur.wait_up()
        client.wait_acting()
        yield client, ur


def steer(*words: str) -> tuple[int, str]:
    app = typer.Typer()
    cli.register(app)
    result = CliRunner().invoke(app, [*words, "--timeout", "30"])
    return result.exit_code, result.output


def test_the_bridge_is_armed_by_the_bare_verb_and_stopped_without_a_policy_node(
    armable: tuple[BridgeClient, UrClient], third_domain: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", str(third_domain))
    client, _ = armable
    client.wait_state(waiting_for=[])
    assert "dry_run" in steer("arm", "--state")[1]
    assert steer("arm") == (0, "armed\n")
    client.wait_state(mode="armed")
    code, answer = steer("stop")
    assert code == 0
    assert "no policy node answered" in answer
    client.wait_state(mode="stopped", code="estop", estop=True)
    code, answer = steer("arm")
    assert code == 1
    assert "estop" in answer
    assert steer("arm", "--reset")[0] == 0
    client.wait_state(estop=False)
    assert steer("arm", "--off") == (0, "dry run\n")
    client.wait_state(mode="dry_run")
