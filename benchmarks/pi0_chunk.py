"""What steering adds to a chunk of Pi0, and how its time is spent: `python -m benchmarks.pi0_chunk`.

Steered and unsteered chunks alternate on one thread, and what is compared is processor time, pair by pair, so that other
work on the machine hardly matters; intervals are the middle 95 % of the pairs' ratios resampled (bootstrap of the median).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from steer_runtime.directions.direction import Direction, Neurons
from steer_runtime.policies import load_policy
from steer_runtime.policies.pi0.policy import Pi0Policy
from steer_runtime.steering.offline import OfflineSteering
from steer_runtime.types import Observation


def neurons(policy: Pi0Policy, tower: str, count: int, seed: int = 0) -> Direction:
    """`count` random neurons of a tower's steerable layers, added a little, so that the numbers stay ordinary."""
    of = policy.towers[tower]
    flat = np.random.default_rng(seed).choice(len(of.steerable_layers) * of.d_ff, count, replace=False)
    return Direction(
        name=tower,
        tower=tower,
        model_hash=policy.model_hash,
        layers=of.layers,
        d_model=of.d_model,
        d_ff=of.d_ff,
        op="add",
        neurons=Neurons(
            (flat // of.d_ff).astype(np.int32), (flat % of.d_ff).astype(np.int32), np.full(count, 0.1, np.float32)
        ),
    )


def ratio(steered: Callable[[], object], floor: Callable[[], object], pairs: int) -> tuple[float, float, float]:
    """Median of steered / floor in processor time, and its bootstrap interval."""
    ratios = []
    for pair in range(pairs + 2):
        times = {}
        for name in ("steered", "floor") if pair % 2 else ("floor", "steered"):
            begun = time.thread_time()
            (steered if name == "steered" else floor)()
            times[name] = time.thread_time() - begun
        if pair >= 2:
            ratios.append(times["steered"] / times["floor"])
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    return float(np.median(ratios)), *np.quantile(medians, [0.025, 0.975]).tolist()


def case(policy: Pi0Policy, bare: Pi0Policy, observation: Observation, towers: Sequence[str], pairs: int) -> str:
    """One line: the ratio with 20 neurons in each of the towers. bare: the same policy, never hooked."""
    with OfflineSteering(policy, [neurons(policy, tower, 20) for tower in towers]) as steering:
        steering.set(dict.fromkeys(towers, 1.0))
        median, low, high = ratio(
            lambda: steering.run(lambda: policy.infer(observation)), lambda: bare.infer(observation), pairs
        )
    return f"20 neurons in {' and '.join(towers)}: {median:.3f} ({low:.3f} - {high:.3f}) of an unsteered chunk"


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="pocket-pi0-untrained")
    parser.add_argument("--pairs", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy, bare = load_policy(options.policy), load_policy(options.policy)
    assert isinstance(policy, Pi0Policy)
    assert isinstance(bare, Pi0Policy)
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (256, 256, 3), dtype=np.uint8) for name in policy.cameras}
    observation = Observation(images, np.zeros(8), "pick up the soup and place it in the basket", 0, 0)
    policy.infer(observation)
    begun = time.thread_time()
    policy.infer(observation)
    spent = 1e3 * (time.thread_time() - begun)
    print(f"{policy.name}: {spent:.0f} ms of processor time a chunk of {policy.config.chunk}")
    total = sum(policy.timings.values())
    print("  " + ", ".join(f"{stage} {seconds / total:.0%}" for stage, seconds in policy.timings.items()))
    for towers in (("prefix",), ("expert",), ("prefix", "expert")):
        print(case(policy, bare, observation, towers, options.pairs), flush=True)


if __name__ == "__main__":
    main()
