"""The answer in words: does a direction do what its name says, and at what price?

Invariant: a sentence is put together from an `effects.Subject` by the rules here and nothing else; what was not shown is
never called absent, it is "not seen" beside the effect that would have been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sim.evaluation.analysis.effects import ALPHA, Effect, Subject
from sim.evaluation.analysis.estimate import Estimate, count
from sim.evaluation.analysis.metrics import METRICS

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"

Does = Literal["yes", "no control", "not beyond random", "the opposite", "not seen", "no claim", "unknown"]
SHOWN: dict[Does, str] = {
    "yes": "does what its name says",
    "no control": "moves as its name says, but no random control was run",
    "not beyond random": "moves as its name says, but not farther than random directions do",
    "the opposite": "does the opposite of what its name says",
    "not seen": "was not seen to do what its name says",
    "no claim": "claims nothing that is measured",
    "unknown": "could not be tested",
}
Kept = Literal["held", "lost", "undecided", "unknown"]
KEPT: dict[Kept, str] = {
    "held": "success is kept within {margin} points",
    "lost": "success is lost by more than {margin} points",
    "undecided": "whether success is kept within {margin} points is not shown",
    "unknown": "success is not known",
}


@dataclass(frozen=True)
class Verdict:
    """does: see `judge`. chosen: label of the condition that stands for each end ("down", "up"). kept: of success there,
    the worse of them. answer, price: a sentence each."""

    does: Does
    chosen: dict[str, str]
    kept: Kept
    answer: str
    price: str


def judge(subject: Subject) -> Verdict:
    """yes: the slope passes Holm the named way and some strength works. no control: the slope does, and no strength has a
    band. not beyond random: the slope does, and no strength is beyond its band at p < 0.05. the opposite: the slope passes
    the other way. not seen: it does not pass. Each end is told at the strength that works, keeps success best, and moves
    most, in this order."""
    if subject.claim is None:
        return _told(subject, "no claim", {})
    if subject.adjusted is None or subject.slope.value is None:
        return _told(subject, "unknown", {})
    right = subject.slope.value * subject.claim.sign > 0
    passed = subject.adjusted < ALPHA
    if not passed:
        return _told(subject, "not seen", _ends(subject.doses))
    if not right:
        return _told(subject, "the opposite", _ends(subject.doses))
    working = [d for d in subject.doses if d.works]
    if working:
        return _told(subject, "yes", _ends(working))
    tested = any(d.band.size is not None for d in subject.doses)
    return _told(subject, "not beyond random" if tested else "no control", _ends(subject.doses))


def number(value: float | None, digits: int | None = None, sign: bool = False) -> str:
    """A number for people: a true minus, three figures unless told, a dash for None."""
    if value is None:
        return DASH
    if digits is None:
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    text = f"{abs(value):.{digits}f}"
    shown = float(text)
    return (MINUS if value < 0 and shown else "+" if sign and shown else "") + text


def interval(estimate: Estimate, digits: int | None = None, sign: bool = False) -> str:
    """ "a to b", or nothing."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{number(estimate.low, digits, sign)} to {number(estimate.high, digits, sign)}"


def percent(value: float | None, sign: bool = False) -> str:
    return DASH if value is None else f"{number(1e2 * value, 0, sign)} %"


def strength(effect: Effect) -> str:
    return number(
        effect.strength, None if effect.strength is None else _digits(effect.strength), sign=effect.kind != "scale"
    )


def _ends(doses: Sequence[Effect]) -> dict[str, Effect]:
    order = {"held": 0, "undecided": 1, "lost": 2}
    out = {}
    for end, sign in (("down", -1.0), ("up", 1.0)):
        mine = [d for d in doses if (d.strength or 0.0) * sign > 0 and d.change.value is not None]
        if mine:
            out[end] = min(mine, key=lambda d: (order[d.non_inferiority.verdict], -abs(d.change.value or 0.0)))
    return out


def _told(subject: Subject, does: Does, chosen: dict[str, Effect]) -> Verdict:
    kept: Kept = "unknown"
    verdicts = [d.non_inferiority.verdict for d in chosen.values() if d.non_inferiority.difference.value is not None]
    if verdicts:
        kept = max(verdicts, key=["held", "undecided", "lost"].index)
    labels = {end: d.label for end, d in chosen.items()}
    return Verdict(does, labels, kept, _answer(subject, does, chosen), _price(chosen, kept))


def _answer(subject: Subject, does: Does, chosen: dict[str, Effect]) -> str:
    claim = subject.claim
    if claim is None:
        return f"{subject.name} {SHOWN[does]}: nothing in its name tells a metric; give one with --claim."
    metric = METRICS[claim.metric]
    if does == "unknown":
        return f"{subject.name} {SHOWN[does]}: {subject.p.note or subject.slope.note}."
    parts = [_change(d, metric.unit) for d in chosen.values()]
    text = f"{subject.name} {SHOWN[does]}{_ways(subject, does, chosen)}: {metric.what} {', '.join(parts)}"
    if does in ("yes", "not beyond random"):
        bands = [f"{number(d.band.size)} at {strength(d)}" for d in chosen.values() if d.band.size is not None]
        draws = max((d.band.draws for d in chosen.values()), default=0)
        if bands:
            text += f"; 95 % of {count(draws, 'random direction')} move it by less than {' and '.join(bands)}"
    if does == "not seen":
        text += (
            f"; slope {number(subject.slope.value, sign=True)} ({interval(subject.slope, sign=True)}) for strength 1"
        )
        if subject.detectable.value is not None:
            text += f", and {number(subject.detectable.value)} {metric.unit} would have been found four times in five"
    adjusted = subject.adjusted
    if adjusted is not None:
        text += f" (p {pvalue(adjusted)} after Holm)"
    return text + "."


def pvalue(p: float | None) -> str:
    if p is None:
        return DASH
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"


def _ways(subject: Subject, does: Does, chosen: dict[str, Effect]) -> str:
    has = {sign for d in subject.doses for sign in (-1, 1) if (d.strength or 0.0) * sign > 0}
    if does != "yes" or len(has) < 2:
        return ""
    if len(chosen) == 2:
        return ", both ways"
    return " at positive strengths only" if "up" in chosen else " at negative strengths only"


def _change(effect: Effect, unit: str) -> str:
    relative = f", {percent(effect.share, sign=True)}" if effect.share is not None else ""
    inside = (
        f" ({inner}{relative}; {count(effect.change.n, 'pair')})"
        if (inner := interval(effect.change, sign=True))
        else ""
    )
    return f"{number(effect.change.value, sign=True)} {unit} at {strength(effect)}{inside}".replace("  ", " ")


def _price(chosen: dict[str, Effect], kept: Kept) -> str:
    if not chosen:
        return "The price is not known."
    parts = []
    for d in chosen.values():
        n = d.non_inferiority
        margin = f"{1e2 * n.margin:.0f}"
        difference = f"{points(n.difference)} points" if n.difference.value is not None else ""
        parts.append(
            f"at {strength(d)} success is {percent(d.success.value)} of {d.success.n} against {percent(d.baseline.value)} "
            f"({difference}): {KEPT[n.verdict].format(margin=margin)}"
        )
        worst = max(d.off.items(), key=lambda item: abs(item[1].value or 0.0), default=None)
        if worst is not None and d.damage is not None:
            parts[-1] += (
                f", and what changes most besides is {METRICS[worst[0]].what}, by "
                f"{number(worst[1].value, sign=True)} standard deviations"
            )
    return _capital("; ".join(parts)) + "."


def points(difference: Estimate) -> str:
    """A difference of shares in percentage points with its interval."""
    scaled = [None if v is None else 1e2 * v for v in (difference.value, difference.low, difference.high)]
    shown = number(scaled[0], 0, sign=True)
    return shown if scaled[1] is None else f"{shown}, {number(scaled[1], 0, True)} to {number(scaled[2], 0, True)}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _digits(value: float) -> int:
    return next(d for d in (0, 1, 2, 3) if d == 3 or abs(value - round(value, d)) < 1e-9)
