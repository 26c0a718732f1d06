import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from samlib.analysis.stats import (
    Estimate,
    correlation_over_seeds,
    decide,
    expected_by_chance,
    mean_interval,
    sign_count,
)


def test_the_mean_interval_is_students_t_interval():
    x = [0.61, 0.64, 0.60, 0.66]
    reference = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    e = mean_interval(x)
    assert (e.value, e.low, e.high, e.n) == pytest.approx((np.mean(x), reference.low, reference.high, 4), rel=1e-12)
    # closed form for n = 2: half = t_1(0.975) * |x1 - x2| / 2, t_1 the Cauchy quantile tan(pi * 0.475)
    assert mean_interval([1, 3]).half == pytest.approx(math.tan(math.pi * 0.475))


def test_the_mean_interval_covers_the_truth_at_its_level():
    x = np.random.default_rng(0).normal(0.5, 2.0, size=(4000, 3))
    covered = np.mean([not e.excludes(0.5) for e in map(mean_interval, x)])
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


def test_diverged_runs_are_counted_and_never_averaged():
    e = mean_interval([0.5, np.nan, 0.7])
    assert (e.value, e.n, e.left_out) == (pytest.approx(0.6), 2, 1)
    nothing = mean_interval([np.nan])
    assert math.isnan(nothing.value) and (nothing.n, nothing.left_out, str(nothing)) == (0, 1, "– (1 left out)")


def test_one_value_has_no_interval_and_excludes_nothing():
    e = mean_interval([0.012], unit="points", signed=True)
    assert math.isnan(e.half) and not e.excludes(0) and str(e) == "+1.2 points (n=1)"


def test_an_interval_is_never_narrower_than_one_test_image_allows():
    same = mean_interval([0.01, 0.01, 0.01], resolution=1 / 1000)
    assert (same.low, same.high) == pytest.approx((0.009, 0.011))
    wide = [0.01, 0.02, 0.06]
    assert mean_interval(wide, resolution=1 / 1000) == mean_interval(wide)
    assert decide(mean_interval([0.0005] * 3, resolution=1 / 1000), above=0) == "undecided"


def test_an_estimate_is_shown_with_unit_sign_interval_and_n():
    assert str(Estimate(-0.012, -0.020, -0.004, 3, "points", signed=True)) == "−1.2 ± 0.8 points (n=3)"
    assert str(Estimate(0.5, 0.25, 0.75, 5)) == "0.500 ± 0.250 (n=5)"
    assert str(Estimate(0.5, 0.25, 0.75, 5, "%", left_out=2)) == "50.0 ± 25.0 % (n=5, 2 left out)"
    assert str(Estimate(0.9512, 0.9510, 0.9514, 3, "%")) == "95.12 ± 0.02 % (n=3)"
    assert str(Estimate(1234.5, 1230, 1239, 3, "nats")) == "1234 ± 4 nats (n=3)"
    assert str(Estimate()) == "–" and Estimate(0.5, 0.25, 0.75, 5).format(n=False) == "0.500 ± 0.250"
    assert str(Estimate(0.75, 0.349, 0.968, 8, "of")) == "6 of 8 (34.9 to 96.8 %)"


def test_two_pairs_decide_nothing():
    assert decide(Estimate(5, 4, 6, 2), above=0) == "undecided"
    assert decide(Estimate(5, 4, 6, 3), above=0) == "holds"
    assert decide(Estimate(5, n=3), above=0) == "undecided"
    assert decide(Estimate(), above=0) == "not measured"


def test_a_verdict_is_where_the_whole_interval_lies():
    low, across, high = Estimate(-5, -6, -4, 3), Estimate(0.1, -1, 1.2, 3), Estimate(5, 4, 6, 3)
    assert [decide(e, above=0) for e in (low, across, high)] == ["contradicted", "undecided", "holds"]
    assert [decide(e, below=0) for e in (low, across, high)] == ["holds", "undecided", "contradicted"]
    assert [decide(e, within=2) for e in (low, across, high)] == ["contradicted", "holds", "contradicted"]
    assert [decide(e, within=(0, 7)) for e in (low, across, high)] == ["contradicted", "undecided", "holds"]
    assert decide(across, above=-2) == "holds"  # no worse than, by a margin of two
    with pytest.raises(ValueError, match="exactly one"):
        decide(high, above=0, below=3)


def signs(above: int, below: int) -> Estimate:
    return sign_count([Estimate(1.0)] * above + [Estimate(-1.0)] * below + [Estimate(0.0), Estimate()])


def test_a_sign_count_has_the_exact_binomial_interval():
    for k in (0, 3, 10):
        reference, e = stats.binomtest(k, 10).proportion_ci(0.95, method="exact"), signs(k, 10 - k)
        assert (e.value, e.low, e.high) == pytest.approx((k / 10, reference.low, reference.high))
    assert decide(signs(0, 0), above=0.5) == "not measured"


def test_a_sign_count_decides_as_the_sign_test_does():
    for n in range(3, 12):
        for k in range(n + 1):
            e = signs(k, n - k)
            assert (e.n, e.left_out) == (n, 2)
            assert e.excludes(0.5) == (stats.binomtest(k, n).pvalue < 0.05), (k, n)


def test_one_of_twenty_intervals_excludes_the_truth_by_chance():
    assert expected_by_chance(20) == pytest.approx(1)
    x = np.random.default_rng(1).normal(size=(2000, 4))
    assert sum(e.excludes(0) for e in map(mean_interval, x)) == pytest.approx(expected_by_chance(2000), rel=0.25)


def over_rho(y: dict[float, float], seeds: int = 4) -> pd.DataFrame:
    rng = np.random.default_rng(3)
    rows = [(s, rho, rho + 0.01 * rng.normal(), v + 0.001 * rng.normal()) for s in range(seeds) for rho, v in y.items()]
    return pd.DataFrame(rows, columns=["seed", "rho", "x", "y"])


def test_a_correlation_over_rho_counts_seeds_and_not_runs():
    frame = over_rho({0.1: 0.1, 0.2: 0.2, 0.4: 0.4, 0.8: 0.8})
    each = [np.corrcoef(part.x, part.y)[0, 1] for _, part in frame.groupby("seed")]
    e = correlation_over_seeds(frame, "x", "y", over=None)
    assert (e.n, e.value, e.half) == pytest.approx((4, np.mean(each), mean_interval(each).half), abs=1e-3)
    assert decide(correlation_over_seeds(frame, "x", "y"), above=0) == "holds"
    assert decide(correlation_over_seeds(frame[frame.seed < 2], "x", "y"), above=0) == "undecided"


def test_a_seeds_correlation_is_scipys_and_a_constant_or_a_short_seed_is_left_out():
    frame = over_rho({0.1: 0.3, 0.2: 0.1, 0.4: 0.2, 0.8: 0.2}, seeds=1)
    for method, scipys in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        e = correlation_over_seeds(frame, "x", "y", over=None, method=method)
        assert (e.value, e.n) == pytest.approx((scipys(frame.x, frame.y).statistic, 1))
    more = pd.concat([frame, frame.assign(seed=1, y=0.5), frame[:2].assign(seed=2)])
    e = correlation_over_seeds(more, "x", "y", over=None)
    assert (e.n, e.left_out) == (1, 2)


def test_a_correlation_that_one_rho_carries_does_not_hold():
    frame = over_rho({0.1: 0.92, 0.2: 0.91, 0.4: 0.93, 0.8: 0.10})  # training fails at the largest
    assert decide(correlation_over_seeds(frame, "x", "y", over=None), below=0) == "holds"
    assert decide(correlation_over_seeds(frame, "x", "y"), below=0) == "undecided"


def test_fewer_than_four_rho_decide_nothing_and_the_estimate_says_so():
    frame = over_rho({0.1: 0.1, 0.2: 0.2, 0.4: 0.4})
    few = correlation_over_seeds(frame, "x", "y")
    assert math.isnan(few.half) and str(few).endswith("(n=4, too few ρ)") and decide(few, above=0) == "undecided"
    assert decide(correlation_over_seeds(frame, "x", "y", over=None), above=0) == "holds"
