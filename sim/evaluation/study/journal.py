"""A study's folder: a journal of finished episodes, a file of steps for each, and the tables made of both.

Invariant: an episode is finished when its line is in the journal, which is written last and brought to the disk; steps
and videos that a killed run left without a line are overwritten by the same episode. One process writes a folder.

    <study>/journal.jsonl           what all episodes share, then a line an episode (`steer_runtime.results`)
    <study>/steps/<key>.parquet     its steps
    <study>/videos/<key>.mp4        its pictures, on request
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sim.evaluation.study import records
from sim.evaluation.study.plan import Job
from steer_runtime.directions.files import write_atomically
from steer_runtime.errors import SteerError
from steer_runtime.results import Results, Row, results

if TYPE_CHECKING:  # it imports the policies
    from sim.evaluation.study.episode import Finished

JOURNAL_FILE = "journal.jsonl"
_PARQUET = b"PAR1"
_GROUP = 20_000
"""Steps of a row group of `steps.parquet`, about: small enough to read a few episodes of a large file."""


class Journal:
    """The open folder."""

    def __init__(self, folder: Path, lines: Results) -> None:
        self.folder, self._lines = folder, lines

    def done(self, planned: Sequence[Job], *, again: bool = False) -> dict[str, Row]:
        """Key -> line of the planned episodes that are finished. again: errored ones do not count as such.

        Raises SteerError('other_configuration') for an episode that was run differently under the same key.
        """
        out = {}
        for job in planned:
            row = self._lines.rows.get(job.key)
            if row is None:
                continue
            if row["job"] != job.fingerprint:
                raise SteerError(
                    "other_configuration",
                    f"episode {job.key!r} in {self.folder} was run with another step limit, wording or direction than the "
                    "study asks for: give the same YAML and store, or another --out",
                )
            if row["status"] == "errored":
                if not again:
                    out[job.key] = row
            elif _whole(self._steps(job.key)):
                out[job.key] = row
        return out

    def add(self, job: Job, finished: Finished) -> Row:
        """Keep an episode for good. Raises SteerError: 'disk_full', 'not_written'."""
        if finished.steps:
            sink = pa.BufferOutputStream()
            pq.write_table(records.steps_table(job.key, finished.steps), sink, compression="zstd")
            write_atomically(self._steps(job.key), sink.getvalue().to_pybytes())
        if finished.video:
            write_atomically(video_path(self.folder, job.key), finished.video)
        self._lines.add(job.key, finished.row)
        return self._lines.rows[job.key]

    def write_tables(self, planned: Sequence[Job], facts: Mapping[str, Any]) -> tuple[int, int]:
        """The two tables and the sidecar, of the planned episodes that are finished, in the order of the plan.

        Returns how many rows each table has. Raises SteerError('not_written').
        """
        rows = self.done(planned)
        table = records.episodes_table(list(rows.values()))
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        write_atomically(self.folder / records.EPISODES_FILE, sink.getvalue().to_pybytes())
        steps = self._write_steps([key for key, row in rows.items() if row["status"] == "done"])
        self.write_sidecar({**facts, "episodes": _counts(planned, rows), "gl_backends": _backends(rows)})
        return len(table), steps

    def steps(self, key: str) -> pa.Table:
        """The steps of a finished episode, `records.STEPS`."""
        return pq.read_table(self._steps(key), schema=records.STEPS)

    def write_sidecar(self, facts: Mapping[str, Any]) -> None:
        """Raises SteerError('not_written')."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        text = json.dumps({"schema": records.SCHEMA, "written": now, **facts}, indent=1, allow_nan=False)
        write_atomically(self.folder / records.SIDECAR_FILE, text.encode())

    def _write_steps(self, keys: Sequence[str]) -> int:
        path = self.folder / records.STEPS_FILE
        part = path.with_name(f".{path.name}.part")
        total = 0
        try:
            with pq.ParquetWriter(part, records.STEPS, compression="zstd") as writer:
                for group in self._grouped(keys):
                    writer.write_table(group)
                    total += len(group)
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise SteerError(
                "not_written", f"{path} could not be written ({error.strerror or error}); the journal is safe"
            ) from None
        return total

    def _grouped(self, keys: Sequence[str]) -> Iterator[pa.Table]:
        waiting: list[pa.Table] = []
        for key in keys:
            waiting.append(self.steps(key))
            if sum(map(len, waiting)) >= _GROUP:
                yield pa.concat_tables(waiting).combine_chunks()
                waiting = []
        if waiting:
            yield pa.concat_tables(waiting).combine_chunks()

    def _steps(self, key: str) -> Path:
        return self.folder / "steps" / f"{_file_stem(key)}.parquet"


def finished(folder: Path) -> int:
    """How many episodes a folder's journal holds, whoever is writing it; 0 without one. Raises SteerError('torn_file')."""
    path = folder / JOURNAL_FILE
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        # The first line is the configuration; one that broke off, or is being written, is no episode yet.
        lines = [line for line in file if line.endswith(b"\n")][1:]
    try:
        return len({json.loads(line)["key"] for line in lines})
    except (ValueError, KeyError, TypeError):
        raise SteerError("torn_file", f"{path} has a line that is no episode: mend or delete that line") from None


@contextmanager
def journal(folder: Path, configuration: Mapping[str, Any]) -> Iterator[Journal]:
    """Open or begin a folder. configuration: what all episodes share. Raises as `steer_runtime.results.results`."""
    with results(folder / JOURNAL_FILE, configuration) as lines:
        yield Journal(folder, lines)


def video_path(folder: Path, key: str) -> Path:
    """Where the video of an episode stands, if it was asked for."""
    return folder / "videos" / f"{_file_stem(key)}.mp4"


def _whole(path: Path) -> bool:
    """Whether a Parquet file is there and ends as one: its magic number is written last."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_PARQUET), 2)
            return file.read() == _PARQUET
    except OSError:
        return False


def _counts(planned: Sequence[Job], rows: Mapping[str, Row]) -> dict[str, int]:
    errored = sum(row["status"] == "errored" for row in rows.values())
    return {"planned": len(planned), "done": len(rows) - errored, "errored": errored}


def _backends(rows: Mapping[str, Row]) -> list[str]:
    return sorted({row["gl_backend"] for row in rows.values() if row["status"] == "done"})


def _file_stem(key: str) -> str:
    """A file name of an episode's key, unique and readable."""
    return f"{re.sub(r'[^A-Za-z0-9@+.=_-]+', '-', key)[:120]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
