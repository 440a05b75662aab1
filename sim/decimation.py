"""Cheaper pictures for training data: fewer faces in the meshes that are only looked at.

Invariant: physics stays bit-identical. Only meshes that no colliding geom uses are changed, and MuJoCo's dynamics read
no face of those. A benchmark figure uses the original meshes.

Vertices are merged on a grid (vertex clustering: Rossignac and Borrel, "Multi-resolution 3D approximations", 1993):
each occupied cell keeps the vertex nearest to its members' mean, and faces that collapse or repeat are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

MESH = 7  # mujoco.mjtGeom.mjGEOM_MESH


@dataclass(frozen=True)
class Cells:
    """Grid cell sizes, m: of objects and fixtures, of the robot, and the least number of cells across any mesh."""

    objects: float = 0.004
    robot: float = 0.012
    across: int = 12


@dataclass(frozen=True)
class Decimated:
    """Faces of the changed meshes before and after, and how many meshes that were."""

    before: int
    after: int
    meshes: int


def decimate(model: Any, context: Any, cells: Cells = Cells()) -> Decimated:
    """Thin the visual meshes of an MjModel in place and upload them to an MjrContext that has just been made."""
    import mujoco

    meshes = model.geom_type == MESH
    colliding = set(model.geom_dataid[meshes & ((model.geom_contype != 0) | (model.geom_conaffinity != 0))].tolist())
    before = after = count = 0
    for mesh in sorted(set(model.geom_dataid[meshes].tolist()) - colliding):
        users = np.flatnonzero(meshes & (model.geom_dataid == mesh))
        robot = model.body(int(model.geom_bodyid[users[0]])).name.startswith(("robot0", "gripper0", "mount0"))
        old = int(model.mesh_facenum[mesh])
        new = _thin(model, mesh, cells.robot if robot else cells.objects, cells.across)
        if new < old:
            mujoco.mjr_uploadMesh(model, context, mesh)
            count += 1
        before, after = before + old, after + new
    return Decimated(before, after, count)


def _thin(model: Any, mesh: int, cell: float, across: int) -> int:
    """Rewrite one mesh's face lists; returns its new number of faces."""
    first, count = int(model.mesh_vertadr[mesh]), int(model.mesh_vertnum[mesh])
    start, faces = int(model.mesh_faceadr[mesh]), int(model.mesh_facenum[mesh])
    vertices = model.mesh_vert[first : first + count]
    size = min(cell, float(np.ptp(vertices, axis=0).max()) / across)
    _, owner = np.unique(((vertices - vertices.min(0)) / size).astype(np.int64), axis=0, return_inverse=True)
    owner = owner.reshape(-1)
    keeper = _nearest_to_mean(vertices, owner)
    corner_cells = owner[model.mesh_face[start : start + faces]]
    a, b, c = corner_cells.T
    whole = np.flatnonzero((a != b) & (b != c) & (a != c))
    # Faces that now have the same three corners are one face; keep the first.
    _, unique = np.unique(np.sort(corner_cells[whole], axis=1), axis=0, return_index=True)
    kept = whole[np.sort(unique)]
    end = start + len(kept)
    for table in (model.mesh_facetexcoord, model.mesh_facenormal):
        table[start:end] = table[start + kept]  # the right side is a copy: fancy indexing
    model.mesh_face[start:end] = keeper[corner_cells[kept]]
    model.mesh_facenum[mesh] = len(kept)
    return len(kept)


def _nearest_to_mean(vertices: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """[cells] index of each cell's vertex that is nearest to the mean of its vertices."""
    cells = int(owner.max()) + 1
    members = np.bincount(owner, minlength=cells)
    mean = np.stack([np.bincount(owner, vertices[:, k], cells) for k in range(3)], 1) / members[:, None]
    distance = np.linalg.norm(vertices - mean[owner], axis=1)
    order = np.lexsort((distance, owner))
    starts = np.concatenate([[0], np.cumsum(members)[:-1]])
    return order[starts]
