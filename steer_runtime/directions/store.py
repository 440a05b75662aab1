"""Directions on disk: tensors in safetensors, everything else in a JSON card, both named by the content's hash.

Invariant: what `load` returns is byte for byte what was saved under that hash. A file is data from a
stranger: it is read once into memory under a size limit, checked against its own header and card, and nothing in it is
ever executed.

A store is one folder without subfolders:
`<name>@<hash12>.safetensors` + `<name>@<hash12>.json` for a direction, `<name>.axis.json` for an axis.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as safetensors_load
from safetensors.numpy import save as safetensors_save

from steer_runtime.directions.direction import NAME, OPERATIONS, Axis, Direction, Neurons
from steer_runtime.errors import SteerError, nearest

MAX_CARD_BYTES = 1 << 20
"""A card of 20 neurons with their labels is a few kB; 1 MiB bounds the time a hostile one can cost."""
MAX_TENSOR_BYTES = 64 << 20
"""A dense direction on all 33 residual sites of a 7B model is 0.5 MB."""
MAX_HEADER_BYTES = 1 << 18
"""safetensors itself allows 100 MB of header; ours names at most one tensor per residual site."""
MAX_DEPTH = 32
"""Deepest nesting of a card; provenance needs three or four."""

_STEM = re.compile(rf"({NAME.pattern})@([0-9a-f]{{12}})")
_REF = re.compile(rf"({NAME.pattern})(?:@([0-9a-f]{{1,64}}))?")
_TENSOR_NAME = re.compile(r"layer|neuron|alpha|low|site\.(0|[1-9][0-9]{0,3})")
_FOREIGN_MAGIC = (
    (b"PK\x03\x04", "a zip archive (torch.save writes those)"),
    (b"\x80", "a Python pickle"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
)


class _Card(BaseModel):
    """What a card may hold: these keys, these JSON types, nothing else. `Direction` checks the values."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["steer-direction/1"]
    name: str
    tower: str
    model_hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    layers: int = Field(ge=1)
    d_model: int = Field(ge=1)
    d_ff: int = Field(ge=1)
    op: Literal[OPERATIONS]  # type: ignore[valid-type]
    span: list[str]
    form: Literal["neurons", "dense"]
    max_strength: float
    proven: bool
    provenance: dict[str, Any]


class _AxisCard(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["steer-axis/1"]
    name: str
    negative: str
    positive: str


@dataclass(frozen=True)
class Stored:
    """One entry of a store's listing. Exactly one of `direction` and `problem` is None."""

    id: str
    direction: Direction | None
    problem: str | None  # the sentence `load` would refuse it with


class DirectionStore:
    """A folder of directions and axes. Holds no state of its own: every call reads the folder as it is."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def save(self, direction: Direction) -> Path:
        """Write a direction atomically and return the path of its tensors; saving it again changes nothing.

        Raises SteerError: 'bad_provenance' for facts that JSON cannot carry exactly, 'name_taken' when an axis has the
        name, 'not_written' for a full disk or missing rights.
        """
        try:
            card = json.dumps(direction.card(), sort_keys=True, indent=1, allow_nan=False).encode()
            stem = direction.id
        except (TypeError, ValueError, RecursionError) as why:
            raise SteerError(
                "bad_provenance",
                f"provenance of direction {direction.name!r} is not plain JSON ({why}): expected finite numbers, "
                "strings, booleans, lists and mappings with string keys",
            ) from why
        if self.has_axis(direction.name):
            raise SteerError(
                "name_taken", f"{direction.name!r} is an axis in {self.root}; choose another name for the direction"
            )
        tensors = safetensors_save({k: np.ascontiguousarray(v) for k, v in direction.tensors().items()})
        # Reading back what is about to be written: a store never holds a file that it would refuse later.
        _decode(stem, card, tensors)
        self._write(f"{stem}.safetensors", tensors)
        self._write(f"{stem}.json", card)
        return self.root / f"{stem}.safetensors"

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

    def save_axis(self, axis: Axis) -> Path:
        """Write an axis atomically. Both ends must be here, of one model and tower.

        Raises SteerError: 'bad_axis', 'name_taken', and what `load` refuses for an end.
        """
        self._check_axis(axis)
        if any(stem.startswith(f"{axis.name}@") for stem in self._stems()):
            raise SteerError(
                "name_taken", f"{axis.name!r} is a direction in {self.root}; choose another name for the axis"
            )
        card = {"format": "steer-axis/1", "name": axis.name, "negative": axis.negative, "positive": axis.positive}
        self._write(f"{axis.name}.axis.json", json.dumps(card, sort_keys=True, indent=1).encode())
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
        parsed = _parse(_AxisCard, _read_file(self.root / file_name, MAX_CARD_BYTES), file_name)
        axis = Axis(parsed["name"], parsed["negative"], parsed["positive"])
        if f"{axis.name}.axis.json" != file_name:
            raise SteerError(
                "bad_card", f"axis file {file_name!r} holds the axis {axis.name[:80]!r}: rename one of them"
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
        card = _read_file(self.root / f"{stem}.json", MAX_CARD_BYTES)
        return _decode(stem, card, _read_file(self.root / f"{stem}.safetensors", MAX_TENSOR_BYTES))

    def _write(self, name: str, content: bytes) -> None:
        write_atomically(self.root / name, content)


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that a reader sees all of it or none. Raises SteerError('not_written')."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes files private; a direction is shared like any other file of the project.
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as why:
        raise SteerError(
            "not_written", f"{path.name!r} could not be written to {path.parent} ({why.strerror})"
        ) from why


def parse_json(content: bytes, what: str) -> Any:
    """JSON without its traps: no duplicate keys, NaN, infinity or deep nesting. Raises SteerError('bad_card')."""

    def refuse(reason: str) -> SteerError:
        return SteerError("bad_card", f"{what!r} {reason}: expected a card as `steer directions make` writes it")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in parsed if keys.count(key) > 1)
            raise refuse(f"has the key {twice[:80]!r} twice")
        return parsed

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise refuse(f"holds the number {text[:40]}, which is not finite")
        return value

    try:
        parsed = json.loads(content, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
    except RecursionError as why:
        raise refuse("is nested too deeply") from why
    except ValueError as why:  # malformed JSON, wrong encoding, an integer of thousands of digits
        raise refuse(f"is not readable JSON ({why})") from why
    level: list[Any] = [parsed]
    for _ in range(MAX_DEPTH):
        level = [item for node in level for item in _children(node)]
        if not level:
            return parsed
    raise refuse(f"is nested more than {MAX_DEPTH} deep")


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def _parse(kind: type[BaseModel], content: bytes, what: str) -> dict[str, Any]:
    """The raw JSON mapping, proven to have the shape of `kind`; raw, because 1 and 1.0 hash differently."""
    raw = parse_json(content, what)
    try:
        kind.model_validate(raw)
    except ValidationError as why:
        first = why.errors()[0]
        place = ".".join(str(p) for p in first["loc"])[:80] or "it"
        raise SteerError("bad_card", f"card {what!r} is not usable: {place}: {first['msg']}") from why
    assert isinstance(raw, dict)
    return raw


def _agree(stored: str, given: str) -> bool:
    """Whether a typed hash prefix and the 12 digits of a file name can mean the same hash."""
    return stored.startswith(given) or given.startswith(stored)


def _read_file(path: Path, limit: int) -> bytes:
    """All bytes of a regular file in the store. Follows no link, blocks on no pipe, reads no more than `limit`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as why:
        if why.errno == errno.ELOOP:
            raise SteerError(
                "bad_file", f"{path.name!r} is a symbolic link, which may lead out of the store: copy the file itself"
            ) from why
        raise SteerError("bad_file", f"{path.name!r} cannot be read ({why.strerror})") from why
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise SteerError("bad_file", f"{path.name!r} is not a regular file: expected a file written by this store")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise SteerError(
            "bad_file", f"{path.name!r} is larger than {limit} bytes, more than any direction needs; refused unread"
        )
    return content


def _decode(stem: str, card: bytes, tensors: bytes) -> Direction:
    """Direction of a card and its tensor file, verified against the hash in `stem`."""
    match = _STEM.fullmatch(stem)
    if match is None:
        raise SteerError("bad_name", f"{stem[:80]!r} is not a direction file: expected <name>@<12 hex digits>")
    raw = _parse(_Card, card, f"{stem}.json")
    if raw["name"] != match[1]:
        raise SteerError(
            "bad_card",
            f"card {stem + '.json'!r} names the direction {raw['name'][:80]!r}: expected {match[1]!r}, "
            "as its file is called",
        )
    arrays = _decode_tensors(f"{stem}.safetensors", tensors)
    wanted = (
        {"layer", "neuron", "alpha"} | ({"low"} if raw["op"] == "clamp" else set())
        if raw["form"] == "neurons"
        else None
    )
    if (wanted is not None and set(arrays) != wanted) or (
        wanted is None and not all(n.startswith("site.") for n in arrays)
    ):
        raise SteerError(
            "bad_file",
            f"{stem + '.safetensors'!r} holds the tensors {sorted(arrays)[:8]}, which do not make a "
            f"{raw['form']!r} direction with operation {raw['op']!r}",
        )
    direction = Direction(
        name=raw["name"],
        tower=raw["tower"],
        model_hash=raw["model_hash"],
        layers=raw["layers"],
        d_model=raw["d_model"],
        d_ff=raw["d_ff"],
        op=raw["op"],
        span=frozenset(raw["span"]),
        neurons=Neurons(**arrays) if wanted is not None else None,
        dense={int(n.removeprefix("site.")): v for n, v in arrays.items()} if wanted is None else None,
        max_strength=raw["max_strength"],
        proven=raw["proven"],
        provenance=raw["provenance"],
    )
    if direction.hash[:12] != match[2]:
        raise SteerError(
            "hash_mismatch",
            f"direction {stem!r} has the content {direction.hash[:12]}: its card or tensors were changed after it was "
            "made; restore the files or make it again",
        )
    return direction


def _decode_tensors(what: str, content: bytes) -> Mapping[str, np.ndarray]:
    """Arrays of a safetensors file, its header checked before the library sees it. Raises SteerError('bad_file')."""
    for magic, kind in _FOREIGN_MAGIC:
        # A safetensors file may open with 0x80 too, in the length of its header; the header itself opens with '{'.
        if content.startswith(magic) and content[8:9] != b"{":
            raise SteerError(
                "bad_file", f"{what!r} is {kind}, not safetensors: it was not opened; make the direction again"
            )
    if len(content) < 8:
        raise SteerError(
            "bad_file", f"{what!r} is torn: {len(content)} bytes are too few for safetensors; copy it again"
        )
    length = int.from_bytes(content[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise SteerError(
            "bad_file",
            f"{what!r} claims a header of {length} bytes: expected at most {MAX_HEADER_BYTES}; it is not a direction",
        )
    if 8 + length > len(content):
        raise SteerError(
            "bad_file",
            f"{what!r} is torn: its header claims {length} bytes and {len(content) - 8} follow; copy it again",
        )
    header = parse_json(content[8 : 8 + length], what)
    if not isinstance(header, dict):
        raise SteerError("bad_file", f"{what!r} has a header that is no mapping: it is not safetensors")
    for name, entry in header.items():
        if name == "__metadata__":
            raise SteerError("bad_file", f"{what!r} carries metadata, which no hash covers: facts belong in the card")
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        want = "I32" if name in ("layer", "neuron") else "F32"
        if not _TENSOR_NAME.fullmatch(name):
            raise SteerError(
                "bad_file",
                f"{what!r} holds a tensor called {name[:80]!r}: expected layer, neuron, alpha, low or site.N",
            )
        if dtype != want:
            raise SteerError("bad_file", f"tensor {name!r} of {what!r} is {str(dtype)[:20]}: expected {want}")
    try:
        return safetensors_load(content)
    except SafetensorError as why:
        raise SteerError("bad_file", f"{what!r} is torn or lies about its tensors ({why}); copy it again") from why
