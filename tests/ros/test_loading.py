"""What the policy node makes of its parameters."""

from __future__ import annotations

from pathlib import Path

import fabricate_pi0
import pytest

from ros_nodes.loading import Loaded, PolicyParameters, load
from steer_runtime.errors import SteerError


def made(**parameters: object) -> Loaded:
    return load(PolicyParameters(**parameters), lambda chunk: None, lambda event: None)  # type: ignore[arg-type]


def test_a_free_running_robot_may_be_handed_more_rows_than_a_lockstep_one(tmp_path: Path, policy_yaml: Path) -> None:
    fabricate_pi0.save_tiny(tmp_path / "weights")
    path = tmp_path / "tiny-pi0.yaml"
    path.write_text("kind: pi0\nname: tiny-pi0\ncheckpoint: weights\naction_steps: 2\n")
    observation = fabricate_pi0.make_observation()
    assert len(made(policy=str(path)).policy.infer(observation).actions) == 2
    assert len(made(policy=str(path), action_steps=5).policy.infer(observation).actions) == 5
    with pytest.raises(SteerError, match="computes chunks of 6"):
        made(policy=str(path), action_steps=7)
    with pytest.raises(SteerError, match="hands on every row it computes"):
        made(policy=str(policy_yaml), action_steps=1)
