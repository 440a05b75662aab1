"""Start a policy on a UR arm: `ros2 launch steer_runtime ur5.launch.py policy:=my-ur5-policy`. The arm's driver runs already.

It begins in a dry run: nothing reaches the driver before `ros2 service call /steer/ur5_bridge/arm std_srvs/srv/SetBool
"{data: true}"` (docs/ur5.md).
"""

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    """Policy node and bridge in one namespace, with the parameters of configs/robots/ur5.yaml and every guard of ur5e_policy.yaml."""
    share = get_package_share_directory("steer_runtime")
    robot_yaml = LaunchConfiguration("robot")
    namespace = LaunchConfiguration("namespace")
    arguments = [
        DeclareLaunchArgument(
            "robot",
            default_value=PathJoinSubstitution([share, "configs", "robots", "ur5.yaml"]),
            description="parameters of both nodes: cameras, topics, the checkpoint's action space",
        ),
        DeclareLaunchArgument(
            "guards",
            default_value=PathJoinSubstitution([share, "configs", "robots", "ur5e_policy.yaml"]),
            description="parameters of the policy node: who may command, how far, and what a chunk may be",
        ),
        DeclareLaunchArgument("namespace", default_value="steer", description="namespace of both nodes"),
        DeclareLaunchArgument("policy", description="YAML file, or a name of configs/policies"),
        DeclareLaunchArgument(
            "direction_store", default_value="", description="folder of directions; empty loads none"
        ),
        DeclareLaunchArgument("instruction", description="the task in words"),
        DeclareLaunchArgument(
            "arm_settings", default_value="ur5e", description="YAML file of limits, or its name in configs/robots"
        ),
        DeclareLaunchArgument(
            "motion_scale", default_value="0.2", description="part of each delta that is executed; 1.0 for joint_abs"
        ),
    ]
    policy = Node(
        package="steer_runtime",
        executable="policy_node",
        name="policy",
        namespace=namespace,
        output="screen",
        parameters=[
            robot_yaml,
            LaunchConfiguration("guards"),
            {
                "policy": ParameterValue(LaunchConfiguration("policy"), value_type=str),
                "direction_store": ParameterValue(LaunchConfiguration("direction_store"), value_type=str),
            },
        ],
    )
    bridge = Node(
        package="steer_runtime",
        executable="ur5_bridge_node",
        name="ur5_bridge",
        namespace=namespace,
        output="screen",
        parameters=[
            robot_yaml,
            {
                "instruction": ParameterValue(LaunchConfiguration("instruction"), value_type=str),
                "arm_settings": ParameterValue(LaunchConfiguration("arm_settings"), value_type=str),
                "motion_scale": ParameterValue(LaunchConfiguration("motion_scale"), value_type=float),
            },
        ],
    )
    return LaunchDescription([*arguments, policy, bridge])
