"""A LIBERO task as a robot on ROS topics; everything but the choice of the task is ros_nodes.robot_node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from ros_nodes.parameters import declare, parameter
from ros_nodes.process import serve
from ros_nodes.robot_node import Robot, RobotNode
from sim.libero_robot import LiberoRobot, use_software_rendering


@dataclass(frozen=True)
class LiberoParameters:
    """Which episode to run; see sim.libero_robot.LiberoRobot."""

    suite: str = parameter("libero_object", "LIBERO suite")
    task_id: int = parameter(0, "task of the suite", low=0, high=1000)
    init_state_index: int = parameter(0, "initial state of the task", low=0, high=1000)
    camera_size: int = parameter(256, "pixels of both sides of both cameras", low=16, high=1024)
    after_success: int = parameter(
        0, "control steps that an episode goes on after success; 0 is the benchmark's protocol", low=0, high=1000
    )
    seed: int = parameter(0, "seed of the simulator's placement sampler", low=0, high=2**31 - 1)


class LiberoRobotNode(RobotNode):
    """The node `libero_robot`."""

    def __init__(self, **node_options: Any) -> None:
        """Raises SteerError('bad_parameter')."""
        super().__init__("libero_robot", "libero", self._make_robot, **node_options)
        self._task = declare(self, LiberoParameters)

    def _make_robot(self) -> Robot:
        task = self._task
        return LiberoRobot(
            task.suite,
            task.task_id,
            task.init_state_index,
            camera_size=task.camera_size,
            seed=task.seed,
            after_success=task.after_success,
        )


def _make() -> LiberoRobotNode:
    use_software_rendering()
    return LiberoRobotNode()


def main(args: list[str] | None = None) -> NoReturn:
    """Entry point of the process."""
    serve(_make, args)


if __name__ == "__main__":
    main()
