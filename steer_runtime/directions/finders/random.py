"""`random`: norm-matched controls, drawn from a seed, to hold a direction against.

Source: the random-neuron control of Haon et al. (CoRL 2025, arXiv 2509.00328), here with the size of the write matched.
Invariant: a control has the direction's form, layers or sites, span and operation, and nothing of what it found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch

from steer_runtime.directions.direction import Direction, Neurons
from steer_runtime.directions.finders.material import Material
from steer_runtime.directions.finders.recipe import Recipe
from steer_runtime.directions.options import RandomOptions
from steer_runtime.directions.token_basis import TokenBasis
from steer_runtime.errors import SteerError
from steer_runtime.types import Tower

_SALT = 0xC0_47_01
_PAIR_SALT = 0xC0_47_02
_WORD_SALT = 0xC0_47_03


def controls(direction: Direction, tower: Tower, count: int, seed: int) -> list[Direction]:
    """`count` random directions beside `direction`; draw i depends on the seed and i alone, so more leave these as they are.

    dense: v' = ||v|| g / ||g|| at each site, g ~ N(0, I).
    neurons: in each layer l as many others of its neurons, a' = c_l a in random order, c_l such that ||W_l a'|| = ||W_l a||
    (W_l: the written columns of down_proj): the summand of `add`, and for `override` the write beside the activations that
    it replaces. `scale`, `clamp` and `ablate` write by what is there, so their numbers are kept as they are.

    Raises SteerError: 'bad_count', 'other_model' where the direction does not fit the tower.
    """
    if count < 0:
        raise SteerError("bad_count", f"{count} controls were asked for: expected 0 or more")
    direction.require_fits(tower, direction.model_hash)
    return [_control(direction, tower, seed, index) for index in range(count)]


def pair_controls(direction: Direction, rows: Mapping[int, np.ndarray], count: int, seed: int) -> list[Direction]:
    """As `controls` of a dense direction, from what the policy itself holds: v' = ||v|| (h_i - h_j) / ||h_i - h_j|| at each
    site, (i, j) a random pair of moments, the same at all sites. Such a write stays among the activations that occur, which a
    Gaussian one does not, so it is the harder control.

    rows: site -> h float [moments, d_model] in the direction's span. Raises SteerError: 'bad_count' for fewer than two moments
    or moments that are all alike, 'bad_operation' for neurons.
    """
    if direction.dense is None:
        raise SteerError("bad_operation", f"direction {direction.id!r} writes neurons: pairs are controls of vectors")
    drawn = []
    for index in range(count):
        rng = np.random.default_rng([seed, _PAIR_SALT, index])
        made = {}
        moments = len(next(iter(rows.values())))
        pairs = [(i, j) for i in range(moments) for j in range(moments) if _apart(rows, direction.dense, i, j)]
        if not pairs:
            raise SteerError("bad_count", "controls of pairs need moments that differ: give two or more")
        first, second = pairs[int(rng.integers(len(pairs)))]
        for site, vector in direction.dense.items():
            step = rows[site][first].astype(np.float64) - rows[site][second].astype(np.float64)
            size = float(np.linalg.norm(step))
            made[site] = (step * (float(np.linalg.norm(vector.astype(np.float64))) / size)).astype(np.float32)
        facts = {**_provenance(direction, seed, index), "pair": [first, second]}
        name = f"pair-{direction.hash[:12]}-{index}"
        drawn.append(replace(direction, name=name, dense=made, proven=False, calibrated=None, provenance=facts))
    return drawn


def word_controls(direction: Direction, basis: TokenBasis, words: int, count: int, seed: int) -> list[Direction]:
    """As `controls` of a dense direction, from words: v' = ||v|| d / ||d|| at each site, d the mean row of the unembedding over
    `words` random words minus that over as many others (`TokenBasis.plain_words`).

    What it answers: is it these words that act, or any? The space of words holds directions that a policy was trained to
    read, which a Gaussian draw of the same norm all but misses, so it is the harder control of a direction made of words.

    Raises SteerError: 'bad_operation' for neurons, 'bad_token_basis' for a basis of another width or with too few words.
    """
    if direction.dense is None:
        raise SteerError(
            "bad_operation", f"direction {direction.id!r} writes neurons: random words are controls of vectors"
        )
    table = basis.unembedding
    pool = basis.plain_words
    if table.shape[1] != direction.d_model or len(pool) < 2 * words:
        raise SteerError(
            "bad_token_basis",
            f"the token basis has {len(pool)} plain words of width {table.shape[1]}: expected {2 * words} or more of width "
            f"{direction.d_model}, that of direction {direction.id!r}",
        )
    drawn = []
    for index in range(count):
        chosen = np.random.default_rng([seed, _WORD_SALT, index]).choice(pool, 2 * words, replace=False)
        rows = table[torch.from_numpy(chosen)].detach().to("cpu", torch.float64).numpy()
        step = rows[:words].mean(0) - rows[words:].mean(0)
        made = {
            site: (step * (float(np.linalg.norm(vector.astype(np.float64))) / float(np.linalg.norm(step)))).astype(
                np.float32
            )
            for site, vector in direction.dense.items()
        }
        texts = [basis.text(int(token)).strip() for token in chosen]
        facts = {**_provenance(direction, seed, index), "words": texts[:words], "against": texts[words:]}
        name = f"words-{direction.hash[:12]}-{index}"
        drawn.append(replace(direction, name=name, dense=made, proven=False, calibrated=None, provenance=facts))
    return drawn


def _apart(rows: Mapping[int, np.ndarray], sites: Iterable[int], first: int, second: int) -> bool:
    return all(not np.array_equal(rows[site][first], rows[site][second]) for site in sites)


def find(material: Material, recipe: Recipe, options: RandomOptions) -> Direction:
    """Draw `draw` of `controls` beside a direction of the store, under the recipe's name.

    Raises SteerError: 'bad_option' for a recipe that says what the direction itself decides, and as `controls`.
    """
    if (recipe.op, recipe.alpha, recipe.low, recipe.span) != (None, None, None, None):
        raise SteerError(
            "bad_option", f"random control {recipe.name!r} takes op, alpha and span from {options.like!r}: drop them"
        )
    like = material.stored(options.like)
    like.require_fits(material.tower, material.identity.model_hash)
    drawn = _control(like, material.tower, options.seed, options.draw)
    return replace(
        drawn,
        name=recipe.name,
        max_strength=recipe.max_strength,
        provenance={**drawn.provenance, **recipe.facts, "date": recipe.date},
    )


def _control(direction: Direction, tower: Tower, seed: int, index: int) -> Direction:
    rng = np.random.default_rng([seed, _SALT, index])
    return replace(
        direction,
        name=f"random-{direction.hash[:12]}-{index}",
        neurons=None if direction.neurons is None else _neurons(direction, direction.neurons, tower, rng),
        dense=None
        if direction.dense is None
        else {site: _gaussian(direction.dense[site], rng) for site in sorted(direction.dense)},
        proven=False,
        calibrated=None,
        provenance=_provenance(direction, seed, index),
    )


def _provenance(direction: Direction, seed: int, index: int) -> dict[str, object]:
    kept = {k: v for k, v in direction.provenance.items() if k in ("policy", "policy_trained", "date", "versions")}
    return {**kept, "finder": "random", "control_of": direction.id, "seed": seed, "draw": index}


def _gaussian(vector: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    drawn = rng.standard_normal(len(vector))
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    return (drawn * (norm / float(np.linalg.norm(drawn)))).astype(np.float32)


def _neurons(direction: Direction, found: Neurons, tower: Tower, rng: np.random.Generator) -> Neurons:
    layers, neurons, alphas, lows = [], [], [], []
    for layer in np.unique(found.layer):
        mine = np.flatnonzero(found.layer == layer)
        others = np.setdiff1d(np.arange(tower.d_ff), found.neuron[mine])
        # A direction of more than half of a layer leaves too few others: then any neuron may be drawn.
        pool = others if len(others) >= len(mine) else np.arange(tower.d_ff)
        drawn = rng.choice(pool, len(mine), replace=False)
        order = rng.permutation(len(mine))
        alpha = found.alpha[mine][order].astype(np.float64)
        if direction.op in ("override", "add"):
            wanted = write_norm(tower, int(layer), found.neuron[mine], found.alpha[mine])
            size = write_norm(tower, int(layer), drawn, alpha)
            alpha = alpha * (wanted / size) if size > 0 else alpha * 0.0
        layers.append(np.full(len(mine), layer, np.int32))
        neurons.append(drawn.astype(np.int32))
        alphas.append(alpha.astype(np.float32))
        if found.low is not None:
            lows.append(found.low[mine][order])
    return Neurons(
        np.concatenate(layers), np.concatenate(neurons), np.concatenate(alphas), np.concatenate(lows) if lows else None
    )


def write_norm(tower: Tower, layer: int, neurons: np.ndarray, alphas: np.ndarray) -> float:
    """||sum_j alpha_j w_j|| over value vectors j of one layer: the norm of what they write into the residual stream."""
    weight: torch.Tensor = tower.down_projs[layer].weight  # type: ignore[attr-defined]
    columns = weight.detach()[:, torch.from_numpy(np.asarray(neurons, np.int64))].to("cpu", torch.float64)
    return float((columns @ torch.from_numpy(np.asarray(alphas, np.float64))).norm())
