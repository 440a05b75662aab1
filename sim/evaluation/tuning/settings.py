"""A tuning as its YAML says it: a study's policy and starts, one direction or axis, what to search, what it may cost.

Invariant: a file says everything that decides a trial; held-out starts never share a state with those that tune.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from sim.evaluation.analysis.metrics import METRICS
from sim.evaluation.study.settings import Seeds, StudySettings, SuiteSettings, Unsteered, read_settings
from steer_runtime.errors import SteerError, nearest
from steer_runtime.types import Role

END = Literal["both", "positive", "negative"]


def _ordered(values: tuple[Any, Any]) -> tuple[Any, Any]:
    if not values[0] < values[1]:
        raise ValueError("expected [low, high] with low below high; drop it to leave the direction as it is")
    return values


def _number_or_range(value: Any) -> Any:
    """A number alone is held: 1.0 means [1.0, 1.0]."""
    return (value, value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _rising(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError("expected a number, or [low, high]")
    return values


def _each_once(values: Sequence[Any]) -> Any:
    if len({str(v) for v in values}) != len(values):
        raise ValueError("a choice is given twice")
    return values


def _own(value: Any) -> Any:
    raise ValueError("a tuning makes its own; drop them")


def _metric(value: str) -> str:
    name = value.removeprefix("-")
    if name not in METRICS:
        raise ValueError(f"expected one of {', '.join(METRICS)}, or with a - to lower it; {nearest(name, METRICS)}")
    return value


Unit = Annotated[float, Field(ge=0.001, le=1, allow_inf_nan=False)]
StrengthRange = Annotated[tuple[Unit, Unit], BeforeValidator(_number_or_range), AfterValidator(_rising)]
Gain = Annotated[float, Field(ge=0.001, le=100, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=60, allow_inf_nan=False)]
Index = Annotated[int, Field(ge=0)]
Choices = Field(min_length=1)
IndexChoices = Annotated[
    tuple[Annotated[tuple[Index, ...], Choices, AfterValidator(_each_once)], ...], Choices, AfterValidator(_each_once)
]
SpanChoices = Annotated[
    tuple[Annotated[tuple[Role, ...], Choices, AfterValidator(_each_once)], ...], Choices, AfterValidator(_each_once)
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Search(_Strict):
    """What a trial chooses; what is not given stays as the direction has it.

    strength: a number or [low, high]. gain: [low, high], factor on all alphas, or on the norm of a dense vector, drawn on a log
    scale. neurons: [low, high], how many are written, those with the largest |alpha| first. layers: choices of the layers
    whose neurons are written. sites: choices of the residual sites that a dense direction is added at; one with a single
    vector may be moved. spans: choices of token roles.
    ramp_s: [low, high], seconds over which the strength grows at the start of an episode.
    """

    strength: StrengthRange = (0.1, 1.0)
    gain: Annotated[tuple[Gain, Gain], AfterValidator(_ordered)] | None = None
    neurons: Annotated[tuple[Annotated[int, Field(ge=1)], int], AfterValidator(_ordered)] | None = None
    layers: IndexChoices | None = None
    sites: IndexChoices | None = None
    spans: SpanChoices | None = None
    ramp_s: Annotated[tuple[Seconds, Seconds], AfterValidator(_ordered)] | None = None


class HeldOut(_Strict):
    """Starts that no trial saw. shares: of the tuned strength, each tried on all of them."""

    suites: Annotated[tuple[SuiteSettings, ...], Field(min_length=1)]
    seeds: Seeds = (0,)
    shares: Annotated[tuple[Unit, ...], Field(min_length=2), AfterValidator(_each_once)] = (0.5, 1.0)


class TuneSettings(StudySettings):
    """The keys of a study but `conditions`, and these.

    name: direction or axis of the store. on: the metric to move, "-speed" to lower it; default: what the name claims. of an
    axis, the positive end moves it that way and the negative one the other way. ends: of an axis, which to tune.
    trials: of each end. batch: trials that are chosen together, before any of them is told: they run side by side, and the
    outcome does not depend on how many workers there are. startup: trials drawn at random before any is chosen by the
    others. seed: of the sampler. margin: largest loss of success, as a share. damage: largest off-axis change (`score.Score`), in
    standard deviations of the unsteered episodes; null for none. least: pairs before a trial may be stopped for having no effect.
    """

    name: str
    on: Annotated[str, AfterValidator(_metric)] | None = None
    ends: END = "both"
    search: Search = Search()
    trials: Annotated[int, Field(ge=1, le=100_000)] = 40
    batch: Annotated[int, Field(ge=1, le=1000)] = 4
    startup: Annotated[int, Field(ge=1)] = 8
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.10
    damage: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 1.0
    least: Annotated[int, Field(ge=2)] = 4
    held_out: HeldOut | None = None
    conditions: Annotated[tuple[Unsteered, ...], BeforeValidator(_own)] = (Unsteered(kind="unsteered"),)

    @model_validator(mode="before")
    @classmethod
    def _on_is_a_key(cls, raw: Any) -> Any:
        """YAML 1.1 reads the key `on` without quotes as true."""
        if isinstance(raw, dict) and "on" not in raw:
            return {"on" if key is True else key: value for key, value in raw.items()}
        return raw

    @property
    def decides(self) -> dict[str, Any]:
        """What a trial's parameters and score depend on besides what all its episodes share, as JSON; `trials` is not: a
        tuning may go on."""
        names = {"name", "on", "ends", "search", "batch", "startup", "seed", "margin", "damage", "least", "seeds"}
        return {**self.model_dump(mode="json", include=names), "suites": [s.model_dump(mode="json") for s in self.suites]}  # fmt: skip


def read_tuning(path: Path) -> TuneSettings:
    """The checked content of a tuning's YAML, its paths made absolute. Raises SteerError: 'bad_study', 'no_store'."""
    settings = read_settings(path, TuneSettings)
    if settings.store is None:
        raise SteerError(
            "no_store", f"{path} names {settings.name!r} but no `store`: give the folder of its directions"
        )
    return settings
