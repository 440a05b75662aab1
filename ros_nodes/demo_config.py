"""What a demo does, as a YAML file: policy, task, directions to find, commands to publish.

Invariant: unknown keys and commands that could not be seen to work are refused before anything starts. Moments are
control steps, however many of them an inference commands.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steer_runtime.errors import SteerError

KINDS: Mapping[str, tuple[str, str]] = {
    "openvla": ("pocket-libero", "pocket-untrained"),
    "pi0": ("pocket-pi0-libero", "pocket-pi0-untrained"),
}
"""Kind of policy -> the trained pocket policy, and the untrained one that runs where its checkpoint is not installed."""


Config = TypeVar("Config", bound="DemoConfig")


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
    """Two directions under one name: given ones, or, with a form, those that the policy ships under this name in
    `<checkpoint>/directions`, else made as `steer eval axis` makes them, with its options.

    words: the axis of `steer eval axis` whose words are used, by default `name`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    negative: str = ""
    positive: str = ""
    form: Literal["neurons", "dense"] | None = None
    words: str = ""
    span: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    count: int = 20
    alpha: float = 4.0
    site: int = 0
    norm: float = 1.0

    @model_validator(mode="after")
    def _one_way(self) -> AxisSpec:
        named = bool(self.negative) and bool(self.positive)
        if named == (self.form is not None) or bool(self.negative) != bool(self.positive):
            raise ValueError("give either negative and positive, or form")
        if self.form == "neurons" and not self.layers:
            raise ValueError("an axis of neurons needs layers")
        return self


class CommandSpec(BaseModel):
    """A command, published as soon as `at` control steps are commanded: of the episode, or since the gripper was first
    told to close and left so. Exactly one of set, clear, clear_all."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    at: int = Field(ge=1)
    since: Literal["start", "grasp"] = "start"
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
    def moment(self) -> str:
        """When it is due, for people."""
        return f"{self.at} control steps after the {self.since}"

    @property
    def label(self) -> str:
        """What an operator would say."""
        if self.set_ is None:
            return "clear all" if self.clear_all else f"clear {self.clear}"
        ramp = "" if self.ramp_s is None else f" over {self.ramp_s:g} s"
        return f"{self.set_} {self.strength:+g}{ramp}"


class DemoConfig(BaseModel):
    """A file such as configs/demo.yaml. steps: control steps, at most; after_success: so many follow success, and the
    episode is over. observations: how many of the inferences are replayed afterwards.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str
    suite: str = "libero_object"
    task_id: int = 0
    init_state_index: int = 0
    steps: int = Field(70, ge=2, le=1000)
    after_success: int = Field(0, ge=0, le=1000)
    observations: int = Field(10, ge=1, le=100)
    torch_threads: int = Field(1, ge=1, le=64)
    out: Path = Path("out/demo")
    labels: Path = Path("build/labels")
    directions: tuple[DirectionSpec, ...] = ()
    axes: tuple[AxisSpec, ...] = ()
    commands: tuple[CommandSpec, ...]

    def changed(self: Config, values: Mapping[str, object]) -> Config:
        """A checked copy with other values. Raises SteerError('bad_demo_config')."""
        try:
            return type(self).model_validate({**self.model_dump(by_alias=True), **values})
        except ValidationError as error:
            raise SteerError(
                "bad_demo_config", f"these options do not fit the demo: {error.errors()[0]['msg']}"
            ) from None

    @model_validator(mode="after")
    def _commands_in_order(self) -> DemoConfig:
        for since in ("start", "grasp"):
            moments = [command.at for command in self.commands if command.since == since]
            if moments != sorted(moments) or (moments and moments[-1] > self.steps - 4):
                raise ValueError("commands must be in order of `at`, the last one at least 4 steps before the end")
        return self


class Ur5DemoConfig(DemoConfig):
    """A file such as configs/demo-ur5.yaml: the same task with a simulated UR5e.

    motion_scale: part of each action that is executed. camera_size: pixels. camera_hz: pictures a second.
    """

    out: Path = Path("out/demo-ur5")
    motion_scale: float = Field(0.25, gt=0, le=1)
    camera_size: int = Field(256, ge=16, le=1024)
    camera_hz: float = Field(4.0, gt=0, le=60)


def read_config(path: Path, kind: type[Config] = DemoConfig) -> Config:  # type: ignore[assignment]
    """Checked content of a demo file. Raises SteerError('bad_demo_config')."""
    try:
        return kind.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SteerError("bad_demo_config", f"{path} is not readable YAML ({error}); correct the file") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise SteerError("bad_demo_config", f"{path}: {where}: {first['msg']}; correct the file") from None


def choose(config: Path | None, policy: str | None, kind: type[DemoConfig] | None = None) -> tuple[Path, str]:
    """(demo file, policy) for what was asked for. kind: of the demo file. policy: one of KINDS, a name of configs/policies or a YAML file.

    Without a file a trained policy gets configs/demo.yaml, one that builds itself configs/demo-untrained.yaml; without a
    policy the file's own is taken. Raises SteerError: 'no_demo_config', 'bad_demo_config', and for an unknown policy.
    """
    if policy is None and config is not None:
        return config, read_config(config, kind or DemoConfig).policy
    name = policy or "openvla"
    if name in KINDS:
        trained, untrained = KINDS[name]
        name = trained if _installed(trained) else untrained
    return config or config_named("demo-untrained" if _builds_itself(name) else "demo"), name


def _installed(policy: str) -> bool:
    from steer_runtime.policies.registry import checkpoint_of, policy_configs

    return policy in policy_configs() and (checkpoint_of(policy) / "config.json").is_file()


def _builds_itself(policy: str) -> bool:
    from steer_runtime.policies.registry import config_file, read_policy_file

    return read_policy_file(config_file(policy)).build is not None


def config_named(name: str) -> Path:
    """configs/<name>.yaml of the source tree or the share directory. Raises SteerError('no_demo_config')."""
    places = (
        Path(__file__).resolve().parents[1] / "configs" / f"{name}.yaml",
        Path(sysconfig.get_path("data")) / "share" / "steer_runtime" / "configs" / f"{name}.yaml",
    )
    for place in places:
        if place.is_file():
            return place
    raise SteerError(
        "no_demo_config", f"no {name}.yaml in {places[0].parent} or {places[1].parent}; give one with --config"
    )
