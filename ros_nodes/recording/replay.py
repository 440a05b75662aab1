"""A recorded run again: each inference on its recorded frame, under exactly the steering it ran under, compared bit for bit.

Invariant: an inference counts as reproduced only when every bit of its actions came out again; what cannot be compared is
counted with its reason, never passed over.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ros_nodes.assembler import ObservationAssembler
from ros_nodes.convert import RobotDescription, description_from_msg
from ros_nodes.evidence import Traced, trace_from_msg
from ros_nodes.loading import Loaded, PolicyParameters, load
from ros_nodes.recording.file import Recorded, Recording
from steer_runtime.errors import SteerError
from steer_runtime.steering.offline import OfflineSteering
from steer_runtime.types import Observation, Remembering

KEPT_FRAMES = 256
"""Frames that wait for the trace of their inference; a policy answers, or drops, every frame much sooner."""

AT_WORK = ("trace_path", "autostart", "shadow_every")
"""Parameters that make a node do something beside its inferences."""


@dataclass(frozen=True)
class Difference:
    """Where a replayed inference first differs: a row and number of its actions, and the largest difference of them all."""

    inference_id: int
    row: int
    number: int
    recorded: float
    replayed: float
    largest: float


@dataclass(frozen=True)
class Report:
    """What a replay found. inferences: traces in the recording, each in one of the counts that follow.

    different: came out otherwise. interrupted: steering was cut in mid inference. no_frame: its frame was not recorded.
    guarded: among the reproduced, chunks that a guard changed, or that did not go out, after the inference.
    """

    policy: str
    model_hash: str
    inferences: int
    same: int
    different: int
    interrupted: int
    no_frame: int
    guarded: int
    first: Difference | None
    remarks: tuple[str, ...]

    @property
    def reproduced(self) -> bool:
        """Whether something was compared and nothing differed."""
        return self.different == 0 and self.same > 0

    @property
    def sentence(self) -> str:
        """The finding in a sentence."""
        left_out = [
            f"{count} {why}"
            for count, why in (
                (self.interrupted, "cut short by a stop"),
                (self.no_frame, "without their frame"),
            )
            if count
        ]
        aside = f" ({', '.join(left_out)}: not compared)" if left_out else ""
        if self.first is None:
            return f"{self.same} of {self.inferences} inferences of {self.policy} came out the same, bit for bit{aside}"
        d = self.first
        return (
            f"{self.different} of {self.inferences} inferences of {self.policy} came out otherwise{aside}; first "
            f"inference {d.inference_id}, row {d.row}, number {d.number}: recorded {d.recorded:.9g}, replayed "
            f"{d.replayed:.9g}, largest difference {d.largest:.3g}"
        )


class Replay:
    """One recording and the policy that ran in it. policy, store: instead of the recorded parameters.

    Raises SteerError as `Recording`, and 'no_frames' for one that was made without pictures.
    """

    def __init__(self, path: Path, *, policy: str | None = None, store: Path | None = None) -> None:
        self.path = path
        self._policy, self._store = policy, store
        self._remarks: list[str] = []
        self._counts: Counter[str] = Counter()
        self._reproduced: dict[tuple[str, int], bytes] = {}  # actions by policy instance and inference
        self._first: Difference | None = None

    def run(
        self, progress: Callable[[str], None] = lambda told: None, warn: Callable[[str], None] = lambda line: None
    ) -> Report:
        """Run it. progress: hears how far it is; warn: what may explain differences.

        Raises SteerError: 'nothing_recorded', 'other_model', 'other_direction', 'two_policies' and all that loading refuses.
        """
        with Recording(self.path) as recording:
            if recording.about.get("recording", {}).get("frames") == "false":
                raise SteerError(
                    "no_frames",
                    f"{self.path} was recorded without frames, so its inferences cannot be run again; `--show` prints what "
                    "happened",
                )
            if not recording.whole:
                self._remark("the recording was cut short: its last moments are missing", warn)
            told = _provenance(recording)
            progress(f"loading {told['policy']}")
            loaded = self._load(told)
            self._compare_software(told, warn)
            steering = OfflineSteering(
                loaded.policy, list(loaded.engine.directions.values()), list(loaded.engine.axes.values())
            )
            chunks: dict[tuple[str, int], bytes] = {}
            with steering:
                for observation, trace in _inferences(recording, chunks):
                    self._infer(loaded, steering, observation, trace)
                    done = self._counts["inferences"]
                    progress(f"inference {done}: {self._counts['same']} the same, {self._counts['different']} not")
            guarded = self._counts["same"] - sum(
                chunks.get(key) == actions for key, actions in self._reproduced.items()
            )
        if not self._counts["inferences"]:
            raise SteerError(
                "nothing_recorded", f"{self.path} holds no trace of an inference; nothing can be run again"
            )
        if guarded:
            self._remark(f"{guarded} of the chunks were changed or withheld by a guard after their inference", warn)
        return Report(
            policy=loaded.policy.name,
            model_hash=loaded.policy.model_hash,
            inferences=self._counts["inferences"],
            same=self._counts["same"],
            different=self._counts["different"],
            interrupted=self._counts["interrupted"],
            no_frame=self._counts["no_frame"],
            guarded=guarded,
            first=self._first,
            remarks=tuple(self._remarks),
        )

    def _load(self, told: Mapping[str, Any]) -> Loaded:
        known = {f.name for f in fields(PolicyParameters)}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in told["parameters"].items()
            if name in known and name not in AT_WORK
        }
        if self._policy is not None:
            values["policy"] = self._policy
        if self._store is not None:
            values["direction_store"] = str(self._store)
        loaded = load(PolicyParameters(**values), lambda chunk: None, lambda event: None)
        if loaded.policy.model_hash != told["model_hash"]:
            raise SteerError(
                "other_model",
                f"{self.path} was recorded with model {told['model_hash'][:12]} of {told['policy']!r} and "
                f"{values['policy']!r} is model {loaded.policy.model_hash[:12]}: give the recorded one with --policy",
            )
        return loaded

    def _compare_software(self, told: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        """Compute as it was computed, as far as this process can; name the rest."""
        import torch

        torch.set_num_threads(int(told["torch"]["threads"]))
        here = torch.backends.cpu.get_cpu_capability()
        if here != told["torch"]["cpu"]:
            self._remark(f"recorded on a processor with {told['torch']['cpu']}, replayed on one with {here}", warn)
        for package, recorded in told["versions"].items():
            try:
                installed = version(package)
            except PackageNotFoundError:
                continue
            if installed != recorded:
                self._remark(f"recorded with {package} {recorded}, replayed with {installed}", warn)

    def _infer(self, loaded: Loaded, steering: OfflineSteering, seen: Observation | None, trace: Traced) -> None:
        self._counts["inferences"] += 1
        if trace.interrupted:
            self._counts["interrupted"] += 1
            return
        if seen is None:
            self._counts["no_frame"] += 1
            return
        policy = loaded.policy
        if isinstance(policy, Remembering):
            policy.remember(trace.memory)
        steering.restore(trace.applied)
        observation = replace(seen, instruction=trace.instruction)
        again, _ = steering.run(lambda: policy.infer(observation).actions)
        if again.shape == trace.actions.shape and again.tobytes() == trace.actions.tobytes():
            self._counts["same"] += 1
            self._reproduced[(trace.instance_id, trace.inference_id)] = again.tobytes()
            return
        self._counts["different"] += 1
        found = _difference(trace, again)
        if self._first is None or found.inference_id < self._first.inference_id:
            self._first = found

    def _remark(self, line: str, warn: Callable[[str], None]) -> None:
        self._remarks.append(line)
        warn(line)


def _difference(trace: Traced, again: np.ndarray) -> Difference:
    if again.shape != trace.actions.shape:
        raise SteerError(
            "other_shape",
            f"inference {trace.inference_id} was recorded with actions {list(trace.actions.shape)} and gives "
            f"{list(again.shape)}: the policy is configured otherwise; give the recorded one with --policy",
        )
    unequal = np.argwhere(again.view(np.uint32) != trace.actions.view(np.uint32))
    row, number = (int(i) for i in unequal[0])
    largest = float(np.abs(again.astype(np.float64) - trace.actions.astype(np.float64)).max())
    return Difference(
        trace.inference_id, row, number, float(trace.actions[row, number]), float(again[row, number]), largest
    )


def _provenance(recording: Recording) -> dict[str, Any]:
    """What the policy node said of itself. Raises SteerError('nothing_recorded' | 'two_policies' | 'bad_recording')."""
    topic = f"{recording.namespace}/provenance"
    told: dict[str, Any] = {}
    for recorded in recording.messages(frozenset({topic})):
        try:
            new = json.loads(recorded.message.data)
        except ValueError as error:
            raise SteerError("bad_recording", f"{recording.path} tells its provenance in no JSON: {error}") from None
        if told and any(told[key] != new[key] for key in ("model_hash", "directions", "axes", "parameters")):
            raise SteerError(
                "two_policies",
                f"{recording.path} holds runs of {told['policy']!r} and {new['policy']!r}, or of one policy with other "
                "parameters: record each of them in a file of its own",
            )
        told = new
    if not told:
        raise SteerError(
            "nothing_recorded",
            f"{recording.path} holds nothing of a policy node that was configured; record in its namespace (--namespace)",
        )
    return told


def _inferences(
    recording: Recording, chunks: dict[tuple[str, int], bytes]
) -> Iterator[tuple[Observation | None, Traced]]:
    """Every traced inference with its observation; those whose frame was not recorded whole come last, with None.

    chunks: is filled with the actions that went out, by policy instance and inference.
    """
    frames = _Frames(recording.namespace)
    # A trace may be heard before the last part of its frame: the two come over different topics.
    waiting: dict[int, list[Traced]] = {}
    for recorded in recording.messages():
        name = recorded.topic.removeprefix(f"{recording.namespace.rstrip('/')}/")
        if name == "trace":
            trace = trace_from_msg(recorded.message)
            seen = frames.of(trace.observation_stamp_ns)
            if seen is None:
                waiting.setdefault(trace.observation_stamp_ns, []).append(trace)
            else:
                yield seen, trace
        elif name == "actions":
            key = (recorded.message.instance_id, int(recorded.message.inference_id))
            chunks[key] = np.asarray(recorded.message.data, dtype=np.float32).tobytes()
        else:
            whole = frames.take(name, recorded)
            if whole is not None:
                for trace in waiting.pop(whole.stamp_ns, ()):
                    yield whole, trace
    for traces in waiting.values():
        for trace in traces:
            yield None, trace


class _Frames:
    """Observations of a recording, put together as a policy node does it."""

    def __init__(self, namespace: str) -> None:
        self._assembler: ObservationAssembler | None = None
        self._description: RobotDescription | None = None
        self._whole: OrderedDict[int, Observation] = OrderedDict()

    def take(self, name: str, recorded: Recorded) -> Observation | None:
        """Take a message; an observation when it completes one."""
        message = recorded.message
        if name == "robot_description":
            description = description_from_msg(message)
            if description != self._description:
                self._description, self._assembler = description, ObservationAssembler(description)
                # The words of an inference are in its trace; when they came does not matter here.
                self._assembler.instruction("")
            return None
        if self._assembler is None:
            return None
        try:
            seen = self._put(self._assembler, name, message)
        except SteerError:
            return None  # the node has refused it too
        if seen is not None:
            self._whole[seen.stamp_ns] = seen
            while len(self._whole) > KEPT_FRAMES:
                self._whole.popitem(last=False)
        return seen

    def of(self, stamp_ns: int) -> Observation | None:
        """The observation of this stamp."""
        return self._whole.get(stamp_ns)

    @staticmethod
    def _put(assembler: ObservationAssembler, name: str, message: Any) -> Observation | None:
        match name.split("/"):
            case ["camera", camera, "image"] if camera in {c.name for c in assembler.description.cameras}:
                return assembler.image(camera, message)
            case ["joint_states"]:
                return assembler.joints(message)
            case ["gripper_command"] if assembler.description.tells_gripper:
                return assembler.gripper(message)
            case ["eef_pose"]:
                return assembler.pose(message)
        return None
