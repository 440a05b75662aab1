"""`steer demo --robot ur5`: the same policy and commands on a simulated UR5e, through the bridge that a real one gets.

Invariant: the arm moves only because the bridge was armed, and whether it kept its limits is read from the arm's own
peaks and log.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image
from std_msgs.msg import Float64MultiArray, String
from std_srvs.srv import SetBool, Trigger
from steer_msgs.msg import RobotDescription as RobotDescriptionMsg

from arm.settings import ArmSettings, load_settings
from ros_nodes.children import Children
from ros_nodes.client import SteeringClient
from ros_nodes.convert import Camera, description_from_msg, image_from_msg, ns_from_time
from ros_nodes.demo import STEP_S, DemoRun, demo_versions, is_due, read_trace, send_command
from ros_nodes.demo_config import CommandSpec, Ur5DemoConfig
from ros_nodes.qos import LATCHED, SENSOR
from ros_nodes.recorder import Recorder
from sim.libero_robot import LiberoRobot
from sim.outcomes import SentCommand, outcomes
from sim.ur5 import run_report
from sim.ur5.names import HAND_YAW_RAD, PANDA_BASE_M
from sim.ur5.run import ArmRun, Ceilings, Stop
from sim.ur5.truth import read_motion
from steer_runtime.directions.direction import Axis, Direction
from steer_runtime.errors import SteerError
from steer_runtime.types import ActionSpace

ARM_S = 60.0
"""Limit for arming: the arm has to stand still and its state has to be fresh."""
MOST_STOPS = 10


class ArmRecorder(Recorder):
    """Chunks and commands as of every robot, without its frames; pictures from the cameras themselves, the bridge's state,
    the stand-in's peaks.

    pictures: name -> stamp (ns) -> uint8 RGB [H, W, 3].
    """

    def __init__(self, size: int, *, domain_id: int) -> None:
        super().__init__(domain_id=domain_id)
        self.pictures: dict[str, dict[int, np.ndarray]] = {"agentview": {}, "wrist": {}}
        self.arm_state: dict[str, Any] = {}
        self.stops: list[Stop] = []
        self.peaks: np.ndarray | None = None
        self.recording = False
        listen = self._node.create_subscription
        for name in self.pictures:
            listen(Image, f"/{name}/image_raw", self._kept(self._picture_of(Camera(name, size, size))), SENSOR)
        listen(String, "arm_state", self._kept(self._on_arm_state), LATCHED)
        listen(Float64MultiArray, "/ur5_standin/peaks", self._kept(self._on_peaks), QoSProfile(depth=10))

    def __enter__(self) -> ArmRecorder:
        return self

    def begin(self) -> None:
        """From here on it counts: forget the chunks of the dry run."""
        with self._changed:
            for kept in (self.actions, self.chunks, self.said, self.ages_s, self.stops):
                kept.clear()  # type: ignore[attr-defined]
            self.recording = True

    def fresh_peaks(self, timeout: float) -> np.ndarray:
        """Peaks told from now on. Raises SteerError('no_peaks')."""
        with self._changed:
            self.peaks = None
        if not self.wait(lambda: self.peaks is not None, timeout):
            raise SteerError("no_peaks", f"the stand-in told no peaks within {timeout:g} s; see its log")
        assert self.peaks is not None
        return self.peaks

    def _on_description(self, message: RobotDescriptionMsg) -> None:
        self._description = self._description or description_from_msg(message)

    def _picture_of(self, camera: Camera) -> Any:
        def keep(message: Image) -> None:
            if self.recording:
                self.pictures[camera.name][ns_from_time(message.header.stamp)] = image_from_msg(message, camera).copy()

        return keep

    def _on_arm_state(self, message: String) -> None:
        before, self.arm_state = self.arm_state, json.loads(message.data)
        if self.recording and self.arm_state["mode"] == "stopped" and before.get("mode") != "stopped":
            self.stops.append(Stop(time.monotonic(), self.arm_state["code"], self.arm_state["sentence"]))

    def _on_peaks(self, message: Float64MultiArray) -> None:
        self.peaks = np.array(message.data)


class Ur5DemoRun(DemoRun):
    """The parts of one run, in the order in which they happen."""

    config: Ur5DemoConfig

    def run(self) -> tuple[Path, tuple[str, ...]]:
        """Run it. Returns the report's path and a sentence for everything that went wrong."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.trace_path.unlink(missing_ok=True)
        log = self.out / "motion.npz"
        environment = {"ROS_DOMAIN_ID": str(self.domain_id)}
        config = self.config
        instruction = LiberoRobot(config.suite, config.task_id, config.init_state_index).instruction
        with Children(self.out / "logs", environment) as children:
            self._start_arm(children, log)
            with self.stages.stage("loading policy, finding directions"):
                policy = self._load_policy()
                directions, axes = self._make_directions(policy)
            self._start_bridge(children, instruction, policy.action_space)
            self._start_policy(children, directions)
            with (
                ArmRecorder(config.camera_size, domain_id=self.domain_id) as recorder,
                SteeringClient(source="steer-demo", domain_id=self.domain_id) as client,
            ):
                with self.stages.stage("starting arm, bridge and policy node"):
                    self._wait_until_acting(children, client, recorder)
                    client.ask(Trigger, "/ur5_standin/reset_peaks", Trigger.Request(), STEP_S)
                    self._arm(children, client, recorder)
                    recorder.begin()
                begin_s = time.monotonic()
                with self.stages.stage("moving", self.config.steps) as advance:
                    sent, unsent = self._steer(children, client, recorder, directions, axes, advance)
                end_s = time.monotonic()
                client.ask(SetBool, "ur5_bridge/arm", SetBool.Request(data=False), STEP_S)
                peaks = recorder.fresh_peaks(STEP_S)
            for name in ("policy", "bridge", "standin"):
                children.stop(name)
        with self.stages.stage("drawing video and plot"):
            run = self._record_arm(policy, instruction, recorder, sent, unsent, peaks, (begin_s, end_s), log)
            path = run_report.write(run, self.out)
            # float32 [control steps, dims]: what the policy asked for.
            np.save(self.out / "actions.npy", np.concatenate(recorder.chunks))
        return path, run.faults

    def _start_arm(self, children: Children, log: Path) -> None:
        config = self.config
        scene = {"scene": config.suite, "task_id": config.task_id, "init_state_index": config.init_state_index}
        cameras = {"camera_size": config.camera_size, "camera_hz": config.camera_hz}
        children.start("standin", "ros_nodes.ur5_standin_node", {**scene, **cameras, "log": str(log)})

    def _start_bridge(self, children: Children, instruction: str, space: ActionSpace) -> None:
        config = self.config
        declared = {
            "action_kind": space.kind,
            "action_rotation": space.rotation,
            "action_frame": space.frame,
            "action_dims": space.dims,
            "position_scale_m": space.position_scale_m,
            "rotation_scale_rad": space.rotation_scale_rad,
            "rate_hz": space.rate_hz,
            "gripper_open": space.gripper_open,
            "gripper_close": space.gripper_close,
        }
        limits = {
            "instruction": instruction,
            "motion_scale": config.motion_scale,
            # Pictures come less often than control steps, and an inference on this processor takes longer than either.
            "camera_timeout_s": 4.0 / config.camera_hz,
            "max_action_age_s": 10.0,
            "owner_timeout_s": STEP_S,
        }
        # LIBERO's state is in its world, and its hand has other axes than the TCP.
        x, y, z = PANDA_BASE_M
        frame = {
            "state_offset_x_m": x,
            "state_offset_y_m": y,
            "state_offset_z_m": z,
            "state_tool_yaw_rad": HAND_YAW_RAD,
        }
        children.start("bridge", "ros_nodes.ur5_bridge_node", {**declared, **frame, **limits})

    def _arm(self, children: Children, client: SteeringClient, recorder: ArmRecorder) -> None:
        deadline = time.monotonic() + ARM_S
        while True:
            answer = client.ask(SetBool, "ur5_bridge/arm", SetBool.Request(data=True), STEP_S)
            if answer.success:
                break
            children.check()
            if time.monotonic() > deadline:
                raise SteerError("not_armed", f"the bridge did not arm within {ARM_S:g} s: {answer.message}")
            # After a protective stop, as somebody at the pendant would; both are refused while there is nothing to do.
            for name in ("unlock_protective_stop", "play"):
                client.ask(Trigger, f"/dashboard_client/{name}", Trigger.Request(), STEP_S)
            recorder.wait(lambda: False, 0.2)

    def _steer(
        self,
        children: Children,
        client: SteeringClient,
        recorder: ArmRecorder,
        directions: Sequence[Direction],
        axes: Sequence[Axis],
        advance: Any,
    ) -> tuple[list[SentCommand], list[CommandSpec]]:
        """Send each command at its moment until the run is over; those whose moment did not come are second.

        A stop of the bridge is answered as an operator would, by arming again, MOST_STOPS times.
        """
        pending, sent, stops = list(self.config.commands), [], 0
        while recorder.commanded < self.config.steps:
            inferences = len(recorder.actions)
            if not recorder.wait(
                lambda n=inferences, s=stops: len(recorder.actions) > n or len(recorder.stops) > s,  # type: ignore[misc]
                STEP_S,
            ):
                children.check()
                raise SteerError("no_action", f"no action came for {STEP_S:g} s; see {self.out / 'logs'}")
            if len(recorder.stops) > stops:
                stops = len(recorder.stops)
                if stops > MOST_STOPS:
                    break
                self._arm(children, client, recorder)
            advance(min(recorder.commanded, self.config.steps))
            for spec in [spec for spec in pending if is_due(spec, recorder)]:
                pending.remove(spec)
                sent.append(send_command(client, spec, recorder.commanded, directions, axes))
        return sent, pending

    def _record_arm(
        self,
        policy: Any,
        instruction: str,
        recorder: ArmRecorder,
        sent: Sequence[SentCommand],
        unsent: Sequence[CommandSpec],
        peaks: np.ndarray,
        span_s: tuple[float, float],
        log: Path,
    ) -> ArmRun:
        motion = read_motion(log)
        clock_s = time.time() - time.monotonic()
        begin_s, end_s = span_s
        stamps = sorted(set(recorder.pictures["agentview"]) & set(recorder.pictures["wrist"]))
        stamps = [stamp for stamp in stamps if begin_s <= stamp / 1e9 - clock_s <= end_s]
        if not stamps:
            raise SteerError(
                "no_pictures", "no picture of both cameras came while the arm moved; see the stand-in's log"
            )
        inside = (motion.time_s >= begin_s) & (motion.time_s <= end_s)
        heights = motion.things[inside][:, :, 2]
        # The thing that the instruction names, else the one that was lifted most.
        named = [index for index, name in enumerate(motion.names) if _spoken(name) in instruction]
        chosen = named[0] if named else int(np.argmax(np.ptp(heights, axis=0)))
        return ArmRun(
            policy=policy.name,
            trained=policy.trained,
            instruction=instruction,
            motion_scale=self.config.motion_scale,
            clock_s=clock_s,
            begin_s=begin_s,
            end_s=end_s,
            rows=recorder.commanded,
            inferences=len(recorder.actions),
            commands=outcomes(sent, recorder.actions, (), read_trace(self.trace_path)),
            unsent=tuple(f"{spec.label} ({spec.moment})" for spec in unsent),
            stops=tuple(recorder.stops),
            ceilings=_ceilings(load_settings("ur5e")),
            peaks=peaks,
            motion=motion,
            picture_s=np.array([stamp / 1e9 - clock_s for stamp in stamps]),
            pictures={name: [taken[stamp] for stamp in stamps] for name, taken in recorder.pictures.items()},
            lifted_m=float(heights[:, chosen].max() - heights[0, chosen]),
            target=_spoken(motion.names[chosen]),
            versions=demo_versions(self.gl),
        )


def _ceilings(settings: ArmSettings) -> Ceilings:
    limits = settings.limits
    return Ceilings(limits.tcp_speed_m_s, limits.joint_speed_rad_s, limits.joint_acceleration_rad_s2)


def _spoken(joint: str) -> str:
    """What an instruction calls the thing of a LIBERO joint: `orange_juice_1_joint0` is the orange juice."""
    return joint.rsplit("_", 2)[0].replace("_", " ")
