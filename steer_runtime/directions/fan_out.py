"""Layers of a projection on a Ray cluster, or on this machine's cores.

Invariant: the labels are byte for byte those of one process: a layer is computed by the same code on the same blocks, and
its scores are dot products that no number of threads changes. A worker opens the checkpoint's files itself, so every
machine must see them under the same path; weights in memory travel through Ray's object store.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from steer_runtime.directions.projection import Done, Ends, LayerJob, Runner
from steer_runtime.errors import SteerError


def on_ray(address: str, *, workers: int | None = None, threads: int = 1) -> Runner:
    """A runner for `TokenBasis.project` and `LabelCache.labels`.

    address: 'local' starts a cluster of this machine for this run; 'auto' or host:port joins one that is running.
    workers: layers at a time, for 'local' (default: one a core). threads: CPUs of each layer.
    Raises SteerError: 'no_ray' when it is not installed or no cluster answers.
    """
    if importlib.util.find_spec("ray") is None:
        raise SteerError(
            "no_ray", "Ray is not installed: run `pip install 'steer-runtime[cluster]'`, or leave out --ray"
        )
    if threads < 1 or (workers is not None and workers < 1):
        raise SteerError("bad_option", f"{workers} workers of {threads} threads: expected 1 or more of each")

    def run(jobs: Sequence[LayerJob], done: Done) -> Iterator[tuple[int, Ends]]:
        import ray

        started = connect(ray, address, None if workers is None else workers * threads)
        try:
            yield from _spread(ray, jobs, done, threads)
        finally:
            if started:
                ray.shutdown()

    return run


def connect(ray: Any, address: str, cpus: int | None) -> bool:
    """Join or start a cluster, unless this process is in one already. True when this call made the connection.

    address: as `on_ray`. cpus: of one started here. Raises SteerError('no_ray').
    """
    if ray.is_initialized():
        return False
    try:
        if address == "local":
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
        else:
            ray.init(address=address, log_to_driver=False)
    except Exception as error:  # Ray raises a bare Exception when its processes do not start in time
        raise SteerError(
            "no_ray", f"no Ray cluster answers at {address!r} ({error}): start one with `ray start`, or use --ray local"
        ) from None
    return True


def _spread(ray: Any, jobs: Sequence[LayerJob], done: Done, threads: int) -> Iterator[tuple[int, Ends]]:
    def work(job: LayerJob, rows: Any) -> Ends | tuple[str, str]:
        torch.set_num_threads(threads)
        try:
            return replace(job, rows=rows).run()
        except SteerError as refused:  # its constructor takes two arguments, which pickling of exceptions forgets
            return refused.code, refused.sentence

    remote = ray.remote(num_cpus=threads)(work)
    # The rows are the same for all layers: they are stored once, not once a job.
    rows = ray.put(jobs[0].rows)
    nothing: Any = None
    layer_of = {remote.remote(replace(job, rows=nothing), rows): job.layer for job in jobs}
    waiting = list(layer_of)
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1)
        for ref in ready:
            result = ray.get(ref)
            if not isinstance(result, Ends):
                raise SteerError(*result)
            done(len(jobs) - len(waiting))
            yield layer_of.pop(ref), result
