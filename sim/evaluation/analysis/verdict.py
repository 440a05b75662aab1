"""The answer in words: does a direction do what its name says, and at what price?

Invariant: a sentence is put together from an `effects.Subject` by the rules here and nothing else; what was not shown is
never called absent, it is "not seen" beside the effect that would have been.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sim.evaluation.analysis.effects import ALPHA, Effect, Subject
from sim.evaluation.analysis.estimate import Estimate, count
from sim.evaluation.analysis.metrics import METRICS
from sim.evaluation.study.kinds import Kind

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"

Does = Literal[
    "yes", "no control", "not beyond random", "the opposite", "opposite within random", "not seen", "no claim", "unknown"
]  # fmt: skip
SHOWN: dict[Does, str] = {
    "yes": "does what its name says",
    "no control": "moves as its name says, but no random control was run",
    "not beyond random": "has the slope that its name says, but moves no farther than random directions do",
    "the opposite": "does the opposite of what its name says",
    "opposite within random": "moves against its name, but not farther than random directions do",
    "not seen": "was not seen to do what its name says",
    "no claim": "claims nothing that is measured",
    "unknown": "could not be tested",
}
DRAWS: dict[Kind, str] = {"random": "random direction", "random_words": "random word direction"}
"""One draw of each kind of control, in words."""
SMALL = 0.2
"""Standard deviations below which a change off the axis is not told in words (Cohen 1988 calls 0.2 small)."""
Kept = Literal["held", "lost", "undecided", "unknown"]
KEPT: dict[Kept, str] = {
    "held": "success is kept within {margin} points",
    "lost": "success is lost by more than {margin} points",
    "undecided": "whether success is kept within {margin} points is not shown",
    "unknown": "success is not known",
}
_KEPT_SHORT = {
    "held": "kept within {margin} points",
    "lost": "lost by more than {margin} points",
    "undecided": "not shown to be kept within {margin} points",
}
_WORSE = ["held", "undecided", "lost"]


@dataclass(frozen=True)
class Verdict:
    """does: see `judge`. chosen: label of the condition that stands for each end ("down", "up"). kept: of success there,
    the worse of them. headline: does it, at what price, in one sentence; evidence, price: the numbers behind both."""

    does: Does
    chosen: dict[str, str]
    kept: Kept
    headline: str
    evidence: str
    price: str


def judge(subject: Subject) -> Verdict:
    """yes: the slope passes Holm the named way and some strength works. no control: the slope does, and no strength has a
    band. not beyond random: the slope does, and no strength is beyond its band at p < 0.05. the opposite: the slope passes
    the other way, and some strength is beyond its band, or none has one. opposite within random: none is. not seen: it does not pass. unknown: so few pairs could not have
    passed beside so many other directions, whatever they did. Each end is told at the strength that works, keeps success best, and moves
    most, in this order; where none works, at the largest."""
    if subject.claim is None:
        return _told(subject, "no claim", {})
    if subject.adjusted is None or subject.slope.value is None:
        return _told(subject, "unknown", _ends(subject.doses, _largest))
    if subject.adjusted >= ALPHA:
        # Holm multiplies the smallest p by the number of tests, and what comes after is never smaller.
        possible = subject.p.least * subject.tests < ALPHA
        return _told(subject, "not seen" if possible else "unknown", _ends(subject.doses, _largest))
    if subject.slope.value * subject.claim.sign < 0:
        banded = [d for d in subject.doses if d.band.size is not None]
        against = [d for d in banded if not d.right_way and d.p.p is not None and d.p.p < ALPHA]
        # `band.beyond` asks for the named way.
        shown = not banded or any(abs(d.change.value or 0.0) > (d.band.size or 0.0) for d in against)
        return _told(subject, "the opposite" if shown else "opposite within random", _ends(subject.doses, _largest))
    working = [d for d in subject.doses if d.works]
    if working:
        return _told(subject, "yes", _ends(working, _best))
    tested = any(d.band.size is not None for d in subject.doses)
    return _told(subject, "not beyond random" if tested else "no control", _ends(subject.doses, _largest))


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


def _ends(doses: Sequence[Effect], order: Callable[[Effect], tuple[float, float]]) -> dict[str, Effect]:
    out = {}
    for end, sign in (("down", -1.0), ("up", 1.0)):
        mine = [d for d in doses if (d.strength or 0.0) * sign > 0 and d.change.value is not None]
        if mine:
            out[end] = min(mine, key=order)
    return out


def _best(effect: Effect) -> tuple[float, float]:
    return _WORSE.index(effect.non_inferiority.verdict), -abs(effect.change.value or 0.0)


def _largest(effect: Effect) -> tuple[float, float]:
    return -abs(effect.strength or 0.0), 0.0


def _told(subject: Subject, does: Does, chosen: dict[str, Effect]) -> Verdict:
    verdicts = [d.non_inferiority.verdict for d in chosen.values() if d.non_inferiority.difference.value is not None]
    kept: Kept = max(verdicts, key=_WORSE.index) if verdicts else "unknown"
    labels = {end: d.label for end, d in chosen.items()}
    headline = f"{subject.name} {SHOWN[does]}{_ways(subject, does, chosen)}"
    if chosen:
        margin = next(iter(chosen.values())).non_inferiority.margin
        headline += f"{', but' if kept == 'lost' and does == 'yes' else ', and'} {KEPT[kept].format(margin=f'{1e2 * margin:.0f}')}"
    return Verdict(does, labels, kept, f"{headline}.", _evidence(subject, does, chosen), _price(chosen))


def _evidence(subject: Subject, does: Does, chosen: dict[str, Effect]) -> str:
    claim = subject.claim
    if claim is None:
        return "Nothing in its name tells a metric; give one with --claim."
    if subject.adjusted is None:
        return capital(f"{subject.p.note or subject.slope.note}.")
    metric = METRICS[claim.metric]
    text = f"The {metric.what} changes by {' and by '.join(_change(d, metric.unit) for d in chosen.values())}"
    for kind, draw in DRAWS.items():
        bands = [(b, d) for d in chosen.values() for b in d.bands if b.kind == kind]
        if bands:
            less = " and ".join(f"{number(b.size)} at {strength(d)}" for b, d in bands)
            text += f"; of {count(max(b.draws for b, _ in bands), draw)} 95 % change it by less than {less}"
    slope = f"{number(subject.slope.value, sign=True)} {metric.unit}".strip()
    text += f". The slope over all strengths is {slope} for strength 1 ({interval(subject.slope, sign=True)}), {equals(subject.adjusted)} after Holm"
    if does == "unknown":
        beside = f" after Holm over {count(subject.tests, 'direction')}" if subject.tests > 1 else ""
        text += f"; {count(subject.p.n, subject.p.unit)} cannot reach p < {ALPHA:g}{beside} whatever they do"
    if does == "not seen" and subject.detectable.value is not None:
        text += f"; {number(subject.detectable.value)} would have been found four times in five"
    return f"{text}."


def pvalue(p: float | None) -> str:
    """A p value for people: "0.002", "< 0.001", a dash for None."""
    if p is None:
        return DASH
    return "<\N{NO-BREAK SPACE}0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def equals(p: float | None) -> str:
    """The same behind a "p": "p = 0.002", "p < 0.001"."""
    shown = pvalue(p)
    return "\N{NO-BREAK SPACE}".join(["p", shown] if shown.startswith("<") else ["p", "=", shown])


def _ways(subject: Subject, does: Does, chosen: dict[str, Effect]) -> str:
    has = {sign for d in subject.doses for sign in (-1, 1) if (d.strength or 0.0) * sign > 0}
    if does != "yes" or len(has) < 2:
        return ""
    if len(chosen) == 2:
        return ", both ways"
    return " at positive strengths only" if "up" in chosen else " at negative strengths only"


def _change(effect: Effect, unit: str) -> str:
    inside = [
        interval(effect.change, sign=True),
        percent(effect.share, sign=True) if effect.share is not None else "",
        count(effect.change.n, "pair"),
    ]
    value = f"{number(effect.change.value, sign=True)} {unit}".strip()
    return f"{value} at {strength(effect)} ({'; '.join(part for part in inside if part)})"


def _price(chosen: dict[str, Effect]) -> str:
    parts = []
    for d in chosen.values():
        n = d.non_inferiority
        if n.difference.value is None:
            parts.append(f"at {strength(d)} success is not known")
            continue
        off = [(name, e.value) for name, e in d.off.items() if e.value is not None and abs(e.value) >= SMALL]
        off.sort(key=lambda item: -abs(item[1]))
        beside = ", ".join(f"{METRICS[name].what} {number(value, sign=True)}" for name, value in off[:3])
        parts.append(
            f"at {strength(d)} success is {percent(d.success.value)} of {d.success.n} against {percent(d.baseline.value)} "
            f"({points(n.difference)} points), {_KEPT_SHORT[n.verdict].format(margin=f'{1e2 * n.margin:.0f}')}; "
            + (
                f"besides, in standard deviations: {beside}"
                if beside
                else f"nothing else changes by {SMALL} standard deviations or more"
            )
        )
    return " ".join(capital(part) + "." for part in parts)


def points(difference: Estimate) -> str:
    """A difference of shares in percentage points with its interval."""
    scaled = [None if v is None else 1e2 * v for v in (difference.value, difference.low, difference.high)]
    shown = number(scaled[0], 0, sign=True)
    return shown if scaled[1] is None else f"{shown}, {number(scaled[1], 0, True)} to {number(scaled[2], 0, True)}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _digits(value: float) -> int:
    return next(d for d in (0, 1, 2, 3) if d == 3 or abs(value - round(value, d)) < 1e-9)
