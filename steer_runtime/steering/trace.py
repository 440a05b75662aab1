"""What was changed where: one record an inference, kept in a ring, written as JSON lines."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from steer_runtime.types import SteeringStamp


@dataclass(frozen=True)
class SiteTrace:
    """Changes at one site during one inference.

    kind: "neurons" (input of down_proj of `layer`) or "dense" (residual site `layer`: 0 embedding, i + 1 after layer i).
    neurons: neuron indices written (empty for dense). forwards: forwards that were changed. writes: values written
    (neurons x tokens) for "neurons", tokens changed for "dense". dose: largest ||change|| / ||residual|| over the
    changed tokens, None when not measured.
    """

    tower: str
    kind: Literal["neurons", "dense"]
    layer: int
    neurons: tuple[int, ...]
    forwards: int
    writes: int
    dose: float | None


@dataclass(frozen=True)
class AppliedTarget:
    """One direction as one inference ran under it: enough to steer with it again, exactly.

    target: as commanded; strength: signed, of the target, after ramps. span: bits of the roles that were written.
    steps: forwards that were written in, None for all.
    """

    target: str
    direction_id: str
    strength: float
    priority: int
    span: int
    steps: tuple[int, int] | None


@dataclass(frozen=True)
class TraceRecord:
    """One inference: which steering, how strong each direction was, where it wrote, and whether every hook fired.

    strengths: direction id -> strength in [0, 1] after ramps; applied: the same in full, lowest precedence first.
    tokens: role -> tokens of that role over all forwards of all towers; tower_tokens: tower -> tokens of any role over
    its forwards.
    firings: hook calls seen; expected_firings: hook calls that there must be.
    """

    inference_id: int
    steering: SteeringStamp
    strengths: tuple[tuple[str, float], ...]
    sites: tuple[SiteTrace, ...]
    tokens: tuple[tuple[str, int], ...]
    firings: int
    expected_firings: int
    interrupted: bool
    tower_tokens: tuple[tuple[str, int], ...] = ()
    applied: tuple[AppliedTarget, ...] = ()

    def to_jsonable(self) -> dict[str, Any]:
        """Plain dict for JSON; pairs become objects."""
        out = asdict(self)
        out["strengths"] = dict(self.strengths)
        out["tokens"] = dict(self.tokens)
        out["tower_tokens"] = dict(self.tower_tokens)
        return out


class Trace:
    """The newest `capacity` records. Appending from the inference thread and reading from others is safe."""

    def __init__(self, capacity: int = 1024) -> None:
        self._records: deque[TraceRecord] = deque(maxlen=capacity)

    def append(self, record: TraceRecord) -> None:
        self._records.append(record)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[TraceRecord]:
        return iter(tuple(self._records))

    @property
    def last(self) -> TraceRecord | None:
        """Newest record, None before the first inference."""
        return self._records[-1] if self._records else None
