"""Commands from operators, and the desk that admits or refuses them.

Invariant: a refused command changes nothing; every command gets exactly one verdict; anybody may stop everything, only
sources on the list may steer; time is injected.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal

from steer_runtime.directions.direction import Axis, Direction
from steer_runtime.errors import SteerError, nearest
from steer_runtime.types import Role, SteeringStamp, span_bits

CommandOp = Literal["set", "clear", "clear_all"]
FLOAT32_MAX = 3.4028234663852886e38
MAX_COUNTER = 2**63 - 1
LEAST_SHARE = 1e-6
"""Of a strength that is backed off: at none at all its target would end, and a repeated command begin anew."""


@dataclass(frozen=True)
class SteeringCommand:
    """What an operator asks for.

    source, epoch, sequence: who sends, which session of the sender, its counter; the order of commands.
    stamp_ns: the sender's wall clock. target: a direction or axis (name or `name@hash`).
    strength: [0, 1] for a direction, [-1, 1] for an axis. ramp_s: None takes the engine's default.
    hold_s: released that long after acceptance; None holds until cleared.
    span: narrows the direction's own span; None keeps it.
    steps: which denoising steps to write in, from the first up to, not including, the second; None is all of them. Only
    towers that denoise have any (Pi0's expert).
    """

    source: str
    epoch: int
    sequence: int
    stamp_ns: int
    op: CommandOp
    target: str = ""
    strength: float = 0.0
    ramp_s: float | None = None
    hold_s: float | None = None
    priority: int = 0
    span: frozenset[Role] | None = None
    steps: tuple[int, int] | None = None


@dataclass(frozen=True)
class Verdict:
    """What became of a command. `steering` is the engine's stamp after it: actions with a sequence at or past it carry it."""

    accepted: bool
    code: str
    sentence: str
    source: str
    epoch: int
    sequence: int
    steering: SteeringStamp
    applied_strength: float


@dataclass(frozen=True)
class Limits:
    """Bounds on commands. Times in seconds, slew in strength units a second.

    sources: who may steer, as names or patterns such as `hold:*`; empty is anybody. source_timeout_s: what a source holds is released when it has sent nothing
    admitted for so long. max_strength: of every direction, on top of its own limit; max_strengths: of some, by name.
    max_dose: largest relative change of the residual stream; a strength is limited to max_dose / doses[name], with doses by
    direction at strength 1, where they are known (taken to grow in proportion, as in `setpoint.limits`); None: no limit.
    """

    max_age_s: float = 1.0
    max_future_s: float = 0.2
    default_ramp_s: float = 0.1
    release_s: float = 0.3
    max_slew: float = 10.0
    max_ramp_s: float = 60.0
    max_hold_s: float = 3600.0
    over_limit: Literal["clamp", "reject"] = "clamp"
    max_sources: int = 64
    max_targets: int = 32
    sources: frozenset[str] = frozenset()
    source_timeout_s: float = math.inf
    max_strength: float = 1.0
    max_strengths: Mapping[str, float] = field(default_factory=dict)
    max_dose: float | None = None
    doses: Mapping[str, float] = field(default_factory=dict)

    def largest(self, direction: Direction) -> tuple[float, str]:
        """Largest strength of a direction, and what sets it."""
        bounds = [
            (direction.max_strength, "the direction's own limit"),
            (self.max_strength, "the limit of this robot"),
            (self.max_strengths.get(direction.name, math.inf), "the limit of this robot for it"),
        ]
        dose = self.doses.get(direction.name, 0.0)
        if self.max_dose is not None and dose > 0:
            bounds.append((self.max_dose / dose, f"a dose of {self.max_dose:g}"))
        return min(bounds, key=lambda bound: bound[0])


@dataclass(frozen=True)
class Active:
    """One target being steered: a ramp from `start` at `start_s` to `goal` at `goal_s`, released from `expires_s` on.

    Times are the engine's steady clock. `order` counts acceptances: newer wins among equal priorities. held_until_s: when
    the command itself expires; expires_s is that, or earlier when its source falls silent. asked: strength that was
    accepted; goal is `backed_off` times it.
    """

    target: str
    positive: Direction
    negative: Direction | None
    start: float
    start_s: float
    goal: float
    goal_s: float
    expires_s: float
    release_s: float
    priority: int
    order: int
    source: str
    span: frozenset[Role] | None
    steps: tuple[int, int] | None = None
    held_until_s: float = math.inf
    asked: float = 0.0
    backed_off: float = 1.0

    def strength_at(self, now_s: float) -> float:
        """Signed strength at a moment of the steady clock."""
        held = self._ramped(min(now_s, self.expires_s))
        if now_s <= self.expires_s:
            return held
        left = 1.0 - (now_s - self.expires_s) / self.release_s if self.release_s > 0 else 0.0
        return held * max(0.0, left)

    def _ramped(self, now_s: float) -> float:
        if now_s >= self.goal_s:
            return self.goal
        share = max(0.0, (now_s - self.start_s) / (self.goal_s - self.start_s))
        return self.start + share * (self.goal - self.start)

    def settled_at(self, now_s: float) -> bool:
        """True when the strength no longer changes until the next command."""
        return now_s >= self.goal_s and math.isinf(self.expires_s)

    def over_at(self, now_s: float) -> bool:
        """True when nothing is left to apply, now or later."""
        if now_s >= self.expires_s + self.release_s:
            return True
        return self.goal == 0.0 and now_s >= self.goal_s

    def direction_at(self, strength: float) -> Direction | None:
        """The direction that a signed strength stands for."""
        return self.positive if strength >= 0 else self.negative


@dataclass
class CommandDesk:
    """Admission of commands against what is loaded. Not thread-safe: the engine locks around it.

    denoising: tower -> its denoising steps in one inference, of the towers that have any.
    """

    directions: Mapping[str, Direction]
    axes: Mapping[str, Axis]
    limits: Limits
    active: dict[str, Active] = field(default_factory=dict)
    denoising: Mapping[str, int] = field(default_factory=dict)
    _newest: OrderedDict[str, tuple[int, int]] = field(default_factory=OrderedDict)
    _order: int = 0

    def __post_init__(self) -> None:
        """Raises SteerError('unknown_direction' | 'bad_limit') for limits of what is not loaded, or that are none."""
        for name, value in (*self.limits.max_strengths.items(), *self.limits.doses.items()):
            if name not in self.directions:
                raise SteerError(
                    "unknown_direction",
                    f"a limit names direction {name[:80]!r}, which is not loaded: {nearest(name, self.directions)}",
                )
            if not 0.0 <= value < math.inf:
                raise SteerError("bad_limit", f"the limit of {name!r} is {value}: expected a finite number from 0 on")

    def admit(self, command: SteeringCommand, now_s: float, wall_ns: int) -> tuple[str, str, float]:
        """Apply a command to `active`. Returns (code, sentence, applied strength). Raises SteerError when refused."""
        _check_fields(command, self.limits)
        self._check_source(command)
        self._check_time(command, wall_ns)
        self._check_order(command)
        for name in [name for name, entry in self.active.items() if entry.over_at(now_s)]:
            del self.active[name]
        if command.op == "clear_all":
            count = len(self.active)
            self.active.clear()
            return "accepted", f"cleared {count} targets", 0.0
        target, positive, negative = self._resolve(command.target)
        self._check_owner(command, target)
        if command.op == "clear":
            answer = self._clear(command, target, now_s)
        else:
            answer = self._set(command, target, positive, negative, now_s)
        self._heard_from(command.source, now_s)
        return answer

    def back_off(self, share: float, now_s: float) -> None:
        """Let every strength fall to a share, in [0, 1], of what it is now; a new strength lifts it, a repetition does not."""
        for target, entry in self.active.items():
            start = entry.strength_at(now_s)
            if now_s > entry.expires_s or entry.over_at(now_s) or start == 0.0:
                continue
            goal = start * max(share, LEAST_SHARE)
            self.active[target] = replace(
                entry,
                start=start,
                start_s=now_s,
                goal=goal,
                goal_s=now_s + abs(goal - start) / self.limits.max_slew,
                backed_off=goal / entry.asked if entry.asked else 0.0,
            )

    def _heard_from(self, source: str, now_s: float) -> None:
        """A source that still sends keeps what it holds, as long as that is held for."""
        if math.isinf(self.limits.source_timeout_s):
            return
        for target, entry in self.active.items():
            if entry.source == source and now_s <= entry.expires_s:
                expires_s = min(entry.held_until_s, now_s + self.limits.source_timeout_s)
                self.active[target] = replace(entry, expires_s=expires_s)

    def _check_source(self, command: SteeringCommand) -> None:
        allowed = self.limits.sources
        if not allowed or command.op == "clear_all":
            return
        if not any(fnmatchcase(command.source, pattern) for pattern in allowed):
            raise SteerError(
                "source_not_allowed",
                f"source {command.source!r} may not steer here: {nearest(command.source, allowed)}; only clear_all is open "
                "to everybody",
            )

    def _check_time(self, command: SteeringCommand, wall_ns: int) -> None:
        age = (wall_ns - command.stamp_ns) / 1e9
        if age > self.limits.max_age_s:
            raise SteerError(
                "stale",
                f"command {command.sequence} of {command.source!r} is {age:.3f} s old: expected at most "
                f"{self.limits.max_age_s} s; check the clocks or send it again",
            )
        if -age > self.limits.max_future_s:
            raise SteerError(
                "future",
                f"command {command.sequence} of {command.source!r} is stamped {-age:.3f} s in the future: expected at most "
                f"{self.limits.max_future_s} s; check the clocks",
            )

    def _check_order(self, command: SteeringCommand) -> None:
        last = self._newest.get(command.source)
        if last is not None and command.epoch < last[0]:
            raise SteerError(
                "old_epoch",
                f"command of {command.source!r} comes from session {command.epoch}, but session {last[0]} has begun; "
                "it is ignored",
            )
        if last is not None and command.epoch == last[0] and command.sequence <= last[1]:
            raise SteerError(
                "duplicate",
                f"command {command.sequence} of {command.source!r} is not newer than {last[1]}, the last one seen; it is ignored",
            )
        self._newest[command.source] = (command.epoch, command.sequence)
        self._newest.move_to_end(command.source)
        while len(self._newest) > self.limits.max_sources:
            self._newest.popitem(last=False)

    def _resolve(self, target: str) -> tuple[str, Direction, Direction | None]:
        name = target.split("@", 1)[0]
        if name in self.axes:
            axis = self.axes[name]
            return name, self.directions[axis.positive], self.directions[axis.negative]
        if name in self.directions:
            direction = self.directions[name]
            if "@" in target and not direction.id.startswith(target):
                raise SteerError(
                    "unknown_direction",
                    f"{target[:80]!r} is not loaded: {direction.id!r} is; publish that or load the other version",
                )
            return name, direction, None
        known = [*self.axes, *self.directions]
        raise SteerError(
            "unknown_direction",
            f"no direction or axis is called {target[:80]!r}: {nearest(name, known)}; see `steer list`",
        )

    def _check_owner(self, command: SteeringCommand, target: str) -> None:
        owner = self.active.get(target)
        if owner is not None and owner.source != command.source and command.priority < owner.priority:
            raise SteerError(
                "other_owner",
                f"{target!r} is held by {owner.source!r} with priority {owner.priority}: {command.source!r} has priority "
                f"{command.priority}; raise the priority or wait until it is released",
            )

    def _clear(self, command: SteeringCommand, target: str, now_s: float) -> tuple[str, str, float]:
        entry = self.active.get(target)
        if entry is None:
            return "accepted", f"{target!r} was not active", 0.0
        if command.ramp_s:
            self._start_ramp(command, entry.target, entry.positive, entry.negative, 0.0, now_s)
        else:
            del self.active[target]
        return "accepted", f"cleared {target!r}", 0.0

    def _set(
        self, command: SteeringCommand, target: str, positive: Direction, negative: Direction | None, now_s: float
    ) -> tuple[str, str, float]:
        asked = command.strength
        chosen = negative if asked < 0 and negative is not None else positive
        high, why = self.limits.largest(chosen)
        low = -high if negative is not None else 0.0
        goal = min(max(asked, low), high)
        if goal != asked and self.limits.over_limit == "reject":
            raise SteerError(
                "over_limit",
                f"strength {asked:g} of {target!r} is outside [{low:g}, {high:g}], set by {why}; send one within",
            )
        if target not in self.active and len(self.active) >= self.limits.max_targets:
            raise SteerError(
                "too_many_targets",
                f"{len(self.active)} targets are active: expected at most {self.limits.max_targets}; clear one first",
            )
        chosen_from = [d for d in (positive, negative) if d is not None]
        self._check_span(command, chosen_from)
        self._check_steps(command, chosen_from)
        applied = self._start_ramp(command, target, positive, negative, goal, now_s)
        if applied != goal:
            sentence = f"{target!r} was backed off to {applied:g} and stays there: send another strength to leave it"
            return "clamped", sentence, applied
        if goal != asked:
            return "clamped", f"strength {asked:g} of {target!r} was clamped to {goal:g} by {why}", goal
        return "accepted", f"{target!r} goes to {goal:g}", goal

    def _check_span(self, command: SteeringCommand, directions: list[Direction]) -> None:
        if command.span is None:
            return
        for direction in directions:
            if not command.span & direction.span:
                raise SteerError(
                    "bad_span",
                    f"span {sorted(command.span)} has no token in common with {direction.id!r}, which acts on "
                    f"{sorted(direction.span)}; choose among those",
                )

    def _check_steps(self, command: SteeringCommand, directions: list[Direction]) -> None:
        if command.steps is None:
            return
        for direction in directions:
            count = self.denoising.get(direction.tower)
            if count is None:
                where = (
                    f"steer a direction of tower {' or '.join(self.denoising)}"
                    if self.denoising
                    else "the policy has none"
                )
                raise SteerError(
                    "bad_steps",
                    f"{direction.id!r} acts in tower {direction.tower!r}, which has no denoising steps: {where}, or send the "
                    "command without steps",
                )
            if command.steps[1] > count:
                raise SteerError(
                    "bad_steps",
                    f"steps {command.steps[0]}:{command.steps[1]} of {direction.id!r} do not fit: tower "
                    f"{direction.tower!r} takes {count} denoising steps; choose within 0:{count}",
                )

    def _start_ramp(
        self,
        command: SteeringCommand,
        target: str,
        positive: Direction,
        negative: Direction | None,
        goal: float,
        now_s: float,
    ) -> float:
        """Returns where the ramp goes: `goal`, or less where a repeated command meets what it was backed off to."""
        before = self.active.get(target)
        start = before.strength_at(now_s) if before is not None else 0.0
        repeated = before is not None and (before.source, before.asked) == (command.source, goal)
        backed_off = before.backed_off if before is not None and repeated else 1.0
        asked, goal = goal, goal * backed_off
        ramp = self.limits.default_ramp_s if command.ramp_s is None else command.ramp_s
        ramp = max(ramp, abs(goal - start) / self.limits.max_slew)
        hold = math.inf if command.hold_s is None else command.hold_s
        self._order += 1
        self.active[target] = Active(
            target=target,
            positive=positive,
            negative=negative,
            start=start,
            start_s=now_s,
            goal=goal,
            goal_s=now_s + ramp,
            expires_s=min(now_s + hold, now_s + self.limits.source_timeout_s),
            release_s=max(self.limits.release_s, 1.0 / self.limits.max_slew),
            priority=command.priority,
            order=self._order,
            source=command.source,
            span=command.span,
            steps=command.steps,
            held_until_s=now_s + hold,
            asked=asked,
            backed_off=backed_off,
        )
        return goal


def _check_fields(command: SteeringCommand, limits: Limits) -> None:
    """Types and ranges; a message can carry anything. Raises SteerError."""
    if not isinstance(command.source, str) or not 0 < len(command.source) <= 128 or "\0" in command.source:
        raise SteerError("bad_source", "a command has no usable source: expected 1 to 128 characters; name the sender")
    if command.op not in ("set", "clear", "clear_all"):
        raise SteerError(
            "bad_operation", f"operation {str(command.op)[:80]!r} is unknown: expected set, clear or clear_all"
        )
    for label in ("epoch", "sequence", "stamp_ns", "priority"):
        value = getattr(command, label)
        if isinstance(value, bool) or not isinstance(value, int) or not -MAX_COUNTER <= value <= MAX_COUNTER:
            raise SteerError("bad_field", f"{label} is {str(value)[:80]!r}: expected a whole number of 64 bits")
    if not isinstance(command.target, str) or "\0" in command.target or len(command.target) > 128:
        raise SteerError("bad_field", "target is not a name of at most 128 characters; see `steer list`")
    _number("strength", command.strength, -FLOAT32_MAX, FLOAT32_MAX, "not_finite")
    if command.ramp_s is not None:
        _number("ramp_s", command.ramp_s, 0.0, limits.max_ramp_s, "bad_field")
    if command.hold_s is not None:
        _number("hold_s", command.hold_s, 0.0, limits.max_hold_s, "bad_field")
    if command.span is not None:
        if not isinstance(command.span, frozenset) or not all(isinstance(role, str) for role in command.span):
            raise SteerError("bad_span", f"span is {str(command.span)[:80]}: expected a set of token roles, or none")
        span_bits(command.span)
    if command.steps is not None:
        _steps(command.steps)


def _steps(steps: object) -> None:
    usable = isinstance(steps, tuple) and len(steps) == 2 and all(type(step) is int for step in steps)
    if not usable or not 0 <= steps[0] < steps[1] <= MAX_COUNTER:  # type: ignore[index]
        raise SteerError(
            "bad_steps",
            f"steps are {str(steps)[:80]}: expected two whole numbers, the first step from 0 and the one after the last",
        )


def _number(label: str, value: object, low: float, high: float, code: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SteerError("bad_field", f"{label} is {str(value)[:80]!r}: expected a number")
    # Comparing covers integers too large for a float as well; NaN fails both sides.
    if not low <= value <= high:
        raise SteerError(code, f"{label} is {str(value)[:80]}: expected a finite number in [{low:g}, {high:g}]")
