"""One recorded episode under steering: what was commanded, what the policy did, what the robot showed.

Invariant: a record on disk is JSON and plain arrays; loading checks both and executes nothing.
A record is a folder: `episode.json` (facts) and `arrays.npz` (numbers and images, never pickles).
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from steer_runtime.errors import SteerError

FORMAT = "steer-episode/2"
ACTION_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
RATE_HZ = 20.0
"""Control steps a second of LIBERO's robots."""


@dataclass(frozen=True)
class CommandOutcome:
    """One command and what became of it.

    Times are wall-clock ns of one machine: published by the operator; verdict received by it; latched by the policy
    node (start of the first inference that carries the command); action received by the operator; executed, the stamp
    of the robot's next frame. None: it did not happen.
    step: control steps commanded before it; first_step: the same for the first inference that carries it.
    inferences: those published from the command until the first one that carries it, that one included.
    writes: values the engine wrote for the command's direction while the command held, from its trace.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    label: str
    op: Literal["set", "clear", "clear_all"]
    target: str
    strength: float
    ramp_s: float | None
    expected: Literal["applied", "refused"]
    published_ns: int
    accepted: bool
    code: str
    sentence: str
    applied_strength: float
    epoch: int
    sequence: int
    direction_id: str
    step: int
    verdict_ns: int | None = None
    latched_ns: int | None = None
    action_ns: int | None = None
    executed_ns: int | None = None
    inferences: int | None = None
    first_inference: int | None = None
    first_step: int | None = None
    writes: int = 0
    writes_after: int = 0  # for a clear: what was still written once it had taken effect

    @property
    def fault(self) -> str | None:
        """Why this command did not do what it should, or None."""
        if self.expected == "refused":
            return "it was accepted, but had to be refused" if self.accepted else None
        if not self.accepted:
            return f"it was refused ({self.code}): {self.sentence}"
        if self.first_inference is None:
            return "no action carries its sequence"
        if self.op == "set" and self.writes == 0:
            return "the engine's trace shows no write for it"
        if self.op != "set" and self.writes_after > 0:
            return f"{self.writes_after} values were still written after it"
        return None


@dataclass(frozen=True)
class SteeredBy:
    """A direction of the episode. form: neurons or dense. sites: places it writes (neurons, or residual sites) of a tower.

    words: that found it; finder: what else did.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    id: str
    form: str
    op: str
    span: tuple[str, ...]
    sites: int
    words: tuple[str, ...]
    tower: str = ""
    finder: str = ""


@dataclass(frozen=True)
class EpisodeFacts:
    """Everything of an episode that is not an array.

    trained: False makes every surface say "untrained policy". trace: records of the engine, one an inference, as JSON.
    timings: seconds of each part of the run. success: the task's own check passed. hold_steps: control steps without an
    action. missing_frames: inferences whose images did not arrive, and which the record leaves out. unsent: labels of
    commands whose moment did not come before the episode's end. said: the policy's words at each of the N inferences,
    empty tuples where it says none; condition_said: the same by condition and replayed observation, [C][O].
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    policy: str
    trained: bool
    model_hash: str
    suite: str
    task_id: int
    init_state_index: int
    instruction: str
    created: str
    success: bool
    hold_steps: int
    missing_frames: int
    versions: Mapping[str, str]
    directions: tuple[SteeredBy, ...]
    commands: tuple[CommandOutcome, ...]
    trace: tuple[Mapping[str, Any], ...]
    conditions: tuple[str, ...] = ()
    unsent: tuple[str, ...] = ()
    said: tuple[tuple[str, ...], ...] = ()
    condition_said: tuple[tuple[tuple[str, ...], ...], ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EpisodeRecord:
    """Facts and arrays of N inferences and the S control steps that they commanded.

    agentview, wrist: uint8 RGB [N, H, W, 3], what the inference saw. state: float64 [N, 8]. step: int64 [N], control steps
    before the inference, rising. inference, sequence: int64 [N], its number and the accepted change of steering in it.
    age_s: float64 [N], observation received to actions ready. action: float32 [S, 7], executed, in the robot's units.

    Before and after, on O of the observations under C conditions (the first is steering off), empty when not computed:
    replayed: int64 [O], which of the N. actions: float32 [C, O, 7], the first of each chunk. tokens: int64 [C, O, 7].
    bins: float32 [C, O, 7, B], probabilities of the action bins. bin_values: float32 [B], normalised, rising. B is 0, and
    tokens are zeros, for a policy whose actions are no tokens.
    """

    facts: EpisodeFacts
    agentview: np.ndarray
    wrist: np.ndarray
    state: np.ndarray
    step: np.ndarray
    inference: np.ndarray
    sequence: np.ndarray
    age_s: np.ndarray
    action: np.ndarray
    replayed: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    actions: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 7), np.float32))
    tokens: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 7), np.int64))
    bins: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 7, 0), np.float32))
    bin_values: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {"C": len(self.facts.conditions)}
        for name, (dtype, shape) in _ARRAYS.items():
            array = getattr(self, name)
            wanted = [
                sizes.setdefault(s, n) if isinstance(s, str) else s for s, n in zip(shape, array.shape, strict=False)
            ]
            if array.dtype != dtype or list(array.shape) != wanted or len(shape) != array.ndim:
                raise SteerError(
                    "bad_record",
                    f"array {name!r} is {array.dtype} {list(array.shape)}: expected {dtype} {list(shape)} with "
                    f"{sizes}; record the episode again",
                )
        if (np.diff(self.step) < 1).any() or (self.step < 0).any() or (self.step >= max(1, self.steps)).any():
            raise SteerError(
                "bad_record",
                f"array 'step' does not rise within 0 to {self.steps - 1}: expected one number an inference; record again",
            )
        if len(self.facts.said) not in (0, self.inferences):
            raise SteerError(
                "bad_record",
                f"{len(self.facts.said)} inferences said something of {self.inferences}: expected all or none; record again",
            )

    @property
    def steps(self) -> int:
        """Control steps, S."""
        return len(self.action)

    @property
    def inferences(self) -> int:
        """Inferences whose frames were recorded, N."""
        return len(self.inference)

    @property
    def speed(self) -> np.ndarray:
        """Mean speed of the hand between consecutive recorded frames, m/s [N - 1]."""
        way = np.linalg.norm(np.diff(self.state[:, :3], axis=0), axis=1)
        return way * RATE_HZ / np.diff(self.step)

    @property
    def strengths(self) -> Mapping[str, np.ndarray]:
        """Direction name -> strength in [0, 1] at each inference [N], from the engine's trace; 0 where it did not act."""
        by_inference = {record["inference_id"]: record.get("strengths", {}) for record in self.facts.trace}
        return {
            d.name: np.array([by_inference.get(int(i), {}).get(d.id, 0.0) for i in self.inference], dtype=np.float64)
            for d in self.facts.directions
        }

    @property
    def faults(self) -> tuple[str, ...]:
        """A sentence for each command that did not do what it should."""
        wrong = [f"{c.label}: {c.fault}" for c in self.facts.commands if c.fault is not None]
        late = f"it was not sent: the episode ended after {self.steps} control steps"
        return (*wrong, *(f"{label}: {late}" for label in self.facts.unsent))


_ARRAYS: Mapping[str, tuple[str, tuple[str | int, ...]]] = {
    "agentview": ("uint8", ("N", "H", "W", 3)),
    "wrist": ("uint8", ("N", "H", "W", 3)),
    "state": ("float64", ("N", 8)),
    "step": ("int64", ("N",)),
    "inference": ("int64", ("N",)),
    "sequence": ("int64", ("N",)),
    "age_s": ("float64", ("N",)),
    "action": ("float32", ("S", 7)),
    "replayed": ("int64", ("O",)),
    "actions": ("float32", ("C", "O", 7)),
    "tokens": ("int64", ("C", "O", 7)),
    "bins": ("float32", ("C", "O", 7, "B")),
    "bin_values": ("float32", ("B",)),
}


def save(record: EpisodeRecord, folder: Path) -> Path:
    """Write a record to a folder, which is made if needed. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "arrays.npz", **{name: getattr(record, name) for name in _ARRAYS})
    facts = {"format": FORMAT, **asdict(record.facts)}
    (folder / "episode.json").write_text(json.dumps(facts, indent=1, allow_nan=False), encoding="utf-8")
    return folder


def load(folder: Path) -> EpisodeRecord:
    """Read a record. Raises SteerError for a missing or torn one, another format, and arrays that are pickles."""
    for name in ("episode.json", "arrays.npz"):
        if not (folder / name).is_file():
            raise SteerError(
                "no_record",
                f"{folder} holds no {name}: expected the folder of a recorded episode, such as out/demo/episode",
            )
    return EpisodeRecord(_load_facts(folder / "episode.json"), **_load_arrays(folder / "arrays.npz"))


def _load_facts(path: Path) -> EpisodeFacts:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content.pop("format", None)
        if found != FORMAT:
            raise SteerError(
                "bad_record", f"{path} has format {found!r}: expected {FORMAT!r}; record the episode again"
            )
        return TypeAdapter(EpisodeFacts).validate_python(content)
    except (ValueError, AttributeError) as e:
        cause = e.errors()[0] if isinstance(e, ValidationError) else e
        what = f"{'.'.join(map(str, cause['loc']))}: {cause['msg']}" if isinstance(cause, dict) else str(cause)
        raise SteerError(
            "bad_record", f"{path} is not a record of an episode ({what}); record the episode again"
        ) from None


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = sorted(set(_ARRAYS) ^ set(archive.files))
            if missing:
                raise SteerError(
                    "bad_record", f"{path} lacks or adds {missing}: expected {sorted(_ARRAYS)}; record again"
                )
            return {name: archive[name] for name in _ARRAYS}
    except (ValueError, OSError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as e:
        raise SteerError(
            "bad_record", f"{path} is not an archive of plain arrays ({e}); it is not opened, record the episode again"
        ) from None
