"""Scenes by name."""

from __future__ import annotations

from sim.ur5.scene import Scene, table_scene


def build_scene(name: str, *, task_id: int = 0, init_state_index: int = 0, meshes: bool = True) -> Scene:
    """A scene of SCENES. task_id, init_state_index: of libero_object. meshes: see sim.ur5.scene.attach_arm."""
    if name == "table":
        return table_scene(meshes=meshes)
    from sim.ur5.libero import libero_scene

    return libero_scene(task_id, init_state_index, meshes=meshes)
