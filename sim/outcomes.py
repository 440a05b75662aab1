"""What became of each command, from what was seen from outside and what the engine's trace says.

Invariant: "applied" is never taken from the verdict alone: an action has to carry the command, and the trace has to
show writes at the very neurons (or residual sites) of its direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sim.episode import CommandOutcome
from steer_runtime.directions.direction import Direction
from steer_runtime.steering.command import SteeringCommand, Verdict

GRASP_STEPS = 4
"""Fewer closing commands on end are a flicker of the policy, not a grasp."""


@dataclass(frozen=True)
class SentCommand:
    """A command as sent. writes_of: the directions it concerns (none for clear_all: all). step: control steps commanded before."""

    label: str
    command: SteeringCommand
    expected: Literal["applied", "refused"]
    writes_of: tuple[Direction, ...]
    step: int
    verdict: Verdict
    verdict_ns: int


@dataclass(frozen=True)
class SeenAction:
    """An action chunk as received. latched_ns: its publication less its age, which is when its observation came in.

    step: control steps commanded before it. rows: control steps that it is long.
    """

    received_ns: int
    latched_ns: int
    inference: int
    epoch: int
    sequence: int
    observation_ns: int
    step: int
    rows: int = 1


def outcomes(
    sent: Sequence[SentCommand],
    actions: Sequence[SeenAction],
    frame_stamps_ns: Sequence[int],
    trace: Sequence[Mapping[str, Any]],
) -> tuple[CommandOutcome, ...]:
    """One outcome a command, in order. frame_stamps_ns: stamps of the robot's frames, rising."""
    return tuple(_outcome(index, sent, actions, frame_stamps_ns, trace) for index in range(len(sent)))


def grasp_step(gripper: np.ndarray) -> int | None:
    """First of GRASP_STEPS control steps on end that close the gripper; gripper [S]: commands, above 0 to close."""
    if len(gripper) < GRASP_STEPS:
        return None
    runs = np.lib.stride_tricks.sliding_window_view(gripper > 0, GRASP_STEPS).all(axis=1)
    return int(runs.argmax()) if runs.any() else None


def written(record: Mapping[str, Any], direction: Direction) -> int:
    """Values that one inference wrote at the places of a direction.

    A site's writes are shared out over its neurons evenly, which is exact when all of them have one span.
    """
    if direction.id not in record["strengths"]:
        return 0
    total = 0.0
    for site in record["sites"]:
        if site["tower"] != direction.tower or not site["writes"]:
            continue
        if site["kind"] == "dense":
            total += site["writes"] if site["layer"] in (direction.dense or {}) else 0
        elif direction.neurons is not None:
            mine = direction.neurons.neuron[direction.neurons.layer == site["layer"]]
            total += site["writes"] * len(set(mine.tolist()) & set(site["neurons"])) / len(site["neurons"])
    return round(total)


def _outcome(
    index: int,
    sent: Sequence[SentCommand],
    actions: Sequence[SeenAction],
    frame_stamps_ns: Sequence[int],
    trace: Sequence[Mapping[str, Any]],
) -> CommandOutcome:
    one = sent[index]
    command, verdict = one.command, one.verdict
    begin, end = verdict.steering.sequence, _superseded_at(index, sent)
    later = [a for a in actions if a.received_ns > command.stamp_ns]
    epoch = verdict.steering.epoch
    carrying = [a for a in later if verdict.accepted and a.epoch == epoch and begin <= a.sequence and a.sequence < end]
    first = carrying[0] if carrying else None
    held = [
        r
        for r in trace
        if r["steering"]["epoch"] == epoch and verdict.accepted and begin <= r["steering"]["sequence"] < end
    ]
    if one.writes_of:
        values = sum(written(record, direction) for record in held for direction in one.writes_of)
    else:
        values = sum(site["writes"] for record in held for site in record["sites"])
    executed = None if first is None else next((s for s in frame_stamps_ns if s > first.observation_ns), None)
    return CommandOutcome(
        label=one.label,
        op=command.op,
        target=command.target,
        strength=command.strength,
        ramp_s=command.ramp_s,
        expected=one.expected,
        published_ns=command.stamp_ns,
        accepted=verdict.accepted,
        code=verdict.code,
        sentence=verdict.sentence,
        applied_strength=verdict.applied_strength,
        epoch=epoch,
        sequence=begin,
        direction_id=one.writes_of[0].id if len(one.writes_of) == 1 else "",
        step=one.step,
        verdict_ns=one.verdict_ns,
        latched_ns=None if first is None else first.latched_ns,
        action_ns=None if first is None else first.received_ns,
        executed_ns=executed,
        inferences=None if first is None else later.index(first) + 1,
        first_inference=None if first is None else first.inference,
        first_step=None if first is None else first.step,
        writes=values if command.op == "set" else 0,
        writes_after=0 if command.op == "set" else values,
    )


def _superseded_at(index: int, sent: Sequence[SentCommand]) -> float:
    """Sequence of the engine at which the command's part ends: another one for its target, or for all of them."""
    mine = sent[index].command
    for other in sent[index + 1 :]:
        touches = mine.op == "clear_all" or other.command.op == "clear_all" or other.command.target == mine.target
        if other.verdict.accepted and touches:
            return other.verdict.steering.sequence
    return math.inf
