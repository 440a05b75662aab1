"""What an arm may do: every limit, with its unit in its name, from one YAML file.

Invariant: settings that could not keep their own promises do not load: a trajectory that cannot end at rest within its
horizon, a margin larger than its range, a stop before its slow-down.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Annotated

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from arm.port import JOINT_NAMES
from steer_runtime.errors import SteerError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
SixPositive = Annotated[tuple[Positive, ...], Field(min_length=len(JOINT_NAMES), max_length=len(JOINT_NAMES))]
Six = Annotated[tuple[Finite, ...], Field(min_length=len(JOINT_NAMES), max_length=len(JOINT_NAMES))]
Three = tuple[Finite, Finite, Finite]

HIGHEST_JOINT_SPEED_RAD_S = 3.15
HIGHEST_TCP_SPEED_M_S = 1.0
"""What no settings file may raise a limit past: the arm's own joint speed, and a learned policy's TCP."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(_Part):
    """Ceilings of what the arm does. Joints in kinematic order; condition: of the TCP's Jacobian in m and rad."""

    tcp_speed_m_s: Annotated[Positive, Field(le=HIGHEST_TCP_SPEED_M_S)]
    tcp_turn_rad_s: Positive
    joint_speed_rad_s: Annotated[
        tuple[Annotated[Positive, Field(le=HIGHEST_JOINT_SPEED_RAD_S)], ...],
        Field(min_length=len(JOINT_NAMES), max_length=len(JOINT_NAMES)),
    ]
    joint_acceleration_rad_s2: SixPositive
    joint_lowest_rad: Six
    joint_highest_rad: Six
    joint_margin_rad: Positive
    condition_slow: Positive
    condition_stop: Positive
    clearance_m: Positive

    @model_validator(mode="after")
    def _in_order(self) -> Limits:
        ranges = np.subtract(self.joint_highest_rad, self.joint_lowest_rad)
        if (ranges <= 2 * self.joint_margin_rad).any():
            raise ValueError("every joint needs a range larger than twice joint_margin_rad")
        if self.condition_slow >= self.condition_stop:
            raise ValueError("condition_slow must be below condition_stop")
        return self


class Workspace(_Part):
    """Box of the TCP in base_link, and the height of the table in it."""

    lowest_m: Three
    highest_m: Three
    table_height_m: Finite

    @model_validator(mode="after")
    def _is_a_box(self) -> Workspace:
        if not all(low < high for low, high in zip(self.lowest_m, self.highest_m, strict=True)):
            raise ValueError("lowest_m must be below highest_m in x, y and z")
        return self


class Tool(_Part):
    """Of the gripper. tcp_offset_m: from the flange (tool0), in its axes."""

    tcp_offset_m: Three


class Motion(_Part):
    """How motion is cut into trajectories; each entry is explained in the YAML file."""

    tick_hz: Annotated[float, Field(ge=50, le=125)]
    horizon_s: Annotated[float, Field(ge=0.1, le=0.4)]
    lead_s: Annotated[float, Field(ge=0.01, le=0.2)]
    transport_jitter_s: Annotated[float, Field(ge=0, le=0.1)]
    knot_s: Annotated[float, Field(ge=0.005, le=0.05)]
    acceleration_share: Annotated[float, Field(gt=0, le=1)]
    lead_m: Positive
    lead_rad: Positive
    reanchor_m: Positive
    lost_m: Positive
    lost_rad: Positive
    lost_s: Positive
    first_command_m: Positive
    first_command_rad: Positive
    fresh_s: Annotated[float, Field(gt=0, le=0.2)]
    state_timeout_s: Annotated[float, Field(gt=0, le=1)]
    rest_rad_s: Positive
    model_error_m: Positive

    @property
    def tick_s(self) -> float:
        """Period of the motion core."""
        return 1.0 / self.tick_hz

    @property
    def headroom(self) -> float:
        """Share of a limit that is planned with: lead / (lead + jitter).

        A point `lead_s` ahead that is reached from `transport_jitter_s` behind takes a speed higher by its inverse.
        """
        return self.lead_s / (self.lead_s + self.transport_jitter_s)


class ArmSettings(_Part):
    """A file of `configs/robots/` that begins with `arm:`."""

    arm: Annotated[str, Field(pattern=r"^ur5e?$")]
    limits: Limits
    workspace: Workspace
    tool: Tool
    motion: Motion

    @model_validator(mode="after")
    def _comes_to_rest(self) -> ArmSettings:
        share = self.motion.headroom
        braking = max(
            speed * share / (acceleration * self.motion.acceleration_share)
            for speed, acceleration in zip(
                self.limits.joint_speed_rad_s, self.limits.joint_acceleration_rad_s2, strict=True
            )
        )
        # Braking takes whole knots.
        needed = self.motion.lead_s + braking + self.motion.knot_s
        if needed > self.motion.horizon_s + 1e-9:
            raise ValueError(
                f"braking from the highest planned joint speed takes {braking:.3f} s, with lead and a knot {needed:.3f} s: more than "
                f"horizon_s {self.motion.horizon_s:g}; lower joint_speed_rad_s or lead_s, or raise the acceleration"
            )
        turned = max(self.limits.joint_speed_rad_s) * share * needed
        if self.limits.joint_margin_rad < turned / 2:
            raise ValueError(
                f"joint_margin_rad {self.limits.joint_margin_rad:g} is less than a joint turns while it stops "
                f"({turned / 2:.3f}); raise it"
            )
        return self


def load_settings(path: Path | str = "ur5e") -> ArmSettings:
    """Settings of a YAML file, or of a bare name in `configs/robots/`. Raises SteerError('bad_arm_settings')."""
    file = _find(path)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        return ArmSettings.model_validate(content)
    except OSError as error:
        raise SteerError("bad_arm_settings", f"arm settings {str(path)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SteerError("bad_arm_settings", f"arm settings {file} are not YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise SteerError("bad_arm_settings", f"arm settings {file}: {where}: {first['msg']}; correct it") from error


def _find(path: Path | str) -> Path:
    given = Path(path).expanduser()
    if given.suffix in (".yaml", ".yml") or given.is_file():
        return given
    roots = (
        Path(__file__).resolve().parents[1] / "configs" / "robots",
        Path(sysconfig.get_path("data")) / "share" / "steer_runtime" / "configs" / "robots",
    )
    found = [root / f"{given}.yaml" for root in roots if (root / f"{given}.yaml").is_file()]
    return found[0] if found else given
