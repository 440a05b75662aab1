"""Directions on disk: tensors in safetensors, everything else in a JSON card, both named by the content's hash.

Invariant: what `load` returns is byte for byte what was saved under that hash. A file is data from a
stranger: it is read once into memory under a size limit, checked against its own header and card, and nothing in it is
ever executed.

A store is one folder without subfolders:
`<name>@<hash12>.safetensors` + `<name>@<hash12>.json` for a direction, `<name>.axis.json` for an axis.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import save as safetensors_save

from steer_runtime.directions.card import (
    MAX_CARD_BYTES,
    checked,
    direction_of,
    encode,
    parse_card,
    parse_json,
    read_tensors,
)
from steer_runtime.directions.direction import NAME, Axis, Direction
from steer_runtime.directions.files import read_file, write_atomically
from steer_runtime.errors import SteerError, nearest

if TYPE_CHECKING:
    from steer_runtime.directions.token_basis import TowerIdentity

MAX_TENSOR_BYTES = 64 << 20
"""A dense direction on all 33 residual sites of a 7B model is 0.5 MB."""
_STEM = re.compile(rf"({NAME.pattern})@([0-9a-f]{{12}})")
_REF = re.compile(rf"({NAME.pattern})(?:@([0-9a-f]{{1,64}}))?")


class _AxisCard(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["steer-axis/2"]
    hash: str
    name: str
    negative: str
    positive: str


def _axis_card(axis: Axis) -> bytes:
    """An axis as it is stored, with the hash over its names: one end taken for the other would turn the arm around."""
    card = {"format": "steer-axis/2", "name": axis.name, "negative": axis.negative, "positive": axis.positive}
    digest = hashlib.sha256(json.dumps(card, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({**card, "hash": digest}, sort_keys=True, indent=1).encode()


@dataclass(frozen=True)
class Stored:
    """One entry of a store's listing. Exactly one of `direction` and `problem` is None."""

    id: str
    direction: Direction | None
    problem: str | None  # the sentence `load` would refuse it with


@dataclass(frozen=True)
class StoredAxis:
    """One axis of a store's listing. Exactly one of `axis` and `problem` is None."""

    name: str
    axis: Axis | None
    problem: str | None


class DirectionStore:
    """A folder of directions and axes. Holds no state of its own: every call reads the folder as it is."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def save(self, direction: Direction) -> Path:
        """Write a direction atomically and return the path of its tensors; saving it again changes nothing.

        Raises SteerError: 'bad_provenance' for facts that JSON cannot carry exactly, 'name_taken' when an axis has the
        name, 'not_written' for a full disk or missing rights.
        """
        return self.save_all([direction])[0]

    def save_all(self, directions: Sequence[Direction]) -> list[Path]:
        """As `save`, for several: every refusal comes before the first file is written."""
        encoded = []
        for direction in directions:
            card, stem = encode(direction), direction.id
            if self.has_axis(direction.name):
                raise SteerError(
                    "name_taken", f"{direction.name!r} is an axis in {self.root}; choose another name for the direction"
                )
            tensors = safetensors_save({k: np.ascontiguousarray(v) for k, v in direction.tensors().items()})
            # Reading back what is about to be written: a store never holds a file that it would refuse later.
            _decode(stem, card, tensors)
            encoded.append((stem, card, tensors))
        for stem, card, tensors in encoded:
            self._write(f"{stem}.safetensors", tensors)
            self._write(f"{stem}.json", card)
        return [self.root / f"{stem}.safetensors" for stem, _, _ in encoded]

    def replace(self, old: Direction, new: Direction) -> Path:
        """Save `new`, then remove `old`, of the same name: whoever names it, axes too, gets the new one.

        Raises SteerError as `save`; 'bad_axis' where an axis names the old one by its hash, 'not_written' where its files
        cannot be removed.
        """
        pinned = [joined.name for joined in self.load_axes() if {joined.negative, joined.positive} & _names_of(old)]
        if pinned:
            raise SteerError(
                "bad_axis",
                f"axis {pinned[0]!r} names {old.id!r} by its hash: join it by name first, then change the card",
            )
        path = self.save(new)
        if new.hash != old.hash:
            try:
                # The card goes last: tensors without a card name themselves in a listing, and so does the reverse.
                for suffix in (".safetensors", ".json"):
                    (self.root / f"{old.id}{suffix}").unlink()
            except OSError as why:
                raise SteerError(
                    "not_written",
                    f"{old.id!r} could not be removed from {self.root} ({why.strerror}): remove it by hand",
                ) from why
        return path

    def load(self, ref: str, *, model_hash: str | None = None) -> Direction:
        """The direction called `ref`: a name, or a name and `@` and the first digits of its hash.

        Where several directions share the name, `model_hash` picks among them; without it the name is ambiguous.
        Raises SteerError: 'bad_name', 'unknown_direction', 'ambiguous_name', and for the files 'missing_card',
        'bad_file', 'bad_card', 'hash_mismatch', and what Direction itself refuses.
        """
        match = _REF.fullmatch(ref) if isinstance(ref, str) and len(ref) <= 160 else None
        if match is None or ".." in ref:
            raise SteerError(
                "bad_name",
                f"{str(ref)[:80]!r} is not a direction: expected a name of lower-case letters, digits, '_', '-' or "
                "'.', optionally with @ and digits of its hash; `steer directions list` shows them",
            )
        name, digits = match[1], match[2] or ""
        stems = list(self._stems())
        found = [s for s in stems if s.startswith(f"{name}@") and _agree(s.rpartition("@")[2], digits)]
        if not found:
            known = {s.rpartition("@")[0] for s in stems} if not digits else set(stems)
            raise SteerError("unknown_direction", f"{ref!r} is not in {self.root}: {nearest(ref, known)}")
        directions = [self._read(stem) for stem in found]
        if len(directions) > 1 and model_hash is not None:
            directions = [d for d in directions if d.model_hash == model_hash]
        directions = [d for d in directions if d.hash.startswith(digits)]
        if len(directions) != 1:
            of_model = f", {len(directions)} of them for model {model_hash[:12]}" if model_hash is not None else ""
            raise SteerError(
                "ambiguous_name",
                f"{ref!r} could be {', '.join(repr(s) for s in found[:5])}{of_model}; "
                "add @ and digits of the hash to choose one",
            )
        return directions[0]

    def load_all(self) -> tuple[Direction, ...]:
        """Every direction, by id. Raises SteerError at the first file that does not verify."""
        return tuple(self._read(stem) for stem in self._stems())

    def list(self) -> tuple[Stored, ...]:
        """Every entry, by id, each with its direction or with the reason it is refused."""
        entries = []
        for stem in self._stems():
            try:
                entries.append(Stored(stem, self._read(stem), None))
            except SteerError as refused:
                entries.append(Stored(stem, None, refused.sentence))
        return tuple(entries)

    def list_axes(self) -> tuple[StoredAxis, ...]:
        """Every axis, by name, each with what it joins or with the reason it is refused."""
        entries = []
        for name in sorted(n.removesuffix(".axis.json") for n in self._names() if n.endswith(".axis.json")):
            try:
                entries.append(StoredAxis(name, self._read_axis(f"{name}.axis.json"), None))
            except SteerError as refused:
                entries.append(StoredAxis(name, None, refused.sentence))
        return tuple(entries)

    def verify(self, towers: Sequence[TowerIdentity] = ()) -> tuple[tuple[str, str], ...]:
        """(name, reason) of everything in the folder that is no good: files, axes, what is neither.

        towers: of the model that the directions must belong to, where given; each must fit the one that it names.
        """
        problems = []
        named = {tower.tower: tower for tower in towers}
        for entry in self.list():
            if entry.direction is not None and named:
                try:
                    _require_tower(entry.direction, named)
                except SteerError as refused:
                    problems.append((entry.id, refused.sentence))
            elif entry.problem is not None:
                problems.append((entry.id, entry.problem))
        problems += [(axis.name, axis.problem) for axis in self.list_axes() if axis.problem is not None]
        for name in sorted(self._names()):
            if not self._is_ours(name):
                problems.append((name, f"{name[:80]!r} is no direction or axis, and was not opened: move it elsewhere"))
        return tuple(problems)

    def save_axis(self, axis: Axis) -> Path:
        """Write an axis atomically. Both ends must be here, of one model and tower.

        Raises SteerError: 'bad_axis', 'name_taken', and what `load` refuses for an end.
        """
        self._check_axis(axis)
        if any(stem.startswith(f"{axis.name}@") for stem in self._stems()):
            raise SteerError(
                "name_taken", f"{axis.name!r} is a direction in {self.root}; choose another name for the axis"
            )
        self._write(f"{axis.name}.axis.json", _axis_card(axis))
        return self.root / f"{axis.name}.axis.json"

    def load_axes(self) -> tuple[Axis, ...]:
        """Every axis, by name. Raises SteerError for a bad file or an end that is not in the store."""
        return tuple(self._read_axis(n) for n in sorted(self._names()) if n.endswith(".axis.json"))

    def has_axis(self, name: str) -> bool:
        """Whether there is an axis file of that name; `load_axis` says whether it is good."""
        return f"{name}.axis.json" in self._names()

    def load_axis(self, name: str) -> Axis:
        """The axis called `name`. Raises SteerError: 'unknown_axis', and as `load_axes`."""
        if not self.has_axis(name):
            known = [n.removesuffix(".axis.json") for n in self._names() if n.endswith(".axis.json")]
            raise SteerError("unknown_axis", f"axis {name[:80]!r} is not in {self.root}: {nearest(name, known)}")
        return self._read_axis(f"{name}.axis.json")

    def _read_axis(self, file_name: str) -> Axis:
        content = read_file(self.root / file_name, MAX_CARD_BYTES)
        parsed = checked(_AxisCard, parse_json(content, file_name), file_name)
        axis = Axis(parsed["name"], parsed["negative"], parsed["positive"])
        if f"{axis.name}.axis.json" != file_name:
            raise SteerError(
                "bad_card", f"axis file {file_name!r} holds the axis {axis.name[:80]!r}: rename one of them"
            )
        if content != _axis_card(axis):
            raise SteerError(
                "hash_mismatch",
                f"axis file {file_name!r} was changed after it was made: restore it, or join its ends again with "
                "`steer directions axis`",
            )
        self._check_axis(axis)
        return axis

    def _check_axis(self, axis: Axis) -> None:
        if not NAME.fullmatch(axis.name) or ".." in axis.name:
            raise SteerError(
                "bad_name",
                f"axis name {axis.name[:80]!r} is not usable: expected lower-case letters, digits, '_', '-' or '.', "
                "at most 64; choose such a name",
            )
        negative, positive = self.load(axis.negative), self.load(axis.positive)
        if negative.hash == positive.hash:
            raise SteerError(
                "bad_axis", f"both ends of axis {axis.name!r} are {negative.id!r}: name two different directions"
            )
        if (negative.model_hash, negative.tower) != (positive.model_hash, positive.tower):
            raise SteerError(
                "bad_axis",
                f"the ends of axis {axis.name!r} belong to different models or towers ({negative.id!r}, "
                f"{positive.id!r}): name two directions of one model",
            )

    def _names(self) -> Sequence[str]:
        try:
            return os.listdir(self.root)
        except FileNotFoundError:
            return ()
        except OSError as why:
            raise SteerError("bad_store", f"{self.root} cannot be listed ({why.strerror}): expected a folder") from why

    def _is_ours(self, name: str) -> bool:
        if name.endswith(".axis.json"):
            return True
        stem, suffix = os.path.splitext(name)
        return suffix in (".json", ".safetensors") and _STEM.fullmatch(stem) is not None

    def _stems(self) -> Iterator[str]:
        stems = {n.removesuffix(s) for n in self._names() for s in (".safetensors", ".json") if n.endswith(s)}
        yield from sorted(s for s in stems if _STEM.fullmatch(s))

    def _read(self, stem: str) -> Direction:
        missing = [s for s in (".json", ".safetensors") if not os.path.lexists(self.root / f"{stem}{s}")]
        if missing:
            what = "card" if missing == [".json"] else "tensor file"
            raise SteerError(
                "missing_card" if what == "card" else "bad_file",
                f"direction {stem!r} has no {what} {stem + missing[0]!r} beside it: copy both files or make it again",
            )
        card = read_file(self.root / f"{stem}.json", MAX_CARD_BYTES)
        return _decode(stem, card, read_file(self.root / f"{stem}.safetensors", MAX_TENSOR_BYTES))

    def _write(self, name: str, content: bytes) -> None:
        write_atomically(self.root / name, content)


def _require_tower(direction: Direction, towers: Mapping[str, TowerIdentity]) -> None:
    """Raises SteerError('other_model')."""
    of = towers.get(direction.tower)
    if of is None:
        raise SteerError(
            "other_model",
            f"direction {direction.id!r} is for tower {direction.tower!r}: expected one of {', '.join(towers)}, the model's",
        )
    direction.require_model(of.model_hash, of.tower, (of.layers, of.d_model, of.d_ff))


def _names_of(direction: Direction) -> set[str]:
    """Every reference by hash that means this direction."""
    return {f"{direction.name}@{direction.hash[:digits]}" for digits in range(1, len(direction.hash) + 1)}


def _agree(stored: str, given: str) -> bool:
    """Whether a typed hash prefix and the 12 digits of a file name can mean the same hash."""
    return stored.startswith(given) or given.startswith(stored)


def _decode(stem: str, card: bytes, tensors: bytes) -> Direction:
    """Direction of a card and its tensor file, verified against the hash in `stem`."""
    match = _STEM.fullmatch(stem)
    if match is None:
        raise SteerError("bad_name", f"{stem[:80]!r} is not a direction file: expected <name>@<12 hex digits>")
    raw = parse_card(card, f"{stem}.json")
    if raw["name"] != match[1]:
        raise SteerError(
            "bad_card",
            f"card {stem + '.json'!r} names the direction {raw['name'][:80]!r}: expected {match[1]!r}, "
            "as its file is called",
        )
    direction = direction_of(raw, read_tensors(tensors, f"{stem}.safetensors"), stem)
    if direction.hash[:12] != match[2]:
        raise SteerError(
            "hash_mismatch",
            f"direction {stem!r} has the content {direction.hash[:12]}: its files were renamed or changed after it was "
            "made; restore them or make it again",
        )
    if card != encode(direction):
        raise SteerError(
            "hash_mismatch",
            f"card {stem + '.json'!r} is not as the store wrote it: restore it or make the direction again",
        )
    return direction
