"""A study's YAML: what it may say, and the one sentence for what it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fabricate
import numpy as np
import pytest
import study_world
import yaml

from sim.benchmark import find_task, use_software_rendering
from sim.evaluation.study.conditions import Condition, directions_of, resolve
from sim.evaluation.study.plan import jobs
from sim.evaluation.study.run import reference
from sim.evaluation.study.settings import PRO, STANDARD, StudySettings, check, read_settings
from steer_runtime.directions.direction import Direction
from steer_runtime.directions.store import DirectionStore
from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.policy import OpenVLAPolicy

STEERED = {"kind": "direction", "name": "pace", "strengths": [1]}


@pytest.fixture(scope="module", autouse=True)
def _renderer() -> None:
    use_software_rendering()


@pytest.fixture(scope="module")
def policy() -> OpenVLAPolicy:
    return fabricate.tiny_policy()


@pytest.fixture(scope="module")
def folder(policy: OpenVLAPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_world.store(tmp_path_factory.mktemp("study"), policy).root


def asked(folder: Path, *conditions: Any, **changes: Any) -> StudySettings:
    return study_world.settings(policy="tiny", store=str(folder), conditions=list(conditions), **changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"polcy": "x"}, "polcy: Extra inputs are not permitted"),
        ({"conditions": []}, "conditions: Tuple should have at least 1 item"),
        ({"conditions": ["unstered"]}, r"conditions.0: Input tag 'unstered' .* expected tags: 'unsteered'"),
        ({"conditions": [{**STEERED, "strengths": [0.5, 0]}]}, r"strengths.1: strength 0 is the condition `zero`"),
        ({"conditions": [{**STEERED, "strengths": [1.5]}]}, r"strengths.0: Input should be less than or equal to 1"),
        ({"conditions": [{**STEERED, "strengths": [float("nan")]}]}, r"strengths.0: Input should be"),
        ({"conditions": [{**STEERED, "strengths": [1, 1]}]}, r"strengths: a number is given twice"),
        ({"conditions": [{**STEERED, "strengths": [True]}]}, r"strengths.0: expected a number"),
        ({"conditions": [{"kind": "scale", "factors": [True]}]}, r"factors.0: expected a number"),
        ({"conditions": [{**STEERED, "draws": 3}]}, r"draws: Extra inputs are not permitted"),
        ({"conditions": [{"kind": "prompt", "wording": "slowly"}]}, r"wording: expected a wording with \{\} once"),
        ({"conditions": [{"kind": "scale", "factors": [0]}]}, r"factors.0: Input should be greater than 0"),
        ({"suites": [{"suite": "libero_object", "tasks": "0-x"}]}, r"tasks.*expected whole numbers such as 0-4,7"),
        ({"suites": [{"suite": "libero_object", "tasks": [1, 1]}]}, r"tasks.*a number is given twice"),
        ({"suites": [{"suite": "libero_object", "tasks": "5-3,0"}]}, r"tasks.*5-3 counts down"),
        (
            {"suites": [{"suite": "libero_object", "starts": "0-9999999"}]},
            r"starts: 0-9999999 is more than 100000 numbers",
        ),
        ({"suites": [{"suite": "libero_object", "starts": 0}]}, r"starts: expected at least 1"),
        ({"suites": [{"suite": "libero_object", "limit": 0}]}, r"limit: Input should be greater than or equal to 1"),
        ({"suites": [{"suite": "libero_object", "layout": "wild"}]}, r"layout: Input should be 'official'"),
        ({"meshes": "thick"}, r"meshes: Input should be 'original' or 'thin'"),
        ({"device": "tpu"}, r"device: String should match pattern"),
        ({"size": 4}, r"size: Input should be greater than or equal to 16"),
        ({"seeds": [-1]}, r"seeds: expected whole numbers from 0 on"),
        ({"policy": None}, r"policy: Input should be a valid string \(given None\)"),
    ],
)
def test_bad_values_are_one_sentence_that_names_their_place(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SteerError, match=sentence) as refused:
        check({**study_world.plain("tiny", "store"), **changes}, "my.yaml")
    assert refused.value.code == "bad_study"
    assert refused.value.sentence.startswith("my.yaml: ")
    assert "\n" not in refused.value.sentence


def test_unreadable_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("policy: [")
    for path in (tmp_path / "a.yaml", tmp_path / "none.yaml"):
        with pytest.raises(SteerError, match="is not readable YAML") as refused:
            read_settings(path)
        assert "\n" not in refused.value.sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("policy: a\nconditions: [unsteered]\nconditions: [zero]\n", "key 'conditions' is given twice"),
        ("seeds: 2020-13-45\n", "is not readable YAML"),
        ("[" * 5000, "is not readable YAML"),
    ],
)
def test_yaml_that_says_two_things_or_nothing_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SteerError, match=sentence) as refused:
        read_settings(tmp_path / "a.yaml")
    assert "\n" not in refused.value.sentence
    assert len(refused.value.sentence) < 1000


def test_a_merged_key_may_be_given_again(tmp_path: Path) -> None:
    plain = yaml.safe_dump(study_world.plain("./p.yaml", "store", conditions=["unsteered"]))
    (tmp_path / "a.yaml").write_text(plain + "<<: {size: 64, meshes: original}\n")
    found = read_settings(tmp_path / "a.yaml")
    assert (found.size, found.meshes) == (32, "thin")


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(study_world.plain("./p.yaml", "store")))
    found = read_settings(tmp_path / "a.yaml")
    assert (Path(found.policy), found.store) == (tmp_path / "p.yaml", tmp_path / "store")


def test_every_shipped_study_is_readable() -> None:
    paths = sorted((Path(__file__).parents[2] / "configs" / "evaluations").glob("*.yaml"))
    assert paths
    for path in paths:
        read_settings(path)


@pytest.mark.parametrize(
    ("suite", "code"),
    [
        ({"suite": "libero_objet"}, "unknown_suite"),
        ({"suite": "libero_object", "tasks": [10]}, "task_out_of_range"),
        ({"suite": "libero_object", "tasks": [0], "starts": [50]}, "init_state_out_of_range"),
        ({"suite": "libero_goal", "tasks": [0], "layout": "random"}, "no_layouts"),
        ({"suite": "standard", "tasks": [0]}, "bad_study"),
    ],
)
def test_suites_tasks_and_states_that_do_not_exist_are_refused(suite: dict[str, Any], code: str, folder: Path) -> None:
    with pytest.raises(SteerError) as refused:
        jobs(asked(folder, "unsteered", suites=[suite]), [Condition("unsteered", "unsteered")])
    assert refused.value.code == code


def test_standard_and_pro_stand_for_five_and_sixteen_suites(folder: Path) -> None:
    wanted = asked(
        folder, "unsteered", suites=[{"suite": "standard", "starts": 1}, {"suite": "libero_pro", "starts": 1}]
    )
    planned = jobs(wanted, [Condition("unsteered", "unsteered")])
    assert {job.suite for job in planned} == {*STANDARD, *PRO}
    assert (len(STANDARD), len(PRO), len(planned)) == (5, 16, 4 * 10 + 90 + 16 * 10)
    limits = {job.suite: job.limit for job in planned}
    assert (limits["libero_90"], limits["libero_10_swap"], limits["libero_spatial_lan"]) == (400, 520, 220)


@pytest.mark.parametrize(
    ("suite", "instruction"),
    [
        ("libero_goal", "open the middle drawer of the cabinet"),
        ("libero_goal_swap", "open the middle drawer of the cabinet"),
        ("libero_goal_task", "open the bottom drawer of the cabinet"),
        ("libero_goal_lan", "open the cabinet\u2019s middle drawer"),
        ("libero_object_task", "pick the cream cheese and place it in the basket"),
    ],
)
def test_a_policy_is_told_what_a_suite_changed_although_file_names_stay(suite: str, instruction: str) -> None:
    assert find_task(suite, 0).instruction == instruction


def test_conditions_of_a_start_are_one_pair_with_one_seed(policy: OpenVLAPolicy, folder: Path) -> None:
    wanted = asked(folder, "unsteered", STEERED, seeds=[3, 4])
    planned = jobs(wanted, resolve(wanted, policy))
    assert [job.condition for job in planned[:2]] == ["unsteered", "direction:pace@+1"]
    by_pair: dict[str, set[tuple[int, int]]] = {}
    for job in planned:
        by_pair.setdefault(job.pair, set()).add((job.start, job.seed))
    assert len(by_pair) == 4
    assert all(len(shared) == 1 for shared in by_pair.values())
    assert len({job.key for job in planned}) == len(planned) == 8


def test_a_condition_may_run_on_the_first_starts_alone(policy: OpenVLAPolicy, folder: Path) -> None:
    wanted = asked(folder, "unsteered", {**STEERED, "starts": 1})
    planned = jobs(wanted, resolve(wanted, policy))
    assert [(job.start, job.condition) for job in planned] == [
        (0, "unsteered"), (0, "direction:pace@+1"), (1, "unsteered"),
    ]  # fmt: skip


def test_signed_strengths_write_the_ends_of_an_axis_and_opposites_the_other(
    policy: OpenVLAPolicy, folder: Path
) -> None:
    found = resolve(
        asked(folder, {**STEERED, "strengths": [-0.5, 1]}, {"kind": "opposite", "of": "pace", "strengths": [0.5]}),
        policy,
    )
    told = [(c.label, c.strength, c.written.id.split("@")[0], c.written.strength) for c in found if c.written]
    assert told == [
        ("direction:pace@-0.5", -0.5, "slow", 0.5),
        ("direction:pace@+1", 1.0, "fast", 1.0),
        ("opposite:pace@-0.5", -0.5, "slow", 0.5),
    ]


def test_the_opposite_of_a_direction_is_its_negative(policy: OpenVLAPolicy, folder: Path) -> None:
    (found,) = resolve(asked(folder, {"kind": "opposite", "of": "fast", "strengths": [1]}), policy)
    assert found.written is not None
    assert found.written.direction.neurons is not None
    assert (found.written.direction.neurons.alpha == -6).all()


def test_random_draws_have_the_form_and_place_of_what_they_answer(policy: OpenVLAPolicy, folder: Path) -> None:
    drawn = resolve(asked(folder, {"kind": "random", "like": "pace", "strengths": [-1, 1], "draws": 3}), policy)
    assert [c.label for c in drawn[:3]] == ["random:pace#0@-1", "random:pace#0@+1", "random:pace#1@-1"]
    assert [c.draw for c in drawn] == [0, 0, 1, 1, 2, 2]
    written = [c.written.direction for c in drawn if c.written is not None]
    assert len({d.hash for d in written}) == 6
    for direction in written:
        assert direction.neurons is not None
        assert sorted(direction.neurons.layer.tolist()) == [1, 1, 2]


def test_random_words_answer_what_adds_a_vector(policy: OpenVLAPolicy, folder: Path) -> None:
    lm = policy.config.lm
    vector = {2: np.linspace(1, 2, lm.d_model, dtype=np.float32)}
    added = Direction("push", "lm", policy.model_hash, lm.layers, lm.d_model, lm.d_ff, op="add", dense=vector)
    DirectionStore(folder).save(added)
    like = {"like": "push", "strengths": [1], "draws": 2}
    words, plain = {**like, "kind": "random_words", "words": 3}, {**like, "kind": "random"}
    drawn = resolve(asked(folder, words, plain), policy)
    assert [(c.kind, c.label, c.draw) for c in drawn] == [
        ("random_words", "random_words:push#0@+1", 0), ("random_words", "random_words:push#1@+1", 1),
        ("random", "random:push#0@+1", 0), ("random", "random:push#1@+1", 1),
    ]  # fmt: skip
    written = [c.written.direction for c in drawn if c.written is not None]
    assert len({d.hash for d in written}) == 4
    assert all(
        np.linalg.norm((d.dense or {})[2]) == pytest.approx(np.linalg.norm(vector[2]), rel=1e-5) for d in written
    )
    assert len(written[0].provenance["words"]) == 3
    # What its seed and parent decide is no direction that the sidecar must keep.
    assert directions_of(drawn) == {}
    with pytest.raises(SteerError, match="writes neurons: random words are controls of vectors"):
        resolve(asked(folder, {**words, "like": "pace"}), policy)


def test_strengths_below_zero_need_an_axis(policy: OpenVLAPolicy, folder: Path) -> None:
    with pytest.raises(SteerError, match="is below 0") as refused:
        resolve(asked(folder, {**STEERED, "name": "fast", "strengths": [-1]}), policy)
    assert refused.value.code == "bad_strength"


def test_one_condition_twice_is_refused(policy: OpenVLAPolicy, folder: Path) -> None:
    with pytest.raises(SteerError, match="'unsteered' is given twice"):
        resolve(asked(folder, "unsteered", "unsteered"), policy)


def test_the_reference_simulator_is_told_by_its_versions() -> None:
    assert reference({"mujoco": "3.2.3", "robosuite": "1.4.0"})["is_reference"]
    other = reference({"mujoco": "3.17.0", "robosuite": "1.4.0"})
    assert (other["is_reference"], other["differing"]) == (False, {"mujoco": "3.17.0"})


def test_a_condition_of_no_task_is_refused(folder: Path, policy: OpenVLAPolicy) -> None:
    slow = {"kind": "prompt", "wording": "{}, slowly", "tasks": [7]}
    settings = asked(folder, "unsteered", slow)
    with pytest.raises(SteerError, match=r"'prompt:\{\}, slowly' runs on no task: its `tasks` \[7\]"):
        jobs(settings, resolve(settings, policy))


def test_a_condition_may_be_of_some_tasks_alone(folder: Path, policy: OpenVLAPolicy) -> None:
    slow = {"kind": "prompt", "wording": "{}, slowly", "tasks": [1]}
    settings = asked(folder, "unsteered", slow, suites=[{"suite": "libero_object", "tasks": [0, 1], "starts": 1}])
    planned = jobs(settings, resolve(settings, policy))
    assert [(job.task_id, job.condition) for job in planned] == [
        (0, "unsteered"), (1, "unsteered"), (1, "prompt:{}, slowly"),
    ]  # fmt: skip
