"""Options that are lists in one string, as the commands of this room take them."""

from __future__ import annotations

from steer_runtime.errors import SteerError


def words(text: str) -> tuple[str, ...]:
    """The comma-separated words of an option."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def task_ids(text: str) -> tuple[int, ...] | None:
    """Task ids, None for an empty option. Raises SteerError('bad_tasks')."""
    try:
        return tuple(int(word) for word in words(text)) or None
    except ValueError:
        raise SteerError(
            "bad_tasks", f"--tasks {text[:80]!r} is not a list of task ids: expected for example 0,3,4"
        ) from None


def strengths(text: str) -> tuple[float, ...]:
    """Strengths from -1 to 1, at least one. Raises SteerError('bad_strength')."""
    try:
        found = tuple(float(word) for word in words(text))
    except ValueError:
        found = ()
    if not found or any(not -1 <= value <= 1 for value in found):
        raise SteerError(
            "bad_strength", f"--strengths {text[:80]!r} is not usable: expected numbers from -1 to 1, such as 0.5,1"
        )
    return found
