"""Files of moments come back as they were saved, or are refused."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_runtime.errors import SteerError
from steer_runtime.moments import Moment, load_moments, measured, save_moments
from steer_runtime.types import Observation


def some(count: int = 3) -> list[Moment]:
    rng = np.random.default_rng(0)
    return [
        Moment(
            Observation(
                {
                    "agentview": rng.integers(0, 255, (4, 6, 3), dtype=np.uint8),
                    "wrist": np.full((4, 4, 3), i, np.uint8),
                },
                rng.random(8),
                f"pick up thing {i}",
                i,
                i,
            ),
            -1.0 if i else 1.0,
            "carry",
            {"speed": i / 10} | ({"dz": 0.5} if i else {}),
            f"task/demo_{i}",
        )
        for i in range(count)
    ]


def test_moments_come_back_as_they_were(tmp_path: Path) -> None:
    save_moments(tmp_path / "m.safetensors", some(), {"seed": 3})
    loaded, made_with = load_moments(tmp_path / "m.safetensors")
    assert made_with == {"seed": 3}
    for one, two in zip(some(), loaded, strict=True):
        assert (one.gripper, one.phase, one.measured, one.episode) == (
            two.gripper,
            two.phase,
            two.measured,
            two.episode,
        )
        assert one.observation.instruction == two.observation.instruction
        np.testing.assert_array_equal(one.observation.state, two.observation.state)
        for camera, image in one.observation.images.items():
            np.testing.assert_array_equal(image, two.observation.images[camera])


def test_equal_moments_are_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        save_moments(tmp_path / name, some(), {"seed": 3})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_quantity_that_some_moments_lack_is_refused(tmp_path: Path) -> None:
    np.testing.assert_allclose(measured(some(), "speed"), [0.0, 0.1, 0.2])
    with pytest.raises(SteerError, match="'dz' was not measured at every moment"):
        measured(some(), "dz")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4000), st.integers(0, 255))
def test_a_cut_or_changed_file_is_refused_or_reads_whole(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("moments") / "m.safetensors"
    save_moments(path, some(), {})
    content = path.read_bytes()
    path.write_bytes(content[: at % len(content)])
    with pytest.raises(SteerError, match=r"damaged|schema"):
        load_moments(path)
    changed = bytearray(content)
    changed[at % len(content)] = value
    path.write_bytes(bytes(changed))
    # A changed pixel or letter reads as another one; a changed header or size does not read at all.
    with contextlib.suppress(SteerError):
        assert len(load_moments(path)[0]) == 3


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="steer data moments"):
        load_moments(tmp_path / "none.safetensors")
