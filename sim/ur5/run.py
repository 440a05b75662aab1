"""One run of a steered UR5e: what was commanded, what the arm did, and whether it kept its limits; with its pictures.

Invariant: speeds are the arm's own account (sim.ur5.truth), never what was sent to it; a run that broke a limit or in
which a command failed has a sentence that says so.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sim.episode import CommandOutcome
from sim.ur5.truth import Motion

MOVING_M_S = 0.01
"""Slower is standing still."""
VIEW = 384  # pixels of a picture's side in the video
_HEAD = 86  # pixels of text and bar above the pictures
_INK, _FAINT, _PAPER, _RED, _BLUE = "#1f2933", "#7b8794", "#ffffff", "#b91c1c", "#0072b2"


@dataclass(frozen=True)
class Ceilings:
    """What no run may exceed: TCP speed m/s, joint speeds [6] rad/s, joint accelerations [6] rad/s^2."""

    tcp_speed: float
    joint_speed: tuple[float, ...]
    joint_acceleration: tuple[float, ...]


@dataclass(frozen=True)
class Stop:
    """The bridge's motion core stopped at this moment of the steady clock, for this reason."""

    time_s: float
    code: str
    sentence: str


@dataclass(frozen=True)
class Phase:
    """Between two commands that took effect, from begin_s to end_s (steady clock).

    distance: m that the TCP went. speed: its mean while it moved, m/s; peak: its largest. moving: part of the time.
    """

    label: str
    begin_s: float
    end_s: float
    distance: float
    speed: float
    peak: float
    moving: float


@dataclass(frozen=True)
class ArmRun:
    """Times are seconds of the steady clock; clock_s is what has to be added to them to get the wall clock.

    begin_s, end_s: armed so long. motion: the arm's log. peaks [13]: see sim.ur5.truth.Peaks. picture_s [P] and, for each
    camera, as many pictures uint8 [H, W, 3]. rows: control steps that the chunks were long. stops: after each of them the
    bridge was armed again. lifted_m: how far the target was lifted.
    """

    policy: str
    trained: bool
    instruction: str
    motion_scale: float
    clock_s: float
    begin_s: float
    end_s: float
    rows: int
    inferences: int
    commands: tuple[CommandOutcome, ...]
    unsent: tuple[str, ...]
    stops: tuple[Stop, ...]
    ceilings: Ceilings
    peaks: np.ndarray
    motion: Motion
    picture_s: np.ndarray
    pictures: Mapping[str, Sequence[np.ndarray]]
    lifted_m: float
    target: str
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def faults(self) -> tuple[str, ...]:
        """A sentence for each command that did not do what it should, and for each limit that was exceeded."""
        late = f"it was not sent: the run ended after {self.rows} control steps"
        found = [f"{command.label}: {command.fault}" for command in self.commands if command.fault is not None]
        found += [f"{label}: {late}" for label in self.unsent]
        if not len(self.picture_s):
            found.append("no picture of both cameras came while the arm moved")
        if self.peaks[12] > self.ceilings.tcp_speed:
            found.append(f"the TCP reached {self.peaks[12]:.3f} m/s: the limit is {self.ceilings.tcp_speed:g} m/s")
        for joint, (speed, limit) in enumerate(zip(self.peaks[:6], self.ceilings.joint_speed, strict=True)):
            if speed > limit:
                found.append(f"joint {joint + 1} reached {speed:.3f} rad/s: the limit is {limit:.3f} rad/s")
        return tuple(found)

    @property
    def distance_m(self) -> float:
        """How far the TCP went, m."""
        return sum(phase.distance for phase in self.phases())

    def phases(self) -> tuple[Phase, ...]:
        """The run cut where commands took effect."""
        cuts, labels = [self.begin_s], ["not steered"]
        for command in self.commands:
            if command.accepted and command.action_ns is not None:
                cuts.append(command.action_ns / 1e9 - self.clock_s)
                labels.append(command.label)
        cuts.append(self.end_s)
        return tuple(self._phase(*one) for one in zip(labels, cuts[:-1], cuts[1:], strict=True))

    def _phase(self, label: str, begin_s: float, end_s: float) -> Phase:
        motion = self.motion
        inside = (motion.time_s >= begin_s) & (motion.time_s < end_s)
        path = np.linalg.norm(np.diff(motion.tcp[inside], axis=0), axis=1) if inside.sum() > 1 else np.zeros(0)
        seconds = np.diff(motion.time_s[inside])
        moving = path > MOVING_M_S * seconds
        time_moving = float(seconds[moving].sum())
        return Phase(
            label=label,
            begin_s=begin_s,
            end_s=end_s,
            distance=float(path.sum()),
            speed=float(path[moving].sum()) / time_moving if time_moving else 0.0,
            peak=float(motion.tcp_speed[inside].max(initial=0.0)),
            moving=time_moving / max(end_s - begin_s, 1e-9),
        )

    def summary(self) -> dict[str, Any]:
        """The run in numbers, for JSON."""
        return {
            "policy": self.policy,
            "instruction": self.instruction,
            "motion_scale": self.motion_scale,
            "seconds": round(self.end_s - self.begin_s, 2),
            "control_steps": self.rows,
            "inferences": self.inferences,
            "peak_tcp_speed_m_s": round(float(self.peaks[12]), 4),
            "peak_joint_speed_rad_s": [round(float(value), 4) for value in self.peaks[:6]],
            "peak_joint_acceleration_rad_s2": [round(float(value), 3) for value in self.peaks[6:12]],
            "ceilings": vars(self.ceilings),
            "phases": [{name: _rounded(value) for name, value in vars(phase).items()} for phase in self.phases()],
            "stops": [vars(stop) for stop in self.stops],
            "target": self.target,
            "target_lifted_m": round(self.lifted_m, 4),
            "faults": list(self.faults),
            "versions": dict(self.versions),
        }


def speed_plot(run: ArmRun) -> bytes:
    """PNG: TCP speed over time, the commands where they took effect, and the ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 4.2), dpi=120)
    time_s = run.motion.time_s - run.begin_s
    inside = (time_s >= 0) & (run.motion.time_s <= run.end_s)
    axes.plot(time_s[inside], run.motion.tcp_speed[inside], color=_BLUE, linewidth=0.9, label="TCP speed of the arm")
    limit = run.ceilings.tcp_speed
    axes.axhline(limit, color=_RED, linestyle="--", linewidth=1.4, label=f"ceiling {limit:g} m/s")
    for index, phase in enumerate(run.phases()):
        begin, end = phase.begin_s - run.begin_s, phase.end_s - run.begin_s
        axes.axvspan(begin, end, color="#edf0f3" if index % 2 else "#ffffff", zorder=0)
        if index:
            axes.axvline(begin, color=_INK, linewidth=1.0)
        axes.hlines(phase.speed, begin, end, color="#d55e00", linewidth=2.0, label="" if index else "mean while moving")
        axes.text(begin, 1.3 * limit, f" {phase.label}\n {phase.speed:.3f} m/s", va="top", fontsize=9, color=_INK)
    axes.set(xlim=(0, run.end_s - run.begin_s), ylim=(0, 1.35 * limit), xlabel="s since arming", ylabel="m/s")
    axes.set_title(textwrap.shorten(f"{run.policy}: {run.instruction}", 90), fontsize=11, loc="left")
    axes.legend(loc="upper right", fontsize=8, bbox_to_anchor=(1.0, 0.86))
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pyplot.close(figure)
    return buffer.getvalue()


def video_frames(run: ArmRun) -> Iterator[np.ndarray]:
    """What the cameras saw, with time, last command and TCP speed: uint8 RGB [H, W, 3], H and W even."""
    phases = run.phases()
    for at, *pictures in zip(run.picture_s, run.pictures["agentview"], run.pictures["wrist"], strict=True):
        canvas = Image.new("RGB", (2 * VIEW, _HEAD + VIEW), _PAPER)
        for column, picture in enumerate(pictures):
            view = Image.fromarray(picture).resize((VIEW, VIEW), Image.Resampling.LANCZOS)
            canvas.paste(view, (column * VIEW, _HEAD))
        draw = ImageDraw.Draw(canvas)
        phase = next((one for one in reversed(phases) if at >= one.begin_s), phases[0])
        draw.text((12, 6), textwrap.shorten(run.instruction, 70), fill=_INK, font=_font(17))
        draw.text((12, 30), f"{at - run.begin_s:6.1f} s    {phase.label}", fill=_INK, font=_font(15))
        _speed_bar(draw, run, at)
        yield np.asarray(canvas)


def video_rate(run: ArmRun) -> float:
    """Pictures a second, as they were taken."""
    gaps = np.diff(run.picture_s)
    return float(np.clip(1.0 / np.median(gaps), 1.0, 30.0)) if len(gaps) else 1.0


def _speed_bar(draw: ImageDraw.ImageDraw, run: ArmRun, at: float) -> None:
    recent = (run.motion.time_s > at - 0.2) & (run.motion.time_s <= at)
    speed, limit = float(run.motion.tcp_speed[recent].max(initial=0.0)), run.ceilings.tcp_speed
    left, right = 130, 2 * VIEW - 120
    draw.text((12, 56), "TCP speed", fill=_FAINT, font=_font(14))
    draw.rectangle((left, 58, right, 72), fill="#edf0f3")
    end = left + round((right - left) * min(speed / limit, 1.0))
    draw.rectangle((left, 58, max(left, end), 72), fill=_BLUE if speed <= limit else _RED)
    draw.line((right, 54, right, 76), fill=_RED, width=2)
    draw.text((right + 8, 56), f"{speed:.2f} of {limit:g} m/s", fill=_INK, font=_font(13))


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
