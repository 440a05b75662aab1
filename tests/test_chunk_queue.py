"""Chunks in real time, tick by tick: no clock, no thread."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_runtime.chunk_queue import ChunkQueue, QueueSettings, Tick
from steer_runtime.errors import SteerError
from steer_runtime.types import LIBERO_ACTION_SPACE, ActionChunk, SteeringStamp

JOINTS = dataclasses.replace(LIBERO_ACTION_SPACE, kind="joint_abs")


class Bench:
    """A queue and a policy that answers `latency` ticks after it was asked; row i of a chunk holds tick + i, then its id.

    changes: tick -> sequence of the steering commanded in it. An inference is under the steering of when it began.
    """

    def __init__(
        self, settings: QueueSettings, latency: int = 2, rows: int = 12, changes: Mapping[int, int] | None = None
    ) -> None:
        self.queue = ChunkQueue(LIBERO_ACTION_SPACE, settings)
        self.latency, self.rows, self.changes = latency, rows, dict(changes or {})
        self.answers: list[tuple[int, int, ActionChunk]] = []
        self.inferences = 0
        self.sequence = 0
        self.begun: list[int] = []

    def step(self) -> Tick:
        now = self.queue.tick
        if now in self.changes:
            self.sequence = self.changes[now]
            self.queue.steering_changed(SteeringStamp(1, self.sequence))
        for ready in [a for a in self.answers if a[0] <= now]:
            self.answers.remove(ready)
            self.queue.offer(ready[2], ready[1])
        if self.queue.due():
            self.begun.append(self.queue.begin())
            self.inferences += 1
            chunk = self.chunk(now, self.inferences, self.sequence)
            if self.latency == 0:
                self.queue.offer(chunk, now)
            else:
                self.answers.append((now + self.latency, now, chunk))
        return self.queue.next()

    def chunk(self, observed: int, inference_id: int, sequence: int = 0) -> ActionChunk:
        actions = np.zeros((self.rows, 7), np.float32)
        actions[:, 0] = observed + np.arange(self.rows)
        actions[:, 6] = 1.0
        return ActionChunk(
            actions, LIBERO_ACTION_SPACE, {}, inference_id=inference_id, steering=SteeringStamp(1, sequence)
        )

    def run(self, ticks: int) -> list[Tick]:
        return [self.step() for _ in range(ticks)]


def test_every_action_is_executed_at_its_own_tick() -> None:
    bench = Bench(QueueSettings(replan_every=5), latency=2)
    ticks = bench.run(40)
    assert [t.hold for t in ticks[:2]] == ["nothing yet"] * 2
    assert all(t.action[0] == t.tick and t.hold == "" for t in ticks[2:])


def test_inference_overlaps_execution_and_its_delay_is_trimmed() -> None:
    bench = Bench(QueueSettings(replan_every=5), latency=3)
    ticks = bench.run(30)
    # A chunk takes over three ticks after its observation and runs until the next one, five ticks younger, is there.
    assert bench.begun == [0, 5, 10, 15, 20, 25]
    rows = [(t.inference_id, t.row) for t in ticks[3:13]]
    assert rows == [*((1, r) for r in range(3, 8)), *((2, r) for r in range(3, 8))]
    assert bench.queue.counters["trimmed_rows"] == 6 * 3
    assert bench.queue.counters["holds"] == 3


def test_an_inference_is_due_every_k_ticks() -> None:
    for k in (1, 4, 9):
        bench = Bench(QueueSettings(replan_every=k), latency=0)
        bench.run(60)
        assert set(np.diff(bench.begun)) == {k}


def test_every_action_knows_its_chunk_its_row_and_its_steering() -> None:
    bench = Bench(QueueSettings(replan_every=4), latency=2, changes={9: 7})
    for tick in bench.run(40)[2:]:
        assert bench.begun[tick.inference_id - 1] + tick.row == tick.tick
        assert tick.steering == SteeringStamp(1, 7 if bench.begun[tick.inference_id - 1] >= 9 else 0)


def test_a_robot_that_runs_out_holds_still_with_its_gripper() -> None:
    enough = Bench(QueueSettings(replan_every=4), latency=6, rows=12)
    assert not any(t.hold for t in enough.run(60)[6:])
    bench = Bench(QueueSettings(replan_every=4), latency=6, rows=8)
    held = [t for t in bench.run(20) if t.hold == "used up"]
    assert held
    for tick in held:
        assert tick.action.tolist() == [0, 0, 0, 0, 0, 0, 1.0]  # no motion; closed, as last commanded
        assert (tick.row, tick.inference_id) == (-1, 0)


def test_before_the_first_action_the_gripper_rests_open() -> None:
    (first,) = Bench(QueueSettings(replan_every=4)).run(1)
    assert first.action.tolist() == [0, 0, 0, 0, 0, 0, LIBERO_ACTION_SPACE.gripper_open]


def test_absolute_joints_hold_their_pose() -> None:
    with pytest.raises(SteerError, match="give the pose at rest"):
        ChunkQueue(JOINTS, QueueSettings(replan_every=2))
    rest = np.arange(7, dtype=np.float32)
    queue = ChunkQueue(JOINTS, QueueSettings(replan_every=2), rest)
    assert queue.next().action.tolist() == rest.tolist()
    queue.begin()
    queue.offer(ActionChunk(np.full((1, 7), 3.0, np.float32), JOINTS, {}), 1)
    assert [queue.next().action[0] for _ in range(3)] == [3.0, 3.0, 3.0]


def test_a_chunk_that_comes_after_all_its_ticks_is_dropped() -> None:
    bench = Bench(QueueSettings(replan_every=2), latency=9, rows=8)
    ticks = bench.run(30)
    assert all(t.hold == "nothing yet" for t in ticks)
    assert bench.queue.counters["late_chunks"] == 3
    assert bench.queue.counters["chunks"] == 3


def test_rows_beyond_the_horizon_are_stale() -> None:
    bench = Bench(QueueSettings(replan_every=2, horizon=4), latency=3, rows=12)
    ticks = bench.run(20)
    assert max(t.row for t in ticks) == 3
    assert {t.hold for t in ticks[3:]} == {"", "stale"}
    with pytest.raises(SteerError, match="would hold in every chunk"):
        QueueSettings(replan_every=5, horizon=4)


def test_a_chunk_nobody_asked_for_is_not_executed() -> None:
    bench = Bench(QueueSettings(replan_every=5))
    arrival = bench.queue.offer(bench.chunk(0, 1), 0)
    assert (arrival.refused, bench.queue.next().hold) == ("not asked for", "nothing yet")


def test_an_inference_that_never_answers_is_given_up() -> None:
    bench = Bench(QueueSettings(replan_every=5, patience=7), latency=10**6)
    bench.run(20)
    assert bench.begun == [0, 7, 14]
    assert bench.queue.counters["given_up"] == 2


def test_an_inference_that_failed_is_due_again() -> None:
    bench = Bench(QueueSettings(replan_every=5))
    bench.queue.begin()
    assert not bench.queue.due()
    bench.queue.fail()
    assert bench.queue.due()


@pytest.mark.parametrize(("on_steering", "latest", "mean"), [("wait", 7, 5.0), ("replan", 5, 3.6), ("flush", 5, 3.6)])
def test_from_a_command_to_the_first_action_under_it(on_steering: str, latest: int, mean: float) -> None:
    """Ticks from a change to the first action made under it: k = 5, an inference takes 3 ticks."""
    waits = []
    for at in range(20, 60):
        bench = Bench(QueueSettings(5, on_steering=on_steering), latency=3, changes={at: 1})  # type: ignore[arg-type]
        waits.append(next(t.tick for t in bench.run(at + 30) if t.steering.sequence == 1) - at)
    assert min(waits) == 3  # no sooner than one inference
    assert max(waits) == latest
    assert np.mean(waits) == pytest.approx(mean, abs=0.1)


def test_flushed_rows_are_never_executed() -> None:
    bench = Bench(QueueSettings(5, on_steering="flush"), latency=3, changes={21: 1})
    ticks = bench.run(40)
    since = [t for t in ticks if t.tick >= 21]
    assert all(t.steering.sequence == 1 or t.hold == "flushed" for t in since)
    assert 3 <= sum(t.hold == "flushed" for t in since) <= 6
    assert bench.queue.counters["flushed_rows"] > 0


def test_replanning_at_once_never_holds() -> None:
    bench = Bench(QueueSettings(5, on_steering="replan"), latency=3, changes={21: 1, 27: 2, 28: 3})
    assert not any(t.hold for t in bench.run(60)[3:])


def test_a_stream_of_commands_does_not_keep_the_robot_still() -> None:
    bench = Bench(QueueSettings(5, on_steering="flush"), latency=2, changes={t: t for t in range(10, 210)})
    ticks = bench.run(210)[10:]
    assert sum(t.hold == "" for t in ticks) >= 0.35 * len(ticks)


def test_an_inference_begun_before_the_change_may_be_stopped() -> None:
    bench = Bench(QueueSettings(5, on_steering="replan"), latency=5)
    bench.step()
    assert not bench.queue.cancel_wanted
    bench.queue.steering_changed(SteeringStamp(1, 1))
    assert bench.queue.cancel_wanted
    bench.queue.fail()
    bench.queue.begin()
    assert not bench.queue.cancel_wanted
    waiting = Bench(QueueSettings(5), latency=5)
    waiting.step()
    waiting.queue.steering_changed(SteeringStamp(1, 1))
    assert not waiting.queue.cancel_wanted


def test_an_older_change_is_ignored() -> None:
    bench = Bench(QueueSettings(5, on_steering="flush"), latency=2, changes={10: 5})
    bench.run(20)
    before = bench.queue.counters
    bench.queue.steering_changed(SteeringStamp(1, 4))
    bench.queue.steering_changed(SteeringStamp(0, 9))
    assert not bench.queue.cancel_wanted
    bench.step()
    assert bench.queue.counters["flushed_rows"] == before["flushed_rows"]


def test_a_new_episode_begins_empty_and_open() -> None:
    bench = Bench(QueueSettings(5), latency=2)
    bench.run(10)
    bench.queue.reset()
    tick = bench.queue.next()
    assert (tick.hold, tick.action[6]) == ("nothing yet", LIBERO_ACTION_SPACE.gripper_open)


@pytest.mark.parametrize(
    "changes", [{"replan_every": 0}, {"replan_every": 2.5}, {"patience": 0}, {"horizon": 0}, {"on_steering": "stop"}]
)
def test_unusable_settings_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(SteerError) as refused:
        QueueSettings(**{"replan_every": 1, **changes})  # type: ignore[arg-type]
    assert refused.value.code == "bad_queue"


def test_chunks_of_another_space_or_shape_are_refused() -> None:
    queue = ChunkQueue(LIBERO_ACTION_SPACE, QueueSettings(5))
    for chunk in (
        ActionChunk(np.zeros((2, 7), np.float32), JOINTS, {}),
        ActionChunk(np.zeros((2, 6), np.float32), LIBERO_ACTION_SPACE, {}),
    ):
        with pytest.raises(SteerError, match="arrived") as refused:
            queue.offer(chunk, queue.begin())
        assert refused.value.code == "action_space_mismatch"


@given(
    k=st.integers(1, 8),
    latency=st.integers(0, 12),
    rows=st.integers(1, 16),
    mode=st.sampled_from(["wait", "replan", "flush"]),
    at=st.lists(st.integers(0, 60), max_size=8, unique=True),
)
def test_whatever_happens_a_row_runs_at_its_own_tick_or_not_at_all(
    k: int, latency: int, rows: int, mode: str, at: list[int]
) -> None:
    changes = {tick: i + 1 for i, tick in enumerate(sorted(at))}
    bench = Bench(QueueSettings(k, on_steering=mode), latency, rows, changes)  # type: ignore[arg-type]
    newest = SteeringStamp(0, 0)
    for tick in bench.run(80):
        if tick.hold:
            assert not tick.action[:6].any()
            continue
        assert tick.action[0] == tick.tick == bench.begun[tick.inference_id - 1] + tick.row
        assert (tick.steering.epoch, tick.steering.sequence) >= (newest.epoch, newest.sequence)
        newest = tick.steering
