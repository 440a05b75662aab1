"""The policy node runs a Pi0 as it runs any other policy."""

from __future__ import annotations

from pathlib import Path

import fabricate_pi0
import pytest
from driver import NodeProcess, PolicyDriver, PolicyProcess

from ros_nodes.client import SteeringClient
from steer_runtime.directions.store import DirectionStore


@pytest.fixture(scope="module")
def pi0_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pi0")
    fabricate_pi0.save_tiny(root / "weights")
    path = root / "tiny-pi0.yaml"
    path.write_text("kind: pi0\nname: tiny-pi0\ncheckpoint: weights\naction_steps: 4\n")
    return path


@pytest.fixture(scope="module")
def pi0_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    policy = fabricate_pi0.tiny_policy()
    root = tmp_path_factory.mktemp("pi0-store")
    store = DirectionStore(root)
    store.save(fabricate_pi0.neuron_direction(policy, "prefix", name="words"))
    store.save(fabricate_pi0.neuron_direction(policy, "expert", name="motion"))
    return root


def robot(domain: int, **parameters: object) -> NodeProcess:
    return NodeProcess([str(Path(__file__).parent / "point_robot.py")], parameters, domain)


def test_a_lockstep_episode_ends_and_both_towers_are_steered_by_name(
    pi0_yaml: Path, pi0_store: Path, third_domain: int
) -> None:
    # Generous waits: on a busy machine a node takes minutes to import what it needs.
    with (
        PolicyDriver(third_domain) as watcher,
        SteeringClient(domain_id=third_domain) as client,
        PolicyProcess(pi0_yaml, pi0_store, domain=third_domain),
        robot(third_domain, mode="lockstep") as body,
    ):
        state = client.wait_state(lambda s: s.lifecycle == "active" and s.counters.get("inferences", 0) > 0, 240.0)
        assert (state.policy, state.trained) == ("tiny-pi0", False)
        for target in ("words", "motion"):
            sent = client.publish(target, 1.0, timeout=20.0)
            verdict = client.wait_verdict(sent, 20.0)
            assert verdict.accepted, verdict.sentence
        steered = client.wait_state(lambda s: len(s.active) == 2, 20.0)
        assert {active.target for active in steered.active} == {"words", "motion"}
        assert not steered.alarms
        watcher.wait(lambda: "episode 1 " in body.log(), 60.0, "the end of an episode")
        assert "after 40 steps; 0 were held" in body.log()
