"""Action tokens, bins, statistics and the gripper: the published numbers, token for token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fabricate import STATISTICS, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from steer_runtime.errors import SteerError
from steer_runtime.policies.openvla.actions import (
    ActionTokenizer,
    Statistics,
    libero_gripper,
    read_statistics,
    select_statistics,
)

LLAMA = ActionTokenizer(32000)
SPATIAL = Statistics(
    "libero_spatial_no_noops",
    (-0.7454732, -0.6616071, -0.9375, -0.1071429, -0.2067857, -0.1842857, 0.0),
    (0.9375, 0.8758929, 0.9321429, 0.1039286, 0.1767857, 0.1457143, 1.0),
    (True, True, True, True, True, True, False),
)


@pytest.mark.parametrize(
    ("token", "value"),
    [(31999, -0.99608), (31872, 0.0), (31745, 0.99608), (31744, 0.99608), (5, 0.99608), (32063, -0.99608)],
)
def test_published_tokens_have_their_published_values(token: int, value: float) -> None:
    assert LLAMA.decode([token])[0] == pytest.approx(value, abs=1e-5)


def test_golden_action_of_seven_middle_tokens() -> None:
    action = SPATIAL.unnormalise(LLAMA.decode([31872] * 7))
    assert action == pytest.approx([0.0960, 0.1071, -0.0027, -0.0016, -0.0150, -0.0193, 0.0], abs=5e-5)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=7))
def test_a_value_comes_back_within_half_a_bin(values: list[float]) -> None:
    back = LLAMA.decode(LLAMA.encode(values))
    assert np.max(np.abs(back - values)) <= 1 / 255 + 1e-12


@given(st.integers(31745, 31999))
def test_a_bin_centre_encodes_to_its_own_token(token: int) -> None:
    assert LLAMA.encode(LLAMA.decode([token])).tolist() == [token]


@given(st.lists(st.floats(-0.99, 0.99), min_size=7, max_size=7))
def test_normalise_inverts_unnormalise(values: list[float]) -> None:
    normalised = np.array(values)
    assert SPATIAL.normalise(SPATIAL.unnormalise(normalised)) == pytest.approx(normalised, abs=1e-9)


def test_tokens_that_are_no_actions_are_counted() -> None:
    assert LLAMA.out_of_range([31743, 31744, 31999, 32000, 0]) == 3


def test_every_action_token_has_a_value_for_labels() -> None:
    values = LLAMA.values()
    assert (len(values), min(values), max(values)) == (256, 31744, 31999)
    assert values[31872] == pytest.approx(0.0)


@pytest.mark.parametrize(("opening", "command"), [(0.996, -1.0), (0.0, 1.0), (0.5, 1.0), (-0.2, 1.0)])
def test_gripper_opens_above_one_half_and_closes_on_the_tie(opening: float, command: float) -> None:
    assert libero_gripper(opening) == command


def test_the_tie_is_no_bin_centre() -> None:
    assert np.min(np.abs(LLAMA.centres - 0.5)) > 1e-3


def test_statistics_fall_back_to_the_key_without_noops() -> None:
    table = {"libero_object_no_noops": STATISTICS["libero_object"]}
    assert select_statistics(table, "libero_object", "x").key == "libero_object_no_noops"


def test_the_statistics_file_wins_over_the_configuration(tmp_path: Path) -> None:
    other = {"libero_object": {"action": {"q01": [0.0] * 7, "q99": [2.0] * 7}}}
    config = tiny_config(norm_stats=other)
    assert read_statistics(tmp_path, config, "libero_object").q99[0] == 2.0
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(STATISTICS))
    assert read_statistics(tmp_path, config, "libero_object").q99[0] == 0.5


def test_a_suite_without_statistics_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(STATISTICS))
    with pytest.raises(SteerError, match=r"'libero_goal'.*libero_object") as refused:
        read_statistics(tmp_path, tiny_config(), "libero_goal")
    assert refused.value.code == "no_statistics"


@pytest.mark.parametrize(
    "action",
    [
        {},
        {"q01": [0.0] * 6, "q99": [1.0] * 6},
        {"q01": [0.0] * 7, "q99": [float("nan")] * 7},
        {"q01": [1.0] * 7, "q99": [0.0] * 7},
        {"q01": "no", "q99": [1.0] * 7},
    ],
)
def test_unusable_statistics_are_refused(action: dict[str, object]) -> None:
    with pytest.raises(SteerError, match="libero_object") as refused:
        select_statistics({"libero_object": {"action": action}}, "libero_object", "x")
    assert refused.value.code == "no_statistics"
