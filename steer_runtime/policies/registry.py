"""From a configuration file to a loaded policy.

Invariant: a policy configuration is data that says everything; unknown keys, names and missing weights are refused.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steer_runtime.errors import SteerError, nearest
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.policies.pocket import PocketSpec, build_pocket

DtypeName = Literal["float32", "bfloat16", "float16"]


class OpenVLAFile(BaseModel):
    """A file of `configs/policies/`. checkpoint: a directory, absolute or relative to the file.

    suite: whose action statistics to use. camera: name of the observation's image. build: how to make the pocket
    checkpoint when its directory is not there; without it a missing checkpoint is refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["openvla"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    checkpoint: Path
    suite: str
    camera: str = "agentview"
    dtype: DtypeName | None = None
    build: PocketSpec | None = None


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


def load_policy(
    config: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    progress: Callable[[str], None] = _to_stderr,
) -> OpenVLAPolicy:
    """Policy of a YAML file, or of a bare name in `configs/policies/` ("pocket" is enough for "pocket-untrained").

    dtype and checkpoint override the file's. `progress` hears one line when a pocket
    checkpoint has to be built or the load left tensors aside (default: stderr).
    Raises SteerError: unknown_policy, bad_policy_config, and all of `load_checkpoint`.
    """
    path = _resolve(config)
    spec = read_policy_file(path)
    directory = checkpoint or (path.parent / spec.checkpoint.expanduser()).resolve()
    if not directory.exists() and spec.build is not None and checkpoint is None:
        progress(
            f"building the untrained pocket policy in {directory} (layers {list(spec.build.layers)}, under a minute)"
        )
        try:
            build_pocket(directory, **spec.build.model_dump())
        except SteerError as error:
            if error.code != "exists":  # another process finished the same checkpoint first
                raise
    policy = OpenVLAPolicy.from_checkpoint(
        directory,
        spec.suite,
        name=spec.name,
        camera=spec.camera,
        dtype=dtype or (getattr(torch, spec.dtype) if spec.dtype else None),
        device=device,
    )
    if policy.report is not None and policy.report.noteworthy:
        progress(f"{policy.name}: {policy.report.noteworthy}")
    return policy


def read_policy_file(path: Path) -> OpenVLAFile:
    """Checked content of a policy YAML. Raises SteerError('bad_policy_config')."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return OpenVLAFile.model_validate(raw)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SteerError("bad_policy_config", f"{path} is not readable YAML ({error}); correct the file") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise SteerError(
            "bad_policy_config", f"{path}: {where}: {first['msg']} (given {first['input']!r:.80}); correct the file"
        ) from None


def _resolve(config: Path | str) -> Path:
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
