"""How fast the policy acts, from camera images to actions, and what it costs.

Invariant: what is timed is `policy.infer` on an observation of a real scene, with nothing left out but the rendering.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from sim.evaluation.statistics import Line
from steer_runtime.policies import LoadedPolicy
from steer_runtime.policies.openvla.policy import OpenVLAPolicy
from steer_runtime.types import Observation

LEAST, AIM = 10.0, 20.0


@dataclass(frozen=True)
class Timing:
    """Seconds of one inference, and of its parts.

    OpenVLA: vision until the language model begins (image, vision, prompt), prefill its first forward over all of that,
    decode everything after it (words, action tokens). Pi0: the stages that it times itself.
    """

    total: float
    parts: Mapping[str, float]


def measure(
    policy: LoadedPolicy,
    observation: Observation,
    *,
    inferences: int = 50,
    warm_up: int = 5,
    threads: int = 2,
    on_inference: Callable[[int, int], None] | None = None,
) -> list[Timing]:
    """Time `inferences` after `warm_up` untimed ones, on so many threads of torch; the former number is set again after."""
    timings = []
    with _threads(threads), _Stopwatch(policy) if isinstance(policy, OpenVLAPolicy) else nullcontext() as watch:
        policy.reset()
        for index in range(warm_up + inferences):
            if watch is not None:
                watch.marks.clear()
            begun = time.perf_counter()
            policy.infer(observation)
            ended = time.perf_counter()
            if watch is None:
                assert not isinstance(policy, OpenVLAPolicy)
                parts = dict(policy.timings)
            else:
                first_in, first_out = watch.marks[:2]
                parts = {"vision": first_in - begun, "prefill": first_out - first_in, "decode": ended - first_out}
            if index >= warm_up:
                timings.append(Timing(ended - begun, parts))
            if on_inference is not None:
                on_inference(index + 1, warm_up + inferences)
    return timings


def summarise(policy: LoadedPolicy, timings: Sequence[Timing], threads: int) -> list[Line]:
    """Actions a second by the median inference, its parts, parameters and peak memory."""
    totals = np.array([t.total for t in timings])
    # What of a chunk is executed before the next one.
    chunk = policy.config.chunk if isinstance(policy, OpenVLAPolicy) else policy.action_steps
    n = len(timings)
    slow, fast = np.quantile(totals, [0.975, 0.025])
    parameters = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    # Linux counts in kilobytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    median = float(np.median(totals))
    lines = [
        Line(
            f"actions a second, {threads} threads, {chunk} a chunk", chunk / median, chunk / float(slow),
            chunk / float(fast), n, "", LEAST, AIM,
        ),
        Line("  one inference (95 % of them)", median * 1e3, float(fast) * 1e3, float(slow) * 1e3, n, "ms"),
    ]  # fmt: skip
    for part in timings[0].parts:
        shares = np.array([t.parts[part] / t.total for t in timings])
        lines.append(Line(f"  share of {part}", float(np.median(shares)), n=n, unit="%"))
    lines.append(Line("  parameters", parameters / 1e6, n=1, unit="MB"))
    lines.append(Line("  peak memory of the process", peak / 1e6, n=1, unit="MB"))
    return lines


class _Stopwatch:
    """Notes when each forward of the language model begins and ends: marks in pairs."""

    def __init__(self, policy: OpenVLAPolicy) -> None:
        self.marks: list[float] = []
        self._module = policy.model.language_model.model
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> _Stopwatch:
        def mark(*_: object) -> None:
            self.marks.append(time.perf_counter())

        self._handles = [self._module.register_forward_pre_hook(mark), self._module.register_forward_hook(mark)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
