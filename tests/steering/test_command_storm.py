"""Storms of generated commands into desk and engine: no crash, no unsafe strength or action, nothing that grows.

The short storm is for every change; `make test-heavy` runs the long one (with tests/ros/test_wire_storm.py 100,000 commands
and more).
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass

import fabricate
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_runtime.directions.direction import Axis
from steer_runtime.errors import SteerError
from steer_runtime.steering.command import Limits, SteeringCommand
from steer_runtime.steering.engine import SteeringEngine, hooks_on
from steer_runtime.types import ROLES
from steering.subjects import Time, dense_direction, neuron_direction

POLICY = fabricate.tiny_policy()
OBSERVATION = fabricate.make_observation(POLICY)
BASELINE = POLICY.infer(OBSERVATION).actions
LIMITS = Limits(
    max_targets=3,
    max_sources=8,
    sources=frozenset({"anna", "ben", "eve"}),
    source_timeout_s=2.0,
    max_strengths={"up": 0.4},
)
LARGEST = {"up": 0.4, "drift": 1.0, "slow": 0.5, "fast": 1.0, "speed": 1.0}
COMMANDS_AN_EXAMPLE = 20

anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=200), st.binary(max_size=20)
)
often_right = {
    "source": st.sampled_from(["anna", "ben", "eve", "mallory"]),
    "epoch": st.integers(1, 3),
    "sequence": st.integers(0, 10_000),
    "op": st.sampled_from(["set", "set", "set", "set", "clear", "clear_all"]),
    "target": st.sampled_from([*LARGEST, "up@000000000000", "upp", ""]),
    "strength": st.one_of(st.floats(-1.5, 1.5), st.floats(), st.sampled_from([1e300, -1e300, 0.0, -0.0, 5e-324])),
    "ramp_s": st.one_of(st.none(), st.floats(0.0, 2.0), st.floats()),
    "hold_s": st.one_of(st.none(), st.floats(0.0, 3.0), st.floats()),
    "priority": st.integers(-3, 3),
    "span": st.one_of(st.none(), st.frozensets(st.sampled_from([*ROLES, "sound"]), max_size=4)),
    "steps": st.one_of(st.none(), st.tuples(st.integers(-2, 9), st.integers(-2, 9))),
}


@dataclass(frozen=True)
class Sent:
    """A command with the age of its stamp, and the seconds that pass before it."""

    command: SteeringCommand
    age_s: float
    wait_s: float


@st.composite
def sent(draw: st.DrawFn) -> Sent:
    """Mostly a command that could be right, with up to one field that is anything at all."""
    fields = {name: draw(strategy) for name, strategy in often_right.items()}
    if draw(st.integers(0, 4)) == 0:
        fields[draw(st.sampled_from(sorted(fields)))] = draw(anything)
    command = SteeringCommand(**{"stamp_ns": 0, **fields})  # type: ignore[arg-type]
    return Sent(
        command, draw(st.sampled_from([0.0, 0.0, 0.0, 0.5, 2.0, -1.0])), draw(st.sampled_from([0.0, 0.05, 0.5, 3.0]))
    )


class Storm:
    """One engine that weathers every example, as one node weathers every sender."""

    def __init__(self) -> None:
        self.time = Time()
        directions = [
            neuron_direction(POLICY, "up", [(0, 1), (1, 7)], max_strength=0.8),
            neuron_direction(POLICY, "slow", [(0, 2)], max_strength=0.5),
            neuron_direction(POLICY, "fast", [(0, 3)]),
            dense_direction(POLICY, "drift"),
        ]
        self.engine = SteeringEngine(
            POLICY,
            directions,
            [Axis("speed", "slow", "fast")],
            limits=LIMITS,
            clock=self.time.steady,
            wall_ns=self.time.wall_ns,
        )
        self.engine.attach()
        self.commands = self.inferences = 0

    def send(self, sent: Sent) -> None:
        """Apply one command and check what must hold after any."""
        self.time.now_s += sent.wait_s
        stamp_ns = self.time.wall_ns() - int(sent.age_s * 1e9)
        before = self.engine.state()
        command = SteeringCommand(**{**vars(sent.command), "stamp_ns": stamp_ns})
        verdict = self.engine.apply(command)
        after = self.engine.state()
        self.commands += 1
        assert verdict.code
        assert 0 < len(verdict.sentence) < 600
        assert math.isfinite(verdict.applied_strength)
        if not verdict.accepted:
            assert (after.steering, after.active) == (before.steering, before.active)
        elif command.op != "clear_all":
            assert command.source in LIMITS.sources
            assert abs(verdict.applied_strength) <= LARGEST[command.target.split("@")[0]]
        assert len(after.active) <= LIMITS.max_targets
        for active in after.active:
            assert abs(active.strength) <= LARGEST[active.target]
            assert active.source in LIMITS.sources

    def infer(self) -> None:
        """One inference under whatever is commanded: finite actions, every hook fired."""
        self.engine.latch()
        actions = POLICY.infer(OBSERVATION).actions
        record = self.engine.finish()
        self.inferences += 1
        assert np.isfinite(actions).all()
        assert all(0.0 < strength <= 1.0 for _, strength in record.strengths)
        if not record.strengths:
            assert np.array_equal(actions, BASELINE), "off is bit-identical, whatever came before"

    def weather(self, sent: list[Sent]) -> None:
        for each in sent:
            self.send(each)
        self.infer()


def run(examples: int, times: int = 1, after_each: Callable[[], None] = lambda: None) -> Storm:
    """One engine in `times` runs of Hypothesis, which keeps every example of a run until its end."""
    storm = Storm()
    try:

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
        )
        @given(commands=st.lists(sent(), min_size=COMMANDS_AN_EXAMPLE, max_size=COMMANDS_AN_EXAMPLE))
        def weather(commands: list[Sent]) -> None:
            storm.weather(commands)

        for _ in range(times):
            weather()
            after_each()
        # Who has seen a thousand senders and codes remembers a bounded number of each.
        assert len(storm.engine._desk._newest) <= LIMITS.max_sources
        assert len(storm.engine.state().counters) < 40
        assert len(storm.engine.state().alarms) <= 20
        storm.engine.clear_now()
        storm.infer()
    finally:
        storm.engine.detach()
    assert hooks_on(POLICY.model) == 0
    return storm


@pytest.mark.fault(12)
def test_a_short_storm_of_commands_leaves_the_engine_sound() -> None:
    storm = run(50)
    assert storm.commands >= 1000


@pytest.mark.fault(12)
@pytest.mark.heavy
@pytest.mark.timeout(7200)
def test_a_long_storm_of_commands_leaves_the_engine_sound_and_its_memory_flat() -> None:
    memory_mib: list[float] = []

    def measure() -> None:
        gc.collect()
        memory_mib.append(psutil.Process().memory_info().rss / 2**20)

    storm = run(250, times=18, after_each=measure)
    assert storm.commands >= 90_000
    # What the allocator holds for Hypothesis is there after a few runs.
    assert memory_mib[-1] < memory_mib[5] + 30.0, memory_mib


@pytest.mark.fault(1)
@pytest.mark.fault(2)
def test_text_of_any_kind_is_a_command_or_one_sentence() -> None:
    from ros_nodes.command_json import command_from_json

    @settings(max_examples=300, deadline=None, database=None)
    @given(text=st.one_of(st.text(max_size=400), st.from_regex(r'\{("[a-z_]+": ?[\-0-9eE.\[\]{}"]+,? ?)*\}?')))
    def read(text: str) -> None:
        try:
            command_from_json(text)
        except SteerError as error:
            said = error.sentence
        else:
            return
        assert len(said) < 600

    read()
