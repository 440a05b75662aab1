"""Parameters declared from one frozen dataclass: its fields are the names, defaults, ranges and descriptions.

Invariant: a node has exactly the parameters its dataclass shows; a wrong type or value is refused with a sentence when
the node starts, and by rclpy with the reason while it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, field, fields
from typing import Any, TypeVar

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.exceptions import (
    InvalidParameterTypeException,
    InvalidParameterValueException,
    ParameterUninitializedException,
)
from rclpy.node import Node
from rclpy.parameter import Parameter

from steer_runtime.errors import SteerError

T = TypeVar("T")

_TYPES = {
    bool: Parameter.Type.BOOL,
    int: Parameter.Type.INTEGER,
    float: Parameter.Type.DOUBLE,
    str: Parameter.Type.STRING,
    tuple: Parameter.Type.STRING_ARRAY,
}


def parameter(
    default: Any,
    description: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    live: bool = False,
) -> Any:
    """A dataclass field that becomes a parameter. live: may change while the node runs; others are read-only."""
    facts = {"description": description, "low": low, "high": high, "choices": choices, "live": live}
    return field(default=default, metadata=facts)


def declare(node: Node, kind: type[T]) -> T:
    """Declare every field of a parameter dataclass on a node and return it filled in.

    Raises SteerError('bad_parameter') naming the parameter.
    """
    for entry in fields(kind):  # type: ignore[arg-type]
        default = list(entry.default) if isinstance(entry.default, tuple) else entry.default
        try:
            # An empty list has no type of its own, so lists are declared by type and set by default [''].
            node.declare_parameter(
                entry.name, default or [""] if isinstance(default, list) else default, _descriptor(entry)
            )
        except (InvalidParameterTypeException, InvalidParameterValueException) as error:
            raise SteerError("bad_parameter", f"parameter {entry.name!r} is not usable: {error}") from error
    return read(node, kind)


def read(node: Node, kind: type[T]) -> T:
    """The present values of a parameter dataclass. Raises SteerError('bad_parameter')."""
    values: dict[str, Any] = {}
    for entry in fields(kind):  # type: ignore[arg-type]
        try:
            value = node.get_parameter(entry.name).value
        except ParameterUninitializedException as error:
            raise SteerError("bad_parameter", f"parameter {entry.name!r} is not set; give it a value") from error
        if isinstance(entry.default, tuple):
            value = tuple(item for item in value or () if item)
        choices = entry.metadata["choices"]
        if choices and value not in choices:
            raise SteerError(
                "bad_parameter", f"parameter {entry.name!r} is {value!r}: expected one of {', '.join(choices)}"
            )
        values[entry.name] = value
    return kind(**values)


def _descriptor(entry: Field[Any]) -> ParameterDescriptor:
    facts: Mapping[str, Any] = entry.metadata
    kind = _TYPES[type(entry.default)]
    descriptor = ParameterDescriptor(
        name=entry.name, type=kind.value, description=facts["description"], read_only=not facts["live"]
    )
    if facts["choices"]:
        descriptor.additional_constraints = "one of " + ", ".join(facts["choices"])
    if facts["low"] is not None and kind is Parameter.Type.DOUBLE:
        descriptor.floating_point_range = [FloatingPointRange(from_value=facts["low"], to_value=facts["high"])]
    elif facts["low"] is not None:
        descriptor.integer_range = [IntegerRange(from_value=int(facts["low"]), to_value=int(facts["high"]))]
    return descriptor
