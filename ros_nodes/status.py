"""What a robot says after each control step: where its episode stands, and which chunk and steering the step came from.

Invariant: a step is either a row of a chunk, named with its steering, or a hold with its reason; never neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from std_msgs.msg import Header
from steer_msgs.msg import EpisodeStatus

from ros_nodes.convert import clean_text, ns_from_time, time_from_ns
from steer_runtime.chunk_queue import NO_STEERING, Tick
from steer_runtime.types import SteeringStamp


@dataclass(frozen=True)
class RobotStatus:
    """See the message EpisodeStatus.

    last: what the last control step executed, without its action. stamp_ns: of the newest frame, on the robot's clock.
    """

    stamp_ns: int
    session_id: str
    task: str
    episode: int
    step: int
    done: bool
    success: bool
    mode: str
    hold_steps: int
    trimmed_rows: int
    last: Executed
    counters: Mapping[str, int]


@dataclass(frozen=True)
class Executed:
    """One control step. held: why it was no row of a chunk; "" when it was one, and then the rest says which.

    delay_steps: control steps from the chunk's frame to its arrival.
    """

    held: str
    inference_id: int = 0
    row: int = 0
    steering: SteeringStamp = NO_STEERING
    delay_steps: int = 0

    @classmethod
    def of(cls, tick: Tick) -> Executed:
        """What a tick of the queue says of itself."""
        return cls(tick.hold) if tick.hold else cls("", tick.inference_id, tick.row, tick.steering, tick.delay)


def status_to_msg(status: RobotStatus) -> EpisodeStatus:
    """A status as a message."""
    last = status.last
    return EpisodeStatus(
        header=Header(stamp=time_from_ns(status.stamp_ns)),
        session_id=status.session_id,
        task=clean_text(status.task),
        episode=status.episode,
        step=status.step,
        done=status.done,
        success=status.success,
        mode=status.mode,
        hold_steps=status.hold_steps,
        trimmed_rows=status.trimmed_rows,
        held=last.held,
        inference_id=last.inference_id,
        row=last.row,
        steering_epoch=last.steering.epoch,
        steering_sequence=last.steering.sequence,
        delay_steps=last.delay_steps,
        counter_names=list(status.counters),
        counter_values=list(status.counters.values()),
    )


def status_from_msg(message: EpisodeStatus) -> RobotStatus:
    """A message as the robot meant it."""
    steering = SteeringStamp(message.steering_epoch, message.steering_sequence)
    return RobotStatus(
        stamp_ns=ns_from_time(message.header.stamp),
        session_id=message.session_id,
        task=message.task,
        episode=message.episode,
        step=message.step,
        done=message.done,
        success=message.success,
        mode=message.mode,
        hold_steps=message.hold_steps,
        trimmed_rows=message.trimmed_rows,
        last=Executed(message.held, message.inference_id, message.row, steering, message.delay_steps),
        counters=dict(zip(message.counter_names, message.counter_values, strict=False)),
    )
