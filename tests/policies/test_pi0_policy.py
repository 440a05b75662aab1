"""Pi0 as a policy: actions, noise, and steering in both of its towers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import fabricate_pi0
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from steer_runtime.errors import SteerError
from steer_runtime.policies import load_policy
from steer_runtime.policies.pi0.policy import Pi0Policy
from steer_runtime.policies.pi0.statistics import Normal, Pi0Statistics
from steer_runtime.steering.engine import SteeringEngine, hooks_on
from steer_runtime.steering.offline import OfflineSteering
from steer_runtime.steering.trace import TraceRecord
from steer_runtime.types import LIBERO_ACTION_SPACE, Policy
from steer_runtime.verify import verify


@pytest.fixture(scope="module")
def policy() -> Pi0Policy:
    return fabricate_pi0.tiny_policy()


# -- actions --------------------------------------------------------------------------------------------------------------


def test_it_keeps_the_policy_contract(policy: Pi0Policy) -> None:
    assert isinstance(policy, Policy)
    chunk = policy.infer(fabricate_pi0.make_observation())
    assert (chunk.actions.shape, chunk.actions.dtype, chunk.space) == ((6, 7), np.float32, LIBERO_ACTION_SPACE)
    assert "untrained policy" in repr(policy)


def test_actions_are_unnormalised_and_unpadded(policy: Pi0Policy) -> None:
    observation = fabricate_pi0.make_observation()
    policy.reset(seed=5)
    normalised = policy.logits(observation).numpy()
    expected = policy.statistics.unnormalise(normalised[:, :7].astype(np.float64))
    np.testing.assert_allclose(policy.infer(observation).actions, expected, rtol=1e-6)
    assert normalised.shape == (6, 9)


def test_the_delta_transform_is_a_declared_option() -> None:
    plain, delta = fabricate_pi0.tiny_policy(), fabricate_pi0.tiny_policy(delta=True)
    observation = fabricate_pi0.make_observation()
    difference = delta.infer(observation).actions - plain.infer(observation).actions
    np.testing.assert_allclose(difference[:, :6], np.tile(observation.state[:6], (6, 1)), atol=1e-5)
    assert not difference[:, 6].any()


def test_only_the_first_rows_are_handed_on_where_asked() -> None:
    observation = fabricate_pi0.make_observation()
    whole = fabricate_pi0.tiny_policy().infer(observation).actions
    first = fabricate_pi0.tiny_policy(action_steps=2).infer(observation).actions
    np.testing.assert_array_equal(first, whole[:2])


def test_options_are_those_of_now_and_the_seed_is_the_loaded_one() -> None:
    policy = fabricate_pi0.tiny_policy(action_steps=2)
    before = policy.options
    policy.reset(seed=5)
    assert policy.options == before
    policy.action_steps = 3
    assert (before["action_steps"], policy.options["action_steps"], policy.options["seed"]) == (2, 3, 0)
    assert json.loads(json.dumps(policy.options)) == policy.options


def test_noise_is_that_of_the_episode_and_the_inference(policy: Pi0Policy) -> None:
    observation = fabricate_pi0.make_observation()

    def episode(seed: int | None) -> np.ndarray:
        policy.reset(seed)
        return np.stack([policy.infer(observation).actions for _ in range(2)])

    first, again, next_one, other = episode(3), episode(3), episode(None), episode(4)
    np.testing.assert_array_equal(first, again)
    for unlike in (first[::-1], next_one, other):
        assert not np.array_equal(first, unlike)


def test_a_refused_observation_uses_no_noise_up(policy: Pi0Policy) -> None:
    observation = fabricate_pi0.make_observation()
    policy.reset(1)
    expected = policy.infer(observation).actions
    policy.reset(1)
    with pytest.raises(SteerError):
        policy.infer(fabricate_pi0.make_observation(instruction=""))
    np.testing.assert_array_equal(policy.infer(observation).actions, expected)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"euler_steps": 0}, "euler_steps is 0"),
        ({"action_steps": 7}, "action_steps is 7"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, int], named: str) -> None:
    with pytest.raises(SteerError, match=named) as refused:
        fabricate_pi0.tiny_policy(**options)
    assert refused.value.code == "bad_policy"


def test_statistics_of_another_robot_are_refused(policy: Pi0Policy) -> None:
    six = Normal((0.0,) * 6, (1.0,) * 6)
    with pytest.raises(SteerError, match="the action space has 7 dimensions"):
        Pi0Policy(policy.model, policy.tokenizer, Pi0Statistics(six, six, 0.0, 0.0, "six joints"))


# -- steering -------------------------------------------------------------------------------------------------------------


def _steered(
    policy: Pi0Policy, direction: object, *, strength: float = 1.0, steps: tuple[int, int] | None = None
) -> tuple[torch.Tensor, TraceRecord]:
    observation = fabricate_pi0.make_observation()
    with OfflineSteering(policy, [direction]) as steering:  # type: ignore[list-item]
        steering.set({direction.name: strength}, steps=steps)  # type: ignore[attr-defined]
        return steering.run(lambda: policy.logits(observation))


def test_every_check_of_verify_passes(policy: Pi0Policy) -> None:
    report = verify(policy, fabricate_pi0.make_observation())
    assert [(check.name, check.passed) for check in report.checks] == [
        ("hooks fire", True),
        ("off is bit-identical", True),
        ("the seed's override, bit for bit (prefix)", True),
        ("the trace counts every write (prefix)", True),
        ("clearing is exact (prefix)", True),
        ("layers that are refused reach nothing (prefix)", True),
        ("the seed's override, bit for bit (expert)", True),
        ("the trace counts every write (expert)", True),
        ("clearing is exact (expert)", True),
        ("detaching restores everything", True),
    ]


def test_the_prefix_is_written_once_a_chunk_and_the_expert_once_a_step(policy: Pi0Policy) -> None:
    for tower, forwards in (("prefix", 1), ("expert", 4)):
        actions, record = _steered(policy, fabricate_pi0.neuron_direction(policy, tower))
        assert {(site.tower, site.forwards) for site in record.sites} == {(tower, forwards)}
        assert not torch.equal(actions, policy.logits(fabricate_pi0.make_observation()))
        assert record.firings == record.expected_firings == 7 + 4 * 7
    tokens = dict(record.tower_tokens)
    assert tokens["expert"] == 4 * 7
    assert tokens["prefix"] == policy.inputs([fabricate_pi0.make_observation()]).ids.shape[1]


@pytest.mark.parametrize("tower", ["prefix", "expert"])
@pytest.mark.parametrize("form", ["neurons", "dense"])
def test_strength_zero_is_off_exactly(policy: Pi0Policy, tower: str, form: str) -> None:
    make = fabricate_pi0.neuron_direction if form == "neurons" else fabricate_pi0.dense_direction
    unsteered = policy.logits(fabricate_pi0.make_observation())
    assert torch.equal(_steered(policy, make(policy, tower), strength=0.0)[0], unsteered)
    assert not torch.equal(_steered(policy, make(policy, tower), strength=0.5)[0], unsteered)


@pytest.mark.parametrize(
    ("tower", "role", "tokens"),
    [("prefix", "image", 8), ("prefix", "text", None), ("expert", "state", 4), ("expert", "action", 24)],
)
def test_spans_choose_the_tokens_of_their_role(policy: Pi0Policy, tower: str, role: str, tokens: int | None) -> None:
    direction = fabricate_pi0.neuron_direction(policy, tower, neurons=[(0, 3)], span=frozenset({role}))  # type: ignore[arg-type]
    actions, record = _steered(policy, direction)
    assert record.sites[0].writes == (dict(record.tokens)["text"] if tokens is None else tokens)
    assert not torch.equal(actions, policy.logits(fabricate_pi0.make_observation()))


def test_the_expert_is_steered_in_single_steps_or_all(policy: Pi0Policy) -> None:
    direction = fabricate_pi0.neuron_direction(policy, "expert")
    everywhere, _ = _steered(policy, direction)
    assert torch.equal(_steered(policy, direction, steps=(0, 4))[0], everywhere)
    seen = [everywhere, policy.logits(fabricate_pi0.make_observation())]
    for step in range(4):
        actions, record = _steered(policy, direction, steps=(step, step + 1))
        assert all(site.forwards == 1 for site in record.sites)
        assert not any(torch.equal(actions, other) for other in seen)
        seen.append(actions)


@pytest.mark.parametrize(
    ("tower", "steps", "said"),
    [
        ("prefix", (0, 1), "'prefix', which has no denoising steps: steer a direction of tower expert"),
        ("expert", (0, 5), "'expert' takes 4 denoising steps; choose within 0:4"),
    ],
)
def test_steps_that_a_tower_does_not_take_are_refused(
    policy: Pi0Policy, tower: str, steps: tuple[int, int], said: str
) -> None:
    with pytest.raises(SteerError, match=said):
        _steered(policy, fabricate_pi0.neuron_direction(policy, tower), steps=steps)


def test_the_last_prefix_layer_is_refused_and_dead(policy: Pi0Policy) -> None:
    for direction in (
        fabricate_pi0.neuron_direction(policy, "prefix", [(2, 3)]),
        fabricate_pi0.dense_direction(policy, "prefix", [3]),
    ):
        with pytest.raises(SteerError, match="only keys and values leave the prefix") as refused:
            SteeringEngine(policy, [direction])
        assert refused.value.code == "dead_layer"
    SteeringEngine(policy, [fabricate_pi0.neuron_direction(policy, "expert", [(2, 3)])])

    observation = fabricate_pi0.make_observation()
    before = policy.logits(observation)
    changed = {}
    for layer in range(3):
        module = policy.towers["prefix"].down_projs[layer]
        handle = module.register_forward_hook(lambda m, args, out: out + 100.0 * torch.randn_like(out))  # type: ignore[attr-defined]
        changed[layer] = float((policy.logits(observation) - before).abs().max())
        handle.remove()
    assert changed[2] == 0.0
    assert min(changed[0], changed[1]) > 0.01


def test_a_direction_of_the_other_tower_is_refused_in_a_sentence(policy: Pi0Policy) -> None:
    expert = fabricate_pi0.neuron_direction(policy, "expert")
    with pytest.raises(
        SteerError, match=r"is for \(layers, d_model, d_ff\) \(3, 16, 48\) but tower 'prefix' has \(3, 32, 64\)"
    ):
        SteeringEngine(policy, [dataclasses.replace(expert, tower="prefix")])
    with pytest.raises(SteerError, match="is for tower 'lm'"):
        SteeringEngine(policy, [dataclasses.replace(expert, tower="lm")])


def test_steering_that_breaks_the_numbers_is_refused(policy: Pi0Policy) -> None:
    direction = fabricate_pi0.neuron_direction(policy, "expert", [(2, i) for i in range(48)], alpha=3e38)
    with OfflineSteering(policy, [direction]) as steering:
        steering.set({"up": 1.0})
        with pytest.raises(SteerError, match="lower or clear the steering") as refused:
            steering.run(lambda: policy.infer(fabricate_pi0.make_observation()))
    assert refused.value.code == "not_finite"


def test_detaching_leaves_no_hook(policy: Pi0Policy) -> None:
    before = hooks_on(policy.model)
    _steered(policy, fabricate_pi0.neuron_direction(policy, "expert"))
    assert hooks_on(policy.model) == before


def test_the_hash_is_of_what_directions_depend_on() -> None:
    first, same, other = fabricate_pi0.tiny_policy(), fabricate_pi0.tiny_policy(), fabricate_pi0.tiny_policy(seed=1)
    assert first.model_hash == same.model_hash != other.model_hash
    with torch.no_grad():
        same.model.expert.layers[0].mlp.down_proj.weight[0, 0] += 1
    assert Pi0Policy(same.model, same.tokenizer, same.statistics).model_hash != first.model_hash


def test_both_bases_are_shown(policy: Pi0Policy) -> None:
    assert policy.unembedding.shape == (384, 32)
    assert policy.action_basis.shape == (9, 16)


# -- files ----------------------------------------------------------------------------------------------------------------


def _yaml(path: Path, **changes: object) -> Path:
    values = {"kind": "pi0", "name": "mine", "checkpoint": "weights", **changes}
    path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in values.items()))
    return path


def test_a_file_says_everything(tmp_path: Path) -> None:
    fabricate_pi0.save_tiny(tmp_path / "weights")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("norm_stats.json", "tokenizer.json"):
        (tmp_path / "weights" / name).rename(elsewhere / name)
    policy = load_policy(
        _yaml(
            tmp_path / "mine.yaml",
            statistics="elsewhere/norm_stats.json",
            tokenizer="elsewhere",
            cameras=["agentview"],
            euler_steps=2,
            action_steps=3,
            delta=True,
            seed=9,
        )
    )
    assert isinstance(policy, Pi0Policy)
    assert (policy.name, policy.cameras, policy.euler_steps, policy.action_steps, policy.delta, policy.seed) == (
        "mine", ("agentview",), 2, 3, True, 9,
    )  # fmt: skip
    assert policy.options == {
        "cameras": ["agentview"], "delta": True, "euler_steps": 2, "action_steps": 3, "seed": 9, "rate_hz": 20.0,
        "dtype": "float32",
    }  # fmt: skip
    assert policy.towers["expert"].firings_per_inference == 2
    assert policy.infer(fabricate_pi0.make_observation()).actions.shape == (3, 7)


def test_steer_verify_proves_it_from_its_file(tmp_path: Path) -> None:
    from steer_runtime.cli.main import app

    fabricate_pi0.save_tiny(tmp_path / "weights")
    result = CliRunner().invoke(app, ["verify", "--policy", str(_yaml(tmp_path / "mine.yaml")), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    assert (told["policy"], told["trained"]) == ("mine", False)
    assert len(told["checks"]) == 10
    assert all(check["passed"] for check in told["checks"])


@pytest.mark.parametrize(
    "changes", [{"suite": "libero_object"}, {"cameras": []}, {"euler_steps": 0}, {"delta": "openpi"}]
)
def test_unusable_files_are_refused_by_path(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(SteerError, match=r"mine\.yaml") as refused:
        load_policy(_yaml(tmp_path / "mine.yaml", **changes))
    assert refused.value.code == "bad_policy_config"
