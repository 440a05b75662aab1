"""Data that flows between robot, policy and operator, and the handshake that lets them meet.

Everything here is frozen and free of ROS, MuJoCo and torch modules, so each side of the system can hold it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from steer_runtime.errors import SteerError

Role = Literal["image", "text", "state", "action"]
ROLES: tuple[Role, ...] = ("image", "text", "state", "action")
"""Token roles; a span is a set of them. The bit of a role in masks is ``1 << ROLES.index(role)``."""
ALL_ROLES: frozenset[Role] = frozenset(ROLES)


def role_bit(role: Role) -> int:
    """Bit of one role in a span mask."""
    return 1 << ROLES.index(role)


def span_bits(span: frozenset[Role]) -> int:
    """Bit mask of a span. Raises SteerError for an empty span or an unknown role."""
    unknown = [r for r in span if r not in ROLES]
    if unknown or not span:
        raise SteerError(
            "bad_span",
            f"span {sorted(span)} is not usable: expected one or more of {', '.join(ROLES)}; name the tokens to steer",
        )
    return sum(role_bit(r) for r in span)


@dataclass(frozen=True)
class ActionSpace:
    """What the numbers of an action mean. A policy and a robot each declare one; they must be equal before motion.

    LIBERO: ``ee_delta``, axis-angle, base frame, 0.05 m and 0.5 rad a step at 1.0, 20 Hz, gripper -1 open, +1 close
    (facts of LIBERO's OSC_POSE controller).
    """

    kind: Literal["ee_delta", "joint_delta", "joint_abs"]
    rotation: Literal["axis_angle", "rpy", "none"]
    frame: str
    position_scale_m: float  # metres a step at action 1.0
    rotation_scale_rad: float  # radians a step at action 1.0
    rate_hz: float
    gripper_open: float
    gripper_close: float
    dims: int = 7


LIBERO_ACTION_SPACE = ActionSpace("ee_delta", "axis_angle", "base", 0.05, 0.5, 20.0, -1.0, 1.0)


def require_match(policy: ActionSpace, robot: ActionSpace) -> None:
    """Refuse a policy and a robot that read an action differently. Raises SteerError('action_space_mismatch')."""
    differing = [
        f"{f.name} is {getattr(policy, f.name)!r} for the policy and {getattr(robot, f.name)!r} for the robot"
        for f in fields(ActionSpace)
        if getattr(policy, f.name) != getattr(robot, f.name)
    ]
    if differing:
        raise SteerError(
            "action_space_mismatch",
            "action spaces differ: "
            + "; ".join(differing)
            + "; load a policy trained for this robot or convert its actions",
        )


@dataclass(frozen=True)
class Observation:
    """One moment of the robot. Arrays are never written to.

    images: camera name -> uint8 RGB [H, W, 3], in the orientation the policies were trained on
    (for LIBERO: the simulator's image turned by 180 degrees).
    state: float64 [8] = end-effector position 3 (m), axis-angle 3 (rad), gripper finger positions 2 (m).
    stamp_ns: capture time on the robot's clock. frame_id counts observations of one robot session.
    gripper_command: the last one executed before it, in the units of the robot's action space; None where the robot does
    not tell, and a policy that remembers its commands relies on its own.
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    instruction: str
    stamp_ns: int
    frame_id: int
    gripper_command: float | None = None


@dataclass(frozen=True)
class SteeringStamp:
    """Which steering produced an action: the engine session (epoch) and the count of accepted changes (sequence)."""

    epoch: int
    sequence: int


COUNTED_NOTES = ("out_of_range_tokens", "unknown_object")
"""Notes of a chunk that tell of something wrong; the inference loop adds them up in counters of these names."""


@dataclass(frozen=True)
class ActionChunk:
    """Actions of one inference: float32 [T, dims] in `space` units, T control steps long.

    A policy fills the first group of fields; the inference loop stamps the second.
    """

    actions: np.ndarray
    space: ActionSpace
    notes: Mapping[str, float]  # named counts worth seeing, e.g. {"out_of_range_tokens": 0.0}

    inference_id: int = 0
    steering: SteeringStamp = SteeringStamp(0, 0)
    observation_stamp_ns: int = 0
    frame_id: int = 0
    age_s: float = 0.0  # from receipt of the observation to the chunk being ready, steady clock

    def stamped(self, **values: object) -> ActionChunk:
        """Copy with the loop's fields filled in."""
        return replace(self, **values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Tower:
    """One steerable transformer of a policy.

    down_projs[i]: the torch Linear at `mlp.down_proj` of layer i ([d_model, d_ff]); value vector j is its column j.
    residual_sites: modules whose output is the residual stream: the embedding entry first, then one per layer.
    last_steerable: the last layer whose FFN can reach the action, None where every layer can; residual site
    last_steerable + 1 is then the last one that can. why_dead: why nothing later can, for a refusal.
    roles: of the tokens that it ever runs on. basis: what its residual stream is read through, the token basis or the
    rows of an action matrix (`policy.action_basis`). denoises: its forwards are the denoising steps of an inference, which
    a command may name.
    """

    name: str
    down_projs: Sequence[object]
    residual_sites: Sequence[object]
    d_model: int
    d_ff: int
    max_tokens: int  # longest forward (prefill) in tokens
    firings_per_inference: int  # forwards of this tower in one inference; OpenVLA: 7
    last_steerable: int | None = None
    why_dead: str = ""
    roles: frozenset[Role] = ALL_ROLES
    basis: Literal["tokens", "actions"] = "tokens"
    denoises: bool = False

    @property
    def layers(self) -> int:
        return len(self.down_projs)

    @property
    def steerable_layers(self) -> range:
        """Layers where a write at the input of `down_proj` can reach the action."""
        return range(self.layers if self.last_steerable is None else self.last_steerable + 1)

    @property
    def steerable_sites(self) -> range:
        """Residual sites where an added vector can reach the action."""
        return range(len(self.steerable_layers) + 1)


@runtime_checkable
class TokenRoles(Protocol):
    """Where a policy says, before each forward of a tower, which role each token of that forward has."""

    def set_roles(self, tower: str, roles: Sequence[Role]) -> None: ...


@runtime_checkable
class Policy(Protocol):
    """A VLA: observation in, actions out. Knows nothing of steering except that it announces token roles."""

    @property
    def name(self) -> str: ...

    @property
    def trained(self) -> bool:
        """False: every surface must say "untrained policy"."""

    @property
    def action_space(self) -> ActionSpace: ...

    @property
    def towers(self) -> Mapping[str, Tower]: ...

    @property
    def model_hash(self) -> str:
        """sha256 hex of what directions depend on: down_proj weights and token basis."""

    def reset(self, seed: int | None = None) -> None:
        """Forget everything of the running episode. seed: of whatever the policy draws in the next one, so that it can be
        run again, steered or not; None draws anew."""

    def infer(self, observation: Observation) -> ActionChunk:
        """One inference. Raises SteerError for an observation that does not fit the policy."""

    def announce_roles_to(self, listener: TokenRoles | None) -> None:
        """Set (or clear) who is told the token roles before each forward."""


Memory = Mapping[str, Any]
"""What a policy takes over from one inference to the next: names and plain JSON values, so that it can be recorded."""


@runtime_checkable
class Remembering(Protocol):
    """A policy whose inference after `remember(m)` is the one that followed when `memory()` gave m."""

    def memory(self) -> Memory:
        """Everything that the next inference depends on besides its observation; never changed afterwards."""

    def remember(self, memory: Memory) -> None:
        """Go back to a memory. Raises SteerError('other_memory') for one of another kind of policy."""


def require_memory(policy: str, memory: Memory, names: Sequence[str]) -> None:
    """Refuse a memory that has not exactly these names. Raises SteerError('other_memory')."""
    if set(memory) != set(names):
        raise SteerError(
            "other_memory",
            f"policy {policy!r} is given a memory of {', '.join(sorted(memory)) or 'nothing'}: expected "
            f"{', '.join(names)}; give it one of its own",
        )
