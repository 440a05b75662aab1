"""What a checkpoint declares is checked against the arm before motion; settings that cannot keep their promises do not load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from follower import EE_DELTA, JOINT_ABS, JOINT_DELTA, SETTINGS, START

from arm.actions import ActionReader
from arm.kinematics import Kinematics
from arm.port import JointMotion
from arm.settings import load_settings
from steer_runtime.errors import SteerError
from steer_runtime.types import ActionSpace

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("space", "scale", "says"),
    [
        (EE_DELTA, 1.0, "motion_scale to 0.25 or less"),
        (replace(EE_DELTA, frame="world"), 0.2, "knows base_link"),
        (replace(EE_DELTA, dims=8), 0.2, "has 8 numbers"),
        (replace(EE_DELTA, rotation="none"), 0.2, "has 7 numbers"),
        (replace(EE_DELTA, rate_hz=0.0), 0.2, "rows a second"),
        (replace(EE_DELTA, rate_hz=500.0), 0.01, "rows a second"),
        (replace(EE_DELTA, gripper_open=1.0), 0.2, "the same number"),
        (replace(EE_DELTA, position_scale_m=float("nan")), 0.2, "not finite"),
        (EE_DELTA, 0.0, "motion_scale 0"),
        (replace(JOINT_DELTA, rotation="rpy"), 1.0, "expected 'none'"),
        (replace(JOINT_DELTA, rotation_scale_rad=0.5), 1.0, "rad/s"),
        (replace(JOINT_DELTA, dims=8), 1.0, "has 8 numbers"),
        (JOINT_ABS, 0.5, "cannot slow down"),
    ],
)
def test_an_action_space_that_does_not_fit_the_arm_is_refused(space: ActionSpace, scale: float, says: str) -> None:
    with pytest.raises(SteerError, match=says) as refused:
        ActionReader(space, SETTINGS, scale)
    assert refused.value.code == "action_space_unfit"


@pytest.mark.parametrize(
    ("space", "value", "opening"),
    [
        (EE_DELTA, -1.0, 1.0),  # LIBERO
        (EE_DELTA, 1.0, 0.0),
        (EE_DELTA, 0.0, 0.5),
        (replace(EE_DELTA, gripper_open=1.0, gripper_close=0.0), 1.0, 1.0),  # OpenVLA
        (replace(EE_DELTA, gripper_open=0.0, gripper_close=1.0), 1.0, 0.0),  # DROID
        (EE_DELTA, 9.0, 0.0),
    ],
)
def test_the_sign_of_the_gripper_is_the_checkpoints(space: ActionSpace, value: float, opening: float) -> None:
    row = np.array([0, 0, 0, 0, 0, 0, value])
    assert ActionReader(space, SETTINGS, 0.2).opening(row) == opening


@pytest.mark.parametrize(
    ("frame", "way"), [("base_link", [1, 0, 0]), ("base", [1, 0, 0]), ("ur_base", [-1, 0, 0]), ("tool0", [0, -1, 0])]
)
def test_a_delta_is_in_the_frame_it_was_declared_in(frame: str, way: list[float]) -> None:
    kinematics = Kinematics(SETTINGS)
    base = kinematics.pose(START)
    reader = ActionReader(replace(EE_DELTA, frame=frame), SETTINGS, 0.2)
    moved = reader.pose(np.array([1.0, 0, 0, 0, 0, 0, 0]), base).position - base.position
    if frame == "tool0":
        # The gripper looks down; its own x axis is turned about the vertical by the wrist.
        assert np.linalg.norm(moved) == pytest.approx(0.01)
        assert abs(moved[2]) < 1e-4
        assert moved @ reader.pose(
            np.array([0, 1.0, 0, 0, 0, 0, 0]), base
        ).position - moved @ base.position == pytest.approx(0)
    else:
        np.testing.assert_allclose(moved, 0.01 * np.array(way), atol=1e-9)


def test_the_model_stands_in_base_link_as_ros_has_it() -> None:
    # ur_description's UR5e at zero: stretched along +x of base_link, tool0 at (0.8172, 0.2329, 0.0628).
    kinematics = Kinematics(SETTINGS)
    flange = kinematics.pose(np.zeros(6)).position - np.array([0, SETTINGS.tool.tcp_offset_m[2], 0])
    np.testing.assert_allclose(flange, [0.8172, 0.2329, 0.0628], atol=1e-4)


def test_inverse_kinematics_comes_back_to_the_pose_it_was_asked_for() -> None:
    kinematics = Kinematics(SETTINGS)
    rng = np.random.default_rng(1)
    for _ in range(50):
        goal = START + rng.uniform(-0.05, 0.05, 6)
        reached = kinematics.reach(kinematics.pose(goal), START)
        assert reached is not None
        np.testing.assert_allclose(reached, goal, atol=2e-3)


@pytest.mark.fault(30)
def test_the_jacobian_is_the_derivative_of_the_pose() -> None:
    kinematics = Kinematics(SETTINGS)
    step = 1e-6
    jacobian = kinematics.jacobian(START)
    for joint in range(6):
        moved = kinematics.pose(START).twist_to(kinematics.pose(START + step * np.eye(6)[joint])) / step
        np.testing.assert_allclose(jacobian[:, joint], moved, atol=1e-4)
    assert kinematics.condition(START) == pytest.approx(8.58, abs=0.05)


@pytest.mark.fault(35)
@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        (("limits", "tcp_speed_m_s"), 5.0, "tcp_speed_m_s"),
        (("limits", "joint_speed_rad_s"), [9.0] * 6, "joint_speed_rad_s"),
        (("limits", "joint_speed_rad_s"), [3.0] * 6, "horizon_s"),
        (("limits", "joint_acceleration_rad_s2"), [0.5] * 6, "horizon_s"),
        (("limits", "joint_speed_rad_s"), [0.1] * 5, "joint_speed_rad_s"),
        (("limits", "condition_stop"), 20.0, "condition_slow"),
        (("limits", "joint_margin_rad"), 0.001, "joint_margin_rad"),
        (("limits", "tcp_speed_m_s"), float("nan"), "tcp_speed_m_s"),
        (("workspace", "lowest_m"), [1.0, 0, 0], "highest_m"),
        (("motion", "tick_hz"), 20.0, "tick_hz"),
        (("motion", "jerk"), 1.0, "jerk"),
        (("arm",), "kuka", "arm"),
    ],
)
def test_settings_that_cannot_keep_their_promises_do_not_load(
    tmp_path: Path, where: tuple[str, ...], value: Any, says: str
) -> None:
    content = yaml.safe_load((ROOT / "configs" / "robots" / "ur5e.yaml").read_text())
    part = content
    for name in where[:-1]:
        part = part[name]
    part[where[-1]] = value
    file = tmp_path / "arm.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(SteerError, match=says) as refused:
        load_settings(file)
    assert refused.value.code == "bad_arm_settings"


@pytest.mark.parametrize("name", ["nowhere", "nowhere.yaml"])
def test_settings_that_are_not_there_are_an_error(name: str) -> None:
    with pytest.raises(SteerError, match="cannot be read"):
        load_settings(name)


@pytest.mark.parametrize(
    ("times", "rows"),
    [
        ([0.1, 0.2], [[0.0] * 6, [0.1] * 6]),
        ([0.2, 0.1], [[0.0] * 6, [0.0] * 6]),
        ([0.0, 0.1], [[0.0] * 6, [0.0] * 6]),
        ([0.1, 0.2], [[np.nan] * 6, [0.0] * 6]),
        ([], np.zeros((0, 6))),
        ([0.1], np.zeros((1, 5))),
    ],
)
def test_a_motion_that_does_not_end_at_rest_cannot_be_made(times: list[float], rows: Any) -> None:
    with pytest.raises(SteerError) as refused:
        JointMotion(np.array(times, np.float64), np.array(rows, np.float64))
    assert refused.value.code == "bad_motion"
