"""Which tower of a policy is meant, and what can be found and written there.

Invariant: what cannot reach the action, or has no words, is refused with its reason before any work is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steer_runtime.errors import SteerError, nearest
from steer_runtime.types import Role, Tower


def named_tower(policy: Any, tower: str = "") -> Tower:
    """A tower by name, or the only one. Raises SteerError: 'unknown_tower', 'which_tower'."""
    if not tower and len(policy.towers) > 1:
        raise SteerError(
            "which_tower", f"{policy.name!r} has several towers: give one of {', '.join(policy.towers)} as the tower"
        )
    name = tower or next(iter(policy.towers))
    if name not in policy.towers:
        raise SteerError("unknown_tower", f"{policy.name!r} has no tower {name[:40]!r}: {nearest(name, policy.towers)}")
    return policy.towers[name]


def require_tokens(tower: Tower, policy_name: str) -> None:
    """Refuse to read words in a tower that has none. Raises SteerError('no_token_basis')."""
    if tower.basis != "tokens":
        raise SteerError(
            "no_token_basis",
            f"tower {tower.name!r} of {policy_name!r} computes actions and has no token basis, so no words: find there by "
            "action, contrast, attribution, probe or pca, or choose another tower",
        )


def require_span(tower: Tower, span: frozenset[Role] | None) -> None:
    """Refuse a span of which a tower has no token. Raises SteerError('bad_span')."""
    if span and not span & tower.roles:
        raise SteerError(
            "bad_span",
            f"tower {tower.name!r} runs on no {' or '.join(sorted(span))} tokens: expected a span with one of "
            f"{', '.join(sorted(tower.roles))}",
        )


def require_reach(
    tower: Tower, *, layers: Sequence[int] = (), sites: Sequence[int] = (), who: str = "steering would write to"
) -> None:
    """Refuse layers and residual sites that cannot reach the action. Raises SteerError('dead_layer') with the reason."""
    for what, asked, alive in (
        ("layer", layers, tower.steerable_layers),
        ("residual site", sites, tower.steerable_sites),
    ):
        dead = [index for index in asked if index not in alive]
        if dead:
            raise SteerError(
                "dead_layer",
                f"{who} {what} {dead[0]} of tower {tower.name!r}, which cannot reach the action"
                f"{': ' if tower.why_dead else ''}{tower.why_dead}; expected {what} 0 to {alive.stop - 1}",
            )
