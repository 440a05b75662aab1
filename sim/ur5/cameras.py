"""Pictures of a scene, drawn from joint positions alone.

Invariant: all drawing happens in the thread that made the object: a GL context belongs to it.
"""

from __future__ import annotations

from collections.abc import Mapping

import mujoco
import numpy as np

from sim.ur5.scene import Scene


class Cameras:
    """Draws every view of a scene. Call sim.benchmark.use_software_rendering before anything imports mujoco."""

    def __init__(self, scene: Scene, size: int) -> None:
        """size: pixels of both sides."""
        self._scene = scene
        self._data = mujoco.MjData(scene.model)
        self._renderer = mujoco.Renderer(scene.model, size, size)
        self._option = mujoco.MjvOption()
        # A scene without meshes draws its collision shapes instead.
        self._option.geomgroup[:] = [group not in scene.hidden_groups for group in range(mujoco.mjNGROUP)]

    def draw(self, qpos: np.ndarray) -> Mapping[str, np.ndarray]:
        """View -> uint8 RGB [size, size, 3], upright, with the whole scene at these positions."""
        self._data.qpos[:] = qpos
        mujoco.mj_kinematics(self._scene.model, self._data)
        mujoco.mj_camlight(self._scene.model, self._data)
        images = {}
        for name, view in self._scene.views.items():
            self._renderer.update_scene(self._data, view.camera, self._option)
            image = self._renderer.render()
            images[name] = np.ascontiguousarray(image[:, ::-1] if view.mirrored else image)
        return images

    def close(self) -> None:
        """Free the GL context."""
        self._renderer.close()
