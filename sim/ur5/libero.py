"""A task of LIBERO-Object with the UR5e where the Panda stood: the same things, light and cameras, another arm.

Invariant: the UR5e's TCP starts at the pose of the Panda's grip site, fingers in the same plane, and the wrist camera has
the same place relative to it, so that a policy of LIBERO sees what it was trained on but for the arm itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

from sim.libero_robot import LiberoRobot
from sim.ur5.names import JOINTS, PANDA_BASE_M
from sim.ur5.scene import HOME, PREFIX, TCP, Scene, View, WristCamera, attach_arm
from steer_runtime.errors import SteerError

_PANDA = "robot0_base"
_GRIP, _EYE = "gripper0_grip_site", "robot0_eye_in_hand"
_NEAR = 1e-4
"""m and rad: how near the start is to the Panda's."""


@dataclass(frozen=True)
class _Start:
    """The task as LIBERO sets it up: model, where the Panda stands [3] m, its grip [3] m and [3, 3], free joints."""

    xml: str
    mount: np.ndarray
    position: np.ndarray
    rotation: np.ndarray
    eye: WristCamera
    free: dict[str, np.ndarray]
    instruction: str


def libero_scene(task_id: int = 0, init_state_index: int = 0, *, meshes: bool = True) -> Scene:
    """One task at one of its initial states. Raises SteerError for tasks and states that do not exist."""
    start = _start_of(task_id, init_state_index)
    if not np.allclose(start.mount, PANDA_BASE_M, atol=1e-6):
        raise SteerError("wrong_mount", f"the Panda stands at {start.mount} m: expected {PANDA_BASE_M}")
    spec = mujoco.MjSpec.from_string(start.xml)
    # Every actuator and sensor of these models is the Panda's.
    for element in [*spec.actuators, *spec.sensors]:
        spec.delete(element)
    spec.delete(spec.body(_PANDA))
    used = {geom.meshname for geom in spec.geoms}
    for mesh in [mesh for mesh in spec.meshes if mesh.name not in used]:
        spec.delete(mesh)
    attach_arm(spec, position=tuple(start.mount), meshes=meshes, wrist=start.eye)
    spec.visual.global_.offwidth = spec.visual.global_.offheight = 1024
    model = spec.compile()
    data = mujoco.MjData(model)
    for name, values in start.free.items():
        begin = model.joint(name).qposadr[0]
        data.qpos[begin : begin + len(values)] = values
    joints = _reach(model, data, start.position, start.rotation)
    views = {"agentview": View("agentview", mirrored=True), "wrist": View(f"{PREFIX}wrist", mirrored=True)}
    return Scene(
        model,
        start=tuple(float(angle) for angle in joints),
        qpos=data.qpos.copy(),
        views=views,
        # robosuite's collision shapes are group 0, Menagerie's group 3.
        hidden_groups=(0, 3) if meshes else (0,),
        instruction=start.instruction,
        things=tuple(start.free),
    )


def _start_of(task_id: int, init_state_index: int) -> _Start:
    with LiberoRobot("libero_object", task_id, init_state_index, camera_size=16) as robot:
        robot.reset()
        sim = robot.sim
        model, data = sim.model, sim.data
        grip, eye = model.site_name2id(_GRIP), model.camera_name2id(_EYE)
        rotation = data.site_xmat[grip].reshape(3, 3).copy()
        position = data.site_xpos[grip].copy()
        quaternion = np.empty(4)
        mujoco.mju_mat2Quat(quaternion, (rotation.T @ data.cam_xmat[eye].reshape(3, 3)).ravel())
        away = rotation.T @ (data.cam_xpos[eye] - position)
        free = {
            name: np.array(data.get_joint_qpos(name))
            for name in model.joint_names
            if not name.startswith(("robot0_", "gripper0_"))
        }
        return _Start(
            xml=model.get_xml(),
            mount=data.get_body_xpos(_PANDA).copy(),
            position=position,
            rotation=rotation,
            eye=WristCamera(tuple(away), tuple(quaternion), float(model.cam_fovy[eye])),  # type: ignore[arg-type]
            free=free,
            instruction=robot.instruction,
        )


def _reach(model: mujoco.MjModel, data: mujoco.MjData, position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Joints, rad [6], that bring the TCP there: damped least squares from HOME. Raises SteerError('unreachable')."""
    joints = [model.joint(f"{PREFIX}{name}") for name in JOINTS]
    q, v = [joint.qposadr[0] for joint in joints], [joint.dofadr[0] for joint in joints]
    site = model.site(TCP).id
    data.qpos[q] = HOME
    jacobian = np.zeros((6, model.nv))
    for _ in range(500):
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        error = np.empty(6)
        error[:3] = position - data.site_xpos[site]
        turn = np.empty(4)
        mujoco.mju_mat2Quat(turn, (rotation @ data.site_xmat[site].reshape(3, 3).T).ravel())
        mujoco.mju_quat2Vel(error[3:], turn, 1.0)
        if np.abs(error).max() < _NEAR:
            return data.qpos[q]
        mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], site)
        part = jacobian[:, v]
        data.qpos[q] += 0.5 * part.T @ np.linalg.solve(part @ part.T + 1e-4 * np.eye(6), error)
    raise SteerError("unreachable", f"the UR5e does not reach {position.round(3)} m from where the Panda stood")
