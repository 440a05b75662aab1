"""Which variant of a swept catalog entry to keep, by what each did on moments that are not the ones it is judged on.

Rule: of the variants of an entry at the strengths tried, those whose on-axis effect reaches an aim at both ends, and of these
the one whose worse end does the least damage; where none reaches it, the one with the largest effect less damage, mean over
the ends. Effect and damage are those of `score_summary`, in standard deviations of the unsteered policy. So directions of all
finders are brought to one effect and differ by what it costs. What is added is linear in strength, so the chosen strength
becomes a factor of the direction: strength 1 is then what was chosen.

Invariant: an entry is chosen whole, one variant and one strength for both ends of an axis.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from steer_runtime.directions.building import CatalogFile, Entry
from steer_runtime.directions.files import write_atomically
from steer_runtime.directions.score_page import SCHEMA
from steer_runtime.errors import SteerError

MAX_BYTES = 1 << 28
AIM = 1.0
"""Standard deviations."""


@dataclass(frozen=True)
class Choice:
    """What became of an entry. variant: the entry that is kept, without a sweep; strength: at which it did best.

    on, damage: there, of the weaker and of the worse end. reaches: the aim. tried: variant -> its largest effect less damage. missing: variants
    that the score does not have, since their finder refused or nobody scored them. scaled: whether the strength is a factor.
    """

    entry: Entry
    variant: Entry
    strength: float
    on: float
    damage: float
    reaches: bool
    tried: Mapping[str, float]
    missing: tuple[str, ...]
    scaled: bool

    @property
    def kept(self) -> Entry:
        """The variant under the entry's own name, sized so that strength 1 is what was chosen."""
        factor = self.strength if self.scaled else 1.0
        alpha = (
            self.variant.alpha
            if factor == 1.0
            else factor * (1.0 if self.variant.alpha is None else self.variant.alpha)
        )
        return self.variant.model_copy(update={"name": self.entry.name, "alpha": alpha})


def read_score(path: Path) -> dict[str, Any]:
    """The document of `steer directions score`. Raises SteerError: 'no_score', 'torn_file'."""
    if not path.is_file():
        raise SteerError("no_score", f"there is no score {path}: make one with `steer directions score`")
    if path.stat().st_size > MAX_BYTES:
        raise SteerError("torn_file", f"{path} is larger than {MAX_BYTES} bytes: expected a score.json")
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SteerError("torn_file", f"{path} is not JSON ({str(error)[:80]})") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise SteerError("torn_file", f"{path} is no score of this version: expected schema {SCHEMA}")
    return document


def choose(
    catalog: CatalogFile, document: Mapping[str, Any], reading: str = "executed", aim: float = AIM
) -> list[Choice]:
    """A choice for every entry of which the score has a variant; aim: on-axis effect of both ends.

    Raises SteerError('not_scored') where it has none of any entry, and for an entry whose name claims nothing.
    """
    names = {h: str(card["name"]) for h, card in document["directions"].items()}
    points = {names[s["hash"]]: s["points"] for s in document["readings"][reading]["scores"]}
    forms = {str(card["name"]): (card["form"], card["op"]) for card in document["directions"].values()}
    made = [_choice(entry, points, forms, aim) for entry in catalog.entries]
    choices = [choice for choice in made if choice is not None]
    if not choices:
        raise SteerError("not_scored", "the score has none of the catalog's entries: build and score them first")
    return choices


def _choice(
    entry: Entry,
    points: Mapping[str, Sequence[Mapping[str, Any]]],
    forms: Mapping[str, tuple[str, str]],
    aim: float,
) -> Choice | None:
    tried: dict[str, float] = {}
    missing = []
    found: list[tuple[bool, float, float, str, float, float]] = []  # best last
    for name in entry.variants:
        ends = [f"{name}-negative", f"{name}-positive"] if entry.axis else [name]
        if any(end not in points for end in ends):
            missing.append(name)
            continue
        whole = _of_ends([points[end] for end in ends])
        if not whole:
            raise SteerError(
                "not_scored",
                f"direction {ends[0]!r} claims nothing that was scored: give the entry a name that does, or score with --on",
            )
        nets = {s: sum(on - damage for on, damage in told) / len(told) for s, told in whole.items()}
        tried[name] = max(nets.values())
        for strength, told in whole.items():
            on, damage = min(on for on, _ in told), max(damage for _, damage in told)
            reaches = on >= aim
            found.append((reaches, -damage if reaches else nets[strength], -strength, name, on, damage))
    if not found:
        return None
    reaches, _, strength, name, on, damage = max(found)
    form, op = forms[f"{name}-positive" if entry.axis else name]
    linear = form == "dense" or op == "add"
    return Choice(entry, entry.variants[name], -strength, on, damage, reaches, tried, tuple(missing), linear)


def _of_ends(curves: Sequence[Sequence[Mapping[str, Any]]]) -> dict[float, list[tuple[float, float]]]:
    """Strength -> (effect, damage) of each end, where every end was measured."""
    told: dict[float, list[tuple[float, float]]] = {}
    for point in (p for curve in curves for p in curve):
        if point["strength"] > 0 and point["on"] is not None:
            told.setdefault(point["strength"], []).append((point["on"], point["damage"]))
    return {s: ends for s, ends in told.items() if len(ends) == len(curves)}


def save(catalog: CatalogFile, choices: Sequence[Choice], document: Mapping[str, Any], path: Path) -> Path:
    """Write a catalog of what was chosen, without sweeps, with how it was chosen above it. Raises SteerError('not_written')."""
    moments = document["moments"]
    lines = [
        f"# Chosen on {moments['used']} moments of {moments['episodes']} episodes ({moments['file']}): of each entry the variant and",
        "# strength with the least damage whose on-axis effect reaches the aim at both ends, or with the largest mean effect less",
        "# damage where none does. Told is the weaker end's effect and the worse end's damage, in standard deviations. What is added",
        "# has the chosen strength in its alpha.",
        *(
            f"#   {c.entry.name}: {c.variant.name} at {c.strength:g}, on-axis {c.on:+.2f}, damage {c.damage:.2f}"
            f"{'' if c.reaches else ' (short of the aim)'}"
            for c in choices
        ),
    ]
    body = {
        "format": catalog.format,
        "policy": catalog.policy,
        "entries": [
            {
                k: v
                for k, v in c.kept.model_copy(update={"tower": c.kept.tower or catalog.tower})
                .model_dump(mode="json", exclude_defaults=True)
                .items()
                if v != ""
            }
            for c in choices
        ],
    }
    text = "\n".join(lines) + "\n" + yaml.safe_dump(body, sort_keys=False, width=120)
    write_atomically(path, text.encode())
    return path
