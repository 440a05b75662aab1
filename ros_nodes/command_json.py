"""Commands as JSON text, for programs without `steer_msgs`.

Invariant: a text is one flat object with known, unique keys of the right types, or it is refused by one sentence; size and
depth are checked before parsing, so the work that a text can cause is bounded.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steer_runtime.errors import SteerError
from steer_runtime.steering.command import CommandOp, SteeringCommand
from steer_runtime.types import Role

MAX_JSON_CHARS = 4096
"""Longest JSON command that is parsed at all; a full command is about 300 characters."""
MAX_JSON_DEPTH = 2
"""A command is one object whose deepest member is the list of span roles."""


class _JsonCommand(BaseModel):
    """The JSON form of a command: the typed message's fields, nulls where that has its special numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    source: str
    epoch: int
    sequence: int
    stamp_ns: int
    op: CommandOp = "set"
    target: str = ""
    strength: float = 0.0
    ramp_s: float | None = None
    hold_s: float | None = None
    priority: Annotated[int, Field(ge=-128, le=127)] = 0
    span: list[Role] | None = None
    steps: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None


def command_from_json(text: str) -> SteeringCommand:
    """A JSON object as a command. Size and depth are checked before parsing, so the work is bounded.

    Raises SteerError naming the field for anything but one flat object with known, unique keys of the right types.
    """
    if len(text) > MAX_JSON_CHARS:
        raise SteerError("too_long", f"the command has {len(text)} characters: expected at most {MAX_JSON_CHARS}")
    if "\0" in text:
        raise SteerError("bad_text", "the command holds a NUL character; send plain JSON text")
    if _depth(text) > MAX_JSON_DEPTH:
        raise SteerError("too_deep", f"the command is nested deeper than {MAX_JSON_DEPTH}; send one flat object")
    try:
        fields = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except ValueError as error:
        raise SteerError("bad_json", f"the command is not JSON: {error}; send one object") from error
    if not isinstance(fields, dict):
        raise SteerError("bad_json", f"the command is a JSON {type(fields).__name__}: expected one object")
    try:
        checked = _JsonCommand.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or "command"
        raise SteerError(
            "bad_field", f"field {name[:80]!r} of the command: {first['msg']}; correct it and send again"
        ) from error
    span = None if checked.span is None else frozenset(checked.span)
    steps = None if checked.steps is None else (checked.steps[0], checked.steps[1])
    return SteeringCommand(**{**checked.model_dump(exclude={"span", "steps"}), "span": span, "steps": steps})


def command_to_json(command: SteeringCommand) -> str:
    """The JSON form of a command."""
    fields = {**vars(command), "span": None if command.span is None else sorted(command.span)}
    return json.dumps(fields, allow_nan=False)


def _depth(text: str) -> int:
    """Deepest bracket nesting outside strings."""
    depth = deepest = 0
    quoted = escaped = False
    for char in text:
        if quoted:
            quoted = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            quoted = True
        elif char in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "]}":
            depth -= 1
    return deepest


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise SteerError("duplicate_key", f"field {twice[:80]!r} occurs twice in the command; send it once")
    return fields


def _no_constant(literal: str) -> float:
    raise SteerError("not_finite", f"the command holds the literal {literal}: expected finite numbers")
