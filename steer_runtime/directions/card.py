"""The card of a direction: JSON that says everything but the tensors, and the way back to a Direction.

Invariant: `direction_of` returns what `encode` was given, to the byte of its hash, or refuses; a card is data from a
stranger, of bounded depth and with none of JSON's traps.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as safetensors_load

from steer_runtime.directions.direction import CARD_FORMAT, OPERATIONS, Direction, Neurons
from steer_runtime.errors import SteerError

MAX_CARD_BYTES = 1 << 20
"""A card of 20 neurons with their labels is a few kB; 1 MiB bounds the time a hostile one can cost."""
MAX_HEADER_BYTES = 1 << 18
"""safetensors itself allows 100 MB of header; ours names at most one tensor per residual site."""
MAX_DEPTH = 32
"""Deepest nesting of a card; provenance needs three or four."""

_HEX = r"^[0-9a-f]{64}$"
_TENSOR_NAME = re.compile(r"layer|neuron|alpha|low|site\.(0|[1-9][0-9]{0,3})")
FOREIGN_MAGIC = (
    (b"PK\x03\x04", "a zip archive (torch.save writes those)"),
    (b"\x80", "a Python pickle"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
)


class _Card(BaseModel):
    """What a card may hold: these keys, these JSON types, nothing else. `Direction` checks the values."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["steer-direction/2"]
    hash: str = Field(pattern=_HEX)
    name: str
    tower: str
    model_hash: str = Field(pattern=_HEX)
    layers: int = Field(ge=1)
    d_model: int = Field(ge=1)
    d_ff: int = Field(ge=1)
    op: Literal[OPERATIONS]  # type: ignore[valid-type]
    span: list[str]
    form: Literal["neurons", "dense"]
    writes: dict[str, Any]
    max_strength: float
    proven: bool
    calibrated: list[float] | None = Field(min_length=2, max_length=2)
    licence: str
    provenance: dict[str, Any]


def encode(direction: Direction, *, indent: int | None = 1) -> bytes:
    """The card as it is stored: `Direction.card()` and the hash over it and the tensors.

    Raises SteerError('bad_provenance') for facts that JSON cannot carry exactly.
    """
    try:
        card = {**direction.card(), "hash": direction.hash}
        return json.dumps(card, sort_keys=True, indent=indent, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as why:
        raise SteerError(
            "bad_provenance",
            f"provenance of direction {direction.name!r} is not plain JSON ({why}): expected finite numbers, "
            "strings, booleans, lists and mappings with string keys",
        ) from why


def parse_card(content: bytes, what: str) -> dict[str, Any]:
    """The raw mapping of a direction's card. Raises SteerError('bad_card')."""
    raw = parse_json(content, what)
    found = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(found, str) and found.startswith("steer-direction/") and found != CARD_FORMAT:
        raise SteerError(
            "bad_card",
            f"card {what!r} has the format {found[:40]!r}: expected {CARD_FORMAT!r}; make the direction again with "
            "`steer directions make`",
        )
    return checked(_Card, raw, what)


def direction_of(raw: Mapping[str, Any], arrays: Mapping[str, np.ndarray], what: str) -> Direction:
    """Direction of a parsed card and its tensors, verified against the card's hash.

    Raises SteerError: 'bad_file' for tensors that are not the card's, 'hash_mismatch', and what Direction refuses.
    """
    wanted = {"layer", "neuron", "alpha"} | ({"low"} if raw["op"] == "clamp" else set())
    dense = raw["form"] == "dense"
    fits = all(name.startswith("site.") for name in arrays) if dense else set(arrays) == wanted
    if not fits:
        raise SteerError(
            "bad_file",
            f"{what!r} holds the tensors {sorted(arrays)[:8]}, which do not make a {raw['form']!r} direction with "
            f"operation {raw['op']!r}",
        )
    calibrated = raw["calibrated"]
    direction = Direction(
        name=raw["name"],
        tower=raw["tower"],
        model_hash=raw["model_hash"],
        layers=raw["layers"],
        d_model=raw["d_model"],
        d_ff=raw["d_ff"],
        op=raw["op"],
        span=frozenset(raw["span"]),
        neurons=None if dense else Neurons(**arrays),
        dense={int(name.removeprefix("site.")): vector for name, vector in arrays.items()} if dense else None,
        max_strength=raw["max_strength"],
        proven=raw["proven"],
        provenance=raw["provenance"],
        licence=raw["licence"],
        calibrated=None if calibrated is None else (calibrated[0], calibrated[1]),
    )
    if {**direction.card(), "hash": direction.hash} != raw:
        raise SteerError(
            "hash_mismatch",
            f"{what!r} has the content {direction.hash[:12]}, its card says {raw['hash'][:12]}: card or tensors were "
            "changed after it was made; restore the files or make it again",
        )
    return direction


def parse_json(content: bytes | str, what: str) -> Any:
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


def checked(kind: type[BaseModel], raw: Any, what: str) -> dict[str, Any]:
    """The raw JSON mapping, proven to have the shape of `kind`; raw, because 1 and 1.0 hash differently."""
    try:
        kind.model_validate(raw)
    except ValidationError as why:
        first = why.errors()[0]
        place = ".".join(str(p) for p in first["loc"])[:80] or "it"
        raise SteerError("bad_card", f"card {what!r} is not usable: {place}: {first['msg']}") from why
    assert isinstance(raw, dict)
    return raw


def read_tensors(content: bytes, what: str) -> Mapping[str, np.ndarray]:
    """Arrays of a store's safetensors file: our names and types only, no metadata. Raises SteerError('bad_file')."""
    header = read_header(content, what)
    # The library would take white space anywhere; a changed byte is told even where it means nothing.
    written = content[8 : 8 + int.from_bytes(content[:8], "little")].rstrip(b" ")
    if written != json.dumps(header, separators=(",", ":")).encode():
        raise SteerError("bad_file", f"{what!r} has a header that no writer of safetensors makes: copy the file again")
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


def read_header(content: bytes, what: str) -> dict[str, Any]:
    """Header of a safetensors file, before the library sees it. Raises SteerError: 'bad_file', 'bad_card'."""
    for magic, kind in FOREIGN_MAGIC:
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
    return header
