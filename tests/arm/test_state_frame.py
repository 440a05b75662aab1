"""What a policy is told of the tool's pose, in the frame that its training named it in."""

from __future__ import annotations

import numpy as np
import pytest

from arm.robot import StateFrame


def rotation(quaternion: np.ndarray) -> np.ndarray:
    x, y, z, w = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def test_by_default_it_is_the_pose_in_base_link() -> None:
    pose = np.array([0.1, 0.2, 0.3]), np.array([0.6, 0.0, 0.0, 0.8])
    for told, given in zip(StateFrame().pose(*pose), pose, strict=True):
        np.testing.assert_array_equal(told, given)


def test_a_hand_that_is_turned_on_the_tool_has_the_tools_z_and_its_own_x_and_y() -> None:
    quaternion = np.array([0.1, 0.7, -0.2, 0.67])
    quaternion /= np.linalg.norm(quaternion)
    position, turned = StateFrame((-0.6, 0.0, 0.1), np.pi / 2).pose(np.array([0.5, 0.1, 0.2]), quaternion)
    np.testing.assert_allclose(position, [-0.1, 0.1, 0.3])
    tool, hand = rotation(quaternion), rotation(turned)
    np.testing.assert_allclose(hand[:, 2], tool[:, 2], atol=1e-9)
    np.testing.assert_allclose(hand[:, 0], tool[:, 1], atol=1e-9)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_both_quaternions_of_a_pose_are_told_as_one(sign: float) -> None:
    """A hand that looks down has w near 0, of either sign: axis times angle would jump from pi to -pi."""
    for w in (0.01, -0.01):
        quaternion = sign * np.array([np.sqrt(1 - w * w), 0.0, 0.0, w])
        _, told = StateFrame().pose(np.zeros(3), quaternion)
        assert told[0] > 0.9
        assert np.sign(told[3]) == np.sign(w)
