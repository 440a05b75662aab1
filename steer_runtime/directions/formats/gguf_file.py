"""A small GGUF file read from memory (llama.cpp's `ggml/docs/gguf.md`, versions 2 and 3, little-endian).

The `gguf` package's reader believes the lengths that a file claims: one changed byte can make it count to 2^60. This one
reads the part a control vector needs, and takes no more steps than the file has bytes.

Invariant: every length is checked against what is left of the file before it is followed.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from steer_runtime.errors import SteerError

MAGIC = b"GGUF"
MAX_ENTRIES = 4096
"""Fields, tensors, or elements of an array of texts; a control vector has some ten fields and a tensor a layer."""
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_F32 = 0


@dataclass(frozen=True)
class GGUFContent:
    """fields: texts and scalars by key; an array is read over and stands as None. tensors: float32 vectors by name."""

    fields: Mapping[str, str | int | float | bool | None]
    tensors: Mapping[str, np.ndarray]


def read_gguf(content: bytes, what: str) -> GGUFContent:
    """Fields and float32 vectors of a GGUF file. Raises SteerError('bad_gguf') for anything else."""
    return _Reader(content, what).read()


class _Reader:
    def __init__(self, content: bytes, what: str) -> None:
        self._content, self._what, self._at = content, what, 0

    def read(self) -> GGUFContent:
        if not self._content.startswith(MAGIC):
            raise self._refuse("does not begin as GGUF does")
        self._at = len(MAGIC)
        version = self._number("I")
        if version not in (2, 3):
            raise self._refuse(f"has version {version}, where 2 and 3 are read (little-endian)")
        tensors, count = self._number("Q"), self._number("Q")
        if max(tensors, count) > MAX_ENTRIES:
            raise self._refuse(f"claims {tensors} tensors and {count} fields, more than a control vector has")
        fields: dict[str, str | int | float | bool | None] = {}
        for _ in range(count):
            key = self._text()
            if key in fields:
                raise self._refuse(f"has the field {key[:80]!r} twice")
            fields[key] = self._value(self._number("I"))
        places = [self._place() for _ in range(tensors)]
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self._refuse(f"has the alignment {str(alignment)[:40]}, which is no power of two from 8 to 65536")
        start = -(-self._at // alignment) * alignment
        return GGUFContent(fields, self._vectors(places, start, alignment))

    def _vectors(self, places: list[tuple[str, int, int]], start: int, alignment: int) -> dict[str, np.ndarray]:
        vectors: dict[str, np.ndarray] = {}
        for name, size, offset in places:
            begin, end = start + offset, start + offset + 4 * size
            if name in vectors:
                raise self._refuse(f"has the tensor {name[:80]!r} twice")
            if offset % alignment or end > len(self._content):
                raise self._refuse(f"places the tensor {name[:80]!r} outside itself or off its alignment")
            vectors[name] = np.frombuffer(self._content[begin:end], "<f4").astype(np.float32)
        return vectors

    def _place(self) -> tuple[str, int, int]:
        """Name, elements and offset of one tensor."""
        name = self._text()
        dims = self._number("I")
        if dims != 1:
            raise self._refuse(f"has the tensor {name[:80]!r} of {dims} dimensions, where a control vector has one")
        size, kind, offset = self._number("Q"), self._number("I"), self._number("Q")
        if kind != _F32:
            raise self._refuse(f"has the tensor {name[:80]!r} of type {kind}, where float32 (0) is read")
        return name, size, offset

    def _value(self, kind: int) -> str | int | float | bool | None:
        if kind == _TEXT:
            return self._text()
        if kind != _ARRAY:
            return self._number(self._scalar(kind))
        inner, length = self._number("I"), self._number("Q")
        if inner == _TEXT:
            if length > MAX_ENTRIES:
                raise self._refuse(f"claims an array of {length} texts")
            for _ in range(length):
                self._text()
        else:
            self._take(length * struct.calcsize("<" + self._scalar(inner)))
        return None

    def _scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise self._refuse(f"has a field of the unknown type {kind}")
        return _SCALARS[kind]

    def _text(self) -> str:
        raw = self._take(self._number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as why:
            raise self._refuse("has a text that is not UTF-8") from why

    def _number(self, code: str) -> int:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _take(self, size: int) -> bytes:
        if size > len(self._content) - self._at:
            raise self._refuse("is torn: it claims more than it holds")
        self._at += size
        return self._content[self._at - size : self._at]

    def _refuse(self, reason: str) -> SteerError:
        return SteerError(
            "bad_gguf",
            f"{self._what!r} {reason}: expected a GGUF control vector, as repeng or llama.cpp writes it",
        )
