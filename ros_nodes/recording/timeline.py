"""What happened in a recorded run, one line an event, from the recording alone.

Invariant: nothing here imports ROS; what repeats is told once, with how often.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ros_nodes.recording.file import Recorded, Recording

OPS = {0: "set", 1: "clear", 2: "clear all"}
LEVELS = ("ok", "warning", "error", "stale")


@dataclass(frozen=True)
class Event:
    """at_s: seconds since the first message. style: of rich, "" for none."""

    at_s: float
    kind: str
    text: str
    style: str = ""


def timeline(recording: Recording) -> Iterator[Event]:
    """Events of a recording, in order. Raises SteerError('bad_recording')."""
    teller = _Teller(recording.namespace.rstrip("/") + "/")
    end_ns = 0
    for recorded in recording.messages():
        end_ns = recorded.log_ns
        yield from teller.hear(recorded)
    yield from teller.end(end_ns)
    if not recording.whole:
        yield Event(teller.at(end_ns), "recording", "cut short: what came after is missing", "red")


class _Teller:
    def __init__(self, inside: str) -> None:
        self._inside = inside
        self._start_ns: int | None = None
        self._steering: tuple[str, int, int] | None = None  # of the newest inference
        self._inferences = 0
        self._seen: dict[str, Any] = {}

    def at(self, ns: int) -> float:
        return (ns - (self._start_ns or ns)) / 1e9

    def hear(self, recorded: Recorded) -> Iterator[Event]:
        if self._start_ns is None:
            self._start_ns = recorded.log_ns
        name = recorded.topic.removeprefix(self._inside).strip("/").replace("/", "_")
        tell = getattr(self, f"_on_{name}", None)
        if tell is not None:
            yield from tell(self.at(recorded.log_ns), recorded.message)

    def end(self, end_ns: int) -> Iterator[Event]:
        yield Event(self.at(end_ns), "recording", f"the last message; {self._inferences} inferences in all")

    def _changed(self, key: str, value: Any) -> bool:
        changed = self._seen.get(key) != value
        self._seen[key] = value
        return changed

    def _on_robot_description(self, at_s: float, m: Any) -> Iterator[Event]:
        mode = "lockstep" if m.lockstep else "free-running"
        yield Event(at_s, "robot", f"{m.robot} ({mode}), session {m.session_id[:8]}, {m.kind} at {m.rate_hz:g} Hz")

    def _on_instruction(self, at_s: float, m: Any) -> Iterator[Event]:
        if self._changed("instruction", m.data):
            yield Event(at_s, "instruction", m.data)

    def _on_command(self, at_s: float, m: Any) -> Iterator[Event]:
        what = OPS.get(int(m.op), f"op {m.op}")
        strength = f" {m.strength:+g}" if m.op == 0 else ""
        ramp = f", ramp {m.ramp_s:g} s" if m.ramp_s >= 0 else ""
        hold = f", hold {m.hold_s:g} s" if m.hold_s else ""
        yield Event(at_s, "command", f"{m.source} {m.sequence}: {what} {m.target}{strength}{ramp}{hold}", "cyan")

    def _on_command_json(self, at_s: float, m: Any) -> Iterator[Event]:
        yield Event(at_s, "command", f"as JSON: {m.data[:120]}", "cyan")

    def _on_verdict(self, at_s: float, m: Any) -> Iterator[Event]:
        word, style = ("accepted", "green") if m.accepted else ("refused", "red")
        yield Event(at_s, "verdict", f"{m.source} {m.sequence}: {word} ({m.code}): {m.sentence}", style)

    def _on_estop(self, at_s: float, m: Any) -> Iterator[Event]:
        stopped = bool(getattr(m, "data", True))
        if self._changed("estop", stopped) and (stopped or self._seen.get("stopped once")):
            self._seen["stopped once"] = True
            yield Event(at_s, "stop", f"emergency stop {'pressed' if stopped else 'let go'}", "bold red")

    def _on_state(self, at_s: float, m: Any) -> Iterator[Event]:
        now = (m.instance_id, m.lifecycle, m.loop_state)
        if self._changed("state", now):
            trained = "" if m.trained or not m.policy else ", untrained policy"
            yield Event(
                at_s, "policy", f"{m.policy or 'no policy'} is {m.lifecycle}, loop {m.loop_state}{trained}", "bold"
            )
        for alarm in m.alarms:
            if self._changed(f"alarm {alarm}", True):
                yield Event(at_s, "alarm", alarm, "red")

    def _on_trace(self, at_s: float, m: Any) -> Iterator[Event]:
        self._inferences += 1
        steering = (m.instance_id, int(m.steering_epoch), int(m.steering_sequence))
        if steering != self._steering:
            self._steering = steering
            applied = ", ".join(f"{a.target} {a.strength:+.3f}" for a in m.applied) or "nothing steered"
            yield Event(
                at_s, "inference", f"from {m.inference_id} on under sequence {steering[2]}, first with {applied}"
            )
        if m.interrupted:
            yield Event(at_s, "inference", f"{m.inference_id} was cut short by a stop", "yellow")

    def _on_episode(self, at_s: float, m: Any) -> Iterator[Event]:
        if self._changed("episode", (m.session_id, m.episode)):
            yield Event(at_s, "episode", f"episode {m.episode + 1} begins: {m.task}", "bold")
        if m.done and self._changed("done", (m.session_id, m.episode)):
            how = "succeeded" if m.success else "ended without success"
            yield Event(at_s, "episode", f"episode {m.episode + 1} {how} after {m.step} steps", "bold")
        if self._changed("held", m.held) and m.held:
            yield Event(at_s, "hold", f"the robot holds: {m.held}", "yellow")

    def _on_diagnostics(self, at_s: float, m: Any) -> Iterator[Event]:
        for status in m.status:
            level = int(status.level)
            # Numbers in a sentence change; what it says does not.
            said = re.sub(r"[0-9.]+", "", status.message)
            if self._changed(f"diagnosis {status.name}", (level, said)) and level:
                style = "yellow" if level == 1 else "red"
                yield Event(at_s, LEVELS[min(level, 3)], f"{status.name}: {status.message}", style)
