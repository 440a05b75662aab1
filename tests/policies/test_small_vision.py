"""The small vision tower, proprioception and action chunks in the same policy class as the published model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import fabricate
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from steer_runtime.errors import SteerError
from steer_runtime.policies.objects.config import HeatmapConfig
from steer_runtime.policies.objects.heatmap import GEOMETRY, PARTS, HeatmapTower, bearing, geometry
from steer_runtime.policies.objects.proprioception import state_vector
from steer_runtime.policies.objects.tokens import named
from steer_runtime.policies.openvla.checkpoint import load_checkpoint, save_checkpoint
from steer_runtime.policies.openvla.config import OpenVLAConfig, Slot, emit_config, parse_config
from steer_runtime.policies.openvla.model import OpenVLAModel
from steer_runtime.policies.openvla.policy import OpenVLAPolicy

HEAT = HeatmapConfig(classes=("soup", "basket", "milk"), hidden=64, blocks=1, heads=2)


def small_config(**changes: object) -> OpenVLAConfig:
    values: dict[str, object] = {
        "dino": None, "siglip": None, "heatmap": HEAT, "image_size": 64, "state_tokens": 2, "chunk": 2,
    }  # fmt: skip
    return fabricate.tiny_config(**{**values, **changes})


def small_policy(**changes: object) -> OpenVLAPolicy:
    torch.manual_seed(0)
    model = OpenVLAModel(small_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("language_model") and parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape) * 2.0 * parameter.shape[-1] ** -0.5)
    return OpenVLAPolicy(model.requires_grad_(False).eval(), fabricate.tiny_tokenizer(), fabricate.tiny_statistics())


@pytest.fixture(scope="module")
def policy() -> OpenVLAPolicy:
    return small_policy()


SLOTS = (Slot("pace", ("slow", "fast", "go"), (5, 6, 7)), Slot("height", ("low", "high"), (9, 11)))


@pytest.fixture(scope="module")
def speaking() -> OpenVLAPolicy:
    """A policy that says two words and decodes its actions in parallel."""
    return small_policy(slots=SLOTS, parallel=True)


class _Roles:
    def __init__(self) -> None:
        self.heard: list[list[str]] = []

    def set_roles(self, tower: str, roles: list[str]) -> None:
        self.heard.append(list(roles))


def test_config_survives_its_json() -> None:
    assert parse_config(emit_config(small_config())) == small_config()


@pytest.mark.parametrize(
    "changes",
    [
        {"heatmap": None},
        {"dino": fabricate.tiny_config().dino},
        {"image_size": 48},
        {"heatmap": replace(HEAT, hidden=40)},
        {"heatmap": replace(HEAT, classes=("soup", "soup"))},
        {"names": ((5,),)},
        {
            "heatmap": None,
            "dino": fabricate.tiny_config().dino,
            "siglip": fabricate.tiny_config().siglip,
            "names": ((5,),),
        },
        {"chunk": 0},
        {"state_tokens": 0},
        {"slots": (Slot("pace", ("slow", "fast"), (5,)),)},
        {"prompt": "go"},
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(SteerError) as refused:
        small_config(**changes)
    assert refused.value.code == "bad_model_config"


def test_a_checkpoint_comes_back_bit_for_bit(policy: OpenVLAPolicy, tmp_path: Path) -> None:
    directory = save_checkpoint(policy.model, tmp_path / "saved", fabricate.STATISTICS, tokenizer=policy.tokenizer)
    loaded, report = load_checkpoint(directory)
    assert not report.noteworthy
    ours = dict(policy.model.named_parameters())
    assert all(torch.equal(ours[name], p) for name, p in loaded.named_parameters())
    assert {name for name, _ in loaded.named_parameters()} == set(ours)


def test_a_checkpoint_without_a_tensor_of_the_tower_is_refused(policy: OpenVLAPolicy, tmp_path: Path) -> None:
    directory = save_checkpoint(policy.model, tmp_path / "saved", fabricate.STATISTICS)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["vision_backbone.heatmap.name"]
    save_file(tensors, str(path))
    with pytest.raises(SteerError, match=r"vision_backbone\.heatmap\.name"):
        load_checkpoint(directory)


def test_an_inference_is_one_vision_pass_and_seven_forwards_an_action(policy: OpenVLAPolicy) -> None:
    passes, forwards, roles = [], [], _Roles()
    handles = [
        policy.model.heatmap.register_forward_hook(lambda *_: passes.append(1)),
        policy.model.language_model.model.register_forward_hook(lambda *_: forwards.append(1)),
    ]
    policy.announce_roles_to(roles)  # type: ignore[arg-type]
    try:
        chunk = policy.infer(fabricate.make_observation(policy))
    finally:
        policy.announce_roles_to(None)
        for handle in handles:
            handle.remove()
    assert chunk.actions.shape == (2, 7)
    assert (len(passes), len(forwards)) == (1, 14)
    assert policy.towers["lm"].firings_per_inference == 14
    prompt = len(policy.prompt_ids(fabricate.make_observation(policy).instruction))
    assert roles.heard[0] == ["text", *["image"] * policy.config.patches, *["state"] * 2, *["text"] * (prompt - 1)]
    assert roles.heard[1:] == [["action"]] * 13


def test_words_are_said_first_and_actions_come_in_one_forward(speaking: OpenVLAPolicy) -> None:
    roles, seen = _Roles(), fabricate.make_observation(speaking)
    speaking.reset()
    told = speaking.word_logits(seen)
    speaking.announce_roles_to(roles)  # type: ignore[arg-type]
    try:
        chunk = speaking.infer(seen)
    finally:
        speaking.announce_roles_to(None)
    assert roles.heard[1:] == [["text"], ["text", *["action"] * 14]]
    assert speaking.towers["lm"].firings_per_inference == 3
    for slot, word in zip(SLOTS, speaking.said, strict=True):
        best = int(told[slot.name].argmax())
        assert (word, chunk.notes[f"said_{slot.name}"]) == (slot.words[best], best)


def test_a_said_word_decides_the_actions(speaking: OpenVLAPolicy) -> None:
    seen, entry = fabricate.make_observation(speaking), speaking.model.embedding_entry
    speaking.reset()
    before = speaking.logits(seen)
    table = speaking.model.language_model.model.embed_tokens.weight

    def say_otherwise(_: object, __: object, out: torch.Tensor) -> torch.Tensor | None:
        if out.shape[1] == 15:  # the last word and the queries
            other = next(i for i in SLOTS[1].ids if not torch.equal(table[i], out[0, 0]))
            return torch.cat((table[other][None, None], out[:, 1:]), 1)
        return None

    handle = entry.register_forward_hook(say_otherwise)
    try:
        after = speaking.logits(seen)
    finally:
        handle.remove()
    assert not torch.equal(before, after)
    assert torch.equal(before, speaking.logits(seen))


def test_each_camera_and_the_state_and_the_last_gripper_command_change_the_logits(policy: OpenVLAPolicy) -> None:
    seen = fabricate.make_observation(policy)
    policy.reset()
    before = policy.logits(seen)[0]
    other = np.full((64, 64, 3), 200, dtype=np.uint8)
    for changed in (
        replace(seen, images={**seen.images, "agentview": other}),
        replace(seen, images={**seen.images, "wrist": other}),
        replace(seen, state=np.array([0.2, 0, 0, 0, 0, 0, 0, 0])),
    ):
        assert not torch.equal(policy.logits(changed)[0], before)
    policy.infer(seen)
    policy.told_gripper(1.0)
    assert not torch.equal(policy.logits(seen)[0], before)
    policy.reset()
    assert torch.equal(policy.logits(seen)[0], before)


def test_a_missing_wrist_image_and_a_bad_state_are_refused(policy: OpenVLAPolicy) -> None:
    seen = fabricate.make_observation(policy)
    with pytest.raises(SteerError) as camera:
        policy.infer(replace(seen, images={"agentview": seen.images["agentview"]}))
    with pytest.raises(SteerError) as state:
        policy.infer(replace(seen, state=np.full(8, np.nan)))
    assert (camera.value.code, state.value.code) == ("missing_camera", "bad_state")


def test_a_place_is_the_mean_of_its_heatmap() -> None:
    tower = HeatmapTower(HEAT, 64)
    with torch.no_grad():
        for layer in (tower.front.heat, tower.front.offset):
            layer.weight.zero_()
            torch.nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        seen = tower.see(torch.randn(2, 6, 64, 64))
    assert seen.heatmap.shape == (2, 3, 256)
    torch.testing.assert_close(seen.place, torch.full((2, 3, 2), 0.5))


def test_a_name_in_the_prompt_carries_the_objects_token() -> None:
    words = ((5, 6), (6,), (9,))
    found = named([[1, 4, 5, 6, 2], [0, 0, 9, 6, 5]], words)
    assert found.shape == (2, 5, 3)
    assert found.nonzero().tolist() == [[0, 3, 0], [0, 3, 1], [1, 2, 2], [1, 3, 1]]
    policy = small_policy(names=words)
    model = policy.model
    text, objects = torch.zeros(1, 5, 32), torch.randn(1, 3, 32)
    grounded = model.ground(text, objects, [[1, 4, 5, 6, 2]])
    torch.testing.assert_close(grounded[0, 3], objects[0, 0] + objects[0, 1])
    assert not grounded[0, [0, 1, 2, 4]].any()
    assert parse_config(emit_config(policy.config)) == policy.config


def test_equal_rotations_give_equal_states() -> None:
    down = state_vector(np.array([0, 0, 0, np.pi, 0, 0, 0.04, -0.04]), -1.0)
    same = state_vector(np.array([0, 0, 0, -np.pi, 0, 0, 0.04, -0.04]), -1.0)
    np.testing.assert_allclose(down, same, atol=1e-6)
    np.testing.assert_allclose(down[3:9], [1, 0, 0, 0, -1, 0], atol=1e-6)


def test_a_bearing_is_the_same_after_half_a_turn_and_half_of_it_after_a_quarter() -> None:
    angle = torch.linspace(-3, 3, 13)
    torch.testing.assert_close(bearing(angle + torch.pi), bearing(angle), atol=1e-5, rtol=0)
    quarter = bearing(angle + torch.pi / 2)
    torch.testing.assert_close(quarter[:, 2:], bearing(angle)[:, 2:], atol=1e-5, rtol=0)
    torch.testing.assert_close(quarter[:, :2], -bearing(angle)[:, :2], atol=1e-5, rtol=0)


def test_what_is_not_there_has_no_place_and_no_turn() -> None:
    there, nothing = torch.tensor([1.0, 0.0]), torch.zeros(2)
    numbers = geometry(
        torch.full((2, 2), 0.9), torch.full((2, 3), 0.4), there, torch.full((2, 2), 0.2), nothing,
        bearing(torch.full((2,), 0.3)), bearing(torch.full((2,), 0.3)),
    )  # fmt: skip
    assert numbers.shape == (2, GEOMETRY)
    place, position, _, wrist_place, _, turn, wrist_turn = numbers.split(PARTS, -1)
    assert place[1].tolist() == wrist_place[0].tolist() == [0.5, 0.5]
    assert not position[1].any()
    assert not turn[1].any()
    assert not wrist_turn.any()
    assert bool(turn[0].any())
