"""The one seam between motion and an arm: what any way to reach a robot must read and send.

Invariant: whatever is sent ends at rest within its own horizon, so an arm whose sender has died stops.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from steer_runtime.errors import SteerError

JOINT_NAMES = (
    "shoulder_pan_joint",
    "shoulder_lift_joint",
    "elbow_joint",
    "wrist_1_joint",
    "wrist_2_joint",
    "wrist_3_joint",
)
"""A UR's six joints in kinematic order, base to wrist. Drivers publish them in another order: map by name."""

Joints = NDArray[np.float64]
"""[6] rad, or rad/s, in the order of `JOINT_NAMES`."""


@dataclass(frozen=True)
class ArmState:
    """The newest whole measurement of an arm.

    stamp_s: when it was received, on the steady clock (`time.monotonic`).
    positions, velocities: [6] rad and rad/s, kinematic order.
    tcp_position: [3] m, tcp_quaternion: [4] unit, (x, y, z, w), both in `base_link`.
    program_running: the controller accepts motion. False after a protective stop, an e-stop or a stopped program.
    speed_scaling: 0 to 1, how fast the controller executes what it is sent.
    gripper: opening, 0 closed to 1 open, None without a gripper.
    """

    stamp_s: float
    positions: Joints
    velocities: Joints
    tcp_position: NDArray[np.float64]
    tcp_quaternion: NDArray[np.float64]
    program_running: bool
    speed_scaling: float
    gripper: float | None


@dataclass(frozen=True)
class JointMotion:
    """A short motion of all joints that ends at rest.

    times_s: [n] s from when it is sent, positive and increasing. positions: [n, 6] rad, kinematic order; the last two
    rows are equal, or there is one row only, which the arm approaches and holds.
    Raises SteerError `bad_motion` for anything else, NaN and infinity among it.
    """

    times_s: NDArray[np.float64]
    positions: NDArray[np.float64]

    def __post_init__(self) -> None:
        times, positions = self.times_s, self.positions
        if times.ndim != 1 or positions.shape != (len(times), len(JOINT_NAMES)) or len(times) == 0:
            raise SteerError(
                "bad_motion",
                f"a motion has times [n] and positions [n, {len(JOINT_NAMES)}], given {times.shape} and {positions.shape}",
            )
        if not (np.isfinite(times).all() and np.isfinite(positions).all()):
            raise SteerError("bad_motion", "a motion has a NaN or infinite time or position: nothing of it may be sent")
        if times[0] <= 0 or (np.diff(times) <= 0).any():
            raise SteerError("bad_motion", "times of a motion must be positive and increase")
        if len(times) > 1 and not np.array_equal(positions[-1], positions[-2]):
            raise SteerError("bad_motion", "the last two positions of a motion must be equal: it has to end at rest")

    @property
    def horizon_s(self) -> float:
        """After so long the arm is at rest, whatever becomes of the sender."""
        return float(self.times_s[-1])


class ArmPort(Protocol):
    """A way to one arm. Every method may be called from the motion timer: none may block."""

    def read(self) -> ArmState | None:
        """The newest whole state; None until every part of it has come. Judging its age is the caller's."""
        ...

    def send(self, motion: JointMotion) -> None:
        """Replace the motion that runs by this one."""
        ...

    def grip(self, opening: float) -> None:
        """Tell the gripper to open so far: 0 closed, 1 open."""
        ...

    def halt(self) -> None:
        """Bring the arm to rest as fast as its limits allow and drop what was sent; harmless at any time, any number of times."""
        ...

    def close(self) -> None:
        """Let go of the connection. No motion is sent after it."""
        ...
