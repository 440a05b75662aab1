"""Start a LIBERO task and the policy that acts in it: `ros2 launch steer_runtime libero_demo.launch.py task_id:=3`."""

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    """Policy node and LIBERO robot node in one namespace, with the parameters of configs/robots/libero.yaml."""
    share = get_package_share_directory("steer_runtime")
    robot_yaml = PathJoinSubstitution([share, "configs", "robots", "libero.yaml"])
    namespace = LaunchConfiguration("namespace")
    arguments = [
        DeclareLaunchArgument("namespace", default_value="steer", description="namespace of both nodes"),
        DeclareLaunchArgument("policy", default_value="pocket-untrained", description="YAML file or name of a policy"),
        DeclareLaunchArgument(
            "direction_store", default_value="", description="folder of directions; empty loads none"
        ),
        DeclareLaunchArgument("suite", default_value="libero_object", description="LIBERO suite"),
        DeclareLaunchArgument("task_id", default_value="0", description="task of the suite"),
        DeclareLaunchArgument("mode", default_value="lockstep", description="lockstep or free"),
    ]
    policy = Node(
        package="steer_runtime",
        executable="policy_node",
        name="policy",
        namespace=namespace,
        output="screen",
        parameters=[
            robot_yaml,
            {
                "policy": ParameterValue(LaunchConfiguration("policy"), value_type=str),
                "direction_store": ParameterValue(LaunchConfiguration("direction_store"), value_type=str),
            },
        ],
    )
    robot = Node(
        package="steer_runtime",
        executable="libero_robot_node",
        name="libero_robot",
        namespace=namespace,
        output="screen",
        parameters=[
            robot_yaml,
            {
                "suite": ParameterValue(LaunchConfiguration("suite"), value_type=str),
                "task_id": ParameterValue(LaunchConfiguration("task_id"), value_type=int),
                "mode": ParameterValue(LaunchConfiguration("mode"), value_type=str),
            },
        ],
    )
    return LaunchDescription([*arguments, policy, robot])
