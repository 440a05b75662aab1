"""What the arm's parts and its driver's controllers are called.

Invariant: imports nothing heavy, so that a node knows the names before it chooses how MuJoCo draws.
"""

from __future__ import annotations

JOINTS = (
    "shoulder_pan_joint",
    "shoulder_lift_joint",
    "elbow_joint",
    "wrist_1_joint",
    "wrist_2_joint",
    "wrist_3_joint",
)
"""Kinematic order, base to wrist."""
TRAJECTORY, POSITION, VELOCITY = CONTROLLERS = (
    "scaled_joint_trajectory_controller",
    "forward_position_controller",
    "forward_velocity_controller",
)
"""The driver's controllers, of which one is active."""
UNLOCK_DELAY_S = 5.0
"""A protective stop cannot be unlocked sooner (UR's dashboard server refuses)."""
SCENES = ("table", "libero_object")
"""What can stand around the arm: sim.ur5.scenes builds it."""
PANDA_BASE_M = (-0.6, 0.0, 0.0)
"""Where LIBERO-Object's Panda, and so the UR5e's base_link, stands in its world; sim.ur5.libero refuses another place."""
HAND_YAW_RAD = 1.5707963
"""From the TCP's axes to those of the hand in LIBERO's states, about z."""
