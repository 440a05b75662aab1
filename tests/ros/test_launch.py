"""Launch files and YAML name executables, parameters and topics that exist.

`launch` is not on PyPI (a package of that name there is another), so a recording stand-in takes its place here.
"""

from __future__ import annotations

import runpy
import sys
import types
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from ros_nodes.libero_robot_node import LiberoParameters
from ros_nodes.loading import PolicyParameters
from ros_nodes.robot_node import RobotParameters
from ros_nodes.ur5_bridge_node import ArmRobotParameters, BridgeParameters
from ros_nodes.ur5_standin_node import StandinParameters
from ros_nodes.ur_driver import UrDriverParameters

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
DECLARED = {
    "ur5_standin": {f.name: f for f in fields(StandinParameters)},
    "policy": {f.name: f for f in fields(PolicyParameters)},
    "libero_robot": {f.name: f for kind in (RobotParameters, LiberoParameters) for f in fields(kind)},
    "ur5_bridge": {
        f.name: f for kind in (ArmRobotParameters, BridgeParameters, UrDriverParameters) for f in fields(kind)
    },
}


class Recorded:
    """Remembers how it was made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


@pytest.fixture
def _launch(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "launch": ["LaunchDescription"],
        "launch.actions": ["DeclareLaunchArgument"],
        "launch.substitutions": ["LaunchConfiguration", "PathJoinSubstitution"],
        "launch_ros": [],
        "launch_ros.actions": ["Node"],
        "launch_ros.parameter_descriptions": ["ParameterValue"],
        "ament_index_python": [],
        "ament_index_python.packages": [],
    }
    for module, classes in names.items():
        stub = types.ModuleType(module)
        for name in classes:
            setattr(stub, name, type(name, (Recorded,), {}))
        monkeypatch.setitem(sys.modules, module, stub)
    sys.modules["ament_index_python.packages"].get_package_share_directory = lambda _: str(ROOT)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_launch")
@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.launch.py")), ids=lambda p: p.name)
def test_launch_file_starts_what_exists_with_declared_parameters_and_arguments(path: Path) -> None:
    entities = runpy.run_path(str(path))["generate_launch_description"]().args[0]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    defaults = {
        e.args[0]: e.kwargs.get("default_value") for e in entities if type(e).__name__ == "DeclareLaunchArgument"
    }
    nodes = [e for e in entities if type(e).__name__ == "Node"]
    used = set()
    assert nodes
    for node in nodes:
        assert node.kwargs["package"] == "steer_runtime"
        assert node.kwargs["executable"] in scripts
        used.add(node.kwargs["namespace"].args[0])
        for parameters in node.kwargs["parameters"]:
            if isinstance(parameters, dict):
                declared = DECLARED[node.kwargs["name"]]
                assert set(parameters) <= set(declared)
                for name, value in parameters.items():
                    assert value.kwargs["value_type"] is type(declared[name].default)
                    used.add(value.args[0].args[0])
            else:
                if type(parameters).__name__ == "LaunchConfiguration":
                    used.add(parameters.args[0])
                    parameters = defaults[parameters.args[0]]
                assert Path(*parameters.args[0]).is_file()
    assert used == set(defaults)


@pytest.mark.usefixtures("_launch")
def test_a_policy_on_a_real_arm_is_launched_with_its_guards() -> None:
    entities = runpy.run_path(str(ROOT / "launch" / "ur5.launch.py"))["generate_launch_description"]().args[0]
    policy = next(e for e in entities if type(e).__name__ == "Node" and e.kwargs["name"] == "policy")
    files = [p.args[0] for p in policy.kwargs["parameters"] if type(p).__name__ == "LaunchConfiguration"]
    assert files == ["robot", "guards"]


def _parameter_files() -> list[Path]:
    """Those of `configs/robots`; the others say what an arm may do (arm.settings)."""
    return [p for p in sorted((ROOT / "configs" / "robots").glob("*.yaml")) if "ros__parameters" in p.read_text()]


@pytest.mark.parametrize("path", _parameter_files(), ids=lambda p: p.name)
def test_robot_yaml_sets_declared_parameters_within_their_ranges(path: Path) -> None:
    for node, content in yaml.safe_load(path.read_text()).items():
        declared = DECLARED[node.rsplit("/", 1)[-1]]
        for name, value in content["ros__parameters"].items():
            facts = declared[name].metadata
            assert type(tuple(value) if isinstance(value, list) else value) is type(declared[name].default)
            assert not facts["choices"] or value in facts["choices"]
            assert facts["low"] is None or facts["low"] <= value <= facts["high"]
