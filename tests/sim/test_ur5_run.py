"""A run of the UR5e as numbers, sentences, plot and video; and the scene in which the demo runs."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sim.episode import CommandOutcome
from sim.ur5 import run_report
from sim.ur5.run import ArmRun, Ceilings, Stop, speed_plot, video_frames, video_rate
from sim.ur5.truth import Motion

CEILINGS = Ceilings(0.25, (0.5,) * 6, (2.5,) * 6)


def outcome(label: str, at_s: float, **changes: Any) -> CommandOutcome:
    fields: dict[str, Any] = {
        "label": label, "op": "set", "target": "speed", "strength": 1.0, "ramp_s": None, "expected": "applied",
        "published_ns": int((at_s - 0.1) * 1e9), "accepted": True, "code": "", "sentence": "", "applied_strength": 1.0,
        "epoch": 1, "sequence": 1, "direction_id": "d", "step": 4, "action_ns": int(at_s * 1e9), "first_inference": 2,
        "writes": 7,
    }  # fmt: skip
    return CommandOutcome(**{**fields, **changes})


@pytest.fixture
def run() -> ArmRun:
    """Ten seconds from second 100: 0.1 m/s along x, twice as fast from second 105 on, when a command took effect."""
    time_s = np.arange(99.0, 111.0, 0.008)
    speed = np.where(time_s < 105.0, 0.1, 0.2)
    tcp = np.zeros((len(time_s), 3))
    tcp[:, 0] = np.concatenate([[0.0], np.cumsum(speed[:-1] * 0.008)])
    still = np.zeros((len(time_s), 6))
    things = np.zeros((len(time_s), 1, 3))
    picture_s = np.arange(100.0, 110.0, 0.5)
    pictures = [np.full((32, 32, 3), index, np.uint8) for index in range(len(picture_s))]
    return ArmRun(
        policy="p",
        trained=True,
        instruction="pick up the cube",
        motion_scale=0.3,
        clock_s=0.0,
        begin_s=100.0,
        end_s=110.0,
        rows=80,
        inferences=20,
        commands=(outcome("speed +1", 105.0),),
        unsent=(),
        stops=(Stop(107.0, "state_silent", "the driver was silent"),),
        ceilings=CEILINGS,
        peaks=np.array([0.4] * 6 + [2.0] * 6 + [0.2]),
        motion=Motion(time_s, still, still, tcp, speed, things, ("cube",)),
        picture_s=picture_s,
        pictures={"agentview": pictures, "wrist": pictures},
        lifted_m=0.0,
        target="cube",
    )


def test_phases_are_cut_where_commands_took_effect_and_measured_on_the_arm(run: ArmRun) -> None:
    before, after = run.phases()
    assert (before.label, after.label) == ("not steered", "speed +1")
    assert (before.begin_s, before.end_s, after.end_s) == (100.0, 105.0, 110.0)
    assert before.speed == pytest.approx(0.1, rel=1e-3)
    assert after.speed == pytest.approx(0.2, rel=1e-2)
    assert after.distance == pytest.approx(1.0, rel=0.02)
    assert (before.peak, after.peak) == (0.1, 0.2)
    assert before.moving == pytest.approx(1.0, abs=0.01)


def test_a_run_that_kept_its_limits_has_no_fault_even_if_it_was_stopped(run: ArmRun) -> None:
    assert run.faults == ()
    assert run.summary()["stops"][0]["code"] == "state_silent"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peaks": np.array([0.4] * 6 + [2.0] * 6 + [0.26])}, "0.260 m/s: the limit is 0.25"),
        ({"peaks": np.array([0.4] * 5 + [0.51] + [2.0] * 6 + [0.2])}, "joint 6 reached 0.510"),
        ({"commands": (outcome("speed +1", 105.0, accepted=False, code="stale"),)}, "refused (stale)"),
        ({"unsent": ("clear speed",)}, "it was not sent: the run ended after 80 control steps"),
        ({"picture_s": np.zeros(0), "pictures": {"agentview": [], "wrist": []}}, "no picture"),
    ],
)
def test_what_went_wrong_has_its_sentence(run: ArmRun, change: dict[str, Any], said: str) -> None:
    (fault,) = replace(run, **change).faults
    assert said in fault


def test_plot_and_video_have_a_picture_for_every_moment(run: ArmRun) -> None:
    assert Image.open(io.BytesIO(speed_plot(run))).size[0] > 1000
    drawn = list(video_frames(run))
    assert len(drawn) == len(run.picture_s)
    assert all(side % 2 == 0 for side in drawn[0].shape[:2])
    assert video_rate(run) == pytest.approx(2.0)


def test_files_are_written_and_the_page_needs_none_of_them(run: ArmRun, tmp_path: Path) -> None:
    page = run_report.write(replace(run, unsent=("<b>clear</b>",)), tmp_path).read_text()
    assert {file.name for file in tmp_path.iterdir()} == {"report.html", "tcp_speed.png", "demo.mp4", "summary.json"}
    assert "data:video/mp4;base64,AAAA" in page
    assert "<b>clear" not in page
    assert "http" not in page
    told = json.loads((tmp_path / "summary.json").read_text())
    assert told["peak_tcp_speed_m_s"] == 0.2
    assert told["phases"][1]["label"] == "speed +1"


@pytest.mark.heavy
def test_the_hand_begins_where_liberos_began_and_sees_the_same_things() -> None:
    from sim.libero_robot import LiberoRobot, use_software_rendering
    from sim.ur5.arm import Ur5Arm
    from sim.ur5.cameras import Cameras
    from sim.ur5.libero import libero_scene
    from sim.ur5.names import HAND_YAW_RAD, PANDA_BASE_M

    use_software_rendering()
    scene = libero_scene(9, 0)
    with LiberoRobot("libero_object", 9, 0, camera_size=64) as robot:
        first = robot.reset()
    arm = Ur5Arm(scene)
    arm.advance(0.1)
    # base_link is the controller's frame turned by 180 degrees about z.
    place = arm.measure().tcp_position * [-1, -1, 1] + PANDA_BASE_M
    np.testing.assert_allclose(place, first.eef_position, atol=2e-3)
    from arm.robot import StateFrame

    x, y, z, w = arm.measure().tcp_quaternion
    _, hand = StateFrame(PANDA_BASE_M, HAND_YAW_RAD).pose(np.zeros(3), np.array([-y, x, w, -z]))
    np.testing.assert_allclose(hand, first.eef_quaternion, atol=5e-3)
    cameras = Cameras(scene, 64)
    seen = cameras.draw(arm.data.qpos)["agentview"]
    cameras.close()
    # The lower half shows the floor and what lies on it, without any arm.
    assert np.abs(seen[32:].astype(int) - first.images["agentview"][32:]).mean() < 12
    assert scene.instruction == first.instruction
