"""What a policy takes for its last gripper command when its chunks are replanned before their end."""

from __future__ import annotations

import time
from pathlib import Path

import fabricate
import numpy as np
import pytest
import torch
from driver import NodeProcess, PolicyDriver, PolicyProcess, SensorDriver

from ros_nodes.client import SteeringClient
from steer_runtime.policies.objects.config import HeatmapConfig
from steer_runtime.policies.openvla.model import OpenVLAModel


@pytest.fixture(scope="module")
def remembering_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy that reads its last gripper command, in chunks of three actions."""
    root = tmp_path_factory.mktemp("remembering")
    heat = HeatmapConfig(classes=("soup", "basket"), hidden=64, blocks=1, heads=2)
    torch.manual_seed(0)
    config = fabricate.tiny_config(
        dino=None, siglip=None, heatmap=heat, image_size=64, state_tokens=1, chunk=3, parallel=True
    )
    model = OpenVLAModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not name.startswith("heatmap"):
                parameter.copy_(torch.randn(parameter.shape) * 2.0 * parameter.shape[-1] ** -0.5)
    fabricate.save_tiny(root / "checkpoint", model=model.eval())
    path = root / "remembering.yaml"
    path.write_text("kind: openvla\nname: remembering\ncheckpoint: checkpoint\nsuite: libero_object\n")
    return path


def test_the_policy_is_told_what_the_gripper_was_told_last(remembering_yaml: Path, third_domain: int) -> None:
    def actions(driver: SensorDriver, gripper: float) -> list[float]:
        deadline = time.monotonic() + 20.0
        while time.monotonic() < deadline:
            answer = driver.answer(driver.send(gripper=gripper), 1.0)
            if answer is not None:
                return list(answer.data)
        raise AssertionError("no chunk came")

    with (
        SensorDriver(domain=third_domain) as driver,
        PolicyProcess(remembering_yaml, None, domain=third_domain),
        SteeringClient(domain_id=third_domain) as client,
    ):
        driver.describe(tells_gripper=True)
        client.wait_state(lambda s: s.lifecycle == "active", timeout=120.0)
        driver.wait_matched()
        driver.wait(driver.gripper.get_subscription_count, what="the node's ear for the gripper")
        opened, closed, again = (actions(driver, gripper) for gripper in (-1.0, 1.0, -1.0))
        # Without being told, the end of its own chunk would decide, which is the same for the first two.
        assert opened == again
        assert opened != closed
        incomplete = driver.send()
        assert driver.answer(incomplete, 1.0) is None, "a frame without its promised gripper command is not whole"


def test_the_robot_tells_the_command_it_executed_last_not_the_end_of_the_chunk(third_domain: int) -> None:
    chunk = np.zeros((8, 7), np.float32)
    chunk[:, 6] = [1, 1, 1, 1, -1, -1, -1, -1]
    body = [str(Path(__file__).parent / "point_robot.py")]
    with (
        PolicyDriver(third_domain) as driver,
        NodeProcess(body, {"mode": "free", "rate_hz": 5.0, "replan_steps": 3}, third_domain),
    ):
        assert driver.description().tells_gripper
        driver.wait(lambda: driver.frames and driver.grippers, what="a frame")
        assert driver.grippers[-1][1].command == -1.0
        told = []
        for _ in range(2):
            before = driver.frames[-1][1].header.stamp
            driver.act(chunk)
            assert driver.moved_on(before, 10.0), "the next frame did not come"
            stamp = driver.frames[-1][1].header.stamp
            match = driver.wait(
                lambda stamp=stamp: [m for _, m in driver.grippers if m.header.stamp == stamp],  # type: ignore[misc]
                what="the gripper command of the frame",
            )
            told.append(match[0].command)
        # A replan after three steps has executed closing rows only; the chunk ends with opening ones.
        assert told[-1] == 1.0
