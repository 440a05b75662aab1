"""Observations are complete, of one moment, and in order."""

from __future__ import annotations

import numpy as np
import pytest
from driver import JOINTS

from ros_nodes.assembler import MAX_UNFINISHED, ObservationAssembler
from ros_nodes.convert import Camera, RobotDescription, image_to_msg, joints_to_msg, pose_to_msg, time_from_ns
from steer_runtime.errors import SteerError
from steer_runtime.types import LIBERO_ACTION_SPACE, Observation

DESCRIPTION = RobotDescription(
    "s", "r", False, LIBERO_ACTION_SPACE, (Camera("agentview", 4, 4), Camera("wrist", 4, 4)), JOINTS, JOINTS[-2:]
)


class Robot:
    """Feeds an assembler part by part; the clock is the test's."""

    def __init__(self, freeze_timeout_s: float = 0.0) -> None:
        self.now = 0.0
        self.assembler = ObservationAssembler(DESCRIPTION, freeze_timeout_s=freeze_timeout_s, clock=lambda: self.now)
        self.assembler.instruction("pick up the soup")

    def part(self, name: str, stamp: int, value: int = 0) -> Observation | None:
        time = time_from_ns(stamp)
        match name:
            case "joints":
                return self.assembler.joints(joints_to_msg(JOINTS, np.arange(9.0), time))
            case "pose":
                return self.assembler.pose(pose_to_msg(np.array([1.0, 2, 3]), np.array([0.0, 0, 0, 1]), time, "world"))
        return self.assembler.image(name, image_to_msg(np.full((4, 4, 3), value, np.uint8), time, name))

    def frame(self, stamp: int, value: int = 0) -> Observation | None:
        return [self.part(name, stamp, value) for name in ("joints", "pose", "agentview", "wrist")][-1]


def test_observation_comes_with_its_last_part() -> None:
    robot = Robot()
    assert [robot.part(name, 5) for name in ("wrist", "pose", "joints")] == [None, None, None]
    observation = robot.part("agentview", 5)
    assert observation is not None
    assert set(observation.images) == {"agentview", "wrist"}
    assert (observation.stamp_ns, observation.frame_id, observation.instruction) == (5, 1, "pick up the soup")
    assert observation.state.tolist() == [1, 2, 3, 0, 0, 0, 7, 8]


def test_a_frame_that_came_before_its_instruction_is_whole_with_it() -> None:
    robot = Robot()
    robot.assembler = ObservationAssembler(DESCRIPTION)
    assert robot.frame(4) is None
    assert robot.frame(5) is None
    with pytest.raises(SteerError, match="came again"):
        robot.part("wrist", 5)
    observation = robot.assembler.instruction("pick up the milk")
    assert observation is not None
    assert (observation.stamp_ns, observation.frame_id, observation.instruction) == (5, 1, "pick up the milk")
    assert robot.assembler.incomplete_frames == 1
    assert robot.assembler.instruction("pick up the soup") is None


def test_parts_of_different_moments_are_never_joined() -> None:
    robot = Robot()
    for name in ("joints", "pose", "agentview"):
        assert robot.part(name, 5) is None
    assert robot.part("wrist", 6) is None


@pytest.mark.parametrize(("stamp", "code"), [(5, "repeated_frame"), (4, "stamp_jumped_back")])
def test_stamp_that_does_not_advance_is_refused(stamp: int, code: str) -> None:
    robot = Robot()
    robot.frame(5)
    with pytest.raises(SteerError) as refused:
        robot.part("wrist", stamp)
    assert refused.value.code == code
    assert robot.frame(6) is not None


def test_clock_that_stays_set_back_can_be_taken_anew() -> None:
    robot = Robot()
    robot.frame(1000)
    robot.assembler.forget_stamps()
    assert robot.frame(5) is not None


def test_unfinished_frames_are_bounded_and_counted() -> None:
    robot = Robot()
    for stamp in range(1, 101):
        robot.part("wrist", stamp)
    assert robot.assembler.incomplete_frames == 100 - MAX_UNFINISHED


def test_camera_that_repeats_its_picture_too_long_is_frozen_until_it_changes() -> None:
    robot = Robot(freeze_timeout_s=1.0)
    robot.frame(1, value=7)
    robot.now = 2.0
    with pytest.raises(SteerError) as refused:
        robot.part("agentview", 2, value=7)
    assert refused.value.code == "frozen_camera"
    assert robot.frame(3, value=8) is not None
