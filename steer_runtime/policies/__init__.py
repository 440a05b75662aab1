"""Policies by name: `load_policy("pocket-untrained")`, or a path to a file of `configs/policies/`."""

from steer_runtime.policies.registry import LoadedPolicy, load_policy, policy_configs, require_openvla

__all__ = ["LoadedPolicy", "load_policy", "policy_configs", "require_openvla"]
