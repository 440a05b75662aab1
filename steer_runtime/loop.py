"""The inference loop: newest observation in, stamped chunk out, on its own thread.

Invariants: a steering latch and its trace belong to exactly one inference; an action that is not finite, has the wrong
shape or exceeds the guard's limits is never handed on; when the policy fails the hooks come off, and after
`max_restarts` the loop stays stopped.
"""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from steer_runtime.chunk_guard import ChunkGuard
from steer_runtime.errors import SteerError
from steer_runtime.shadow import Shadow
from steer_runtime.steering.engine import SteeringEngine
from steer_runtime.steering.trace import TraceRecord
from steer_runtime.types import COUNTED_NOTES, ActionChunk, Memory, Observation, Policy, Remembering

LoopState = Literal["idle", "running", "holding", "error"]


@dataclass(frozen=True)
class LoopEvent:
    """Something the operator must see: a stable code and a sentence. fatal: the loop has stopped for good."""

    code: str
    sentence: str
    fatal: bool = False


@dataclass(frozen=True)
class Inference:
    """One inference as it was: with the same observation, memory and steering it can be run again, bit for bit.

    memory: the policy's, before it. chunk: as the policy answered, before any guard.
    """

    observation: Observation
    memory: Memory
    record: TraceRecord
    chunk: ActionChunk


class InferenceLoop:
    """Runs `policy` under `engine` on the newest observation.

    on_chunk and on_event are called on the loop's thread; an exception in them counts as a failure of the policy side.
    on_inference hears of each inference with a well-formed chunk, there too, before the chunk is judged or handed on.
    max_restarts: how many failures of the policy are answered by a restart before the loop gives up.
    guard: limits that every chunk is held to. shadow: inferences repeated without steering, after their chunk has gone out.
    """

    def __init__(
        self,
        policy: Policy,
        engine: SteeringEngine,
        on_chunk: Callable[[ActionChunk], None],
        on_event: Callable[[LoopEvent], None],
        *,
        max_restarts: int = 3,
        guard: ChunkGuard | None = None,
        shadow: Shadow | None = None,
        on_inference: Callable[[Inference], None] = lambda inference: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._engine = engine
        self._on_chunk = on_chunk
        self._on_event = on_event
        self._on_inference = on_inference
        self._max_restarts = max_restarts
        self._guard = guard
        self._shadow = shadow
        self._excess_told = False
        self._clock = clock
        self._condition = threading.Condition()
        self._newest: tuple[Observation, float] | None = None
        self._stopping = False
        self._again = False  # the running inference was begun anew once
        self._restarting = False
        self._thread: threading.Thread | None = None
        self._state: LoopState = "idle"
        self._restarts = 0
        self._counters: Counter[str] = Counter(
            dict.fromkeys(
                (
                    "observations",
                    "dropped_observations",
                    "refused_observations",
                    "inferences",
                    "cancelled_inferences",
                    "policy_errors",
                    "bad_actions",
                    "clamped_chunks",
                    "vetoed_chunks",
                    "shadow_inferences",
                    "shadow_gripper_rows",
                    *COUNTED_NOTES,
                ),
                0,
            )
        )

    @property
    def state(self) -> LoopState:
        return self._state

    @property
    def counters(self) -> Mapping[str, int]:
        """Copy of the counters."""
        with self._condition:
            return dict(self._counters)

    def start(self) -> None:
        """Attach the engine if it is not, reset the policy, and begin."""
        if self._thread is not None:
            raise SteerError("already_running", "the inference loop runs already; stop it first")
        self._stopping = False
        self._restarts = 0
        self._newest = None
        self._again = self._restarting = False
        self._policy.reset()
        self._forget_motion()
        if not self._engine.attached:
            self._engine.attach()
        self._state = "running"
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    def submit(self, observation: Observation) -> None:
        """Offer an observation; any thread. An older one that is still waiting is dropped and counted."""
        with self._condition:
            self._counters["observations"] += 1
            if self._newest is not None:
                self._counters["dropped_observations"] += 1
            self._newest = (observation, self._clock())
            self._condition.notify()

    def restart(self) -> None:
        """Begin the running inference anew, under the newest steering, on the newest observation; any thread.

        Only where the policy can stop between its steps (it has `cancel`), and once until a chunk comes out, lest a
        stream of commands keeps any from coming.
        """
        with self._condition:
            if self._again or self._stopping:
                return
            self._restarting = True
        self._cancel()

    def _cancel(self) -> None:
        cancel = getattr(self._policy, "cancel", None)
        if cancel is not None:
            cancel()

    def hold(self, sentence: str) -> None:
        """Say that observations stopped coming; the next inference resumes by itself."""
        with self._condition:
            if self._state != "running":
                return
            self._state = "holding"
        self._on_event(LoopEvent("holding", sentence))

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after the running inference and detach the engine. Raises SteerError when it does not end."""
        thread = self._thread
        with self._condition:
            self._stopping = True
            self._newest = None
            self._condition.notify()
        if thread is not None:
            self._cancel()
            thread.join(timeout_s)
            if thread.is_alive():
                raise SteerError(
                    "inference_stuck", f"the running inference did not end within {timeout_s} s; end the process"
                )
        self._thread = None
        self._engine.detach()
        if self._state != "error":
            self._state = "idle"

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._stopping or self._newest is not None)
                if self._stopping or self._newest is None:
                    return
                observation, received_s = self._newest
                self._newest = None
            try:
                self._infer(observation, received_s)
            except Exception as error:
                if not self._recover(error):
                    return

    def _infer(self, observation: Observation, received_s: float) -> None:
        if self._guard is not None and self._state == "holding":
            self._guard.reset()  # the robot has come to rest
        steering = self._engine.latch()
        self._tell_gripper(observation)
        if self._shadow is not None:
            self._shadow.before()
        memory = self._policy.memory() if isinstance(self._policy, Remembering) else {}
        try:
            chunk = self._policy.infer(observation)
        except SteerError as error:
            if error.code == "cancelled":
                self._take_again(observation, received_s)
                return
            self._count("refused_observations")
            self._hold_after(LoopEvent(error.code, error.sentence))
            return
        record = self._engine.finish()
        fault = _fault_in(chunk)
        if fault is not None:
            self._count("bad_actions")
            self._hold_after(LoopEvent("bad_action", fault))
            return
        self._on_inference(Inference(observation, memory, record, chunk))
        inferred = chunk
        if self._guard is not None:
            try:
                chunk, excess = self._guard.check(chunk)
            except SteerError as error:
                self._count("vetoed_chunks")
                self._alarm_once(error.sentence)
                self._hold_after(LoopEvent(error.code, error.sentence))
                return
            if excess is not None:
                self._count("clamped_chunks")
                self._alarm_once(f"{excess.sentence}; it was clamped")
        notes = {**chunk.notes, "steering_interrupted": 1.0} if record.interrupted else chunk.notes
        stamped = chunk.stamped(
            inference_id=record.inference_id,
            steering=steering,
            observation_stamp_ns=observation.stamp_ns,
            frame_id=observation.frame_id,
            age_s=self._clock() - received_s,
            notes=notes,
        )
        with self._condition:
            self._counters["inferences"] += 1
            self._counters.update({name: int(notes.get(name, 0)) for name in COUNTED_NOTES})
            self._again = self._restarting = False
            if self._stopping:
                return
            self._state = "running"
        self._on_chunk(stamped)
        if self._shadow is not None and self._shadow.due and record.strengths and not record.interrupted:
            self._repeat_unsteered(self._shadow, observation, inferred)

    def _repeat_unsteered(self, shadow: Shadow, observation: Observation, steered: ActionChunk) -> None:
        try:
            moved = shadow.run(observation, steered)
        except SteerError as error:
            # Cancelled by a command that wants the next inference, or not finite: nothing was measured.
            self._count(f"shadow_{error.code}")
            with self._condition:
                self._restarting = False
            return
        with self._condition:
            self._counters["shadow_inferences"] += 1
            self._counters["shadow_gripper_rows"] += moved.gripper

    def _alarm_once(self, sentence: str) -> None:
        """The engine's alarms are what operators see; the same kind of excess in every chunk is one of them."""
        if not self._excess_told:
            self._excess_told = True
            self._engine.alarm(sentence)

    def _tell_gripper(self, observation: Observation) -> None:
        """What the robot last told its gripper: of a chunk replanned before its end, that is not the last row."""
        tell = getattr(self._policy, "told_gripper", None)
        if tell is not None and observation.gripper_command is not None:
            tell(observation.gripper_command)

    def _take_again(self, observation: Observation, received_s: float) -> None:
        """After a cancelled inference: its observation waits again, unless a newer one does or the loop ends."""
        with self._condition:
            self._counters["cancelled_inferences"] += 1
            self._again, self._restarting = self._restarting, False
            if self._newest is None and not self._stopping:
                self._newest = (observation, received_s)

    def _recover(self, error: Exception) -> bool:
        """Hooks off and hold; restart while allowed. False ends the thread."""
        self._count("policy_errors")
        self._engine.detach()
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            self._free_memory()
        sentence = f"the policy failed with {type(error).__name__}: {error}"
        if self._restarts >= self._max_restarts:
            self._state = "error"
            self._on_event(
                LoopEvent("policy_failed", f"{sentence}; {self._restarts} restarts were not enough, it stays off", True)
            )
            return False
        self._restarts += 1
        self._hold_after(
            LoopEvent(
                "policy_restarted",
                f"{sentence}; steering is cleared, restart {self._restarts} of {self._max_restarts}",
            )
        )
        try:
            self._policy.reset()
            self._engine.attach()
        except Exception as again:
            self._state = "error"
            self._on_event(LoopEvent("policy_failed", f"the policy did not restart: {again}", True))
            return False
        return True

    def _free_memory(self) -> None:
        """Give back what the failed inference still holds, so that the restart has it."""
        self._count("out_of_memory")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _forget_motion(self) -> None:
        self._excess_told = False
        if self._guard is not None:
            self._guard.reset()

    def _hold_after(self, event: LoopEvent) -> None:
        self._state = "holding"
        self._on_event(event)

    def _count(self, name: str) -> None:
        with self._condition:
            self._counters[name] += 1


def _fault_in(chunk: ActionChunk) -> str | None:
    """Why a chunk must not reach a robot, or None."""
    actions = chunk.actions
    if not isinstance(actions, np.ndarray) or actions.dtype != np.float32:
        return f"the policy returned {getattr(actions, 'dtype', type(actions).__name__)} actions: expected float32"
    if actions.ndim != 2 or actions.shape[0] < 1 or actions.shape[1] != chunk.space.dims:
        return f"the policy returned actions of shape {list(actions.shape)}: expected [T >= 1, {chunk.space.dims}]"
    if not np.isfinite(actions).all():
        return "the policy returned NaN or infinite actions; they were refused"
    return None
