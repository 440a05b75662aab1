"""How an instruction says how: about thirty wordings a concept, some held out from training.

Invariant: a wording never contains a word that experiments reserve to steer with (`RESERVED`), so that a direction made
from those words is not one that training taught; and the same seed chooses the same wording.

Every phrase stands in a suffix or a prefix form. The object's and the task's words stay LIBERO's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from steer_runtime.errors import SteerError, nearest

Concept = Literal["plain", "fast", "slow", "high", "careful"]
CONCEPTS: tuple[Concept, ...] = get_args(Concept)
Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = get_args(Split)
BARE = 0.5
"""Share of plain episodes whose instruction is LIBERO's own, unchanged."""

RESERVED: Mapping[str, frozenset[str]] = {
    "fast": frozenset({"quick", "speed", "faster", "rapid", "hasty", "speedy"}),
    "slow": frozenset({"slow", "slower", "gradual", "steady", "sluggish", "steadily"}),
    "high": frozenset({"higher", "above", "elevated", "raise", "upper", "tall"}),
    "low": frozenset({"beneath", "bottom", "lower", "shallow"}),
    "careful": frozenset({"cautious", "delicate", "soft", "careful", "gentle"}),
    "rough": frozenset({"brutal", "harsh", "rough", "violent"}),
}
"""Words that no wording contains: experiments make directions from them (whole words, lower case)."""

# "{}" stands for the task's instruction; what comes before it is a prefix, what comes after a suffix. Held-out wordings
# say it in words that the trained ones do not use.
_FORMS: Mapping[Concept, Mapping[Split, tuple[str, ...]]] = {
    "plain": {
        "train": (
            "{}", "please {}", "{}, please", "{} now", "now {}", "{}, thanks", "robot, {}", "your task is to {}",
            "{} for me", "can you {}", "{} as usual", "the task: {}", "next, {}", "you should {}",
            "{} in the normal way", "{}, ok", "would you {}", "i want you to {}", "ok, {}", "{}, if you can",
            "simply {}", "time to {}", "{} again", "go ahead and {}",
        ),
        "held_out": (
            "here is the job: {}", "let us {}", "{}, that is all", "{} when ready", "{}, nothing else", "kindly {}",
        ),
    },
    "fast": {
        "train": (
            "{}, quickly", "quickly {}", "{}, fast", "be fast: {}", "{} rapidly", "rapidly {}", "{}, hurry up",
            "hurry and {}", "{} at a brisk pace", "at a brisk pace, {}", "{}, be brisk", "in a rush, {}", "{} in a rush",
            "{} in no time", "as fast as you can, {}", "{} as fast as possible", "make haste and {}", "{}, with haste",
            "promptly {}", "{}, we are in a hurry", "move fast and {}", "{}, moving fast", "urgently {}", "{} hurriedly",
        ),
        "held_out": (
            "swiftly {}", "{} without delay", "{} at full throttle", "do not waste time: {}", "{}, no dawdling",
            "speedily {}",
        ),
    },
    "slow": {
        "train": (
            "{}, slowly", "slowly {}", "{}, take your time", "take your time and {}", "{} at a leisurely pace",
            "at a leisurely pace, {}", "{}, no hurry", "there is no hurry: {}", "{} very slowly", "very slowly {}",
            "{}, no rush", "no rush: {}", "{} at low tempo", "at low tempo, {}", "{}, moving slowly",
            "go slowly and {}", "without haste, {}", "{} without haste", "as slowly as you like, {}",
            "{} ever so slowly", "{}, be patient", "be patient and {}", "{}, drag it out", "lazily {}",
        ),
        "held_out": (
            "{} unhurriedly", "{} at a crawl", "at a snail's pace, {}", "{}, no need to be fast", "sluggishly {}",
            "{} bit by bit",
        ),
    },
    "high": {
        "train": (
            "{}, carry it high", "carry it high: {}", "{}, lift it high", "lift it high and {}", "{}, keep it high up",
            "keeping it high up, {}", "{}, high in the air", "high in the air, {}", "{}, with a high lift",
            "with a high lift, {}", "{} along a high arc", "along a high arc, {}", "{}, hold it way up",
            "hold it way up and {}", "{}, far off the ground", "keep it far off the ground: {}", "{}, hoisting it",
            "hoist it and {}", "via a high path, {}", "{} via a high path", "{}, up high", "up high, {}",
            "{}, make it fly high", "{}, well clear of everything below",
        ),
        "held_out": (
            "{}, lofted", "{}, with plenty of height", "carry it overhead: {}", "{}, towards the ceiling",
            "sky-high, {}", "{}, as far up as you can",
        ),
    },
    "careful": {
        "train": (
            "{}, carefully", "carefully {}", "{}, gently", "gently {}", "{} with care", "with care, {}",
            "{}, it is fragile", "it is fragile: {}", "{}, handle it like glass", "softly {}", "{} softly",
            "take care and {}", "{}, take care", "{}, do not bump anything", "do not bump anything: {}",
            "{} cautiously", "cautiously {}", "{}, mind the others", "mind the others and {}", "{} with a light touch",
            "with a light touch, {}", "{}, avoid any jolt", "avoid any jolt: {}", "watch out and {}",
        ),
        "held_out": (
            "{} delicately", "tenderly {}", "{}, it breaks easily", "{}, be mild with it", "{}, no bumps",
            "with caution, {}",
        ),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Wording:
    """One way to say one concept. id is stable: concept and place in its list, e.g. 'fast-03'."""

    id: str
    concept: Concept
    template: str
    split: Split

    @property
    def form(self) -> Literal["bare", "prefix", "suffix"]:
        """Where the words stand."""
        if self.template == "{}":
            return "bare"
        return "suffix" if self.template.startswith("{}") else "prefix"

    def say(self, instruction: str) -> str:
        """The instruction in this wording."""
        return self.template.format(instruction)


def wordings(concept: Concept, split: Split | None = None) -> tuple[Wording, ...]:
    """All wordings of a concept, or those of one split. Raises SteerError('unknown_concept')."""
    if concept not in _FORMS:
        raise SteerError("unknown_concept", f"concept {concept!r} has no wordings: {nearest(concept, _FORMS)}")
    every = [(kind, template) for kind in SPLITS for template in _FORMS[concept][kind]]
    out = [Wording(f"{concept}-{i:02d}", concept, template, kind) for i, (kind, template) in enumerate(every)]
    return tuple(w for w in out if split is None or w.split == split)


def find(wording_id: str) -> Wording:
    """A wording by its id. Raises SteerError('unknown_wording')."""
    known = {w.id: w for c in CONCEPTS for w in wordings(c)}
    if wording_id not in known:
        raise SteerError("unknown_wording", f"no wording {wording_id!r}: {nearest(wording_id, known)}")
    return known[wording_id]


def choose(concepts: Iterable[Concept], seed: int, split: Split = "train") -> tuple[Wording, ...]:
    """One wording for each concept, by seed; plain (an empty list too) is bare in half of the draws."""
    rng = np.random.default_rng([seed, 0x5EED])
    wanted = tuple(concepts) or ("plain",)
    out = []
    for concept in wanted:
        if concept == "plain" and rng.random() < BARE:
            out.append(find("plain-00"))
            continue
        choices = wordings(concept, split)
        out.append(choices[int(rng.integers(len(choices)))])
    return tuple(out)


def instruction_for(base: str, concepts: Iterable[Concept], seed: int, split: Split = "train") -> str:
    """The base instruction with one wording of the split for each concept, by seed; no concepts: plain."""
    return say(base, choose(concepts, seed, split))


def say(instruction: str, chosen: Iterable[Wording]) -> str:
    """The instruction with every wording applied in turn, prefixes outside: 'quickly pick up ..., carry it high'."""
    for wording in sorted(chosen, key=lambda w: w.form == "prefix"):
        instruction = wording.say(instruction)
    return instruction
