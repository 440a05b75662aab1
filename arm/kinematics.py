"""Where the tool is, how it moves with the joints, how near things are, and which joints reach a pose.

Invariant: every answer is a function of the six positions that are asked about; nothing is kept between two questions
but memory to work in. Not thread-safe: one owner.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

from arm.model import TABLE, TCP, build_model
from arm.port import Joints
from arm.settings import ArmSettings

_IK_STEPS = 15
_IK_DAMPING = 0.01
"""Keeps steps near a singularity small; next to the singular values of an arm that can move (0.1 and more) it is nothing."""
_IK_CLOSE_M = 1e-5
_IK_CLOSE_RAD = 1e-4
_IK_FAR_RAD = 1.0
"""A solution further away is another branch of the arm, never a step of an action."""


@dataclass(frozen=True)
class Pose:
    """Of the TCP in base_link: position [3] m, and the turn of the tool's axes as MuJoCo's unit quaternion [4] (w, x, y, z)."""

    position: NDArray[np.float64]
    wxyz: NDArray[np.float64]

    @property
    def quaternion(self) -> NDArray[np.float64]:
        """As ROS orders it: (x, y, z, w)."""
        return np.roll(self.wxyz, -1)

    def moved(self, way: NDArray[np.float64], turn: NDArray[np.float64], *, in_tool: bool = False) -> Pose:
        """By a way [3] m, and turned by a quaternion [4] (w, x, y, z), both in base_link's axes or in the tool's own."""
        wxyz = np.zeros(4)
        if in_tool:
            own = np.zeros(3)
            mujoco.mju_rotVecQuat(own, way, self.wxyz)
            way = own
            mujoco.mju_mulQuat(wxyz, self.wxyz, turn)
        else:
            mujoco.mju_mulQuat(wxyz, turn, self.wxyz)
        mujoco.mju_normalize4(wxyz)
        return Pose(self.position + way, wxyz)

    def twist_to(self, other: Pose) -> NDArray[np.float64]:
        """[6]: way (m) and turn (rad, axis times angle, in base_link) from here to another pose."""
        back, turn, vector = np.zeros(4), np.zeros(4), np.zeros(3)
        mujoco.mju_negQuat(back, self.wxyz)
        mujoco.mju_mulQuat(turn, other.wxyz, back)
        mujoco.mju_quat2Vel(vector, turn, 1.0)
        return np.concatenate([other.position - self.position, vector])


class Kinematics:
    """Of the arm that the settings describe."""

    def __init__(self, settings: ArmSettings) -> None:
        self.settings = settings
        self.model = build_model(settings)
        self._data = mujoco.MjData(self.model)
        self._site = self.model.site(TCP).id
        self._table = self.model.geom(TABLE).id
        self._jacobian = np.zeros((6, self.model.nv))

    def pose(self, joints: Joints) -> Pose:
        """Of the TCP at these joints [6] rad."""
        self._place(joints)
        return self._pose()

    def jacobian(self, joints: Joints) -> NDArray[np.float64]:
        """[6, 6]: TCP velocity (m/s) over turning (rad/s) in base_link, by joint speeds (rad/s)."""
        self._place(joints)
        return self._differentiate().copy()

    def condition(self, joints: Joints) -> float:
        """Condition number of the Jacobian (m and rad): large near a singularity, where small motions of the tool take
        large ones of joints."""
        singular = np.linalg.svd(self.jacobian(joints), compute_uv=False)
        return float(singular[0] / max(singular[-1], 1e-12))

    def clearance(self, joints: Joints) -> tuple[float, float]:
        """Smallest distance (m) of two links, and of a link and the table; what is far off counts as infinite.

        Neighbours in the chain, which touch by construction, are left out. 0.1 ms.
        """
        self._place(joints)
        mujoco.mj_collision(self.model, self._data)
        links = table = np.inf
        for index in range(self._data.ncon):
            contact = self._data.contact[index]
            if self._table in (contact.geom1, contact.geom2):
                table = min(table, contact.dist)
            else:
                links = min(links, contact.dist)
        return float(links), float(table)

    def reach(self, pose: Pose, near: Joints) -> Joints | None:
        """Joints [6] rad that bring the TCP to a pose a small step away; None where none do.

        Damped least squares (Wampler 1986): dq = J^T (J J^T + d^2 I)^-1 e until the error e is gone. 25 us a step.
        """
        joints = np.array(near, np.float64)
        for _ in range(_IK_STEPS):
            self._place(joints)
            error = self._pose().twist_to(pose)
            if np.linalg.norm(error[:3]) < _IK_CLOSE_M and np.linalg.norm(error[3:]) < _IK_CLOSE_RAD:
                return joints
            jacobian = self._differentiate()
            joints += jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + _IK_DAMPING**2 * np.eye(6), error)
            if np.abs(joints - near).max() > _IK_FAR_RAD:
                return None
        return None

    def _place(self, joints: Joints) -> None:
        self._data.qpos[:] = joints
        mujoco.mj_kinematics(self.model, self._data)

    def _pose(self) -> Pose:
        wxyz = np.zeros(4)
        mujoco.mju_mat2Quat(wxyz, self._data.site_xmat[self._site])
        return Pose(self._data.site_xpos[self._site].copy(), wxyz)

    def _differentiate(self) -> NDArray[np.float64]:
        mujoco.mj_comPos(self.model, self._data)
        mujoco.mj_jacSite(self.model, self._data, self._jacobian[:3], self._jacobian[3:], self._site)
        return self._jacobian


def turn_by_vector(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quaternion [4] (w, x, y, z) of a turn about a vector [3] by its length (rad)."""
    turn = np.zeros(4)
    angle = float(np.linalg.norm(vector))
    axis = np.array([1.0, 0.0, 0.0]) if angle == 0 else np.asarray(vector, np.float64) / angle
    mujoco.mju_axisAngle2Quat(turn, axis, angle)
    return turn


def turn_by_angles(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quaternion [4] (w, x, y, z) of Rz(yaw) Ry(pitch) Rx(roll), from [roll, pitch, yaw] (rad): URDF's and REP-103's order."""
    turn = np.zeros(4)
    mujoco.mju_euler2Quat(turn, np.asarray(angles, np.float64), "XYZ")
    return turn
