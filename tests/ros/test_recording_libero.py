"""Trained pocket policies in LIBERO, steered, recorded and run again to the bit."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from driver import NodeProcess, PolicyProcess

from ros_nodes.client import SteeringClient
from ros_nodes.recording.file import Recording
from ros_nodes.recording.replay import Replay

PATIENCE_S = 900.0
MODELS = Path(__file__).parents[2] / "models"


def traces(path: Path) -> int:
    if not path.exists() or path.stat().st_size <= 8:
        return 0
    with Recording(path) as recording:
        return sum(1 for _ in recording.messages(frozenset({"/steer/trace"})))


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("policy", "model"), [("pocket-libero", "pocket-openvla-libero"), ("pocket-pi0-libero", "pocket-pi0-libero")]
)
@pytest.mark.parametrize("mode", ["lockstep", "free"])
def test_a_steered_episode_in_libero_is_reproduced_bit_for_bit(
    policy: str, model: str, mode: str, tmp_path: Path, third_domain: int
) -> None:
    path = tmp_path / "run.mcap"
    wanted = 25

    def wait(count: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while traces(path) < count:
            assert node.process.poll() is None, node.log()
            assert time.monotonic() < deadline, f"{traces(path)} of {count} inferences came:\n{node.log()}"
            time.sleep(0.5)

    with (
        NodeProcess(["-m", "ros_nodes.recording.node"], {"path": str(path)}, third_domain) as recorder,
        PolicyProcess(policy, MODELS / model / "directions", domain=third_domain) as node,
        SteeringClient(domain_id=third_domain) as client,
    ):
        client.wait_state(lambda state: state.lifecycle == "inactive", timeout=PATIENCE_S)
        parameters = {"mode": mode, "rate_hz": 10.0}
        with NodeProcess(["-m", "ros_nodes.libero_robot_node"], parameters, third_domain):
            wait(3)
            target = (client.axes() or client.directions())[0].name
            assert client.wait_verdict(client.publish(target, 0.6, ramp_s=4.0), timeout=60.0).accepted
            wait(wanted)
        recorder.process.send_signal(signal.SIGINT)
        assert recorder.process.wait(60.0) == 0, recorder.log()
    report = Replay(path).run()
    assert report.reproduced, report.sentence
    # A robot on the wall clock shows frames that best-effort transport may lose.
    assert report.no_frame <= (0 if mode == "lockstep" else 3)
    assert report.same >= wanted - 3
    with Recording(path) as recording:
        strengths = {
            applied.strength
            for recorded in recording.messages(frozenset({"/steer/trace"}))
            for applied in recorded.message.applied
        }
    assert len(strengths) >= 2
