"""LiberoRobot against the real benchmark, rendered in software."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from sim.libero_robot import SETTLE_STEPS, LiberoRobot, RobotFrame, use_software_rendering, versions
from steer_runtime.errors import SteerError
from steer_runtime.types import LIBERO_ACTION_SPACE

STILL = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)


@pytest.fixture(scope="module", autouse=True)
def _renderer() -> None:
    use_software_rendering()


@pytest.fixture(scope="module")
def started() -> Iterator[tuple[LiberoRobot, RobotFrame]]:
    """One robot and the first frame of its first episode; building a scene takes seconds."""
    with LiberoRobot("libero_object", 0, 0) as robot:
        yield robot, robot.reset()


@pytest.fixture
def robot(started: tuple[LiberoRobot, RobotFrame]) -> LiberoRobot:
    return started[0]


@pytest.fixture
def first(started: tuple[LiberoRobot, RobotFrame]) -> RobotFrame:
    return started[1]


@pytest.fixture
def fresh(started: tuple[LiberoRobot, RobotFrame]) -> RobotFrame:
    """The robot at step 0; a reset takes seconds, so it is done only when another test has moved it."""
    robot, first = started
    return first if robot._env.env.timestep == SETTLE_STEPS else robot.reset()


def test_first_frame_has_the_promised_shapes_and_types(first: RobotFrame) -> None:
    assert {k: (v.shape, v.dtype.name) for k, v in first.images.items()} == {
        "agentview": ((256, 256, 3), "uint8"),
        "wrist": ((256, 256, 3), "uint8"),
    }
    assert len(first.joint_names) == len(first.joint_positions) == len(first.joint_velocities) == 9
    assert first.state.dtype == np.float64
    assert first.state.shape == (8,)
    assert (first.step, first.success, first.done) == (0, False, False)
    assert first.instruction == "pick up the alphabet soup and place it in the basket"


def test_second_reset_starts_bit_identically(robot: LiberoRobot, first: RobotFrame) -> None:
    robot.step(np.array([0.4, -0.3, 0.2, 0.1, 0, 0, 1], np.float32))
    again = robot.reset()
    assert np.array_equal(first.state, again.state)
    assert all(np.array_equal(first.images[k], again.images[k]) for k in first.images)


def test_episode_settles_for_ten_steps_before_step_zero(robot: LiberoRobot, fresh: RobotFrame) -> None:
    # robosuite counts control steps since its reset.
    assert robot._env.env.timestep == SETTLE_STEPS == 10


def test_images_are_mujocos_own_view_mirrored_left_to_right(robot: LiberoRobot, fresh: RobotFrame) -> None:
    import mujoco

    frame = fresh
    model, data = robot.sim.model._model, robot.sim.data._data
    visual_only = mujoco.MjvOption()
    visual_only.geomgroup[0] = 0
    for camera, name in (("agentview", "agentview"), ("robot0_eye_in_hand", "wrist")):
        with mujoco.Renderer(model, 256, 256) as renderer:
            renderer.update_scene(data, camera, visual_only)
            view = renderer.render().astype(float)
        error = {
            "mirrored": np.abs(view[:, ::-1] - frame.images[name]).mean(),
            "upright": np.abs(view - frame.images[name]).mean(),
            "upside down": np.abs(view[::-1] - frame.images[name]).mean(),
        }
        assert error["mirrored"] < 0.5
        assert min(error["upright"], error["upside down"]) > 10


def test_state_is_the_simulators_pose_without_antipodal_flip(robot: LiberoRobot, fresh: RobotFrame) -> None:
    from robosuite.utils.transform_utils import axisangle2quat

    frame = fresh
    site = robot.sim.model.site_name2id("gripper0_grip_site")
    # Sensors are sampled one substep (2 ms) before the simulator's present state.
    assert np.allclose(frame.eef_position, robot.sim.data.site_xpos[site], atol=1e-3)
    assert np.array_equal(frame.state[:3], frame.eef_position)
    assert np.array_equal(frame.state[6:], frame.gripper_qpos)
    assert np.allclose(axisangle2quat(frame.state[3:6]), frame.eef_quaternion, atol=1e-6)
    assert np.linalg.norm(frame.state[3:6]) > 3.0  # the home pose points down: a flip would turn its sign, not its size
    assert frame.state[3] > 0


def test_full_action_moves_up_and_one_closes_the_gripper(robot: LiberoRobot, fresh: RobotFrame) -> None:
    before = fresh
    for _ in range(4):
        after = robot.step(np.array([0, 0, 1, 0, 0, 0, 1], np.float32))
    assert after.eef_position[2] - before.eef_position[2] > 0.02
    assert after.gripper_qpos[0] < before.gripper_qpos[0] - 0.005
    assert after.step == 4


def test_values_outside_one_are_clipped_and_counted(robot: LiberoRobot) -> None:
    robot.reset()
    before = robot.counters
    wild = robot.step(np.array([3, -7, 0, 0, 0, 0, -1], np.float32))
    assert robot.counters["clipped_values"] - before["clipped_values"] == 2
    assert robot.counters["clipped_actions"] - before["clipped_actions"] == 1
    robot.reset()
    assert np.array_equal(robot.step(np.array([1, -1, 0, 0, 0, 0, -1], np.float32)).state, wild.state)


@pytest.mark.parametrize(
    "action", [np.zeros(6), np.zeros((1, 7)), np.array([np.nan, 0, 0, 0, 0, 0, 0]), np.full(7, np.inf), "left", None]
)
def test_unusable_action_is_refused_and_moves_nothing(robot: LiberoRobot, action: object) -> None:
    before = robot.sim.get_state().flatten()
    with pytest.raises(SteerError, match="expected 7 finite numbers"):
        robot.step(action)  # type: ignore[arg-type]
    assert np.array_equal(robot.sim.get_state().flatten(), before)


def test_step_limit_ends_the_episode(robot: LiberoRobot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robot, "max_steps", 2)
    robot.reset()
    assert not robot.step(STILL).done
    assert robot.step(STILL).done
    with pytest.raises(SteerError, match="used all 2 steps"):
        robot.step(STILL)


def test_success_is_the_tasks_own_check(robot: LiberoRobot, fresh: RobotFrame) -> None:
    assert not robot.step(STILL).success
    data = robot.sim.data
    basket = data.get_body_xpos("basket_1_main")
    pose = data.get_joint_qpos("alphabet_soup_1_joint0").copy()
    pose[:3] = basket + np.array([0, 0, 0.08])
    data.set_joint_qpos("alphabet_soup_1_joint0", pose)
    robot.sim.forward()
    frames = [robot.step(STILL) for _ in range(5)]
    assert frames[-1].success
    assert frames[-1].done


def test_step_that_is_not_drawn_moves_the_same_and_the_next_picture_is_its_own(
    robot: LiberoRobot, fresh: RobotFrame
) -> None:
    move = np.array([0.4, -0.3, -0.2, 0, 0, 0, 1], np.float32)
    drawn = [robot.step(move) for _ in range(3)]
    robot.reset()
    seen = [robot.step(move, draw=draw) for draw in (False, False, True)]
    assert [set(frame.images) for frame in seen] == [set(), set(), {"agentview", "wrist"}]
    assert all(np.array_equal(a.state, b.state) for a, b in zip(drawn, seen, strict=True))
    assert all(np.array_equal(drawn[-1].images[name], seen[-1].images[name]) for name in seen[-1].images)


def test_episode_goes_on_after_success_for_as_long_as_asked(
    robot: LiberoRobot, fresh: RobotFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robot, "after_success", 2)
    monkeypatch.setattr(robot._env, "check_success", lambda: robot.counters["steps"] == begun + 2)
    begun = robot.counters["steps"]
    frames = [robot.step(STILL, draw=False) for _ in range(4)]
    assert [(frame.success, frame.done) for frame in frames] == [
        (False, False), (True, False), (True, False), (True, True),
    ]  # fmt: skip


def test_another_thread_is_refused(robot: LiberoRobot) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool, pytest.raises(SteerError, match="another thread"):
        pool.submit(robot.step, STILL).result()


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("libero_objekt", 0, 0), "unknown_suite", "libero_object"),
        (("libero_object", 10, 0), "task_out_of_range", "0 to 9"),
        (("libero_object", -1, 0), "task_out_of_range", "0 to 9"),
        (("libero_object", 0, 50), "init_state_out_of_range", "0 to 49"),
        (("libero_object", 0, -1), "init_state_out_of_range", "0 to 49"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_range(arguments: tuple, code: str, named: str) -> None:
    with pytest.raises(SteerError, match=named) as error:
        LiberoRobot(*arguments)
    assert error.value.code == code


@pytest.mark.parametrize(
    ("suite", "limit"),
    [("libero_spatial", 220), ("libero_object", 280), ("libero_goal", 300), ("libero_10", 520), ("libero_90", 400)],
)
def test_every_suite_has_its_step_limit(suite: str, limit: int) -> None:
    robot = LiberoRobot(suite, 0, 0)
    assert (robot.max_steps, robot.action_space) == (limit, LIBERO_ACTION_SPACE)


def test_step_before_reset_is_refused() -> None:
    with pytest.raises(SteerError, match=r"call reset\(\) first"):
        LiberoRobot().step(STILL)


def test_versions_name_what_decides_a_result(first: RobotFrame) -> None:
    import mujoco

    found = versions()
    assert found["mujoco"] == mujoco.__version__
    assert found["gl_backend"] in ("osmesa", "egl")


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    clean = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    return subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, timeout=120
    )


def test_missing_gl_library_is_one_sentence() -> None:
    code = (
        "import ctypes.util; ctypes.util.find_library = lambda name: None\n"
        "from sim.libero_robot import use_software_rendering\n"
        "from steer_runtime.errors import SteerError\n"
        "try: use_software_rendering()\n"
        "except SteerError as e: print(e.code, e)"
    )
    out = _python(code).stdout
    assert out.startswith("no_gl ")
    assert "libosmesa6" in out


def test_choosing_a_renderer_after_mujoco_is_refused() -> None:
    code = (
        "import mujoco\nfrom sim.libero_robot import use_software_rendering\n"
        "from steer_runtime.errors import SteerError\n"
        "try: use_software_rendering()\nexcept SteerError as e: print(e.code)"
    )
    assert _python(code).stdout.strip() == "gl_too_late"


def test_looking_a_task_up_asks_nothing_prints_nothing_and_writes_nothing(tmp_path: object) -> None:
    result = _python("from sim.libero_robot import LiberoRobot; LiberoRobot()", HOME=str(tmp_path))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert [p.name for p in tmp_path.rglob("*") if "matplotlib" not in str(p)] == []  # type: ignore[attr-defined]
