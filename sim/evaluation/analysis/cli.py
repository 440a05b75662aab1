"""`steer eval report`: from the tables of a study to its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = (
    "Examples:  steer eval report out/study/speed  ·  steer eval report out/study/speed --out docs/results/speed.html  ·  "
    "steer eval report out/study/mine --claim wobble=jerk --claim calm=-jerk"
)


def report(
    study: Annotated[Path, typer.Argument(help="Folder of a study that `steer eval study` wrote.")],
    out: Annotated[Path | None, typer.Option(help="The page; default: report.html in the study's folder.")] = None,
    claim: Annotated[
        list[str] | None,
        typer.Option(help="NAME=METRIC or NAME=-METRIC: what a direction claims whose name does not tell it."),
    ] = None,
) -> None:
    """Does each direction do what its name says, and at what price? One HTML page, and every number beside it: summary.json, NAME.summary.json
    of --out NAME.html.

    A study that is not finished is reported as far as it is; what is missing is told.
    """
    from sim.evaluation.analysis import claims, effects, measured, page
    from sim.evaluation.cli import bar
    from sim.evaluation.study.journal import finished
    from sim.evaluation.study.records import read_episodes
    from steer_runtime.errors import SteerError

    told = claims.parse(claim or [])
    path = out or study / "report.html"
    if path.suffix != ".html":
        raise SteerError("bad_out", f"--out {str(path)[:120]!r} is no page: expected a name that ends in .html")
    told_of, held = len(read_episodes(study)), finished(study)
    if held > told_of:
        typer.echo(
            f"the page tells of {told_of} episodes, and the journal holds {held}: `steer eval study` with --tables, or its "
            "end, brings those that its YAML plans into the tables",
            err=True,
        )
    with bar("measure", told_of) as tick:
        read = measured.load(study, lambda: tick(1, "measure"))
    unknown = sorted(set(told) - {e.direction for e in read.episodes})
    if unknown:
        known = ", ".join(sorted({e.direction for e in read.episodes if e.direction}))
        raise SteerError("bad_claim", f"--claim {unknown[0]!r} is no direction of {study}: expected one of {known}")
    with bar("compare", effects.comparisons(read, told)) as tick:
        analysis = effects.analyse(read, told, lambda label: tick(1, label))
    extra = "".join(f" --claim {text}" for text in claim or [])
    command = f"steer eval study STUDY.yaml --out STUDY\nsteer eval report STUDY{extra}"
    document = page.document(read, analysis, command)
    for answer in document["answers"]:
        typer.echo(f"{answer['headline']} {answer['evidence']}")
    # Two pages of a folder have a summary each.
    typer.echo(str(page.save(document, path.with_name("summary.json" if out is None else f"{path.stem}.summary.json"))))
    typer.echo(str(page.render(document, path, study)))
