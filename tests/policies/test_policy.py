"""The OpenVLA policy: what one inference does, and what it refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import fabricate
import numpy as np
import pytest
import torch
from transformers import DynamicCache

from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.config import OPENVLA_7B
from steer_runtime.policies.openvla.policy import OpenVLAPolicy, prompt_text
from steer_runtime.types import LIBERO_ACTION_SPACE, Observation, Policy, Role

Factory = Callable[..., Observation]


class Roles:
    """Keeps what was announced."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, list[Role]]] = []

    def set_roles(self, tower: str, roles: Sequence[Role]) -> None:
        self.heard.append((tower, list(roles)))


@pytest.fixture
def policy() -> OpenVLAPolicy:
    return fabricate.tiny_policy()


def test_it_is_a_policy(tiny_policy: OpenVLAPolicy) -> None:
    assert isinstance(tiny_policy, Policy)


def test_the_prompt_is_the_published_one() -> None:
    assert (
        prompt_text(OPENVLA_7B, "Pick up the Soup")
        == "In: What action should the robot take to pick up the soup?\nOut:"
    )


def test_the_appended_token_is_last_once() -> None:
    config = fabricate.tiny_config(append_token_id=3)  # ":" of the tiny tokenizer, which already ends the prompt
    assert fabricate.tiny_policy(config).prompt_ids("go")[-2:] != [3, 3]
    assert fabricate.tiny_policy(fabricate.tiny_config(append_token_id=20)).prompt_ids("go")[-2:] == [3, 20]


def test_an_action_is_one_step_of_libero(tiny_policy: OpenVLAPolicy, observation: Factory) -> None:
    chunk = tiny_policy.infer(observation(tiny_policy))
    assert (chunk.actions.shape, chunk.actions.dtype, chunk.space) == (
        (1, 7),
        np.dtype(np.float32),
        LIBERO_ACTION_SPACE,
    )
    assert chunk.actions[0, 6] in (-1.0, 1.0)
    assert np.all(np.abs(chunk.actions) <= 1)


def test_black_and_white_images_give_different_logits(tiny_policy: OpenVLAPolicy, observation: Factory) -> None:
    black, white = (tiny_policy.logits(observation(tiny_policy, value=v)) for v in (0, 255))
    assert (black[0] - white[0]).abs().max() > 1e-2


def test_instructions_change_the_logits(tiny_policy: OpenVLAPolicy, observation: Factory) -> None:
    fast, slow = (tiny_policy.logits(observation(tiny_policy, instruction=i)) for i in ("go fast", "go slow"))
    assert (fast[0] - slow[0]).abs().max() > 1e-2


def test_the_same_observation_gives_the_same_bits(tiny_policy: OpenVLAPolicy, observation: Factory) -> None:
    seen = observation(tiny_policy)
    assert torch.equal(tiny_policy.logits(seen), tiny_policy.logits(seen))


def test_vision_runs_once_and_the_language_model_seven_times(policy: OpenVLAPolicy, observation: Factory) -> None:
    calls: Counter[str] = Counter()
    tower = policy.towers["lm"]
    watched = {"dino": policy.model.dino, "siglip": policy.model.siglip, "projector": policy.model.projector}
    watched |= {f"down {i}": module for i, module in enumerate(tower.down_projs)}  # type: ignore[misc]
    watched |= {f"site {i}": module for i, module in enumerate(tower.residual_sites)}  # type: ignore[misc]
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    policy.infer(observation(policy))
    assert calls == {name: 1 if name in ("dino", "siglip", "projector") else 7 for name in watched}
    assert tower.firings_per_inference == 7


def test_roles_match_the_tokens_of_every_forward(policy: OpenVLAPolicy, observation: Factory) -> None:
    roles, lengths = Roles(), []
    policy.announce_roles_to(roles)
    policy.model.embedding_entry.register_forward_pre_hook(
        lambda _, args: lengths.append((args[0].shape[1], len(roles.heard)))
    )
    seen = observation(policy)
    policy.infer(seen)
    assert [tower for tower, _ in roles.heard] == ["lm"] * 7
    # Announced before the forward, and as long as it.
    assert lengths == [(len(heard), index + 1) for index, (_, heard) in enumerate(roles.heard)]
    prompt = len(policy.prompt_ids(seen.instruction))
    assert roles.heard[0][1] == ["text"] + ["image"] * policy.config.patches + ["text"] * (prompt - 1)
    assert [heard for _, heard in roles.heard[1:]] == [["action"]] * 6


def test_the_image_roles_lie_on_the_image_embeddings(policy: OpenVLAPolicy, observation: Factory) -> None:
    entered: list[torch.Tensor] = []
    policy.model.embedding_entry.register_forward_hook(lambda _, __, out: entered.append(out.clone()))
    roles = Roles()
    policy.announce_roles_to(roles)
    for value in (0, 255):
        policy.infer(observation(policy, value=value))
    changed = (entered[0] != entered[7])[0].any(dim=-1)
    assert changed.tolist() == [role == "image" for role in roles.heard[0][1]]


def test_a_listener_does_not_change_the_numbers(policy: OpenVLAPolicy, observation: Factory) -> None:
    seen = observation(policy)
    alone = policy.logits(seen)
    policy.announce_roles_to(Roles())
    assert torch.equal(policy.logits(seen), alone)
    policy.announce_roles_to(None)
    assert torch.equal(policy.logits(seen), alone)


def test_hooks_on_layers_see_the_residual_stream(policy: OpenVLAPolicy, observation: Factory) -> None:
    shapes: list[tuple[int, ...]] = []
    for site in policy.towers["lm"].residual_sites:
        site.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))  # type: ignore[attr-defined]
    policy.infer(observation(policy))
    tokens = policy.config.patches + len(policy.prompt_ids(observation(policy).instruction))
    assert shapes == [(1, tokens, 32)] * 4 + [(1, 1, 32)] * 24


def test_an_edit_at_the_embedding_entry_reaches_the_action(policy: OpenVLAPolicy, observation: Factory) -> None:
    seen = observation(policy)
    before = policy.logits(seen)
    policy.model.embedding_entry.register_forward_hook(lambda _, __, out: out + 0.5)
    assert (policy.logits(seen)[0] - before[0]).abs().max() > 1e-3


@torch.inference_mode()
def test_cached_decoding_equals_a_forward_of_the_whole_sequence(policy: OpenVLAPolicy, observation: Factory) -> None:
    seen = observation(policy)
    model = policy.model
    prompt = torch.tensor([policy.prompt_ids(seen.instruction)])
    decoded = model.decode(policy.pixels(seen), prompt)
    tokens, logits = decoded.tokens, decoded.logits
    prefix = model.embed(policy.pixels(seen), prompt)
    sequence = torch.cat([prefix, model.language_model.model.embed_tokens(tokens[None])], dim=1)
    whole = model.language_model(inputs_embeds=sequence, use_cache=False).logits[0, prefix.shape[1] - 1 : -1]
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)
    low, high = policy.config.usable_vocab - 256, policy.config.usable_vocab
    assert torch.equal(whole[:, low:high].argmax(-1) + low, tokens)


def test_an_action_is_decoded_from_the_tokens_of_its_logits(tiny_policy: OpenVLAPolicy, observation: Factory) -> None:
    seen = observation(tiny_policy)
    tokens = tiny_policy.logits(seen)[:, 64:320].argmax(-1) + 64
    expected = tiny_policy.statistics.unnormalise(tiny_policy.actions.decode(tokens.numpy()))
    np.testing.assert_allclose(tiny_policy.infer(seen).actions[0, :6], expected[:6], rtol=1e-6)


def test_an_unrestricted_policy_counts_tokens_that_are_no_actions(observation: Factory) -> None:
    policy = fabricate.tiny_policy(fabricate.tiny_config(restrict_to_action_tokens=False))
    with torch.no_grad():
        policy.model.language_model.lm_head.weight[64:320] = 0  # every other token wins or ties at zero
    chunk = policy.infer(observation(policy))
    assert chunk.notes["out_of_range_tokens"] == 7
    assert np.all(np.isfinite(chunk.actions))


def test_a_restricted_policy_never_leaves_the_action_tokens(tiny_policy: OpenVLAPolicy, observation: Factory) -> None:
    for seed in range(5):
        assert tiny_policy.infer(observation(tiny_policy, seed=seed)).notes["out_of_range_tokens"] == 0


def test_infinite_activations_are_refused(policy: OpenVLAPolicy, observation: Factory) -> None:
    policy.model.embedding_entry.register_forward_hook(lambda _, __, out: out * float("inf"))
    with pytest.raises(SteerError, match="not finite") as refused:
        policy.infer(observation(policy))
    assert refused.value.code == "not_finite"


def test_a_tokenizer_of_a_larger_model_is_refused(policy: OpenVLAPolicy) -> None:
    with pytest.raises(SteerError, match="420 tokens and the model 384 rows") as refused:
        OpenVLAPolicy(policy.model, fabricate.tiny_tokenizer(usable_vocab=420), policy.statistics)
    assert refused.value.code == "no_tokenizer"


def test_sizes_that_do_not_fit_together_are_all_named() -> None:
    with pytest.raises(SteerError, match=r"image_size 30.*usable_vocab 999.*2048 positions") as refused:
        fabricate.tiny_config(image_size=30, usable_vocab=999, max_prompt_tokens=2048)
    assert refused.value.code == "bad_model_config"


@torch.inference_mode()
def test_forwards_compile_without_a_graph_break(policy: OpenVLAPolicy, observation: Factory) -> None:
    model, seen = policy.model, observation(policy)
    pixels, prompt = policy.pixels(seen), torch.tensor([policy.prompt_ids(seen.instruction)])
    vision, step = (torch.compile(f, fullgraph=True, backend="eager") for f in (model.vision, model.step))
    assert torch.equal(vision(pixels), model.vision(pixels))
    caches = [DynamicCache(config=model.llama_config) for _ in range(2)]
    embeddings = model.embed(pixels, prompt)
    for token in (70, 200, 319):
        assert torch.equal(step(embeddings, caches[0]), model.step(embeddings, caches[1]))
        embeddings = model.language_model.model.embed_tokens(torch.tensor([[token]]))


def test_no_gradients_are_kept(policy: OpenVLAPolicy, observation: Factory) -> None:
    assert not policy.logits(observation(policy)).requires_grad


def test_the_tower_describes_the_modules(tiny_policy: OpenVLAPolicy) -> None:
    tower = tiny_policy.towers["lm"]
    assert (tower.layers, tower.d_model, tower.d_ff, len(tower.residual_sites)) == (3, 32, 64, 4)
    assert {tuple(m.weight.shape) for m in tower.down_projs} == {(32, 64)}  # type: ignore[attr-defined]
    assert tiny_policy.unembedding.shape == (384, 32)


def test_an_instruction_at_the_limit_fits_the_tower(tiny_policy: OpenVLAPolicy, observation: Factory) -> None:
    words = "go " * (tiny_policy.config.max_prompt_tokens - len(tiny_policy.prompt_ids("go")) + 1)
    tokens = len(tiny_policy.prompt_ids(words)) + tiny_policy.config.patches
    assert tokens == tiny_policy.towers["lm"].max_tokens
    tiny_policy.infer(observation(tiny_policy, instruction=words))


@pytest.mark.parametrize("instruction", ["", "  \n", "go " * 60, "a" * 1_000_000])
def test_unusable_instructions_are_refused(tiny_policy: OpenVLAPolicy, observation: Factory, instruction: str) -> None:
    with pytest.raises(SteerError) as refused:
        tiny_policy.infer(observation(tiny_policy, instruction=instruction))
    assert refused.value.code == "bad_instruction"
    assert len(str(refused.value)) < 300


def test_a_missing_camera_is_refused_with_the_ones_there_are(tiny_policy: OpenVLAPolicy, observation: Factory) -> None:
    seen = observation(tiny_policy)
    with pytest.raises(SteerError, match=r"'agentview'.*wrist") as refused:
        tiny_policy.infer(replace(seen, images={"wrist": seen.images["wrist"]}))
    assert refused.value.code == "missing_camera"


def test_a_bad_image_is_refused(tiny_policy: OpenVLAPolicy, observation: Factory) -> None:
    image = np.zeros((64, 64, 3), dtype=np.float32)
    with pytest.raises(SteerError) as refused:
        tiny_policy.infer(replace(observation(tiny_policy), images={"agentview": image}))
    assert refused.value.code == "bad_image"


def test_an_untrained_policy_says_so(tiny_policy: OpenVLAPolicy) -> None:
    assert not tiny_policy.trained
    assert "untrained policy" in repr(tiny_policy)


def test_the_hash_depends_on_value_vectors_and_token_basis_only(observation: Factory) -> None:
    reference = fabricate.tiny_policy().model_hash
    for touch, same in (
        (lambda m: m.language_model.model.layers[1].mlp.down_proj.weight, False),
        (lambda m: m.language_model.lm_head.weight, False),
        (lambda m: m.projector.fc1.weight, True),
    ):
        policy = fabricate.tiny_policy()
        touch(policy.model)[0, 0] += 1
        assert (policy.model_hash == reference) is same
