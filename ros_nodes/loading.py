"""What the policy node is told to run, and the policy, engine and loop that are made of it.

Invariant: nothing is loaded by halves: parameters, policy, directions and axes fit each other, or the reason is raised.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ros_nodes.parameters import parameter
from steer_runtime.chunk_guard import ChunkGuard, ChunkLimits
from steer_runtime.directions.direction import Axis, Direction
from steer_runtime.errors import SteerError
from steer_runtime.loop import Inference, InferenceLoop, LoopEvent
from steer_runtime.shadow import Shadow, ShadowSettings
from steer_runtime.steering.command import Limits
from steer_runtime.steering.engine import SteeringEngine
from steer_runtime.types import ActionChunk, Policy


@dataclass(frozen=True)
class PolicyParameters:
    """Parameters of the policy node."""

    policy: str = parameter("", "policy to load: a YAML file, or the name of one in configs/policies")
    device: str = parameter("cpu", "torch device of the policy")
    torch_threads: int = parameter(0, "threads of torch; 0 keeps torch's choice", low=0, high=256)
    action_steps: int = parameter(
        0,
        "rows of a chunk that are handed on, of a policy that computes more; 0 keeps the policy's own number. A free-running "
        "robot needs rows for its replan_steps and for the steps that an inference takes",
        low=0,
        high=1024,
    )
    direction_store: str = parameter("", "folder of directions and axes; empty loads none")
    directions: tuple[str, ...] = parameter((), "directions to load, as name or name@hash; empty loads the whole store")
    autostart: bool = parameter(
        False, "configure and activate without a lifecycle manager, and end when that is refused"
    )
    observation_timeout_s: float = parameter(
        2.0, "without a new observation for so long the node holds", low=0.05, high=60.0, live=True
    )
    freeze_timeout_s: float = parameter(
        0.0, "a camera whose picture stays bit-identical for longer is refused; 0 is off", low=0.0, high=60.0
    )
    state_rate_hz: float = parameter(5.0, "rate of the state, the node's heartbeat", low=1.0, high=20.0)
    verdict_rate_hz: float = parameter(
        100.0, "acceptances published a second and source; further ones are counted", low=1.0, high=1000.0, live=True
    )
    restart_on_command: bool = parameter(
        False,
        "an accepted command begins the running inference anew, so that the next chunk carries it; policies that cannot "
        "stop between their steps finish it",
    )
    max_restarts: int = parameter(3, "failures of the policy that are answered by a restart", low=0, high=100)
    command_max_age_s: float = parameter(1.0, "an older command is refused", low=0.01, high=60.0)
    command_max_future_s: float = parameter(0.2, "a command stamped further ahead is refused", low=0.0, high=60.0)
    default_ramp_s: float = parameter(0.1, "ramp of a command that names none", low=0.0, high=60.0)
    release_s: float = parameter(0.3, "time in which an expired command fades", low=0.0, high=60.0)
    max_slew_per_s: float = parameter(10.0, "fastest change of a strength", low=0.01, high=1000.0)
    over_limit: str = parameter("clamp", "what happens to a strength over its limit", choices=("clamp", "reject"))
    sources: tuple[str, ...] = parameter(
        (),
        "sources that may steer, as names or patterns such as hold:*; empty is anybody. clear_all is open to everybody",
    )
    source_timeout_s: float = parameter(
        0.0,
        "what a source holds is released when it has sent nothing admitted for so long; 0 waits for ever",
        low=0.0,
        high=3600.0,
    )
    max_strength: float = parameter(
        1.0, "largest strength of any direction on this robot, beside its own limit", low=0.0, high=1.0
    )
    max_strengths: tuple[str, ...] = parameter((), "largest strength of some directions, as name=number")
    max_dose: float = parameter(
        0.0,
        "largest relative change of the residual stream; past it every strength falls to where it fits. 0: not measured",
        low=0.0,
        high=1000.0,
    )
    doses: tuple[str, ...] = parameter(
        (), "doses of directions at strength 1, as name=number: max_dose then limits their strengths beforehand"
    )
    chunk_bound: float = parameter(
        0.0, "largest action of a chunk, gripper aside, in units of the action; 0: not checked", low=0.0, high=1e6
    )
    chunk_step: float = parameter(0.0, "largest change of an action from row to row; 0: not checked", low=0.0, high=1e6)
    chunk_jerk: float = parameter(
        0.0, "largest change of that change from row to row; 0: not checked", low=0.0, high=1e6
    )
    on_excess: str = parameter("clamp", "what happens to a chunk that exceeds them", choices=("clamp", "veto"))
    shadow_every: int = parameter(
        0,
        "one steered inference in so many is repeated without steering, after its chunk went out, to see how far steering "
        "moved it; 0: none",
        low=0,
        high=1_000_000,
    )
    shadow_bound: float = parameter(
        0.0,
        "how far steering may move an action, gripper aside, in its own units; past it every strength falls in proportion. "
        "0: only measured",
        low=0.0,
        high=1e6,
    )
    trace_path: str = parameter("", "file to append the engine's trace to, a JSON line an inference; empty writes none")


@dataclass(frozen=True)
class Loaded:
    """What configuring made. direction_ids: name, id and largest strength on this robot of each direction."""

    policy: Policy
    engine: SteeringEngine
    loop: InferenceLoop
    direction_ids: tuple[tuple[str, str, float], ...]


def load(
    wanted: PolicyParameters,
    on_chunk: Callable[[ActionChunk], None],
    on_event: Callable[[LoopEvent], None],
    on_inference: Callable[[Inference], None] = lambda inference: None,
) -> Loaded:
    """Load what the parameters name; chunks, events and inferences of the loop, once it runs, go to the functions.

    Raises SteerError: 'bad_parameter', 'no_store', and all that policies, stores and the engine refuse.
    """
    _check(wanted)
    # Imported late: they take seconds, in which the node is not yet heard and cannot be ended.
    import torch

    from steer_runtime.policies import load_policy

    if wanted.torch_threads:
        torch.set_num_threads(wanted.torch_threads)
    policy = load_policy(wanted.policy, device=wanted.device)
    if wanted.action_steps:
        _hand_on(policy, wanted.action_steps)
    directions, axes = _read_store(wanted, policy)
    shadow = ShadowSettings(wanted.shadow_every, wanted.shadow_bound or math.inf)
    chunk = ChunkLimits(
        bound=wanted.chunk_bound or math.inf,
        step=wanted.chunk_step or math.inf,
        jerk=wanted.chunk_jerk or math.inf,
        on_excess="veto" if wanted.on_excess == "veto" else "clamp",
    )
    limits = Limits(
        max_age_s=wanted.command_max_age_s,
        max_future_s=wanted.command_max_future_s,
        default_ramp_s=wanted.default_ramp_s,
        release_s=wanted.release_s,
        max_slew=wanted.max_slew_per_s,
        over_limit="reject" if wanted.over_limit == "reject" else "clamp",
        sources=frozenset(wanted.sources),
        source_timeout_s=wanted.source_timeout_s or math.inf,
        max_strength=wanted.max_strength,
        max_strengths=_numbers("max_strengths", wanted.max_strengths),
        max_dose=wanted.max_dose or None,
        doses=_numbers("doses", wanted.doses),
    )
    engine = SteeringEngine(policy, directions, axes, limits=limits)
    loop = InferenceLoop(
        policy,
        engine,
        on_chunk,
        on_event,
        max_restarts=wanted.max_restarts,
        on_inference=on_inference,
        guard=ChunkGuard(chunk) if chunk.any else None,
        shadow=Shadow(policy, engine, shadow) if shadow.every else None,
    )
    return Loaded(policy, engine, loop, tuple((d.name, d.id, engine.largest_strength(d.name)) for d in directions))


def _numbers(parameter_name: str, entries: tuple[str, ...]) -> dict[str, float]:
    """`name=number` of a list parameter; whether the names are loaded is the engine's to judge."""
    out: dict[str, float] = {}
    for entry in entries:
        name, _, number = entry.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not name or not math.isfinite(value) or name in out:
            raise SteerError(
                "bad_parameter",
                f"parameter {parameter_name!r} holds {entry[:80]!r}: expected name=number, each name once, as in fast=0.5",
            )
        out[name] = value
    return out


def _hand_on(policy: Any, rows: int) -> None:
    chunk = policy.config.chunk
    if not hasattr(policy, "action_steps") or rows > chunk:
        does = f"computes chunks of {chunk}" if hasattr(policy, "action_steps") else "hands on every row it computes"
        raise SteerError(
            "bad_parameter",
            f"parameter 'action_steps' is {rows} and policy {policy.name!r} {does}: leave it 0 or lower it",
        )
    policy.action_steps = rows


def _check(wanted: PolicyParameters) -> None:
    if not wanted.policy:
        raise SteerError(
            "bad_parameter", "parameter 'policy' is empty; give a YAML file or the name of one in configs/policies"
        )
    if wanted.directions and not wanted.direction_store:
        raise SteerError("bad_parameter", "parameter 'directions' is set but 'direction_store' is not; give the folder")
    if wanted.direction_store and not os.path.isdir(wanted.direction_store):
        raise SteerError(
            "no_store", f"parameter 'direction_store' is {wanted.direction_store!r}: expected an existing folder"
        )


def _read_store(wanted: PolicyParameters, policy: Policy) -> tuple[tuple[Direction, ...], tuple[Axis, ...]]:
    """The wanted directions, and the axes both of whose ends are among them."""
    if not wanted.direction_store:
        return (), ()
    from steer_runtime.directions.store import DirectionStore

    store = DirectionStore(wanted.direction_store)
    if wanted.directions:
        directions = tuple(store.load(ref, model_hash=policy.model_hash) for ref in wanted.directions)
    else:
        directions = store.load_all()
    names = {direction.name for direction in directions}
    return directions, tuple(axis for axis in store.load_axes() if {axis.negative, axis.positive} <= names)
