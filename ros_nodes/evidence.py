"""What a policy node tells of itself so that others can check it: each inference in full, and what it was loaded from.

Invariant: a trace names everything that its inference depended on, before any guard; telling it can fail without an
effect on the inference.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from rclpy.node import Node
from std_msgs.msg import String
from steer_msgs.msg import AppliedDirection as AppliedDirectionMsg
from steer_msgs.msg import SteeringTrace as SteeringTraceMsg

from ros_nodes.convert import clean_text, ns_from_time, steps_from, time_from_ns
from ros_nodes.loading import Loaded, PolicyParameters
from ros_nodes.qos import LATCHED, TRACE
from steer_runtime.errors import SteerError
from steer_runtime.loop import Inference
from steer_runtime.steering.trace import AppliedTarget
from steer_runtime.types import Memory, SteeringStamp

PACKAGES = ("steer-runtime", "torch", "transformers", "numpy", "safetensors", "rclpy")


@dataclass(frozen=True)
class Traced:
    """One inference as its trace tells it. actions: float32 [T, dims], as the policy answered."""

    stamp_ns: int
    instance_id: str
    session_id: str
    inference_id: int
    steering: SteeringStamp
    observation_stamp_ns: int
    instruction: str
    memory: Memory
    applied: tuple[AppliedTarget, ...]
    interrupted: bool
    actions: np.ndarray


class Evidence:
    """Publishes `trace` and the latched `provenance` on a node."""

    def __init__(self, node: Node) -> None:
        self._trace_pub = node.create_publisher(SteeringTraceMsg, "trace", TRACE)
        self._provenance_pub = node.create_publisher(String, "provenance", LATCHED)

    def describe(self, wanted: PolicyParameters, loaded: Loaded, instance_id: str) -> None:
        """Say what was loaded from where, by which software."""
        told = {"instance_id": instance_id, **provenance(wanted, loaded)}
        self._provenance_pub.publish(String(data=json.dumps(told)))

    def tell(self, inference: Inference, instance_id: str, session_id: str) -> None:
        """Say what one inference was made from and what came out; on the inference's thread."""
        self._trace_pub.publish(trace_to_msg(inference, instance_id, session_id, time.time_ns()))


def provenance(wanted: PolicyParameters, loaded: Loaded) -> dict[str, Any]:
    """Plain values: policy and model hash, directions and axes, parameters, versions, and how torch computes."""
    import torch

    policy, engine = loaded.policy, loaded.engine
    return {
        "policy": policy.name,
        "trained": policy.trained,
        "model_hash": policy.model_hash,
        "directions": {name: ref for name, ref, _ in loaded.direction_ids},
        "axes": {axis.name: [axis.negative, axis.positive] for axis in engine.axes.values()},
        "parameters": asdict(wanted),
        "versions": {"python": platform.python_version(), **_versions()},
        "torch": {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()},
    }


def trace_to_msg(inference: Inference, instance_id: str, session_id: str, stamp_ns: int) -> SteeringTraceMsg:
    """An inference as a message."""
    record, seen = inference.record, inference.observation
    rows, dims = inference.chunk.actions.shape
    message = SteeringTraceMsg(
        stamp=time_from_ns(stamp_ns),
        instance_id=instance_id,
        session_id=session_id,
        inference_id=record.inference_id,
        steering_epoch=record.steering.epoch,
        steering_sequence=record.steering.sequence,
        observation_stamp=time_from_ns(seen.stamp_ns),
        instruction=clean_text(seen.instruction),
        memory=json.dumps(dict(inference.memory)),
        applied=[_applied_to_msg(target) for target in record.applied],
        interrupted=record.interrupted,
        firings=record.firings,
        expected_firings=record.expected_firings,
        rows=rows,
        dims=dims,
    )
    message.data.frombytes(np.ascontiguousarray(inference.chunk.actions, dtype=np.float32).tobytes())
    return message


def trace_from_msg(message: Any) -> Traced:
    """A message, of ROS or of a recording, as it was told. Raises SteerError('bad_trace')."""
    rows, dims = int(message.rows), int(message.dims)
    actions = np.array(message.data, dtype=np.float32)
    if actions.size != rows * dims:
        raise SteerError("bad_trace", f"trace {message.inference_id} has {actions.size} numbers for [{rows}, {dims}]")
    try:
        memory: Mapping[str, Any] = json.loads(message.memory)
    except ValueError as error:
        raise SteerError("bad_trace", f"trace {message.inference_id} has a memory that is no JSON: {error}") from None
    return Traced(
        stamp_ns=ns_from_time(message.stamp),
        instance_id=message.instance_id,
        session_id=message.session_id,
        inference_id=int(message.inference_id),
        steering=SteeringStamp(int(message.steering_epoch), int(message.steering_sequence)),
        observation_stamp_ns=ns_from_time(message.observation_stamp),
        instruction=message.instruction,
        memory=memory,
        applied=tuple(
            AppliedTarget(
                target=a.target,
                direction_id=a.direction_id,
                strength=float(a.strength),
                priority=int(a.priority),
                span=int(a.span),
                steps=steps_from(int(a.step_begin), int(a.step_end)),
            )
            for a in message.applied
        ),
        interrupted=bool(message.interrupted),
        actions=actions.reshape(rows, dims),
    )


def _applied_to_msg(target: AppliedTarget) -> AppliedDirectionMsg:
    begin, end = target.steps or (0, 0)
    return AppliedDirectionMsg(
        target=target.target,
        direction_id=target.direction_id,
        strength=target.strength,
        priority=target.priority,
        span=target.span,
        step_begin=begin,
        step_end=end,
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found
