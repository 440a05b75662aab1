"""The training loop: steps, schedule, checkpoints, resume, log, Ctrl-C.

Invariant: step s depends on the configuration, the data, s and the weights before it, and on nothing else. So a run
that was interrupted anywhere and resumed ends with the same bits as one that was not (on one thread of one machine).
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sim.demonstrations import write_atomically
from sim.record import claimed, require_room
from sim.training.checkpoints import load_step, newest, prune, save_step, trained
from sim.training.log import Log, read_log
from sim.training.settings import Common
from steer_runtime.errors import SteerError


class Subject(Protocol):
    """What is trained."""

    module: nn.Module

    def fingerprint(self) -> Mapping[str, str]:
        """What besides the configuration decides the weights: name -> hash of data and of weights it begins with."""

    def rate(self, name: str) -> float:
        """Share of the learning rate for a parameter."""

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        """Loss of step `step`, and its parts for the log. Draws chance from torch's generator, seeded for this step."""

    def validate(self) -> Mapping[str, float]:
        """Scores on held-out data, without a change to anything."""


@dataclass(frozen=True)
class Progress:
    """After a step. scores: of the last validation."""

    step: int
    steps: int
    loss: float
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Result:
    """finished: all steps are done; else the run stopped early and can be resumed. scores: of the last validation."""

    finished: bool
    step: int
    seconds: float
    scores: Mapping[str, float]


class Order:
    """Which samples step s sees: all of them once an epoch, in an order drawn anew each epoch."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self._count, self._batch, self._seed = count, batch, seed
        self._drawn: dict[int, Tensor] = {}

    def indices(self, step: int) -> Tensor:
        """int64 [batch] of step >= 1."""
        places = range((step - 1) * self._batch, step * self._batch)
        return torch.stack([self._epoch(p // self._count)[p % self._count] for p in places])

    def _epoch(self, number: int) -> Tensor:
        if number not in self._drawn:
            generator = torch.Generator().manual_seed(_mixed(self._seed, number, 1))
            self._drawn = {k: v for k, v in self._drawn.items() if k >= number - 1}
            self._drawn[number] = torch.randperm(self._count, generator=generator)
        return self._drawn[number]


def learning_rate(settings: Common, step: int) -> float:
    """Of step 1 .. steps: linear over `warmup` steps, then cosine from the peak to final_rate of it."""
    if step <= settings.warmup:
        return settings.learning_rate * step / settings.warmup
    through = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    low = settings.final_rate
    return settings.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, through))))


def train(
    settings: Common,
    subject: Subject,
    folder: Path,
    *,
    seconds: float | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> Result:
    """Train in `folder`, from its newest checkpoint if there is one. seconds: stop after so long, resumable.

    A first Ctrl-C (or SIGTERM) ends the running step, writes a checkpoint and returns; a second one interrupts at once.
    Raises SteerError: 'other_configuration', 'torn_checkpoint', 'other_checkpoint', 'in_use', 'disk_full',
    'not_writable', 'not_finite'.
    """
    torch.set_num_threads(settings.threads)
    with _claimed(folder), _stop_request() as stop:
        _settle(settings, subject, folder)
        optimiser = _optimiser(settings, subject)
        path = newest(folder / "checkpoints")
        done, spent, scores = 0, 0.0, {}
        if path is not None:
            facts = load_step(path, subject.module, optimiser)
            done, spent, scores = int(facts["step"]), float(facts["seconds"]), dict(facts["scores"])
        log = Log(folder / "log.jsonl", resumed_at=done)
        started = time.monotonic()

        def elapsed() -> float:
            return spent + time.monotonic() - started

        def keep(step: int) -> None:
            require_room(folder)
            facts = {"step": step, "seconds": elapsed(), "scores": dict(scores)}
            save_step(folder / "checkpoints", subject.module, optimiser, facts)
            prune(folder / "checkpoints", settings.keep)

        if done == 0:
            scores = dict(subject.validate())
            log.add({"step": 0, "seconds": elapsed(), **_named("valid", scores)})
        step = done
        while step < settings.steps and not stop.is_set():
            if seconds is not None and time.monotonic() - started > seconds:
                break
            step += 1
            loss, parts = _one_step(settings, subject, optimiser, step)
            if step % settings.validate_every == 0 or step == settings.steps:
                scores = dict(subject.validate())
                log.add({"step": step, "seconds": elapsed(), **_named("valid", scores)})
            if step % settings.log_every == 0:
                rate = learning_rate(settings, step)
                log.add(
                    {"step": step, "seconds": elapsed(), "train/loss": loss, "rate": rate, **_named("train", parts)}
                )
            if step % settings.checkpoint_every == 0 or step == settings.steps:
                keep(step)
            if on_step is not None:
                on_step(Progress(step, settings.steps, loss, scores))
        if step > done and step % settings.checkpoint_every and step != settings.steps:
            keep(step)
        return Result(step >= settings.steps, step, elapsed(), scores)


def last_scores(folder: Path) -> dict[str, float]:
    """Scores of the last validation in a run's log, by name."""
    rows = [row for row in read_log(folder / "log.jsonl") if any(k.startswith("valid/") for k in row)]
    return {k.removeprefix("valid/"): v for k, v in rows[-1].items() if k.startswith("valid/")} if rows else {}


def _one_step(
    settings: Common, subject: Subject, optimiser: torch.optim.Optimizer, step: int
) -> tuple[float, Mapping[str, float]]:
    torch.manual_seed(_mixed(settings.seed, step, 0))
    subject.module.train()
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(settings, step) * group["share"]
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bfloat16"):
        loss, parts = subject.loss(step)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise SteerError(
            "not_finite",
            f"the loss of step {step} is {value}: the last checkpoint is safe; lower learning_rate or look at the data",
        )
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(list(trained(subject.module).values()), settings.gradient_norm)
    optimiser.step()
    return value, parts


def _optimiser(settings: Common, subject: Subject) -> torch.optim.Optimizer:
    """AdamW; vectors (norms, biases) do not decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained(subject.module).items():
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((subject.rate(name), decay), []).append(parameter)
    listed = [{"params": p, "share": share, "weight_decay": decay} for (share, decay), p in groups.items()]
    return torch.optim.AdamW(listed, lr=settings.learning_rate, betas=settings.betas, fused=True)


def _settle(settings: Common, subject: Subject, folder: Path) -> None:
    """Write run.json, or hold this run against the one that is there. Raises SteerError('other_configuration')."""
    wanted = json.loads(json.dumps({"configuration": settings.identity(), "fingerprint": dict(subject.fingerprint())}))
    path = folder / "run.json"
    if not path.exists():
        write_atomically(path, (json.dumps(wanted, indent=1, sort_keys=True) + "\n").encode())
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        old = {**there["configuration"], **there["fingerprint"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise SteerError(
            "torn_file", f"{path} is damaged: expected JSON of a run's configuration; train into a new folder"
        ) from None
    new = {**wanted["configuration"], **wanted["fingerprint"]}
    differing = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    if differing:
        raise SteerError(
            "other_configuration",
            f"{folder} was begun with another configuration: "
            + ", ".join(f"{k} was {old.get(k)!r:.60} and is {new.get(k)!r:.60}" for k in differing[:4])
            + "; resume with the first one, or train under another name (`start` begins with weights that are there)",
        )


def _named(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{k}": v for k, v in values.items()}


def _mixed(*numbers: int) -> int:
    """One seed of several numbers (FNV-1a over their decimal text)."""
    total = 0xCBF29CE484222325
    for byte in ",".join(str(n) for n in numbers).encode():
        total = ((total ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return total >> 1


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    manager = claimed(folder)
    try:
        manager.__enter__()
    except SteerError as error:
        if error.code != "in_use":
            raise
        raise SteerError("in_use", f"another training runs in {folder}; wait for it or choose another name") from None
    try:
        yield
    finally:
        manager.__exit__(None, None, None)


@contextmanager
def _stop_request() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the handlers before return then and at the end."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(*_: object) -> None:
        stop.set()
        restore()

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        restore()
