"""A recording survives what may befall its writer and its disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mcap.reader import make_reader
from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_typestore

from ros_nodes.recording.definitions import definition_of, message_store
from ros_nodes.recording.file import Recording, RecordingWriter
from steer_runtime.errors import SteerError

STORE = get_typestore(Stores.LATEST)
STRING = STORE.types["std_msgs/msg/String"]
KIND = "std_msgs/msg/String"


def serialised(text: str) -> bytes:
    return bytes(STORE.serialize_cdr(STRING(data=text), KIND))


def write(path: Path, texts: list[str], *, flush_every: int = 3, end: bool = True) -> RecordingWriter:
    writer = RecordingWriter(path, {"recording": {"namespace": "/steer"}})
    topic = writer.topic("/steer/instruction", KIND, definition_of(STORE, KIND) or "")
    for i, text in enumerate(texts):
        writer.add(topic, serialised(text), 1_000 + i, 900 + i, i)
        if i % flush_every == flush_every - 1:
            writer.flush()
    if end:
        writer.close()
    return writer


def texts_of(path: Path) -> list[str]:
    with Recording(path) as recording:
        return [recorded.message.data for recorded in recording.messages()]


def test_what_is_recorded_comes_back(tmp_path: Path) -> None:
    texts = [f"message {i}" for i in range(10)]
    write(tmp_path / "run.mcap", texts)
    with Recording(tmp_path / "run.mcap") as recording:
        assert recording.whole
        assert recording.namespace == "/steer"
        found = list(recording.messages())
        assert [recorded.message.data for recorded in found] == texts
        assert [recorded.log_ns for recorded in found] == list(range(1_000, 1_010))
        assert {recorded.topic for recorded in found} == {"/steer/instruction"}
        assert list(recording.messages(frozenset({"/steer/command"}))) == []


def test_other_readers_of_the_format_read_the_same(tmp_path: Path) -> None:
    texts = [f"message {i}" for i in range(10)]
    write(tmp_path / "run.mcap", texts)
    with Reader(tmp_path / "run.mcap") as reader:
        found = [(c.topic, t, STORE.deserialize_cdr(data, c.msgtype).data) for c, t, data in reader.messages()]
    assert found == [("/steer/instruction", 1_000 + i, text) for i, text in enumerate(texts)]
    with (tmp_path / "run.mcap").open("rb") as file:
        summary = make_reader(file).get_summary()
    assert summary is not None
    assert summary.statistics is not None
    assert summary.statistics.message_count == 10


def test_our_messages_are_known_with_all_that_they_contain() -> None:
    store = message_store()
    text = definition_of(store, "steer_msgs/msg/SteeringTrace")
    assert text is not None
    assert "MSG: steer_msgs/AppliedDirection" in text
    assert "float64 strength" in text
    assert definition_of(store, "steer_msgs/msg/Unheard") is None


def test_a_recording_cut_at_any_byte_is_read_up_to_its_last_whole_record(tmp_path: Path) -> None:
    texts = [f"message {i} " + "x" * 40 for i in range(12)]
    write(tmp_path / "run.mcap", texts)
    data = (tmp_path / "run.mcap").read_bytes()
    read = []
    for length in range(8, len(data), 7):
        path = tmp_path / "cut.mcap"
        path.write_bytes(data[:length])
        found = texts_of(path)
        assert found == texts[: len(found)]
        with Recording(path) as recording:
            assert not recording.whole
        read.append(len(found))
    assert read == sorted(read)
    assert set(read) == {0, 3, 6, 9, 12}


def test_a_recording_is_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "run.mcap", ["first"])
    with pytest.raises(SteerError, match="never overwritten"):
        write(tmp_path / "run.mcap", ["second"])
    assert texts_of(tmp_path / "run.mcap") == ["first"]


def test_another_file_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.mcap").write_text("no recording at all")
    with pytest.raises(SteerError, match="no MCAP file"):
        Recording(tmp_path / "other.mcap")
    with pytest.raises(SteerError, match="cannot be read"):
        Recording(tmp_path / "nowhere.mcap")
    write(tmp_path / "run.mcap", ["some text of a message"] * 30, flush_every=30)
    data = bytearray((tmp_path / "run.mcap").read_bytes())
    data[400] ^= 0xFF
    (tmp_path / "damaged.mcap").write_bytes(data)
    with pytest.raises(SteerError, match="damaged"):
        texts_of(tmp_path / "damaged.mcap")


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_recording_file import KIND, STORE, definition_of, serialised
from ros_nodes.recording.file import RecordingWriter
import numpy as np

path, frees = Path(sys.argv[1]), sys.argv[2] == "frees"
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
writer = RecordingWriter(path, {}, waiting_bytes=300_000)
topic = writer.topic("/steer/instruction", KIND, definition_of(STORE, KIND))
noise = np.random.default_rng(0)
refused = 0
for i in range(100):
    text = f"{i} " + noise.bytes(5_000).hex()
    writer.add(topic, serialised(text), i, i)
    try:
        writer.flush()
    except OSError:
        refused += 1
    if frees and i == 50:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
try:
    writer.close()
except OSError:
    pass
print(refused, writer.messages["/steer/instruction"], writer.dropped["/steer/instruction"])
"""


def with_full_disk(path: Path, frees: bool) -> tuple[int, int, int]:
    """A writer on a disk that is full at 200 kB: (refused flushes, messages taken, messages dropped)."""
    command = [sys.executable, "-c", FULL_DISK, str(path), "frees" if frees else "stays full"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    refused, taken, dropped = (int(word) for word in done.stdout.split())
    return refused, taken, dropped


@pytest.mark.fault(36)
def test_a_full_disk_costs_only_what_no_longer_fits_in_memory(tmp_path: Path) -> None:
    refused, taken, dropped = with_full_disk(tmp_path / "full.mcap", frees=False)
    assert refused > 0
    assert dropped > 0
    assert taken + dropped == 100
    found = [int(text.split()[0]) for text in texts_of(tmp_path / "full.mcap")]
    assert found == list(range(len(found)))
    assert 10 < len(found) < taken


@pytest.mark.fault(36)
def test_a_disk_that_frees_gets_what_waited(tmp_path: Path) -> None:
    refused, taken, dropped = with_full_disk(tmp_path / "full.mcap", frees=True)
    assert refused > 0
    assert (taken, dropped) == (100, 0)
    with Recording(tmp_path / "full.mcap") as recording:
        assert recording.whole
        assert [int(m.message.data.split()[0]) for m in recording.messages()] == list(range(100))


def test_a_long_recording_keeps_the_order_of_arrival(tmp_path: Path) -> None:
    texts = [str(i) + np.random.default_rng(i).bytes(2_000).hex() for i in range(1_000)]
    write(tmp_path / "run.mcap", texts, flush_every=10_000)
    assert texts_of(tmp_path / "run.mcap") == texts
