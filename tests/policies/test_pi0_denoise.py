"""Pi0's own denoising loop: transformers' numbers, announced, stopped and timed."""

from __future__ import annotations

import dataclasses

import fabricate_pi0
import numpy as np
import pytest
import torch

from steer_runtime.errors import SteerError
from steer_runtime.policies.pi0.config import GemmaSize
from steer_runtime.policies.pi0.denoise import denoise
from steer_runtime.policies.pi0.network import Inputs, Pi0Network
from steer_runtime.policies.pi0.policy import Pi0Policy


@pytest.fixture(scope="module")
def policy() -> Pi0Policy:
    return fabricate_pi0.tiny_policy()


def _reference(network: Pi0Network, inputs: Inputs, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """transformers' own sampling."""
    return network.pi0.sample_actions(
        state=inputs.state,
        input_ids=inputs.ids,
        pixel_values=inputs.pixels,
        noise=noise,
        attention_mask=inputs.mask.long(),
        pixel_attention_mask=inputs.cameras,
        num_steps=steps,
    )


@torch.inference_mode()
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_actions_are_those_of_sample_actions(policy: Pi0Policy, steps: int) -> None:
    inputs = policy.inputs([fabricate_pi0.make_observation()])
    noise = policy.noise(3)[None]
    ours = denoise(policy.model, inputs, noise, steps=steps).actions
    torch.testing.assert_close(ours, _reference(policy.model, inputs, noise, steps), atol=1e-5, rtol=0)
    assert float(ours.abs().max()) > 0.1


@torch.inference_mode()
def test_a_batch_of_unequal_prompts_and_cameras_is_its_samples(policy: Pi0Policy) -> None:
    observations = [
        fabricate_pi0.make_observation(instruction="pick up the soup"),
        fabricate_pi0.make_observation(instruction="put it in the basket slowly and above the bowl", seed=1),
        fabricate_pi0.make_observation(instruction="open", seed=2),
    ]
    cameras = [("agentview",), ("agentview", "wrist"), ("wrist",)]
    noise = torch.stack([policy.noise(i) for i in range(3)])
    together = policy.inputs(observations, cameras)
    assert len({int(row.sum()) for row in together.mask}) == 3
    batched = denoise(policy.model, together, noise, steps=4).actions
    for i, (observation, named) in enumerate(zip(observations, cameras, strict=True)):
        alone = denoise(policy.model, policy.inputs([observation], [named]), noise[i : i + 1], steps=4).actions
        torch.testing.assert_close(batched[i], alone[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(batched, _reference(policy.model, together, noise, 4), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_network_in_bfloat16_integrates_in_float32() -> None:
    policy = Pi0Policy(
        fabricate_pi0.tiny_network(dtype=torch.bfloat16),
        fabricate_pi0.tiny_policy().tokenizer,
        fabricate_pi0.tiny_statistics(),
    )
    exact = fabricate_pi0.tiny_policy()
    observation = fabricate_pi0.make_observation()
    rough = policy.logits(observation)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact.logits(observation), atol=0.2, rtol=0.1)


def test_the_prefix_runs_once_and_the_expert_once_a_step(policy: Pi0Policy) -> None:
    told: list[tuple[str, list[str]]] = []

    class Listener:
        def set_roles(self, tower: str, roles: list[str]) -> None:
            told.append((tower, roles))

    policy.announce_roles_to(Listener())  # type: ignore[arg-type]
    calls = {"prefix": 0, "expert": 0, "vision": 0}
    handles = []
    for name, module in (
        ("prefix", policy.model.language_model),
        ("expert", policy.model.expert),
        ("vision", policy.model.pi0.model.vlm.vision_tower),
    ):
        handles.append(
            module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))  # type: ignore[arg-type]
        )
    observation = fabricate_pi0.make_observation()
    policy.infer(observation)
    policy.announce_roles_to(None)
    for handle in handles:
        handle.remove()
    assert calls == {"prefix": 1, "expert": 4, "vision": 1}
    assert [tower for tower, _ in told] == ["prefix", *["expert"] * 4]
    assert told[0][1][:8] == ["image"] * 8
    assert set(told[0][1][8:]) == {"text"}
    assert told[1][1] == ["state", *["action"] * 6]
    assert len(told[0][1]) == policy.inputs([observation]).ids.shape[1]


def test_samples_of_other_roles_are_not_steered_in_one_batch(policy: Pi0Policy) -> None:
    observation = fabricate_pi0.make_observation()
    inputs = policy.inputs([observation] * 2, [("agentview",), ("agentview", "wrist")])
    noise = torch.stack([policy.noise(0)] * 2)
    with pytest.raises(SteerError, match="one by one") as refused:
        denoise(policy.model, inputs, noise, steps=1, announce=lambda tower, roles: None)
    assert refused.value.code == "ragged_batch"


@pytest.mark.parametrize("after", [0, 2])
def test_it_stops_between_two_steps_and_leaves_nothing_behind(policy: Pi0Policy, after: int) -> None:
    observation = fabricate_pi0.make_observation()
    before = policy.logits(observation)
    ran = []

    def count(*_: object) -> None:
        ran.append(1)
        if len(ran) == after + 1:
            policy.cancel()

    handle = policy.model.expert_entry.register_forward_hook(count)
    with pytest.raises(SteerError) as stopped:
        policy.infer(observation)
    handle.remove()
    assert (stopped.value.code, len(ran)) == ("cancelled", after + 1)
    assert torch.equal(policy.logits(observation), before)


def test_every_stage_is_timed() -> None:
    ticks = iter(np.cumsum([0, 1, 2, 4, 8, 16, 32]).tolist())
    policy = fabricate_pi0.tiny_policy(clock=lambda: next(ticks))
    notes = policy.infer(fabricate_pi0.make_observation()).notes
    assert notes == {
        "seconds_preprocess": 1,
        "seconds_vision": 4,
        "seconds_prefix": 8,
        "seconds_denoise": 16,
    }
    assert policy.timings["denoise"] == 16


@pytest.mark.parametrize(
    ("noise", "code"),
    [
        (torch.full((6, 9), float("nan")), "not_finite"),
        (torch.full((6, 9), float("inf")), "not_finite"),
        (torch.zeros(5, 9), "bad_noise"),
        (torch.zeros(6, 8), "bad_noise"),
    ],
)
def test_unusable_noise_is_refused(policy: Pi0Policy, noise: torch.Tensor, code: str) -> None:
    with pytest.raises(SteerError, match="the noise") as refused:
        policy.infer(fabricate_pi0.make_observation(), noise)
    assert refused.value.code == code


def test_two_towers_that_do_not_attend_alike_are_refused() -> None:
    with pytest.raises(SteerError, match="head_dim is 8 in the prefix and 16 in the expert"):
        fabricate_pi0.tiny_config(expert=GemmaSize(16, 48, 3, 4, 2, 16))
    config = fabricate_pi0.tiny_config()
    shallow = {name: dataclasses.replace(getattr(config, name), layers=1) for name in ("prefix", "expert")}
    with pytest.raises(SteerError, match="leave none in the prefix"):
        fabricate_pi0.tiny_config(**shallow)
