"""Policies by name: `load_policy("pocket-untrained")`, or a path to a file of `configs/policies/`."""

from steer_runtime.policies.registry import load_policy, policy_configs

__all__ = ["load_policy", "policy_configs"]
