"""Which episodes a run consists of: tasks, targets, modulations and layouts, spread evenly and fixed by one seed.

Invariant: episode `i` of a plan does not depend on how many there are or in which order they run, so a longer run begins
with the episodes of a shorter one and an interrupted one goes on where it stopped. Consecutive episodes share a layout
across modulations, so that speeds and heights are compared in pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from sim import layouts
from sim.benchmark import find_task, load_module, quiet
from sim.manner import SPEEDS, Manner, draw
from sim.rollout import MIX, STYLES
from steer_runtime.errors import SteerError, nearest

PICK_AND_PLACE: Mapping[str, tuple[int, ...]] = {
    "libero_object": tuple(range(10)),
    # Task 5's bowl falls off its ramekin while the scene settles.
    "libero_spatial": (0, 1, 2, 3, 4, 6, 7, 8, 9),
    # Task 9's bottle has to be laid on a rack; put there upright, as the expert does, it falls off three times in four.
    "libero_goal": (1, 2, 4, 6, 8),
}
"""Suite -> the tasks that the expert can do."""
LayoutMix = layouts.Kind | Literal["mixed"]
LAYOUTS: tuple[str, ...] = (*layouts.KINDS, "mixed")
MIXED_SHARES: Mapping[layouts.Kind, float] = {"random": 0.70, "official": 0.15, "jitter": 0.15}
"""Kind -> its share of "mixed" layouts."""
ROUND = 5
"""Episodes of a task in a row: building a scene costs as much as an episode without pictures."""


@dataclass(frozen=True)
class Episode:
    """One episode of a plan. target_index picks from the scene's targets modulo their number; 0 is the task's own.
    style: the modulation's name; manner: that of the name, or a drawn one when it is "mix"."""

    index: int
    suite: str
    task_id: int
    target_index: int
    style: str
    layout: layouts.Kind
    seed: int
    manner: Manner

    @property
    def name(self) -> str:
        """Stable and sortable: 'demo_12'."""
        return f"demo_{self.index}"


def episodes(
    suite: str,
    layout: LayoutMix,
    styles: Sequence[str],
    count: int,
    seed: int,
    *,
    tasks: Sequence[int] | None = None,
    any_target: bool = True,
) -> list[Episode]:
    """The first `count` episodes. any_target: every graspable object in turn, else the task's own only.

    styles: keys of STYLES or "mix", a manner drawn for each episode; of five "mix" episodes in a row each has another
    pace. layout "mixed" draws a kind for each layout.

    Raises SteerError: 'unknown_suite' (no pick-and-place tasks known), 'task_out_of_range', 'bad_count',
    'unknown_style', 'unknown_layout'.
    """
    if suite not in PICK_AND_PLACE:
        raise SteerError(
            "unknown_suite", f"the expert does not know suite {suite[:80]!r}: {nearest(suite, PICK_AND_PLACE)}"
        )
    if count < 1:
        raise SteerError("bad_count", f"{count} episodes were asked for: expected at least 1")
    if layout not in LAYOUTS:
        raise SteerError(
            "unknown_layout", f"layout kind {layout[:40]!r} is not known: expected one of {', '.join(LAYOUTS)}"
        )
    chosen = PICK_AND_PLACE[suite] if tasks is None else tuple(tasks)
    unfit = [t for t in chosen if t not in PICK_AND_PLACE[suite]]
    if unfit or not chosen:
        raise SteerError(
            "task_out_of_range",
            f"tasks {unfit} of {suite} are not ones the expert can do: expected some of {list(PICK_AND_PLACE[suite])}",
        )
    for style in styles or ("",):
        if style not in (*STYLES, MIX):
            raise SteerError(
                "unknown_style", f"modulation {style[:40]!r} is not known: {nearest(style, (*STYLES, MIX))}"
            )
    out = []
    for index in range(count):
        layout_index, style_index = divmod(index, len(styles))
        turn, task_index = divmod(layout_index, len(chosen))
        out.append(
            Episode(
                index=index,
                suite=suite,
                task_id=chosen[task_index],
                # Task t begins with its t-th target, so that ten layouts already show different objects.
                target_index=turn + task_index if any_target else 0,
                style=styles[style_index],
                layout=_kind(seed, layout_index) if layout == "mixed" else layout,
                seed=seed * 1_000_003 + layout_index,
                manner=_drawn(seed, index, len(styles)) if styles[style_index] == MIX else STYLES[styles[style_index]],
            )
        )
    return out


def in_rounds(plan: Sequence[Episode]) -> list[list[Episode]]:
    """The episodes in an order to run them in: up to ROUND of one task, then of the next, and so round again.

    However early a run stops, tasks are even to within a round, and a scene is built once for several episodes.
    """
    seen: dict[int, int] = {}
    rounds: dict[tuple[int, int], list[Episode]] = {}
    for episode in plan:
        place = seen.get(episode.task_id, 0)
        seen[episode.task_id] = place + 1
        rounds.setdefault((place // ROUND, episode.task_id), []).append(episode)
    return [rounds[key] for key in sorted(rounds)]


def _kind(seed: int, layout_index: int) -> layouts.Kind:
    kinds = tuple(MIXED_SHARES)
    rng = np.random.default_rng([seed, layout_index, 0x1A40])
    return kinds[int(rng.choice(len(kinds), p=list(MIXED_SHARES.values())))]


def _drawn(seed: int, index: int, styles: int) -> Manner:
    """A manner at random, the paces in shuffled fives so that a short run has them all."""
    group, place = divmod(index // styles, len(SPEEDS))
    pace = int(np.random.default_rng([seed, group, 0xACE]).permutation(len(SPEEDS))[place])
    return replace(draw(np.random.default_rng([seed, index, 0xAA2])), pace=pace)


def task_names(suite: str) -> list[str]:
    """Names of a suite's tasks, by task id."""
    with quiet():
        bench = load_module("libero.libero.benchmark").get_benchmark_dict()[suite]()
    return [find_task(suite, i).name for i in range(bench.n_tasks)]
