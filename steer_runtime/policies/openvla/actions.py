"""Action tokens to robot actions and back.

Invariant: the arithmetic is the published one, token for token; what it would hide (a token that is no action, a
missing table of statistics) is counted or refused here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steer_runtime.errors import SteerError, nearest
from steer_runtime.policies.openvla.config import OpenVLAConfig


@dataclass(frozen=True)
class ActionTokenizer:
    """n_bins action tokens over [-1, 1] on the last ids of a vocabulary (OpenVLA, `prismatic/vla/action_tokenizer.py`).

    bin edges linspace(-1, 1, n_bins), hence n_bins - 1 centres; the token of bin i (0-based) has id usable_vocab - 1 - i,
    so larger ids mean smaller values; the last two ids share the last centre.
    """

    usable_vocab: int
    n_bins: int = 256

    @property
    def centres(self) -> np.ndarray:
        """Bin centres, float64 [n_bins - 1]."""
        edges = np.linspace(-1.0, 1.0, self.n_bins)
        return (edges[:-1] + edges[1:]) / 2.0

    def decode(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Normalised values float64, one for each of the token ids: centres[clip(usable_vocab - id - 1, 0, n_bins - 2)]."""
        index = np.clip(self.usable_vocab - np.asarray(ids, dtype=np.int64) - 1, 0, self.n_bins - 2)
        return self.centres[index]

    def encode(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Token ids int64 [T] of normalised values [T]: usable_vocab - digitize(clip(v, -1, 1), edges), as in training."""
        clipped = np.clip(np.asarray(values, dtype=np.float64), -1.0, 1.0)
        return self.usable_vocab - np.digitize(clipped, np.linspace(-1.0, 1.0, self.n_bins)).astype(np.int64)

    def out_of_range(self, ids: Sequence[int] | np.ndarray) -> int:
        """How many of the ids are no action tokens (the published code clips them silently)."""
        array = np.asarray(ids, dtype=np.int64)
        return int(np.sum((array < self.usable_vocab - self.n_bins) | (array >= self.usable_vocab)))

    def values(self) -> dict[int, float]:
        """Bin centre of every action token id."""
        ids = range(self.usable_vocab - self.n_bins, self.usable_vocab)
        return dict(zip(ids, self.decode(list(ids)).tolist(), strict=True))


@dataclass(frozen=True)
class Statistics:
    """Range of a dataset's actions. q01, q99: 1st and 99th percentile; mask False: dimension is not normalised."""

    key: str
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    mask: tuple[bool, ...]

    def unnormalise(self, values: np.ndarray) -> np.ndarray:
        """float64 [..., 7] from normalised [..., 7]: where mask 0.5 (a + 1) (q99 - q01) + q01, else a (published `predict_action`)."""
        low, high = np.asarray(self.q01), np.asarray(self.q99)
        return np.where(self.mask, 0.5 * (values + 1.0) * (high - low) + low, values)

    def normalise(self, actions: np.ndarray) -> np.ndarray:
        """Inverse of `unnormalise`, float64 [..., 7], clipped to [-1, 1]; a dimension of zero range maps to 0."""
        low, high = np.asarray(self.q01), np.asarray(self.q99)
        width = high - low
        scaled = np.where(width > 0, 2.0 * (actions - low) / np.where(width > 0, width, 1.0) - 1.0, 0.0)
        return np.clip(np.where(self.mask, scaled, actions), -1.0, 1.0)


def read_statistics(checkpoint: Path, config: OpenVLAConfig, suite: str) -> Statistics:
    """Statistics of `<suite>` or `<suite>_no_noops` from `dataset_statistics.json`, else from the config's norm_stats.

    Raises SteerError('no_statistics') when neither has the suite: unscaled actions would move the robot wrongly.
    """
    path = checkpoint / "dataset_statistics.json"
    table: Mapping[str, Any] = config.norm_stats
    source = "config.json (norm_stats)"
    if path.exists():
        source = path.name
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SteerError("no_statistics", f"{path} is not readable JSON ({error}); download it again") from None
    return select_statistics(table, suite, source)


def select_statistics(table: Mapping[str, Any], suite: str, source: str) -> Statistics:
    """One suite's statistics out of a parsed table. Raises SteerError('no_statistics') naming what there is."""
    key = next((k for k in (suite, f"{suite}_no_noops") if k in table), None) if isinstance(table, Mapping) else None
    if key is None:
        known = nearest(suite, table) if isinstance(table, Mapping) else "it is not a table"
        raise SteerError(
            "no_statistics",
            f"{source} has no action statistics for {suite!r} or '{suite}_no_noops' ({known}); "
            "use a checkpoint fine-tuned on this suite or name a suite it has",
        )
    try:
        action = table[key]["action"]
        q01, q99 = (tuple(float(x) for x in action[k]) for k in ("q01", "q99"))
        mask = tuple(bool(x) for x in action.get("mask", [True] * len(q01)))
    except (KeyError, TypeError, ValueError) as error:
        raise SteerError(
            "no_statistics",
            f"{source} entry {key!r} lacks action.q01 and action.q99 ({error!r}); expected 7 numbers each",
        ) from None
    if not len(q01) == len(q99) == len(mask) == 7 or not np.all(np.isfinite((q01, q99))) or np.any(np.less(q99, q01)):
        raise SteerError(
            "no_statistics",
            f"{source} entry {key!r} is not usable: expected 7 finite q01 not above their q99 and 7 mask flags",
        )
    return Statistics(key, q01, q99, mask)


def libero_gripper(opening: float) -> float:
    """LIBERO's gripper command (-1 open, +1 close) from the model's opening (1 open, 0 close): -sign(2 x - 1).

    The tie x = 0.5, where the published sign gives 0, closes: a held object is not dropped. No bin centre is 0.5.
    """
    return -1.0 if opening > 0.5 else 1.0
