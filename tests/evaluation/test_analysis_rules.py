"""Rules of evidence: published answers, nominal errors on null data, planted effects found, and words where nothing is known."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from sim.evaluation.analysis import paired, shares
from sim.evaluation.analysis.estimate import Estimate
from steer_runtime.errors import SteerError

TASKS = [task for task in range(10) for _ in range(5)]


def clustered(rng: np.random.Generator, effect: float = 0.0, between: float = 1.0, within: float = 1.0) -> np.ndarray:
    """Differences of 10 tasks x 5 pairs: a task's own effect and a pair's own noise around `effect`."""
    return effect + np.repeat(rng.normal(0, between, 10), 5) + rng.normal(0, within, 50)


class TestShares:
    def test_wilson_is_the_published_interval(self) -> None:
        # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
        for hits, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)):  # fmt: skip
            found = shares.wilson(hits, n)
            assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)

    def test_tango_is_the_published_interval(self) -> None:
        # Fagerland, Lydersen and Laake 2014, airway reactivity: 1, 7 of 21 pairs differ.
        assert shares.tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
        # R's PropCIs::scoreci.mp(25, 28, 618, 0.90), whose estimand is (second - first) / n.
        assert shares.tango(28, 25, 618, level=0.90) == pytest.approx((-0.0148, 0.0247), abs=1e-4)

    def test_tangos_limits_are_where_the_likelihood_ratio_of_a_brute_force_fit_says(self) -> None:
        from scipy.optimize import minimize_scalar

        won, lost, n = 4, 9, 40
        for d in shares.tango(won, lost, n):
            # Most likely share of lost pairs when won - lost = d, searched for instead of solved.
            def log_likelihood(q: float, d: float = d) -> float:
                rest = 1 - 2 * q - d
                return -(won * np.log(q + d) + lost * np.log(q) + (n - won - lost) * np.log(rest))

            low = max(0.0, -d) + 1e-9
            q = minimize_scalar(log_likelihood, bounds=(low, (1 - d) / 2 - 1e-9), method="bounded", options={"xatol": 1e-12}).x  # fmt: skip
            z = (won - lost - n * d) / np.sqrt(n * (2 * q + d * (1 - d)))
            assert abs(z) == pytest.approx(1.95996, abs=1e-4)

    @pytest.mark.parametrize(("won", "lost", "n"), [(0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 50), (5, 0, 5), (0, 5, 5)])
    def test_tango_has_width_where_pairs_are_few_or_alike(self, won: int, lost: int, n: int) -> None:
        low, high = shares.tango(won, lost, n)
        assert -1 <= low < high <= 1
        assert low <= (won - lost) / n <= high

    def test_mcnemar_is_exact(self) -> None:
        # The same airway data: binomial, 2 * P(X <= 1) of 8 = 18 / 256.
        steered, unsteered = [1] * 1 + [1] * 1 + [0] * 7 + [0] * 12, [1] * 1 + [0] * 1 + [1] * 7 + [0] * 12
        found = shares.mcnemar(steered, unsteered)
        assert (found.p, found.n) == (pytest.approx(18 / 256), 8)
        alike = shares.mcnemar([True] * 3, [True] * 3)
        assert (alike.p, alike.note) == (1.0, "every pair ended alike")
        assert shares.mcnemar([], []).p is None

    def test_equal_success_is_no_loss_only_with_enough_pairs(self) -> None:
        enough = shares.least_pairs()
        assert enough == 35
        few = shares.non_inferiority([True] * 34, [True] * 34, list(range(34)))
        assert (few.verdict, few.difference.note) == ("undecided", "34 pairs cannot show it: at least 35 are needed")
        assert shares.non_inferiority([True] * enough, [True] * enough, list(range(enough))).verdict == "held"

    def test_lost_success_is_lost_and_a_little_of_it_undecided(self) -> None:
        unsteered = [True] * 50
        assert shares.non_inferiority([False] * 25 + [True] * 25, unsteered, TASKS).verdict == "lost"
        assert shares.non_inferiority([False] * 3 + [True] * 47, unsteered, TASKS).verdict == "undecided"

    def test_failures_of_one_task_widen_the_interval_of_success(self) -> None:
        """Ten lost pairs in two tasks say less of other tasks than ten spread over all."""
        together = [task >= 2 for task in TASKS]
        spread = [i % 5 != 0 for i in range(50)]
        clumped, even = (shares.non_inferiority(s, [True] * 50, TASKS).difference for s in (together, spread))
        assert clumped.value == even.value == pytest.approx(-0.2)
        assert clumped.low is not None
        assert even.low is not None
        assert clumped.low < even.low - 0.05

    def test_coverage_is_of_what_was_planned(self) -> None:
        coverage = shares.Coverage(planned=12, scored=7, errored=2, refused=1)
        assert (coverage.share, coverage.missing) == (pytest.approx(7 / 12), 2)
        assert shares.Coverage(0, 0, 0, 0).share is None


class TestPaired:
    def test_sign_flip_is_the_textbook_answer(self) -> None:
        # Fisher 1935, The Design of Experiments, 21: Darwin's 15 pairs of Zea mays, 1726 of 32768 flips, two-sided.
        darwin = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
        found = paired.sign_flip(darwin, list(range(15)))
        # 2^15 flips are more than are tried, so the answer has Monte-Carlo error.
        assert found.p == pytest.approx(1726 / 32768, abs=0.007)
        # All eight the same way: 2 of 256 flips, exactly; ties between equal differences count with them.
        assert paired.sign_flip([1, 2, 3, 4, 5, 6, 7, 8], list(range(8))).p == 2 / 256
        assert paired.sign_flip([1] * 16, [t for t in range(8) for _ in range(2)]).p == 2 / 256

    def test_null_data_gives_the_nominal_rate_only_when_tasks_flip_whole(self) -> None:
        """300 studies without an effect, in which tasks differ: flips of tasks err in 5 % of them, flips of pairs far oftener."""
        rng = np.random.default_rng(1)
        by_task, by_pair = 0, 0
        for _ in range(300):
            values = clustered(rng)
            # 2^10 flips of tasks are all tried; many flips of pairs are not needed to see the error.
            by_task += (paired.sign_flip(values.tolist(), TASKS).p or 1) < 0.05
            flipped = (rng.choice([-1, 1], (300, 50)) * values).sum(1)
            by_pair += (np.abs(flipped) >= abs(values.sum())).mean() < 0.05
        assert 0.02 <= by_task / 300 <= 0.08
        assert by_pair / 300 > 0.15

    def test_planted_effect_is_found(self) -> None:
        rng = np.random.default_rng(2)
        found = [(paired.sign_flip(clustered(rng, effect=1.5).tolist(), TASKS).p or 1) < 0.05 for _ in range(50)]
        assert np.mean(found) > 0.8

    def test_interval_covers_the_mean_of_other_tasks(self) -> None:
        rng = np.random.default_rng(3)
        covered = 0
        for _ in range(200):
            interval = paired.cluster_bootstrap(clustered(rng, effect=0.7).tolist(), TASKS, resamples=1_000)
            assert interval.low is not None
            assert interval.high is not None
            covered += interval.low <= 0.7 <= interval.high
        # Ten clusters: a percentile interval is a little narrow; two levels make up for most of it.
        assert 0.88 <= covered / 200 <= 0.99

    def test_interval_widens_where_tasks_differ(self) -> None:
        values = [float(task) for task in TASKS]
        clumped = paired.cluster_bootstrap(values, TASKS)
        alone = paired.cluster_bootstrap(values, list(range(50)))
        assert clumped.high is not None
        assert alone.high is not None
        assert clumped.high - 4.5 > 1.5 * (alone.high - 4.5)

    def test_same_records_give_the_same_interval(self) -> None:
        values = clustered(np.random.default_rng(4)).tolist()
        assert paired.cluster_bootstrap(values, TASKS) == paired.cluster_bootstrap(values, TASKS)

    def test_holm_is_the_textbook_step_down(self) -> None:
        found = paired.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "untested": None})
        assert found["untested"] is None
        assert {k: v for k, v in found.items() if v is not None} == pytest.approx(
            {"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06}
        )
        assert paired.holm({"a": None}) == {"a": None}

    @pytest.mark.parametrize(("units", "alpha"), [(2, 0.05), (3, 0.0125), (4, 0.005), (10, 0.008)])
    def test_detectable_effect_of_few_tasks_is_detected_at_its_power(self, units: int, alpha: float) -> None:
        rng = np.random.default_rng(0)
        standard = rng.standard_normal(units)
        standard = (standard - standard.mean()) / standard.std(ddof=1)
        size = paired.detectable(standard.tolist(), list(range(units)), alpha=alpha).value
        assert size is not None
        drawn = rng.standard_normal((20_000, units)) + size
        t = drawn.mean(1) / drawn.std(1, ddof=1) * units**0.5
        found = (np.abs(t) > scipy.stats.t.ppf(1 - alpha / 2, units - 1)).mean()
        assert found == pytest.approx(0.80, abs=0.015)

    def test_detectable_effect_is_cohens_and_is_detected_at_its_power(self) -> None:
        # Cohen 1988: a one-sample t test of 34 at 5 % two-sided finds d = 0.5 with a power of 0.8.
        rng = np.random.default_rng(5)
        values = rng.normal(size=34)
        standard = (values - values.mean()) / values.std(ddof=1)
        found = paired.detectable(standard.tolist(), list(range(34)))
        assert found.value == pytest.approx(0.5, abs=0.01)
        # And with clusters: planted at the size that such studies tell on average, it is found about four times in five.
        told = [paired.detectable(clustered(rng).tolist(), TASKS).value for _ in range(100)]
        planted = float(np.mean([size for size in told if size is not None]))
        hits = [(paired.sign_flip(clustered(rng, effect=planted).tolist(), TASKS).p or 1) < 0.05 for _ in range(100)]
        assert 0.65 < np.mean(hits) < 0.92

    def test_stricter_alpha_needs_a_larger_effect(self) -> None:
        values = clustered(np.random.default_rng(7)).tolist()
        loose, strict = paired.detectable(values, TASKS), paired.detectable(values, TASKS, alpha=0.05 / 3)
        assert loose.value is not None
        assert strict.value is not None
        assert strict.value > 1.1 * loose.value


class TestBand:
    def test_band_is_the_95th_percentile_of_sizes_and_of_pushes_that_way(self) -> None:
        draws = [-4.0, *np.linspace(-1, 1, 19)]
        band = paired.control_band(1.5, draws, 1.0, pairs=5)
        assert (band.size, band.draws) == (pytest.approx(np.quantile(np.abs(draws), 0.95)), 20)
        assert band.size is not None
        assert band.directed is not None
        assert band.directed < 1.0 < band.size
        assert (band.beyond, band.rank) == (band.size < 1.5, pytest.approx(1 / 21))

    def test_effect_the_wrong_way_is_never_beyond(self) -> None:
        assert paired.control_band(-9.0, [0.1] * 20, 1.0, pairs=5).beyond is False
        assert paired.control_band(-9.0, [0.1] * 20, -1.0, pairs=5).beyond is True

    def test_no_controls_are_told_in_words(self) -> None:
        band = paired.control_band(1.0, [], 1.0, pairs=0)
        assert (band.size, band.beyond, band.rank) == (None, None, None)
        assert band.note == "no random control was run at this strength"

    def test_few_draws_are_told(self) -> None:
        assert "5 draws of 20" in paired.control_band(1.0, [0.1] * 5, 1.0, pairs=1).note


class TestTooLittle:
    def test_one_pair_has_no_test_and_no_interval_and_says_so(self) -> None:
        test, interval = paired.sign_flip([0.3], [0]), paired.cluster_bootstrap([0.3], [0])
        assert (test.p, test.note) == (None, "1 pair: no test")
        assert (interval.value, interval.low, interval.note) == (0.3, None, "one pair: no interval")
        assert paired.detectable([0.3], [0]).note == "1 pair: no spread to reckon with"

    def test_no_pair_is_told(self) -> None:
        assert paired.cluster_bootstrap([], []).note == "no pair"
        assert paired.sign_flip([], []).p is None
        assert shares.non_inferiority([], [], []).difference.value is None

    def test_equal_differences_are_told(self) -> None:
        interval = paired.cluster_bootstrap([2.0] * 50, TASKS)
        assert (interval.value, interval.low, interval.high) == (2.0, 2.0, 2.0)
        assert interval.note == "every pair differs by the same"
        assert paired.detectable([2.0] * 50, TASKS).note == "all differences alike: no spread to reckon with"
        nothing = paired.sign_flip([0.0] * 50, TASKS)
        assert (nothing.p, nothing.note) == (1.0, "every difference is zero")

    def test_few_tasks_flip_pairs_and_say_that_this_tells_nothing_of_others(self) -> None:
        test = paired.sign_flip([1.0] * 10, [i % 2 for i in range(10)])
        assert (test.unit, test.p) == ("pair", 2 / 1024)
        assert test.note == "only 2 tasks: says nothing of other tasks"

    def test_not_a_number_is_refused(self) -> None:
        for rule in (paired.sign_flip, paired.cluster_bootstrap, paired.detectable):
            with pytest.raises(SteerError, match="no finite numbers"):
                rule([1.0, float("nan")], [0, 1])
        with pytest.raises(SteerError, match="expected a finite number or None"):
            Estimate(float("nan"))
