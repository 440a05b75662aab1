"""A run on the real graph, recorded and run again, while recorders die or their disk fills."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fabricate
import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from driver import NodeProcess, PolicyProcess, SensorDriver
from std_msgs.msg import String
from subjects_ros import make_direction

from ros_nodes.client import SteeringClient
from ros_nodes.convert import ns_from_time
from ros_nodes.qos import DIAGNOSTICS, SENSOR
from ros_nodes.recording.definitions import definition_of, message_store
from ros_nodes.recording.file import Recorded, Recording, RecordingWriter
from ros_nodes.recording.node import SILENT_S
from ros_nodes.recording.replay import Replay, Report
from steer_runtime.directions.store import DirectionStore
from steer_runtime.errors import SteerError
from steer_runtime.policies import load_policy

PATIENCE_S = 600.0
FULL_BYTES = 600_000

pytestmark = pytest.mark.timeout(2400)


class RecorderProcess(NodeProcess):
    """`recorder_node` as launched by a user."""

    def __init__(self, path: Path, domain: int, **parameters: Any) -> None:
        chosen = {"path": str(path), "flush_period_s": 0.1, **parameters}
        super().__init__(["-m", "ros_nodes.recording.node"], chosen, domain)
        self.path = path

    def wait(self, ready: Callable[[Recording], bool], recorded: NodeProcess | None = None) -> None:
        """Until what is on disk satisfies `ready`; recorded: whose output explains why it does not."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            if self.path.exists() and self.path.stat().st_size > 8:
                with Recording(self.path) as recording:
                    if ready(recording):
                        return
            assert self.process.poll() is None, self.log()
            beside = "" if recorded is None else recorded.log()
            assert recorded is None or recorded.process.poll() is None, beside
            assert time.monotonic() < deadline, f"not recorded within {PATIENCE_S} s:\n{beside}\n{self.log()}"
            time.sleep(0.2)

    def end(self) -> None:
        """As Ctrl-C does it."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(20.0) == 0, self.log()


class RecordVerb(RecorderProcess):
    """`steer record` as typed by a user."""

    def __init__(self, path: Path, domain: int, *options: str) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        self.path = path
        program = "from steer_runtime.cli.main import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, "record", str(path), "--flush", "0.1", *options],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "ROS_DOMAIN_ID": str(domain)},
        )


def count(recording: Recording, topic: str, wanted: Callable[[Any], bool] = lambda message: True) -> int:
    return sum(wanted(m.message) for m in recording.messages(frozenset({f"/steer/{topic}"})))


@dataclass
class Run:
    """What one run left. whole: recorded to its end; killed: by a recorder that was killed; slim: without frames;
    full: by a recorder whose disk filled and freed again."""

    whole: Path
    killed: Path
    slim: Path
    full: Path
    verdicts: int


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, policy_yaml: Path, direction_store: Path, third_domain: int) -> Run:
    """Ramps, an axis, a refused command and a clear, on a robot in lockstep, with four recorders."""
    root = tmp_path_factory.mktemp("recorded")
    names = ("whole", "killed", "slim", "full")
    paths = {name: root / f"{name}.mcap" for name in names}
    robot = [str(Path(__file__).parent / "point_robot.py")]
    domain = third_domain
    with (
        RecorderProcess(paths["whole"], domain) as whole,
        RecorderProcess(paths["killed"], domain) as killed,
        RecordVerb(paths["slim"], domain, "--no-frames") as slim,
        RecorderProcess(paths["full"], domain) as full,
        PolicyProcess(policy_yaml, direction_store, domain=domain) as policy,
        SensorDriver(domain=domain) as watcher,
        SteeringClient(domain_id=domain, source="operator") as client,
    ):
        for recorder in (whole, killed, slim, full):
            recorder.wait(lambda recording: count(recording, "provenance") > 0, policy)
        with NodeProcess(robot, {"mode": "lockstep"}, domain):
            client.wait_state(lambda state: state.lifecycle == "active", timeout=PATIENCE_S)
            for recorder in (whole, killed, slim, full):
                recorder.wait(
                    lambda recording: min(count(recording, name) for name in ("trace", "eef_pose")) >= 3, policy
                )
            verdicts = 0

            def order(send: Callable[[], Any]) -> None:
                """Send a command, and wait until inferences under it are recorded."""
                nonlocal verdicts
                verdict = client.wait_verdict(send(), timeout=PATIENCE_S)
                verdicts += 1
                sequence = verdict.steering.sequence
                whole.wait(lambda r: count(r, "trace", lambda m: m.steering_sequence >= sequence) >= 3, policy)

            order(lambda: client.publish("slow", 0.7, ramp_s=3.0))
            order(lambda: client.publish("speed", 0.9, ramp_s=0.4, span=frozenset({"text"})))
            assert not client.wait_verdict(client.publish("unheard-of", 1.0), timeout=PATIENCE_S).accepted
            verdicts += 1
            killed.wait(lambda recording: count(recording, "eef_pose") >= 8)
            killed.kill()

            # From here on its disk is full, and steering must not notice.
            resource.prlimit(full.process.pid, resource.RLIMIT_FSIZE, (FULL_BYTES, resource.RLIM_INFINITY))
            watcher.wait_diagnosis(lambda s: "recorder" in s.name and "takes nothing" in s.message, timeout=PATIENCE_S)
            order(lambda: client.publish("fast", 0.4, ramp_s=0.0, priority=3))
            order(lambda: client.clear("slow"))
            resource.prlimit(full.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            watcher.wait_diagnosis(
                lambda s: "recorder" in s.name and s.message.endswith("full.mcap"), timeout=PATIENCE_S
            )
            order(lambda: client.clear())
        for recorder in (whole, slim, full):
            recorder.end()
    return Run(**paths, verdicts=verdicts)


def before_the_first_frame(path: Path) -> int:
    """Inferences on frames from before the recorder had found the robot's sensors."""
    with Recording(path) as recording:
        first = {}
        for topic in ("camera/agentview/image", "camera/wrist/image", "joint_states", "eef_pose", "gripper_command"):
            heard = recording.messages(frozenset({f"/steer/{topic}"}))
            first[topic] = ns_from_time(next(heard).message.header.stamp)
        start = max(first.values())
        return count(recording, "trace", lambda m: ns_from_time(m.observation_stamp) < start)


def replayed(path: Path, **options: Any) -> Report:
    warned: list[str] = []
    report = Replay(path, **options).run(warn=warned.append)
    assert list(report.remarks) == warned
    return report


def test_a_recorded_run_is_reproduced_bit_for_bit(run: Run) -> None:
    report = replayed(run.whole)
    assert report.reproduced, report.sentence
    assert (report.different, report.guarded) == (0, 0)
    # The clear at the end may cut an inference short, and then says so.
    assert report.interrupted <= 1
    assert report.no_frame >= before_the_first_frame(run.whole)  # frames are best effort
    assert report.same == report.inferences - report.interrupted - report.no_frame >= 18
    with Recording(run.whole) as recording:
        traces = [m.message for m in recording.messages(frozenset({"/steer/trace"}))]
        ramped = {a.strength for m in traces for a in m.applied if a.target == "slow"}
        assert len(ramped) >= 3
        assert {a.target for m in traces for a in m.applied} == {"slow", "speed", "fast"}
        assert recording.whole


def test_every_topic_of_the_run_is_in_the_recording(run: Run) -> None:
    with Recording(run.whole) as recording:
        found: dict[str, list[Any]] = {}
        for recorded in recording.messages():
            found.setdefault(recorded.topic, []).append(recorded.message)
    assert len(found["/steer/command"]) == len(found["/steer/verdict"]) == run.verdicts
    assert [m.code for m in found["/steer/rejected"]] == ["unknown_direction"]
    actions = {m.inference_id for m in found["/steer/actions"]}
    assert actions == {m.inference_id for m in found["/steer/trace"]}
    assert len(found["/steer/robot_description"]) == 1
    assert {
        "/steer/camera/agentview/image",
        "/steer/camera/wrist/image",
        "/steer/joint_states",
        "/steer/eef_pose",
    } <= set(found)
    assert {"/steer/state", "/steer/episode", "/steer/instruction", "/steer/gripper_command", "/diagnostics"} <= set(
        found
    )
    told = json.loads(found["/steer/provenance"][0].data)
    assert told["policy"] == "tiny"
    assert {"torch", "numpy", "steer-runtime"} <= set(told["versions"])
    assert set(told["directions"]) == {"slow", "fast", "gentle"}
    assert told["parameters"]["torch_threads"] == told["torch"]["threads"] == 1


def test_a_killed_recorder_leaves_what_it_had_flushed(run: Run) -> None:
    report = replayed(run.killed)
    assert report.reproduced, report.sentence
    assert report.same >= 3
    # Frames are best effort, and the newest may not have been on disk in full.
    assert report.no_frame >= before_the_first_frame(run.killed)
    assert report.same + report.no_frame + report.interrupted == report.inferences
    assert "cut short" in report.remarks[0]


@pytest.mark.fault(36)
def test_a_disk_that_filled_in_between_costs_nothing_once_it_frees(run: Run) -> None:
    report = replayed(run.full)
    assert report.reproduced, report.sentence
    assert report.no_frame >= before_the_first_frame(run.full)
    with Recording(run.full) as full, Recording(run.whole) as whole:
        assert full.path.stat().st_size > FULL_BYTES
        assert count(full, "trace") == count(whole, "trace")


def test_a_recorder_that_hears_nobody_says_so(tmp_path: Path, third_domain: int) -> None:
    path = tmp_path / "alone.mcap"
    with SensorDriver(domain=third_domain) as watcher, RecorderProcess(path, third_domain):

        def told(words: str) -> DiagnosticStatus:
            return watcher.wait_diagnosis(lambda s: "recorder" in s.name and words in s.message, timeout=PATIENCE_S)

        told("recording to")
        # Another node is there, and says nothing.
        other = watcher.node.create_publisher(DiagnosticArray, "/diagnostics", DIAGNOSTICS)
        status = told("though other nodes are in /steer (1)")
        assert status.level == DiagnosticStatus.WARN
        assert float(next(v.value for v in status.values if v.key == "newest_age_s")) > SILENT_S
        other.publish(DiagnosticArray())
        told("recording to")


def test_a_recording_without_frames_is_shown_but_not_run_again(run: Run) -> None:
    with pytest.raises(SteerError, match="without frames"):
        replayed(run.slim)
    with Recording(run.slim) as recording, Recording(run.whole) as whole:
        assert count(recording, "trace") == count(whole, "trace")
        assert not any("camera" in m.topic for m in recording.messages())
    assert run.slim.stat().st_size < run.whole.stat().st_size / 5


def changed(path: Path, out: Path, change: Callable[[Recorded], None]) -> Path:
    """A copy of a recording with messages changed. Of the whole: on a busy machine frames are heard long after their traces."""
    store = message_store()
    with Recording(path) as recording:
        writer = RecordingWriter(out, recording.about)
        topics: dict[str, int] = {}
        for recorded in recording.messages():
            if recorded.topic not in topics:
                definition = definition_of(store, recorded.kind)
                assert definition is not None
                topics[recorded.topic] = writer.topic(recorded.topic, recorded.kind, definition)
            change(recorded)
            data = bytes(store.serialize_cdr(recorded.message, recorded.kind))
            writer.add(topics[recorded.topic], data, recorded.log_ns, recorded.log_ns)
        writer.close()
    return out


def test_the_first_difference_is_named_and_is_the_exit_code(run: Run, tmp_path: Path) -> None:
    seen: list[int] = []
    start = before_the_first_frame(run.whole)

    def change(recorded: Recorded) -> None:
        if recorded.topic == "/steer/trace":
            seen.append(recorded.message.inference_id)
            if len(seen) in (start + 4, start + 6):
                data = recorded.message.data.copy()
                data[3] = np.nextafter(data[3], np.float32(2.0))
                recorded.message.data = data

    path = changed(run.whole, tmp_path / "changed.mcap", change)
    report = replayed(path)
    assert not report.reproduced
    assert report.different == 2
    assert report.first is not None
    assert (report.first.inference_id, report.first.row, report.first.number) == (seen[start + 3], 0, 3)
    steer = [sys.executable, "-c", "from steer_runtime.cli.main import main; main()", "replay", str(path), "--json"]
    done = subprocess.run(steer, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["first"]["inference_id"] == seen[start + 3]


def test_a_strength_other_than_recorded_comes_out_otherwise(run: Run, tmp_path: Path) -> None:
    def change(recorded: Recorded) -> None:
        if recorded.topic == "/steer/trace":
            for applied in recorded.message.applied:
                applied.strength *= 0.5

    report = replayed(changed(run.whole, tmp_path / "weaker.mcap", change))
    assert report.different > 0


def test_another_model_or_direction_is_refused(run: Run, loaded_policy: Any, tmp_path: Path) -> None:
    model = fabricate.tiny_model(seed=1)
    fabricate.save_tiny(tmp_path / "other" / "checkpoint", model=model)
    (tmp_path / "other" / "tiny.yaml").write_text(
        "kind: openvla\nname: tiny\ncheckpoint: checkpoint\nsuite: libero_object\n"
    )
    other = load_policy(tmp_path / "other" / "tiny.yaml")
    store = DirectionStore(tmp_path / "other-store")
    store.save(make_direction(other, "slow", 1.0))
    with pytest.raises(SteerError, match="was recorded with model"):
        replayed(run.whole, policy=str(tmp_path / "other" / "tiny.yaml"), store=tmp_path / "other-store")
    store = DirectionStore(tmp_path / "store")
    for name in ("slow", "fast", "gentle"):
        store.save(make_direction(loaded_policy, name, 7.0))
    with pytest.raises(SteerError, match="load the same directions"):
        replayed(run.whole, store=tmp_path / "store")


def test_the_timeline_tells_the_run_without_ros(run: Run) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from ros_nodes.recording.file import Recording\n"
        "from ros_nodes.recording.timeline import timeline\n"
        f"with Recording(Path({str(run.whole)!r})) as recording:\n"
        "    for event in timeline(recording):\n"
        "        print(event.kind, '|', event.text)\n"
        "assert 'rclpy' not in sys.modules and 'torch' not in sys.modules and 'steer_msgs' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("command | operator 1: set slow +0.7, ramp 3 s") for line in lines)
    assert any("refused (unknown_direction)" in line for line in lines)
    assert any(line.startswith("robot | point (lockstep)") for line in lines)
    assert any(line.startswith("policy | tiny is active, loop running") for line in lines)
    assert any(line.startswith("inference | ") and "slow +0." in line for line in lines)
    assert any("takes nothing" in line for line in lines)
    assert lines[-1].startswith("recording | the last message; ")


def test_a_recorder_without_a_usable_file_says_why(tmp_path: Path, third_domain: int) -> None:
    (tmp_path / "there.mcap").write_text("something")
    with RecorderProcess(tmp_path / "there.mcap", third_domain) as recorder:
        assert recorder.process.wait(60.0) == 1
        assert "never overwritten" in recorder.log()
        assert "Traceback" not in recorder.log()


def test_messages_that_are_lost_on_the_way_are_counted(tmp_path: Path, third_domain: int) -> None:
    published = 4000
    with (
        RecorderProcess(tmp_path / "run.mcap", third_domain) as recorder,
        SensorDriver(domain=third_domain) as driver,
    ):
        publisher = driver.node.create_publisher(String, "many", SENSOR)
        driver.wait(lambda: publisher.get_subscription_count() == 1, PATIENCE_S, "the recorder")
        publisher.publish(String(data="the first"))
        recorder.wait(lambda recording: count(recording, "many") == 1)
        recorder.process.send_signal(signal.SIGSTOP)
        for i in range(published):
            publisher.publish(String(data=f"{i}"))
        recorder.process.send_signal(signal.SIGCONT)
        told = driver.wait_diagnosis(
            lambda s: s.name == "/steer/recorder: recording" and any(p.key == "missing /steer/many" for p in s.values),
            timeout=PATIENCE_S,
        )
        assert told.level == DiagnosticStatus.WARN

        def last_is_there(recording: Recording) -> bool:
            """Once it is, everything before it is known to be recorded or lost."""
            publisher.publish(String(data="the last"))
            return count(recording, "many", lambda m: m.data == "the last") > 0

        recorder.wait(last_is_there)
        recorder.end()
        told_at_the_end = recorder.log()
    with Recording(tmp_path / "run.mcap") as recording:
        ends = count(recording, "many", lambda m: m.data == "the last")
        recorded = count(recording, "many") - ends - 1
    found = re.search(r"(\d+) messages are missing", told_at_the_end)
    assert found is not None
    assert 0 < recorded < published
    assert int(found[1]) == published - recorded
