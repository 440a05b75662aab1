"""Whole catalogs: a file of entries, each a finder with its options, made into a store of directions and axes.

Invariant: a build that was interrupted goes on where it stopped; an entry that is in the store by the same recipe is left
untouched, and one that has changed takes the place of the one it was.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steer_runtime.directions.direction import NO_LICENCE, Axis, Direction, Operation
from steer_runtime.directions.files import read_file
from steer_runtime.directions.options import FinderOptions, first_problem, options_for
from steer_runtime.errors import SteerError
from steer_runtime.types import Role

MAX_BYTES = 1 << 20


class Entry(BaseModel):
    """One direction, or with `axis` both ends of one and the axis that joins them (NAME-negative, NAME-positive, NAME).

    tower: where it is found, default the catalog's. sweep: option -> values to try; the entry stands for one of each
    combination (`variants`), to choose from by what they do (`directions.choosing`).
    options: of the finder (see `directions.options`). op, alpha, low, span, max_strength, licence: as in Recipe.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    finder: str
    tower: str = ""
    axis: bool = False
    options: Mapping[str, Any] = Field(default_factory=dict)
    sweep: Mapping[str, tuple[Any, ...]] = Field(default_factory=dict)
    op: Operation | None = None
    alpha: float | None = None
    low: float | None = None
    span: tuple[Role, ...] | None = None
    max_strength: float = 1.0
    licence: str = NO_LICENCE

    @property
    def variants(self) -> dict[str, Entry]:
        """Entries without a sweep by name: NAME.OPTIONvalue for every swept option; NAME itself where nothing is swept."""
        out = {}
        for values in itertools.product(*self.sweep.values()):
            told = dict(zip(self.sweep, values, strict=True))
            name = self.name + "".join(f".{option.replace('_', '')}{_short(value)}" for option, value in told.items())
            out[name] = self.model_copy(update={"name": name, "options": {**self.options, **told}, "sweep": {}})
        return out


def _short(value: Any) -> str:
    """A swept value as part of a name."""
    return re.sub(r"[^a-z0-9.]+", "-", str(value).lower()).strip("-")


class CatalogFile(BaseModel):
    """A file of entries for one policy. tower: of entries that name none, default the policy's only one. shared: place for
    YAML anchors; not read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["steer-catalog/1"]
    policy: str
    tower: str = ""
    shared: Any = None
    entries: tuple[Entry, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Built:
    """What became of an entry. made: False for one that was in the store already. refused: why there is none."""

    entry: Entry
    directions: tuple[Direction, ...] = ()
    made: bool = False
    refused: SteerError | None = None


def read_catalog(path: Path) -> CatalogFile:
    """A catalog file with every entry's options checked. Raises SteerError: 'no_catalog', 'bad_catalog' naming the entry."""
    if not path.is_file():
        raise SteerError("no_catalog", f"there is no catalog file {path}: see configs/catalogs for one")
    try:
        told = yaml.safe_load(read_file(path, MAX_BYTES))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SteerError("bad_catalog", f"{path.name} is not YAML ({str(error)[:200]})") from None
    try:
        catalog = CatalogFile.model_validate(told)
    except ValidationError as error:
        raise SteerError("bad_catalog", f"{path.name}: {_entry_of(error, told)}{first_problem(error)}") from None
    names = [entry.name for entry in catalog.entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SteerError("bad_catalog", f"{path.name} has two entries {twice[0]!r}: give each its own name")
    for entry in catalog.entries:
        for variant in entry.variants.values():
            entry_options(variant)
    return catalog


def entry_options(entry: Entry) -> FinderOptions:
    """Options of an entry. Raises SteerError('bad_catalog') naming it."""
    try:
        return options_for(entry.finder, entry.options)
    except SteerError as error:
        raise SteerError("bad_catalog", f"entry {entry.name!r}: {error.sentence}") from None


def first_tower(catalog: CatalogFile) -> str:
    """The tower of the first entry, empty for the policy's only one."""
    return catalog.entries[0].tower or catalog.tower


def build(
    catalog: CatalogFile,
    material: Any,
    store: Any,
    *,
    date: str,
    facts: Mapping[str, Any],
    on_entry: Callable[[int, int, str], None] | None = None,
) -> Iterator[Built]:
    """Make every entry in order and save it; yields what became of each.

    material: Material of the catalog's policy, of any tower. store: a DirectionStore. An entry that its finder refuses is
    yielded with the reason, and the rest is built. Raises SteerError for a store that cannot be read or written.
    """
    from steer_runtime.directions import finders

    entries = [variant for entry in catalog.entries for variant in entry.variants.values()]
    for index, entry in enumerate(entries):
        if on_entry is not None:
            on_entry(index, len(entries), entry.name)
        recipe = finders.Recipe(
            name=entry.name,
            date=date,
            op=entry.op,
            alpha=entry.alpha,
            low=entry.low,
            span=None if entry.span is None else frozenset(entry.span),
            max_strength=entry.max_strength,
            facts=dict(facts),
            licence=entry.licence,
        )
        try:
            here = material.at(entry.tower or catalog.tower)
            directions, made = _ends(finders, here, store, recipe, entry)
        except SteerError as error:
            yield Built(entry, refused=SteerError(error.code, f"entry {entry.name!r}: {error.sentence}"))
            continue
        yield Built(entry, directions, made)


def _ends(finders: Any, material: Any, store: Any, recipe: Any, entry: Entry) -> tuple[tuple[Direction, ...], bool]:
    options = entry_options(entry)
    wanted = {entry.name: options}
    if entry.axis:
        wanted = {f"{entry.name}-negative": options.opposite(), f"{entry.name}-positive": options}
    keys = {
        name: finders.recipe_key(entry.finder, material, replace(recipe, name=name), of) for name, of in wanted.items()
    }
    here = {name: _stored(store, name, key) for name, key in keys.items()}
    found = {name: direction for name, direction in here.items() if direction is not None}
    made = len(found) < len(wanted)
    for name, of in wanted.items():
        if name not in found:
            found[name] = finders.find(entry.finder, material, replace(recipe, name=name), of)
            _replace(store, found[name])
    if entry.axis and (made or not store.has_axis(entry.name)):
        store.save_axis(Axis(entry.name, f"{entry.name}-negative", f"{entry.name}-positive"))
    return tuple(found[name] for name in wanted), made


def _stored(store: Any, name: str, key: str) -> Direction | None:
    """The direction of that name and recipe in the store."""
    for entry in store.list():
        if (
            entry.direction is not None
            and entry.direction.name == name
            and entry.direction.provenance.get("recipe") == key
        ):
            return entry.direction
    return None


def _replace(store: Any, direction: Direction) -> None:
    """Save a direction in place of those of its name and model: two of one name would be ambiguous."""
    before = [
        entry.id
        for entry in store.list()
        if entry.direction is not None
        and entry.direction.name == direction.name
        and entry.direction.model_hash == direction.model_hash
        and entry.id != direction.id
    ]
    store.save(direction)
    for stem in before:
        for suffix in (".json", ".safetensors"):
            (store.root / f"{stem}{suffix}").unlink(missing_ok=True)


def _entry_of(error: ValidationError, told: Any) -> str:
    """Names the entry that the first problem is in, where it has a name."""
    place = error.errors()[0]["loc"]
    if len(place) < 2 or place[0] != "entries" or not isinstance(place[1], int):
        return ""
    entry = told["entries"][place[1]]
    return f"entry {str(entry.get('name'))[:64]!r}: " if isinstance(entry, dict) else ""
