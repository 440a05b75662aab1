"""A study whose truth is known, written through the real tables: episodes that reach for an object, lift it and carry it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sim.evaluation.study import records

RATE = 20.0


@dataclass(frozen=True)
class Made:
    """One condition. speed: factor on the hand's speed; lift: m added to the carrying height; fails: probability."""

    label: str
    kind: str
    direction: str | None = None
    strength: float | None = None
    draw: int | None = None
    speed: float = 1.0
    lift: float = 0.0
    fails: float = 0.02


Change = Callable[[str, int, int], dict[str, Any]]


def steps(rng: np.random.Generator, speed: float, lift: float, fails: bool, entropy: float, dose: float) -> dict[str, Any]:  # fmt: skip
    """Columns of one episode: to the object, up, over, down, open; straight lines at `speed` m/s with a little noise."""
    start, item, basket = np.array([0.0, 0.0, 0.3]), np.array([0.15, 0.1, 0.03]), np.array([0.05, -0.2, 0.05])
    top = np.array([item[0], item[1], item[2] + lift]), np.array([basket[0], basket[1], item[2] + lift])
    points = [start, item, *top, basket]
    eef = [start]
    marks = []
    for a, b in pairwise(points):
        pace = speed * (0.6 if b is item or b is basket else 1.0)
        n = max(2, round(float(np.linalg.norm(b - a)) / pace * RATE))
        eef += [a + (b - a) * k / n for k in range(1, n + 1)]
        marks.append(len(eef) - 1)
    eef += [basket] * 6
    path = np.array(eef) + rng.normal(0, 2e-4, (len(eef), 3))
    grasped, released = marks[0], marks[-1]
    n = len(path)
    held = np.zeros(n, bool)
    target = np.tile(item, (n, 1))
    if not fails:
        held[grasped : released + 1] = True
        target[grasped : released + 1] = path[grasped : released + 1]
        target[released + 1 :] = basket
    success = np.zeros(n, bool)
    success[released + 2 :] = not fails
    action = np.full((n, 7), np.nan)
    action[1:, :3] = np.diff(path, axis=0) / 0.05
    action[1:, 3:6] = rng.normal(0, 0.02, (n - 1, 3))
    action[1:, 6] = np.where((np.arange(1, n) > grasped) & (np.arange(1, n) <= released), 1.0, -1.0)
    return {
        "step": np.arange(n), "eef_pos": path, "eef_quat": np.tile([0.0, 0, 0, 1], (n, 1)),
        "gripper_qpos": np.tile([0.04, -0.04], (n, 1)), "action": action, "executed": np.clip(action, -1, 1),
        "target_pos": target, "held": held.tolist(), "success": success, "strength": np.zeros(n),
        "dose": np.full(n, dose), "entropy": np.full(n, entropy), "inference": np.arange(n) - 1,
        "row": np.where(np.arange(n) == 0, -1, 0), "said": [None] * n,
    }  # fmt: skip


def episode(key: str, pair: str, made: Made, task: int, state: int, columns: dict[str, Any] | None) -> dict[str, Any]:
    """The row of one episode; no columns: errored."""
    row: dict[str, Any] = {
        "key": key, "pair": pair, "job": key, "condition": made.label, "kind": made.kind, "direction": made.direction,
        "direction_id": None if made.direction is None else f"{made.direction}@0123456789ab", "strength": made.strength,
        "draw": made.draw, "suite": "libero_object", "task_id": task, "task": f"pick up object {task} and place it in the basket",
        "layout": "official", "init_state": state, "seed": 0, "environment_seed": 0, "instruction": f"pick up object {task}",
        "limit": 280, "status": "done", "steps": 0, "inferences": 0, "firings": 0, "writes": 0, "clamped": 0, "seconds": 1.0,
        "seconds_simulation": 0.5, "seconds_rendering": 0.3, "seconds_policy": 0.2, "seconds_scene": 0.0,
        "started": "2026-01-01T00:00:00+00:00", "worker": 0,
    }  # fmt: skip
    if columns is None:
        return {**row, "status": "errored", "error": "the simulator stopped"}
    done = np.flatnonzero(columns["success"])
    return {
        **row, "success": bool(len(done)), "success_step": int(done[0]) if len(done) else None, "released": bool(len(done)),
        "steps": len(columns["step"]) - 1, "inferences": len(columns["step"]) - 1,
        "first_action": columns["action"][1].tolist(), "dose_mean": 0.1, "dose_max": 0.2,
    }  # fmt: skip


def write(
    folder: Path,
    made: Sequence[Made],
    *,
    tasks: int = 10,
    states: int = 5,
    seed: int = 0,
    errored: Callable[[Made, int, int], bool] = lambda *_: False,
    spread: float = 0.15,
) -> Path:
    """A study's folder. spread: standard deviation of a condition's effect between tasks, relative to the effect."""
    rng = np.random.default_rng(seed)
    own = np.exp(rng.normal(0, 0.08, (tasks, states)))
    rows, tables = [], []
    for task in range(tasks):
        for state in range(states):
            pair = f"libero_object/{task}/official{state}/seed0"
            luck = rng.random()
            noise = int(rng.integers(2**31))
            for condition in made:
                task_rng = np.random.default_rng([seed, task, abs(hash_of(condition.direction or ""))])
                by_task = 1 + spread * task_rng.normal()
                its = np.random.default_rng([noise, 0 if condition.kind in ("unsteered", "zero") else hash_of(condition.label)])  # fmt: skip
                pace = 0.25 * own[task, state] * (1 + (condition.speed - 1) * by_task)
                if condition.kind not in ("unsteered", "zero"):
                    pace *= 1 + its.normal(0, 0.01)
                columns = steps(
                    its, pace, 0.18 * own[task, state] + condition.lift * by_task, luck < condition.fails, 1.2,
                    np.nan if condition.kind != "direction" else 0.2 * abs(condition.strength or 0),
                )  # fmt: skip
                key = f"{pair}/{condition.label}"
                if errored(condition, task, state):
                    rows.append(episode(key, pair, condition, task, state, None))
                    continue
                rows.append(episode(key, pair, condition, task, state, columns))
                tables.append(records.steps_table(key, columns))
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(records.episodes_table(rows), folder / records.EPISODES_FILE)
    pq.write_table(pa.concat_tables(tables) if tables else records.STEPS.empty_table(), folder / records.STEPS_FILE)
    facts = {
        "schema": records.SCHEMA, "policy": {"name": "synthetic", "trained": True, "hash": "f2feafb7938b"},
        "versions": {"mujoco": "3.17.0", "robosuite": "1.4.0", "torch": "2.13.0"}, "gl": "osmesa",
    }  # fmt: skip
    (folder / records.SIDECAR_FILE).write_text(json.dumps(facts))
    return folder


def hash_of(text: str) -> int:
    """A number of a text that is the same in every process."""
    return int.from_bytes(text.encode()[-6:], "big") + 131 * len(text)


def full_study(
    draws: int = 20,
    strengths: Sequence[float] = (-1.0, -0.75, -0.5, 0.5, 0.75, 1.0),
    controlled: Sequence[float] = (-1.0, -0.5, 0.5, 1.0),
) -> list[Made]:
    """Speed works both ways and costs success at its strongest; height only upwards; careful does nothing; rivals.

    controlled: strengths at which random draws ran."""
    made = [Made("unsteered", "unsteered"), Made("zero:speed-token", "zero", "speed-token", 0.0)]
    for s in strengths:
        fails = 0.35 if s == 1.0 else 0.06 if s > 0 else 0.02
        made.append(
            Made(f"direction:speed-token@{s:+g}", "direction", "speed-token", s, speed=1 + 0.45 * s, fails=fails)
        )
        made.append(Made(f"direction:height-token@{s:+g}", "direction", "height-token", s, lift=max(0.0, 0.12 * s), speed=1 - 0.04 * abs(s)))  # fmt: skip
        made.append(Made(f"direction:careful-word@{s:+g}", "direction", "careful-word", s))
    rng = np.random.default_rng(7)
    for draw in range(draws):
        size = rng.normal(0, 0.05)
        for name in ("speed-token", "height-token", "careful-word"):
            for s in controlled:
                made.append(Made(f"random:{name}#{draw}@{s:+g}", "random", name, s, draw, speed=1 + size * s, lift=0.1 * size * s))  # fmt: skip
    made.append(Made("prompt:{}, slowly", "prompt", speed=0.7))
    made.append(Made("prompt:{}, quickly", "prompt", speed=1.25))
    made.append(Made("prompt:{}, holding it high", "prompt", lift=0.1))
    made += [Made(f"scale:{f:g}", "scale", None, f, speed=f, fails=0.02 if f < 1 else 0.3) for f in (0.5, 0.75, 1.5)]
    return made
