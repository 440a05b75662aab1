"""Which episodes a run consists of: tasks, targets, modulations and layouts, spread evenly and fixed by one seed.

Invariant: episode `i` of a plan does not depend on how many there are or in which order they run, so a longer run begins
with the episodes of a shorter one and an interrupted one goes on where it stopped. Consecutive episodes share a layout
across modulations, so that speeds and heights are compared in pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sim import layouts
from sim.benchmark import find_task, load_module, quiet
from sim.rollout import STYLES
from steer_runtime.errors import SteerError, nearest

PICK_AND_PLACE: Mapping[str, tuple[int, ...]] = {
    "libero_object": tuple(range(10)),
    # Task 5's bowl falls off its ramekin while the scene settles.
    "libero_spatial": (0, 1, 2, 3, 4, 6, 7, 8, 9),
    # Task 9's bottle has to be laid on a rack; put there upright, as the expert does, it falls off three times in four.
    "libero_goal": (1, 2, 4, 6, 8),
}
"""Suite -> the tasks that the expert can do."""


@dataclass(frozen=True)
class Episode:
    """One episode of a plan. target_index picks from the scene's targets modulo their number; 0 is the task's own."""

    index: int
    suite: str
    task_id: int
    target_index: int
    style: str
    layout: layouts.Kind
    seed: int

    @property
    def name(self) -> str:
        """Stable and sortable: 'demo_12'."""
        return f"demo_{self.index}"


def episodes(
    suite: str,
    layout: layouts.Kind,
    styles: Sequence[str],
    count: int,
    seed: int,
    *,
    tasks: Sequence[int] | None = None,
    any_target: bool = True,
) -> list[Episode]:
    """The first `count` episodes. any_target: every graspable object in turn, else the task's own only.

    Raises SteerError: 'unknown_suite' (no pick-and-place tasks known), 'task_out_of_range', 'bad_count',
    'unknown_style', 'unknown_layout'.
    """
    if suite not in PICK_AND_PLACE:
        raise SteerError(
            "unknown_suite", f"the expert does not know suite {suite[:80]!r}: {nearest(suite, PICK_AND_PLACE)}"
        )
    if count < 1:
        raise SteerError("bad_count", f"{count} episodes were asked for: expected at least 1")
    if layout not in layouts.KINDS:
        raise SteerError(
            "unknown_layout", f"layout kind {layout[:40]!r} is not known: expected one of {', '.join(layouts.KINDS)}"
        )
    chosen = PICK_AND_PLACE[suite] if tasks is None else tuple(tasks)
    unfit = [t for t in chosen if t not in PICK_AND_PLACE[suite]]
    if unfit or not chosen:
        raise SteerError(
            "task_out_of_range",
            f"tasks {unfit} of {suite} are not ones the expert can do: expected some of {list(PICK_AND_PLACE[suite])}",
        )
    for style in styles or ("",):
        if style not in STYLES:
            raise SteerError("unknown_style", f"modulation {style[:40]!r} is not known: {nearest(style, STYLES)}")
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
                layout=layout,
                seed=seed * 1_000_003 + layout_index,
            )
        )
    return out


def task_names(suite: str) -> list[str]:
    """Names of a suite's tasks, by task id."""
    with quiet():
        bench = load_module("libero.libero.benchmark").get_benchmark_dict()[suite]()
    return [find_task(suite, i).name for i in range(bench.n_tasks)]
