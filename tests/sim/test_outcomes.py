"""Whether a command was applied is told from actions and the engine's trace, not from its verdict."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from sim.episode import CommandOutcome
from sim.outcomes import SeenAction, SentCommand, grasp_step, outcomes, written
from steer_runtime.directions.direction import Direction, Neurons
from steer_runtime.steering.command import CommandOp, SteeringCommand, Verdict
from steer_runtime.types import SteeringStamp

MS = 1_000_000
EPOCH = 7


def neurons(name: str, *pairs: tuple[int, int]) -> Direction:
    layer, neuron = (np.array(column, np.int32) for column in zip(*pairs, strict=True))
    alpha = np.full(len(pairs), 4.0, np.float32)
    return Direction(name, "lm", "0" * 64, 4, 8, 16, neurons=Neurons(layer, neuron, alpha))


UP, FAST = neurons("up", (1, 2), (1, 3)), neurons("fast", (1, 9), (2, 4))


def sent(
    op: CommandOp,
    target: str,
    at_ms: int,
    sequence: int,
    *concerned: Direction,
    accepted: bool = True,
    expected: Literal["applied", "refused"] = "applied",
) -> SentCommand:
    command = SteeringCommand("test", 1, at_ms, at_ms * MS, op, target, 1.0)
    code = "accepted" if accepted else "unknown_direction"
    verdict = Verdict(accepted, code, "as it says", "test", 1, at_ms, SteeringStamp(EPOCH, sequence), 1.0)
    return SentCommand(f"{op} {target}", command, expected, concerned, 0, verdict, (at_ms + 2) * MS)


def action(inference: int, at_ms: int, sequence: int) -> SeenAction:
    return SeenAction(
        at_ms * MS, (at_ms - 50) * MS, inference, EPOCH, sequence, (at_ms - 60) * MS, step=4 * (inference - 1), rows=4
    )


def record(inference: int, sequence: int, strengths: dict[str, float], *sites: dict[str, Any]) -> dict[str, Any]:
    stamp = {"epoch": EPOCH, "sequence": sequence}
    return {"inference_id": inference, "steering": stamp, "strengths": strengths, "sites": list(sites)}


def site(layer: int, neurons_written: list[int], writes: int) -> dict[str, Any]:
    return {"tower": "lm", "kind": "neurons", "layer": layer, "neurons": neurons_written, "writes": writes}


def one(command: SentCommand, actions: list[SeenAction], trace: list[dict[str, Any]]) -> CommandOutcome:
    return outcomes([command], actions, [a.observation_ns + 1 for a in actions], trace)[0]


def test_first_action_with_the_sequence_is_found_and_timed() -> None:
    actions = [action(1, 100, 0), action(2, 300, 0), action(3, 500, 1), action(4, 700, 1)]
    found = one(sent("set", "up", 250, 1, UP), actions, [record(3, 1, {UP.id: 1.0}, site(1, [2, 3], 8))])
    assert (found.inferences, found.first_inference, found.first_step) == (2, 3, 8)
    assert (found.latched_ns, found.action_ns) == (450 * MS, 500 * MS)
    assert found.executed_ns == actions[2].observation_ns + 1 or found.executed_ns is not None
    assert found.fault is None


def test_frame_after_the_actions_own_is_its_execution() -> None:
    actions = [action(1, 500, 1)]
    frames = [440 * MS, 620 * MS, 800 * MS]
    (found,) = outcomes([sent("set", "up", 250, 1, UP)], actions, frames, [])
    assert found.executed_ns == 620 * MS


def test_accepted_command_that_no_action_carries_is_a_fault() -> None:
    found = one(sent("set", "up", 250, 5, UP), [action(1, 500, 4)], [record(1, 4, {UP.id: 1.0}, site(1, [2, 3], 8))])
    assert found.fault == "no action carries its sequence"


def test_writes_of_another_direction_do_not_count() -> None:
    trace = [record(1, 1, {UP.id: 1.0, FAST.id: 1.0}, site(1, [9], 4), site(2, [4], 4))]
    found = one(sent("set", "up", 250, 1, UP), [action(1, 500, 1)], trace)
    assert found.writes == 0
    assert found.fault == "the engine's trace shows no write for it"


def test_shared_layer_is_split_by_neurons() -> None:
    both = record(1, 1, {UP.id: 1.0, FAST.id: 1.0}, site(1, [2, 3, 9], 30), site(2, [4], 10))
    assert (written(both, UP), written(both, FAST)) == (20, 20)


def test_writes_count_until_the_next_command_for_the_target() -> None:
    trace = [record(i, s, {UP.id: 1.0}, site(1, [2, 3], 10)) for i, s in ((1, 1), (2, 2), (3, 3))]
    commands = [sent("set", "up", 100, 1, UP), sent("set", "fast", 200, 2, FAST), sent("clear", "up", 300, 3, UP)]
    actions = [action(1, 150, 1), action(2, 250, 2), action(3, 350, 3)]
    up, _, cleared = outcomes(commands, actions, [], trace)
    assert up.writes == 20
    assert cleared.writes_after == 10
    assert cleared.fault == "10 values were still written after it"


def test_clear_all_is_judged_by_every_write_until_the_next_command() -> None:
    commands = [sent("clear_all", "", 100, 1), sent("set", "up", 300, 2, UP)]
    actions = [action(1, 150, 1), action(2, 350, 2)]
    trace = [record(1, 1, {}), record(2, 2, {UP.id: 1.0}, site(1, [2, 3], 6))]
    cleared, up = outcomes(commands, actions, [], trace)
    assert (cleared.writes_after, cleared.fault) == (0, None)
    assert (up.writes, up.fault) == (6, None)


def test_refused_command_moves_nothing_and_is_no_fault_when_expected() -> None:
    wrong = sent("set", "warp", 100, 0, accepted=False, expected="refused")
    found = one(wrong, [action(1, 150, 0)], [record(1, 0, {})])
    assert (found.first_inference, found.inferences, found.fault) == (None, None, None)


def test_dense_direction_counts_tokens_at_its_site() -> None:
    dense = Direction("hurry", "lm", "0" * 64, 4, 8, 16, op="add", dense={0: np.ones(8, np.float32)})
    at_site = {"tower": "lm", "kind": "dense", "layer": 0, "neurons": [], "writes": 25}
    assert written(record(1, 1, {dense.id: 1.0}, at_site), dense) == 25
    assert written(record(1, 1, {dense.id: 1.0}, {**at_site, "layer": 3}), dense) == 0


def test_grasp_begins_where_the_gripper_is_closed_and_stays_so() -> None:
    flicker = [-1, -1, 1, -1, 1, 1, 1]
    assert grasp_step(np.array(flicker)) is None
    assert grasp_step(np.array([*flicker, 1, 1, -1])) == 4
    assert grasp_step(np.array([1, 1])) is None
