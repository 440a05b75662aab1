"""From tables whose truth is planted to effects, verdicts and the page."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic_study as synthetic
from synthetic_study import Made
from typer.testing import CliRunner

from sim.evaluation.analysis import claims, effects, measured, page, verdict
from sim.evaluation.analysis.effects import Analysis, Subject
from sim.evaluation.analysis.measured import Study
from sim.evaluation.study import records
from sim.evaluation.study.records import read_episodes
from steer_runtime.errors import SteerError

OFF = Made("unsteered", "unsteered")


def broken(made: Made, task: int, state: int) -> bool:
    """One start of the unsteered policy and one of speed +1 ended in an error."""
    return (made.label, task, state) in {("unsteered", 0, 0), ("direction:speed-token@+1", 1, 1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = synthetic.full_study(draws=20, strengths=(-1.0, 0.5, 1.0), controlled=(-1.0, 1.0))
    made = [m for m in made if m.kind != "random" or m.direction == "speed-token"]
    made = [replace(m, fails=0.6) if m.label == "direction:speed-token@+1" else m for m in made]
    return synthetic.write(tmp_path_factory.mktemp("study"), made, tasks=8, states=2, errored=broken)


@pytest.fixture(scope="module")
def study(folder: Path) -> Study:
    return measured.load(folder)


@pytest.fixture(scope="module")
def analysis(study: Study) -> Analysis:
    return effects.analyse(study)


@pytest.fixture(scope="module")
def document(study: Study, analysis: Analysis) -> dict[str, Any]:
    return page.document(study, analysis, "steer eval report STUDY")


def subject(analysis: Analysis, name: str) -> Subject:
    return next(s for s in analysis.subjects if s.name == name)


def small(tmp_path: Path, made: list[Made], **how: Any) -> Analysis:
    return effects.analyse(measured.load(synthetic.write(tmp_path / "study", made, **{"tasks": 1, "states": 1, **how})))


def test_planted_effects_are_found_and_absent_ones_are_not(analysis: Analysis) -> None:
    speed, height, careful = (subject(analysis, n) for n in ("speed-token", "height-token", "careful-word"))
    assert verdict.judge(speed).does == "yes"
    assert set(verdict.judge(speed).chosen) == {"down", "up"}
    assert [d.works for d in speed.doses] == [True, None, True]  # no control ran at +0.5
    # +-45 % of about 19 cm/s, planted.
    assert speed.slope.value == pytest.approx(0.45 * (analysis.unsteered["speed"].value or 0), rel=0.15)
    assert (speed.doses[0].band.draws, speed.doses[0].band.pairs) == (20, 15)
    assert verdict.judge(height).does == "no control"
    assert verdict.judge(careful).does == "not seen"
    assert "would have been found four times in five" in verdict.judge(careful).evidence


def test_success_lost_at_the_strongest_is_told_there_and_nowhere_else(analysis: Analysis) -> None:
    doses = subject(analysis, "speed-token").doses
    assert [d.success.value for d in doses[:2]] == [1.0, pytest.approx(1.0, abs=0.1)]
    assert (doses[2].success.value or 0) < 0.9
    # Fifteen pairs show nothing either way, and say so.
    assert [d.non_inferiority.verdict for d in doses] == ["undecided", "undecided", "lost"]
    assert "at least 35 are needed" in doses[0].non_inferiority.difference.note


def test_errored_episode_changes_coverage_and_not_success(analysis: Analysis) -> None:
    assert (analysis.by_kind["unsteered"].planned, analysis.by_kind["unsteered"].scored) == (16, 15)
    assert (analysis.success.value, analysis.success.n) == (1.0, 15)
    strongest = subject(analysis, "speed-token").doses[2]
    assert (strongest.pairs, strongest.success.n) == (14, 14)
    assert analysis.coverage.errored == 2


def test_progress_announces_as_many_comparisons_as_are_made(study: Study) -> None:
    made: list[str] = []
    effects.analyse(study, on_condition=made.append)
    assert len(made) == effects.comparisons(study)


def test_strength_zero_equals_unsteered(analysis: Analysis) -> None:
    assert analysis.zero == (15, 15)


def test_rivals_stand_with_what_they_claim(analysis: Analysis) -> None:
    speed, height = subject(analysis, "speed-token"), subject(analysis, "height-token")
    labels = [r.label for r in speed.rivals]
    assert labels == ["prompt:{}, slowly", "prompt:{}, quickly", "scale:0.5", "scale:0.75", "scale:1.5"]
    assert [r.right_way for r in speed.rivals] == [True] * 5
    assert [r.label for r in height.rivals] == ["prompt:{}, holding it high"]


def test_open_loop_and_closed_loop_effects_are_told_apart(analysis: Analysis) -> None:
    slowest = subject(analysis, "speed-token").doses[0]
    assert slowest.first.value is not None
    assert slowest.change.value is not None
    # The first stretch has six tenths of the pace of the others: both fall by 45 %, from different levels.
    assert slowest.change.value < slowest.first.value < 0.6 * slowest.change.value


def test_off_axis_change_is_in_standard_deviations_and_leaves_out_what_follows_from_the_claim(analysis: Analysis) -> None:  # fmt: skip
    slowest = subject(analysis, "speed-token").doses[0]
    assert set(slowest.off) == {"height", "path", "toggles", "entropy"}
    assert all(abs(e.value or 0) < 0.3 for e in slowest.off.values())
    assert (slowest.damage or 0) < 0.3
    lifted = subject(analysis, "height-token").doses[2]
    assert abs(lifted.off["speed"].value or 0) > 0.2  # planted: 4 % slower


def test_no_strength_works_where_the_slope_did_not_pass_holm(analysis: Analysis) -> None:
    speed = subject(analysis, "speed-token")
    alone = [d.right_way and d.band.beyond and (d.p.p or 1.0) < effects.ALPHA for d in speed.doses]
    assert alone == [True, None, True]  # each strength by itself looks like an effect
    assert [d.works for d in effects._decided(speed, 0.049).doses] == [True, None, True]
    assert [d.works for d in effects._decided(speed, 0.051).doses] == [False, None, False]


def test_too_few_pairs_for_holm_are_no_null_result(tmp_path: Path) -> None:
    fast = [Made(f"direction:fast-{n}@+1", "direction", f"fast-{n}", 1.0, speed=1.5) for n in "ab"]
    one = small(tmp_path / "one", [OFF, fast[0]], tasks=6).subjects[0]
    assert (one.p.least, verdict.judge(one).does) == (2 / 64, "no control")
    for found in small(tmp_path / "two", [OFF, *fast], tasks=6).subjects:
        told = verdict.judge(found)
        assert told.does == "unknown"
        assert "6 pairs cannot reach p < 0.05 after Holm over 2 directions whatever they do" in told.evidence
        assert "would have been found" not in told.evidence


def test_planned_conditions_without_a_row_are_missing(tmp_path: Path) -> None:
    folder = synthetic.write(tmp_path / "study", [OFF, Made("direction:fast@+1", "direction", "fast", 1.0, speed=1.5)], tasks=2, states=1)  # fmt: skip
    sidecar = folder / records.SIDECAR_FILE
    facts = json.loads(sidecar.read_text())
    plan = {"unsteered": 2, "direction:fast@+1": 4, "prompt:{}, slowly": 3}
    sidecar.write_text(json.dumps({**facts, "plan": plan}))
    found = effects.analyse(measured.load(folder))
    assert (found.coverage.planned, found.coverage.scored, found.coverage.missing) == (9, 4, 5)
    assert {label: c.missing for label, c in found.groups.items()} == {"unsteered": 0, "direction:fast@+1": 2, "prompt:{}, slowly": 3}  # fmt: skip
    assert found.by_kind["prompt"].planned == 3


def test_one_start_has_values_and_words_and_no_intervals(tmp_path: Path) -> None:
    found = small(tmp_path, [OFF, Made("direction:speed-x@+1", "direction", "speed-x", 1.0, speed=1.5)])
    told = verdict.judge(found.subjects[0])
    assert (told.does, told.evidence) == ("unknown", "1 pair: no test.")
    assert found.subjects[0].doses[0].change.low is None


def test_no_controls_are_told_in_words(tmp_path: Path) -> None:
    found = small(tmp_path, [OFF, Made("direction:speed-x@+1", "direction", "speed-x", 1.0, speed=1.5)], tasks=9).subjects[0]  # fmt: skip
    told = verdict.judge(found)
    assert told.does == "no control"
    assert "no random control was run" in told.headline
    assert found.doses[0].band.note == "no random control was run at this strength"


def test_direction_beyond_no_random_one_is_not_called_working(tmp_path: Path) -> None:
    made = [OFF, Made("direction:speed-x@+1", "direction", "speed-x", 1.0, speed=1.2)]
    made += [Made(f"random:speed-x#{d}@+1", "random", "speed-x", 1.0, d, speed=1.5 - 0.9 * (d % 2)) for d in range(20)]
    told = verdict.judge(small(tmp_path, made, tasks=9).subjects[0])
    assert told.does == "not beyond random"


def test_direction_that_random_words_match_is_not_called_working(tmp_path: Path) -> None:
    def drawn(kind: str, spread: float) -> list[Made]:
        return [
            Made(f"{kind}:speed-x#{d}@+1", kind, "speed-x", 1.0, d, speed=1 + spread * (1 - 2 * (d % 2)))
            for d in range(20)
        ]

    made = [OFF, Made("direction:speed-x@+1", "direction", "speed-x", 1.0, speed=1.2), *drawn("random", 0.02)]
    plain = small(tmp_path / "a", made, tasks=9).subjects[0]
    assert verdict.judge(plain).does == "yes"
    assert [b.kind for b in plain.doses[0].bands] == ["random"]
    # Pooled, the quiet half of 40 draws would hide the loud one's tail; each kind has a band of its own.
    both = small(tmp_path / "b", [*made, *drawn("random_words", 0.5)], tasks=9).subjects[0]
    assert [(b.kind, b.draws) for b in both.doses[0].bands] == [("random_words", 20), ("random", 20)]
    assert both.doses[0].band == both.doses[0].bands[0]
    told = verdict.judge(both)
    assert told.does == "not beyond random"
    assert "of 20 random directions 95 %" in told.evidence
    assert "of 20 random word directions 95 %" in told.evidence
    # A strength at which the harder control did not run does not get round it.
    half = Made("direction:speed-x@+0.5", "direction", "speed-x", 0.5, speed=1.2)
    easy = [replace(m, label=m.label.replace("+1", "+0.5"), strength=0.5) for m in drawn("random", 0.02)]
    found = small(tmp_path / "c", [*made, *drawn("random_words", 0.5), half, *easy], tasks=9).subjects[0]
    assert {d.strength: d.works for d in found.doses} == {0.5: None, 1.0: False}


def test_opposite_of_its_name_is_called_so(tmp_path: Path) -> None:
    found = small(tmp_path, [OFF, Made("direction:fast@+1", "direction", "fast", 1.0, speed=0.7)], tasks=9)
    assert verdict.judge(found.subjects[0]).does == "the opposite"


@pytest.mark.parametrize(("spread", "does"), [(0.9, "opposite within random"), (0.05, "the opposite")])
def test_opposite_that_random_directions_do_as_well_is_not_called_so(tmp_path: Path, spread: float, does: str) -> None:
    made = [OFF, Made("direction:fast@+1", "direction", "fast", 1.0, speed=0.9)]
    made += [Made(f"random:fast#{d}@+1", "random", "fast", 1.0, d, speed=1.0 - spread * (d % 2)) for d in range(20)]
    assert verdict.judge(small(tmp_path, made, tasks=9).subjects[0]).does == does


def test_name_that_claims_nothing_is_reported_without_a_verdict(tmp_path: Path) -> None:
    folder = synthetic.write(tmp_path / "s", [OFF, Made("direction:banana@+1", "direction", "banana", 1.0, speed=0.7)], tasks=9, states=1)  # fmt: skip
    read = measured.load(folder)
    assert verdict.judge(effects.analyse(read).subjects[0]).does == "no claim"
    told = effects.analyse(read, claims.parse(["banana=-speed"]))
    assert verdict.judge(told.subjects[0]).does == "no control"


def test_no_unsteered_episode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="add the condition"):
        small(tmp_path, [Made("direction:speed-x@+1", "direction", "speed-x", 1.0)])


def test_prompt_claims_what_its_words_ask_for() -> None:
    asked = {w: claims.claim_of_prompt(w) for w in ("{}, slowly", "quickly, {}", "gently {}", "{} and hold it high", "{} please")}  # fmt: skip
    found = {w: None if c is None else (c.metric, c.sign) for w, c in asked.items()}
    assert found == {
        "{}, slowly": ("speed", -1.0), "quickly, {}": ("speed", 1.0), "gently {}": ("near_speed", -1.0),
        "{} and hold it high": ("height", 1.0), "{} please": None,
    }  # fmt: skip
    with pytest.raises(SteerError, match="names no metric"):
        claims.parse(["speed-token=sped"])


def test_document_is_json_without_nan_and_says_all_numbers_of_the_verdict(document: dict[str, Any]) -> None:
    text = json.dumps(document, allow_nan=False)
    assert json.loads(text) == json.loads(json.dumps(document))
    for value in _numbers(document):
        assert math.isfinite(value)
    speed = document["answers"][0]
    assert speed["headline"].startswith("speed-token does what its name says, both ways")
    # The headline's numbers are those of the table.
    slow = next(d for d in document["subjects"][0]["doses"] if d["label"] == speed["chosen"]["down"])
    assert verdict.number(slow["change"]["value"], sign=True) in speed["evidence"]


def test_same_study_gives_the_same_page_byte_for_byte(document: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    one = page.render(document, tmp_path / "one.html", folder).read_bytes()
    assert one == page.render(json.loads(json.dumps(document)), tmp_path / "two.html", folder).read_bytes()
    assert len(one) < 3_000_000


def test_page_needs_nothing_else_and_shows_every_answer(document: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    html = page.render(document, tmp_path / "report.html", folder).read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", html)
    assert "<script" not in html
    assert not re.search(r">\s*(nan|None|inf)\b", html)
    for answer in document["answers"]:
        assert answer["headline"] in html
    assert "steer eval report STUDY" in html
    assert "3.17.0" in html


def test_texts_of_instructions_are_never_markup(tmp_path: Path) -> None:
    made = [OFF, Made("prompt:{}, slowly <b onload=x>", "prompt", speed=0.7), Made("direction:speed-x@+1", "direction", "speed-x", 1.0)]  # fmt: skip
    read = measured.load(synthetic.write(tmp_path / "s", made, tasks=2, states=1))
    html = page.render(page.document(read, effects.analyse(read), "c"), tmp_path / "r.html", tmp_path / "s").read_text()
    assert "<b onload" not in html
    assert "slowly &lt;b onload" in html


def test_films_stand_side_by_side(tmp_path: Path) -> None:
    from sim.evaluation.study.journal import video_path

    made = [OFF, Made("direction:speed-x@-1", "direction", "speed-x", -1.0, speed=0.6), Made("direction:speed-x@+1", "direction", "speed-x", 1.0, speed=1.4)]  # fmt: skip
    folder = synthetic.write(tmp_path / "s", made, tasks=9, states=1)
    read = measured.load(folder)
    for episode in read.episodes[:3]:
        video_path(folder, episode.key).parent.mkdir(exist_ok=True)
        video_path(folder, episode.key).write_bytes(b"film")
    document = page.document(read, effects.analyse(read), "c")
    assert [v["label"] for v in document["subjects"][0]["videos"]] == ["unsteered", "direction:speed-x@-1", "direction:speed-x@+1"]  # fmt: skip
    html = page.render(document, tmp_path / "r.html", folder).read_text()
    assert html.count("data:video/mp4;base64,ZmlsbQ==") == 3


def test_command_writes_page_and_summary_and_tells_the_answer(folder: Path, tmp_path: Path) -> None:
    from sim.evaluation.cli import app

    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(folder), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "speed-token does what its name says" in done.output
    assert out.exists()
    summary = json.loads((tmp_path / "page.summary.json").read_text())
    assert {a["name"]: a["does"] for a in summary["answers"]} == {
        "speed-token": "yes", "height-token": "no control", "careful-word": "not seen",
    }  # fmt: skip
    refused = CliRunner().invoke(app, ["report", str(folder), "--claim", "sped-token=speed"])
    assert isinstance(refused.exception, SteerError)
    assert "is no direction of" in refused.exception.sentence


def test_episodes_that_are_in_no_table_yet_are_told_of(folder: Path, tmp_path: Path) -> None:
    from sim.evaluation.cli import app

    running = shutil.copytree(folder, tmp_path / "running")
    count = len(read_episodes(running))
    lines = [json.dumps({"schema": "x"})] + [json.dumps({"key": str(number)}) for number in range(count + 2)]
    (running / "journal.jsonl").write_text("\n".join(lines) + '\n{"key": "half')
    done = CliRunner().invoke(app, ["report", str(running)])
    assert done.exit_code == 0, done.output
    assert f"tells of {count} episodes, and the journal holds {count + 2}" in done.stderr
    whole = CliRunner().invoke(app, ["report", str(folder), "--out", str(tmp_path / "whole.html")])
    assert "journal" not in whole.stderr
    (running / "journal.jsonl").write_text("{}\nno episode\n")
    torn = CliRunner().invoke(app, ["report", str(running)])
    assert isinstance(torn.exception, SteerError)
    assert torn.exception.code == "torn_file"


@pytest.mark.heavy
def test_page_in_a_browser_fits_a_laptop_and_asks_for_nothing(
    document: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    from browser import page as tab

    path = page.render(document, tmp_path / "report.html", folder)
    with tab(tmp_path / "profile") as seen:
        seen.open(path)
        assert seen.errors == []
        assert [r for r in seen.requests if not r.startswith(("file:", "data:"))] == []
        assert seen.run("document.querySelectorAll('img.plot').length") == 3
        drawn = seen.run("[...document.querySelectorAll('img.plot')].every(i => i.complete && i.naturalWidth > 400)")
        assert drawn is True
        # Nothing is cut or scrolls, at the width of a laptop and on the 186 mm that A4 leaves at 96 pixels an inch.
        for width, media in ((1280, "screen"), (703, "print")):
            seen.look(width, media=media)
            assert seen.run("document.documentElement.scrollWidth") <= width, media
            wide = seen.run(
                "[...document.querySelectorAll('table, img.plot, pre, p, dl')].filter(e => e.offsetParent !== null)"
                ".filter(e => e.getBoundingClientRect().right > e.closest('section, main').getBoundingClientRect().right + 1)"
                ".map(e => e.tagName + ' ' + e.textContent.slice(0, 60))"
            )
            assert wide == [], media
        split = seen.run(
            "[...document.querySelectorAll('img.plot, tr, .answer')].every(e => getComputedStyle(e).breakInside === 'avoid')"
        )
        assert split is True
        assert seen.pdf().startswith(b"%PDF")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _numbers(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, float):
        yield value
