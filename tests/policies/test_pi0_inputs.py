"""What Pi0 is shown: pictures, prompts, states."""

from __future__ import annotations

import dataclasses

import fabricate_pi0
import numpy as np
import pytest
import torch

from steer_runtime.errors import SteerError
from steer_runtime.policies.pi0.image import camera_images, padded, ragged
from steer_runtime.policies.pi0.policy import Pi0Policy
from steer_runtime.policies.pi0.prompt import batch, cleaned, text_ids


@pytest.fixture(scope="module")
def policy() -> Pi0Policy:
    return fabricate_pi0.tiny_policy()


# -- pictures -------------------------------------------------------------------------------------------------------------


def test_a_square_picture_of_the_right_size_is_only_scaled() -> None:
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    expected = torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1.0
    assert torch.equal(padded(image, 28), expected)


@pytest.mark.parametrize(
    ("size", "rows", "columns"), [((40, 80), slice(7, 21), slice(0, 28)), ((80, 40), slice(0, 28), slice(7, 21))]
)
def test_the_aspect_is_kept_and_the_rest_is_black(size: tuple[int, int], rows: slice, columns: slice) -> None:
    seen = padded(np.full((*size, 3), 255, np.uint8), 28)
    inside = torch.zeros(28, 28, dtype=torch.bool)
    inside[rows, columns] = True
    assert torch.equal(seen[:, inside], torch.ones(3, int(inside.sum())))
    assert torch.equal(seen[:, ~inside], -torch.ones(3, int((~inside).sum())))


def test_pictures_are_resized_bilinearly() -> None:
    ramp = np.repeat(np.arange(0, 224, 4, dtype=np.uint8)[None, :, None], 56, axis=0).repeat(3, axis=2)
    seen = (padded(ramp, 28) + 1.0) * 127.5
    # Output pixel i samples the middle between input pixels 2 i and 2 i + 1.
    torch.testing.assert_close(seen[0, 5], torch.arange(28) * 8.0 + 2.0)


def test_cameras_come_in_the_order_of_training_and_others_are_not_looked_at() -> None:
    images = {name: np.full((28, 28, 3), value, np.uint8) for name, value in (("b", 255), ("a", 0))}
    images["odd"] = np.zeros(3)  # type: ignore[assignment]
    assert camera_images(images, ("a", "b"), 28)[:, 0, 0, 0].tolist() == [-1.0, 1.0]


def test_cameras_that_a_sample_lacks_are_masked() -> None:
    pixels, mask = ragged([torch.ones(1, 3, 4, 4), torch.ones(3, 3, 4, 4)])
    assert mask.tolist() == [[True, False, False], [True, True, True]]
    assert pixels.shape == (2, 3, 3, 4, 4)
    assert not pixels[0, 1:].any()


def test_black_and_white_pictures_give_different_actions(policy: Pi0Policy) -> None:
    black, white = (policy.infer(fabricate_pi0.make_observation(value=v), policy.noise(0)).actions for v in (0, 255))
    assert float(np.abs(black - white).max()) > 0.01


def test_each_camera_matters(policy: Pi0Policy) -> None:
    observation = fabricate_pi0.make_observation()
    before = policy.logits(observation)
    for camera in policy.cameras:
        dark = {**observation.images, camera: np.zeros((28, 28, 3), np.uint8)}
        assert not torch.equal(before, policy.logits(dataclasses.replace(observation, images=dark)))


@pytest.mark.parametrize(
    ("image", "code"),
    [
        (None, "missing_camera"),
        (np.zeros((28, 28, 3), np.float32), "bad_image"),
        (np.zeros((28, 28, 4), np.uint8), "bad_image"),
        (np.zeros((8, 28, 3), np.uint8), "bad_image"),
        ("picture", "bad_image"),
    ],
)
def test_unusable_pictures_are_refused(policy: Pi0Policy, image: object, code: str) -> None:
    observation = fabricate_pi0.make_observation()
    images = {name: value for name, value in {**observation.images, "wrist": image}.items() if value is not None}
    with pytest.raises(SteerError, match="wrist") as refused:
        policy.infer(dataclasses.replace(observation, images=images))  # type: ignore[arg-type]
    assert refused.value.code == code


def test_the_wrong_number_of_cameras_is_refused_with_both_numbers(policy: Pi0Policy) -> None:
    observation = fabricate_pi0.make_observation()
    one = dataclasses.replace(observation, images={"agentview": observation.images["agentview"]})
    with pytest.raises(
        SteerError, match="has 1 images and none of camera 'wrist': expected 2 cameras, agentview, wrist"
    ):
        policy.infer(one)
    for cameras in ((), ("a", "b", "c", "d"), ("a", "a")):
        with pytest.raises(SteerError, match="expected 1 to 3 different names"):
            fabricate_pi0.tiny_policy(cameras=cameras)


# -- prompts --------------------------------------------------------------------------------------------------------------


def test_the_task_is_cleaned_as_published() -> None:
    assert cleaned("  pick_up the\nsoup ") == "pick up the soup"


def test_a_prompt_is_bos_task_and_line_end(policy: Pi0Policy) -> None:
    said: list[str] = []

    class Tokenizer:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            said.append(text)
            return [7, 8]

    ids = text_ids(Tokenizer(), policy.config, "pick_up it")  # type: ignore[arg-type]
    assert (said, ids) == (["pick up it\n"], [1, 7, 8])


def test_prompts_of_unequal_length_are_padded_at_the_end(policy: Pi0Policy) -> None:
    ids, mask = batch(policy.config, [[1, 5], [1, 5, 6, 7]], [2, 1])
    image = policy.config.image_token_id
    assert ids.tolist() == [[image] * 8 + [1, 5], [image] * 4 + [1, 5, 6, 7, 0, 0]]
    assert mask.sum(-1).tolist() == [10, 8]
    assert not mask[1, 8:].any()


def test_the_instruction_matters(policy: Pi0Policy) -> None:
    one, other = (
        policy.logits(fabricate_pi0.make_observation(instruction=t)) for t in ("pick up the soup", "pick up the bowl")
    )
    assert not torch.equal(one, other)


@pytest.mark.parametrize("instruction", ["", " \n_ ", "pick " * 60, "x" * 100_000])
def test_unusable_instructions_are_refused(policy: Pi0Policy, instruction: str) -> None:
    with pytest.raises(SteerError, match="the instruction") as refused:
        policy.infer(fabricate_pi0.make_observation(instruction=instruction))
    assert refused.value.code == "bad_instruction"


def test_a_prompt_too_long_is_told_in_tokens(policy: Pi0Policy) -> None:
    with pytest.raises(SteerError, match="a prompt of 61 tokens: expected at most 48"):
        policy.infer(fabricate_pi0.make_observation(instruction="pick " * 60))


def test_a_tokenizer_of_another_model_is_refused() -> None:
    policy = fabricate_pi0.tiny_policy(fabricate_pi0.tiny_config(vocab=20))
    with pytest.raises(SteerError, match="the model has 20") as refused:
        policy.infer(fabricate_pi0.make_observation(instruction="put it on the basket"))
    assert refused.value.code == "no_tokenizer"


# -- states ---------------------------------------------------------------------------------------------------------------


def test_the_state_is_normalised_and_padded(policy: Pi0Policy) -> None:
    observation = fabricate_pi0.make_observation()
    state = policy.inputs([observation]).state
    np.testing.assert_allclose(state[0, :8], (observation.state - 0.1) / 0.5, rtol=1e-4)
    assert state[0, 8] == 0.0


def test_the_state_matters(policy: Pi0Policy) -> None:
    observation = fabricate_pi0.make_observation()
    moved = dataclasses.replace(observation, state=observation.state + 0.1)
    assert not torch.equal(policy.logits(observation), policy.logits(moved))


@pytest.mark.parametrize("state", [np.full(8, np.nan), np.full(8, np.inf), np.zeros(9), np.zeros(0), np.zeros((1, 8))])
def test_unusable_states_are_refused(policy: Pi0Policy, state: np.ndarray) -> None:
    with pytest.raises(SteerError, match="the state") as refused:
        policy.infer(dataclasses.replace(fabricate_pi0.make_observation(), state=state))
    assert refused.value.code == "bad_state"
