"""Start the policy node: `ros2 launch steer_runtime policy.launch.py policy:=pocket-untrained direction_store:=...`."""

from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    """One policy node that configures and activates itself once a robot has described itself."""
    arguments = [
        DeclareLaunchArgument("namespace", default_value="steer", description="namespace shared with the robot node"),
        DeclareLaunchArgument("policy", description="YAML file, or a name of configs/policies"),
        DeclareLaunchArgument(
            "direction_store", default_value="", description="folder of directions; empty loads none"
        ),
        DeclareLaunchArgument("device", default_value="cpu", description="torch device"),
        DeclareLaunchArgument(
            "observation_timeout_s", default_value="2.0", description="silence before the node holds"
        ),
        DeclareLaunchArgument("autostart", default_value="true", description="false leaves it to a lifecycle manager"),
    ]
    policy = Node(
        package="steer_runtime",
        executable="policy_node",
        name="policy",
        namespace=LaunchConfiguration("namespace"),
        output="screen",
        parameters=[
            {
                "policy": ParameterValue(LaunchConfiguration("policy"), value_type=str),
                "direction_store": ParameterValue(LaunchConfiguration("direction_store"), value_type=str),
                "device": ParameterValue(LaunchConfiguration("device"), value_type=str),
                "observation_timeout_s": ParameterValue(LaunchConfiguration("observation_timeout_s"), value_type=float),
                "autostart": ParameterValue(LaunchConfiguration("autostart"), value_type=bool),
            }
        ],
    )
    return LaunchDescription([*arguments, policy])
