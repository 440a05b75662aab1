"""Axes made of words alone, and random ones of the same form and size to hold them against.

Invariant: nothing here looks at an episode, an activation or a prompt: a direction is decided by the token basis, the
value vectors and the seed. Every draw has the norm of the axis where it enters the residual stream.

The words are those that no training prompt contains (`sim.wordings.RESERVED`) and their opposites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from steer_runtime.cli.pocket import parse_layers
from steer_runtime.directions.direction import Axis, Direction, Neurons
from steer_runtime.directions.token_basis import TokenBasis
from steer_runtime.errors import SteerError, nearest
from steer_runtime.policies.openvla.policy import TOWER, OpenVLAPolicy
from steer_runtime.types import ROLES, Role, span_bits

Form = Literal["neurons", "dense"]
FORMS: tuple[Form, ...] = get_args(Form)
WORDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "speed": (("faster", "quick", "rapid", "speed", "speedy"), ("gradual", "slow", "slower", "steady")),
    "height": (("above", "elevated", "higher", "tall", "upper"), ("beneath", "bottom", "lower", "shallow")),
    "careful": (("careful", "cautious", "delicate", "gentle", "soft"), ("brutal", "harsh", "rough", "violent")),
}
"""Axis -> words of its positive and of its negative end, none of them in a training prompt (`sim.wordings.RESERVED`).

Both ends are about equally common. Where one is rarer ("sluggish", "reckless"), the axis names how common a word is
before it names anything else: the vocabulary's words on it then begin with fragments.
"""


@dataclass(frozen=True)
class AxisSpec:
    """How an axis acts. name: a key of WORDS.

    neurons: overrides `count` neurons of `layers` with +-alpha. dense: adds a vector at residual site `site` (0: the
    embeddings, i + 1: the output of layer i), of `size` times the mean norm of a word embedding. span: token roles.
    """

    name: str
    form: Form
    span: tuple[Role, ...]
    layers: tuple[int, ...] = ()
    count: int = 20
    alpha: float = 4.0
    site: int = 0
    size: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in WORDS:
            raise SteerError("unknown_axis", f"axis {self.name[:40]!r} is not known: {nearest(self.name, WORDS)}")
        if self.form not in FORMS:
            raise SteerError("unknown_form", f"form {self.form[:40]!r} is not known: expected {' or '.join(FORMS)}")
        if self.form == "neurons" and not self.layers:
            raise SteerError("bad_layers", "no layers were given for an axis of neurons: expected some, such as 4-7")
        if self.count < 1 or not self.alpha > 0 or not self.size > 0:
            raise SteerError(
                "bad_axis",
                f"{self.count} neurons, alpha {self.alpha:g} and size {self.size:g} are not usable: expected all above 0",
            )


@dataclass(frozen=True)
class Draw:
    """One axis: its two directions. kind: "words" for the one that is tested, else the kind of the random draw."""

    axis: Axis
    positive: Direction
    negative: Direction
    kind: str

    @property
    def name(self) -> str:
        return self.axis.name


@dataclass(frozen=True)
class Basis:
    """What axes are made of. embeddings float32 [words, d_model]; difference [d_model]: mean positive minus mean negative
    embedding (any centring of the embeddings cancels in it). used: end -> its words that are one token; left_out: others.
    """

    embeddings: torch.Tensor
    difference: torch.Tensor
    used: Mapping[str, tuple[str, ...]]
    left_out: tuple[str, ...]

    @property
    def mean_norm(self) -> float:
        """Mean norm of a word embedding, the unit of `AxisSpec.size`."""
        return float(self.embeddings.norm(dim=1).mean())


def span_of(roles: Sequence[str], form: str) -> tuple[Role, ...]:
    """The given roles, or those that a form acts on by itself. Raises SteerError('bad_span')."""
    chosen = tuple(roles) or (("text",) if form == "dense" else ROLES)
    span_bits(frozenset(chosen))  # type: ignore[arg-type]
    return chosen  # type: ignore[return-value]


def spec(
    policy: OpenVLAPolicy,
    name: str,
    form: str,
    span: Sequence[str],
    layers: str,
    count: int,
    alpha: float,
    site: int,
    norm: float,
) -> AxisSpec:
    """An axis from the options of a command. layers: as "4-7"; empty: the policy's later half. Raises as `AxisSpec`."""
    later_half = range(policy.config.lm.layers // 2, policy.config.lm.layers)
    chosen = tuple(parse_layers(layers)) if layers else tuple(later_half)
    roles = span_of(span, form)
    return AxisSpec(name, form, roles, chosen if form == "neurons" else (), count, alpha, site, norm)  # type: ignore[arg-type]


def basis_of(policy: OpenVLAPolicy, axis: str) -> Basis:
    """The words of an axis in a policy's token basis. Raises SteerError('unknown_word') when an end has no word left."""
    tokens = TokenBasis.of(policy)
    words = policy.config.usable_vocab - policy.config.n_bins
    embeddings = policy.unembedding[:words].detach().to("cpu", torch.float32)
    used: dict[str, tuple[str, ...]] = {}
    means, left_out = [], []
    for end, given in zip(("positive", "negative"), WORDS[axis], strict=True):
        ids = {word: _tokens(tokens, word) for word in given}
        used[end] = tuple(word for word in given if ids[word])
        left_out += [word for word in given if not ids[word]]
        if not used[end]:
            raise SteerError(
                "unknown_word",
                f"none of {', '.join(given)} is one token of the vocabulary of {policy.name}: use another policy",
            )
        # A word is the mean of its tokens, so that each word weighs the same.
        means.append(torch.stack([embeddings[ids[word]].mean(0) for word in used[end]]).mean(0))
    return Basis(embeddings, means[0] - means[1], used, tuple(left_out))


def make(policy: OpenVLAPolicy, spec: AxisSpec, basis: Basis, random_draws: int, seed: int) -> list[Draw]:
    """The axis of the words first, then `random_draws` of each random kind: "random neurons", or "gaussian" and
    "random words" for a dense one."""
    _check(policy, spec)
    builder = _neuron_draws if spec.form == "neurons" else _dense_draws
    return builder(policy, spec, basis, random_draws, seed)


def _check(policy: OpenVLAPolicy, spec: AxisSpec) -> None:
    lm = policy.config.lm
    bad = [layer for layer in spec.layers if not 0 <= layer < lm.layers]
    if bad:
        raise SteerError("layer_out_of_range", f"layer {bad[0]} was given: expected 0 to {lm.layers - 1}")
    if not 0 <= spec.site <= lm.layers:
        raise SteerError(
            "layer_out_of_range", f"residual site {spec.site} was given: expected 0 (embeddings) to {lm.layers}"
        )
    if spec.form == "neurons" and spec.count > lm.d_ff * len(spec.layers):
        raise SteerError(
            "bad_axis", f"{spec.count} neurons were asked of {len(spec.layers)} layers of {lm.d_ff}: expected no more"
        )


def _neuron_draws(policy: OpenVLAPolicy, spec: AxisSpec, basis: Basis, random_draws: int, seed: int) -> list[Draw]:
    down = policy.towers[TOWER].down_projs
    # [d_model, layers * d_ff], a column a value vector.
    columns = torch.cat(
        [down[layer].weight.detach().to("cpu", torch.float32) for layer in spec.layers],  # type: ignore[attr-defined]
        dim=1,
    )
    projection = basis.difference @ columns
    best = projection.abs().topk(spec.count).indices
    alphas = spec.alpha * projection[best].sign()
    wanted = float((columns[:, best] @ alphas).norm())

    def draw(name: str, kind: str, chosen: np.ndarray, values: torch.Tensor) -> Draw:
        width = policy.config.lm.d_ff

        def end(sign: float) -> dict[str, Neurons]:
            return {
                "neurons": Neurons(
                    layer=np.array([spec.layers[i // width] for i in chosen], np.int32),
                    neuron=np.array([i % width for i in chosen], np.int32),
                    alpha=(sign * values).numpy().astype(np.float32),
                )
            }

        return _draw(policy, spec, name, kind, end, "override")

    out = [draw(spec.name, "words", best.numpy(), alphas)]
    for index in range(random_draws):
        chosen = _rng(seed, 0, index).choice(columns.shape[1], spec.count, replace=False)
        size = float((columns[:, torch.from_numpy(chosen)] @ alphas).norm())
        out.append(draw(f"random-neurons-{index}", "random neurons", chosen, alphas * (wanted / size)))
    return out


def _dense_draws(policy: OpenVLAPolicy, spec: AxisSpec, basis: Basis, random_draws: int, seed: int) -> list[Draw]:
    norm = spec.size * basis.mean_norm

    def draw(name: str, kind: str, vector: torch.Tensor) -> Draw:
        scaled = (vector * (norm / float(vector.norm()))).numpy().astype(np.float32)
        return _draw(policy, spec, name, kind, lambda sign: {"dense": {spec.site: np.float32(sign) * scaled}}, "add")

    out = [draw(spec.name, "words", basis.difference)]
    for index in range(random_draws):
        gaussian = torch.from_numpy(_rng(seed, 1, index).standard_normal(policy.config.lm.d_model)).float()
        out.append(draw(f"gaussian-{index}", "gaussian", gaussian))
    pool = _plain_words(policy, basis)
    counts = len(basis.used["positive"]), len(basis.used["negative"])
    for index in range(random_draws):
        chosen = _rng(seed, 2, index).choice(pool, sum(counts), replace=False)
        one, other = basis.embeddings[chosen[: counts[0]]], basis.embeddings[chosen[counts[0] :]]
        out.append(draw(f"random-words-{index}", "random words", one.mean(0) - other.mean(0)))
    return out


def _draw(
    policy: OpenVLAPolicy,
    spec: AxisSpec,
    name: str,
    kind: str,
    end: Callable[[float], Mapping[str, object]],
    operation: Literal["override", "add"],
) -> Draw:
    lm = policy.config.lm

    def direction(suffix: str, sign: float) -> Direction:
        return Direction(
            name=f"{name}-{suffix}",
            tower=TOWER,
            model_hash=policy.model_hash,
            layers=lm.layers,
            d_model=lm.d_model,
            d_ff=lm.d_ff,
            op=operation,
            span=frozenset(spec.span),
            provenance={"finder": "sim.evaluation.axis_directions", "axis": spec.name, "kind": kind},
            **end(sign),  # type: ignore[arg-type]
        )

    positive, negative = direction("positive", 1.0), direction("negative", -1.0)
    return Draw(Axis(name, negative.name, positive.name), positive, negative, kind)


def _rng(seed: int, kind: int, index: int) -> np.random.Generator:
    """One generator a draw: more draws leave those that there were as they are."""
    return np.random.default_rng([seed, 0xA115, kind, index])


def _tokens(basis: TokenBasis, word: str) -> list[int]:
    """Tokens that are exactly this word, with a leading space and without."""
    encoded = [basis.tokenizer.encode(form, add_special_tokens=False) for form in (word, f" {word}")]
    # A tokenizer with an unknown-token answers one token for any word: what it reads back tells.
    single = [ids[0] for ids in encoded if len(ids) == 1 and basis.text(ids[0]).strip() == word]
    return list(dict.fromkeys(single))


def _plain_words(policy: OpenVLAPolicy, basis: Basis) -> np.ndarray:
    """Token ids int64 of lower-case words of the vocabulary, those of the axis left out."""
    tokens = TokenBasis.of(policy)
    mine: Sequence[str] = [*basis.used["positive"], *basis.used["negative"]]
    usable = [int(t) for t in tokens.plain_words if t < len(basis.embeddings)]
    return np.array([token for token in usable if tokens.text(token).strip() not in mine], np.int64)
