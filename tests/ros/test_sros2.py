"""The SROS2 policies: valid by the format's schema, and neither more nor less than what the nodes really use."""

from __future__ import annotations

import fnmatch
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import rclpy
import xmlschema
from point_robot import PointRobot
from rclpy.parameter import Parameter
from rclpy.signals import SignalHandlerOptions

from ros_nodes.client import SteeringClient
from ros_nodes.hold_node import HoldNode
from ros_nodes.policy_node import PolicyNode
from ros_nodes.recording.node import RecorderNode
from ros_nodes.robot_node import RobotNode
from ros_nodes.ur5_bridge_node import Ur5BridgeNode

FOLDER = Path(__file__).parents[2] / "configs" / "sros2"
POLICIES = sorted(FOLDER.glob("*.xml"))
BY_RCLPY = {"/rosout", "/parameter_events", "/clock"}
"""Topics that every node has, depending on its parameters; the policies name them, the nodes here may not have them."""
ON_ACTIVATION = {
    f"/steer/{name}" for name in ("instruction", "camera/*/image", "joint_states", "eef_pose", "gripper_command")
}
"""What the policy node subscribes to once a robot has described itself."""


def allowed(enclave: str, rule: str) -> set[str]:
    """Full names of what an enclave of steer.xml may do."""
    out = set()
    for profile in ElementTree.parse(FOLDER / "steer.xml").findall(f".//enclave[@path='{enclave}']//profile"):
        namespace, node = profile.attrib["ns"], profile.attrib["node"]
        for entries in profile:
            if entries.attrib.get(rule) == "ALLOW":
                for name in (entry.text or "" for entry in entries):
                    private = name.replace("~", f"{namespace}/{node}", 1)
                    out.add(private if private.startswith("/") else f"{namespace}/{name}")
    return out


@contextmanager
def a_node(make: Any, domain: int) -> Iterator[Any]:
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=domain, signal_handler_options=SignalHandlerOptions.NO)
    node = make(context)
    try:
        yield node
    finally:
        node.destroy_node()
        context.try_shutdown()


def used(node: Any, name: str) -> dict[str, set[str]]:
    """Rule -> names of what a node has."""
    asked = {
        "publish": node.get_publisher_names_and_types_by_node,
        "subscribe": node.get_subscriber_names_and_types_by_node,
        "reply": node.get_service_names_and_types_by_node,
        "request": node.get_client_names_and_types_by_node,
    }
    return {rule: {topic for topic, _ in ask(name, "/steer")} for rule, ask in asked.items()}


def assert_fits(enclave: str, has: dict[str, set[str]], *, later: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    for rule, names in has.items():
        may = allowed(enclave, rule)
        forbidden = {name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in may)}
        assert not forbidden, f"{enclave} may not {rule}"
        unused = {name for name in may if not fnmatch.filter(names, name)} - BY_RCLPY - later
        assert not unused, f"{enclave} may {rule}, and nothing does"


@pytest.mark.parametrize("path", POLICIES, ids=lambda p: p.name)
def test_policy_is_valid(path: Path) -> None:
    xmlschema.XMLSchema(FOLDER / "policy.xsd").validate(path)


@pytest.mark.parametrize(
    "change",
    [
        ('version="0.2.0"', 'version="0.1.0"'),
        ('publish="ALLOW"', 'publish="MAYBE"'),
        ('ns="/steer" ', ""),
        ("<topic>command</topic>", "<topic>not a name</topic>"),
        ('path="/steer/robot"', 'path="/steer/policy"'),
        ("topics", "topicz"),
    ],
)
def test_schema_refuses_what_is_no_policy(change: tuple[str, str]) -> None:
    text = (FOLDER / "steer.xml").read_text()
    assert change[0] in text
    assert not xmlschema.XMLSchema(FOLDER / "policy.xsd").is_valid(text.replace(*change))


def test_policy_node_may_do_what_it_does_and_no_more(third_domain: int) -> None:
    with a_node(lambda context: PolicyNode(context=context), third_domain) as node:
        assert_fits("/steer/policy", used(node, "policy"), later=ON_ACTIVATION)


def test_robot_node_may_do_what_it_does_and_no_more(third_domain: int) -> None:
    free = [
        Parameter("mode", value="free"),
        Parameter("replan_steps", value=1),
        Parameter("on_steering", value="flush"),
    ]

    def make(context: Any) -> RobotNode:
        return RobotNode("libero_robot", "point", PointRobot, context=context, parameter_overrides=free)

    with a_node(make, third_domain) as node:
        has = used(node, "libero_robot")
        assert_fits("/steer/robot", has, later={"/steer/camera/*/image"})


def test_hold_node_may_do_what_it_does_and_no_more(third_domain: int) -> None:
    with a_node(lambda context: HoldNode(context=context), third_domain) as node:
        assert_fits("/steer/hold", used(node, "hold"))


def test_recorder_may_listen_to_all_of_the_namespace_and_say_nothing_in_it(third_domain: int, tmp_path: Path) -> None:
    def make(context: Any) -> RecorderNode:
        return RecorderNode(context=context, parameter_overrides=[Parameter("path", value=str(tmp_path / "run.mcap"))])

    with a_node(make, third_domain) as node:
        has = used(node, "recorder")
        assert "/steer/command" in has["subscribe"]
        assert_fits("/steer/recorder", has)
        node.close()


def test_bridge_may_do_what_it_does_and_no_more(third_domain: int) -> None:
    def make(context: Any) -> Ur5BridgeNode:
        parameters = [Parameter("replan_steps", value=1), Parameter("on_steering", value="flush")]
        return Ur5BridgeNode(context=context, parameter_overrides=parameters)

    with a_node(make, third_domain) as node:
        node.trigger_configure()
        assert_fits("/steer/ur5_bridge", used(node, "ur5_bridge"), later={"/steer/camera/*/image"})
        node.close()


def test_operator_may_command_and_stop(third_domain: int) -> None:
    with SteeringClient(domain_id=third_domain) as client:
        name = client._node.get_name()  # one for each process; the policy names their kind
        for rule, names in used(client._node, name).items():
            plain = {each.replace(name, "steering_client") for each in names}
            assert plain - BY_RCLPY <= allowed("/steer/operator", rule), rule
    assert "/steer/actions" not in allowed("/steer/operator", "publish")
