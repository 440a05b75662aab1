"""Messages are checked in full on their way in."""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from geometry_msgs.msg import PoseStamped
from hypothesis import given
from hypothesis import strategies as st
from sensor_msgs.msg import Image
from steer_msgs.msg import ActionChunk as ActionChunkMsg
from steer_msgs.msg import GripperCommand
from steer_msgs.msg import RobotDescription as RobotDescriptionMsg
from steer_msgs.msg import SteeringCommand as SteeringCommandMsg

from ros_nodes.command_json import command_from_json, command_to_json
from ros_nodes.convert import (
    Camera,
    RobotDescription,
    axis_angle_from_quaternion,
    chunk_from_msg,
    chunk_to_msg,
    command_from_msg,
    command_to_msg,
    description_from_msg,
    description_to_msg,
    gripper_from_msg,
    image_from_msg,
    image_to_msg,
    joints_from_msg,
    joints_to_msg,
    pose_from_msg,
    time_from_ns,
)
from ros_nodes.status import Executed, RobotStatus, status_from_msg, status_to_msg
from steer_runtime.errors import SteerError
from steer_runtime.steering.command import SteeringCommand
from steer_runtime.types import LIBERO_ACTION_SPACE, ROLES, ActionChunk, SteeringStamp

CAMERA = Camera("agentview", 6, 4)
PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
STAMP = time_from_ns(1_700_000_000_123_456_789)

commands = st.builds(
    SteeringCommand,
    source=st.text(string.printable, min_size=1, max_size=40),
    epoch=st.integers(0, 2**63 - 1),
    sequence=st.integers(0, 2**63 - 1),
    stamp_ns=st.integers(0, 2**60),
    op=st.sampled_from(["set", "clear", "clear_all"]),
    target=st.text(string.ascii_lowercase, max_size=20),
    strength=st.floats(allow_nan=False, allow_infinity=False),
    ramp_s=st.none() | st.floats(0, 100),
    hold_s=st.none() | st.floats(0.001, 100),
    priority=st.integers(-128, 127),
    span=st.none() | st.frozensets(st.sampled_from(ROLES), min_size=1),
    steps=st.none() | st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 2**32 - 1)),
)


@given(commands)
def test_command_survives_both_forms(command: SteeringCommand) -> None:
    assert command_from_msg(command_to_msg(command)) == command
    assert command_from_json(command_to_json(command)) == command


def test_strength_of_a_message_arrives_unrounded() -> None:
    assert command_from_msg(SteeringCommandMsg(strength=1e300)).strength == 1e300


@pytest.mark.parametrize(("ramp", "meant"), [(-1.0, None), (math.nan, None), (0.0, 0.0), (2.5, 2.5)])
def test_negative_or_nan_ramp_means_the_default(ramp: float, meant: float | None) -> None:
    assert command_from_msg(SteeringCommandMsg(ramp_s=ramp)).ramp_s == meant


@pytest.mark.parametrize("fields", [{"op": 7}, {"span": 16}])
def test_unknown_op_or_span_bit_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(SteerError):
        command_from_msg(SteeringCommandMsg(**fields))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"priority": 200}, "priority"),
        ({"steps": (0, 2**32)}, "end of the steps"),
        # A message says by it that all of them are meant.
        ({"steps": (0, 0)}, "end of the steps"),
    ],
)
def test_command_beyond_its_message_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(SteerError, match=named):
        command_to_msg(SteeringCommand("a", 1, 1, 1, "set", "slow", 1.0, **fields))


@given(st.text(max_size=300))
def test_any_text_is_a_command_or_one_sentence(text: str) -> None:
    with pytest.raises(SteerError) as refused:
        command_from_json(text)
    assert "\n" not in refused.value.sentence or "\n" in text


def test_image_keeps_its_bytes() -> None:
    assert np.array_equal(image_from_msg(image_to_msg(PICTURE, STAMP, "f"), CAMERA), PICTURE)


@pytest.mark.parametrize(
    ("field", "value"), [("encoding", "bgr8"), ("width", 5), ("height", 5), ("step", 20), ("data", bytes(71))]
)
def test_image_that_differs_from_the_description_is_refused(field: str, value: object) -> None:
    message: Image = image_to_msg(PICTURE, STAMP, "f")
    setattr(message, field, value)
    with pytest.raises(SteerError) as refused:
        image_from_msg(message, CAMERA)
    assert refused.value.code == "bad_image"


def test_joints_are_mapped_by_name() -> None:
    message = joints_to_msg(["extra", "b", "a"], [9.0, 2.0, 1.0], STAMP)
    assert joints_from_msg(message, ["a", "b"]) == {"a": 1.0, "b": 2.0}


def test_missing_or_nan_joint_is_refused() -> None:
    with pytest.raises(SteerError, match="lacks b"):
        joints_from_msg(joints_to_msg(["a"], [1.0], STAMP), ["a", "b"])
    with pytest.raises(SteerError, match="NaN"):
        joints_from_msg(joints_to_msg(["a"], [math.nan], STAMP), ["a"])


@pytest.mark.parametrize("w", [0.0, 0.3, -0.3, 1.0, -1.0])
def test_axis_angle_is_robosuites(w: float) -> None:
    from robosuite.utils import transform_utils as transform

    quaternion = np.array([0.6, 0.0, 0.8, 0.0]) * math.sqrt(1 - w * w) + np.array([0, 0, 0, w])
    assert np.allclose(axis_angle_from_quaternion(quaternion), transform.quat2axisangle(quaternion.copy()), atol=1e-12)


def test_pose_without_a_rotation_is_refused() -> None:
    message = PoseStamped()
    message.pose.orientation.w = 0.5
    with pytest.raises(SteerError) as refused:
        pose_from_msg(message)
    assert refused.value.code == "bad_pose"


def chunk_message(actions: np.ndarray) -> ActionChunkMsg:
    chunk = ActionChunk(actions, LIBERO_ACTION_SPACE, {}, 5, SteeringStamp(7, 8), 123_456_789_000, 9, 0.25)
    return chunk_to_msg(chunk, instance_id="i", session_id="s", stamp_ns=1, trained=False, said=(" fast", " low"))


def test_chunk_keeps_everything_that_says_what_it_is() -> None:
    actions = np.linspace(-1, 1, 14, dtype=np.float32).reshape(2, 7)
    back = chunk_from_msg(chunk_message(actions), LIBERO_ACTION_SPACE)
    assert np.array_equal(back.actions, actions)
    assert (back.inference_id, back.steering, back.frame_id, back.age_s) == (5, SteeringStamp(7, 8), 9, 0.25)
    assert back.observation_stamp_ns == 123_456_789_000
    assert chunk_message(actions).said == ["fast", "low"]


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda m: setattr(m, "rows", 3), "bad_shape"),
        (lambda m: setattr(m, "rows", 0), "bad_shape"),
        (lambda m: setattr(m, "dims", 14), "bad_shape"),
        (lambda m: setattr(m, "rate_hz", 10.0), "bad_rate"),
        (lambda m: m.data.__setitem__(3, math.nan), "not_finite"),
        (lambda m: m.data.__setitem__(3, math.inf), "not_finite"),
    ],
)
def test_chunk_a_robot_must_not_execute_is_refused(spoil: Callable[[ActionChunkMsg], None], code: str) -> None:
    message = chunk_message(np.zeros((2, 7), np.float32))
    spoil(message)
    with pytest.raises(SteerError) as refused:
        chunk_from_msg(message, LIBERO_ACTION_SPACE)
    assert refused.value.code == code


DESCRIPTION = RobotDescription("s", "libero", True, LIBERO_ACTION_SPACE, (CAMERA,), ("j", "l", "r"), ("l", "r"), True)


def test_description_survives() -> None:
    assert description_from_msg(description_to_msg(DESCRIPTION, 1)) == DESCRIPTION


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("camera_widths", [1, 2]),
        ("camera_names", []),
        ("camera_encodings", ["bgr8"]),
        ("camera_heights", [100_000]),
        ("kind", "teleport"),
        ("rotation", "dance"),
        ("rate_hz", 0.0),
        ("position_scale_m", math.nan),
        ("gripper_joints", ["l", "unknown"]),
    ],
)
def test_description_that_contradicts_itself_is_refused(field: str, value: object) -> None:
    message: RobotDescriptionMsg = description_to_msg(DESCRIPTION, 1)
    setattr(message, field, value)
    with pytest.raises(SteerError) as refused:
        description_from_msg(message)
    assert refused.value.code == "bad_description"


@pytest.mark.parametrize("steps", ["[1]", "[1, 2, 3]", '"ab"', "[1.5, 2]"])
def test_steps_of_a_json_command_are_two_whole_numbers(steps: str) -> None:
    with pytest.raises(SteerError, match="steps"):
        command_from_json(f'{{"source": "a", "epoch": 1, "sequence": 1, "stamp_ns": 1, "steps": {steps}}}')


def test_gripper_command_that_is_no_number_is_refused() -> None:
    assert gripper_from_msg(GripperCommand(command=-1.0)) == -1.0
    with pytest.raises(SteerError, match="NaN"):
        gripper_from_msg(GripperCommand(command=math.nan))


@pytest.mark.parametrize("last", [Executed("stale"), Executed("", 7, 3, SteeringStamp(5, 6), 2)])
def test_status_survives(last: Executed) -> None:
    status = RobotStatus(9, "s", "pick", 1, 40, True, True, "free", 3, 4, last, {"late_chunk": 2})
    assert status_from_msg(status_to_msg(status)) == status
