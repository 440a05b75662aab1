"""A capture sees what the layers saw, in the span that steering uses, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable

import fabricate
import numpy as np
import pytest
import torch

from steer_runtime.directions.activations import Capture, TowerWatch, capture
from steer_runtime.errors import SteerError
from steer_runtime.moments import Moment
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.steering.engine import hooks_on
from steer_runtime.types import Role

TEXT: frozenset[Role] = frozenset({"text"})


def moments(policy: OpenVLAPolicy, count: int) -> list[Moment]:
    return [
        Moment(fabricate.make_observation(policy, seed=seed), -1.0, "carry", episode=str(seed)) for seed in range(count)
    ]


def seen_by_hand(policy: OpenVLAPolicy, moment: Moment, role: Role) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of down_proj 1 and outputs of layer 0 at tokens of a role, [rows, width] each, by plain hooks."""
    tower = policy.towers["lm"]
    heard: list[list[Role]] = []
    ffn: list[torch.Tensor] = []
    residual: list[torch.Tensor] = []

    class Ear:
        def set_roles(self, tower: str, roles: list[Role]) -> None:
            heard.append(list(roles))

    one = tower.down_projs[1].register_forward_pre_hook(lambda module, args: ffn.append(args[0][0].clone()))  # type: ignore[attr-defined]
    two = tower.residual_sites[1].register_forward_hook(  # type: ignore[attr-defined]
        lambda module, args, out: residual.append((out[0] if isinstance(out, tuple) else out)[0].clone())
    )
    policy.announce_roles_to(Ear())
    policy.infer(moment.observation)
    policy.announce_roles_to(None)
    one.remove()
    two.remove()
    keep = np.array([r == role for roles in heard for r in roles])
    return torch.cat(ffn).numpy()[keep], torch.cat(residual).numpy()[keep]


@pytest.mark.parametrize("role", ["text", "image", "action"])
def test_a_capture_is_the_mean_over_the_tokens_of_the_span(role: Role) -> None:
    policy = fabricate.tiny_policy()
    found = capture(policy, "lm", moments(policy, 2), layers=[1], sites=[1], span=frozenset({role}))
    for index, moment in enumerate(moments(policy, 2)):
        ffn, residual = seen_by_hand(policy, moment, role)
        np.testing.assert_allclose(found.ffn[1][index], ffn.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.residual[1][index], residual.mean(0), rtol=1e-4, atol=1e-5)


def test_each_token_has_a_row_and_knows_its_moment() -> None:
    policy = fabricate.tiny_policy()
    found = capture(policy, "lm", moments(policy, 2), layers=[1], span=frozenset({"action"}), pool="each")
    ffn, _ = seen_by_hand(policy, moments(policy, 2)[1], "action")
    assert found.moment.tolist() == [0] * len(ffn) + [1] * len(ffn)
    np.testing.assert_allclose(found.ffn[1][found.moment == 1], ffn, rtol=1e-4, atol=1e-5)


def test_ends_are_the_last_tokens_of_each_forward() -> None:
    policy = fabricate.tiny_policy()
    moment = moments(policy, 1)
    ends = capture(policy, "lm", moment, sites=[1], span=TEXT, pool="ends")
    each = capture(policy, "lm", moment, sites=[1], span=TEXT, pool="each")
    # The tiny policy says no words: its only forward with text is the first.
    np.testing.assert_array_equal(ends.residual[1][0], each.residual[1][-1])


def test_nothing_is_left_after_a_capture_and_the_policy_answers_as_before() -> None:
    policy = fabricate.tiny_policy()
    moment = moments(policy, 1)
    before = policy.infer(moment[0].observation).actions
    capture(policy, "lm", moment, layers=[0, 1, 2], sites=[0, 1, 2, 3], span=TEXT)
    assert hooks_on(policy.model) == 0
    assert policy._listener is None
    np.testing.assert_array_equal(policy.infer(moment[0].observation).actions, before)


def test_nothing_is_left_after_an_exception() -> None:
    policy = fabricate.tiny_policy()
    inside = []

    def interrupted() -> None:
        with Capture(policy, "lm", layers=[0], sites=[0], span=TEXT):
            inside.append(hooks_on(policy.model))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert inside == [2]
    assert hooks_on(policy.model) == 0
    bad = Moment(fabricate.make_observation(policy, instruction=" "), -1.0, "carry")
    assert refused(lambda: capture(policy, "lm", [bad], layers=[0], span=TEXT)).code == "bad_instruction"
    assert hooks_on(policy.model) == 0


def test_nothing_is_left_where_attaching_fails_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = fabricate.tiny_policy()

    def fail(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(policy, "announce_roles_to", fail)
    with pytest.raises(RuntimeError), Capture(policy, "lm", layers=[0, 1], sites=[0], span=TEXT):
        pass
    assert hooks_on(policy.model) == 0


def test_what_cannot_be_watched_is_refused() -> None:
    policy = fabricate.tiny_policy()
    moment = moments(policy, 1)
    assert refused(lambda: capture(policy, "lm", [], layers=[0], span=TEXT)).code == "bad_count"
    assert refused(lambda: capture(policy, "lm", moment, layers=[3], span=TEXT)).code == "layer_out_of_range"
    assert refused(lambda: capture(policy, "lm", moment, sites=[4], span=TEXT)).code == "layer_out_of_range"
    assert refused(lambda: capture(policy, "lm", moment, layers=[0], span=frozenset())).code == "bad_span"
    assert refused(lambda: capture(policy, "lm", moment, layers=[0], span=frozenset({"state"}))).code == "no_token"
    with TowerWatch(policy, "lm"):
        pass
    handle = policy.towers["lm"].down_projs[0].register_forward_pre_hook(lambda module, args: None)  # type: ignore[attr-defined]
    assert refused(lambda: capture(policy, "lm", moment, layers=[0], span=TEXT)).code == "attached"
    handle.remove()


def test_a_hook_that_does_not_fire_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = fabricate.tiny_policy()
    down = policy.towers["lm"].down_projs[1]
    # As a compiled graph does: the module's hooks are passed by.
    monkeypatch.setattr(type(down), "__call__", lambda self, x: type(down).forward(self, x))
    assert refused(lambda: capture(policy, "lm", moments(policy, 1), layers=[1], span=TEXT)).code == "not_fired"


def refused(action: Callable[[], object]) -> SteerError:
    with pytest.raises(SteerError) as caught:
        action()
    return caught.value
