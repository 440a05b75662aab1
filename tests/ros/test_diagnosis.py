"""Health on /diagnostics: every node tells it, whatever is wrong with the node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from driver import Listener, NodeProcess, PolicyDriver

from ros_nodes.diagnosis import OK, Diagnosis, Health
from ros_nodes.guard import Complaints
from ros_nodes.qos import DIAGNOSTICS

PATIENCE_S = 60.0


class Doctor(Listener):
    """Hears every status."""

    def __init__(self, domain: int | None = None) -> None:
        super().__init__("doctor", domain)
        self.heard: list[tuple[float, DiagnosticArray]] = []
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self.keep(self.heard), DIAGNOSTICS)

    def status(self, name: str, wanted: Any = lambda status: True) -> DiagnosticStatus:
        """The newest status of a part that satisfies `wanted`, waited for from now on."""
        seen = len(self.heard)

        def find() -> DiagnosticStatus | None:
            for _, message in reversed(self.heard[seen:]):
                for status in message.status:
                    if name in status.name and wanted(status):
                        return status
            return None

        found = self.wait(find, PATIENCE_S, f"a status of {name}")
        assert isinstance(found, DiagnosticStatus)
        return found


@pytest.fixture(scope="module")
def doctor(other_domain: int) -> Iterator[Doctor]:
    with Doctor(other_domain) as listener:
        yield listener


def values(status: DiagnosticStatus) -> dict[str, str]:
    return {pair.key: pair.value for pair in status.values}


def test_level_sentence_values_and_rates_are_told(doctor: Doctor) -> None:
    complaints = Complaints(doctor.node)
    complaints.count("refused", 3)
    events = 0

    def look() -> Health:
        nonlocal events
        events += 10
        return Health(OK, "well", {"mode": "free", "frame_age_s": 0.25}, {"steps": events}, "ur5e")

    diagnosis = Diagnosis(doctor.node, complaints, "legs", look)
    told = doctor.status("legs", lambda s: "steps_hz" in values(s) and values(s)["steps_hz"] != "0.000")
    assert (told.level, told.message, told.hardware_id) == (DiagnosticStatus.OK, "well", "ur5e")
    assert told.name.startswith("/steer/doctor")
    assert values(told) == {
        "mode": "free",
        "frame_age_s": "0.250",
        "steps_hz": values(told)["steps_hz"],
        "refused": "3",
    }
    assert 0 < float(values(told)["steps_hz"]) < 1000
    assert diagnosis is not None


def test_a_node_that_cannot_tell_its_health_says_so(doctor: Doctor) -> None:
    complaints = Complaints(doctor.node)

    def look() -> Health:
        raise ValueError("no idea")

    Diagnosis(doctor.node, complaints, "mind", look)
    told = doctor.status("mind")
    assert told.level == DiagnosticStatus.ERROR
    assert "no idea" in told.message
    assert int(values(told)["diagnosis_failed"]) >= 1


def test_a_robot_tells_that_it_waits_acts_and_holds(doctor: Doctor, other_domain: int) -> None:
    body = [str(Path(__file__).parent / "point_robot.py")]
    parameters = {"mode": "lockstep", "action_timeout_s": 2.0}
    with NodeProcess(body, parameters, other_domain), PolicyDriver(other_domain) as policy:
        told = doctor.status("/steer/robot: robot")
        assert (told.level, told.message) == (DiagnosticStatus.WARN, "waiting for a policy's actions")
        assert told.hardware_id == "point"
        policy.description()
        policy.wait(lambda: policy.frames, PATIENCE_S, "a frame")

        def act() -> None:
            policy.act(np.array([[0.5, 0, 0, 0, 0, 0, 1.0]], np.float32))

        act()
        told = doctor.status("/steer/robot: robot", lambda s: s.message != "waiting for a policy's actions")
        assert {
            "mode",
            "session",
            "episode",
            "step",
            "frame_age_s",
            "action_age_s",
            "steps_hz",
            "hold_steps_hz",
        } <= set(values(told))
        told = doctor.status("/steer/robot: robot", lambda s: s.message == "holding: no answer")
        assert told.level == DiagnosticStatus.WARN
