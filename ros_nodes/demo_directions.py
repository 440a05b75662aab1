"""What a demo steers with: axes that its policy ships, and directions made of the words of the demo file.

Invariant: a shipped axis comes before one that would be made, and everything is of the very policy that was loaded.
"""

from __future__ import annotations

import datetime
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ros_nodes.demo_config import AxisSpec, DemoConfig, DirectionSpec
from steer_runtime.directions import finders
from steer_runtime.directions.direction import Axis, Direction
from steer_runtime.directions.store import DirectionStore
from steer_runtime.directions.token_basis import LabelCache, TokenBasis
from steer_runtime.directions.towers import named_tower


def demo_directions(config: DemoConfig, policy: Any, shipped: Path) -> tuple[tuple[Direction, ...], tuple[Axis, ...]]:
    """Directions and axes of a demo. shipped: the policy's own store, which need not exist.

    Raises SteerError as finders do, and 'other_policy' for an axis that is not shipped and cannot be made of words.
    """
    directions: list[Direction] = []
    axes: list[Axis] = []
    if config.directions:
        material = _material(config, policy)
        directions += [_find(spec, policy, material) for spec in config.directions]
    for spec in config.axes:
        if spec.form is None:
            axes.append(Axis(spec.name, spec.negative, spec.positive))
            continue
        ends = _shipped_ends(spec.name, policy, shipped) or _made_ends(spec, policy)
        directions += ends
        axes.append(Axis(spec.name, ends[0].name, ends[1].name))
    return tuple(directions), tuple(axes)


def save_afresh(store: Path, directions: tuple[Direction, ...], axes: tuple[Axis, ...]) -> None:
    """Make `store` hold these alone: an earlier run may have found the same names elsewhere."""
    # Only files of a store, by their form.
    for pattern in ("*@*.safetensors", "*@*.json", "*.axis.json"):
        for old in store.glob(pattern):
            old.unlink()
    made = DirectionStore(store)
    for direction in directions:
        made.save(direction)
    for axis in axes:
        made.save_axis(axis)


def _material(config: DemoConfig, policy: Any) -> finders.Material:
    """The tower of the policy that reads words, with labels that are kept for the next run."""
    cache = LabelCache(config.labels, notice=lambda sentence: print(sentence, file=sys.stderr))
    basis = TokenBasis.of(policy)
    tower = next(name for name, tower in policy.towers.items() if tower.basis == "tokens")
    return finders.Material(
        policy,
        tower,
        labels=lambda name, layers: cache.labels(basis, policy.towers[name], policy.model_hash, layers=layers),
    )


def _find(spec: DirectionSpec, policy: Any, material: finders.Material) -> Direction:
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    facts = {"policy": policy.name, "policy_trained": bool(policy.trained)}
    recipe = finders.Recipe(name=spec.name, date=today, facts=facts)
    words = {"words": spec.words or spec.dense, "against": spec.against if spec.words else spec.minus}
    finder = "token" if spec.words else "word"
    return finders.find(finder, material, recipe, finders.options_for(finder, words))


def _shipped_ends(name: str, policy: Any, shipped: Path) -> tuple[Direction, Direction] | None:
    """(negative, positive) of an axis in the policy's own store, None where it ships no axis of this name.

    Raises SteerError where they are another model's.
    """
    if not shipped.is_dir():
        return None
    store = DirectionStore(shipped)
    if not store.has_axis(name):
        return None
    axis = store.load_axis(name)
    negative, positive = (store.load(end, model_hash=policy.model_hash) for end in (axis.negative, axis.positive))
    for end in (negative, positive):
        end.require_fits(named_tower(policy, end.tower), policy.model_hash)
    return negative, positive


def _made_ends(spec: AxisSpec, policy: Any) -> tuple[Direction, Direction]:
    """(negative, positive) of an axis of words, as `steer eval axis` makes it."""
    from sim.evaluation import axis_directions as making
    from steer_runtime.policies.registry import require_openvla

    assert spec.form is not None
    policy = require_openvla(
        policy, f"axis {spec.name!r}, which is in no direction store of the policy and is made of words,"
    )
    wanted = making.AxisSpec(
        name=spec.words or spec.name,
        form=spec.form,
        span=making.span_of(spec.span, spec.form),
        layers=spec.layers,
        count=spec.count,
        alpha=spec.alpha,
        site=spec.site,
        size=spec.norm,
    )
    basis = making.basis_of(policy, wanted.name)
    (draw,) = making.make(policy, wanted, basis, 0, 0)
    high, low = list(basis.used["positive"]), list(basis.used["negative"])

    def end(kind: str, direction: Direction, positive: list[str], negative: list[str]) -> Direction:
        facts = {**direction.provenance, "positive": positive, "negative": negative}
        return replace(direction, name=f"{spec.name}-{kind}", provenance=facts)

    return end("negative", draw.negative, low, high), end("positive", draw.positive, high, low)
