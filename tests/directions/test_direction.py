"""A Direction that exists is valid: what is out of range is refused when it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from steer_runtime.directions.direction import Direction, Neurons
from steer_runtime.errors import SteerError

NEURONS = Direction(
    name="up",
    tower="lm",
    model_hash="a" * 64,
    layers=3,
    d_model=4,
    d_ff=8,
    neurons=Neurons(np.array([0, 2], np.int32), np.array([7, 0], np.int32), np.array([-0.0, 4], np.float32)),
)
DENSE = replace(NEURONS, neurons=None, dense={3: np.ones(4, np.float32), 0: np.ones(4, np.float32)}, op="add")


@pytest.mark.parametrize("licence", ["Apache-2.0", "NOASSERTION", "LicenseRef-lab", "MIT OR (Apache-2.0 AND Zlib)"])
def test_a_licence_is_an_spdx_expression(licence: str) -> None:
    assert replace(NEURONS, licence=licence).card()["licence"] == licence


@pytest.mark.parametrize("licence", ["", " MIT", "see LICENSE/MIT", "MIT\n", "a" * 200, "\x1b[2J"])
def test_a_licence_that_is_none_is_refused(licence: str) -> None:
    assert refused(lambda: replace(NEURONS, licence=licence)) == "bad_licence"


@pytest.mark.parametrize("name", ["../up", "up/down", "/up", "..", "up..down", "", "Up", "up\x00", "up\n", "-up"])
def test_a_name_that_could_leave_a_folder_is_refused(name: str) -> None:
    assert refused(lambda: replace(NEURONS, name=name)) == "bad_name"


@pytest.mark.parametrize("calibrated", [(0.5, 0.5), (0.5, 0.2), (-0.1, 0.5), (0.0, 1.5), (0.0, float("nan"))])
def test_a_calibrated_range_lies_in_the_strengths(calibrated: tuple[float, float]) -> None:
    assert refused(lambda: replace(NEURONS, calibrated=calibrated)) == "bad_calibrated"


def test_licence_and_calibrated_range_are_part_of_the_identity() -> None:
    changed = [NEURONS, replace(NEURONS, licence="MIT"), replace(NEURONS, calibrated=(0.0, 0.5))]
    assert len({direction.hash for direction in changed}) == 3


def test_a_card_says_what_is_written_where() -> None:
    assert NEURONS.card()["writes"] == {"neurons": 2, "layers": [0, 2], "alpha": [0.0, 4.0]}
    assert str(NEURONS.card()["writes"]["alpha"][0]) == "0.0"  # never -0.0, whose order among zeros no machine promises
    assert DENSE.card()["writes"] == {"sites": [0, 3]}


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(SteerError) as caught:
        action()
    return caught.value.code
