"""A robot of a few lines in a process of its own: a point that moves by its actions and pictures of noise.

What the tests test is ros_nodes.robot_node around it; LIBERO takes a second for what this does in a millisecond.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ros_nodes.process import serve
from ros_nodes.robot_node import RobotNode
from steer_runtime.types import LIBERO_ACTION_SPACE, ActionSpace

STEPS = 40
NAMES = (*(f"joint{i}" for i in range(1, 8)), "finger_left", "finger_right")


@dataclass(frozen=True)
class PointFrame:
    images: dict[str, np.ndarray]
    joint_positions: np.ndarray
    eef_position: np.ndarray
    gripper_qpos: np.ndarray
    step: int
    joint_names: tuple[str, ...] = NAMES
    eef_quaternion: np.ndarray = field(default_factory=lambda: np.array([1.0, 0.0, 0.0, 0.0]))
    instruction: str = "pick up the soup and place it in the basket"
    success: bool = False

    @property
    def done(self) -> bool:
        return self.step >= STEPS


class PointRobot:
    action_space: ActionSpace = LIBERO_ACTION_SPACE

    def reset(self) -> PointFrame:
        self._position, self._gripper, self._step = np.zeros(3), 0.0, 0
        return self._frame()

    def step(self, action: np.ndarray, *, draw: bool = True) -> PointFrame:
        self._position = self._position + 0.05 * action[:3]
        self._gripper = float(action[6])
        self._step += 1
        return self._frame()

    def close(self) -> None:
        pass

    def _frame(self) -> PointFrame:
        noise = np.random.default_rng(self._step).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
        fingers = np.array([self._gripper, -self._gripper])
        return PointFrame(
            images={"agentview": noise[0], "wrist": noise[1]},
            joint_positions=np.concatenate([np.zeros(7), fingers]),
            eef_position=self._position.copy(),
            gripper_qpos=fingers,
            step=self._step,
        )


if __name__ == "__main__":
    serve(lambda: RobotNode("robot", "point", PointRobot))
