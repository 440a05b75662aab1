"""A real LIBERO task as a robot: actions in, camera images and joint states out.

Invariant: an episode follows the benchmark's protocol (hard reset, official initial state, ten settling steps, the
suite's step limit, success as the task's own check after every step), and depends only on the constructor's arguments.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sim.benchmark import SETTLE_ACTION, SETTLE_STEPS, find_task, load_module, numpy_seed, quiet, step_limit
from sim.benchmark import use_software_rendering as use_software_rendering
from sim.benchmark import versions as versions
from steer_runtime.errors import SteerError
from steer_runtime.types import LIBERO_ACTION_SPACE, ActionSpace, Observation

CAMERAS: Mapping[str, str] = {"agentview": "agentview_image", "wrist": "robot0_eye_in_hand_image"}


@dataclass(frozen=True)
class RobotFrame:
    """What the robot shows after one control step.

    images: camera -> uint8 RGB [H, W, 3], none for a step that was not drawn; LIBERO's image turned by 180 degrees, as
    its policies saw it in training: upright, and the left-right mirror of what the camera sees (LIBERO hands out OpenGL's
    image upside down).
    joint_names, joint_positions, joint_velocities: the simulator's 9 joints, 7 of the arm (rad, rad/s), then 2 fingers
    (m, m/s; the second finger's sign is the simulator's, negative when open).
    eef_position [3]: grip site in the world frame, m. eef_quaternion [4]: x, y, z, w.
    gripper_qpos [2]: finger positions, m. state float64 [8]: eef_position, axis-angle (rad), gripper_qpos.
    step: control steps since the settled start. success: the task's check has passed at this step or before.
    done: success was `after_success` steps ago, or the suite's step limit is reached.
    """

    images: Mapping[str, np.ndarray]
    joint_names: tuple[str, ...]
    joint_positions: np.ndarray
    joint_velocities: np.ndarray
    eef_position: np.ndarray
    eef_quaternion: np.ndarray
    gripper_qpos: np.ndarray
    state: np.ndarray
    instruction: str
    step: int
    success: bool
    done: bool

    def observation(self, stamp_ns: int, frame_id: int) -> Observation:
        """The part of it that a policy sees."""
        return Observation(self.images, self.state, self.instruction, stamp_ns, frame_id)


class LiberoRobot:
    """One task of a LIBERO suite, stepped in lockstep by whoever holds it.

    All rendering calls must come from one thread and process, the one of the first `reset`: a GL context belongs to
    the thread that made it. `reset` rebuilds the scene (seconds), because soft resets do not give the same start.
    """

    action_space: ActionSpace = LIBERO_ACTION_SPACE

    def __init__(
        self,
        suite: str = "libero_object",
        task_id: int = 0,
        init_state_index: int = 0,
        *,
        camera_size: int = 256,
        seed: int = 0,
        max_steps: int | None = None,
        after_success: int = 0,
    ) -> None:
        """Look the task up; nothing is rendered yet.

        camera_size: pixels of both sides of both cameras. seed: of the simulator's placement sampler. max_steps: for a
        suite without a known limit. after_success: steps that an episode goes on after success, for the arm to let go and
        withdraw; the benchmark's protocol has none. Raises SteerError for an unknown suite ('unknown_suite'), a task or initial state
        out of range ('task_out_of_range', 'init_state_out_of_range') and missing packages ('no_libero').
        """
        if not 16 <= camera_size <= 1024:
            raise SteerError("bad_camera_size", f"camera size {camera_size} is not usable: expected 16 to 1024 pixels")
        task = find_task(suite, task_id)
        if not 0 <= init_state_index < len(task.initial_states):
            raise SteerError(
                "init_state_out_of_range",
                f"{suite} task {task_id} has no initial state {init_state_index}: "
                f"expected 0 to {len(task.initial_states) - 1}",
            )
        self._bddl, self._init_state = task.bddl, task.initial_states[init_state_index]
        self.suite, self.task_id, self.init_state_index = suite, task_id, init_state_index
        self.camera_size, self.seed = camera_size, seed
        self.after_success = after_success
        self.task_name: str = task.name
        self.instruction: str = task.instruction
        self.max_steps = step_limit(suite) if max_steps is None else max_steps
        self._env: Any = None
        self._owner: tuple[int, int] | None = None
        self._step = 0
        self._success_step: int | None = None
        self._draw = True
        self._counters = {"steps": 0, "clipped_actions": 0, "clipped_values": 0, "refused_actions": 0}

    @property
    def counters(self) -> Mapping[str, int]:
        """Counts of this robot's life: steps, clipped_actions, clipped_values, refused_actions."""
        return dict(self._counters)

    def reset(self) -> RobotFrame:
        """Start the episode again: hard reset, official initial state, settle. Returns the frame of step 0."""
        self._require_owner()
        # Seeded for every episode, so that one does not depend on those before it.
        with quiet(), numpy_seed(self.seed):
            fresh = self._env is None
            if fresh:
                self._env = self._make_env()
            # A scene that has just been built needs no second building: the start is bit-identical (tested).
            self._env.env.hard_reset = not fresh
            self._env.reset()
            self._make_drawing_optional()
            self._env.set_init_state(self._init_state)
        raw: Mapping[str, Any] = {}
        for _ in range(SETTLE_STEPS):
            raw = self._env.step(np.array(SETTLE_ACTION))[0]
        self._step, self._success_step = 0, None
        return self._frame(raw)

    def step(self, action: np.ndarray, *, draw: bool = True) -> RobotFrame:
        """Execute one action, float [7] in LIBERO_ACTION_SPACE units, for one control period (0.05 s).

        draw: False leaves the frame without images, which are nearly all that a step costs.
        Values outside [-1, 1] are clipped and counted. Raises SteerError for a wrong shape or NaN ('bad_action'),
        before the first reset ('not_reset') and after the step limit ('episode_over').
        """
        if self._env is None:
            raise SteerError("not_reset", "the episode has not started; call reset() first")
        self._require_owner()
        if self._step >= self.max_steps:
            raise SteerError(
                "episode_over", f"the episode has used all {self.max_steps} steps of {self.suite}; call reset() first"
            )
        try:
            given = np.asarray(action, dtype=np.float64)
        except (TypeError, ValueError):
            given = np.empty(0)
        if given.shape != (self.action_space.dims,) or not np.isfinite(given).all():
            self._counters["refused_actions"] += 1
            raise SteerError(
                "bad_action",
                f"action {_shown(action)} is not usable: expected {self.action_space.dims} finite numbers; "
                "nothing was moved",
            )
        clipped = np.clip(given, -1.0, 1.0)
        outside = int((clipped != given).sum())
        self._counters["clipped_values"] += outside
        self._counters["clipped_actions"] += outside > 0
        self._draw = draw
        try:
            raw = self._env.step(clipped)[0]
        finally:
            self._draw = True
        self._step += 1
        self._counters["steps"] += 1
        if self._success_step is None and bool(self._env.check_success()):
            self._success_step = self._step
        return self._frame(raw, drawn=draw)

    def close(self) -> None:
        """Free the simulator and its GL context. Harmless when nothing is open."""
        if self._env is not None:
            self._env.close()
            self._env = None

    def __enter__(self) -> LiberoRobot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def sim(self) -> Any:
        """robosuite's MjSim of the running episode, for those who measure. Raises SteerError before the first reset."""
        if self._env is None:
            raise SteerError("not_reset", "the episode has not started; call reset() first")
        return self._env.sim

    def _make_env(self) -> Any:
        load_module("robosuite")
        envs = load_module("libero.libero.envs")
        # ignore_done: robosuite would raise past its own horizon; the step limit here is the suite's.
        return envs.OffScreenRenderEnv(
            bddl_file_name=str(self._bddl),
            camera_heights=self.camera_size,
            camera_widths=self.camera_size,
            camera_names=["agentview", "robot0_eye_in_hand"],
            control_freq=int(self.action_space.rate_hz),
            ignore_done=True,
            hard_reset=True,
        )

    def _require_owner(self) -> None:
        me = (os.getpid(), threading.get_ident())
        if self._owner is None:
            self._owner = me
        elif self._owner != me:
            raise SteerError(
                "wrong_thread",
                "the simulator was started in another thread or process; call reset() and step() from that one only",
            )

    def _make_drawing_optional(self) -> None:
        """Have the cameras answer a blank picture, at their usual moments, while `_draw` is False.

        Switching their sensors off instead would let their clocks run apart from those of the other sensors.
        """

        def optional(draw: Callable[[Any], Any]) -> Callable[[Any], Any]:
            # Keeps the marks by which robosuite knows a sensor.
            @functools.wraps(draw)
            def sensor(cache: Any) -> Any:
                return draw(cache) if self._draw else blank

            return sensor

        blank = np.zeros((self.camera_size, self.camera_size, 3), np.uint8)
        self._draw = False
        try:
            for key in CAMERAS.values():
                observable = self._env.env._observables[key]
                # A hard reset makes new sensors, a soft one keeps ours.
                if not hasattr(observable._sensor, "__wrapped__"):
                    # robosuite asks the new sensor once, for the shape of what it gives.
                    self._env.env.modify_observable(key, "sensor", optional(observable._sensor))
        finally:
            self._draw = True

    def _frame(self, raw: Mapping[str, Any], drawn: bool = True) -> RobotFrame:
        transform = load_module("robosuite.utils.transform_utils")
        robot = self._env.robots[0]
        names = (*robot.robot_joints, *robot.gripper.joints)
        success = self._success_step
        position = np.array(raw["robot0_eef_pos"], dtype=np.float64)
        quaternion = np.array(raw["robot0_eef_quat"], dtype=np.float64)
        fingers = np.array(raw["robot0_gripper_qpos"], dtype=np.float64)
        # No antipodal flip of the quaternion: policies were trained without one. The function writes into its input.
        axis_angle = transform.quat2axisangle(quaternion.copy())
        return RobotFrame(
            images={n: np.ascontiguousarray(raw[key][::-1, ::-1]) for n, key in CAMERAS.items()} if drawn else {},
            joint_names=names,
            # All from one sampling of robosuite's sensors: the simulator itself has moved on by a substep (2 ms).
            joint_positions=np.concatenate([raw["robot0_joint_pos"], fingers]).astype(np.float64),
            joint_velocities=np.concatenate([raw["robot0_joint_vel"], raw["robot0_gripper_qvel"]]).astype(np.float64),
            eef_position=position,
            eef_quaternion=quaternion,
            gripper_qpos=fingers,
            state=np.concatenate([position, axis_angle, fingers]),
            instruction=self.instruction,
            step=self._step,
            success=success is not None,
            done=self._step >= self.max_steps or (success is not None and self._step >= success + self.after_success),
        )


def _shown(action: object) -> str:
    shape = getattr(action, "shape", None)
    return f"of shape {list(shape)}" if shape not in (None, (7,)) else repr(action)[:120]
