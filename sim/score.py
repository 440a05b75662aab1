"""How good the expert is: released success with an interval, speeds and heights compared on equal layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sim import layouts
from sim.intervals import wilson
from sim.plan import Episode
from sim.rollout import MIX, Assignment, Noise, Outcome, follow, run
from sim.scene import Scene


@dataclass(frozen=True)
class Scored:
    """One episode and what came of it. target: the object's name. resampled: layouts refused before this one."""

    episode: Episode
    target: str
    outcome: Outcome
    resampled: int


@dataclass(frozen=True)
class Row:
    """One modulation's summary. low, high: Wilson's 95 % interval of released success. speed m/s, height m."""

    style: str
    episodes: int
    released: int
    done: int
    low: float
    high: float
    steps: float
    speed: float
    height: float


def score(
    plan: Sequence[Episode], *, noise: Noise | None = None, on_episode: Callable[[Scored], None] | None = None
) -> list[Scored]:
    """Run a plan without rendering, one scene after the other. Results come in the order of the tasks."""
    noise = noise or Noise()
    out: list[Scored] = []
    for task_id in sorted({e.task_id for e in plan}):
        mine = [e for e in plan if e.task_id == task_id]
        with Scene(mine[0].suite, task_id) as scene:
            names = layouts.targets(scene)
            for episode in mine:
                target = names[episode.target_index % len(names)]
                layout = layouts.make(scene, episode.layout, target, episode.seed)
                assignment = Assignment(target, episode.style, episode.index, episode.manner)
                actor = follow(noise, episode.index, episode.manner.style().speed)
                outcome = run(scene, layout, assignment, actor=actor)
                out.append(Scored(episode, target, outcome, layout.resampled))
                if on_episode is not None:
                    on_episode(out[-1])
    return out


def summary(scored: Sequence[Scored]) -> list[Row]:
    """A row per modulation, in order of appearance, and one for all together; drawn ones are grouped by pace."""
    groups: dict[str, list[Scored]] = {}
    for one in scored:
        episode = one.episode
        drawn = f"{MIX}, {episode.manner.words()[0]}"
        groups.setdefault(drawn if episode.style == MIX else episode.style, []).append(one)
    rows = [_row(style, group) for style, group in groups.items()]
    return [*rows, _row("all", scored)] if len(rows) > 1 else rows


def _row(style: str, group: Sequence[Scored]) -> Row:
    outcomes = [g.outcome for g in group]
    good = [o for o in outcomes if o.released]
    released = len(good)
    low, high = wilson(released, len(outcomes))
    carried = [o.height for o in good if np.isfinite(o.height)]
    return Row(
        style,
        len(outcomes),
        released,
        sum(o.done for o in outcomes),
        low,
        high,
        float(np.mean([o.steps for o in good])) if good else float("nan"),
        float(np.mean([o.speed for o in good])) if good else float("nan"),
        float(np.mean(carried)) if carried else float("nan"),
    )


def paired(
    scored: Sequence[Scored], one: str, other: str, value: Callable[[Outcome], float]
) -> list[tuple[float, float]]:
    """Values of two modulations on the same layouts, where both episodes ended well."""
    by_layout: dict[tuple[int, int], dict[str, Outcome]] = {}
    for s in scored:
        by_layout.setdefault((s.episode.task_id, s.episode.seed), {})[s.episode.style] = s.outcome
    pairs: list[tuple[float, float]] = []
    for outcomes in by_layout.values():
        both: Mapping[str, Outcome] = outcomes
        if one in both and other in both and both[one].released and both[other].released:
            a, b = value(both[one]), value(both[other])
            if np.isfinite(a) and np.isfinite(b):
                pairs.append((a, b))
    return pairs
