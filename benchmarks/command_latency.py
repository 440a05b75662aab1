"""From a steering command to the first action that carries it.

`python -m benchmarks.command_latency` starts a policy node in a process of its own, keeps one camera frame waiting
beside the one being inferred, sends commands at random moments, and measures the time from publishing each to the
arrival of the first chunk whose steering sequence is at or past its verdict's. The node is never idle, so the time
between two chunks is one inference. A command waits for the inference that runs already (up to one) and then takes one
of its own; the rest is transport and latching. Prints a table and one JSON line.

The bound is: 99th percentile of (latency - median inference) <= one inference + 5 ms. On a busy machine "one inference"
decides it, so both readings are printed, with the median and with the 99th percentile of the same run; the exit code
follows the second. How many chunks arrived until one carried the command does not depend on the machine's load: 1 or 2
is immediate, 3 means that the command missed a latch.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import threading
import time
from collections import Counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ros_nodes.domain import free_domain

OVERHEAD_S = 0.005
"""Allowed beyond the inference that a command may have to wait for."""


def main() -> int:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commands", type=int, default=200)
    wanted = parser.parse_args()
    os.environ.setdefault("ROS_DOMAIN_ID", str(free_domain()))
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    from benchmarks.ros_setup import running_node

    with running_node() as (client, driver):
        inference_s, latency_s, chunks = _measure(client, driver, wanted.commands)
    return _tell(inference_s, latency_s, chunks)


def _measure(client: Any, driver: Any, commands: int) -> tuple[np.ndarray, np.ndarray, Counter[int]]:
    """Inference times of the run and latency of each command (s), and how many chunks it took -> how often."""
    done = threading.Event()

    def keep_frames_coming() -> None:
        # A frame that overtakes the waiting one replaces it, so every chunk is answered by a frame, whichever it was of.
        driver.send()
        while not done.is_set():
            seen = len(driver.chunks)
            driver.send()
            driver.wait(lambda n=seen: len(driver.chunks) > n or done.is_set(), what="a chunk")

    camera = threading.Thread(target=keep_frames_coming)
    camera.start()
    latencies, chunks = [], []
    start = len(driver.chunks)
    try:
        for index in range(commands):
            time.sleep(random.Random(index).uniform(0.0, 0.05))  # commands come at any phase of an inference
            sent_s = time.monotonic()
            sent = client.publish("slow", 0.5 if index % 2 else 0.0, ramp_s=0.0)
            wanted = client.wait_verdict(sent, timeout=5.0).steering.sequence
            arrived_s = driver.wait(
                lambda at=sent_s, n=wanted: next(
                    (t for t, c in list(driver.chunks) if t >= at and c.steering_sequence >= n), None
                )
            )
            latencies.append(arrived_s - sent_s)
            chunks.append(sum(sent_s < t <= arrived_s for t, _ in list(driver.chunks)))
    finally:
        done.set()
        camera.join()
    return np.diff([arrived for arrived, _ in driver.chunks[start:]]), np.array(latencies), Counter(chunks)


def _tell(inference_s: np.ndarray, latency_s: np.ndarray, chunks: Counter[int]) -> int:
    one = float(np.median(inference_s))
    slowest = float(np.percentile(inference_s, 99))
    over = latency_s - one
    table = Table("", "median (ms)", "p99 (ms)", "worst (ms)", title=f"{len(latency_s)} commands")
    for name, values in (
        ("one inference", inference_s),
        ("command to action", latency_s),
        ("minus one inference", over),
    ):
        cells = [f"{v * 1e3:.1f}" for v in (np.median(values), np.percentile(values, 99), values.max())]
        table.add_row(name, *cells)
    Console().print(table)
    p99 = float(np.percentile(over, 99))
    facts = {
        "benchmark": "command_latency",
        "commands": len(latency_s),
        "inference_median_s": one,
        "inference_p99_s": slowest,
        "latency_median_s": float(np.median(latency_s)),
        "latency_p99_s": float(np.percentile(latency_s, 99)),
        "beyond_one_inference_p99_s": p99,
        "allowed_with_median_inference_s": one + OVERHEAD_S,
        "allowed_with_p99_inference_s": slowest + OVERHEAD_S,
        "chunks_until_carried": {str(n): chunks[n] for n in sorted(chunks)},
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps(facts))
    return 0 if p99 <= slowest + OVERHEAD_S else 1


if __name__ == "__main__":
    raise SystemExit(main())
