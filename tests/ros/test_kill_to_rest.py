"""kill -9 of each process of a steered arm in motion: the arm rests, or goes on unsteered where it should."""

from __future__ import annotations

from pathlib import Path

import pytest
from rig import ArmRig

from arm.settings import load_settings
from benchmarks.kill_to_rest import VICTIMS, Death, deaths, kill_each
from sim.ur5.truth import Motion, read_motion

HORIZON_S = load_settings("ur5e").motion.horizon_s
CHUNK_S = 0.2
"""Rows that the bridge still holds when the policy dies."""
MACHINE_S = 0.7
"""A machine that is busy may be late by so much."""


@pytest.fixture(scope="module")
def fallen(
    policy_yaml: Path, direction_store: Path, third_domain: int, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Death], Motion]:
    folder = tmp_path_factory.mktemp("killed")
    with ArmRig(policy_yaml, direction_store, third_domain, folder) as rig:
        killed = kill_each(rig, "slow")
        motion = read_motion(rig.log)
    return {death.victim: death for death in deaths(killed, motion)}, motion


@pytest.mark.heavy
@pytest.mark.fault(33)
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("victim", VICTIMS)
def test_whoever_is_killed_the_arm_rests_within_the_horizon(
    fallen: tuple[dict[str, Death], Motion], victim: str
) -> None:
    death = fallen[0][victim]
    assert death.speed_rad_s > 0.01, "it did not move when it was killed"
    limit_s = {"commander": 1.0, "policy": CHUNK_S + HORIZON_S, "bridge": HORIZON_S, "driver": HORIZON_S}[victim]
    assert death.seconds < limit_s + MACHINE_S


@pytest.mark.heavy
@pytest.mark.fault(33)
@pytest.mark.timeout(1500)
def test_no_death_makes_the_arm_faster_than_its_limits(fallen: tuple[dict[str, Death], Motion]) -> None:
    motion = fallen[1]
    assert motion.tcp_speed.max() <= load_settings("ur5e").limits.tcp_speed_m_s
