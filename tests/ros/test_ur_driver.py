"""The driver's topics as an arm port: mapped by name, checked in full, turned into base_link."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from driver import Listener
from geometry_msgs.msg import PoseStamped
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool, Float64, Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from arm.port import JOINT_NAMES, JointMotion
from ros_nodes.guard import Complaints
from ros_nodes.qos import COMMAND, STATUS
from ros_nodes.ur_driver import UrDriver, UrDriverParameters, tcp_from_msg
from steer_runtime.errors import SteerError

KNUCKLE = "robotiq_85_left_knuckle_joint"
ORDER = (2, 0, 5, 1, 4, 3)
Q = np.array([0.1, -1.5, 1.6, -1.7, -1.8, 0.3])


class FakeDriver(Listener):
    """The driver's side of the topics, and a port on them in the same node."""

    def __init__(self, domain: int) -> None:
        super().__init__("fake_driver", domain)
        make = self.node.create_publisher
        self.joints = make(JointState, "/joint_states", COMMAND)
        self.running = make(Bool, "/io_and_status_controller/robot_program_running", STATUS)
        self.scaling = make(Float64, "/speed_scaling_state_broadcaster/speed_scaling", COMMAND)
        self.pose = make(PoseStamped, "/tcp_pose_broadcaster/pose", COMMAND)
        self.trajectories: list[tuple[float, JointTrajectory]] = []
        self.grips: list[tuple[float, Float64MultiArray]] = []
        name = "/scaled_joint_trajectory_controller/joint_trajectory"
        self.node.create_subscription(JointTrajectory, name, self.keep(self.trajectories), COMMAND)
        grips = "/gripper_position_controller/commands"
        self.node.create_subscription(Float64MultiArray, grips, self.keep(self.grips), COMMAND)
        self.complaints = Complaints(self.node)
        self.port = UrDriver(self.node, UrDriverParameters(), self.complaints)

    def tell_joints(self, q: np.ndarray = Q, **changes: Any) -> None:
        """Joint states in another order than kinematic, with the gripper half closed."""
        fields = {
            "name": [KNUCKLE, *(JOINT_NAMES[i] for i in ORDER)],
            "position": [0.4, *(float(q[i]) for i in ORDER)],
            "velocity": [0.0, *(0.01 * i for i in ORDER)],
        }
        self.joints.publish(JointState(**{**fields, **changes}))

    def tell_all(self) -> None:
        """Everything once more, until the port has heard it."""

        def heard() -> bool:
            self.tell_joints()
            self.scaling.publish(Float64(data=80.0))
            pose = PoseStamped()
            pose.header.frame_id = "base"
            pose.pose.position.x, pose.pose.orientation.x, pose.pose.orientation.w = -0.5, 1.0, 0.0
            self.pose.publish(pose)
            self.running.publish(Bool(data=True))
            state = self.port.read()
            return state is not None and state.program_running

        self.wait(heard, what="the port to hear all")
        # What is still on its way comes before this one.
        self._nudge = -getattr(self, "_nudge", 1e-6)
        self.tell_joints(Q + self._nudge)
        self.wait(lambda: self.port.read().positions[0] == Q[0] + self._nudge, what="the last of them")  # type: ignore[union-attr]

    def refused(self, code: str) -> None:
        """Until the port has counted this refusal."""
        self.wait(lambda: self.complaints.counters.get(code), what=code)


@pytest.fixture(scope="module")
def fake(other_domain: int) -> Iterator[FakeDriver]:
    with FakeDriver(other_domain) as driver:
        yield driver


@pytest.fixture
def told(fake: FakeDriver) -> FakeDriver:
    fake.tell_all()
    return fake


@pytest.mark.fault(27)
def test_joints_are_mapped_by_name_whatever_their_order(told: FakeDriver) -> None:
    state = told.port.read()
    assert state is not None
    np.testing.assert_allclose(state.positions, Q, atol=1e-5)
    np.testing.assert_allclose(state.velocities, 0.01 * np.arange(6))
    assert state.gripper == pytest.approx(0.5)
    assert state.speed_scaling == pytest.approx(0.8)


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"name": list(JOINT_NAMES[:5]), "position": [9.0] * 5, "velocity": []}, "missing_joint"),
        ({"name": list(JOINT_NAMES), "position": [9.0] * 5, "velocity": []}, "missing_joint"),
        ({"name": list(JOINT_NAMES), "position": [float("nan")] * 6, "velocity": []}, "not_finite"),
        ({"name": list(JOINT_NAMES), "position": [9.0] * 6, "velocity": [float("inf")] * 6}, "not_finite"),
    ],
)
def test_joint_states_that_are_not_whole_change_nothing(told: FakeDriver, changes: dict[str, Any], code: str) -> None:
    told.complaints._counters.clear()
    before = told.port.read()
    told.tell_joints(**changes)
    told.refused(code)
    after = told.port.read()
    assert before is not None
    assert after is not None
    # What stays the same grows old, and the motion core stops on that.
    assert after.stamp_s == before.stamp_s
    np.testing.assert_array_equal(after.positions, before.positions)


def test_joint_states_of_the_gripper_alone_are_no_fault(told: FakeDriver) -> None:
    told.complaints._counters.clear()
    told.tell_joints(name=[KNUCKLE], position=[0.8], velocity=[0.0])
    told.wait(lambda: (state := told.port.read()) is not None and state.gripper == 0.0, what="the gripper")
    assert "missing_joint" not in told.complaints.counters


@pytest.mark.fault(28)
def test_a_stop_of_the_program_is_not_overlooked_however_short(told: FakeDriver) -> None:
    told.running.publish(Bool(data=False))
    told.running.publish(Bool(data=True))
    told.wait(lambda: not told.port.read().program_running, what="the stop")  # type: ignore[union-attr]
    told.wait(lambda: told.port.read().program_running, what="the program")  # type: ignore[union-attr]


def test_a_motion_goes_out_with_names_and_no_stamp(told: FakeDriver) -> None:
    told.wait(lambda: told.port._trajectories.get_subscription_count(), what="the controller")
    told.port.send(JointMotion(np.array([0.04, 0.06]), np.stack([Q, Q])))
    told.wait(lambda: told.trajectories, what="the trajectory")
    message = told.trajectories[-1][1]
    assert tuple(message.joint_names) == JOINT_NAMES
    assert (message.header.stamp.sec, message.header.stamp.nanosec) == (0, 0)
    assert [point.time_from_start.nanosec for point in message.points] == [40_000_000, 60_000_000]
    np.testing.assert_allclose(message.points[-1].positions, Q)
    assert not message.points[0].velocities


@pytest.mark.parametrize(("opening", "knuckle"), [(1.0, 0.0), (0.0, 0.8), (0.25, 0.6)])
def test_the_gripper_is_told_in_radians(told: FakeDriver, opening: float, knuckle: float) -> None:
    count = len(told.grips)

    def gripped() -> bool:
        told.port.grip(opening)
        return len(told.grips) > count and told.grips[-1][1].data[0] == pytest.approx(knuckle)

    told.wait(gripped, what="the gripper's command")


def test_the_controllers_base_is_turned_into_base_link() -> None:
    message = PoseStamped()
    message.header.frame_id = "base"
    message.pose.position.x, message.pose.position.y, message.pose.position.z = 0.1, -0.2, 0.3
    half = float(np.sqrt(0.5))
    message.pose.orientation.z, message.pose.orientation.w = half, half  # a quarter turn about z
    position, quaternion = tcp_from_msg(message)
    np.testing.assert_allclose(position, [-0.1, 0.2, 0.3])
    # A quarter turn and half a turn: three quarters, (0, 0, sin 135, cos 135).
    np.testing.assert_allclose(quaternion, [0, 0, half, -half], atol=1e-12)


@pytest.mark.parametrize(
    ("frame", "w", "code"), [("world", 1.0, "bad_frame"), ("base", 0.0, "bad_pose"), ("base", float("nan"), "bad_pose")]
)
def test_a_tool_pose_that_means_something_else_is_refused(frame: str, w: float, code: str) -> None:
    message = PoseStamped()
    message.header.frame_id = frame
    message.pose.orientation.w = w
    with pytest.raises(SteerError) as refused:
        tcp_from_msg(message)
    assert refused.value.code == code
