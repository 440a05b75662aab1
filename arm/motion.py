"""The motion core: action rows in at the policy's rate, short bounded trajectories out on a tick of its own.

Invariants: nothing is sent unless the arm is armed, and what is sent is a line in joint space that keeps every limit and
ends at rest within the horizon; a stop of any kind needs a new arming, which begins at the measured joints; whatever
limits or drops a motion is counted under a code. Targets never run further ahead than the lead, so nothing winds up.

Time is the steady clock of whoever calls. Any thread may call: a lock makes one owner of the rest.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from arm.actions import ActionReader
from arm.kinematics import Kinematics
from arm.limits import Code, PlaceLimits, SpeedLimits
from arm.port import ArmPort, ArmState, JointMotion, Joints
from arm.settings import ArmSettings
from arm.trajectory import Stopping, approach, stopping, towards
from steer_runtime.errors import SteerError

Mode = Literal["dry_run", "armed", "stopped"]

_NEAR_RAD = 2e-4
"""A trajectory that ends so near its target is left to run out: a tenth of a millimetre at the TCP."""
_WANTED_RAD, _MOVED_RAD, _SLOW = 0.005, 0.002, 0.05
"""An arm that is sent further than the first and has not turned by the second stands; below the third it may."""
_GRIP_STEP = 0.01
_REACH = 0.9
"""Part of the speed limits at which a first point may be reached from the measured joints."""
_TRIES = (1.0, 0.5, 0.25)
"""Parts of a step that are tried where links or the table come near, or where joints do not reach all of it."""


@dataclass(frozen=True)
class CoreState:
    """What the core is doing.

    code, sentence: why it is stopped, "" otherwise. limited_by: what limited the newest row or tick, in order. commanded,
    target [6] rad: where the controller is believed to be, and where the rows lead; None before the first measurement.
    opening: last gripper command. estop: latched until reset.
    """

    mode: Mode
    code: str
    sentence: str
    estop: bool
    moving: bool
    limited_by: tuple[str, ...]
    commanded: Joints | None
    target: Joints | None
    opening: float | None
    speed_scaling: float
    counters: Mapping[str, int]


class MotionCore:
    """See the module. show: hears every planned motion, sent or not, in the caller's thread.

    Raises SteerError('action_space_unfit') for rows that this arm could not follow.
    """

    def __init__(
        self,
        settings: ArmSettings,
        reader: ActionReader,
        port: ArmPort,
        show: Callable[[JointMotion], None] = lambda _: None,
    ) -> None:
        self.settings, self.reader = settings, reader
        self.kinematics = Kinematics(settings)
        self._port, self._show = port, show
        self._speeds = SpeedLimits(settings)
        self._places = PlaceLimits(settings, self.kinematics)
        self._lock = threading.RLock()
        self._counters: Counter[str] = Counter()
        self._mode: Mode = "dry_run"
        self._code = self._sentence = ""
        self._estop = False
        self._limited: tuple[str, ...] = ()
        self._target: Joints | None = None
        self._plan: Stopping | None = None
        self._progress_s = 0.0  # of the plan, in the controller's time
        self._ticked_s: float | None = None
        self._opening: float | None = None
        self._gripped: float | None = None
        self._first = True
        self._stood: tuple[Joints, float] = (np.zeros(6), 0.0)  # where the arm has stood, and since when
        self._scaling = 1.0

    # -- orders -------------------------------------------------------------------------------------------------------

    def arm(self, now_s: float) -> None:
        """Let motion reach the arm. Raises SteerError with the condition that is not met."""
        with self._lock:
            state = self._require_ready(now_s)
            self._begin_at(state, now_s)
            self._mode, self._code, self._sentence = "armed", "", ""
            self._counters["armed"] += 1

    def disarm(self, now_s: float) -> None:
        """Brake, and go back to the dry run."""
        with self._lock:
            self._brake(now_s)
            self._mode, self._code, self._sentence = "dry_run", "", ""
            self._forget()

    def stop(self, code: str, sentence: str, now_s: float) -> None:
        """Brake, drop what was wanted, and demand a new arming. In the dry run it is only counted."""
        with self._lock:
            self._counters[f"stop_{code}"] += 1
            if self._mode == "dry_run" and code != "estop":
                return
            self._brake(now_s)
            if self._mode != "stopped" or code == "estop":
                self._mode, self._code, self._sentence = "stopped", code, sentence
            self._forget()

    def estop(self, now_s: float) -> None:
        """Stop, and stay so until `reset_estop`."""
        with self._lock:
            self._estop = True
            self.stop("estop", "the e-stop was pressed; reset it, then arm again", now_s)

    def reset_estop(self) -> None:
        """Let go of the e-stop; the arm stays stopped until it is armed again."""
        with self._lock:
            self._estop = False

    def accept(self, row: NDArray[np.floating], now_s: float) -> None:
        """One action row [dims] of one control step. Raises SteerError for one that is dropped."""
        with self._lock:
            self._counters["rows"] += 1
            if self._mode == "stopped":
                self._counters["dropped_rows"] += 1
                return
            try:
                values = self.reader.check(row)
                state = self._require_state(now_s)
            except SteerError as error:
                self._counters[error.code] += 1
                self.hold(now_s)
                raise
            self._scaling = state.speed_scaling
            if self._target is None:
                self._begin_at(state, now_s)
            self._follow(values, state, now_s)
            self._grip(self.reader.opening(values))

    def hold(self, now_s: float) -> None:
        """A control step without an action: come to rest where braking ends, gripper as it is."""
        with self._lock:
            self._counters["holds"] += 1
            if self._plan is not None:
                self._target = self._plan.end.copy()

    def tick(self, now_s: float) -> None:
        """Watch the arm and send the next trajectory; call at `tick_hz`."""
        with self._lock:
            if self._mode == "stopped":
                self._ticked_s = now_s
                return
            state = self._port.read()
            if self._mode == "armed" and self._must_stop(state, now_s):
                return
            if state is None or self._target is None:
                self._ticked_s = now_s
                return
            self._scaling = state.speed_scaling
            elapsed = self._advance(now_s)
            if self._mode == "dry_run":
                self._stay_near(state)
            elif self._has_lost(state, now_s):
                return
            elif now_s - state.stamp_s > self.settings.motion.fresh_s:
                # What is under way ends at rest; a machine that lets the state grow old delays what is sent as well.
                self._limit("old_state")
                return
            self._emit(self._planned(elapsed, state))

    def state(self) -> CoreState:
        """What the core is doing, at this moment."""
        with self._lock:
            commanded = None if self._plan is None else self._plan.at(self._progress_s)[0]
            return CoreState(
                self._mode,
                self._code,
                self._sentence,
                self._estop,
                self._moving(),
                self._limited,
                commanded,
                None if self._target is None else self._target.copy(),
                self._opening,
                self._scaling,
                dict(self._counters),
            )

    # -- from rows to a target ----------------------------------------------------------------------------------------

    def _follow(self, row: NDArray[np.float64], state: ArmState, now_s: float) -> None:
        """Move the target by one row, as far as limits allow."""
        self._limited = ()
        if self._first and not self._near_enough(row, state, now_s):
            return
        self._first = False
        row, clipped = self.reader.clipped(row)
        if clipped:
            self._limit("row_clipped")
        base = self._base(state)
        step, code = self._wanted_step(row, base, state.speed_scaling)
        self._limit(code)
        if not step.any():
            self._target = base
            return
        # Speeds scale the step, so that a target never runs faster than the arm may.
        share, code = self._speeds.share(step / self.reader.period_s, self.kinematics.jacobian(base))
        self._limit(code)
        if self.reader.space.kind == "joint_abs":
            share *= state.speed_scaling  # deltas are already smaller by it
        step = step * share
        for limit in (self._share_of_lead, self._places.share_of_turn):
            share, code = limit(base, base + step)
            self._limit(code)
            step = step * share
        if self.reader.space.kind == "ee_delta":
            share, code = self._places.share_of_condition(base, base + step)
            self._limit(code)
            step = step * share
        self._target = base + step * self._share_of_place(base, step)

    def _base(self, state: ArmState) -> Joints:
        """Joints that a row is added to: the target's, or the measured ones where the arm is elsewhere."""
        assert self._target is not None
        commanded = self._commanded()
        off = np.linalg.norm(self.kinematics.pose(commanded).position - self.kinematics.pose(state.positions).position)
        if off > self.settings.motion.reanchor_m:
            self._limit("reanchored")
            return state.positions.copy()
        return self._target

    def _wanted_step(self, row: NDArray[np.float64], base: Joints, scaling: float) -> tuple[Joints, Code | str]:
        """Joint step [6] rad that a row asks for, inside the workspace; zeros where no joints do it."""
        if self.reader.space.kind != "ee_delta":
            return self.reader.joints(row, base, scaling) - base, ""
        start = self.kinematics.pose(base)
        share, code = self._places.share_of_way(start, self.reader.pose(row, start, scaling))
        for part in _TRIES:
            reached = self.kinematics.reach(self.reader.pose(row, start, scaling * share * part), base)
            if reached is not None:
                return reached - base, code
        return np.zeros_like(base), "unreachable"

    def _share_of_lead(self, base: Joints, end: Joints) -> tuple[float, str]:
        """Part of a step after which the target is still no further ahead of the commanded joints than the lead."""
        motion, commanded = self.settings.motion, self._commanded()
        here = self.kinematics.pose(commanded).position

        def ahead(joints: Joints) -> float:
            way = float(np.linalg.norm(self.kinematics.pose(joints).position - here)) / motion.lead_m
            return max(way, float(np.abs(joints - commanded).max()) / motion.lead_rad)

        before, after = ahead(base), ahead(end)
        if after <= 1.0 or after <= before:
            return 1.0, ""
        return max(0.0, (1.0 - before) / (after - before)), "lead"

    def _share_of_place(self, base: Joints, step: Joints) -> float:
        """Part of a step at whose end the arm may stand."""
        code: Code = ""
        here = self.kinematics.pose(base).position
        for share in _TRIES:
            code = self._places.broken(base + share * step, here)
            if not code:
                if share < 1.0:
                    self._limit("near_contact")
                return share
        self._limit(code)
        return 0.0

    def _near_enough(self, row: NDArray[np.float64], state: ArmState, now_s: float) -> bool:
        """Whether the first target since arming is near the measured state; else the arm is disarmed."""
        motion, here = self.settings.motion, state.positions
        if self.reader.space.kind == "ee_delta":
            start = self.kinematics.pose(here)
            far = float(np.linalg.norm(self.reader.pose(row, start).position - start.position))
            limit, what = motion.first_command_m, "m"
        else:
            far = float(np.abs(self.reader.joints(row, here) - here).max())
            limit, what = motion.first_command_rad, "rad"
        if far <= limit:
            return True
        self._limit("first_far")
        sentence = (
            f"the first action leads {far:.3f} {what} from the measured state, expected at most {limit:g}: bring the arm to "
            "where the policy begins, then arm again"
        )
        self.stop("first_far", sentence, now_s)
        return False

    # -- from the target to a trajectory ------------------------------------------------------------------------------

    def _planned(self, elapsed_s: float, state: ArmState) -> Stopping | None:
        """The next trajectory, from where the controller is; None where the one under way ends on the target."""
        assert self._target is not None
        assert self._plan is not None
        if np.abs(self._target - self._plan.end).max() < _NEAR_RAD:
            return None
        here, speed = self._now()
        way = self._target - here
        motion, acceleration = self.settings.motion, self._speeds.joint_acceleration
        wanted = approach(way, acceleration, motion)
        jacobian = self.kinematics.jacobian(here)
        wanted = wanted * self._speeds.share(wanted, jacobian)[0]
        # A braking that was left to run may have changed its speed only just now.
        seconds = min(max(elapsed_s, 0.0), motion.tick_s, self._plan.since_step(self._progress_s))
        velocity = towards(speed, wanted, acceleration, seconds)
        # What was slow enough a moment ago may be too fast at the joints of now.
        velocity = velocity * self._speeds.share(velocity, jacobian)[0]
        plan = self._from_where_it_is(stopping(here, velocity, acceleration, motion), state)
        code = self._broken_on(plan)
        if code:
            self._limit(f"path_{code}")
            slower = towards(speed, np.zeros_like(speed), acceleration, seconds)
            plan = self._from_where_it_is(stopping(here, slower, acceleration, motion), state)
            self._target = plan.end.copy()
        return plan

    def _from_where_it_is(self, plan: Stopping, state: ArmState) -> Stopping:
        """The plan, nearer and slower where the arm has fallen behind what was believed.

        Messages that came late, or not at all, leave the arm behind; its controller runs to the first point within the
        lead all the same. So that point is no further from the measured joints than the limits allow in that time.
        """
        if self._mode != "armed" or not np.isfinite(state.positions).all():
            return plan
        limits, motion = self.settings.limits, self.settings.motion
        first = plan.motion.positions[0]
        gap = first - state.positions
        pose = self.kinematics.pose
        way = float(np.linalg.norm(pose(first).position - pose(state.positions).position))
        excess = max(
            float(np.max(np.abs(gap) / np.array(limits.joint_speed_rad_s))) / (_REACH * motion.lead_s),
            way / (limits.tcp_speed_m_s * _REACH * motion.lead_s),
        )
        if excess <= 1.0:
            return plan
        self._limit("lagging")
        velocity = plan.velocity / excess
        start = state.positions + gap / excess - velocity * motion.lead_s
        return stopping(start, velocity, self._speeds.joint_acceleration, motion)

    def _broken_on(self, plan: Stopping) -> Code:
        """The first limit that is broken half-way or at the end of a line that may cut a corner of the rows' path."""
        here = self.kinematics.pose(plan.start).position
        for joints in ((plan.start + plan.end) / 2, plan.end):
            code = self._places.broken(joints, here)
            if code:
                return code
        return ""

    def _emit(self, plan: Stopping | None) -> None:
        if plan is None:
            return
        self._plan, self._progress_s = plan, 0.0
        self._counters["plans"] += 1
        if self._mode == "armed":
            self._port.send(plan.motion)
            self._counters["sent"] += 1
        self._show(plan.motion)

    def _brake(self, now_s: float) -> None:
        """Send the line to rest, if this core has set the arm in motion."""
        if self._mode != "armed" or self._plan is None:
            return
        self._advance(now_s)
        here, speed = self._now()
        if self._moving():
            acceleration, motion = self._speeds.joint_acceleration, self.settings.motion
            slower = towards(speed, np.zeros_like(speed), acceleration, motion.tick_s)
            plan, state = stopping(here, slower, acceleration, motion), self._port.read()
            self._emit(plan if state is None else self._from_where_it_is(plan, state))

    # -- watching the arm ---------------------------------------------------------------------------------------------

    def _require_state(self, now_s: float) -> ArmState:
        state = self._port.read()
        if state is None:
            raise SteerError("no_state", "the arm has not told its whole state yet: is the driver running?")
        age = now_s - state.stamp_s
        if age > self.settings.motion.state_timeout_s:
            raise SteerError("state_silent", f"the arm's state is {age:.2f} s old: is the driver running?")
        if not (np.isfinite(state.positions).all() and np.isfinite(state.velocities).all()):
            raise SteerError("bad_state", "the arm's state holds NaN or infinite numbers")
        return state

    def _require_ready(self, now_s: float) -> ArmState:
        motion = self.settings.motion
        if self._estop:
            raise SteerError("estop", "the e-stop is pressed: reset it before arming")
        state = self._require_state(now_s)
        if not state.program_running:
            raise SteerError(
                "program_stopped",
                "the robot program is not running: start it on the pendant or by the driver's services",
            )
        if np.abs(state.velocities).max() > motion.rest_rad_s:
            raise SteerError("not_at_rest", "the arm is moving: wait until it is at rest, then arm")
        off = float(np.linalg.norm(self.kinematics.pose(state.positions).position - state.tcp_position))
        if not off <= motion.model_error_m:
            raise SteerError(
                "model_mismatch",
                f"the driver's TCP is {off:.3f} m from this model's, expected at most {motion.model_error_m:g}: set the same "
                "TCP on the pendant and in tool.tcp_offset_m, and check `arm`",
            )
        # An arm that was stopped at the border may stand a little beyond it: it can be armed, and led inwards.
        here = self.kinematics.pose(state.positions).position
        beside = here if self._places.outside(here) <= motion.model_error_m else None
        code = self._places.broken(state.positions, beside)
        if code:
            raise SteerError(
                code, f"the arm stands where it may not ({code}): move it away by hand or pendant, then arm"
            )
        return state

    def _must_stop(self, state: ArmState | None, now_s: float) -> bool:
        if state is None or not now_s - state.stamp_s <= self.settings.motion.state_timeout_s:
            self.stop("state_silent", "the driver has gone silent; arm again once it is back", now_s)
            return True
        if not (np.isfinite(state.positions).all() and np.isfinite(state.velocities).all()):
            self.stop("bad_state", "the driver's joint states hold NaN or infinite numbers", now_s)
            return True
        if not state.program_running:
            # Nothing is sent: what the controller box resumes later must not be a motion of ours.
            self._plan = None
            self.stop(
                "program_stopped",
                "the robot program stopped (protective stop, e-stop or pendant): clear the cause, start it, then arm again",
                now_s,
            )
            return True
        return False

    def _has_lost(self, state: ArmState, now_s: float) -> bool:
        motion, commanded = self.settings.motion, self._commanded()
        turned = float(np.abs(commanded - state.positions).max())
        way = float(
            np.linalg.norm(self.kinematics.pose(commanded).position - self.kinematics.pose(state.positions).position)
        )
        if way <= motion.lost_m and turned <= motion.lost_rad and not self._stands(state, now_s):
            return False
        self.stop(
            "not_following",
            f"the arm is {way:.3f} m and {turned:.2f} rad from where it was sent, and does not follow: is the trajectory controller active?",
            now_s,
        )
        return True

    def _stands(self, state: ArmState, now_s: float) -> bool:
        """Whether the arm has not moved for `lost_s` although it was sent elsewhere all the time."""
        assert self._plan is not None
        wanted = float(np.abs(self._plan.end - state.positions).max())
        stood_at, since_s = self._stood
        moved = float(np.abs(state.positions - stood_at).max())
        if wanted < _WANTED_RAD or moved > _MOVED_RAD or state.speed_scaling < _SLOW:
            self._stood = state.positions.copy(), now_s
            return False
        return now_s - since_s > self.settings.motion.lost_s

    def _stay_near(self, state: ArmState) -> None:
        """In the dry run the arm stays behind: once it is past the re-anchoring, show anew from where it is."""
        commanded = self._commanded()
        off = np.linalg.norm(self.kinematics.pose(commanded).position - self.kinematics.pose(state.positions).position)
        if off > self.settings.motion.reanchor_m or np.abs(commanded - state.positions).max() > 0.1:
            self._plan, self._target = self._resting(state.positions), state.positions.copy()

    # -- belief -------------------------------------------------------------------------------------------------------

    def _begin_at(self, state: ArmState, now_s: float) -> None:
        self._target = state.positions.copy()
        self._plan, self._progress_s, self._ticked_s = self._resting(state.positions), 0.0, now_s
        self._first, self._limited = True, ()
        self._stood = state.positions.copy(), now_s
        self._gripped = None
        self._scaling = state.speed_scaling

    def _forget(self) -> None:
        self._target = self._plan = None
        self._first = True

    def _resting(self, joints: Joints) -> Stopping:
        return stopping(joints.copy(), np.zeros_like(joints), self._speeds.joint_acceleration, self.settings.motion)

    def _advance(self, now_s: float) -> float:
        """Let the controller go on by the time since the last tick, at its speed scaling; returns that time."""
        elapsed = 0.0 if self._ticked_s is None else max(0.0, now_s - self._ticked_s)
        self._ticked_s = now_s
        self._progress_s += elapsed * self._scaling
        return elapsed * self._scaling

    def _now(self) -> tuple[Joints, Joints]:
        assert self._plan is not None
        return self._plan.at(self._progress_s)

    def _commanded(self) -> Joints:
        return self._now()[0]

    def _moving(self) -> bool:
        return self._plan is not None and bool(np.abs(self._plan.at(self._progress_s)[1]).max() > 1e-9)

    # -- small parts --------------------------------------------------------------------------------------------------

    def _grip(self, opening: float) -> None:
        self._opening = opening
        if self._mode != "armed" or (self._gripped is not None and abs(opening - self._gripped) < _GRIP_STEP):
            return
        self._gripped = opening
        self._port.grip(opening)

    def _limit(self, code: str) -> None:
        """Count what limited a motion."""
        if code:
            self._counters[f"limit_{code}"] += 1
            if code not in self._limited:
                self._limited = (*self._limited, code)
