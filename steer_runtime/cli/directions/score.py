"""Does a direction do what its name says: measured on recorded moments, beside random controls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.text import Text

from steer_runtime.cli.directions.common import (
    DEFAULT_POLICY,
    DEFAULT_STORE,
    UNTRAINED,
    PolicyOption,
    StoreOption,
    load,
    new_console,
    new_table,
    parse_words,
    policy_title,
    printable,
    progress_bar,
    say,
)
from steer_runtime.errors import SteerError

if TYPE_CHECKING:
    from steer_runtime.directions.score_summary import Effect, Score, Summary

app = typer.Typer()
CONTROLS = ("gaussian", "pairs")
_NAME = 30
"""Characters of a name on one line of the table."""


@app.command(
    epilog="[bold]Examples[/]: steer directions score fast slow --policy pocket-libero --moments moments.safetensors "
    "--out out/score   |   steer directions score speed --random 20 --strengths 0.25,0.5,0.75,1 --moments "
    "moments.safetensors --out out/score   (an axis: both ends)   |   steer directions score --all --moments-used 12 "
    "--moments moments.safetensors --out out/score"
)
def score(
    moments: Annotated[Path, typer.Option(help="Recorded moments, from `steer data moments`.")],
    out: Annotated[Path, typer.Option(help="Folder of the results; one that holds measurements is gone on with.")],
    names: Annotated[list[str] | None, typer.Argument(help="Directions and axes (both ends) of the store.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every direction of the store made for this policy.")
    ] = False,
    strengths: Annotated[str, typer.Option(help="Strengths in 0 to 1.")] = "0.25,0.5,0.75,1",
    random: Annotated[int, typer.Option(min=0, help="Random controls for each direction.")] = 20,
    controls: Annotated[
        str,
        typer.Option(
            help="Controls of dense directions: gaussian, or pairs (differences of what the policy holds at two of the moments: "
            "harder, they stay among what occurs). Neurons have other neurons of their layers."
        ),
    ] = "gaussian",
    on: Annotated[
        str,
        typer.Option(help="What all of them claim to move, such as speed, dz or -height; default: by axis or name."),
    ] = "",
    moments_used: Annotated[
        int | None, typer.Option("--moments-used", min=1, help="So many of the moments, in even steps; default all.")
    ] = None,
    reading: Annotated[
        str,
        typer.Option(
            help="Of the table: executed (the greedy first action; of a flow policy the mean of the actions handed on) or "
            "expected (mean over the bins of action tokens)."
        ),
    ] = "executed",
    seed: Annotated[int, typer.Option(help="Of controls and intervals.")] = 0,
    page: Annotated[bool, typer.Option(help="Also write score.html.")] = True,
    policy: PolicyOption = DEFAULT_POLICY,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """What directions do to the actions of an inference at recorded moments, at several strengths, against random controls.

    Writes measurements.jsonl (goes on where it stopped), score.json and score.html to --out. An effect is a mean paired
    difference to the unsteered policy; z is its distance from the controls' in their standard deviations; damage is what
    happens off the claimed axis, in standard deviations of the unsteered policy; ratio is on-axis per damage.
    """
    from steer_runtime.directions import score as scoring
    from steer_runtime.directions import score_page
    from steer_runtime.directions.action_basis import reader_of
    from steer_runtime.directions.observables import READINGS, parse_on
    from steer_runtime.directions.score_summary import summarise
    from steer_runtime.directions.store import DirectionStore
    from steer_runtime.moments import load_moments

    if bool(names) == everything:
        raise SteerError("bad_option", "expected either names of directions and axes, or --all")
    if reading not in READINGS:
        raise SteerError("bad_option", f"--reading {reading[:40]!r} is unknown: expected {' or '.join(READINGS)}")
    if controls not in CONTROLS:
        raise SteerError("bad_option", f"--controls {controls[:40]!r} is unknown: expected {' or '.join(CONTROLS)}")
    claim = parse_on(on) if on else None
    wanted_strengths = _parse_strengths(strengths)
    recorded, _ = load_moments(moments)
    used = scoring.spread(recorded, moments_used)
    chosen = [recorded[i] for i in used]
    loaded = load(policy)
    directions, axes = scoring.choose(DirectionStore(store), names or [], loaded)
    watched = None
    if controls == "pairs":
        with progress_bar("watching the policy") as progress:
            watched = scoring.watch(loaded, directions, chosen, progress)
        without = [d.name for d in directions if d.dense is not None and not scoring.has_pairs(d, watched)]
        if without:
            say(f"all moments are alike where these write, so their controls are Gaussian: {', '.join(without)}")
    plan = scoring.plan(loaded, directions, wanted_strengths, random, seed, watched=watched)
    with scoring.measurements(out / "measurements.jsonl", loaded, moments, used) as measured:
        missing = sum(c.key not in measured.rows for c in plan.conditions)
        say(
            f"{len(directions)} directions, {len(plan.conditions)} conditions with their controls ({missing} to measure), "
            f"{len(chosen)} moments of {len({m.episode for m in chosen})} episodes"
        )
        with progress_bar("inferences") as progress:
            scoring.measure(loaded, chosen, plan, measured, progress)
        rows = dict(measured.rows)
    told = [r for r in READINGS if rows[scoring.OFF][r]]
    if reading not in told:
        raise SteerError("not_told", f"{loaded.name} has no {reading} action: give --reading {told[0]}")
    summaries = {r: summarise(rows, plan, chosen, r, axes=axes, on=claim, seed=seed) for r in told}
    readers = {name: reader_of(loaded, tower) for name, tower in loaded.towers.items()}
    facts = {
        "policy": {"name": loaded.name, "model_hash": loaded.model_hash, "trained": bool(loaded.trained)},
        "moments": {
            "file": moments.name,
            "used": len(chosen),
            "episodes": len({m.episode for m in chosen}),
            "phases": sorted({m.phase for m in chosen}),
        },
        "random": random,
        "controls": controls,
        "seed": seed,
        "strengths": list(plan.strengths),
        "reading": reading,
    }
    contents = {d.hash: score_page.contents(d, loaded.towers[d.tower], readers[d.tower]) for d in directions}
    document = score_page.document(list(summaries.values()), facts, contents, axes)
    saved = [score_page.save(document, out / "score.json")]
    _show(summaries[reading], policy_title(loaded), random)
    if page:
        saved.append(score_page.render(document, out / "score.html"))
    say(f"written: {', '.join(map(str, saved))}")


def _parse_strengths(text: str) -> list[float]:
    """Raises SteerError('bad_strength'); `plan` checks the range."""
    try:
        return [float(part) for part in parse_words(text)]
    except ValueError:
        raise SteerError(
            "bad_strength", f"strengths {text[:60]!r} are no numbers: expected such as 0.25,0.5,1"
        ) from None


def _show(summary: Summary, title: str, random: int) -> None:
    from steer_runtime.directions.observables import observable

    console = new_console()
    several = len({one.direction.tower for one in summary.scores}) > 1
    table = new_table(
        f"Directions of {title}, {summary.reading} action, each at the strength of its best ratio",
        "direction", "claims", *(["tower"] if several else []), "finder", "at", "dose", "effect", "z (moved)", "beats", "damage", "ratio", "ratio beats", "steady",
    )  # fmt: skip
    # Twelve columns fit a page of paper without the lines between them.
    table.box, table.pad_edge, table.collapse_padding = box.SIMPLE_HEAD, False, True
    effect = 5 + several
    for column in (table.columns[1], table.columns[effect - 3], table.columns[effect]):
        column.no_wrap = True
    table.columns[0].min_width = min(_NAME, max((len(one.direction.name) for one in summary.scores), default=1))
    table.columns[0].max_width = _NAME
    for one in summary.scores:
        name, claims, *cells = _cells(one, observable)
        shown = [name, claims, *([one.direction.tower] if several else []), *cells]
        table.add_row(*(Text(printable(cell)) for cell in shown))
    console.print(table)
    if summary.finders:
        finders = new_table(
            "Finders, mean over their directions at their best strength",
            "axis", *(["tower"] if several else []), "finder", "directions", "on-axis", "z", "beats", "beat all", "damage", "ratio", "ratio beats",
        )  # fmt: skip
        for found in summary.finders:
            told = (
                found.axis, *([found.tower] if several else []), found.finder, str(found.directions), f"{found.on:+.2f}",
                _number(found.z, "+.1f"), _share(found.beaten), str(found.works), f"{found.damage:.2f}",
                f"{found.ratio:+.2f}", _share(found.ratio_beaten),
            )  # fmt: skip
            finders.add_row(*(Text(printable(cell)) for cell in told))
        console.print(finders)
    console.print(
        Text(
            f"beats: share of the {random} random controls with a smaller effect in the claimed direction; ratio beats: with a "
            "smaller best ratio. damage and on-axis: standard deviations of the unsteered policy. In brackets: controls that moved it at all; few make z worth little, none leave it out. "
            "steady: no strength undoes a smaller one."
        )
    )
    for one in summary.scores:
        for note in one.notes:
            say(f"{one.direction.id}: {note}")
    if UNTRAINED in title:
        say(f"{UNTRAINED}: what is measured says nothing of a trained one")


def _cells(one: Score, observable: Any) -> tuple[str, ...]:
    point, claim = one.at_best, one.claim
    if point is None or claim is None:
        # Nothing is claimed: its largest effect at full strength, to say what it does.
        return (one.direction.name, "nothing", one.finder, *_largest(one), "", "", "", "")
    effect = point.effects[claim.observable]
    unit = {"m/s": " m/s", "cm a step": " cm", "deg a step": " deg"}.get(observable(claim.observable).unit, "")
    return (
        one.direction.name,
        f"{claim.observable} {'up' if claim.sign > 0 else 'down'}",
        one.finder,
        f"{point.strength:g}",
        f"{point.dose:.2f}",
        f"{_interval(effect)}{unit}",
        f"{_number(point.z, '+.1f')} ({effect.moved})",
        _share(point.beaten),
        _number(point.damage, ".2f"),
        _number(point.ratio, "+.2f"),
        _share(one.ratio_beaten),
        {True: "yes", False: "no", None: ""}[one.monotone],
    )


def _largest(one: Score) -> tuple[str, ...]:
    """strength, dose, effect, z, share beaten of the observable with the largest standardised effect at the last point."""
    if not one.points:
        return ("", "", "", "", "")
    point = one.points[-1]
    name, effect = max(point.effects.items(), key=lambda item: abs(item[1].standardised))
    shown = f"{name} {_interval(effect)}"
    z = f"{_number(effect.z, '+.1f')} ({effect.moved})"
    return (f"{point.strength:g}", f"{point.dose:.2f}", shown, z, _share(effect.beaten))


def _interval(effect: Effect) -> str:
    """`+0.42 [+0.25, +0.51]`."""
    return f"{effect.value:+.3g}" + ("" if effect.low is None else f" [{effect.low:+.2g}, {effect.high:+.2g}]")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
