"""A study as its YAML says it: a policy, suites, starts, conditions.

Invariant: a file says everything that decides an episode; unknown keys and bad values are refused with one sentence that
names the place in the file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sim.evaluation.study.kinds import Meshes
from sim.layouts import Kind as Layout
from steer_runtime.errors import SteerError
from steer_runtime.unique_keys import UniqueKeys

STANDARD: tuple[str, ...] = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
"""LIBERO's suites (Liu et al. 2023, arXiv 2306.03310)."""
PRO: tuple[str, ...] = tuple(
    f"{base}_{change}" for base in STANDARD[:4] for change in ("lan", "object", "swap", "task")
)
"""LIBERO-PRO's suites: instructions, objects, positions, tasks changed."""
MANY = {"standard": STANDARD, "libero_pro": PRO}
"""Names that stand for several suites."""
_PART = re.compile(r"(\d{1,10})(?:-(\d{1,10}))?")
_MANY = 100_000
"""Numbers of a range; more is a mistype that would fill the memory."""


def _numbers(value: Any) -> Any:
    """ "0-4,7" or a list of whole numbers, as a tuple; each once."""
    if isinstance(value, str):
        found: list[int] = []
        for part in value.split(","):
            match = _PART.fullmatch(part.strip())
            if match is None:
                raise ValueError("expected whole numbers such as 0-4,7")
            low, high = int(match[1]), int(match[2] or match[1])
            if high < low:
                raise ValueError(f"{part.strip()} counts down: expected the smaller number first")
            if high - low >= _MANY:
                raise ValueError(f"{part.strip()} is more than {_MANY} numbers")
            found += range(low, high + 1)
        value = found
    if not isinstance(value, Sequence) or not value or any(type(n) is not int or n < 0 for n in value):
        raise ValueError("expected whole numbers from 0 on, such as [0, 3] or 0-4,7")
    if len(set(value)) != len(value):
        raise ValueError("a number is given twice")
    return tuple(value)


def _first(value: Any) -> Any:
    """A count n is numbers 0 to n - 1."""
    if type(value) is int:
        if value < 1:
            raise ValueError("expected at least 1")
        return tuple(range(value))
    return _numbers(value)


def _tasks(value: Any) -> Any:
    return "all" if value == "all" else _numbers(value)


def _one_place(wording: str) -> str:
    if wording.count("{}") != 1:
        raise ValueError("expected a wording with {} once, where the instruction goes, such as '{}, slowly'")
    return wording


def _each_once(values: tuple[float, ...]) -> tuple[float, ...]:
    if len(set(values)) != len(values):
        raise ValueError("a number is given twice")
    return values


def _no_switch(value: Any) -> Any:
    """YAML's `yes` and `true` are no numbers, though Python counts with them."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


def _not_zero(value: float) -> float:
    if value == 0:
        raise ValueError("strength 0 is the condition `zero`: expected numbers in [-1, 1] but 0")
    return value


def _kind_alone(value: Any) -> Any:
    """`- unsteered` is short for `- kind: unsteered`."""
    return {"kind": value} if isinstance(value, str) else value


Numbers = Annotated[tuple[int, ...], BeforeValidator(_numbers)]
Starts = Annotated[tuple[int, ...], BeforeValidator(_first)]
Strength = Annotated[
    float, Field(ge=-1, le=1, allow_inf_nan=False), BeforeValidator(_no_switch), AfterValidator(_not_zero)
]
Strengths = Annotated[tuple[Strength, ...], Field(min_length=1), AfterValidator(_each_once)]
Factor = Annotated[float, Field(gt=0, le=20, allow_inf_nan=False), BeforeValidator(_no_switch)]
Factors = Annotated[tuple[Factor, ...], Field(min_length=1), AfterValidator(_each_once)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), BeforeValidator(_numbers)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SuiteSettings(_Strict):
    """suite: one of LIBERO's, or `standard` or `libero_pro` for all of those. tasks: ids. starts: official initial states,
    or numbers of layouts; a count n means 0 to n - 1. limit: control steps, instead of the suite's own."""

    suite: str
    tasks: Annotated[Literal["all"] | Numbers, BeforeValidator(_tasks)] = "all"
    layout: Layout = "official"
    starts: Starts = tuple(range(50))
    limit: Annotated[int, Field(ge=1, le=10_000)] | None = None


class _Condition(_Strict):
    """starts: only the first so many starts of every task, tasks: only these, for what need not run on all."""

    starts: Annotated[int, Field(ge=1)] | None = None
    tasks: Annotated[tuple[int, ...], BeforeValidator(_numbers)] | None = None


class Unsteered(_Condition):
    """The policy as it is, without hooks."""

    kind: Literal["unsteered"]


class Zero(_Condition):
    """Directions at strength 0 through the hooks: must equal `unsteered` step for step."""

    kind: Literal["zero"]
    directions: Annotated[tuple[str, ...], Field(min_length=1)]


class Steered(_Condition):
    """A direction (strengths in (0, 1]) or an axis ([-1, 1]) of the store."""

    kind: Literal["direction"]
    name: str
    strengths: Strengths


class Random(_Condition):
    """Norm-matched random draws of the form and place of a direction or axis (see `finders.random.controls`)."""

    kind: Literal["random"]
    like: str
    strengths: Strengths
    draws: Annotated[int, Field(ge=1, le=1000)] = 20
    seed: Seed = 0


class RandomWords(Random):
    """Norm-matched differences of random words, where a direction adds a vector (see `finders.random.word_controls`).

    words: of each end of a draw.
    """

    kind: Literal["random_words"]  # type: ignore[assignment]
    words: Annotated[int, Field(ge=1, le=100)] = 4


class Opposite(_Condition):
    """The other end of an axis; of a direction, the one named `by`, or its own negative where it adds or overrides."""

    kind: Literal["opposite"]
    of: str
    strengths: Strengths
    by: str | None = None


class Prompt(_Condition):
    """The unsteered policy with a wording around the instruction."""

    kind: Literal["prompt"]
    wording: Annotated[str, Field(max_length=500), AfterValidator(_one_place)]


class Scale(_Condition):
    """The unsteered policy whose translation is multiplied by a factor, then clipped, before it is executed."""

    kind: Literal["scale"]
    factors: Factors


AnyCondition: TypeAlias = Annotated[
    Annotated[
        Unsteered | Zero | Steered | Random | RandomWords | Opposite | Prompt | Scale, Field(discriminator="kind")
    ],
    BeforeValidator(_kind_alone),
]


class StudySettings(_Strict):
    """policy: a YAML or a bare name; checkpoint: instead of the one it names. store: folder of directions. Paths are
    absolute or relative to the file.

    seeds: of the policy's draws (each start runs with each). environment_seed: of the simulator's placement of fixtures.
    size: pixels of both cameras. after_success: steps that an episode goes on after success, in which letting go is looked
    for; the benchmark's protocol has none. replan: actions of a chunk that are executed before the next inference, all
    where it is not given. dose: measure relative doses. device: of the policy, cpu or cuda. thin meshes are five times
    cheaper to draw, and no benchmark's.
    """

    policy: str
    checkpoint: Path | None = None
    store: Path | None = None
    suites: Annotated[tuple[SuiteSettings, ...], Field(min_length=1)]
    seeds: Seeds = (0,)
    environment_seed: Seed = 0
    meshes: Meshes = "original"
    size: Annotated[int, Field(ge=16, le=1024)] = 256
    after_success: Annotated[int, Field(ge=0, le=400)] = 0
    replan: Annotated[int, Field(ge=1)] | None = None
    dose: bool = True
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    conditions: Annotated[tuple[AnyCondition, ...], Field(min_length=1)]

    @property
    def shared(self) -> dict[str, Any]:
        """What all episodes have in common, as JSON."""
        return self.model_dump(
            mode="json", include={"environment_seed", "meshes", "size", "after_success", "replan", "dose", "device"}
        )


Settings = TypeVar("Settings", bound=StudySettings)


def read_settings(path: Path, form: type[Settings] = StudySettings) -> Settings:  # type: ignore[assignment]
    """The checked content of a study's YAML, its paths made absolute. form: what the file holds, a study or more.

    Raises SteerError('bad_study').
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise SteerError("bad_study", f"{path} is not readable YAML ({text}): correct the file") from None
    settings = check(raw, str(path), form)
    folder = path.resolve().parent
    beside = {
        name: (folder / value.expanduser()).resolve()
        for name, value in (("checkpoint", settings.checkpoint), ("store", settings.store))
        if value is not None
    }
    if settings.policy.endswith((".yaml", ".yml")):
        return settings.model_copy(update={**beside, "policy": str((folder / settings.policy).resolve())})
    return settings.model_copy(update=beside)


def check(raw: Any, what: str, form: type[Settings] = StudySettings) -> Settings:  # type: ignore[assignment]
    """A study from plain data. what: where it came from, for the sentence. Raises SteerError('bad_study')."""
    try:
        return form.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        message = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] == "missing" else f" (given {first['input']!r:.80})"
        raise SteerError("bad_study", f"{what}: {where}: {message}{given}; correct it") from None
