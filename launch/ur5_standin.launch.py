"""Start the simulated UR5e in place of a UR driver: `ros2 launch steer_runtime ur5_standin.launch.py scene:=libero_object`.

The same topics and services as Universal_Robots_ROS2_Driver's: ur5.launch.py beside it does not know the difference.
"""

from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    """The stand-in; its topics are absolute, the namespace is that of its own levers."""
    arguments = [
        DeclareLaunchArgument("namespace", default_value="", description="namespace of the stand-in's own topics"),
        DeclareLaunchArgument("scene", default_value="table", description="table or libero_object"),
        DeclareLaunchArgument("task_id", default_value="0", description="task of the scene libero_object"),
        DeclareLaunchArgument("camera_size", default_value="256", description="pixels of the pictures, 0 is none"),
        DeclareLaunchArgument("meshes", default_value="true", description="false draws the arm as capsules"),
        DeclareLaunchArgument("log", default_value="", description="file (.npz) for what the arm really did"),
    ]
    types = {"scene": str, "task_id": int, "camera_size": int, "meshes": bool, "log": str}
    standin = Node(
        package="steer_runtime",
        executable="ur5_standin_node",
        name="ur5_standin",
        namespace=LaunchConfiguration("namespace"),
        output="screen",
        parameters=[{name: ParameterValue(LaunchConfiguration(name), value_type=kind) for name, kind in types.items()}],
    )
    return LaunchDescription([*arguments, standin])
