"""What a demo does, as a YAML file: policy, task, directions to find, commands to publish.

Invariant: unknown keys and commands that could not be seen to work are refused before anything starts.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steer_runtime.errors import SteerError


class DirectionSpec(BaseModel):
    """How to find a direction: neurons by the words of their labels, or a dense difference of word embeddings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    words: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    minus: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_finder(self) -> DirectionSpec:
        if bool(self.words) == bool(self.dense):
            raise ValueError("give either words or dense")
        return self


class AxisSpec(BaseModel):
    """Two directions under one name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    negative: str
    positive: str


class CommandSpec(BaseModel):
    """A command, published when `at` actions have been seen. Exactly one of set, clear, clear_all."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    at: int = Field(ge=1)
    set_: str | None = Field(default=None, alias="set")
    clear: str | None = None
    clear_all: bool = False
    strength: float = 0.0
    ramp_s: float | None = None
    expect: Literal["applied", "refused"] = "applied"

    @model_validator(mode="after")
    def _one_operation(self) -> CommandSpec:
        if (self.set_ is not None) + (self.clear is not None) + self.clear_all != 1:
            raise ValueError("give exactly one of set, clear, clear_all")
        return self

    @property
    def label(self) -> str:
        """What an operator would say."""
        if self.set_ is None:
            return "clear all" if self.clear_all else f"clear {self.clear}"
        ramp = "" if self.ramp_s is None else f" over {self.ramp_s:g} s"
        return f"{self.set_} {self.strength:+g}{ramp}"


class DemoConfig(BaseModel):
    """A file such as configs/demo.yaml. steps: control steps. observations: how many of them are replayed after."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str
    suite: str = "libero_object"
    task_id: int = 0
    init_state_index: int = 0
    steps: int = Field(70, ge=2, le=1000)
    observations: int = Field(10, ge=1, le=100)
    torch_threads: int = Field(1, ge=1, le=64)
    out: Path = Path("out/demo")
    labels: Path = Path("build/labels")
    directions: tuple[DirectionSpec, ...]
    axes: tuple[AxisSpec, ...] = ()
    commands: tuple[CommandSpec, ...]

    def changed(self, values: Mapping[str, object]) -> DemoConfig:
        """A checked copy with other values. Raises SteerError('bad_demo_config')."""
        try:
            return DemoConfig.model_validate({**self.model_dump(by_alias=True), **values})
        except ValidationError as error:
            raise SteerError(
                "bad_demo_config", f"these options do not fit the demo: {error.errors()[0]['msg']}"
            ) from None

    @model_validator(mode="after")
    def _commands_in_order(self) -> DemoConfig:
        moments = [command.at for command in self.commands]
        if moments != sorted(moments) or (moments and moments[-1] > self.steps - 4):
            raise ValueError("commands must be in order of `at`, the last one at least 4 steps before the end")
        return self


def read_config(path: Path) -> DemoConfig:
    """Checked content of a demo file. Raises SteerError('bad_demo_config')."""
    try:
        return DemoConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SteerError("bad_demo_config", f"{path} is not readable YAML ({error}); correct the file") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise SteerError("bad_demo_config", f"{path}: {where}: {first['msg']}; correct the file") from None


def default_config() -> Path:
    """configs/demo.yaml of the source tree or the share directory. Raises SteerError('no_demo_config')."""
    places = (
        Path(__file__).resolve().parents[1] / "configs" / "demo.yaml",
        Path(sysconfig.get_path("data")) / "share" / "steer_runtime" / "configs" / "demo.yaml",
    )
    for place in places:
        if place.is_file():
            return place
    raise SteerError(
        "no_demo_config", f"no demo.yaml in {places[0].parent} or {places[1].parent}; give one with --config"
    )
