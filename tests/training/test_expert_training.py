"""Training Pi0's expert on a tiny pocket OpenVLA of the real classes and fabricated recordings in the real format."""

from __future__ import annotations

import json
from pathlib import Path

import fabricate
import numpy as np
import pytest
import torch
from fabricated import demonstrations_folder
from tiny_pocket import HEAT, stop_at, tiny_model
from torch import Tensor
from transformers import DynamicCache

from sim.training import trainer
from sim.training.demonstration_data import DemonstrationData, load_demonstrations
from sim.training.expert import ExpertSubject
from sim.training.pi0_assembly import around, learns, write_pi0
from sim.training.settings import ExpertTraining
from steer_runtime.errors import SteerError
from steer_runtime.policies.pi0.network import Pi0Network
from steer_runtime.policies.pi0.policy import Pi0Policy
from steer_runtime.policies.pi0.prompt import batch
from steer_runtime.types import Observation

CHUNK = 4


def settings(**changes: object) -> ExpertTraining:
    values: dict[str, object] = {
        "kind": "expert", "name": "tiny", "demonstrations": ("object",), "prefix": "prefix", "steps": 6, "batch": 6,
        "width": 24, "neurons": 48, "chunk": CHUNK, "euler_steps": 5, "warmup": 2, "learning_rate": 1e-2, "draws": 2,
        "log_every": 1, "validate_every": 3, "checkpoint_every": 2,
    }  # fmt: skip
    return ExpertTraining(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemonstrationData:
    folder = tmp_path_factory.mktemp("demonstrations")
    tower = tiny_model().heatmap
    return load_demonstrations([demonstrations_folder(folder)], HEAT.classes, CHUNK, tower, "tower", folder / "cache")


def subject(data: DemonstrationData, **changes: object) -> ExpertSubject:
    chosen = settings(**changes)
    return ExpertSubject(chosen, around(tiny_model(), chosen), fabricate.tiny_tokenizer(), data, {"same": data})


def weights(network: Pi0Network) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_the_prefix_keeps_what_the_openvla_kept_of_the_same_tokens(data: DemonstrationData) -> None:
    model = tiny_model()
    network = around(model, settings())
    pixels, felt = torch.rand(1, 6, 64, 64) * 2 - 1, data.states[:1]
    prompt = [1, 5, 6, 7]
    theirs = DynamicCache(config=model.llama_config)
    ids, mask = batch(network.config, [prompt], [2])
    with torch.no_grad():
        model.forward_tokens(model.embed(pixels, torch.tensor([prompt]), felt), theirs)
        geometry = model.heatmap(pixels)
        ours = network.read_prefix(network.embed_objects(ids, geometry, felt), mask).cache
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        # The prefix is rounded to bfloat16 once.
        torch.testing.assert_close(one.keys, other.keys, atol=0.05, rtol=0.05)
        torch.testing.assert_close(one.values, other.values, atol=0.05, rtol=0.05)


def test_a_longer_neighbour_in_the_batch_changes_nothing(data: DemonstrationData) -> None:
    network = around(tiny_model(), settings())
    torch.nn.init.normal_(network.pi0.action_out_proj.weight)
    short, long = [1, 5, 6, 7], [1, 5, 6, 7, 9, 11, 12, 8]
    noise, time = torch.randn(1, CHUNK, 7), torch.tensor([0.7])

    def flow(texts: list[list[int]]) -> Tensor:
        ids, mask = batch(network.config, texts, [2] * len(texts))
        count = len(texts)
        embedded = network.embed_objects(ids, data.exact[:1].repeat(count, 1, 1), data.states[:1].repeat(count, 1))
        prefix = network.read_prefix(embedded, mask)
        return network.velocity(prefix, data.states[:1].repeat(count, 1), noise.repeat(count, 1, 1), time.repeat(count))

    with torch.no_grad():
        alone, beside = flow([short]), flow([short, long])
    torch.testing.assert_close(beside[:1], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(beside[1], beside[0], atol=1e-3)


def test_training_lowers_the_error_and_leaves_the_prefix(data: DemonstrationData, tmp_path: Path) -> None:
    chosen = settings(steps=200, batch=12, validate_every=200, checkpoint_every=200, log_every=50)
    learner = ExpertSubject(chosen, around(tiny_model(), chosen), fabricate.tiny_tokenizer(), data, {"same": data})
    before, frozen = learner.validate(), weights(learner.network)
    result = trainer.train(chosen, learner, tmp_path / "run")
    assert result.scores["same/action_error"] < 0.7 * before["same/action_error"]
    assert result.scores["same/other_action_error"] < 0.8 * before["same/other_action_error"]
    assert result.scores["same/gripper"] > 0.9
    after, trained = weights(learner.network), set(learns(learner.network))
    assert all(torch.equal(after[name], value) for name, value in frozen.items() if name not in trained)
    assert not torch.equal(after["pi0.action_out_proj.weight"], frozen["pi0.action_out_proj.weight"])


def test_an_interrupted_run_ends_with_the_same_bits(data: DemonstrationData, tmp_path: Path) -> None:
    chosen = settings()
    whole = subject(data)
    trainer.train(chosen, whole, tmp_path / "whole")
    first = subject(data)
    assert not trainer.train(chosen, first, tmp_path / "parts", on_step=stop_at(3)).finished
    again = subject(data)
    assert trainer.train(chosen, again, tmp_path / "parts").finished
    assert all(
        torch.equal(a, b) for a, b in zip(weights(whole.network).values(), weights(again.network).values(), strict=True)
    )


def test_only_the_first_action_of_a_further_label_counts(data: DemonstrationData) -> None:
    learner = subject(data)
    indices = torch.arange(4)
    asked = learner._ask("train", indices, torch.zeros(4, dtype=torch.long), 1.0)
    assert asked.known.sum(1).tolist() == [1.0] * 4
    errors = torch.ones(8, CHUNK, 7)
    errors[:, 1:] = 1e6
    assert float(learner._weighed(errors, asked)) == 1.0
    own = learner._ask("train", indices, None, 1.0)
    assert own.known.all()
    assert float(learner._weighed(errors, own)) > 1e5


def test_a_written_policy_acts_as_the_trained_network(data: DemonstrationData, tmp_path: Path) -> None:
    chosen = settings()
    learner = subject(data)
    trainer.train(chosen, learner, tmp_path / "run")
    card = {"scores": {"same": 1.0}}
    path = write_pi0(learner.network, tmp_path / "policy", learner.table, card, tokenizer=fabricate.tiny_tokenizer())
    assert json.loads((path / "card.json").read_text()) == card
    policy = Pi0Policy.from_checkpoint(path)
    assert policy.config.objects is not None
    assert policy.config.trained
    images = {name: np.full((64, 64, 3), 90, np.uint8) for name in ("agentview", "wrist")}
    chunk = policy.infer(
        Observation(
            images, np.array([0.1, 0.2, 0.3, 0.0, 0.0, 0.0, 0.04, -0.04]), "pick up the milk", stamp_ns=0, frame_id=0
        )
    )
    assert chunk.actions.shape == (CHUNK, 7)
    assert np.isfinite(chunk.actions).all()
    ours, theirs = learner.network.state_dict(), policy.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_policy_without_objects_cannot_be_the_prefix() -> None:
    with pytest.raises(SteerError) as refusal:
        around(fabricate.tiny_model(), settings())
    assert refusal.value.code == "other_checkpoint"
