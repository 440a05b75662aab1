"""Every value vector of a layer against every row of a token basis, with only a block of the scores in memory.

Scores are value vector . token row (Geva et al. 2022, arXiv 2203.14680). A fast blocked product finds candidates; the few
candidates are then scored again in float32, one dot product each.

Invariant: the answer is the one that the whole product would give, whatever the blocks: best first, the lower token id
first among equal scores, and NaN or infinity anywhere is an error, never a label.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from steer_runtime.errors import SteerError, nearest

TOP_K = 10
"""Tokens in a label (the seed's, Haon et al. 2025, arXiv 2509.00328)."""
MARGIN = {"float32": 2, "bfloat16": 6}
"""Candidates beyond k of each end that are scored again. A bfloat16 product has 8 bits: near the tenth of 32,064 normal
scores one step of it holds about one other token, so six are rarely too few; float32 differs in the last bits only."""
CHUNK = 32
"""Neighbouring tokens whose extremes stand for them: the k best tokens lie in the k best chunks."""

Variant = Literal["raw", "normed", "centred"]
Compute = Literal["float32", "bfloat16"]
Done = Callable[[float], None]
"""Told the share of a layer that is done, in (0, 1]."""


@dataclass(frozen=True)
class Spec:
    """Which scores, and how they are found. U [vocab, d_model] unembedding, W [d_model, d_ff] down_proj, per layer:

    raw (the seed's): W^T U^T.
    normed: W^T diag(gamma) U^T with gamma the weight of the final norm, which every logit passes (its division by the
    length of the residual stream is left out: it differs with every token and only scales).
    centred: W^T (U - 1 u)^T with u = mean row of U. It takes w . u off all scores of one value vector: its tokens keep
    their order, and scores of different value vectors become comparable as "above the average token".

    dtype: precision of the product that finds the candidates; scores are float32 dot products in both.
    """

    variant: Variant = "raw"
    dtype: Compute = "float32"
    top_k: int = TOP_K

    def __post_init__(self) -> None:
        for what, given, known in (("variant", self.variant, Variant), ("dtype", self.dtype, Compute)):
            if given not in get_args(known):
                raise SteerError(
                    "bad_projection", f"{what} {given[:40]!r} is unknown: {nearest(given, get_args(known))}"
                )
        if self.top_k < 1:
            raise SteerError("bad_projection", f"top_k is {self.top_k}: expected 1 token or more")

    @property
    def key(self) -> str:
        """Part of a file name that tells labels of different specs apart."""
        return f"top{self.top_k}-{self.variant}-{self.dtype}"


@dataclass(frozen=True)
class Blocks:
    """Value vectors and tokens of one product. 512 x 8192 scores are 16 MB, the rows of 8192 tokens 128 MB at width 4096."""

    neurons: int = 512
    tokens: int = 8192

    def __post_init__(self) -> None:
        if self.neurons < 1 or self.tokens < 1:
            raise SteerError(
                "bad_projection", f"blocks of {self.neurons} value vectors x {self.tokens} tokens: expected 1 or more"
            )


RAW = Spec()
"""The seed's labels."""
BLOCKS = Blocks()


class Matrix(Protocol):
    """Rows that can be had a slice at a time: a tensor, or one that stays in its file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


class Ends(NamedTuple):
    """Labels of one layer, [d_ff, k]: ids int32 and scores float32 of the largest, and of the most negative, best first."""

    tokens: np.ndarray
    scores: np.ndarray
    low_tokens: np.ndarray
    low_scores: np.ndarray


@torch.no_grad()
def project_layer(
    weight: Matrix,
    rows: Matrix,
    spec: Spec = RAW,
    *,
    gamma: Tensor | None = None,
    mean: Tensor | None = None,
    blocks: Blocks = BLOCKS,
    done: Done | None = None,
) -> Ends:
    """Both ends of every value vector of a layer, by `spec`. weight [d_model, d_ff]; rows [vocab, d_model].

    gamma: [d_model], for 'normed'. mean: [d_model], for 'centred' (`mean_row`). Work is done on the device of the rows.
    Memory: value vectors in float32 (and bfloat16), `blocks.tokens` rows, `blocks` scores.
    Raises SteerError: 'bad_token_basis' for widths that differ or too few tokens, 'bad_projection', 'not_finite'.
    """
    _check(weight, rows, spec, gamma, mean)
    vocab = rows.shape[0]
    device = rows[0:1].device
    vectors = weight[:].to(device, torch.float32).T.contiguous()
    if spec.variant == "normed":
        assert gamma is not None
        vectors = vectors * gamma.to(device, torch.float32)
    fast = vectors.to(getattr(torch, spec.dtype))
    keep = min(spec.top_k + MARGIN[spec.dtype], vocab)
    best = torch.empty(2, len(vectors), 0, dtype=torch.int64, device=device)
    starts = range(0, vocab, blocks.tokens)
    for turn, first in enumerate(starts):
        block = rows[first : first + blocks.tokens].to(device, fast.dtype)
        found = torch.empty(2, len(vectors), min(keep, first + len(block)), dtype=torch.int64, device=device)
        for start in range(0, len(fast), blocks.neurons):
            part = slice(start, start + blocks.neurons)
            scores = (fast[part] @ block.T).float()
            for end, before in enumerate(best[:, part]):
                found[end, part] = _improved(before, scores, (1, -1)[end], first, keep)
            if done is not None and part.stop < len(fast):
                done((turn + part.stop / len(fast)) / len(starts))
        best = found
        if done is not None and turn + 1 < len(starts):
            done((turn + 1) / len(starts))
    del fast
    candidates = _identities(best)
    ends = _ranked(candidates, _scores(vectors, rows, candidates, blocks.tokens), spec.top_k)
    if spec.variant == "centred":
        assert mean is not None
        shift = (vectors @ mean.to(device, torch.float32))[:, None].cpu().numpy()
        ends = ends._replace(scores=ends.scores - shift, low_scores=ends.low_scores - shift)
    if not (np.isfinite(ends.scores).all() and np.isfinite(ends.low_scores).all()):
        raise _not_finite()
    if done is not None:
        done(1.0)
    return ends


@dataclass(frozen=True)
class LayerJob:
    """All that the labels of one layer depend on, so that they can be computed anywhere. Fields as `project_layer`."""

    layer: int
    weight: Matrix
    rows: Matrix
    spec: Spec = RAW
    gamma: Tensor | None = None
    mean: Tensor | None = None
    blocks: Blocks = BLOCKS

    def run(self, done: Done | None = None) -> Ends:
        return project_layer(
            self.weight, self.rows, self.spec, gamma=self.gamma, mean=self.mean, blocks=self.blocks, done=done
        )


Runner = Callable[[Sequence[LayerJob], Done], Iterator[tuple[int, Ends]]]
"""Runs jobs and yields (layer, labels) as they are done; tells how many jobs are done, in fractions."""


def one_process(jobs: Sequence[LayerJob], done: Done) -> Iterator[tuple[int, Ends]]:
    """One layer after the other, here."""
    for before, job in enumerate(jobs):
        yield job.layer, job.run(lambda share, before=before: done(before + share))  # type: ignore[misc]


def mean_row(rows: Matrix, block: int = 8192) -> Tensor:
    """Mean of all rows, float64 [d_model]: what 'centred' takes off. Padding rows count as any other."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for start in range(0, rows.shape[0], block):
        total += rows[start : start + block].to("cpu", torch.float64).sum(0)
    return total / rows.shape[0]


def _check(weight: Matrix, rows: Matrix, spec: Spec, gamma: Tensor | None, mean: Tensor | None) -> None:
    d_model, vocab = weight.shape[0], rows.shape[0]
    if rows.shape[1] != d_model:
        raise SteerError(
            "bad_token_basis",
            f"the unembedding has width {rows.shape[1]} and the value vectors {d_model}: expected the same",
        )
    if spec.top_k > vocab:
        raise SteerError("bad_token_basis", f"top_k is {spec.top_k}: expected at most the vocabulary's {vocab} tokens")
    needed = {"normed": ("the final norm's weight", gamma), "centred": ("the mean token row", mean)}.get(spec.variant)
    if needed is not None:
        name, value = needed
        if value is None or tuple(value.shape) != (d_model,):
            given = "none" if value is None else f"shape {list(value.shape)}"
            raise SteerError("bad_projection", f"variant {spec.variant!r} needs {name} [{d_model}]: given {given}")


def _improved(best: Tensor, scores: Tensor, sign: int, first: int, keep: int) -> Tensor:
    """The `keep` largest keys of `best` [n, any] and of sign * scores [n, tokens], whose first column is token `first`.

    Chunks are ranked by (extreme, then lower place): a token outside the `keep` best chunks has at least `keep` tokens
    before it, one in each of them, so that no tie is decided otherwise than over all tokens. Once `keep` tokens are
    known, only a chunk whose extreme is above the worst of them can matter: an equal one has the higher ids.
    """
    whole = scores.shape[1] // CHUNK
    body = scores[:, : whole * CHUNK].unflatten(1, (whole, CHUNK))
    tail = scores[:, whole * CHUNK :]
    extreme = sign * (body.amax(2) if sign > 0 else body.amin(2))
    if not (bool(extreme.isfinite().all()) and bool(tail.isfinite().all())):
        raise _not_finite()
    tail_ids = torch.arange(first + whole * CHUNK, first + scores.shape[1], device=scores.device)
    keys = [best, _keys(sign * tail, tail_ids)]
    count = min(keep, whole)
    if best.shape[1] == keep:
        worst = _values(best.amin(1, keepdim=True))
        count = min(count, int((extreme > worst).sum(1).max())) if whole else 0
    if count:
        places = _identities(_largest(_keys(extreme, torch.arange(whole, device=scores.device)), count))[:, :, None]
        ids = places * CHUNK + torch.arange(first, first + CHUNK, device=scores.device)
        keys.append(_keys(sign * body.gather(1, places.expand(-1, -1, CHUNK)), ids).flatten(1))
    return _largest(torch.cat(keys, 1), keep)


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 that order as (value, then lower id): the float's bits, made monotone, above the id's complement."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0: a negative zero ties with a positive one
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (0xFFFFFFFF - ids)


def _values(keys: Tensor) -> Tensor:
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _identities(keys: Tensor) -> Tensor:
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def _largest(keys: Tensor, count: int) -> Tensor:
    return keys.topk(min(count, keys.shape[1]), dim=1).values


def _scores(vectors: Tensor, rows: Matrix, tokens: Tensor, block: int) -> Tensor:
    """float32 [ends, n, m]: vectors[i] . rows[tokens[end, i, j]], each one dot product, so that no blocking shows."""
    out = torch.empty(tokens.shape, dtype=torch.float32, device=vectors.device)
    for first in range(0, rows.shape[0], block):
        inside = (tokens >= first) & (tokens < first + block)
        if not bool(inside.any()):
            continue
        part = rows[first : first + block].to(vectors.device, torch.float32).contiguous()
        for here, wanted, into in zip(inside, tokens, out, strict=True):
            starts = torch.zeros(len(vectors) + 1, dtype=torch.int64, device=vectors.device)
            starts[1:] = here.sum(1).cumsum(0)
            columns = wanted[here] - first
            zeros = torch.zeros(len(columns), device=vectors.device)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
                # Unchecked: the columns of a row are in order of rank, not of place.
                pattern = torch.sparse_csr_tensor(
                    starts, columns, zeros, size=(len(vectors), len(part)), check_invariants=False
                )
            into[here] = torch.sparse.sampled_addmm(pattern, vectors, part.T, beta=0.0).values()
    return out


def _ranked(candidates: Tensor, exact: Tensor, top_k: int) -> Ends:
    arrays = []
    for sign, tokens, scores in zip((1, -1), candidates, exact, strict=True):
        order = _keys(sign * scores, tokens).topk(top_k, dim=1).indices
        arrays += [tokens.gather(1, order).int().cpu().numpy(), scores.gather(1, order).cpu().numpy()]
    return Ends(*arrays)


def _not_finite() -> SteerError:
    return SteerError("not_finite", "the weights or the unembedding hold NaN or infinite numbers; load them again")
