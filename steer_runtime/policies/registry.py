"""From a configuration file to a loaded policy.

Invariant: a policy configuration is data that says everything; unknown keys, names and missing weights are refused.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from steer_runtime.errors import SteerError, nearest
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.policies.pi0.pocket_spec import PocketPi0Spec
from steer_runtime.policies.pocket import PocketSpec, build_pocket

if TYPE_CHECKING:  # its classes take a second to import, which every other policy would pay for
    from steer_runtime.policies.pi0.policy import Pi0Policy

DtypeName = Literal["float32", "bfloat16", "float16"]
PolicyName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
LoadedPolicy: TypeAlias = "OpenVLAPolicy | Pi0Policy"


class OpenVLAFile(BaseModel):
    """A file of `configs/policies/`. checkpoint: a directory, absolute or relative to the file.

    suite: whose action statistics to use. camera: name of the observation's image. rate_hz: control steps a second on a
    robot that takes more time for each than the one of training did. build: how to make the pocket checkpoint when its
    directory is not there; without it a missing checkpoint is refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["openvla"]
    name: PolicyName
    checkpoint: Path
    suite: str
    camera: str = "agentview"
    rate_hz: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None = None
    dtype: DtypeName | None = None
    build: PocketSpec | None = None


class Pi0File(BaseModel):
    """A Pi0 of `configs/policies/`. checkpoint, statistics, tokenizer: absolute or relative to the file.

    statistics: a LeRobot or openpi file, tokenizer: a folder with tokenizer.json, where the checkpoint has none itself.
    cameras: in the order of training. delta: trained with openpi's extra delta transform. euler_steps, action_steps:
    instead of the checkpoint's. seed: of the noise. build: how to make the pocket checkpoint when it is not there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["pi0"]
    name: PolicyName
    checkpoint: Path
    statistics: Path | None = None
    tokenizer: Path | None = None
    cameras: Annotated[tuple[str, ...], Field(min_length=1)] = ("agentview", "wrist")
    delta: bool = False
    euler_steps: Annotated[int, Field(ge=1)] | None = None
    action_steps: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    dtype: DtypeName | None = None
    build: PocketPi0Spec | None = None


PolicyFile: TypeAlias = OpenVLAFile | Pi0File
_FILE: TypeAdapter[PolicyFile] = TypeAdapter(Annotated[PolicyFile, Field(discriminator="kind")])


def policy_configs() -> dict[str, Path]:
    """Known configurations: bare name -> file, from the source tree or the installed share directory."""
    roots = [
        Path(__file__).resolve().parents[2] / "configs" / "policies",
        Path(sysconfig.get_path("data")) / "share" / "steer_runtime" / "configs" / "policies",
    ]
    found: dict[str, Path] = {}
    for root in roots:
        for path in sorted(root.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def checkpoint_of(config: Path | str) -> Path:
    """Folder of a policy's weights, whether it is there or not; config and errors as `load_policy`."""
    path = config_file(config)
    return (path.parent / read_policy_file(path).checkpoint.expanduser()).resolve()


def load_policy(
    config: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    progress: Callable[[str], None] = _to_stderr,
) -> LoadedPolicy:
    """Policy of a YAML file, or of a bare name in `configs/policies/` ("pocket" is enough for "pocket-untrained").

    dtype and checkpoint override the file's. `progress` hears one line when a pocket
    checkpoint has to be built or the load left tensors aside (default: stderr).
    Raises SteerError: unknown_policy, bad_policy_config, and all of `load_checkpoint`.
    """
    path = config_file(config)
    spec = read_policy_file(path)
    directory = checkpoint or checkpoint_of(path)
    if not directory.exists() and spec.build is not None and checkpoint is None:
        progress(
            f"building the untrained pocket policy in {directory} (layers {list(spec.build.layers)}, under a minute)"
        )
        try:
            _build(spec, directory)
        except SteerError as error:
            if error.code != "exists":  # another process finished the same checkpoint first
                raise
    policy = _load(spec, path, directory, dtype or (getattr(torch, spec.dtype) if spec.dtype else None), device)
    if policy.report is not None and policy.report.noteworthy:
        progress(f"{policy.name}: {policy.report.noteworthy}")
    return policy


def _build(spec: PolicyFile, directory: Path) -> None:
    assert spec.build is not None
    if isinstance(spec, OpenVLAFile):
        build_pocket(directory, **spec.build.model_dump())
    else:
        from steer_runtime.policies.pi0.pocket import build_pocket_pi0

        build_pocket_pi0(directory, **spec.build.model_dump())


def _load(
    spec: PolicyFile, path: Path, directory: Path, dtype: torch.dtype | None, device: torch.device | str
) -> LoadedPolicy:
    if isinstance(spec, OpenVLAFile):
        policy = OpenVLAPolicy.from_checkpoint(
            directory, spec.suite, name=spec.name, camera=spec.camera, dtype=dtype, device=device
        )
        if spec.rate_hz is not None:
            policy.action_space = replace(policy.action_space, rate_hz=spec.rate_hz)
        return policy

    from steer_runtime.policies.pi0.policy import Pi0Policy

    def beside(file: Path | None) -> Path | None:
        return None if file is None else (path.parent / file.expanduser()).resolve()

    return Pi0Policy.from_checkpoint(
        directory,
        statistics=beside(spec.statistics),
        tokenizer=beside(spec.tokenizer),
        name=spec.name,
        cameras=spec.cameras,
        delta=spec.delta,
        euler_steps=spec.euler_steps,
        action_steps=spec.action_steps,
        seed=spec.seed,
        dtype=dtype,
        device=device,
    )


def require_openvla(policy: LoadedPolicy, what: str) -> OpenVLAPolicy:
    """The same policy, refused when it is another kind: `what` reads action tokens or words that only OpenVLA has.

    Raises SteerError('other_policy').
    """
    if isinstance(policy, OpenVLAPolicy):
        return policy
    raise SteerError(
        "other_policy",
        f"{what} needs a policy of kind openvla and {policy.name!r} is a Pi0; name another policy, or measure this one "
        "with `steer eval study`",
    )


def read_policy_file(path: Path) -> PolicyFile:
    """Checked content of a policy YAML. Raises SteerError('bad_policy_config')."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _FILE.validate_python(raw)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SteerError("bad_policy_config", f"{path} is not readable YAML ({error}); correct the file") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise SteerError(
            "bad_policy_config", f"{path}: {where}: {first['msg']} (given {first['input']!r:.80}); correct the file"
        ) from None


def config_file(config: Path | str) -> Path:
    """YAML of a policy; config and errors as `load_policy`."""
    path = Path(config)
    if path.suffix in {".yaml", ".yml"}:
        if path.is_file():
            return path.resolve()
        raise SteerError("unknown_policy", f"{path} is not a file: give a YAML of configs/policies/ or a bare name")
    known = policy_configs()
    name = str(config)
    if name in known:
        return known[name]
    begins = [stem for stem in known if name and stem.startswith(name)]
    if len(begins) == 1:
        return known[begins[0]]
    raise SteerError(
        "unknown_policy",
        f"policy {name!r:.80} is {'ambiguous' if begins else 'unknown'}: {nearest(name, begins or known)}; "
        "give a name of configs/policies/ or a path to a YAML",
    )
