"""Fixtures every test room shares."""

from __future__ import annotations

import os

# MuJoCo chooses how it draws when it is imported, whoever imports it first.
os.environ.setdefault("MUJOCO_GL", "osmesa")

from collections.abc import Callable

import fabricate
import pytest
import torch

from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.types import Observation


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_policy() -> OpenVLAPolicy:
    """Shared random OpenVLA; a test that changes it or leaves hooks builds its own with fabricate.tiny_policy()."""
    return fabricate.tiny_policy()


@pytest.fixture(scope="session")
def observation() -> Callable[..., Observation]:
    """Factory: observation(policy, seed=0, instruction=..., value=None, frame_id=0)."""
    return fabricate.make_observation
