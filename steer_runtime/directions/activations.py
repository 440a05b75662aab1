"""What a policy's neurons and residual sites hold at recorded moments.

Invariant: hooks are attached once, for as long as a `with` block lasts, and are gone after it, whatever happens inside;
every hook must have fired in every forward of an inference, or the capture is refused.

A span is the same as in steering: the tokens whose role the policy announces, in all forwards of one inference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from steer_runtime.directions.options import Pool
from steer_runtime.errors import SteerError
from steer_runtime.moments import Moment
from steer_runtime.types import Policy, Role, Tower, span_bits

Progress = Callable[[int, int], None]
"""Told (moments done, moments in all)."""


@dataclass(frozen=True, eq=False)
class Activations:
    """Rows of a span. ffn: layer -> float32 [R, d_ff], inputs of down_proj. residual: site -> float32 [R, d_model].

    moment: int64 [R], the moment a row belongs to (R is the number of moments unless each token has a row).
    said: name of the policy's notes that begin with `said_` -> float64 [moments].
    """

    ffn: Mapping[int, np.ndarray]
    residual: Mapping[int, np.ndarray]
    moment: np.ndarray
    said: Mapping[str, np.ndarray]


class TowerWatch:
    """Context manager: hooks on a tower's down_projs (`layers`) and residual sites, and an ear for its token roles.

    on_ffn(layer, f) and on_residual(site, h), both [T, width], are called in every forward; what they return, if not
    None, takes the place of f or h. `roles` are those of the forward that runs.
    Raises SteerError on entry: 'layer_out_of_range', 'attached' where somebody else's hooks are on the tower, since the
    policy tells token roles to one listener only.
    """

    def __init__(self, policy: Any, tower: str, layers: Sequence[int] = (), sites: Sequence[int] = ()) -> None:
        self.policy = policy
        self.tower: Tower = policy.towers[tower]
        self.layers, self.sites = tuple(layers), tuple(sites)
        bad = [layer for layer in self.layers if not 0 <= layer < self.tower.layers]
        bad_sites = [site for site in self.sites if not 0 <= site <= self.tower.layers]
        if bad or bad_sites:
            given = f"layer {bad[0]}" if bad else f"residual site {bad_sites[0]}"
            most = self.tower.layers - 1 if bad else self.tower.layers
            raise SteerError("layer_out_of_range", f"{given} of tower {tower!r} was asked for: expected 0 to {most}")
        self.roles: tuple[Role, ...] = ()
        self._stack = ExitStack()

    def on_ffn(self, layer: int, f: Tensor) -> Tensor | None:
        raise NotImplementedError

    def on_residual(self, site: int, h: Tensor) -> Tensor | None:
        raise NotImplementedError

    def set_roles(self, tower: str, roles: Sequence[Role]) -> None:
        """Hear the roles of the next forward (see TokenRoles)."""
        if tower == self.tower.name:
            self.roles = tuple(roles)

    def __enter__(self) -> Self:
        modules = [*self.tower.down_projs, *self.tower.residual_sites]
        if any(m._forward_hooks or m._forward_pre_hooks for m in modules if isinstance(m, nn.Module)):
            raise SteerError(
                "attached",
                f"tower {self.tower.name!r} has hooks already: detach the steering engine before watching it",
            )
        with ExitStack() as stack:
            for layer in self.layers:
                down: nn.Module = self.tower.down_projs[layer]  # type: ignore[assignment]
                stack.callback(down.register_forward_pre_hook(self._ffn_hook(layer)).remove)
            for site in self.sites:
                module: nn.Module = self.tower.residual_sites[site]  # type: ignore[assignment]
                stack.callback(module.register_forward_hook(self._residual_hook(site)).remove)
            self.policy.announce_roles_to(self)
            stack.callback(self.policy.announce_roles_to, None)
            stack.callback(self.policy.reset)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _ffn_hook(self, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            changed = self.on_ffn(layer, self._rows(args[0]))
            return None if changed is None else (changed.reshape(args[0].shape), *args[1:])

        return hook

    def _residual_hook(self, site: int) -> Callable[[nn.Module, tuple[Tensor, ...], Any], Any]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            changed = self.on_residual(site, self._rows(h))
            if changed is None:
                return None
            return (changed.reshape(h.shape), *output[1:]) if isinstance(output, tuple) else changed.reshape(h.shape)

        return hook

    def _rows(self, tensor: Tensor) -> Tensor:
        rows = tensor.reshape(-1, tensor.shape[-1])
        if len(rows) != len(self.roles):
            raise SteerError(
                "role_mismatch",
                f"tower {self.tower.name!r} runs a forward of {len(rows)} tokens but roles of {len(self.roles)} were "
                "announced; the policy must announce roles before every forward, of one observation at a time",
            )
        return rows


class Capture(TowerWatch):
    """A watch that keeps the activations of a span, pooled over one inference.

    >>> with Capture(policy, "lm", layers=[5], span=frozenset({"text"})) as watch:      # doctest: +SKIP
    ...     rows = watch.observe(moment)
    """

    def __init__(
        self,
        policy: Any,
        tower: str,
        *,
        layers: Sequence[int] = (),
        sites: Sequence[int] = (),
        span: frozenset[Role],
        pool: Pool = "mean",
    ) -> None:
        super().__init__(policy, tower, layers, sites)
        span_bits(span)
        self.span, self.pool = span, pool
        self._kept: dict[tuple[str, int], list[Tensor]] = {}
        self._fired: dict[tuple[str, int], int] = {}

    def observe(self, moment: Moment) -> tuple[dict[tuple[str, int], np.ndarray], Mapping[str, float]]:
        """One inference: {("ffn", layer) or ("residual", site): float32 [rows, width]} and the policy's notes.

        Raises SteerError: 'no_token' where the policy has no token of the span, 'not_fired', 'not_finite'.
        """
        places = [*(("ffn", layer) for layer in self.layers), *(("residual", site) for site in self.sites)]
        self._kept = {place: [] for place in places}
        self._fired = dict.fromkeys(places, 0)
        ready(self.policy, moment)
        notes = self.policy.infer(moment.observation).notes
        expected = self.tower.firings_per_inference
        missing = [place for place, fired in self._fired.items() if fired != expected]
        if missing:
            kind, index = missing[0]
            raise SteerError(
                "not_fired",
                f"the {kind} hook {index} of tower {self.tower.name!r} ran {self._fired[missing[0]]} of {expected} times "
                "in one inference: a compiled policy must be loaded anew to be watched",
            )
        out = {place: self._pooled(kept) for place, kept in self._kept.items()}
        if any(not np.isfinite(rows).all() for rows in out.values()):
            raise SteerError(
                "not_finite", f"tower {self.tower.name!r} computed NaN or infinite activations; load it again"
            )
        return out, notes

    def on_ffn(self, layer: int, f: Tensor) -> None:
        self._keep(("ffn", layer), f)

    def on_residual(self, site: int, h: Tensor) -> None:
        self._keep(("residual", site), h)

    def _keep(self, place: tuple[str, int], rows: Tensor) -> None:
        self._fired[place] = self._fired.get(place, 0) + 1
        inside = [index for index, role in enumerate(self.roles) if role in self.span]
        if not inside:
            return
        chosen = inside[-1:] if self.pool == "ends" else inside
        self._kept[place].append(rows.detach()[chosen].to("cpu", torch.float32))

    def _pooled(self, kept: list[Tensor]) -> np.ndarray:
        if not kept:
            raise SteerError(
                "no_token",
                f"no token of this policy has a role in span {', '.join(sorted(self.span))}: choose another span",
            )
        rows = torch.cat(kept)
        return (rows if self.pool == "each" else rows.mean(0, keepdim=True)).numpy()


def capture(
    policy: Any,
    tower: str,
    moments: Sequence[Moment],
    *,
    layers: Sequence[int] = (),
    sites: Sequence[int] = (),
    span: frozenset[Role],
    pool: Pool = "mean",
    progress: Progress | None = None,
) -> Activations:
    """Activations of the span at every moment, in order. Raises SteerError: 'bad_count', and as TowerWatch and Capture."""
    if not moments:
        raise SteerError("bad_count", "no moments were given to watch the policy at: expected at least one")
    parts: dict[tuple[str, int], list[np.ndarray]] = {}
    owners: list[int] = []
    said: dict[str, list[float]] = {}
    with Capture(policy, tower, layers=layers, sites=sites, span=span, pool=pool) as watch:
        for index, moment in enumerate(moments):
            rows, notes = watch.observe(moment)
            for place, part in rows.items():
                parts.setdefault(place, []).append(part)
            owners += [index] * max((len(part) for part in rows.values()), default=1)
            for name, value in notes.items():
                if name.startswith("said_"):
                    said.setdefault(name, []).append(float(value))
            if progress is not None:
                progress(index + 1, len(moments))
    joined = {place: np.concatenate(kept) for place, kept in parts.items()}
    return Activations(
        ffn={index: rows for (kind, index), rows in joined.items() if kind == "ffn"},
        residual={index: rows for (kind, index), rows in joined.items() if kind == "residual"},
        moment=np.array(owners, np.int64),
        said={name: np.array(values) for name, values in said.items()},
    )


def ready(policy: Policy, moment: Moment) -> None:
    """Put a policy where it stood at a moment: nothing remembered but the gripper command given before it.

    What a policy draws is drawn from the moment's number in its file, so that two inferences at one moment differ by what
    is done to the policy alone.
    """
    policy.reset(moment.observation.frame_id)
    tell = getattr(policy, "told_gripper", None)
    if tell is not None:
        tell(moment.gripper)
