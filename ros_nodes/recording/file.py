"""A recording: one MCAP file, written so that a crash or a full disk costs the newest moments only.

Invariant: what is on disk is at any time a row of whole records. What does not fit waits, up to a bound, and what is
dropped past it is counted. Nothing here imports ROS.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any

import zstandard
from mcap.exceptions import McapError
from mcap.records import Channel, Chunk, Footer, Message, Metadata, Schema
from mcap.stream_reader import CRCValidationError, StreamReader
from mcap.writer import MCAP0_MAGIC, Writer

from ros_nodes.recording.definitions import store_of
from steer_runtime.errors import SteerError

CHUNK_BYTES = 1 << 20
WAITING_BYTES = 64 << 20
"""How much may wait for a disk that takes nothing."""


class WholeFile:
    """A new file that grows by everything written since the last `flush`, or not at all.

    Raises OSError when it cannot be made, also for a path that exists.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._length = 0
        self._waiting = bytearray()

    @property
    def waiting(self) -> int:
        """Bytes that are not on disk."""
        return len(self._waiting)

    def write(self, data: bytes) -> int:
        self._waiting += data
        return len(data)

    def tell(self) -> int:
        return self._length + len(self._waiting)

    def flush(self) -> None:
        """Put all that waits on disk. Raises OSError, after which the file is as before and everything still waits."""
        done = 0
        try:
            with memoryview(self._waiting) as waiting:
                while done < len(waiting):
                    done += os.write(self._handle, waiting[done:])
        except OSError:
            os.ftruncate(self._handle, self._length)
            os.lseek(self._handle, self._length, os.SEEK_SET)
            raise
        self._length += done
        self._waiting.clear()

    def close(self) -> None:
        os.close(self._handle)


class RecordingWriter:
    """Writes one recording. Not thread-safe.

    about: metadata, name -> (key -> text). Raises SteerError('cannot_record') when the file cannot be made.
    """

    def __init__(
        self, path: Path, about: Mapping[str, Mapping[str, str]], *, waiting_bytes: int = WAITING_BYTES
    ) -> None:
        self.messages: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self._waiting_bytes = waiting_bytes
        self._topics: dict[int, str] = {}
        self._schemas: dict[str, int] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = WholeFile(path)
        except FileExistsError:
            raise SteerError(
                "cannot_record", f"{path} exists: a recording is never overwritten; give another name"
            ) from None
        except OSError as error:
            raise SteerError("cannot_record", f"{path} cannot be written: {error.strerror}") from None
        self._writer = Writer(self._file, chunk_size=CHUNK_BYTES)  # type: ignore[arg-type]
        self._writer.start(profile="ros2", library="steer-runtime")
        for name, values in about.items():
            self._writer.add_metadata(name, dict(values))

    @property
    def size(self) -> int:
        """Size of the recording so far, with what waits."""
        return self._file.tell()

    @property
    def waiting(self) -> int:
        """Bytes of it that are not on disk."""
        return self._file.waiting

    def topic(self, name: str, kind: str, definition: str, qos: str = "") -> int:
        """Announce a topic; returns its number for `add`. definition: of its message type, with all that it contains."""
        if kind not in self._schemas:
            self._schemas[kind] = self._writer.register_schema(kind, "ros2msg", definition.encode())
        number = self._writer.register_channel(name, "cdr", self._schemas[kind], {"offered_qos_profiles": qos})
        self._topics[number] = name
        return number

    def add(self, topic: int, data: bytes, log_ns: int, publish_ns: int, sequence: int = 0) -> None:
        """Add a serialised message, or count it as dropped while too much waits for the disk."""
        name = self._topics[topic]
        if self._file.waiting >= self._waiting_bytes:
            self.dropped[name] += 1
            return
        self._writer.add_message(topic, log_ns, data, publish_ns, sequence & 0xFFFFFFFF)
        self.messages[name] += 1

    def flush(self) -> None:
        """Put everything on disk. Raises OSError: it waits, and the next call tries again."""
        self._writer.flush()

    def close(self) -> None:
        """End the recording with its index. Raises OSError: without one, it is readable up to the last `flush`."""
        try:
            self._writer.finish()
            self._file.flush()
        finally:
            self._file.close()


@dataclass(frozen=True)
class Recorded:
    """One recorded message. topic: full name. log_ns: wall clock of its arrival at the recorder."""

    topic: str
    kind: str
    log_ns: int
    message: Any


class Recording:
    """A recording to read; use it as a context manager. Raises SteerError('no_recording') for anything else.

    whole: False when the recorder did not end it, so that the moments after its last flush are missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: BufferedReader = path.open("rb")
        except OSError as error:
            raise SteerError("no_recording", f"{path} cannot be read: {error.strerror}") from None
        if self._file.read(len(MCAP0_MAGIC)) != MCAP0_MAGIC:
            self._file.close()
            raise SteerError("no_recording", f"{path} is no MCAP file; give a file that `steer record` has written")
        self._end = self._intact()
        self._file.seek(-len(MCAP0_MAGIC), os.SEEK_END)
        self.whole = self._file.tell() == self._end and self._file.read() == MCAP0_MAGIC
        self.about: dict[str, dict[str, str]] = {}
        for record in self._records(whole_chunks=True):
            if isinstance(record, Chunk):  # what it is about stands before the first messages
                break
            if isinstance(record, Metadata):
                self.about[record.name] = record.metadata

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def namespace(self) -> str:
        """Namespace whose topics were recorded."""
        return self.about.get("recording", {}).get("namespace", "/steer")

    def messages(self, topics: frozenset[str] | None = None) -> Iterator[Recorded]:
        """Messages in the order of their arrival, of these topics (full names) or of all.

        Raises SteerError('bad_recording').
        """
        definitions: dict[str, str] = {}
        schemas: dict[int, Schema] = {}
        channels: dict[int, Channel] = {}
        store: Any = None
        for record in self._records():
            if isinstance(record, Schema):
                schemas[record.id] = record
                definitions[record.name] = record.data.decode()
                store = None
            elif isinstance(record, Channel):
                channels[record.id] = record
            elif isinstance(record, Message):
                channel = channels[record.channel_id]
                if topics is not None and channel.topic not in topics:
                    continue
                if store is None:
                    store = store_of(definitions)
                kind = schemas[channel.schema_id].name
                yield Recorded(channel.topic, kind, record.log_time, store.deserialize_cdr(record.data, kind))

    def _intact(self) -> int:
        """Where the last whole record ends."""
        end = self._file.tell()
        size = self._file.seek(0, os.SEEK_END)
        while end + 9 <= size:
            self._file.seek(end)
            _, length = struct.unpack("<BQ", self._file.read(9))
            if end + 9 + length > size:
                break
            end += 9 + length
        return end

    def _records(self, *, whole_chunks: bool = False) -> Iterator[Any]:
        self._file.seek(len(MCAP0_MAGIC))
        part: Any = _Part(self._file, self._end)
        reader = StreamReader(part, skip_magic=True, emit_chunks=whole_chunks, validate_crcs=True)
        try:
            for record in reader.records:
                if isinstance(record, Footer):
                    return
                yield record
        except EndOfPart:
            return
        except (McapError, CRCValidationError, zstandard.ZstdError, struct.error, UnicodeDecodeError) as error:
            raise SteerError("bad_recording", f"{self.path} is damaged: {error}") from None


class EndOfPart(Exception):
    """The last whole record of a recording that was cut short has been read."""


class _Part:
    """A file up to a boundary between two records."""

    def __init__(self, file: BufferedReader, end: int) -> None:
        self._file, self._end = file, end

    def read(self, count: int) -> bytes:
        if self._file.tell() >= self._end:
            raise EndOfPart
        return self._file.read(count)
