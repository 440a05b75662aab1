"""The inference loop around a policy that can stop between its steps."""

from __future__ import annotations

import queue
import threading

import fabricate_pi0

from steer_runtime.loop import InferenceLoop, LoopEvent
from steer_runtime.policies.pi0.policy import Pi0Policy
from steer_runtime.steering.command import SteeringCommand
from steer_runtime.steering.engine import SteeringEngine
from steer_runtime.types import ActionChunk

WAIT_S = 20.0


class Bench:
    """A loop around a tiny Pi0 whose first denoising step waits until it is let go."""

    def __init__(self) -> None:
        self.policy: Pi0Policy = fabricate_pi0.tiny_policy()
        self.engine = SteeringEngine(self.policy, [fabricate_pi0.neuron_direction(self.policy, "expert")])
        self.chunks: queue.Queue[ActionChunk] = queue.Queue()
        self.events: queue.Queue[LoopEvent] = queue.Queue()
        self.loop = InferenceLoop(self.policy, self.engine, self.chunks.put, self.events.put)
        self.entered: queue.Queue[int] = queue.Queue()
        self.go = threading.Semaphore(0)
        self.steps = 0
        self.policy.model.expert_entry.register_forward_hook(self._wait)

    def _wait(self, *_: object) -> None:
        self.steps += 1
        self.entered.put(self.steps)
        assert self.go.acquire(timeout=WAIT_S)

    def __enter__(self) -> Bench:
        self.loop.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go.release(1000)
        self.loop.stop()

    def command(self, sequence: int) -> None:
        stamp_ns = self.engine._wall_ns()
        assert self.engine.apply(SteeringCommand("me", 1, sequence, stamp_ns, "set", "up", 1.0)).accepted


def test_a_command_may_begin_the_running_inference_anew() -> None:
    with Bench() as bench:
        bench.loop.submit(fabricate_pi0.make_observation(frame_id=4))
        bench.entered.get(timeout=WAIT_S)
        bench.command(1)
        bench.loop.restart()
        bench.go.release(1000)
        chunk = bench.chunks.get(timeout=WAIT_S)
        # Stopped after one step, and run whole on the same frame under the new command.
        assert (chunk.frame_id, chunk.steering, bench.steps) == (4, bench.engine.state().steering, 1 + 4)
        assert bench.loop.counters["cancelled_inferences"] == 1
        assert bench.loop.counters["inferences"] == 1
        assert bench.loop.state == "running"
        assert bench.events.empty()


def test_a_stream_of_commands_does_not_keep_a_chunk_from_coming() -> None:
    with Bench() as bench:
        bench.loop.submit(fabricate_pi0.make_observation())
        for sequence in range(1, 6):
            bench.entered.get(timeout=WAIT_S)
            bench.command(sequence)
            bench.loop.restart()
            bench.go.release()
        bench.chunks.get(timeout=WAIT_S)
        assert bench.loop.counters["cancelled_inferences"] == 1


def test_a_newer_frame_is_taken_instead_of_the_stopped_one() -> None:
    with Bench() as bench:
        bench.loop.submit(fabricate_pi0.make_observation(frame_id=1))
        bench.entered.get(timeout=WAIT_S)
        bench.loop.submit(fabricate_pi0.make_observation(frame_id=2))
        bench.loop.restart()
        bench.go.release(1000)
        assert bench.chunks.get(timeout=WAIT_S).frame_id == 2


def test_stopping_does_not_wait_for_the_remaining_steps() -> None:
    bench = Bench()
    bench.loop.start()
    bench.loop.submit(fabricate_pi0.make_observation())
    bench.entered.get(timeout=WAIT_S)
    stopper = threading.Thread(target=bench.loop.stop)
    stopper.start()
    while not bench.policy._cancelled.is_set():
        pass
    bench.go.release(1000)
    stopper.join(WAIT_S)
    assert not stopper.is_alive()
    assert bench.steps == 1
    assert (bench.loop.state, bench.chunks.empty(), bench.events.empty()) == ("idle", True, True)
