"""Value vectors and token basis of a checkpoint directory, read from its safetensors when asked for; no model is built.

A `CheckpointVectors` has what labels need of a policy (`towers`, `unembedding`, `final_norm`, `tokenizer`, `model_hash`,
...), so that `TokenBasis.of`, `LabelCache` and `labels_for` take it in a policy's place.

Invariant: its numbers are those of the loaded model, and all of its names and shapes were checked before the first is
read; memory holds one layer or one block of rows at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from steer_runtime.directions.projection import Matrix
from steer_runtime.errors import SteerError
from steer_runtime.policies.base import EMBEDDING, PREFIX, read_base
from steer_runtime.policies.openvla.actions import ActionTokenizer, Statistics, read_statistics
from steer_runtime.policies.openvla.checkpoint import STATISTICS, survey
from steer_runtime.policies.openvla.config import read_config
from steer_runtime.policies.openvla.layout import OWN_ROWS
from steer_runtime.policies.pi0.config import read_config as read_pi0_config
from steer_runtime.policies.pi0.layout import OWN_ROWS as PI0_OWN_ROWS
from steer_runtime.policies.pi0.shell import in_shell
from steer_runtime.policies.shards import DTYPES, Stored, open_tensors, read_headers
from steer_runtime.policies.tokenizer import load_tokenizer
from steer_runtime.policies.weight_hash import Progress as HashProgress
from steer_runtime.policies.weight_hash import hash_matrices
from steer_runtime.types import Tower

_PI0_DOWN = re.compile(
    r"(?:model\.)?(?:paligemma_with_expert\.paligemma\.model|vlm)\.language_model\.layers\.(\d+)\.mlp\.down_proj\.weight"
)
"""LeRobot's names, and those of transformers' `PI0ForConditionalGeneration`."""
_PI0_EXPERT_DOWN = re.compile(
    r"(?:model\.)?(?:paligemma_with_expert\.gemma_expert\.model|dit)\.layers\.(\d+)\.mlp\.down_proj\.weight"
)
_GEMMA = {"gemma_300m": (18, 1024, 4096), "gemma_2b": (18, 2048, 16384)}
"""layers, d_model, d_ff of openpi's variants (openpi `models/gemma.py`)."""


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix that stays in its file. A slice of rows is mapped anew each time, so that touched pages are let go.

    dtype: what the loaded model has it in.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, rows: slice, /) -> Tensor:
        try:
            return open_tensors(self.file).get_slice(self.key)[rows.start or 0 : rows.stop].to(self.dtype)
        except (SafetensorError, OSError) as error:
            raise SteerError(
                "torn_file", f"{self.file} does not yield {self.key} ({error}); download it again"
            ) from None


@dataclass(frozen=True)
class StoredLinear:
    """A `down_proj` of which only the weight can be had, [d_model, d_ff], read at every use."""

    matrix: Matrix

    @property
    def weight(self) -> Tensor:
        return self.matrix[:]


@dataclass(frozen=True)
class _Parts:
    """What a layout says of a checkpoint. norm: the stored weight; norm_offset: what the architecture adds to it.
    also: matrices of another tower that the model's hash covers.
    """

    name: str
    trained: bool
    tower: str
    down_projs: tuple[Matrix, ...]
    unembedding: Matrix
    norm: Matrix
    norm_offset: float
    action_values: Mapping[int, float]
    also: Mapping[str, Matrix] = field(default_factory=dict)


class CheckpointVectors:
    """See the module. tokenizer: a tokenizer.json elsewhere, for checkpoints that have none."""

    def __init__(
        self, directory: Path, *, tokenizer: Path | None = None, hash_progress: HashProgress | None = None
    ) -> None:
        """Raises SteerError: as `openvla.checkpoint.survey`; for Pi0 'missing_weights', 'misshaped_weights'."""
        if not directory.is_dir():
            raise SteerError(
                "no_checkpoint",
                f"{directory} is not a directory: give the folder of a checkpoint (config.json, safetensors)",
            )
        self.directory = directory
        self._tokenizer_file = tokenizer
        self._hash_progress = hash_progress
        kind = _kind(directory / "config.json")
        self._parts = _openvla(directory) if kind == "openvla" else _pi0(directory)
        self._kind = kind
        self.name, self.trained = self._parts.name, self._parts.trained
        d_model, d_ff = self._parts.down_projs[0].shape
        modules = tuple(StoredLinear(matrix) for matrix in self._parts.down_projs)
        # No residual site, no token: nothing runs here, so nothing can be steered.
        self.towers = {self._parts.tower: Tower(self._parts.tower, modules, (), d_model, d_ff, 0, 0)}

    @property
    def unembedding(self) -> Matrix:
        """Token basis [vocab, d_model], a slice at a time."""
        return self._parts.unembedding

    @cached_property
    def final_norm(self) -> Tensor:
        """What the final norm multiplies with, [d_model]; Gemma stores it minus one."""
        return self._parts.norm[:].float() + self._parts.norm_offset

    @cached_property
    def tokenizer(self) -> Any:
        """Raises SteerError('no_tokenizer')."""
        if self._tokenizer_file is None:
            return load_tokenizer(self.directory)
        return load_tokenizer(self._tokenizer_file.parent, self._tokenizer_file.name)

    def action_token_values(self) -> dict[int, float]:
        """Bin centre of each action token; none for Pi0, whose actions are no tokens."""
        return dict(self._parts.action_values)

    def statistics(self, suite: str | None = None) -> Statistics:
        """Action statistics of a suite, by default of the only one there is. Raises SteerError('no_statistics')."""
        if self._kind != "openvla":
            raise SteerError(
                "no_statistics", f"{self.name} has no action tokens: its actions are no words to give units"
            )
        config = read_config(self.directory / "config.json")
        if suite is None:
            path = self.directory / STATISTICS
            table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else config.norm_stats
            if len(table) != 1:
                raise SteerError(
                    "no_statistics",
                    f"{self.directory} has action statistics of {', '.join(sorted(table)[:8]) or 'nothing'}: name the suite",
                )
            suite = next(iter(table))
        return read_statistics(self.directory, config, suite)

    @cached_property
    def model_hash(self) -> str:
        """The hash that the loaded policy has. All weights concerned are read: seconds for 7B."""
        tower = self._parts.tower
        named: dict[str, Matrix] = {f"{tower}.{i}.down_proj": m for i, m in enumerate(self._parts.down_projs)}
        hashed = {**named, f"{tower}.unembedding": self.unembedding, **self._parts.also}
        return hash_matrices(hashed, progress=self._hash_progress)


def _kind(path: Path) -> str:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind = raw.get("model_type", raw.get("type"))
    except FileNotFoundError:
        raise SteerError("no_checkpoint", f"{path.parent} has no config.json: give a checkpoint's folder") from None
    except (OSError, ValueError, AttributeError) as error:
        raise SteerError("bad_model_config", f"{path} is not a readable JSON object ({error})") from None
    if kind not in ("openvla", "pi0"):
        raise SteerError("bad_model_config", f"{path} is of a {str(kind)[:40]!r} model: expected 'openvla' or 'pi0'")
    return str(kind)


def _openvla(directory: Path) -> _Parts:
    found = survey(directory)
    config, lm = found.config, found.config.lm

    def stored(key: str) -> StoredMatrix:
        entry = found.stored[key]
        return StoredMatrix(entry.file, key, entry.shape, found.dtype)

    matrices: dict[str, Matrix] = {}
    if config.base is not None:
        # The norm is left out of what is read when the checkpoint has its own.
        wanted = tuple(
            n for n in config.base.tensors if n.endswith("mlp.down_proj.weight") or n == f"{PREFIX}norm.weight"
        )
        for name, value in read_base(replace(config.base, tensors=wanted), lm.heads, lm.kv_heads):
            matrices[name] = value.to(found.dtype)
        words = matrices[EMBEDDING]
        matrices[EMBEDDING] = torch.cat([words[:], stored(OWN_ROWS)[:]])
    keys = [f"{PREFIX}layers.{i}.mlp.down_proj.weight" for i in range(lm.layers)]
    rows = EMBEDDING if lm.tied else "language_model.lm_head.weight"
    for key in (*keys, rows, f"{PREFIX}norm.weight"):
        if key not in matrices:
            matrices[key] = stored(key)
    actions = ActionTokenizer(config.usable_vocab, config.n_bins)
    return _Parts(
        config.name,
        config.trained,
        "lm",
        tuple(matrices[key] for key in keys),
        matrices[rows],
        matrices[f"{PREFIX}norm.weight"],
        0.0,
        actions.values(),
    )


def _pi0(directory: Path) -> _Parts:
    stored = read_headers(directory)
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if (raw.get("steer_runtime") or {}).get("base"):
        return _pi0_beside_base(directory, stored)
    layers = {int(match[1]): key for key in stored if (match := _PI0_DOWN.fullmatch(key))}
    expected = _pi0_sizes(raw)
    count = expected[0]
    absent = [i for i in range(count) if i not in layers]
    if absent:
        raise SteerError(
            "missing_weights",
            f"{directory} lacks the prefix's mlp.down_proj of layers {', '.join(map(str, absent[:5]))} of {count}: "
            "expected LeRobot's layout of Pi0; download it again",
        )
    root = layers[0].removesuffix(".layers.0.mlp.down_proj.weight")
    head = root.replace(".model.language_model", "").replace("vlm.language_model", "vlm") + ".lm_head.weight"
    rows = next((key for key in (f"{root}.embed_tokens.weight", head) if key in stored), None)
    norm = f"{root}.norm.weight"
    if rows is None or norm not in stored:
        raise SteerError(
            "missing_weights",
            f"{directory} lacks {norm if rows is not None else f'{root}.embed_tokens.weight and {head}'}: expected "
            "LeRobot's layout of Pi0; download it again",
        )
    dtype = _dtype(stored[rows], rows, directory)
    vocab = stored[rows].shape[0] if expected[3] is None else expected[3]
    wanted = {layers[i]: (expected[1], expected[2]) for i in range(count)} | {
        rows: (vocab, expected[1]),
        norm: (expected[1],),
    }
    wrong = [f"{k} is {list(stored[k].shape)}, expected {list(s)}" for k, s in wanted.items() if stored[k].shape != s]
    if len(layers) != count:
        wrong.append(f"it has {len(layers)} layers, expected {count}")
    if wrong:
        raise SteerError("misshaped_weights", f"{directory} does not fit its config.json: {'; '.join(wrong[:3])}")
    for key in wanted:
        _dtype(stored[key], key, directory)

    def matrix(key: str) -> StoredMatrix:
        return StoredMatrix(stored[key].file, key, stored[key].shape, dtype)

    own = raw.get("steer_runtime") or {}
    return _Parts(
        str(own.get("name") or raw.get("name") or directory.resolve().name),
        bool(own.get("trained", True)),
        "prefix",
        tuple(matrix(layers[i]) for i in range(count)),
        matrix(rows),
        matrix(norm),
        1.0,
        {},
        _expert(stored, directory),
    )


def _pi0_beside_base(directory: Path, stored: Mapping[str, Stored]) -> _Parts:
    """A pocket Pi0 whose prefix is a published Llama in a Gemma's shell, left to the Llama's own file."""
    config = read_pi0_config(directory / "config.json")
    base = config.base
    assert base is not None
    wanted = tuple(n for n in base.tensors if n.endswith("mlp.down_proj.weight") or n == f"{PREFIX}norm.weight")
    expert = _expert(stored, directory)
    # As the loaded network has it: all in the dtype of the checkpoint's own tensors.
    dtype = next(_dtype(entry, key, directory) for key, entry in stored.items())
    matrices: dict[str, Matrix] = {
        name: in_shell(name, value).to(dtype)
        for name, value in read_base(replace(base, tensors=wanted), config.prefix.heads, config.prefix.kv_heads)
    }
    layers = [f"{PREFIX}layers.{i}.mlp.down_proj.weight" for i in range(config.prefix.layers)]
    missing = [name for name in (*layers, f"{PREFIX}norm.weight") if name not in matrices]
    if missing:
        raise SteerError(
            "missing_weights",
            f"{directory} leaves only part of its prefix to {base.file} ({missing[0]} is not there): not read like this",
        )
    if PI0_OWN_ROWS in stored:
        rows = open_tensors(stored[PI0_OWN_ROWS].file).get_tensor(PI0_OWN_ROWS).to(dtype)
        matrices[EMBEDDING] = torch.cat([matrices[EMBEDDING][:], rows])
    return _Parts(
        config.name,
        config.trained,
        "prefix",
        tuple(matrices[name] for name in layers),
        matrices[EMBEDDING],
        matrices[f"{PREFIX}norm.weight"],
        1.0,
        {},
        expert,
    )


def _expert(stored: Mapping[str, Stored], directory: Path) -> dict[str, Matrix]:
    """The expert's down_projs under the names that the model's hash gives them; none where the files have no expert."""
    found = {int(match[1]): key for key in stored if (match := _PI0_EXPERT_DOWN.fullmatch(key))}
    return {
        f"expert.{i}.down_proj": StoredMatrix(
            stored[key].file, key, stored[key].shape, _dtype(stored[key], key, directory)
        )
        for i, key in sorted(found.items())
    }


def _pi0_sizes(raw: Mapping[str, Any]) -> tuple[int, int, int, int | None]:
    """layers, d_model, d_ff and, where the configuration says it, vocabulary of the prefix."""
    text = (raw.get("vlm_config") or {}).get("text_config")
    own = raw.get("steer_runtime") or {}
    try:
        if "prefix" in own:
            return (*(int(own["prefix"][k]) for k in ("layers", "d_model", "d_ff")), own.get("vocab"))  # type: ignore[return-value]
        if text:
            sizes = [int(text[k]) for k in ("num_hidden_layers", "hidden_size", "intermediate_size")]
            vocab = text.get("vocab_size")
            return sizes[0], sizes[1], sizes[2], None if vocab is None else int(vocab)
        return (*_GEMMA[raw.get("paligemma_variant", "gemma_2b")], None)
    except (KeyError, TypeError, ValueError) as error:
        raise SteerError(
            "bad_model_config",
            f"config.json does not say the prefix's sizes ({error!r}): expected paligemma_variant "
            f"{' or '.join(_GEMMA)}, or vlm_config.text_config",
        ) from None


def _dtype(entry: Stored, key: str, directory: Path) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise SteerError(
            "misshaped_weights", f"{directory} has {key} in {entry.dtype}: expected F32, BF16 or F16; dequantise it"
        )
    return DTYPES[entry.dtype]


def matrix_of(module: object) -> Matrix:
    """The weight of a `down_proj` [d_model, d_ff]: left in its file where it is in one."""
    if isinstance(module, StoredLinear):
        return module.matrix
    return module.weight.detach()  # type: ignore[attr-defined]


def matrices_of(tower: Tower, layers: Sequence[int]) -> list[Matrix]:
    return [matrix_of(tower.down_projs[layer]) for layer in layers]
