"""Vision training on small fabricated recordings in the real file format."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from fabricated import COLOURS, demonstrations_folder, frames_folder
from typer.testing import CliRunner

from sim.demonstrations import as_seen, episodes_in, read
from sim.training import checkpoints, trainer
from sim.training.cli import app
from sim.training.frame_data import FrameData, load_frames, object_class
from sim.training.log import plot, read_log
from sim.training.settings import PolicyTraining, TowerSettings, VisionTraining, read_settings
from sim.training.vision import VisionSubject, localisation
from sim.training.vision_weights import load_tower, save_tower
from steer_runtime.errors import SteerError

TINY = TowerSettings(image_size=64, hidden=64, blocks=1, heads=2)


def settings(**changes: object) -> VisionTraining:
    values: dict[str, object] = {
        "kind": "vision", "name": "tiny", "frames": ("frames",), "steps": 6, "batch": 4, "warmup": 2,
        "learning_rate": 3e-3, "tower": TINY, "log_every": 1, "validate_every": 3, "checkpoint_every": 2,
    }  # fmt: skip
    return VisionTraining(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> FrameData:
    return load_frames([frames_folder(tmp_path_factory.mktemp("frames"))])


def subject(data: FrameData, **changes: object) -> VisionSubject:
    return VisionSubject(settings(**changes), data, {"same": data})


def run(data: FrameData, folder: Path, **options: object) -> tuple[VisionSubject, trainer.Result]:
    chosen = settings(**{k: v for k, v in options.items() if k not in {"seconds", "on_step"}})
    made = VisionSubject(chosen, data, {"same": data})
    keywords = {k: v for k, v in options.items() if k in {"seconds", "on_step"}}
    return made, trainer.train(chosen, made, folder, **keywords)  # type: ignore[arg-type]


def weights(made: VisionSubject) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.tower.named_parameters()}


def stop_at(step: int):  # type: ignore[no-untyped-def]
    """Ctrl-C while step `step` ends."""

    def on_step(progress: trainer.Progress) -> None:
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


def test_a_place_points_at_its_object_in_the_image_as_seen(data: FrameData) -> None:
    assert data.classes == ("basket", "milk", "soup")
    for k, colour in ((0, COLOURS[1]), (1, COLOURS[0]), (2, COLOURS[2])):
        hits = 0
        for n in range(len(data)):
            column, row = (data.places[n, k] * 64).long().tolist()
            hits += bool((data.agentview[n, :, row, column] == torch.from_numpy(colour)).all())
        assert hits > 0.7 * len(data)  # the rest is covered by another square


def test_episodes_are_frames_at_their_pictured_steps(tmp_path: Path) -> None:
    folder = demonstrations_folder(tmp_path / "played", episodes=2, stride=3)
    played = load_frames([folder])
    episodes = [read(path) for path in episodes_in(folder)]
    at = [e.arrays["obs/image_index"].astype(int) for e in episodes]
    assert len(played) == sum(map(len, at))
    names = [object_class(n) for n in json.loads(episodes[0].attributes["object_names"])]
    expected = episodes[0].arrays["privileged/positions"][at[0]][:, names.index(played.classes[0])]
    assert torch.equal(played.positions[: len(at[0]), 0], torch.from_numpy(expected))
    assert torch.equal(
        played.wrist[1].permute(1, 2, 0),
        torch.from_numpy(as_seen(episodes[0].arrays["obs/eye_in_hand_rgb"])[1].copy()),
    )


def test_turns_are_learnt_from_what_is_seen(data: FrameData) -> None:
    """A world in which the turn is the place tells that the label reaches the head."""
    turned = replace(data, turns=2 * data.places[..., 0], hand_turn=torch.zeros(len(data)))
    made = VisionSubject(settings(turn=1.0, learning_rate=3e-3, batch=8), turned, {"same": turned})
    before = localisation(made.tower.eval(), turned)
    optimiser = torch.optim.Adam(made.tower.parameters(), 3e-3)
    for step in range(120):
        made.tower.train()
        optimiser.zero_grad()
        made.loss(step)[0].backward()
        optimiser.step()
    after = localisation(made.tower.eval(), turned)
    assert after["turn_error"] < 0.5 * before["turn_error"]
    assert after["wrist_turn_error"] < 0.5 * before["wrist_turn_error"]


def test_an_episode_without_pictures_is_refused(tmp_path: Path) -> None:
    folder = demonstrations_folder(tmp_path / "blind", pictures=False)
    with pytest.raises(SteerError, match="holds no agentview_rgb, eye_in_hand_rgb: expected") as refused:
        load_frames([folder])
    assert refused.value.code == "not_a_demonstration"


def test_the_tower_learns_to_find_objects(data: FrameData, tmp_path: Path) -> None:
    before = localisation(subject(data).tower.eval(), data)
    made, _ = run(data, tmp_path / "run", steps=120, batch=8, warmup=10, checkpoint_every=120, validate_every=120)
    after = localisation(made.tower.eval(), data)
    assert after["xy_median_cm"] < 0.4 * before["xy_median_cm"]
    assert after["wrist_place_median_px"] < 0.4 * before["wrist_place_median_px"]


def test_an_interrupted_run_resumes_to_the_same_bits(data: FrameData, tmp_path: Path) -> None:
    whole, _ = run(data, tmp_path / "whole")
    _, stopped = run(data, tmp_path / "parts", on_step=stop_at(3))
    assert (stopped.finished, stopped.step) == (False, 3)
    resumed, result = run(data, tmp_path / "parts")
    assert result.finished
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())


def test_a_resumed_log_has_each_step_once(data: FrameData, tmp_path: Path) -> None:
    run(data, tmp_path / "run", on_step=stop_at(3))
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 5, "train/loss": 1.0}) + '\n{"step": 6, "tr')
    run(data, tmp_path / "run")
    assert [row["step"] for row in read_log(log) if "train/loss" in row] == [1, 2, 3, 4, 5, 6]


def test_resuming_with_another_configuration_is_refused(data: FrameData, tmp_path: Path) -> None:
    run(data, tmp_path / "run", on_step=stop_at(2))
    with pytest.raises(SteerError, match=r"learning_rate was 0\.003 and is 0\.001") as refused:
        run(data, tmp_path / "run", learning_rate=1e-3)
    assert refused.value.code == "other_configuration"


def test_resuming_with_other_data_is_refused(data: FrameData, tmp_path: Path) -> None:
    run(data, tmp_path / "run", on_step=stop_at(2))
    other = load_frames([frames_folder(tmp_path / "other", seed=9)])
    with pytest.raises(SteerError, match="frames_sha256"):
        run(other, tmp_path / "run")


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_torn_checkpoint_is_refused_and_its_deletion_resumes_from_the_one_before(
    data: FrameData, tmp_path: Path, damage: str
) -> None:
    run(data, tmp_path / "run", steps=4)
    run(data, tmp_path / "other", steps=4)
    path = checkpoints.newest(tmp_path / "run" / "checkpoints")
    assert path is not None
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(SteerError) as refused:
        run(data, tmp_path / "run", steps=4)
    assert refused.value.code == "torn_checkpoint"
    path.unlink()
    again, _ = run(data, tmp_path / "run", steps=4)
    whole, _ = run(data, tmp_path / "other", steps=4)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(again).items())


def test_a_full_disk_keeps_the_last_checkpoint(
    data: FrameData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(data, tmp_path / "run", on_step=stop_at(2))
    kept = checkpoints.newest(tmp_path / "run" / "checkpoints")
    assert kept is not None
    before = kept.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(SteerError) as refused:
            run(data, tmp_path / "run")
    assert refused.value.code == "disk_full"
    assert checkpoints.newest(tmp_path / "run" / "checkpoints") == kept
    assert kept.read_bytes() == before
    assert run(data, tmp_path / "run")[1].finished


def test_a_second_training_in_the_same_folder_is_refused(data: FrameData, tmp_path: Path) -> None:
    def intrude(progress: trainer.Progress) -> None:
        if progress.step == 1:
            with pytest.raises(SteerError, match="another training"):
                run(data, tmp_path / "run")

    run(data, tmp_path / "run", steps=1, on_step=intrude)


def test_a_tower_file_gives_the_same_places_and_a_changed_one_is_refused(data: FrameData, tmp_path: Path) -> None:
    made = subject(data)
    save_tower(made.tower, made.heat, 64, tmp_path, {"what": "test"})
    loaded = load_tower(tmp_path)
    pixels = torch.rand(1, 6, 64, 64) * 2 - 1
    torch.testing.assert_close(
        loaded.tower.see(pixels).position, made.tower.eval().see(pixels).position, atol=2e-3, rtol=0
    )
    path = tmp_path / "vision.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(SteerError) as refused:
        load_tower(tmp_path)
    assert refused.value.code == "torn_file"


def test_an_unknown_key_in_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("kind: vision\nname: x\nframes: [a]\nsteps: 3\nlearning_speed: 2\n")
    with pytest.raises(SteerError, match="learning_speed") as refused:
        read_settings(path, VisionTraining)
    assert refused.value.code == "bad_training_config"


def test_the_shipped_files_are_valid() -> None:
    folder = Path(__file__).parents[2] / "configs" / "training"
    for pattern, kind in (("vision*.yaml", VisionTraining), ("policy*.yaml", PolicyTraining)):
        files = sorted(folder.glob(pattern))
        assert files
        for path in files:
            read_settings(path, kind)


def test_runs_of_one_name_are_drawn_apart(data: FrameData, tmp_path: Path) -> None:
    for parent in ("first", "second"):
        run(data, tmp_path / parent / "training", steps=2)
    page = plot(
        [tmp_path / "first" / "training", tmp_path / "second" / "training"], tmp_path / "curves.html"
    ).read_text()
    assert "first\\u002ftraining" in page or "first/training" in page
    assert "second\\u002ftraining" in page or "second/training" in page


def test_the_command_trains_exports_and_plots(tmp_path: Path) -> None:
    frames_folder(tmp_path / "data" / "frames")
    frames_folder(tmp_path / "data" / "other", shards=1, frames=4, seed=5)
    content = settings(steps=2, held_out=("other",)).model_dump(mode="json")
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(content))
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app, ["vision", str(config), "--data", str(tmp_path / "data"), "--out", str(out)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    card = json.loads((out / "tiny" / "vision" / "card.json").read_text())
    assert {"same/xy_median_cm", "held_out/xy_median_cm"} <= card["scores"].keys()
    assert load_tower(out / "tiny" / "vision").heat.classes == ("basket", "milk", "soup")
    drawn = CliRunner().invoke(app, ["plot", str(out / "tiny")], catch_exceptions=False)
    assert drawn.exit_code == 0
    page = (out / "tiny" / "curves.html").read_text()
    assert "valid/held_out/xy_median_cm" in page.replace("\\u002f", "/")
