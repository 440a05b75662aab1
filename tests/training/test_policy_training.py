"""Policy training on a tiny policy of the real classes and fabricated recordings in the real format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fabricate
import numpy as np
import pytest
import torch
from fabricated import demonstrations_folder
from tiny_pocket import HEAT, SLOT_WORDS, stop_at, tiny_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sim.training import trainer
from sim.training.assembly import go_on, write_policy
from sim.training.demonstration_data import DemonstrationData, load_demonstrations, statistics
from sim.training.distillation import distillation_loss, kept, teach
from sim.training.low_rank import adapt, merge
from sim.training.policy import Branch, PolicyNet, PolicySubject, action_loss, word_loss, word_weights
from sim.training.samples import disturbed
from sim.training.settings import Distillation, PolicyTraining
from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.actions import ActionTokenizer, select_statistics
from steer_runtime.policies.openvla.checkpoint import load_checkpoint
from steer_runtime.policies.openvla.policy import OpenVLAPolicy


def settings(**changes: object) -> PolicyTraining:
    values: dict[str, object] = {
        "kind": "policy", "name": "tiny", "demonstrations": ("object",), "vision": "vision", "steps": 6, "batch": 6,
        "warmup": 2, "learning_rate": 1e-2, "state_tokens": 2, "chunk": 2, "log_every": 1, "validate_every": 3,
        "checkpoint_every": 2, "embedding_noise": 0.05, "language_model": {"layers": (0, 1, 2), "rate": 1.0},
    }  # fmt: skip
    return PolicyTraining(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemonstrationData:
    folder = tmp_path_factory.mktemp("demonstrations")
    tower = tiny_model().heatmap
    return load_demonstrations([demonstrations_folder(folder)], HEAT.classes, 2, tower, "tower", folder / "cache")


def run(data: DemonstrationData, folder: Path, **options: Any) -> tuple[PolicySubject, trainer.Result]:
    on_step, teaching = options.pop("on_step", None), options.pop("teaching", None)
    chosen = settings(**options)
    subject = PolicySubject(chosen, tiny_model(), fabricate.tiny_tokenizer(), data, {"same": data}, teaching=teaching)
    return subject, trainer.train(chosen, subject, folder, on_step=on_step)


def test_samples_hold_the_expert_chunk_and_the_last_gripper_command(data: DemonstrationData) -> None:
    assert data.actions.shape == (36, 2, 7)
    assert torch.equal(data.actions[0, 1], data.actions[1, 0])
    assert torch.equal(data.actions[11, 1], data.actions[11, 0])  # an episode's end repeats
    assert data.states[:12, -1].tolist() == [-1.0] * 6 + [1.0] * 6
    own, other = data.instructions[int(data.spoken[0])], data.instructions[int(data.other_spoken[0, 0])]
    assert (own, other) == ("pick up the milk", "pick up the soup")
    assert data.other_manners[0].tolist() == [[4, 1, 1], [0, 1, 1]]
    torch.testing.assert_close(
        data.other_actions[:, 1, :3].abs(), torch.where(data.actions[:, :1, 0].abs() > 0.5, 0.3, 0.8).expand(-1, 3)
    )


def test_what_is_seen_exactly_is_where_the_simulator_has_it(data: DemonstrationData) -> None:
    soup, basket = data.exact[0, 0], data.exact[0, 1]
    torch.testing.assert_close(soup[:2], soup[2:4] + 0.5)  # as fabricated: the place follows the position
    assert (float(soup[5]), float(soup[8])) == (1.0, 1.0)
    assert not torch.equal(soup[2:5], basket[2:5])


def test_a_blurred_view_is_wrong_by_about_its_size(data: DemonstrationData) -> None:
    torch.manual_seed(0)
    exact = data.exact.repeat(30, 1, 1)
    error = (disturbed(exact, 0.01) - exact)[..., 2]
    assert 0.008 < float(error.abs().median()) / 0.6745 < 0.013  # a normal's median deviation
    assert float((error.abs() > 0.05).float().mean()) > 0.005


def test_the_cached_view_is_the_towers(data: DemonstrationData, tmp_path: Path) -> None:
    folder = demonstrations_folder(tmp_path)
    again = load_demonstrations([folder], HEAT.classes, 2, tiny_model().heatmap, "tower", tmp_path / "cache")
    nothing: Any = nn.Identity()
    from_cache = load_demonstrations([folder], HEAT.classes, 2, nothing, "tower", tmp_path / "cache")
    assert torch.equal(again.seen, data.seen)
    assert torch.equal(from_cache.seen, again.seen)


def test_targets_decode_to_the_experts_action(data: DemonstrationData) -> None:
    model = tiny_model()
    subject = PolicySubject(settings(), model, fabricate.tiny_tokenizer(), data, {})
    policy_table = select_statistics(subject.table, "libero_object", "test")
    ids = subject._rows["train"][:, 0].numpy() + subject.net.low
    decoded = policy_table.unnormalise(ActionTokenizer(320, 256).decode(ids.reshape(-1)).reshape(-1, 7))
    np.testing.assert_allclose(decoded[:, :6], data.actions[:, 0, :6], atol=0.02)
    np.testing.assert_allclose(decoded[:, 6] > 0.5, data.actions[:, 0, 6] < 0)


@pytest.mark.parametrize("parallel", [True, False])
def test_a_training_forward_equals_decoding(data: DemonstrationData, parallel: bool) -> None:
    model = tiny_model(parallel)
    net = PolicyNet(model, settings(parallel=parallel))
    pixels, states = torch.rand(1, 6, 64, 64) * 2 - 1, data.states[:1]
    short, long = [1, 5, 6, 7], [1, 5, 6, 7, 9, 11, 12]
    with torch.no_grad():
        decoded = model.decode(pixels, torch.tensor([short]), state=states)
        said = torch.tensor([[slot.ids.index(w) for slot, w in zip(SLOT_WORDS, decoded.said, strict=True)]])
        seen, targets = model.heatmap(pixels), (decoded.tokens - net.low)[None]
        both = Branch([short, long], said.expand(2, -1), targets.expand(2, -1))
        one = Branch([long, short], said.expand(2, -1), targets[:, :7].expand(2, -1))
        (words, padded), (_, first) = net(seen.expand(2, -1, -1), states.expand(2, -1), [both, one])
    torch.testing.assert_close(padded[0], decoded.logits[:, net.low : 320], atol=2e-4, rtol=1e-4)
    for ours, theirs in zip(words, decoded.told, strict=True):
        torch.testing.assert_close(ours[0], theirs, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(first[1], padded[0, :7], atol=2e-4, rtol=1e-4)
    assert not torch.allclose(padded[0], padded[1], atol=1e-3)


def test_untold_words_weigh_so_that_plain_is_the_default(data: DemonstrationData) -> None:
    manners = data.other_manners[data.other_spoken >= 0]
    pace = word_weights(data, 0.5)[0]
    silent = torch.bincount(manners[:, 0], minlength=5).float() * torch.tensor([0.5, 1, 1, 1, 0.5])
    share = silent * pace
    assert float(share[0]) == pytest.approx(float(share[4]), rel=1e-4)  # the two that occur
    assert pace[1:4].tolist() == [0.0, 0.0, 0.0]


def test_an_untold_word_of_the_episodes_own_is_not_learnt() -> None:
    words = [torch.randn(2, 5), torch.randn(2, 3), torch.randn(2, 3)]
    manners, told = torch.tensor([[4, 1, 1], [4, 1, 1]]), torch.tensor([[True] * 3, [False] * 3])
    loss = word_loss(words, manners, told, None)
    expected = -words[0][0].log_softmax(-1)[4] / 6
    torch.testing.assert_close(loss, expected)


def test_the_loss_is_least_at_the_right_bin_and_smooth_around_it() -> None:
    targets = torch.full((1, 7), 100)

    def loss(at: int) -> float:
        logits = torch.zeros(1, 7, 256)
        logits[..., at] = 8.0
        return float(action_loss(logits, targets, 3.0, 1.0))

    assert loss(100) < loss(103) < loss(110)


@pytest.mark.parametrize("mode", ["full", "low_rank"])
def test_training_lowers_the_error_and_leaves_word_embeddings(
    data: DemonstrationData, tmp_path: Path, mode: str
) -> None:
    lm = {"layers": (0, 1, 2), "rate": 1.0, "mode": mode, "rank": 4}
    subject, result = run(
        data,
        tmp_path / "run",
        steps=150,
        batch=12,
        warmup=10,
        validate_every=150,
        checkpoint_every=150,
        language_model=lm,
    )
    before = PolicySubject(settings(), tiny_model(), fabricate.tiny_tokenizer(), data, {"same": data}).validate()
    assert result.scores["same/bin_error"] < 0.6 * before["same/bin_error"]
    assert result.scores["same/gripper"] > 0.9
    words = subject.net.model.language_model.model.embed_tokens.weight[: subject.net.low]
    assert torch.equal(words, tiny_model().language_model.model.embed_tokens.weight[: subject.net.low])


@pytest.mark.parametrize("mode", ["full", "low_rank"])
def test_an_interrupted_run_resumes_to_the_same_bits(data: DemonstrationData, tmp_path: Path, mode: str) -> None:
    lm = {"layers": (0, 1, 2), "mode": mode, "rank": 4, "frozen": ("layers.1.mlp",)}
    whole, _ = run(data, tmp_path / "whole", language_model=lm)
    _, stopped = run(data, tmp_path / "parts", language_model=lm, on_step=stop_at(3))
    assert stopped.step == 3
    resumed, _ = run(data, tmp_path / "parts", language_model=lm)
    expected = dict(whole.net.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in resumed.net.named_parameters())


def test_frozen_layers_stay_as_they_were(data: DemonstrationData, tmp_path: Path) -> None:
    lm = {"layers": (0, 1, 2), "frozen": (r"layers\.2\.mlp\.down_proj",)}
    subject, _ = run(data, tmp_path / "run", language_model=lm)
    before, after = tiny_model().language_model.model.layers, subject.net.model.language_model.model.layers
    assert torch.equal(before[2].mlp.down_proj.weight, after[2].mlp.down_proj.weight)
    assert not torch.equal(before[1].mlp.down_proj.weight, after[1].mlp.down_proj.weight)


def test_resuming_with_another_configuration_is_refused(data: DemonstrationData, tmp_path: Path) -> None:
    run(data, tmp_path / "run", on_step=stop_at(2))
    with pytest.raises(SteerError, match="smoothing") as refused:
        run(data, tmp_path / "run", smoothing=5.0)
    assert refused.value.code == "other_configuration"


def test_the_finished_policy_loads_and_acts_as_it_was_trained(data: DemonstrationData, tmp_path: Path) -> None:
    lm = {"layers": (0, 1, 2), "mode": "low_rank", "rank": 4}
    subject, _ = run(data, tmp_path / "run", language_model=lm)
    branch = Branch([[1, 5, 6, 7]], data.manners[:1], subject._rows["train"][:1].flatten(1))
    with torch.no_grad():
        subject.net.eval()
        ((before_words, before),) = subject.net(data.exact[:1], data.states[:1], [branch])
    model = subject.net.settle()
    tokenizer = fabricate.tiny_tokenizer()
    write_policy(model, tmp_path / "policy", subject.table, {}, tokenizer=tokenizer, dtype=torch.float32)
    loaded, _ = load_checkpoint(tmp_path / "policy")
    with torch.no_grad():
        ((after_words, after),) = PolicyNet(loaded, settings())(data.exact[:1], data.states[:1], [branch])
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after_words, before_words, atol=1e-4, rtol=1e-4)
    policy = OpenVLAPolicy.from_checkpoint(tmp_path / "policy", "libero_object")
    assert policy.infer(fabricate.make_observation(policy)).actions.shape == (2, 7)


def test_merging_an_adaptation_changes_no_output() -> None:
    layer = nn.Sequential(nn.Linear(8, 6))
    x = torch.randn(3, 8)
    before = layer(x)
    adapt(layer, ["0"], 2)
    torch.testing.assert_close(layer(x), before)
    with torch.no_grad():
        layer[0].parametrizations.weight[0].b.fill_(0.5)  # type: ignore[union-attr,index]
    changed = layer(x)
    assert not torch.allclose(changed, before)
    merge(layer)
    torch.testing.assert_close(layer(x), changed)
    with pytest.raises(SteerError, match="no linear layer"):
        adapt(layer, ["nothing"], 2)


def test_distillation_draws_the_student_to_the_teacher(data: DemonstrationData, tmp_path: Path) -> None:
    torch.manual_seed(1)
    teacher = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(8.0 if p.ndim > 1 else 1.0)
    spec = Distillation(weight=1.0, texts=8, length=12, batch=8, every=1, top=8)
    teaching = kept(tmp_path / "teaching.safetensors", lambda: teach(teacher, spec, 0, 1))
    stored = kept(tmp_path / "teaching.safetensors", lambda: pytest.fail("it is there already"))
    assert stored.digest == teaching.digest
    subject, _ = run(
        data, tmp_path / "run", steps=40, warmup=5, validate_every=40, checkpoint_every=40, teaching=teaching,
        distillation=spec.model_dump(),
    )  # fmt: skip

    def score(net: PolicyNet) -> float:
        with torch.no_grad():
            return float(distillation_loss(net.words(teaching.ids), teaching.top, teaching.chance))

    assert score(subject.net) < score(PolicyNet(tiny_model(), settings())) - 0.3


def test_a_dimension_that_hardly_moves_is_not_blown_up(data: DemonstrationData) -> None:
    entry: Any = statistics(data, "libero_object")["libero_object"]
    assert entry["action"]["q99"][3] - entry["action"]["q01"][3] == pytest.approx(0.1)


def test_a_run_can_go_on_from_a_finished_policy(data: DemonstrationData, tmp_path: Path) -> None:
    subject, _ = run(data, tmp_path / "run")
    model = subject.net.settle()
    # Statistics that this data would not give: going on keeps them.
    subject.table["libero_object"]["action"]["q99"][0] = 7.0  # type: ignore[index]
    write_policy(model, tmp_path / "policy", subject.table, {}, dtype=torch.float32)
    again = tiny_model()
    sight = {name: p.clone() for name, p in again.heatmap.named_parameters()}
    digest, table = go_on(again, tmp_path / "policy", "libero_object")
    assert len(digest) == 64
    further = PolicySubject(settings(), again, fabricate.tiny_tokenizer(), data, {}, table=table)
    assert further.table["libero_object"]["action"] == subject.table["libero_object"]["action"]  # type: ignore[index]
    assert torch.equal(again.state_encoder.mean, model.state_encoder.mean)  # type: ignore[union-attr]
    ours, theirs = dict(again.named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in ours.items() if not n.startswith("heatmap."))
    assert all(torch.equal(p, sight[n]) for n, p in again.heatmap.named_parameters())
    with pytest.raises(SteerError, match="another shape") as refused:
        go_on(tiny_model(parallel=False), tmp_path / "policy", "libero_object")
    assert refused.value.code == "other_checkpoint"
