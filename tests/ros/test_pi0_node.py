"""The policy node runs a Pi0 as it runs any other policy."""

from __future__ import annotations

import json
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
    pi0_yaml: Path, pi0_store: Path, third_domain: int, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    # Generous waits: on a busy machine a node takes minutes to import what it needs.
    with (
        PolicyDriver(third_domain) as watcher,
        SteeringClient(domain_id=third_domain) as client,
        PolicyProcess(pi0_yaml, pi0_store, domain=third_domain, trace_path=trace),
        robot(third_domain, mode="lockstep") as body,
    ):
        state = client.wait_state(lambda s: s.lifecycle == "active" and s.counters.get("inferences", 0) > 0, 240.0)
        assert (state.policy, state.trained) == ("tiny-pi0", False)
        for target, steps in (("words", None), ("motion", (1, 3))):
            sent = client.publish(target, 1.0, ramp_s=0.0, steps=steps, timeout=20.0)
            verdict = client.wait_verdict(sent, 20.0)
            assert verdict.accepted, verdict.sentence
        steered = client.wait_state(lambda s: len(s.active) == 2, 20.0)
        assert {active.target: active.steps for active in steered.active} == {"words": None, "motion": (1, 3)}
        assert not steered.alarms
        for target, steps, said in (
            ("motion", (2, 9), "takes 4 denoising steps; choose within 0:4"),
            ("motion", (2, 2), "expected two whole numbers"),
            ("words", (0, 1), "'prefix', which has no denoising steps: steer a direction of tower expert"),
        ):
            verdict = client.wait_verdict(client.publish(target, 0.5, steps=steps, timeout=20.0), 20.0)
            assert (verdict.accepted, verdict.code) == (False, "bad_steps")
            assert said in verdict.sentence
        watcher.wait(lambda: "episode 1 " in body.log(), 60.0, "the end of an episode")
        assert "after 40 steps; 0 were held" in body.log()
    records = [json.loads(line) for line in trace.read_text().splitlines() if line.endswith("}")]
    forwards = [
        {site["tower"]: site["forwards"] for site in record["sites"]}
        for record in records
        if record["steering"]["sequence"] == steered.steering.sequence
    ]
    # The prefix runs once an inference, the expert in every denoising step: two of the four were named.
    assert {"prefix": 1, "expert": 2} in forwards
