"""The steering engine: commands in from any thread, writes into a running policy, a trace of both.

Invariants: hooks are attached once and never touched while attached; only `latch`, on the inference thread, decides
what they write, so steering is constant over one inference, or as a command's steps laid it out beforehand (`clear_now`
alone cuts in between forwards, and says so); an engine with nothing active, or detached, leaves every output
bit-identical.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steer_runtime.directions.direction import Axis, Direction
from steer_runtime.errors import SteerError, nearest
from steer_runtime.steering.command import Active, CommandDesk, Limits, SteeringCommand, Verdict
from steer_runtime.steering.operations import writes
from steer_runtime.steering.sites import DensePlan, DenseSite, DoseMeter, NeuronPlan, NeuronSite, TokenLayout
from steer_runtime.steering.trace import AppliedTarget, SiteTrace, Trace, TraceRecord
from steer_runtime.types import ROLES, Policy, Role, SteeringStamp, Tower, span_bits


@dataclass(frozen=True)
class ActiveDirection:
    """One active target as operators see it. strength: now, after ramps; commanded: where it goes.

    shadowed_neurons: neurons that a direction of higher priority, or a newer one, writes in its place. backed_off: share of
    the accepted strength that the engine leaves it (`back_off`); 1 unless something made it fall.
    """

    target: str
    direction_id: str
    strength: float
    commanded: float
    priority: int
    source: str
    span: frozenset[Role]
    shadowed_neurons: int
    expires_in_s: float | None
    steps: tuple[int, int] | None = None
    backed_off: float = 1.0


@dataclass(frozen=True)
class SteeringState:
    """A consistent view of the engine. counters: verdict codes and engine events -> how often."""

    steering: SteeringStamp
    attached: bool
    active: tuple[ActiveDirection, ...]
    counters: Mapping[str, int]
    alarms: tuple[str, ...]


@dataclass(frozen=True)
class _Snapshot:
    """What `apply` publishes and `latch` reads; replaced, never changed."""

    stamp: SteeringStamp
    active: tuple[Active, ...]  # lowest precedence first


@dataclass(frozen=True)
class _Applied:
    """One direction at one strength, ready to be written."""

    active: Active
    direction: Direction
    strength: float  # (0, 1]
    span: int

    @property
    def target(self) -> AppliedTarget:
        """What it takes to apply the same again."""
        entry = self.active
        sign = -1.0 if self.direction is entry.negative else 1.0
        return AppliedTarget(
            entry.target, self.direction.id, sign * self.strength, entry.priority, self.span, entry.steps
        )

    def writes_in(self, forward: int) -> bool:
        """Whether it writes in this forward of its tower, counted from 0 in each inference."""
        return self.active.steps is None or self.active.steps[0] <= forward < self.active.steps[1]


@dataclass(frozen=True)
class _Phase:
    """What one tower's hooks write from one forward on, up to the next phase: layer -> plan, residual site -> plan."""

    neurons: Mapping[int, NeuronPlan]
    dense: Mapping[int, DensePlan]

    def plan_of(self, site: NeuronSite | DenseSite) -> NeuronPlan | DensePlan | None:
        return self.neurons.get(site.layer) if isinstance(site, NeuronSite) else self.dense.get(site.layer)


_NOTHING = _Phase({}, {})


class SteeringEngine:
    """Steers one policy with the given directions and axes.

    limits: bounds on commands. clock: steady seconds (ramps, expiry). wall_ns: wall clock (stamps of commands).
    measure_dose: also compute relative doses (costs a product a steered layer); always where `limits` has a max_dose, and
    an inference that exceeded it makes every strength fall to where the dose fits.
    Raises SteerError for a direction of another model, an axis of unknown directions, or a policy it cannot attach to.
    """

    def __init__(
        self,
        policy: Policy,
        directions: Sequence[Direction],
        axes: Sequence[Axis] = (),
        *,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
        measure_dose: bool = False,
    ) -> None:
        self.policy = policy
        self.trace = Trace()
        self._clock = clock
        self._wall_ns = wall_ns
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter()
        self._alarms: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._layouts: dict[str, TokenLayout] = {}
        self._neurons: dict[str, list[NeuronSite]] = {}
        self._dense: dict[str, list[DenseSite]] = {}
        self._phases: dict[str, dict[int, _Phase]] = {}
        limits = limits or Limits()
        self._max_dose = limits.max_dose
        for tower in policy.towers.values():
            self._add_tower(tower, measure_dose or limits.max_dose is not None)
        by_name = self._checked(directions)
        denoising = {tower.name: tower.firings_per_inference for tower in policy.towers.values() if tower.denoises}
        self._desk = CommandDesk(by_name, self._checked_axes(axes, by_name), limits, denoising=denoising)
        self._epoch = wall_ns()
        self._snapshot = _Snapshot(SteeringStamp(self._epoch, 0), ())
        self._written: _Snapshot | None = None
        self._settled = False
        self._targets: tuple[AppliedTarget, ...] = ()
        self._latched = self._snapshot.stamp
        self._inference_id = 0
        self._interrupted = False

    @property
    def directions(self) -> Mapping[str, Direction]:
        """Loaded directions by name."""
        return self._desk.directions

    @property
    def axes(self) -> Mapping[str, Axis]:
        """Loaded axes by name."""
        return self._desk.axes

    @property
    def steers(self) -> bool:
        """Whether any target is active, however weak; any thread."""
        return bool(self._snapshot.active)

    def largest_strength(self, name: str) -> float:
        """Largest accepted strength of a loaded direction: its own limit and the robot's."""
        return self._desk.limits.largest(self._desk.directions[name])[0]

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    @property
    def inference_id(self) -> int:
        """Number of the newest latch."""
        return self._inference_id

    def attach(self) -> None:
        """Register every hook. Raises SteerError when attached already."""
        if self._handles:
            raise SteerError("already_attached", "the engine is attached already; detach it first")
        for name in self.policy.towers:
            for neuron_site in self._neurons[name]:
                neuron_site.failed = False
                self._handles.append(neuron_site.module.register_forward_pre_hook(neuron_site.hook))
            for dense_site in self._dense[name]:
                dense_site.failed = False
                self._handles.append(dense_site.module.register_forward_hook(dense_site.hook))
        self.policy.announce_roles_to(self)

    def detach(self) -> None:
        """Remove every hook and forget active steering; the policy is as it was. Safe to call twice."""
        self.policy.announce_roles_to(None)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        with self._lock:
            self._desk.active.clear()
            self._publish()
        self._silence()
        self._written = None
        self._phases.clear()

    def set_roles(self, tower: str, roles: Sequence[Role]) -> None:
        """Token roles of the next forward of a tower; the policy calls this (types.TokenRoles)."""
        layout = self._layouts[tower]
        layout.announce(roles)
        phases = self._phases.get(tower)
        if phases is not None and len(phases) > 1 and layout.forwards - 1 in phases:
            layout.mark()
            self._enter(tower, phases[layout.forwards - 1])

    def apply(self, command: SteeringCommand) -> Verdict:
        """Admit or refuse a command; any thread. Never raises for bad input: the verdict says what was wrong."""
        with self._lock:
            try:
                code, sentence, strength = self._desk.admit(command, self._clock(), self._wall_ns())
            except SteerError as error:
                return self._verdict(False, error.code, error.sentence, command, 0.0)
            if command.op == "clear_all":
                self._cut_in()
            else:
                self._publish()
            return self._verdict(True, code, sentence, command, strength)

    def refuse(self, code: str, sentence: str, *, source: str = "", epoch: int = 0, sequence: int = 0) -> Verdict:
        """Count input that never became a command (malformed text) and give it a verdict; any thread."""
        with self._lock:
            self._counters[code] += 1
            self._counters["refused"] += 1
            return Verdict(False, code, sentence, source, epoch, sequence, self._snapshot.stamp, 0.0)

    def clear_now(self) -> None:
        """Identity from the next forward on, even inside a running inference; any thread. For stops."""
        with self._lock:
            self._desk.active.clear()
            self._cut_in()
            self._counters["clear_now"] += 1

    def back_off(self, share: float, code: str, sentence: str) -> None:
        """Let every strength fall to a share of what it is, at the largest slew; counted under `code`, with an alarm; any
        thread. A command of another strength lifts it.
        """
        with self._lock:
            self._desk.back_off(share, self._clock())
            self._publish()
            self._counters[code] += 1
        self.alarm(sentence)

    def unsteered(self) -> None:
        """Nothing is written by the forwards from here to the next latch, which writes what is commanded, as ever.

        Inference thread, after `finish`; the trace does not show these forwards.
        """
        with self._lock:
            self._silence()
        self._phases.clear()
        self._written = None

    def alarm(self, sentence: str) -> None:
        """Say something that the operator must see in the state, which keeps the newest twenty; any thread."""
        with self._lock:
            self._alarms.append(sentence)
            del self._alarms[:-20]

    def count(self, event: str, by: int = 1) -> None:
        """Count something the operator should see in the state; any thread."""
        with self._lock:
            self._counters[event] += by

    def latch(self) -> SteeringStamp:
        """Advance ramps and put the newest commands into the hooks' buffers; inference thread, once an inference."""
        self._inference_id += 1
        self._interrupted = False
        for layout in self._layouts.values():
            layout.begin()
        sites = self.sites
        for site in sites:
            site.begin()
        torch._foreach_zero_([site.compiled_firings for site in sites])
        snapshot, now = self._snapshot, self._clock()
        if snapshot is not self._written or not self._settled:
            self._write(snapshot, now)
        self._latched = snapshot.stamp
        return snapshot.stamp

    def finish(self) -> TraceRecord:
        """Close the inference that the last latch began: check that every hook fired and append a trace record.

        Raises SteerError('hooks_silent') when hooks did not fire as often as their tower ran.
        """
        record = self._record()
        self.trace.append(record)
        self._watch_dose(record)
        if not self._handles or record.firings == record.expected_firings:
            return record
        self.alarm(
            f"inference {record.inference_id}: {record.firings} of {record.expected_firings} hook calls happened; "
            "steering is not trusted"
        )
        self.count("hooks_silent")
        raise SteerError(
            "hooks_silent",
            f"{record.firings} of {record.expected_firings} hook calls happened in inference {record.inference_id}: "
            "hooks were removed or bypassed by other code; detach, and attach again",
        )

    def state(self) -> SteeringState:
        """What is active, counted and alarming now; any thread."""
        with self._lock:
            snapshot, counters, alarms = self._snapshot, dict(self._counters), tuple(self._alarms)
        now = self._clock()
        applied = {item.active.target: item for item in self._applied(snapshot, now)}
        shadowed = _shadowed(list(applied.values()))
        active = []
        for entry in snapshot.active:
            if entry.over_at(now):
                continue
            strength = entry.strength_at(now)
            direction = entry.direction_at(strength or entry.goal) or entry.positive
            active.append(
                ActiveDirection(
                    target=entry.target,
                    direction_id=direction.id,
                    strength=strength,
                    commanded=entry.goal,
                    priority=entry.priority,
                    source=entry.source,
                    span=direction.span if entry.span is None else direction.span & entry.span,
                    shadowed_neurons=shadowed.get(entry.target, 0),
                    expires_in_s=None if entry.expires_s == float("inf") else max(0.0, entry.expires_s - now),
                    steps=entry.steps,
                    backed_off=entry.backed_off,
                )
            )
        return SteeringState(snapshot.stamp, self.attached, tuple(active), counters, alarms)

    # -- construction -------------------------------------------------------------------------------------------

    def _add_tower(self, tower: Tower, measure_dose: bool) -> None:
        if len(tower.residual_sites) != tower.layers + 1:
            raise SteerError(
                "cannot_attach",
                f"tower {tower.name!r} declares {len(tower.residual_sites)} residual sites: expected {tower.layers + 1} "
                "(embedding entry, then one a layer)",
            )
        weight = getattr(tower.down_projs[0], "weight", None)
        if not isinstance(weight, Tensor):
            raise SteerError("cannot_attach", f"tower {tower.name!r} has no down_proj weights to attach to")
        layout = TokenLayout(tower.max_tokens, weight.device)
        doses = DoseMeter() if measure_dose else None
        self._layouts[tower.name] = layout
        self._neurons[tower.name] = [
            NeuronSite(tower, layer, layout, self._site_failed, doses) for layer in range(tower.layers)
        ]
        self._dense[tower.name] = [
            DenseSite(tower, site, layout, self._site_failed, weight, doses) for site in range(tower.layers + 1)
        ]

    def _checked(self, directions: Sequence[Direction]) -> dict[str, Direction]:
        by_name: dict[str, Direction] = {}
        for direction in directions:
            if direction.name in by_name:
                raise SteerError(
                    "ambiguous_direction",
                    f"two directions are called {direction.name!r}: {by_name[direction.name].id} and {direction.id}; load one",
                )
            tower = self.policy.towers.get(direction.tower)
            if tower is None:
                raise SteerError(
                    "unknown_tower",
                    f"direction {direction.id!r} is for tower {direction.tower!r}: "
                    f"{nearest(direction.tower, self.policy.towers)}",
                )
            direction.require_fits(tower, self.policy.model_hash)
            direction.require_reaches(tower)
            self._check_dtype(direction)
            by_name[direction.name] = direction
        return by_name

    def _check_dtype(self, direction: Direction) -> None:
        """Values that overflow the tower's dtype would become infinite in the buffers."""
        dtype = self._neurons[direction.tower][0].weight.dtype
        largest = max(float(np.abs(a).max()) for a in direction.tensors().values() if a.dtype == np.float32)
        if largest > torch.finfo(dtype).max:
            raise SteerError(
                "over_dtype", f"direction {direction.id!r} holds {largest:g}, too large for {dtype}; lower its alpha"
            )

    @staticmethod
    def _checked_axes(axes: Sequence[Axis], directions: Mapping[str, Direction]) -> dict[str, Axis]:
        by_name: dict[str, Axis] = {}
        for axis in axes:
            for end in (axis.negative, axis.positive):
                if end not in directions:
                    raise SteerError(
                        "unknown_direction", f"axis {axis.name!r} needs direction {end!r}: {nearest(end, directions)}"
                    )
            if axis.name in directions or axis.name in by_name:
                raise SteerError("ambiguous_direction", f"the name {axis.name!r} of an axis is taken; rename it")
            by_name[axis.name] = axis
        return by_name

    # -- publishing (under the lock) ----------------------------------------------------------------------------

    def _publish(self) -> None:
        previous = self._snapshot.stamp
        order = sorted(self._desk.active.values(), key=lambda entry: (entry.priority, entry.order))
        self._snapshot = _Snapshot(SteeringStamp(previous.epoch, previous.sequence + 1), tuple(order))

    def _cut_in(self) -> None:
        self._publish()
        self._interrupted = True
        self._silence()

    def _silence(self) -> None:
        for site in self.sites:
            site.silence()

    def _verdict(self, accepted: bool, code: str, sentence: str, command: SteeringCommand, strength: float) -> Verdict:
        self._counters[code] += 1
        if not accepted:
            self._counters["refused"] += 1
        source = command.source if isinstance(command.source, str) else str(command.source)
        return Verdict(
            accepted, code, sentence, source[:128], command.epoch, command.sequence, self._snapshot.stamp, strength
        )

    def _watch_dose(self, record: TraceRecord) -> None:
        if self._max_dose is None:
            return
        dose = max((site.dose for site in record.sites if site.dose is not None), default=0.0)
        if dose > self._max_dose * (1 + 1e-6):
            share = self._max_dose / dose
            self.back_off(
                share,
                "dose_backed_off",
                f"inference {record.inference_id} had a dose of {dose:.3g}, expected at most {self._max_dose:g}: strengths "
                f"fall to {share:.2f} of what they were; send a lower strength",
            )

    def _site_failed(self, sentence: str) -> None:
        self.alarm(sentence)
        self.count("hook_failures")

    # -- latching (inference thread) ----------------------------------------------------------------------------

    @property
    def sites(self) -> list[NeuronSite | DenseSite]:
        """Every hooked site: the neuron sites of all towers, then their residual sites."""
        neurons = [site for sites in self._neurons.values() for site in sites]
        return [*neurons, *(site for sites in self._dense.values() for site in sites)]

    @staticmethod
    def _applied(snapshot: _Snapshot, now: float) -> list[_Applied]:
        out = []
        for entry in snapshot.active:
            strength = entry.strength_at(now)
            direction = entry.direction_at(strength)
            if direction is None or strength == 0.0:
                continue
            span = direction.span if entry.span is None else direction.span & entry.span
            if np.float32(abs(strength)) > 0:  # a strength that vanishes in float32 is off, exactly
                out.append(_Applied(entry, direction, min(abs(strength), 1.0), span_bits(span) if span else 0))
        return out

    def _write(self, snapshot: _Snapshot, now: float) -> None:
        applied = self._applied(snapshot, now)
        for name, tower in self.policy.towers.items():
            mine = [item for item in applied if item.direction.tower == name]
            edges = {edge for item in mine if item.active.steps is not None for edge in item.active.steps}
            starts = sorted({0, *(edge for edge in edges if edge < tower.firings_per_inference)})
            self._phases[name] = {
                start: self._planned(tower, [item for item in mine if item.writes_in(start)]) for start in starts
            }
            self._set(name, self._phases[name][0])
        self._targets = tuple(item.target for item in applied)
        self._written = snapshot
        self._settled = all(entry.settled_at(now) or entry.over_at(now) for entry in snapshot.active)
        # A stop that arrived while this was writing must win over it.
        with self._lock:
            if self._interrupted:
                self._silence()
                self._written = None

    def _enter(self, tower: str, phase: _Phase) -> None:
        """Go over to a later phase of the running inference, unless it was cut short."""
        with self._lock:
            if not self._interrupted:
                self._set(tower, phase)

    def _set(self, tower: str, phase: _Phase) -> None:
        for site in self._neurons[tower]:
            plan = phase.neurons.get(site.layer)
            if plan is not None or site.plan is not None:
                site.set(plan)
        for dense in self._dense[tower]:
            table = phase.dense.get(dense.layer)
            if table is not None or dense.plan is not None:
                dense.set(table)

    def _planned(self, tower: Tower, applied: Sequence[_Applied]) -> _Phase:
        if not applied:
            return _NOTHING
        neurons = [item for item in applied if item.direction.neurons is not None]
        plans = _neuron_plans(tower, neurons, like=self._neurons[tower.name][0].coefficients) if neurons else {}
        return _Phase(plans, self._dense_plans(tower, [item for item in applied if item.direction.dense is not None]))

    def _dense_plans(self, tower: Tower, applied: Sequence[_Applied]) -> dict[int, DensePlan]:
        tables: dict[int, np.ndarray] = {}
        spans: dict[int, int] = {}
        for item in applied:
            for site, vector in (item.direction.dense or {}).items():
                table = tables.setdefault(site, np.zeros((len(ROLES), tower.d_model), np.float32))
                for role in range(len(ROLES)):
                    if item.span >> role & 1:
                        table[role] += np.float32(item.strength) * vector
                spans[site] = spans.get(site, 0) | item.span
        plans = {}
        for site, table in tables.items():
            span = spans[site]
            vectors = torch.from_numpy(table).to(self._dense[tower.name][site].table)
            active = torch.tensor([bool(span >> role & 1) for role in range(len(ROLES))], device=vectors.device)
            plans[site] = DensePlan(vectors, active, span)
        return plans

    def _record(self) -> TraceRecord:
        sites = []
        tokens = [0] * len(ROLES)
        firings = expected = 0
        for name, tower in self.policy.towers.items():
            layout = self._layouts[name]
            tokens = [a + b for a, b in zip(tokens, layout.seen, strict=True)]
            of_tower: list[NeuronSite | DenseSite] = [*self._neurons[name], *self._dense[name]]
            # One transfer for all counters: on an accelerator each `.item()` would be a synchronisation.
            in_graph = torch.stack([site.compiled_firings for site in of_tower]).tolist()
            for site, compiled in zip(of_tower, in_graph, strict=True):
                fired = site.fired + compiled
                firings += fired
                expected += tower.firings_per_inference
                plans = self._plans_of(site, layout)
                if all(plan is None for plan, _, _ in plans) and not site.forwards:
                    continue
                forwards, written = site.forwards, site.writes
                if not site.fired and fired:  # compiled: the graph keeps no Python counts, the plan says what it wrote
                    forwards = sum(count for plan, count, _ in plans if plan is not None)
                    written = sum(_planned_writes(plan, seen) for plan, _, seen in plans if plan is not None)
                named = {n for plan, _, _ in plans if isinstance(plan, NeuronPlan) for n in plan.neurons}
                neurons = tuple(sorted(named))
                sites.append(SiteTrace(name, site.kind, site.layer, neurons, forwards, written, site.dose))
        return TraceRecord(
            inference_id=self._inference_id,
            steering=self._latched,
            strengths=tuple((target.direction_id, abs(target.strength)) for target in self._targets),
            sites=tuple(sites),
            tokens=tuple(zip(ROLES, tokens, strict=True)),
            firings=firings,
            expected_firings=expected,
            interrupted=self._interrupted,
            tower_tokens=tuple((name, sum(layout.seen)) for name, layout in self._layouts.items()),
            applied=self._targets,
        )

    def _plans_of(
        self, site: NeuronSite | DenseSite, layout: TokenLayout
    ) -> list[tuple[NeuronPlan | DensePlan | None, int, list[int]]]:
        """(plan, forwards, tokens of each role) of every phase this inference has been through at one site."""
        phases = self._phases.get(site.tower, {})
        if len(phases) < 2 or self._interrupted:
            return [(site.plan, layout.forwards, layout.seen)]
        passed = zip(phases.values(), layout.between_marks(), strict=False)
        return [(phase.plan_of(site), forwards, seen) for phase, (forwards, seen) in passed]


def _neuron_plans(tower: Tower, applied: Sequence[_Applied], like: Tensor) -> dict[int, NeuronPlan]:
    """Writes by layer; on a neuron that several directions name, the last of `applied` wins."""
    parts = [(writes(item.direction, item.strength), item.span) for item in applied if item.span]
    if not parts:
        return {}
    flat = np.concatenate([part.flat for part, _ in parts])
    _, first_of_reversed = np.unique(flat[::-1], return_index=True)
    keep = np.sort(len(flat) - 1 - first_of_reversed)
    keep = keep[np.argsort(flat[keep], kind="stable")]
    flat = flat[keep]
    scale, shift, low, high = (
        np.concatenate([getattr(part, name) for part, _ in parts])[keep] for name in ("scale", "shift", "low", "high")
    )
    spans = np.concatenate([np.full(len(part.flat), span, np.int32) for part, span in parts])[keep]
    plans = {}
    layers, starts = np.unique(flat // tower.d_ff, return_index=True)
    index = torch.from_numpy(flat % tower.d_ff).to(like.device)
    coefficients = torch.from_numpy(np.stack((scale, shift, low, high))).to(like)
    span_tensor = torch.from_numpy(spans).to(like.device)
    pinned = (scale == 0) & np.isneginf(low) & np.isposinf(high)
    for layer, start, stop in zip(layers.tolist(), starts, [*starts[1:], len(flat)], strict=True):
        part = slice(int(start), int(stop))
        masks, counts = np.unique(spans[part], return_counts=True)
        plans[layer] = NeuronPlan(
            neurons=tuple((flat[part] % tower.d_ff).tolist()),
            index=index[part],
            coefficients=coefficients[:, part],
            spans=span_tensor[part],
            pinned=bool(pinned[part].all()),
            span=int(masks[0]) if len(masks) == 1 else None,
            any_span=int(np.bitwise_or.reduce(masks)),
            neurons_of_span=tuple(zip(masks.tolist(), counts.tolist(), strict=True)),
        )
    return plans


def _planned_writes(plan: NeuronPlan | DensePlan, seen: Sequence[int]) -> int:
    def tokens_in(span: int) -> int:
        return sum(count for role, count in enumerate(seen) if span >> role & 1)

    if isinstance(plan, NeuronPlan):
        return sum(n * tokens_in(span) for span, n in plan.neurons_of_span)
    return tokens_in(plan.span)


def _shadowed(applied: Sequence[_Applied]) -> dict[str, int]:
    """Neurons of each target that a later one (higher precedence) writes instead."""
    taken: dict[str, set[int]] = {}
    out = {}
    for item in reversed(applied):
        n = item.direction.neurons
        if n is None:
            continue
        mine = set((n.layer.astype(np.int64) * item.direction.d_ff + n.neuron).tolist())
        others = taken.setdefault(item.direction.tower, set())
        out[item.active.target] = len(mine & others)
        others |= mine
    return out


def hooks_on(module: nn.Module) -> int:
    """Forward hooks and pre-hooks registered anywhere below a module; to prove that detaching removed ours."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
