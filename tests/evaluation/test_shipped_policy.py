"""The shipped checkpoint: it loads, sees a real scene, says its words, and its own words steer what it says and does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from sim.benchmark import use_software_rendering
from sim.evaluation.axis import OFF, Condition, Steered
from sim.evaluation.axis_directions import WORDS, AxisSpec, basis_of, make
from sim.manner import PLAIN, SLOTS
from sim.policy_actor import observation_of
from sim.scene import Scene
from steer_runtime.policies import load_policy
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.types import Observation

SLOT_OF = {"speed": ("pace", 1.0), "height": ("height", 1.0), "careful": ("care", -1.0)}
"""Axis -> the slot whose words it moves, and the sign of the positive end among them."""


@pytest.fixture(scope="module")
def policy() -> OpenVLAPolicy:
    return load_policy("pocket-libero")


@pytest.fixture(scope="module")
def start() -> Iterator[Observation]:
    """The first official start of the demo's task, with decimated meshes."""
    use_software_rendering()
    with Scene("libero_object", 9, render=True) as scene:
        scene.thin_meshes()
        scene.begin(scene.task.initial_states[0])
        yield observation_of(scene, scene.task.instruction, 128)


def test_unsteered_it_says_the_plain_words_and_moves_within_range(policy: OpenVLAPolicy, start: Observation) -> None:
    policy.reset()
    chunk = policy.infer(start)
    assert policy.said == tuple(f" {word}" for word in PLAIN.words())
    assert chunk.actions.shape == (policy.config.chunk, 7)
    assert float(np.linalg.norm(chunk.actions[:, :3], axis=1).mean()) > 0.3  # it reaches, with an open hand
    assert (chunk.actions[:, 6] < 0).all()


@pytest.mark.parametrize("slot", SLOTS)
def test_the_plain_word_lies_between_the_ends_along_its_axis(policy: OpenVLAPolicy, slot: str) -> None:
    name, sign = next((name, sign) for name, (its, sign) in SLOT_OF.items() if its == slot)
    basis = basis_of(policy, name)
    ids = next(s.ids for s in policy.config.slots if s.name == slot)
    gain = policy.model.language_model.model.norm.weight.float()
    along = sign * (basis.embeddings[list(ids)] @ (gain * basis.difference / basis.difference.norm()))
    plain = float(along[list(SLOTS[slot]).index(PLAIN.words()[list(SLOTS).index(slot)])])
    assert float(along[0]) < plain - 0.4
    assert float(along[-1]) > plain + 0.4


@pytest.mark.parametrize("name", WORDS)
def test_an_axis_of_words_behind_the_last_layer_moves_its_own_word_both_ways(
    policy: OpenVLAPolicy, start: Observation, name: str
) -> None:
    last = policy.config.lm.layers
    spec = AxisSpec(name, "dense", ("text",), site=last, size=150.0)
    slot, sign = SLOT_OF[name]
    with Steered(policy, make(policy, spec, basis_of(policy, name), 0, 0)) as steered:

        def said(condition: Condition) -> tuple[float, float]:
            policy.reset()
            chunk = steered.infer(condition)(start)
            return chunk.notes[f"said_{slot}"], float(np.linalg.norm(chunk.actions[:, :3], axis=1).mean())

        (low, slow), (off, still), (high, fast) = (
            said(Condition(name, "words", -1.0)), said(Condition(OFF, OFF, 0.0)), said(Condition(name, "words", 1.0)),
        )  # fmt: skip
    assert sign * low < sign * off < sign * high
    if name == "speed":
        assert slow < 0.8 * still < still < 0.95 * fast


def test_an_instruction_that_names_no_known_object_is_told(policy: OpenVLAPolicy, start: Observation) -> None:
    said = {
        start.instruction: 0.0,
        "pick up the soup and place it in the basket": 1.0,
        "do a dance": 1.0,
        "pick up the milk and place it in the basket, quickly": 0.0,
    }
    for instruction, unknown in said.items():
        assert policy.infer(dataclasses.replace(start, instruction=instruction)).notes["unknown_object"] == unknown
