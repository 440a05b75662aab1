"""A simulated UR5e behind the topics, types and habits of Universal_Robots_ROS2_Driver, for everything but its safety system.

Invariant: whatever can be said to the real driver can be said to this node by the same names, and nothing else moves the
arm; its own levers and what it knows of the truth are private (`~/`).

The arm is a process of its own (sim.ur5.process): killing this node is the driver dying, and the arm stops by itself.

| real names | |
|---|---|
| `/joint_states` | 125 Hz, alphabetical, the gripper's knuckle among them |
| `/io_and_status_controller/robot_program_running` | latched |
| `/speed_scaling_state_broadcaster/speed_scaling` | percent |
| `/tcp_pose_broadcaster/pose` | in the controller's frame `base` |
| `/scaled_joint_trajectory_controller/joint_trajectory`, `/forward_position_controller/commands`, `/forward_velocity_controller/commands` | the one that the parameter `controller` names is listened to |
| `/gripper_position_controller/commands` | knuckle, rad |
| `/dashboard_client/play`, `stop`, `unlock_protective_stop`, `/io_and_status_controller/resend_robot_program` | services |
| `/<view>/image_raw` | rgb8, all of one stamp |

| its own | |
|---|---|
| `~/protective_stop`, `~/reset_peaks` | services |
| `~/speed_slider` | percent |
| `~/peaks` | latched: joint speeds [6], joint accelerations [6], TCP speed since the reset; see sim.ur5.truth |
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from geometry_msgs.msg import PoseStamped
from rcl_interfaces.msg import SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Bool, Float64, Float64MultiArray, Header
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from ros_nodes.convert import image_to_msg, ns_from_time, pose_to_msg, time_from_ns
from ros_nodes.guard import Complaints, guarded
from ros_nodes.parameters import declare, parameter
from ros_nodes.process import serve
from ros_nodes.qos import LATCHED, SENSOR
from sim.benchmark import use_software_rendering
from sim.ur5.names import CONTROLLERS, JOINTS, POSITION, SCENES, TRAJECTORY, UNLOCK_DELAY_S, VELOCITY
from steer_runtime.errors import SteerError

if TYPE_CHECKING:  # MuJoCo is loaded once the node has chosen how it draws
    from sim.ur5.process import Report
    from sim.ur5.scene import Scene

KNUCKLE = "robotiq_85_left_knuckle_joint"
STATE_NAMES = tuple(sorted((*JOINTS, KNUCKLE)))
"""As the real broadcaster sends them: not in kinematic order."""
_CONTROLLER_QOS = QoSProfile(depth=10)
_PEAKS_S = 0.1


@dataclass(frozen=True)
class StandinParameters:
    """Parameters of the stand-in."""

    scene: str = parameter("table", "what stands around the arm", choices=SCENES)
    task_id: int = parameter(0, "task of the scene libero_object", low=0, high=9)
    init_state_index: int = parameter(0, "initial state of that task", low=0, high=1000)
    meshes: bool = parameter(True, "false: the arm is drawn as capsules, which starts and draws faster")
    controller: str = parameter(TRAJECTORY, "controller that is active", choices=CONTROLLERS, live=True)
    playing: bool = parameter(True, "whether the robot program runs from the start")
    unlock_delay_s: float = parameter(UNLOCK_DELAY_S, "a protective stop cannot be unlocked sooner", low=0.0, high=60.0)
    camera_size: int = parameter(256, "pixels of both sides of the pictures; 0: no cameras", low=0, high=1024)
    camera_hz: float = parameter(20.0, "pictures a second", low=0.1, high=100.0)
    log: str = parameter("", "file (.npz) for what the arm really did; empty: none")


class Ur5StandinNode(Node):
    """The node `ur5_standin`."""

    def __init__(self, **node_options: Any) -> None:
        """Raises SteerError for parameters and scenes that do not exist."""
        from sim.ur5.process import ArmProcess
        from sim.ur5.scenes import build_scene

        super().__init__("ur5_standin", **node_options)
        self.exit_code: int | None = None
        self.interruptible = True
        self.complaints = Complaints(self)
        settings = self._settings = declare(self, StandinParameters)
        self._scene = build_scene(
            settings.scene, task_id=settings.task_id, init_state_index=settings.init_state_index, meshes=settings.meshes
        )
        log = Path(settings.log) if settings.log else None
        self._arm = ArmProcess(self._scene, log, playing=settings.playing, unlock_delay_s=settings.unlock_delay_s)
        if settings.controller != TRAJECTORY:
            self._arm.ask("activate", settings.controller)
        self._running: bool | None = None
        self._stopped = False
        self._peaks_s = 0.0
        self._publish_and_listen()
        self._photographer = _Photographer(self, self._scene, settings) if settings.camera_size else None
        self.add_on_set_parameters_callback(self._on_parameters)
        # Twice as often as the arm reports, so that a report waits for 4 ms at most.
        self.create_timer(0.004, self._tick)

    def close(self) -> None:
        """The arm stops by itself once it is let go of."""
        if self._photographer is not None:
            self._photographer.close()
        self._arm.close()

    def _publish_and_listen(self) -> None:
        make, hear = self.create_publisher, self.create_subscription
        self._joints_pub = make(JointState, "/joint_states", _CONTROLLER_QOS)
        self._running_pub = make(Bool, "/io_and_status_controller/robot_program_running", LATCHED)
        self._scaling_pub = make(Float64, "/speed_scaling_state_broadcaster/speed_scaling", _CONTROLLER_QOS)
        self._pose_pub = make(PoseStamped, "/tcp_pose_broadcaster/pose", _CONTROLLER_QOS)
        self._peaks_pub = make(Float64MultiArray, "~/peaks", LATCHED)
        hear(JointTrajectory, f"/{TRAJECTORY}/joint_trajectory", self._on_trajectory, _CONTROLLER_QOS)
        hear(Float64MultiArray, f"/{POSITION}/commands", self._on_position, _CONTROLLER_QOS)
        hear(Float64MultiArray, f"/{VELOCITY}/commands", self._on_velocity, _CONTROLLER_QOS)
        hear(Float64MultiArray, "/gripper_position_controller/commands", self._on_gripper, _CONTROLLER_QOS)
        hear(Float64, "~/speed_slider", self._on_slider, _CONTROLLER_QOS)
        for name, order in (
            ("/dashboard_client/play", "play"),
            ("/dashboard_client/stop", "stop"),
            ("/dashboard_client/unlock_protective_stop", "unlock"),
            ("/io_and_status_controller/resend_robot_program", "play"),
            ("~/protective_stop", "stop_protectively"),
            ("~/reset_peaks", "reset_peaks"),
        ):
            self.create_service(Trigger, name, self._obeying(order))

    # -- out ----------------------------------------------------------------------------------------------------------

    @guarded
    def _tick(self) -> None:
        try:
            report = self._arm.read()
        except SteerError as error:
            self.get_logger().error(error.sentence)
            self.exit_code = 1
            return
        for refused in self._arm.refusals():
            self.complaints.refuse(refused)
        if report is None:
            return
        stamp = time_from_ns(_wall_ns(report.time_s))
        told = dict(zip(JOINTS, zip(report.positions, report.velocities, strict=True), strict=True))
        told[KNUCKLE] = (report.gripper, 0.0)
        self._joints_pub.publish(
            JointState(
                header=Header(stamp=stamp),
                name=list(STATE_NAMES),
                position=[float(told[name][0]) for name in STATE_NAMES],
                velocity=[float(told[name][1]) for name in STATE_NAMES],
                effort=[0.0] * len(STATE_NAMES),
            )
        )
        self._pose_pub.publish(pose_to_msg(report.tcp_position, report.tcp_quaternion, stamp, "base"))
        self._scaling_pub.publish(Float64(data=100.0 * float(report.speed_scaling)))
        if report.program_running != self._running:
            self._running = report.program_running
            self._running_pub.publish(Bool(data=report.program_running))
        if report.protective_stop and not self._stopped:
            self.get_logger().warning(
                "protective stop: a joint was at its largest torque, as when the arm pushes against something, or it was asked for"
            )
        self._stopped = report.protective_stop
        if report.time_s - self._peaks_s >= _PEAKS_S:
            self._peaks_s = report.time_s
            self._peaks_pub.publish(Float64MultiArray(data=report.peaks.tolist()))
        if report.lost_s > 0:
            self.complaints.warn(
                "lost_time", f"the arm has lost {report.lost_s:.2f} s: this machine is too busy for it"
            )
        if self._photographer is not None:
            self._photographer.newest = report

    # -- in -----------------------------------------------------------------------------------------------------------

    @guarded
    def _on_trajectory(self, message: JointTrajectory) -> None:
        if sorted(message.joint_names) != sorted(JOINTS):
            raise SteerError(
                "bad_trajectory",
                f"trajectory is for joints {list(message.joint_names)[:8]}: expected {', '.join(JOINTS)}, in any order",
            )
        order = [list(message.joint_names).index(name) for name in JOINTS]
        points = message.points
        times = [point.time_from_start.sec + point.time_from_start.nanosec / 1e9 for point in points]
        parts = [_part(points, name, order) for name in ("positions", "velocities", "accelerations")]
        start_ns = ns_from_time(message.header.stamp)
        start_s = None if start_ns == 0 else time.monotonic() - (time.time_ns() - start_ns) / 1e9
        self._arm.order("follow", start_s, times, *parts)

    @guarded
    def _on_position(self, message: Float64MultiArray) -> None:
        self._arm.order("move_to", list(message.data))

    @guarded
    def _on_velocity(self, message: Float64MultiArray) -> None:
        self._arm.order("move_at", list(message.data))

    @guarded
    def _on_gripper(self, message: Float64MultiArray) -> None:
        if len(message.data) != 1:
            raise SteerError("bad_command", f"gripper command has {len(message.data)} numbers: expected 1, rad")
        self._arm.order("grip", message.data[0])

    @guarded
    def _on_slider(self, message: Float64) -> None:
        self._arm.order("slide", message.data / 100.0)

    def _obeying(self, order: str) -> Any:
        def serve_trigger(request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
            try:
                self._arm.ask(order)
            except SteerError as error:
                response.success, response.message = False, error.sentence
            else:
                response.success, response.message = True, order
            return response

        return serve_trigger

    def _on_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        for changed in parameters:
            if changed.name == "controller":
                try:
                    self._arm.ask("activate", changed.value)
                except SteerError as error:
                    return SetParametersResult(successful=False, reason=error.sentence)
        return SetParametersResult(successful=True)


class _Photographer:
    """Draws and publishes the newest report's pictures in a thread of its own: drawing takes longer than a report may."""

    def __init__(self, node: Ur5StandinNode, scene: Scene, settings: StandinParameters) -> None:
        self.newest: Report | None = None
        self._node, self._scene, self._size = node, scene, settings.camera_size
        self._period_s = 1.0 / settings.camera_hz
        self._publishers = {name: node.create_publisher(Image, f"/{name}/image_raw", SENSOR) for name in scene.views}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ending.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        from sim.ur5.cameras import Cameras

        cameras = Cameras(self._scene, self._size)
        due, drawn_s = time.monotonic(), 0.0
        while not self._ending.wait(max(0.001, due - time.monotonic())):
            report = self.newest
            if report is None or report.time_s == drawn_s:
                continue
            drawn_s = report.time_s
            due = max(due + self._period_s, time.monotonic())
            stamp = time_from_ns(_wall_ns(report.time_s))
            for name, image in cameras.draw(report.qpos).items():
                self._publishers[name].publish(image_to_msg(image, stamp, f"{name}_optical_frame"))
        cameras.close()


def _part(points: list[JointTrajectoryPoint], name: str, order: list[int]) -> list[list[float]] | None:
    """One derivative of all points in kinematic order; None where no point states it. Raises SteerError('bad_trajectory')."""
    rows = [getattr(point, name) for point in points]
    if name != "positions" and not any(len(row) for row in rows):
        return None
    if any(len(row) != len(order) for row in rows):
        raise SteerError(
            "bad_trajectory",
            f"a point of the trajectory has not {len(order)} {name}; state them for every joint and point",
        )
    return [[float(row[index]) for index in order] for row in rows]


def _wall_ns(steady_s: float) -> int:
    """A moment of the steady clock on the wall clock."""
    return time.time_ns() - round((time.monotonic() - steady_s) * 1e9)


def _make() -> Ur5StandinNode:
    return Ur5StandinNode()


def main(args: list[str] | None = None) -> NoReturn:
    """Entry point of the process."""
    # llvmpipe would draw with a thread a processor and hold up the arm's reports by 30 ms; in its own thread, by 10.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    use_software_rendering()
    serve(_make, args)


if __name__ == "__main__":
    main()
