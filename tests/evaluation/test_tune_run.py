"""Tunings whose optimum is known: what is found, what is told, interruptions, errors, what is written back.

The episodes come from `tune_world.Made`; journal, Optuna, rules and store are the real ones. In real scenes: the heavy tests.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import study_world
import tune_world
import yaml
from click.testing import Result
from typer.testing import CliRunner

from sim.evaluation.study import records
from sim.evaluation.study.journal import JOURNAL_FILE
from sim.evaluation.study.run import open_journal
from sim.evaluation.study.run import run as run_study
from sim.evaluation.tuning import held_out, page, result, write_back
from sim.evaluation.tuning.plan import Tuning, ready
from sim.evaluation.tuning.run import Watch, open_tuning, run
from sim.evaluation.tuning.trials import Told
from steer_runtime.directions.store import DirectionStore
from steer_runtime.errors import SteerError
from steer_runtime.policies import LoadedPolicy, load_policy

ONE_END = {"ends": "positive", "trials": 6, "batch": 3, "startup": 4, "margin": 0.3, "least": 3}
"""A margin of 30 points can be shown with 9 pairs, one of 10 needs 35."""
STARTS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tune")


@pytest.fixture(scope="module")
def policy(folder: Path) -> LoadedPolicy:
    from steer_runtime.policies.openvla.policy import OpenVLAPolicy

    loaded = load_policy(study_world.policy_file(folder))
    assert isinstance(loaded, OpenVLAPolicy)
    study_world.store(folder, loaded)
    return loaded


@pytest.fixture(scope="module")
def tuning(folder: Path, policy: LoadedPolicy) -> Tuning:
    return ready(tune_world.settings(folder, **ONE_END), policy)


@pytest.fixture(scope="module")
def whole(tuning: Tuning, folder: Path) -> Path:
    """A tuning that nobody interrupted, by one worker."""
    ended(tuning, folder / "whole")
    return folder / "whole"


def ended(
    tuning: Tuning, out: Path, seats: Sequence[tune_world.Made] = (), stop_after: int | None = None, again: bool = False
) -> dict[str, list[Told]]:
    """Run what is missing, or so many episodes."""
    count = 0

    def episode(row: Mapping[str, Any]) -> None:
        nonlocal count
        count += 1

    watch = Watch(stop=lambda: stop_after is not None and count >= stop_after, episode=episode)
    with open_tuning(tuning, out) as kept:
        return run(tuning, kept, seats=seats or [tune_world.Made()], watch=watch, again=again)


def told(tuning: Tuning, out: Path) -> list[Told]:
    """The trials of a finished folder; running it again runs nothing."""
    seat = tune_world.Made()
    found = ended(tuning, out, [seat])
    assert seat.ran == []
    return found["positive"]


def test_the_best_trial_lies_below_the_cliff_and_no_failing_one_is_chosen(tuning: Tuning, whole: Path) -> None:
    trials = told(tuning, whole)
    assert [t.number for t in trials] == list(range(6))
    best = result.best(trials, tuning)
    assert best is not None
    kept = [t for t in trials if t.point.strength <= tune_world.CLIFF]
    assert best.point.strength == max(t.point.strength for t in kept)
    assert best.outcome.score is not None
    assert best.outcome.score.effect == pytest.approx(0.125 * 100 * best.point.strength * 0.7, rel=0.4)
    # The direction as it is, at its largest strength, goes first, and beyond the cliff it is stopped at once.
    assert trials[0].point.strength == 1.0
    for trial in trials:
        beyond = trial.point.strength > tune_world.CLIFF + 0.04
        assert (trial.outcome.state == "pruned") == beyond
        # Two of six lost are more than 30 points.
        assert trial.outcome.episodes == (2 if beyond else STARTS)
        assert len(trial.effects) == trial.outcome.episodes


def test_unsteered_episodes_run_once_and_all_trials_share_them(whole: Path) -> None:
    rows = study_world.rows_of(whole)
    unsteered = [row for row in rows if row["kind"] == "unsteered"]
    assert len(unsteered) == STARTS
    steered = [row for row in rows if row["kind"] == "direction"]
    assert {row["pair"] for row in steered} == {row["pair"] for row in unsteered}
    first = [row["pair"] for row in steered if row["condition"] == "positive#1"]
    assert first == [row["pair"] for row in unsteered]  # in one order
    assert records.read_sidecar(whole)["tuning"]


def test_workers_and_stops_change_no_trial(tuning: Tuning, whole: Path, tmp_path: Path) -> None:
    expected = told(tuning, whole)
    assert ended(tuning, tmp_path / "three", [tune_world.Made() for _ in range(3)])["positive"] == expected
    stopped = tmp_path / "stopped"
    for after in (3, 9, 1):
        ended(tuning, stopped, stop_after=after)
    assert ended(tuning, stopped)["positive"] == expected
    # Speculative episodes of a stopped trial are in no table.
    for other in (tmp_path / "three", stopped):
        study_world.require_equal(whole, other)


def test_half_a_line_of_either_journal_is_run_again(tuning: Tuning, whole: Path, tmp_path: Path) -> None:
    ended(tuning, tmp_path, stop_after=10)
    for name in (JOURNAL_FILE, "optuna.log"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-7])
    (tmp_path / "optuna.log.lock").symlink_to("optuna.log")
    assert ended(tuning, tmp_path)["positive"] == told(tuning, whole)


def test_more_trials_go_on_and_another_question_is_refused(
    tuning: Tuning, whole: Path, policy: LoadedPolicy, tmp_path: Path
) -> None:
    fewer = replace(tuning, settings=tuning.settings.model_copy(update={"trials": 3}))
    ended(fewer, tmp_path)
    assert ended(tuning, tmp_path)["positive"] == told(tuning, whole)
    folder = tuning.settings.store.parent  # type: ignore[union-attr]
    other = ready(tune_world.settings(folder, **ONE_END, seed=1), policy)
    with pytest.raises(SteerError, match="seed") as refused, open_tuning(other, tmp_path):
        pass
    assert refused.value.code == "other_configuration"


def test_an_errored_episode_makes_its_trial_errored_and_never_failed(tuning: Tuning, tmp_path: Path) -> None:
    def errs(job: Any) -> bool:
        return job.condition == "positive#1" and job.start == 2

    trials = ended(tuning, tmp_path, [tune_world.Made(errs)])["positive"]
    (errored,) = [t for t in trials if t.outcome.state == "errored"]
    assert (errored.number, errored.outcome.score, errored.outcome.why) == (1, None, "the simulator stopped")
    best = result.best(trials, tuning)
    assert best is not None
    assert best.number != 1
    # On request the same choice is tried once more, as another trial.
    again = ended(tuning, tmp_path, again=True)["positive"]
    assert len(again) == 7
    assert (again[6].retry_of, again[6].point, again[6].outcome.state) == (1, errored.point, "complete")
    assert len(ended(tuning, tmp_path, again=True)["positive"]) == 7


def test_an_errored_baseline_is_told_and_run_again_on_request(tuning: Tuning, tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="--retry") as refused:
        ended(tuning, tmp_path, [tune_world.Made(lambda job: job.start == 1)])
    assert refused.value.code == "no_baseline"
    assert len(ended(tuning, tmp_path, again=True)["positive"]) == 6


def test_a_direction_without_effect_is_stopped_and_nothing_is_chosen(
    folder: Path, policy: LoadedPolicy, tmp_path: Path
) -> None:
    idle = ready(tune_world.settings(folder, **{**ONE_END, "trials": 2}, search={"strength": [0.05, 0.5]}), policy)
    trials = ended(idle, tmp_path, [tune_world.Made(effect=0.0)])
    assert {(t.outcome.state, t.outcome.why, t.outcome.episodes) for t in trials["positive"]} == {
        ("pruned", "it has no effect", idle.settings.least)
    }
    assert result.best(trials["positive"], idle) is None
    found = result.document(idle, trials)
    assert found["ends"]["positive"]["best"] is None
    assert page.render(found, tmp_path).is_file()


def test_other_forms_of_search_reach_the_hooks_as_they_were_chosen(
    folder: Path, policy: LoadedPolicy, tmp_path: Path
) -> None:
    search = {
        "strength": [0.2, 0.5], "gain": [0.5, 1.2], "neurons": [1, 3], "layers": [[1], [1, 2]],
        "spans": [["image"], ["text", "action"]], "ramp_s": [0.0, 1.0],
    }  # fmt: skip
    wide = ready(tune_world.settings(folder, **{**ONE_END, "trials": 3}, search=search), policy)
    ended(wide, tmp_path)
    facts = records.read_sidecar(tmp_path)
    for trial in told(wide, tmp_path):
        (condition,) = [c for c in facts["conditions"] if c["label"] == f"positive#{trial.number}"]
        card = facts["directions"][condition["written"]]
        assert card["span"] == sorted(trial.point.span or ())
        assert set(card["writes"]["layers"]) <= set(trial.point.layers or ())
        assert card["writes"]["neurons"] <= (trial.point.neurons or 0)
        assert card["writes"]["alpha"][1] == pytest.approx(6 * trial.point.gain)
        assert condition["strength"] == trial.point.strength
        assert condition.get("ramp_s", 0.0) == trial.point.ramp_s


# -- held-out starts and the card ------------------------------------------------------------------------------------


def checked(tuning: Tuning, policy: LoadedPolicy, out: Path, trials: Sequence[Told], **seat: Any) -> write_back.Finding:
    best = result.best(trials, tuning)
    assert best is not None
    chosen = {"positive": best}
    study = held_out.study_of(tuning, chosen, policy)
    with open_journal(study, out) as kept:
        run_study(study, kept, seats=[tune_world.Made(**seat)])
    found = held_out.check(tuning, chosen, out)
    proved = held_out.verified_range(found)
    return write_back.Finding(tuning.ends[0], best, proved or (0.1, best.point.strength), proved is not None, found)


@pytest.fixture
def own_store(tuning: Tuning, tmp_path: Path) -> DirectionStore:
    """A copy of the store."""
    from shutil import copytree

    assert tuning.settings.store is not None
    return DirectionStore(Path(copytree(tuning.settings.store, tmp_path / "store")))


def test_a_verified_range_is_written_into_the_card_with_its_evidence(
    tuning: Tuning, whole: Path, policy: LoadedPolicy, own_store: DirectionStore, tmp_path: Path
) -> None:
    found = checked(tuning, policy, tmp_path / "held", told(tuning, whole))
    strength = found.trial.point.strength
    assert [c.fails for c in found.checked] == [(), ()]
    assert found.strengths == (pytest.approx(strength / 2, abs=1e-4), strength)
    (saved,) = write_back.write(own_store, tuning, [found])
    card = own_store.load("fast")
    assert card.hash == saved.hash
    assert card.calibrated == found.strengths
    evidence = card.provenance["tuning"]
    assert (evidence["study"], evidence["verified"], evidence["trial"]) == (tuning.hash[:16], True, found.trial.number)
    assert evidence["held_out"][1]["pairs"] == 12
    assert evidence["held_out"][1]["success"][1] > 0.7
    # The axis still joins both, and what was written does not change whose tuning it is.
    assert own_store.load_axis("pace").positive == "fast"
    again = tuning.settings.model_copy(update={"store": own_store.root})
    assert ready(again, policy).hash == tuning.hash


def test_what_held_out_starts_do_not_prove_is_not_verified(
    tuning: Tuning, whole: Path, policy: LoadedPolicy, tmp_path: Path
) -> None:
    trials = told(tuning, whole)
    idle = checked(tuning, policy, tmp_path / "idle", trials, effect=0.0)
    assert (idle.verified, {c.fails for c in idle.checked}) == (False, {("the effect is not shown",)})
    errored = checked(tuning, policy, tmp_path / "errored", trials, errs=lambda job: job.start == 11)
    assert (errored.verified, errored.checked[0].success.n) == (False, 10)
    assert all("episodes errored" in c.fails for c in errored.checked)
    few = {"suites": [{"suite": "libero_object", "tasks": [3, 6], "starts": [10], "limit": 60}]}
    settings = tune_world.settings(tuning.settings.store.parent, **ONE_END, held_out=few)  # type: ignore[union-attr]
    short = checked(ready(settings, policy), policy, tmp_path / "few", trials)
    assert all(c.fails == ("success is not shown to be kept",) for c in short.checked)


def test_a_choice_that_writes_something_else_becomes_a_direction_of_its_own(
    folder: Path, policy: LoadedPolicy, own_store: DirectionStore, tmp_path: Path
) -> None:
    search = {"strength": 1.0, "gain": [0.2, 0.6]}
    louder = ready(tune_world.settings(folder, **{**ONE_END, "trials": 3}, search=search), policy)
    trials = ended(louder, tmp_path / "louder")["positive"]
    before = own_store.load("fast")
    found = checked(louder, policy, tmp_path / "held", trials)
    for _ in range(2):  # again: in place of the first
        (saved,) = write_back.write(own_store, louder, [found])
    assert own_store.load("fast").hash == before.hash
    tuned = own_store.load("fast-tuned")
    assert tuned.hash == saved.hash
    assert tuned.neurons is not None
    assert float(tuned.neurons.alpha[0]) == pytest.approx(6 * found.trial.point.gain)
    axis = own_store.load_axis("pace-tuned")
    assert (axis.negative, axis.positive) == ("slow", "fast-tuned")
    assert own_store.verify() == ()


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def made_seats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands hire `tune_world.Made` in place of processes."""

    @contextmanager
    def hire(count: int) -> Iterator[list[tune_world.Made]]:
        yield [tune_world.Made() for _ in range(count)]

    monkeypatch.setattr("sim.evaluation.study.run.processes", hire)


def tune(*words: object) -> Result:
    from sim.evaluation.tuning.cli import app

    return CliRunner().invoke(app, [str(word) for word in words])


def done(*words: object) -> Result:
    out = tune(*words)
    assert out.exit_code == 0, (out.output, out.exception)
    return out


def refused(*words: object) -> SteerError:
    error = tune(*words).exception
    assert isinstance(error, SteerError)
    return error


@pytest.mark.usefixtures("made_seats", "policy")
def test_a_verified_choice_stays_verified_and_a_new_one_is_verified_in_the_same_folder(
    folder: Path, own_store: DirectionStore, tmp_path: Path
) -> None:
    """All trials have one strength, so that only the trial tells choices apart."""
    config, out = folder / "gains.yaml", tmp_path / "out"
    search = {"strength": 1.0, "gain": [0.2, 0.6]}
    config.write_text(yaml.safe_dump(tune_world.plain(**{**ONE_END, "startup": 9}, search=search)))

    def verify(trials: int) -> dict[str, Any]:
        said = done("verify", config, "--out", out, "--trials", trials, "--store", own_store.root)
        assert "are verified on held-out starts" in said.output
        found = document(out)
        (saved,) = found["held_out"]["written"]
        card = own_store.load("fast-tuned")
        best = found["ends"]["positive"]["best"]
        assert (saved, card.calibrated) == (card.id, (0.5, 1.0))
        assert (card.provenance["tuning"]["trial"], card.provenance["tuning"]["verified"]) == (best, True)
        labels = {row["condition"] for row in study_world.rows_of(out / held_out.FOLDER)}
        assert labels == {"unsteered", *(f"direction:pace#{best}@{strength}" for strength in ("+0.5", "+1"))}
        return found  # type: ignore[no-any-return]

    done("run", config, "--out", out, "--trials", 2)
    first = verify(2)
    episodes = (out / held_out.FOLDER / JOURNAL_FILE).read_bytes()
    assert verify(2) == first
    assert (out / held_out.FOLDER / JOURNAL_FILE).read_bytes() == episodes
    # A finished tuning that runs again says what it said.
    assert "are verified on held-out starts" in done("run", config, "--out", out, "--trials", 2).output
    assert document(out) == first
    assert "are verified on held-out starts" in (out / page.FILE).read_text()

    assert "not checked on held-out starts yet" in done("run", config, "--out", out, "--trials", 6).output
    assert document(out)["held_out"] is None
    second = verify(6)
    assert second["ends"]["positive"]["best"] != first["ends"]["positive"]["best"]


def test_each_end_keeps_what_held_out_starts_said_of_its_own_choice(
    tuning: Tuning, whole: Path, tmp_path: Path
) -> None:
    found = result.document(tuning, {"positive": told(tuning, whole)})
    its = found["ends"]["positive"]
    found["ends"]["negative"] = its
    assert result.carried(found, tmp_path) == found  # nothing is there yet
    held = {
        "checked": [{"end": "negative"}, {"end": "positive"}],
        "ranges": {"positive": {"verified": True}, "negative": {"verified": False}},
        "written": ["fast@0"],
    }
    result.save({**found, "held_out": held}, tmp_path)
    assert result.carried(found, tmp_path)["held_out"] == held
    moved = {**found, "ends": {"positive": {**its, "best": its["best"] + 1}, "negative": its}}
    assert result.carried(moved, tmp_path)["held_out"] == {
        "checked": [{"end": "negative"}], "ranges": {"negative": {"verified": False}}, "written": ["fast@0"],
    }  # fmt: skip
    assert result.carried({**found, "hash": "0" * 64}, tmp_path)["held_out"] is None


def test_show_tells_the_best_trial_and_draws_the_page_again(tuning: Tuning, whole: Path, tmp_path: Path) -> None:
    trials = told(tuning, whole)
    result.save(result.document(tuning, {"positive": trials}), tmp_path)
    said = done("show", tmp_path)
    best = result.best(trials, tuning)
    assert best is not None
    assert f"trial {best.number} of 6" in said.output
    assert "not checked on held-out starts yet" in said.output
    assert said.output.count(" pruned ") == sum(t.outcome.state == "pruned" for t in trials)
    assert (tmp_path / page.FILE).is_file()


def test_a_document_that_lacks_something_is_refused_in_one_sentence(
    tuning: Tuning, whole: Path, tmp_path: Path
) -> None:
    found = result.document(tuning, {"positive": told(tuning, whole)})
    for torn in (
        {"schema": result.SCHEMA},
        {**found, "ends": {"positive": {"best": 0}}},
        {**found, "ends": []},
        {**found, "held_out": {"checked": []}},
    ):
        (tmp_path / result.FILE).write_text(json.dumps(torn))
        error = refused("show", tmp_path)
        assert (error.code, "is not a whole tuning.json: run `steer tune run` again" in error.sentence) == (
            "bad_record", True,
        )  # fmt: skip
    assert refused("show", tmp_path / "nowhere").code == "no_tuning"


@pytest.mark.parametrize("words", [("run", "--dry-run"), ("run", "--out", "out"), ("verify", "--out", "out")])
def test_no_workers_are_refused_before_anything_is_read(words: tuple[str, ...], tmp_path: Path) -> None:
    error = refused(*words, tmp_path / "none.yaml", "--workers", 0)
    assert (error.code, error.sentence) == ("bad_count", "0 workers were asked for: expected at least 1")


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_page_without_its_packages_is_refused_in_one_sentence(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SteerError, match=f"the page needs {missing}: install the extra `sim`") as error:
        page.render({}, tmp_path)
    assert error.value.code == "no_jinja2"


# -- processes, Ray, in real scenes -----------------------------------------------------------------------------------

REAL: dict[str, Any] = {
    "suites": [{"suite": "libero_object", "tasks": [6], "starts": 2, "limit": study_world.LIMIT}],
    "held_out": {"suites": [{"suite": "libero_object", "tasks": [6], "starts": "10-11", "limit": study_world.LIMIT}]},
    "trials": 4, "batch": 2, "startup": 2, "least": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def config(folder: Path, policy: LoadedPolicy) -> Path:
    path = folder / "real.yaml"
    path.write_text(yaml.safe_dump(tune_world.plain(**REAL)))
    return path


def command(*words: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", "from steer_runtime.cli.main import main; main()", "tune", *words]
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        line, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def document(out: Path) -> Any:
    return json.loads((out / result.FILE).read_text())


@pytest.fixture(scope="module")
def real(config: Path, folder: Path) -> Path:
    """Both ends, by one worker process in one go."""
    out = folder / "real"
    process = command("run", str(config), "--out", str(out))
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "tuning.html" in said
    return out


@pytest.mark.heavy
def test_a_tuning_killed_at_any_moment_ends_with_the_same_trials(config: Path, real: Path, tmp_path: Path) -> None:
    for after in (1, 5, 9):
        process = command("run", str(config), "--out", str(tmp_path), "--workers", "2")
        end = time.monotonic() + 240
        while (tmp_path / JOURNAL_FILE).is_file() is False or (tmp_path / JOURNAL_FILE).read_bytes().count(
            b"\n"
        ) <= after:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = command("run", str(config), "--out", str(tmp_path), "--workers", "2")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert document(tmp_path) == document(real)
    study_world.require_equal(real, tmp_path)


@pytest.mark.heavy
def test_ray_gives_the_same_trials(config: Path, real: Path, tmp_path: Path) -> None:
    process = command("run", str(config), "--out", str(tmp_path), "--ray", "local", "--workers", "2")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert document(tmp_path) == document(real)


@pytest.mark.heavy
def test_the_card_changes_only_where_it_is_verified_or_said_aloud(config: Path, real: Path, folder: Path) -> None:
    """A tiny random policy fails every task, and two starts prove nothing of the changes that its trials were chosen for."""
    process = command("verify", str(config), "--out", str(real))
    said, errors = process.communicate()
    assert process.returncode == 1, said + errors
    nothing = "nothing is verified, so no card was changed; --unverified writes the tuned range all the same"
    assert errors.splitlines()[-1] == nothing
    assert document(real)["held_out"]["written"] == []
    assert DirectionStore(folder / "store").load("fast").calibrated is None
