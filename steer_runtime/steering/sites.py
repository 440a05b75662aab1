"""Where the engine acts: a hook at the input of each `down_proj` and at each residual site, attached once.

Invariant: with nothing to write a hook returns its input itself, so off is bit-identical; all state a compiled graph
reads lives in buffers that are changed in place and never rebound. Eager forwards touch only the written neurons;
compiled forwards evaluate the same formula densely, where it fuses into the gating product before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from steer_runtime.errors import SteerError
from steer_runtime.types import ROLES, Role, Tower


@dataclass(frozen=True)
class Layout:
    """Token roles of one forward. role: int64 [T] index into ROLES; bits: int32 [T] one role bit a token."""

    counts: tuple[int, ...]
    role: Tensor
    bits: Tensor
    present: int

    @property
    def tokens(self) -> int:
        return int(self.role.shape[0])

    def tokens_in(self, span: int) -> int:
        """Tokens whose role is in the span mask."""
        return sum(count for index, count in enumerate(self.counts) if span >> index & 1)


class TokenLayout:
    """The roles of the forward that is about to run, announced by the policy.

    The positions of a cached decoding step cannot be read off its one-token tensor, so they are never guessed: a
    forward whose token count differs from the announcement is an error.
    """

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        self.role = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self.bits = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self.current: Layout | None = None
        self._known: dict[tuple[Role, ...], Layout] = {}
        self.seen = [0] * len(ROLES)
        self.forwards = 0
        self._marks: list[tuple[int, list[int]]] = []

    def announce(self, roles: Sequence[Role]) -> None:
        """Set the roles of the next forward; raises SteerError for more tokens than the tower allows."""
        key = tuple(roles)
        layout = self._known.get(key)
        if layout is None:
            layout = self._build(key)
        self.current = layout
        self.forwards += 1
        for index, count in enumerate(layout.counts):
            self.seen[index] += count
        self.role[: layout.tokens].copy_(layout.role)
        self.bits[: layout.tokens].copy_(layout.bits)

    def begin(self) -> None:
        """Start counting a new inference."""
        self.seen = [0] * len(ROLES)
        self.forwards = 0
        self.current = None
        self._marks = []

    def mark(self) -> None:
        """Say that the forward just announced is the first one under other writes than the one before it."""
        current = self.current
        assert current is not None
        self._marks.append((self.forwards - 1, [a - b for a, b in zip(self.seen, current.counts, strict=True)]))

    def between_marks(self) -> list[tuple[int, list[int]]]:
        """(forwards, tokens of each role) announced since each mark, up to the next; all of them without a mark."""
        ends = [*self._marks[1:], (self.forwards, self.seen)]
        return [
            (after - before, [a - b for a, b in zip(later, earlier, strict=True)])
            for (before, earlier), (after, later) in zip(self._marks or [(0, [0] * len(ROLES))], ends, strict=True)
        ]

    def _build(self, roles: tuple[Role, ...]) -> Layout:
        if not 0 < len(roles) <= len(self.role):
            raise SteerError(
                "too_many_tokens", f"a forward of {len(roles)} tokens was announced: expected 1 to {len(self.role)}"
            )
        unknown = [role for role in roles if role not in ROLES]
        if unknown:
            raise SteerError("bad_role", f"token role {unknown[0]!r} is unknown: expected one of {', '.join(ROLES)}")
        index = [ROLES.index(role) for role in roles]
        device = self.role.device
        layout = Layout(
            counts=tuple(index.count(i) for i in range(len(ROLES))),
            role=torch.tensor(index, dtype=torch.int64, device=device),
            bits=torch.tensor([1 << i for i in index], dtype=torch.int32, device=device),
            present=sum(1 << i for i in set(index)),
        )
        if len(self._known) >= 64:
            self._known.clear()
        self._known[roles] = layout
        return layout


@dataclass(frozen=True)
class NeuronPlan:
    """Writes of one layer in one latch. index int64 [K]; coefficients [4, K], rows scale, shift, low, high, in the tower's dtype; spans int32 [K].

    pinned: every write is a full override (scale 0, no bounds), so the new values are `shift` itself.
    span: the mask all neurons share, or None when they differ.
    """

    neurons: tuple[int, ...]
    index: Tensor
    coefficients: Tensor
    spans: Tensor
    pinned: bool
    span: int | None
    any_span: int
    neurons_of_span: tuple[tuple[int, int], ...]  # (span mask, how many neurons have it)


@dataclass(frozen=True)
class DensePlan:
    """Vectors added at one residual site: table [roles, d_model], span mask of the roles that have one."""

    table: Tensor
    active: Tensor
    span: int


class _Site:
    """What both kinds of hook share: counters, failure, and the fall back to baseline."""

    kind: Literal["neurons", "dense"]

    def __init__(self, tower: str, layer: int, layout: TokenLayout, on_failure: Callable[[str], None]) -> None:
        self.tower = tower
        self.layer = layer
        self.fired = 0
        self.compiled_firings: Tensor = torch.zeros((), dtype=torch.int64, device=layout.role.device)
        self.forwards = 0
        self.writes = 0
        self.dose: float | None = None
        self.failed = False
        self._layout = layout
        self._on_failure = on_failure

    def begin(self) -> None:
        """Count anew; `compiled_firings` is zeroed by the engine, for all sites at once."""
        self.fired = 0
        self.forwards = 0
        self.writes = 0
        self.dose = None

    def _layout_for(self, tokens: int) -> Layout:
        layout = self._layout.current
        if layout is None or layout.tokens != tokens:
            announced = "none" if layout is None else str(layout.tokens)
            raise SteerError(
                "role_mismatch",
                f"tower {self.tower!r} runs a forward of {tokens} tokens but roles of {announced} were announced; "
                "the policy must announce roles before every forward",
            )
        return layout

    def _fail(self, error: Exception) -> None:
        self.failed = True
        self._on_failure(f"{self.kind} hook of {self.tower} layer {self.layer} failed and is off: {error}")


class DoseMeter:
    """Relative dose of neuron writes in one tower: ||sum_j (f'_j - f_j) w_j|| / ||h||, h the layer's output without them.

    Source: the project's steering facts (dose in the residual stream). Only built when doses are asked for: it costs
    one product with the written columns and two norms a forward.
    """

    def __init__(self) -> None:
        self._pending: dict[int, tuple[NeuronSite, Tensor]] = {}

    def changed(self, site: NeuronSite, change: Tensor) -> None:
        """Note the change [..., T, d_model] that a layer's writes make to the residual stream."""
        self._pending[site.layer] = (site, change)

    def settle(self, residual_site: int, h: Tensor) -> None:
        """Relate the pending change of layer `residual_site - 1` to its output h [..., T, d_model]."""
        pending = self._pending.pop(residual_site - 1, None)
        if pending is None:
            return
        site, change = pending
        unsteered = (h.float() - change).norm(dim=-1).clamp_min(1e-12)
        site.dose = max(site.dose or 0.0, float((change.norm(dim=-1) / unsteered).max()))


class NeuronSite(_Site):
    """Pre-hook of one down_proj: f' = clamp(f * scale + shift, low, high) where the token is in the neuron's span."""

    kind = "neurons"

    def __init__(
        self,
        tower: Tower,
        layer: int,
        layout: TokenLayout,
        on_failure: Callable[[str], None],
        doses: DoseMeter | None,
    ) -> None:
        super().__init__(tower.name, layer, layout, on_failure)
        module = tower.down_projs[layer]
        if not isinstance(module, nn.Module) or not isinstance(getattr(module, "weight", None), Tensor):
            raise SteerError(
                "cannot_attach",
                f"down_proj of tower {tower.name!r} layer {layer} is {type(module).__name__}: expected a torch module with a weight",
            )
        self.module = module
        weight: Tensor = module.weight  # type: ignore[assignment]
        if tuple(weight.shape) != (tower.d_model, tower.d_ff):
            raise SteerError(
                "cannot_attach",
                f"down_proj of tower {tower.name!r} layer {layer} has shape {list(weight.shape)}: expected "
                f"[{tower.d_model}, {tower.d_ff}]",
            )
        self.weight = weight
        self._doses = doses
        self.plan: NeuronPlan | None = None
        # Rows scale, shift, low, high in one buffer: a compiled graph pays for every tensor it is handed.
        identity = torch.tensor([1.0, 0.0, -torch.inf, torch.inf], dtype=weight.dtype, device=weight.device)
        self.coefficients = identity[:, None].repeat(1, tower.d_ff)
        self.spans = torch.zeros(tower.d_ff, dtype=torch.int32, device=weight.device)

    def set(self, plan: NeuronPlan | None) -> None:
        """Take over the writes of a latch, in place."""
        if self.plan is not None:
            self.spans.index_fill_(0, self.plan.index, 0)
        if plan is not None:
            self.coefficients.index_copy_(1, plan.index, plan.coefficients)
            self.spans.index_copy_(0, plan.index, plan.spans)
        self.plan = plan

    def silence(self) -> None:
        """Identity from the next forward on; safe from any thread."""
        self.plan = None
        self.spans.zero_()

    def hook(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Forward pre-hook; args[0] is f [..., T, d_ff]. Writes in place: f is the MLP's own fresh product."""
        if torch.compiler.is_compiling():
            return self._compiled(args)
        self.fired += 1
        plan = self.plan
        if plan is None or self.failed:
            return None
        try:
            return self._eager(args, plan)
        except Exception as error:  # fail open: baseline for this site, and an alarm
            self._fail(error)
            return None

    def _compiled(self, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        f = args[0]
        self.compiled_firings.add_(1)
        inside = (self._layout.bits[: f.shape[-2], None] & self.spans) != 0
        scale, shift, low, high = self.coefficients.unbind()
        changed = torch.clamp(f * scale + shift, low, high)
        return (torch.where(inside, changed, f), *args[1:])

    def _eager(self, args: tuple[Tensor, ...], plan: NeuronPlan) -> tuple[Tensor, ...] | None:
        f = args[0]
        layout = self._layout_for(f.shape[-2])
        if not layout.present & plan.any_span:
            return None
        everywhere = plan.span is not None and not layout.present & ~plan.span
        replaced = f.requires_grad
        if replaced:
            f = f.clone()
        if plan.pinned and everywhere and self._doses is None:
            f.index_copy_(-1, plan.index, plan.coefficients[1].expand(*f.shape[:-1], -1))
        else:
            before = f.index_select(-1, plan.index)
            scale, shift, low, high = plan.coefficients.unbind()
            after = torch.clamp(before * scale + shift, low, high)
            if not everywhere:
                inside = (layout.bits[:, None] & plan.spans) != 0
                after = torch.where(inside, after, before)
            f.index_copy_(-1, plan.index, after)
            if self._doses is not None:
                columns = self.weight.index_select(1, plan.index).float()
                self._doses.changed(self, (after - before).float() @ columns.T)
        self.forwards += 1
        self.writes += sum(count * layout.tokens_in(span) for span, count in plan.neurons_of_span)
        return (f, *args[1:]) if replaced else None


class DenseSite(_Site):
    """Hook of one residual site: h' = h + table[role of the token], for the roles that have a vector."""

    kind = "dense"

    def __init__(
        self,
        tower: Tower,
        site: int,
        layout: TokenLayout,
        on_failure: Callable[[str], None],
        like: Tensor,
        doses: DoseMeter | None,
    ) -> None:
        super().__init__(tower.name, site, layout, on_failure)
        module = tower.residual_sites[site]
        if not isinstance(module, nn.Module):
            raise SteerError(
                "cannot_attach",
                f"residual site {site} of tower {tower.name!r} is {type(module).__name__}: expected a torch module",
            )
        self.module = module
        self._doses = doses
        self.plan: DensePlan | None = None
        self.table = torch.zeros(len(ROLES), tower.d_model, dtype=like.dtype, device=like.device)
        self.active = torch.zeros(len(ROLES), dtype=torch.bool, device=like.device)

    def set(self, plan: DensePlan | None) -> None:
        """Take over the vectors of a latch, in place."""
        if plan is not None:
            self.table.copy_(plan.table)
            self.active.copy_(plan.active)
        elif self.plan is not None:
            self.active.fill_(False)
        self.plan = plan

    def silence(self) -> None:
        """Identity from the next forward on; safe from any thread."""
        self.plan = None
        self.active.fill_(False)

    def hook(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> object:
        """Forward hook; output (or its first element) is h [..., T, d_model]."""
        if torch.compiler.is_compiling():
            return self._rebuilt(output, self._compiled(output[0] if isinstance(output, tuple) else output))
        self.fired += 1
        plan = self.plan
        if self.failed or (plan is None and self._doses is None):
            return None
        try:
            h = output[0] if isinstance(output, tuple) else output
            changed = None if plan is None else self._eager(h, plan)
            if self._doses is not None:
                self._doses.settle(self.layer, h)
            return None if changed is None else self._rebuilt(output, changed)
        except Exception as error:  # fail open: baseline for this site, and an alarm
            self._fail(error)
            return None

    @staticmethod
    def _rebuilt(output: Tensor | tuple[Tensor, ...], h: Tensor) -> Tensor | tuple[Tensor, ...]:
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def _compiled(self, h: Tensor) -> Tensor:
        self.compiled_firings.add_(1)
        role = self._layout.role[: h.shape[-2]]
        return torch.where(self.active[role][:, None], h + self.table[role], h)

    def _eager(self, h: Tensor, plan: DensePlan) -> Tensor | None:
        layout = self._layout_for(h.shape[-2])
        if not layout.present & plan.span:
            return None
        inside = plan.active[layout.role][:, None]
        changed = torch.where(inside, h + plan.table[layout.role], h)
        self.forwards += 1
        self.writes += layout.tokens_in(plan.span)
        if self._doses is not None:
            size = (changed - h).float().norm(dim=-1) / h.float().norm(dim=-1).clamp_min(1e-12)
            self.dose = max(self.dose or 0.0, float(size.max()))
        return changed
