"""A results file: what was measured with what, then one JSON line a finished piece of work (an episode, a condition).

Invariant: all lines of a file come from one configuration; a run with another one is refused, a run with the same one
goes on, and an interruption loses at most the piece that is running.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from steer_runtime.errors import SteerError

SCHEMA = "steer-evaluation/1"
Row = dict[str, Any]


class Results:
    """The open file. rows: key -> finished piece, in the order of the file."""

    def __init__(self, path: Path, rows: dict[str, Row], file: IO[str]) -> None:
        self.path, self.rows, self._file = path, rows, file

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Append one finished piece and bring it to the disk. Raises SteerError('disk_full')."""
        line = json.dumps({"key": key, **row}, allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise SteerError(
                "disk_full",
                f"{self.path} cannot be written ({error.strerror}); everything finished is safe: free some space and "
                "run the same command again",
            ) from None
        self.rows[key] = json.loads(line)


@contextmanager
def results(path: Path, configuration: Mapping[str, Any]) -> Iterator[Results]:
    """Open or begin the results file of a configuration (JSON-able, without how much there shall be).

    Raises SteerError: 'other_configuration' naming what differs, 'torn_file', 'in_use', 'not_writable'.
    """
    # Through JSON, so that tuples compare equal to the lists they become.
    wanted = json.loads(json.dumps(configuration))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise SteerError("not_writable", f"{path} cannot be written ({error.strerror}); choose another --out") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SteerError("in_use", f"another run writes {path}; wait for it or choose another --out") from None
        rows = _read(path, file, wanted)
        if rows is None:
            file.write(json.dumps({"schema": SCHEMA, "configuration": wanted}) + "\n")
            file.flush()
        yield Results(path, rows or {}, file)


def _read(path: Path, file: IO[str], wanted: Mapping[str, Any]) -> dict[str, Row] | None:
    """Finished pieces, None for a new file. A line that broke off is cut away: its piece is run again."""
    file.seek(0)
    try:
        text = file.read()
    except UnicodeDecodeError:
        raise _torn(path, 1) from None
    whole = text[: text.rfind("\n") + 1]
    if len(whole) < len(text):
        file.truncate(len(whole.encode()))
    if not whole:
        return None
    lines = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise _torn(path, number) from None
    head = lines[0]
    if not isinstance(head, dict) or head.get("schema") != SCHEMA or not isinstance(head.get("configuration"), dict):
        raise _torn(path, 1)
    differing = _differing(head["configuration"], wanted)
    if differing:
        raise SteerError(
            "other_configuration",
            f"{path} was measured with "
            + ", ".join(f"{name} {old!r:.80} (now {new!r:.80})" for name, old, new in differing)
            + "; give the same options or another --out",
        )
    rows = {}
    for number, row in enumerate(lines[1:], start=2):
        if not isinstance(row, dict) or not isinstance(row.get("key"), str):
            raise _torn(path, number)
        rows[row["key"]] = row
    return rows


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], above: str = "") -> list[tuple[str, Any, Any]]:
    out: list[tuple[str, Any, Any]] = []
    for name in sorted({*old, *new}):
        one, other = old.get(name), new.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            out += _differing(one, other, f"{above}{name}.")
        elif one != other:
            out.append((f"{above}{name}", one, other))
    return out


def _torn(path: Path, line: int) -> SteerError:
    return SteerError(
        "torn_file",
        f"line {line} of {path} is not one of a results file of schema {SCHEMA}: mend or delete it, or choose another --out",
    )
