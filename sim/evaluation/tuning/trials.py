"""The trials of one direction, kept by Optuna in a file: what was chosen, what came of it.

Invariant: a trial's parameters depend on the sampler's seed, its number and the trials that were told before its batch: a
sampler is seeded anew for every trial, so that a tuning that was killed goes on as if it had not been.

One objective, the effect, under constraints (Optuna's constrained TPE), not several: what is asked for is the largest effect
that keeps the limits, and a multi-objective sampler spends its few trials along the whole front; the front is drawn from the
same trials afterwards. Optuna's `should_prune` knows one objective and no constraints; `score.hopeless` stops trials, and
they are told as pruned, with the effect up to there as their intermediate values.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sim.evaluation.tuning.score import Score
from sim.evaluation.tuning.settings import TuneSettings
from sim.evaluation.tuning.space import Point, point_of, suggest, unchanged
from steer_runtime.errors import SteerError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

LOG_FILE = "optuna.log"
State = Literal["complete", "pruned", "errored", "running"]
_RETRY_OF = "retry_of"


@dataclass(frozen=True)
class Outcome:
    """state: pruned where `why` says it was hopeless; errored where an episode was, with its sentence: no score then.
    episodes: how many of them, in their order, it rests on."""

    state: State
    score: Score | None = None
    why: str | None = None
    episodes: int = 0


@dataclass(frozen=True)
class Told:
    """A trial as it stands in the file. effects: after each pair, as far as it went."""

    number: int
    point: Point
    outcome: Outcome
    effects: tuple[float, ...]
    retry_of: int | None


def open_log(folder: Path) -> BaseStorage:
    """Optuna's journal: lines of JSON, no pickle. Only for whoever holds the folder's lock.

    Raises SteerError('no_optuna', 'torn_file').
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise SteerError("no_optuna", "Optuna is not installed: run `pip install 'steer-runtime[tune]'`") from None
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / LOG_FILE
    # A killed run may leave a lock and half a line; nobody else writes while we hold the folder.
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
    try:
        return JournalStorage(JournalFileBackend(str(path)))
    except (ValueError, KeyError):
        raise SteerError("torn_file", f"{path} is no journal of Optuna: choose another --out") from None


class Trials:
    """One direction's trials. name: of the study in the file."""

    def __init__(self, storage: BaseStorage, name: str, settings: TuneSettings) -> None:
        import optuna

        self._settings, self._name = settings, name
        self._study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
        as_it_is = unchanged(settings.search)
        if not self._study.get_trials(deepcopy=False) and as_it_is:
            # What everybody would try first is what all else is compared with.
            self._study.enqueue_trial(as_it_is)

    def told(self) -> list[Told]:
        """All that were asked, by number."""
        asked = (t for t in self._frozen() if t.state.name != "WAITING")
        return [_told(t, self._settings) for t in asked if _whole(t, self._settings)]

    @property
    def planned(self) -> int:
        """How many there shall be: those of the settings, and one more for each that is tried again."""
        return self._settings.trials + sum(_RETRY_OF in t.user_attrs for t in self._frozen())

    def open(self) -> range | None:
        """Numbers of the first batch that is not finished; None when all are."""
        frozen, batch = self._frozen(), self._settings.batch
        for start in range(0, self.planned, batch):
            numbers = range(start, min(start + batch, self.planned))
            if any(n >= len(frozen) or not frozen[n].state.is_finished() for n in numbers):
                return numbers
        return None

    def ask(self, numbers: Sequence[int]) -> dict[int, Point]:
        """Choices of those trials that are not finished, asked now where they were not before."""
        from optuna.trial import Trial, TrialState

        out = {}
        for number in numbers:
            frozen = self._frozen()
            if number < len(frozen) and frozen[number].state.is_finished():
                continue
            self._study.sampler = self._sampler(number)
            if number < len(frozen) and frozen[number].state == TrialState.RUNNING:
                trial = Trial(self._study, frozen[number]._trial_id)
            else:
                trial = self._study.ask()
            assert trial.number == number
            out[number] = suggest(trial, self._settings.search)
        return out

    def report(self, number: int, pairs: int, effect: float | None) -> None:
        """The effect after so many pairs, once."""
        from optuna.trial import Trial

        frozen = self._frozen()[number]
        if effect is not None and pairs not in frozen.intermediate_values:
            self._study.sampler = self._sampler(number)
            Trial(self._study, frozen._trial_id).report(effect, pairs)

    def tell(self, number: int, outcome: Outcome) -> None:
        """For good."""
        from optuna.trial import Trial, TrialState

        frozen = self._frozen()[number]
        self._study.sampler = self._sampler(number)
        trial = Trial(self._study, frozen._trial_id)
        trial.set_user_attr("outcome", asdict(outcome))
        if outcome.score is not None:
            for name, value in outcome.score.violations(self._settings.margin, self._settings.damage).items():
                if name not in frozen.constraints:
                    trial.set_constraint(name, value)
        effect = None if outcome.score is None else outcome.score.effect
        if outcome.state == "complete" and effect is not None:
            self._study.tell(number, effect)
        else:
            state = TrialState.FAIL if outcome.state == "errored" else TrialState.PRUNED
            self._study.tell(number, state=state)

    def retry(self) -> int:
        """Plan every errored trial once more, with the same choice; returns how many."""
        frozen = self._frozen()
        again = {t.user_attrs[_RETRY_OF] for t in frozen if _RETRY_OF in t.user_attrs}
        errored = [t for t in frozen if t.state.name == "FAIL" and t.number not in again]
        for trial in errored:
            self._study.enqueue_trial(trial.params, user_attrs={_RETRY_OF: trial.number})
        return len(errored)

    def _frozen(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _sampler(self, number: int) -> Any:
        from optuna.samplers import TPESampler

        seed = np.random.SeedSequence([self._settings.seed, *self._name.encode(), number]).generate_state(1)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # multivariate sampling is called experimental
            return TPESampler(
                seed=int(seed), n_startup_trials=self._settings.startup, multivariate=True, constant_liar=True
            )


def _whole(trial: FrozenTrial, settings: TuneSettings) -> bool:
    try:
        point_of(trial.params, settings.search)
    except KeyError:  # killed while it was asked
        return False
    return True


def _told(trial: FrozenTrial, settings: TuneSettings) -> Told:
    kept: Mapping[str, Any] = trial.user_attrs.get("outcome", {}) if trial.state.is_finished() else {}
    score = kept.get("score")
    outcome = Outcome("running")
    if kept:
        outcome = Outcome(**{**kept, "score": None if score is None else Score(**score)})
    effects = tuple(value for _, value in sorted(trial.intermediate_values.items()))
    return Told(
        trial.number, point_of(trial.params, settings.search), outcome, effects, trial.user_attrs.get(_RETRY_OF)
    )
