"""The two tables of a study: episodes and their control steps, as Parquet files and a JSON sidecar.

Invariant: every number of a step is read from the simulator after that step; columns and their types are those of the
schemas here and no others; a value that does not exist is null, or NaN in a vector, and never zero.

    <study>/episodes.parquet    a row an episode, in the order of the plan (`EPISODES`)
    <study>/steps.parquet       a row a control step, episodes in the same order (`STEPS`)
    <study>/study.json          configuration, versions, hashes of policy and directions, GL backend (`SCHEMA`)

Units: m, rad, s; actions in the robot's own units (LIBERO: +-1 is +-0.05 m and +-0.5 rad a step; gripper -1 open, +1
close). Quaternions are x, y, z, w.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sim.evaluation.study.kinds import Kind, Status
from steer_runtime.errors import SteerError

SCHEMA = "steer-study/1"
EPISODES_FILE, STEPS_FILE, SIDECAR_FILE = "episodes.parquet", "steps.parquet", "study.json"
STATUSES: tuple[Status, ...] = get_args(Status)
KINDS: tuple[Kind, ...] = get_args(Kind)


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def _vector(size: int, kind: pa.DataType) -> pa.DataType:
    return pa.list_(kind, size)


EPISODES = pa.schema(
    [
        # -- which episode: `key` names it, `pair` is shared by all conditions of one start
        _required("key", pa.string()),
        _required("pair", pa.string()),
        _required("job", pa.string()),  # hash of all that decides the episode besides policy and simulator
        # -- under which condition
        _required("condition", pa.string()),  # label, unique in the study: "direction:speed@+0.5"
        _required("kind", pa.string()),  # one of KINDS
        pa.field(
            "direction", pa.string()
        ),  # direction or axis it is about; for random and opposite: the one they answer
        pa.field("direction_id", pa.string()),  # name@hash of what is written
        pa.field("strength", pa.float64()),  # signed: [-1, 1] of an axis; the factor of "scale"; null for none
        pa.field("draw", pa.int32()),  # of "random", counted from 0
        # -- on what
        _required("suite", pa.string()),
        _required("task_id", pa.int32()),
        _required("task", pa.string()),
        _required("layout", pa.string()),  # official, jitter or random
        _required("init_state", pa.int32()),  # official: the benchmark's initial state; else the layout's number
        _required("seed", pa.int64()),  # of the policy's draws and of layouts
        _required("environment_seed", pa.int64()),
        _required("instruction", pa.string()),  # as the policy was given it
        _required("limit", pa.int32()),  # control steps it could take
        # -- what came of it
        _required("status", pa.string()),  # one of STATUSES; an errored episode has no outcome and counts nowhere
        pa.field("error", pa.string()),  # its sentence
        pa.field("success", pa.bool_()),  # LIBERO's predicate held after some step; null when errored
        pa.field("success_step", pa.int32()),  # the first such step, counted from 1
        # held with the robot off the task's objects; null: not looked for, or the limit cut the steps after success short
        pa.field("released", pa.bool_()),
        _required("steps", pa.int32()),  # control steps executed, those after success included
        _required("inferences", pa.int32()),
        pa.field("first_action", _vector(7, pa.float64())),  # as the policy gave it, before clipping and scaling
        # -- steering; dose: largest ||change|| / ||residual|| over the sites and tokens of an inference
        _required("firings", pa.int64()),  # hook calls
        _required("writes", pa.int64()),  # values that steering wrote
        pa.field("dose_mean", pa.float64()),  # over the inferences
        pa.field("dose_max", pa.float64()),
        _required("clamped", pa.int32()),  # steps whose action lay outside [-1, 1] and was clipped to it
        # -- the clock (see CLOCK): wall time of the worker, differs from run to run
        _required("seconds", pa.float64()),
        _required("seconds_simulation", pa.float64()),
        _required("seconds_rendering", pa.float64()),
        _required("seconds_policy", pa.float64()),
        _required(
            "seconds_scene", pa.float64()
        ),  # building the scene, in the first episode that used it; not in `seconds`
        _required("started", pa.string()),  # ISO 8601, UTC
        _required("worker", pa.int32()),
    ]
)
CLOCK: tuple[str, ...] = (
    "seconds", "seconds_simulation", "seconds_rendering", "seconds_policy", "seconds_scene", "started", "worker",
)  # fmt: skip
"""Columns of EPISODES in which two runs of one study may differ; all others are equal."""

STEPS = pa.schema(
    [
        _required("key", pa.string()),
        _required("step", pa.int32()),  # 0: the settled start, before any action; k: after the k-th action
        _required("eef_pos", _vector(3, pa.float64())),  # grip site, world
        _required("eef_quat", _vector(4, pa.float64())),
        _required("gripper_qpos", _vector(2, pa.float64())),
        _required("action", _vector(7, pa.float64())),  # as the policy gave it; NaN at step 0
        _required("executed", _vector(7, pa.float64())),  # after clipping and scaling; NaN at step 0
        _required(
            "target_pos", _vector(3, pa.float64())
        ),  # centre of the task's object, world; NaN where there is no single one
        pa.field("held", pa.bool_()),  # both fingers touch it and nothing but the robot does; null where there is none
        _required("success", pa.bool_()),  # LIBERO's predicate, now
        _required("strength", pa.float64()),  # that the engine wrote with, signed; 0 where it did not steer
        _required("dose", pa.float64()),  # of the step's inference; NaN where not measured
        _required("entropy", pa.float64()),  # mean over the action's tokens, nats; NaN for policies without tokens
        _required("inference", pa.int32()),  # of the episode, from 0; -1 at step 0
        _required("row", pa.int32()),  # row of its chunk; -1 at step 0
        pa.field("said", pa.string()),  # the policy's words of this inference; null where it says none
    ]
)


def episodes_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows of the journal as a table; what a row has besides the columns is left out."""
    return pa.Table.from_pylist([{name: row.get(name) for name in EPISODES.names} for row in rows], schema=EPISODES)


def steps_table(key: str, columns: Mapping[str, Any]) -> pa.Table:
    """The steps of one episode. columns: all of STEPS but `key`, arrays [n], [n, size] or lists.

    Raises SteerError('bad_record') for a column that is missing, is no such, or has another shape.
    """
    strange = {*columns, "key"} ^ set(STEPS.names)
    if strange:
        raise SteerError("bad_record", f"columns {sorted(strange)} of the steps of {key} are missing or unknown")
    length = len(columns["step"])
    arrays = []
    for field in STEPS:
        values = [key] * length if field.name == "key" else columns[field.name]
        if not pa.types.is_fixed_size_list(field.type):
            arrays.append(pa.array(values, field.type))
        else:
            flat = np.ascontiguousarray(values, dtype=np.float64)
            if flat.shape != (length, field.type.list_size):
                raise SteerError(
                    "bad_record",
                    f"column {field.name!r} of the steps of {key} is {list(flat.shape)}: expected "
                    f"[{length}, {field.type.list_size}]",
                )
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), field.type.list_size))
    return pa.Table.from_arrays(arrays, schema=STEPS)


def read_episodes(study: Path) -> pa.Table:
    """The episodes of a study's folder. Raises SteerError('no_study', 'bad_record')."""
    return _read(study / EPISODES_FILE, EPISODES)


def read_steps(study: Path, keys: Sequence[str] | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """The steps of a study's folder, of some episodes or all, some columns or all. Raises as `read_episodes`."""
    filters = None if keys is None else [("key", "in", list(keys))]
    return _read(study / STEPS_FILE, STEPS, columns=None if columns is None else list(columns), filters=filters)


def read_sidecar(study: Path) -> dict[str, Any]:
    """The facts of a study. Raises SteerError('no_study', 'bad_record')."""
    path = study / SIDECAR_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _missing(path, error) from None
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        raise SteerError("bad_record", f"{path} is not of schema {SCHEMA}: run the study again in another --out")
    return facts


def columns_of(table: pa.Table) -> dict[str, np.ndarray]:
    """Columns as arrays: vectors as float64 [n, size]; numbers with nulls as float64 with NaN; text as objects with None;
    yes and no with nulls as objects with None."""
    out: dict[str, np.ndarray] = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if pa.types.is_fixed_size_list(column.type):
            size = column.type.list_size
            rows = (
                [[np.nan] * size if row is None else row for row in column.to_pylist()] if column.null_count else None
            )
            flat = np.array(rows, np.float64) if rows is not None else column.flatten().to_numpy(zero_copy_only=False)
            out[name] = np.asarray(flat, np.float64).reshape(len(column), size)
        else:
            out[name] = column.to_numpy(zero_copy_only=False)
    return out


def _read(path: Path, schema: pa.Schema, **options: Any) -> pa.Table:
    try:
        found = pq.read_schema(path)
        if not found.equals(schema):
            raise SteerError(
                "bad_record",
                f"{path} has columns {', '.join(found.names)[:300]}: expected those of schema {SCHEMA} and their types; "
                "write it again with `steer eval study ... --tables`",
            )
        return pq.read_table(path, **options)
    except OSError as error:
        raise _missing(path, error) from None
    except pa.ArrowInvalid:
        raise SteerError("bad_record", _torn(path)) from None


def _torn(path: Path) -> str:
    return f"{path} is no Parquet file or is torn: write it again with `steer eval study ... --tables`"


def _missing(path: Path, error: OSError) -> SteerError:
    if not isinstance(error, FileNotFoundError):
        # Arrow tells of a damaged page as of an operating system's error without a number.
        why = f"{path} cannot be read ({error.strerror})" if error.strerror else _torn(path)
        return SteerError("bad_record", why)
    if path.parent.joinpath("journal.jsonl").is_file():
        return SteerError(
            "no_study",
            f"{path.parent} has a journal and no {path.name} yet: `steer eval study ... --tables` writes the tables of what is "
            "there",
        )
    return SteerError("no_study", f"{path} is not there: give the --out folder of a study")
