"""A policy node with a list of sources, limits of its robot, a chunk guard and shadows: each acts, and each is told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from driver import PolicyProcess, SensorDriver
from steer_msgs.msg import SteeringVerdict as SteeringVerdictMsg

from ros_nodes.client import SteeringClient
from ros_nodes.qos import VERDICT
from steer_runtime.steering.command import SteeringCommand

BOUND = 0.2
"""The tiny policy moves by more than that, steered or not."""


@dataclass
class Guarded:
    """The node's listed operator, one that is not listed, and its robot."""

    listed: SteeringClient
    stranger: SteeringClient
    driver: SensorDriver
    rejected: list[tuple[float, SteeringVerdictMsg]]


@pytest.fixture(scope="module")
def guarded_node(policy_yaml: Path, direction_store: Path, third_domain: int) -> Iterator[Guarded]:
    parameters = {
        "sources": ["operator", "other-operator"],
        "source_timeout_s": 1.5,
        "release_s": 0.2,
        "max_strengths": ["fast=0.25"],
        "chunk_bound": BOUND,
        "shadow_every": 1,
        "shadow_bound": 1e-4,
    }
    with (
        PolicyProcess(policy_yaml, direction_store, domain=third_domain, **parameters),
        SensorDriver(domain=third_domain) as driver,
        SteeringClient(source="operator", domain_id=third_domain) as listed,
        SteeringClient(source="stranger", domain_id=third_domain) as stranger,
    ):
        rejected: list[tuple[float, SteeringVerdictMsg]] = []
        driver.node.create_subscription(SteeringVerdictMsg, "rejected", driver.keep(rejected), VERDICT)
        driver.describe()
        listed.wait_state(lambda s: s.lifecycle == "active", timeout=180.0)
        stranger.connect()
        driver.wait_matched()
        driver.ask()
        yield Guarded(listed, stranger, driver, rejected)


@pytest.fixture
def node(guarded_node: Guarded) -> Guarded:
    cleared = guarded_node.listed.wait_verdict(guarded_node.listed.clear())
    guarded_node.listed.wait_state(lambda s: s.steering.sequence >= cleared.steering.sequence)
    return guarded_node


@pytest.mark.fault(11)
def test_a_source_that_is_not_listed_is_refused_on_both_topics_and_may_still_stop_all(node: Guarded) -> None:
    assert node.listed.wait_verdict(node.listed.publish("slow", 0.5)).accepted
    told = len(node.rejected)
    refused = node.stranger.wait_verdict(node.stranger.publish("slow", 0.9))
    assert (refused.accepted, refused.code) == (False, "source_not_allowed")
    node.driver.wait(lambda: len(node.rejected) > told, what="the refusal on `rejected`")
    assert (node.rejected[-1][1].source, node.rejected[-1][1].code) == ("stranger", "source_not_allowed")
    assert "'operator'" in node.rejected[-1][1].sentence
    owners = {a.source for a in node.listed.next_state().active}
    assert owners == {"operator"}
    assert node.stranger.wait_verdict(node.stranger.clear()).accepted
    node.listed.wait_state(lambda s: s.active == ())


def test_only_refusals_come_on_rejected(node: Guarded) -> None:
    assert node.listed.wait_verdict(node.listed.publish("slow", 0.25)).accepted
    assert not node.listed.wait_verdict(node.listed.publish("nothing", 0.25)).accepted
    node.driver.wait(lambda: any(m.code == "unknown_direction" for _, m in node.rejected), what="the refusal")
    assert not any(m.accepted for _, m in node.rejected)


@pytest.mark.fault(3)
def test_a_strength_over_the_limit_of_the_robot_is_clamped_and_said(node: Guarded) -> None:
    verdict = node.listed.wait_verdict(node.listed.publish("speed", 1.0))
    assert (verdict.code, verdict.applied_strength) == ("clamped", 0.25)
    assert "the limit of this robot" in verdict.sentence
    limits = {d.name: d.limit for d in node.listed.directions()}
    assert limits == {"slow": 1.0, "fast": 0.25, "gentle": 0.5}


@pytest.mark.fault(6)
def test_a_source_that_falls_silent_without_a_hold_is_released(node: Guarded) -> None:
    client = node.listed
    client.wait_verdict(client.publish("slow", 0.5))
    sent = time.monotonic()
    held = client.wait_state(lambda s: len(s.active) == 1)
    assert held.active[0].expires_in_s is not None
    client.wait_state(lambda s: s.active == (), timeout=10.0)
    assert 1.5 <= time.monotonic() - sent < 4.0


@pytest.mark.fault(5)
@pytest.mark.fault(6)
def test_a_source_that_still_sends_keeps_what_it_holds(node: Guarded) -> None:
    client = node.listed
    client.wait_verdict(client.publish("slow", 0.5))
    until = time.monotonic() + 3.0
    while time.monotonic() < until:
        client.wait_verdict(client.publish("gentle", 0.25))
        assert {a.target for a in client.next_state().active} >= {"slow"}


@pytest.mark.fault(21)
def test_no_action_leaves_the_node_out_of_bounds(node: Guarded) -> None:
    chunks = [node.driver.ask()]
    verdict = node.listed.wait_verdict(node.listed.publish("slow", 1.0, ramp_s=0.0))
    chunks.append(node.driver.ask(after=lambda chunk: chunk.steering_sequence >= verdict.steering.sequence))
    for chunk in chunks:
        motion = np.array(chunk.data, np.float32).reshape(chunk.rows, chunk.dims)[:, :-1]
        assert np.abs(motion).max() <= BOUND + 1e-6
    assert node.listed.wait_state(lambda s: s.counters["clamped_chunks"] > 0).counters["vetoed_chunks"] == 0


@pytest.mark.fault(21)
def test_steering_that_moves_the_action_too_far_is_backed_off_and_said(node: Guarded) -> None:
    client = node.listed
    before = client.next_state().counters.get("shadow_backed_off", 0)
    command = SteeringCommand("other-operator", time.time_ns(), 1, time.time_ns(), "set", "slow", 1.0, ramp_s=0.0)
    assert client.wait_verdict(client.send(command)).accepted

    def backed_off() -> bool:
        node.driver.ask()
        state = client.next_state()
        return state.counters.get("shadow_backed_off", 0) > before and all(a.commanded < 1.0 for a in state.active)

    deadline = time.monotonic() + 20
    while not backed_off():
        assert time.monotonic() < deadline
    assert any("steering moved an action by" in alarm for alarm in client.next_state().alarms)
