"""Messages to the project's dataclasses and back.

Invariant: what comes out of a `*_from_msg` function was checked in full; whatever does not fit raises SteerError naming
the field. A message can carry NaN, a wrong size or a text of any length: its type promises none of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
from builtin_interfaces.msg import Time
from geometry_msgs.msg import PoseStamped
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Header
from steer_msgs.msg import ActionChunk as ActionChunkMsg
from steer_msgs.msg import ActiveDirection as ActiveDirectionMsg
from steer_msgs.msg import GripperCommand as GripperCommandMsg
from steer_msgs.msg import RobotDescription as RobotDescriptionMsg
from steer_msgs.msg import SteeringCommand as SteeringCommandMsg
from steer_msgs.msg import SteeringVerdict as SteeringVerdictMsg

from steer_runtime.errors import SteerError
from steer_runtime.steering.command import CommandOp, SteeringCommand, Verdict
from steer_runtime.types import ROLES, ActionChunk, ActionSpace, Role, SteeringStamp, span_bits

MAX_TEXT = 512
MAX_IMAGE_SIDE = 4096
MAX_CHUNK_ROWS = 1024

_OPS: dict[int, CommandOp] = {
    SteeringCommandMsg.OP_SET: "set",
    SteeringCommandMsg.OP_CLEAR: "clear",
    SteeringCommandMsg.OP_CLEAR_ALL: "clear_all",
}
_OP_NUMBERS: dict[CommandOp, int] = {op: number for number, op in _OPS.items()}


# --- small parts -----------------------------------------------------------------------------------------------------


def time_from_ns(stamp_ns: int) -> Time:
    """Nanoseconds since the epoch as a message; out of the message's range it saturates."""
    stamp_ns = min(max(stamp_ns, 0), (2**31 - 1) * 1_000_000_000)
    return Time(sec=stamp_ns // 1_000_000_000, nanosec=stamp_ns % 1_000_000_000)


def ns_from_time(stamp: Time) -> int:
    """Nanoseconds since the epoch."""
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def clean_text(text: str, limit: int = MAX_TEXT) -> str:
    """Text that a message can carry: no NUL (it would end the string early), no lone surrogate, bounded length."""
    return text[:limit].replace("\0", "�").encode("utf-8", "replace").decode("utf-8")


def _uint64(value: int) -> int:
    return min(max(value, 0), 2**64 - 1)


def span_from_mask(mask: int) -> frozenset[Role] | None:
    """Span of a message; 0 is None, the span of the direction's card. Raises SteerError('bad_span')."""
    if mask == 0:
        return None
    if mask >> len(ROLES):
        raise SteerError(
            "bad_span", f"span mask is {mask}: expected 0 to {(1 << len(ROLES)) - 1}; add up the bits of the roles"
        )
    return frozenset(role for bit, role in enumerate(ROLES) if mask >> bit & 1)


def steps_from(begin: int, end: int) -> tuple[int, int] | None:
    """Denoising steps of a message; both 0 is None, every step."""
    return None if begin == end == 0 else (begin, end)


# --- steering commands -----------------------------------------------------------------------------------------------


def command_to_msg(command: SteeringCommand) -> SteeringCommandMsg:
    """A typed message: ramp_s None becomes -1 (the engine's default), hold_s None 0 (until cleared), steps None 0 and 0.

    Raises SteerError('bad_field') for a number beyond the message's integers, such as a priority of 200 or steps that end
    at 0, which the message says for all of them.
    """
    begin, end = command.steps or (0, 0)
    # Messages wrap integers that do not fit, without a word.
    for label, value, low, high in (
        ("epoch", command.epoch, 0, 2**64 - 1),
        ("sequence", command.sequence, 0, 2**64 - 1),
        ("priority", command.priority, -128, 127),
        ("first step", begin, 0, 2**32 - 1),
        ("end of the steps", end, 0 if command.steps is None else 1, 2**32 - 1),
    ):
        if not low <= value <= high:
            raise SteerError("bad_field", f"{label} of the command is {value}: expected {low} to {high}; correct it")
    return SteeringCommandMsg(
        header=Header(stamp=time_from_ns(command.stamp_ns)),
        source=command.source,
        epoch=command.epoch,
        sequence=command.sequence,
        op=_OP_NUMBERS[command.op],
        target=command.target,
        strength=float(command.strength),
        ramp_s=-1.0 if command.ramp_s is None else float(command.ramp_s),
        hold_s=0.0 if command.hold_s is None else float(command.hold_s),
        priority=command.priority,
        span=0 if command.span is None else span_bits(command.span),
        step_begin=begin,
        step_end=end,
    )


def command_from_msg(message: SteeringCommandMsg) -> SteeringCommand:
    """A typed message as a command; ranges are the engine's to judge. Raises SteerError for an unknown op or span.

    A negative or NaN ramp_s means the engine's default; hold_s 0 means until cleared, so a NaN there is an error.
    """
    op = _OPS.get(message.op)
    if op is None:
        raise SteerError("bad_operation", f"op is {message.op}: expected OP_SET 0, OP_CLEAR 1 or OP_CLEAR_ALL 2")
    return SteeringCommand(
        source=message.source,
        epoch=message.epoch,
        sequence=message.sequence,
        stamp_ns=ns_from_time(message.header.stamp),
        op=op,
        target=message.target,
        strength=message.strength,
        ramp_s=None if not message.ramp_s >= 0 else message.ramp_s,
        hold_s=None if message.hold_s == 0 else message.hold_s,
        priority=message.priority,
        span=span_from_mask(message.span),
        steps=steps_from(message.step_begin, message.step_end),
    )


# --- verdicts and state ----------------------------------------------------------------------------------------------


def verdict_to_msg(verdict: Verdict, stamp_ns: int) -> SteeringVerdictMsg:
    """A verdict as a message; counters of a malformed command are saturated to what the message holds."""
    return SteeringVerdictMsg(
        stamp=time_from_ns(stamp_ns),
        accepted=verdict.accepted,
        code=clean_text(verdict.code),
        sentence=clean_text(verdict.sentence),
        source=clean_text(verdict.source, 128),
        epoch=_uint64(verdict.epoch),
        sequence=_uint64(verdict.sequence),
        steering_epoch=_uint64(verdict.steering.epoch),
        steering_sequence=_uint64(verdict.steering.sequence),
        applied_strength=float(verdict.applied_strength),
    )


def verdict_from_msg(message: SteeringVerdictMsg) -> Verdict:
    """A verdict as the engine gave it."""
    return Verdict(
        accepted=message.accepted,
        code=message.code,
        sentence=message.sentence,
        source=message.source,
        epoch=message.epoch,
        sequence=message.sequence,
        steering=SteeringStamp(message.steering_epoch, message.steering_sequence),
        applied_strength=message.applied_strength,
    )


def active_to_msg(active: Any) -> ActiveDirectionMsg:
    """One active direction of the engine's state (steering.engine.ActiveDirection) as a message."""
    expires = active.expires_in_s
    begin, end = active.steps or (0, 0)
    return ActiveDirectionMsg(
        target=active.target,
        direction_id=active.direction_id,
        strength=float(active.strength),
        commanded=float(active.commanded),
        priority=active.priority,
        source=clean_text(active.source, 128),
        span=span_bits(frozenset(active.span)) if active.span else 0,
        shadowed_neurons=active.shadowed_neurons,
        expires_in_s=-1.0 if expires is None else float(expires),
        step_begin=begin,
        step_end=end,
    )


# --- actions ---------------------------------------------------------------------------------------------------------


def chunk_to_msg(
    chunk: ActionChunk, *, instance_id: str, session_id: str, stamp_ns: int, trained: bool, said: Sequence[str] = ()
) -> ActionChunkMsg:
    """A chunk, stamped by the inference loop, as a message. actions: float32 [T, dims]. said: the policy's words."""
    rows, dims = chunk.actions.shape
    message = ActionChunkMsg(
        header=Header(stamp=time_from_ns(stamp_ns), frame_id=chunk.space.frame),
        instance_id=instance_id,
        inference_id=chunk.inference_id,
        steering_epoch=_uint64(chunk.steering.epoch),
        steering_sequence=_uint64(chunk.steering.sequence),
        observation_stamp=time_from_ns(chunk.observation_stamp_ns),
        frame_id=chunk.frame_id,
        session_id=session_id,
        age_s=float(chunk.age_s),
        rows=rows,
        dims=dims,
        rate_hz=float(chunk.space.rate_hz),
        trained=trained,
        said=[clean_text(word.strip(), 128) for word in said],
    )
    message.data.frombytes(np.ascontiguousarray(chunk.actions, dtype=np.float32).tobytes())
    return message


def chunk_from_msg(message: ActionChunkMsg, space: ActionSpace) -> ActionChunk:
    """A message as a chunk for a robot with this action space; nothing in it can be NaN, mis-shaped or of another rate.

    Raises SteerError('bad_shape' | 'bad_rate' | 'not_finite').
    """
    rows, dims = message.rows, message.dims
    if dims != space.dims or not 1 <= rows <= MAX_CHUNK_ROWS or len(message.data) != rows * dims:
        raise SteerError(
            "bad_shape",
            f"action chunk has {len(message.data)} numbers for [{rows}, {dims}]: "
            f"expected [1 to {MAX_CHUNK_ROWS}, {space.dims}]",
        )
    if message.rate_hz != space.rate_hz:
        raise SteerError("bad_rate", f"action chunk is for {message.rate_hz} Hz: expected {space.rate_hz} Hz")
    actions = np.frombuffer(message.data, dtype=np.float32).reshape(rows, dims).copy()
    if not np.isfinite(actions).all():
        raise SteerError("not_finite", "action chunk holds NaN or infinite values; it is not executed")
    return ActionChunk(
        actions=actions,
        space=space,
        notes={},
        inference_id=message.inference_id,
        steering=SteeringStamp(message.steering_epoch, message.steering_sequence),
        observation_stamp_ns=ns_from_time(message.observation_stamp),
        frame_id=message.frame_id,
        age_s=message.age_s,
    )


# --- robots ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Camera:
    """One camera of a robot: images arrive on `camera/<name>/image` as width x height (pixels) in this encoding."""

    name: str
    width: int
    height: int
    encoding: str = "rgb8"


@dataclass(frozen=True)
class RobotDescription:
    """What a robot says of itself before motion. gripper_joints: the two finger joints (m) of the state vector.

    tells_gripper: a frame is whole only with the gripper command executed before it, on `gripper_command`.
    """

    session_id: str
    robot: str
    lockstep: bool
    space: ActionSpace
    cameras: tuple[Camera, ...]
    joint_names: tuple[str, ...]
    gripper_joints: tuple[str, ...]
    tells_gripper: bool = False


def description_to_msg(description: RobotDescription, stamp_ns: int) -> RobotDescriptionMsg:
    """A robot's description as a message."""
    space = description.space
    return RobotDescriptionMsg(
        stamp=time_from_ns(stamp_ns),
        session_id=description.session_id,
        robot=description.robot,
        lockstep=description.lockstep,
        **{name: value for name, value in vars(space).items()},
        camera_names=[camera.name for camera in description.cameras],
        camera_widths=[camera.width for camera in description.cameras],
        camera_heights=[camera.height for camera in description.cameras],
        camera_encodings=[camera.encoding for camera in description.cameras],
        joint_names=list(description.joint_names),
        gripper_joints=list(description.gripper_joints),
        tells_gripper=description.tells_gripper,
    )


def description_from_msg(message: RobotDescriptionMsg) -> RobotDescription:
    """A checked description. Raises SteerError('bad_description') for unequal lists or odd values."""

    def refuse(what: str) -> SteerError:
        return SteerError("bad_description", f"the robot's description {what}; correct the robot node")

    lists = (message.camera_names, message.camera_widths, message.camera_heights, message.camera_encodings)
    if len({len(entries) for entries in lists}) != 1 or not 1 <= len(message.camera_names) <= 8:
        raise refuse(f"has camera lists of lengths {[len(e) for e in lists]}: expected 1 to 8, equal for all four")
    if len(set(message.camera_names)) != len(message.camera_names):
        raise refuse("names a camera twice")
    kinds = get_args(Literal["ee_delta", "joint_delta", "joint_abs"])
    if message.kind not in kinds:
        raise refuse(f"has action kind {message.kind[:40]!r}: expected one of {', '.join(kinds)}")
    rotations = get_args(Literal["axis_angle", "rpy", "none"])
    if message.rotation not in rotations:
        raise refuse(f"has rotation {message.rotation[:40]!r}: expected one of {', '.join(rotations)}")
    numbers = ("position_scale_m", "rotation_scale_rad", "rate_hz", "gripper_open", "gripper_close")
    for name in numbers:
        if not math.isfinite(getattr(message, name)):
            raise refuse(f"has {name} {getattr(message, name)}: expected a finite number")
    if not message.rate_hz > 0 or not 1 <= message.dims <= 64:
        raise refuse(f"has rate_hz {message.rate_hz} and dims {message.dims}: expected above 0 and 1 to 64")
    cameras = tuple(Camera(n, int(w), int(h), e) for n, w, h, e in zip(*lists, strict=True))
    for camera in cameras:
        if not (1 <= camera.width <= MAX_IMAGE_SIDE and 1 <= camera.height <= MAX_IMAGE_SIDE):
            raise refuse(f"gives camera {camera.name[:40]!r} {camera.width}x{camera.height} pixels")
        if camera.encoding != "rgb8":
            raise refuse(f"gives camera {camera.name[:40]!r} encoding {camera.encoding[:40]!r}: expected 'rgb8'")
    missing = set(message.gripper_joints) - set(message.joint_names)
    if len(message.gripper_joints) != 2 or missing:
        raise refuse(f"has gripper joints {list(message.gripper_joints)[:4]}: expected two of its joint_names")
    space = ActionSpace(
        kind=cast(Any, message.kind),
        rotation=cast(Any, message.rotation),
        frame=message.frame,
        dims=int(message.dims),
        **{name: float(getattr(message, name)) for name in numbers},
    )
    return RobotDescription(
        session_id=message.session_id,
        robot=message.robot,
        lockstep=message.lockstep,
        space=space,
        cameras=cameras,
        joint_names=tuple(message.joint_names),
        gripper_joints=tuple(message.gripper_joints),
        tells_gripper=message.tells_gripper,
    )


# --- sensors ---------------------------------------------------------------------------------------------------------


def image_to_msg(image: np.ndarray, stamp: Time, frame_id: str) -> Image:
    """uint8 RGB [H, W, 3] as an rgb8 message."""
    height, width, _ = image.shape
    message = Image(
        header=Header(stamp=stamp, frame_id=frame_id), height=height, width=width, encoding="rgb8", step=3 * width
    )
    # The setter copies and checks element by element unless it is given an array('B').
    message.data.frombytes(np.ascontiguousarray(image, dtype=np.uint8).tobytes())
    return message


def image_from_msg(message: Image, camera: Camera) -> np.ndarray:
    """uint8 RGB [H, W, 3] of a message. Raises SteerError('bad_image') for any other encoding, size or step."""
    given = (message.encoding, message.width, message.height, message.step, len(message.data))
    want = (camera.encoding, camera.width, camera.height, 3 * camera.width, 3 * camera.width * camera.height)
    if given != want:
        raise SteerError(
            "bad_image",
            f"image of camera {camera.name!r} has (encoding, width, height, step, bytes) "
            f"{(given[0][:20], *given[1:])}: expected {want}; the frame is dropped",
        )
    return np.frombuffer(message.data, dtype=np.uint8).reshape(camera.height, camera.width, 3)


def joints_to_msg(names: Sequence[str], positions: Sequence[float] | np.ndarray, stamp: Time) -> JointState:
    """Joint positions (rad, or m for sliding joints) as a message."""
    return JointState(header=Header(stamp=stamp), name=list(names), position=[float(p) for p in positions])


def joints_from_msg(message: JointState, wanted: Sequence[str]) -> dict[str, float]:
    """Positions of the wanted joints by name; order and further joints do not matter.

    Raises SteerError('missing_joint' | 'not_finite' | 'bad_joints').
    """
    if len(message.name) != len(message.position):
        raise SteerError(
            "bad_joints",
            f"joint state has {len(message.name)} names and {len(message.position)} positions; it is dropped",
        )
    found: Mapping[str, float] = dict(zip(message.name, message.position, strict=True))
    missing = [name for name in wanted if name not in found]
    if missing:
        raise SteerError("missing_joint", f"joint state lacks {', '.join(missing[:8])}; it is dropped")
    if not all(math.isfinite(found[name]) for name in wanted):
        raise SteerError("not_finite", "joint state holds NaN or infinite positions; it is dropped")
    return {name: found[name] for name in wanted}


def gripper_from_msg(message: GripperCommandMsg) -> float:
    """The last gripper command before a frame. Raises SteerError('not_finite')."""
    if not math.isfinite(message.command):
        raise SteerError("not_finite", "gripper command is NaN or infinite; it is dropped")
    return float(message.command)


def pose_to_msg(position: np.ndarray, quaternion: np.ndarray, stamp: Time, frame_id: str) -> PoseStamped:
    """Position [3] (m) and quaternion [4] (x, y, z, w) as a message."""
    message = PoseStamped(header=Header(stamp=stamp, frame_id=frame_id))
    p, o = message.pose.position, message.pose.orientation
    p.x, p.y, p.z = (float(v) for v in position)
    o.x, o.y, o.z, o.w = (float(v) for v in quaternion)
    return message


def pose_from_msg(message: PoseStamped) -> np.ndarray:
    """float64 [6]: position (m), axis-angle (rad). Raises SteerError('bad_pose') unless finite and a rotation."""
    p, o = message.pose.position, message.pose.orientation
    values = np.array([p.x, p.y, p.z, o.x, o.y, o.z, o.w], dtype=np.float64)
    norm = float(np.linalg.norm(values[3:]))
    if not np.isfinite(values).all() or abs(norm - 1.0) > 1e-3:
        raise SteerError(
            "bad_pose", f"end-effector pose is not finite or its quaternion has norm {norm:g}; it is dropped"
        )
    return np.concatenate([values[:3], axis_angle_from_quaternion(values[3:] / norm)])


def axis_angle_from_quaternion(quaternion: np.ndarray) -> np.ndarray:
    """Axis times angle (rad) [3] of a unit quaternion (x, y, z, w): 2 acos(w) xyz / sqrt(1 - w^2).

    As robosuite's `quat2axisangle`, with whose data policies are trained: q and -q differ, the angle is in [0, 2 pi].
    """
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = math.sqrt(1.0 - w * w)
    if math.isclose(sine, 0.0):
        return np.zeros(3)
    return quaternion[:3] * (2.0 * math.acos(w) / sine)
