"""Twenty seconds of what benchmarks/soak.py runs for half an hour: everything accounted for, memory as it was."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks.soak import Samples, _result, growth_of, run


@pytest.mark.soak
@pytest.mark.fault(4)
def test_a_short_soak_loses_nothing_and_keeps_controlling(
    tmp_path: Path, other_domain: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "ROS_DOMAIN_ID", str(other_domain))
    result = run(minutes=20 / 60, out=tmp_path, quiet=True)
    assert result.kept["every command accounted for"], result
    assert result.kept["no control step lost"], result
    # How well the rate is kept is for the long run on a quiet machine to say; starving shows here.
    assert result.period_ms["p50"] == pytest.approx(50.0, rel=0.1)
    assert result.steps >= 300
    assert max(result.growth["policy node"], result.growth["robot node"]) < 0.2
    assert json.loads((tmp_path / "soak.json").read_text())["steps"] == result.steps
    assert (tmp_path / "soak.png").stat().st_size > 10_000


def test_a_soak_that_loses_says_so() -> None:
    stamps = [round(i * 5e7) for i in range(400)]
    steps = [(0, i) for i in range(400)]
    memory = {"policy node": [100.0] * 20, "robot node": [100.0 + i for i in range(20)]}
    good = Samples(stamps, steps, 0, list(map(float, range(20))), {**memory, "robot node": [50.0] * 20})
    counters = {"commands": 19_000, "missed_commands": 1_001}
    assert all(_result(good, counters, 20.0, 20.0, 1000.0, True).kept.values())
    growing = Samples(stamps, steps, 0, list(map(float, range(20))), memory)
    late = Samples([*stamps[:200], *(s + 10**8 for s in stamps[200:])], steps, 0, good.at_s, good.memory_mib)
    gap = Samples(stamps, [*steps[:200], *((0, i + 1) for i in range(200, 400))], 0, good.at_s, good.memory_mib)
    for samples, counted, broken in (
        (growing, counters, "memory flat"),
        (late, counters, "p99.9 of the period within 1.5 ticks"),
        (gap, counters, "no control step lost"),
        (good, {"commands": 19_000}, "every command accounted for"),
    ):
        kept = _result(samples, counted, 20.0, 20.0, 1000.0, True).kept
        assert [promise for promise, held in kept.items() if not held] == [broken]


def test_growth_is_that_of_the_settled_part() -> None:
    at = np.arange(100.0)
    assert growth_of(at, [*range(20), *[100.0] * 80]) == pytest.approx(0.0, abs=1e-9)
    assert growth_of(at, 100.0 + at) == pytest.approx(79 / 120, rel=0.02)
