import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from samlib.analysis.old_stats import (
    Estimate,
    chance_share,
    correlation,
    epoch_reaching,
    expected_intersection,
    expected_overlap,
    lift,
    mean_interval,
    paired_difference,
    within_correlation,
)


def test_the_mean_interval_is_students_t_interval():
    x = [0.61, 0.64, 0.60, 0.66]
    reference = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    estimate = mean_interval(x)
    assert estimate.n == 4
    assert estimate[:3] == pytest.approx((np.mean(x), reference.low, reference.high), rel=1e-12)
    # closed form for n = 2: half = t_1(0.975) * |x1 - x2| / 2, t_1 the Cauchy quantile tan(pi * 0.475)
    assert mean_interval([1, 3]).half == pytest.approx(math.tan(math.pi * 0.475))


def test_the_mean_interval_covers_the_truth_at_its_level():
    x = np.random.default_rng(0).normal(0.5, 2.0, size=(4000, 3))
    covered = np.mean([e.low <= 0.5 <= e.high for e in map(mean_interval, x)])
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


def test_one_value_has_no_interval_and_excludes_nothing():
    estimate = mean_interval([0.012])
    assert math.isnan(estimate.half) and not estimate.excludes_zero
    assert estimate.format(signed=True) == "+1.2 (n=1)"


def test_diverged_runs_are_never_averaged():
    with pytest.raises(ValueError, match="1 of 2 values are NaN"):
        mean_interval([0.5, np.nan])
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_an_estimate_says_sign_interval_and_n():
    assert Estimate(-0.012, -0.020, -0.004, 3).format(signed=True) == "-1.2 ± 0.8 (n=3)"
    assert Estimate(0.5, 0.25, 0.75, 5).format(scale=1, digits=2) == "0.50 ± 0.25 (n=5)"
    assert Estimate(-0.012, -0.020, -0.004, 3).excludes_zero and not Estimate(1, -1, 3, 3).excludes_zero


def runs() -> pd.DataFrame:
    rows = [("sam", 0, 0.62), ("sam", 1, 0.65), ("sam", 2, 0.66), ("sam", 3, None), ("sam", 4, 0.7)]
    rows += [("sgd", 2, 0.63), ("sgd", 0, 0.60), ("sgd", 1, 0.61), ("sgd", 3, 0.6), ("sgd", 5, 0.6), ("other", 0, 9)]
    return pd.DataFrame(rows, columns=["mix", "seed", "test_accuracy"])


def test_a_paired_difference_is_the_paired_t_test_of_the_complete_pairs():
    estimate = paired_difference(runs(), "test_accuracy", "mix", "sam", "sgd", ["seed"])
    reference = stats.ttest_rel([0.62, 0.65, 0.66], [0.60, 0.61, 0.63]).confidence_interval(0.95)
    assert estimate[:3] == pytest.approx((0.03, reference.low, reference.high))
    assert (estimate.n, estimate.left_out) == (3, 3)  # seed 3 diverged under SAM, 4 and 5 have one side only


def test_a_paired_difference_pairs_on_every_column_named():
    frame = pd.concat([runs().assign(noise=0.0), runs().assign(noise=0.4)])
    estimate = paired_difference(frame, "test_accuracy", "mix", "sam", "sgd", ["noise", "seed"])
    assert (estimate.n, estimate.left_out) == (6, 6)
    with pytest.raises(ValueError, match="mix='sam'"):
        paired_difference(frame, "test_accuracy", "mix", "sam", "sgd", ["seed"])


def test_no_pair_gives_no_estimate():
    estimate = paired_difference(runs(), "test_accuracy", "mix", "sam", "nothing", ["seed"])
    assert math.isnan(estimate.mean) and (estimate.n, estimate.left_out) == (0, 5)


def test_pearsons_interval_is_scipys():
    x, y = np.random.default_rng(1).normal(size=(2, 12))
    reference = stats.pearsonr(x, y)
    interval = reference.confidence_interval(0.95)
    assert correlation(x, y)[:3] == pytest.approx((reference.statistic, interval.low, interval.high))


def test_spearmans_value_is_scipys_and_its_interval_bonett_and_wrights():
    x, y = np.random.default_rng(2).integers(0, 6, size=(2, 15))  # with ties
    estimate = correlation(x, y, method="spearman")
    r = stats.spearmanr(x, y).statistic
    assert estimate.value == pytest.approx(r)
    width = np.arctanh(estimate.high) - np.arctanh(estimate.low)
    assert width == pytest.approx(2 * stats.norm.ppf(0.975) * math.sqrt((1 + r**2 / 2) / 12))


def test_correlations_without_information_have_no_interval_or_no_value():
    assert correlation([1, 2, 3], [1, 3, 2])[0] == pytest.approx(0.5)
    assert math.isnan(correlation([1, 2, 3], [1, 3, 2]).low)
    assert math.isnan(correlation([1, 2, 3, 4, 5], [7, 7, 7, 7, 7]).value)
    assert math.isnan(correlation([], []).value)
    with pytest.raises(ValueError, match="NaN"):
        correlation([1, 2, 3, np.nan], [1, 2, 3, 4])
    with pytest.raises(ValueError, match="kendall"):
        correlation([1, 2], [1, 2], method="kendall")


def test_within_correlation_sees_through_simpsons_paradox():
    group = np.repeat([0, 1, 2], 20)
    rng = np.random.default_rng(3)
    x = rng.normal(size=60) + 10 * group
    y = -(x - 10 * group) + 0.1 * rng.normal(size=60) + 10 * group
    assert correlation(x, y).value > 0.9
    estimate = within_correlation(x, y, group)
    assert estimate.high < -0.9
    width = np.arctanh(estimate.high) - np.arctanh(estimate.low)
    assert width == pytest.approx(2 * stats.norm.ppf(0.975) / math.sqrt(60 - 3 - 2))


def test_within_correlation_of_one_group_is_pearsons():
    x, y = np.random.default_rng(4).normal(size=(2, 9))
    assert within_correlation(x, y, ["a"] * 9)[:4] == pytest.approx(correlation(x, y)[:4])


def test_within_correlation_of_values_constant_in_each_group_is_nothing():
    x, group = [0.1, 0.1, 0.1, 0.7, 0.7, 0.7], [0, 0, 0, 1, 1, 1]
    assert math.isnan(within_correlation(x, [1, 2, 3, 4, 5, 7], group).value)


def test_within_correlation_covers_independence_at_its_level():
    rng, group = np.random.default_rng(5), np.repeat(np.arange(4), 5)
    x, y = rng.normal(size=(2, 500, 20)) + 3 * group
    covered = np.mean([not within_correlation(a, b, group).excludes_zero for a, b in zip(x, y, strict=True)])
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 500))


def test_the_expected_overlap_is_the_hypergeometric_mean():
    assert expected_overlap(30, 50, 200) == pytest.approx(stats.hypergeom(200, 30, 50).mean())
    assert chance_share(50, 200) == 0.25
    assert lift(15, 30, 50, 200) == pytest.approx(2)
    assert math.isnan(lift(0, 0, 50, 200))
    assert lift(np.array([15, 0]), np.array([30, 0]), 50, 200) == pytest.approx([2, np.nan], nan_ok=True)


def test_the_expected_intersection_is_that_of_random_sets():
    sizes, total, rng = [300, 500, 400], 1000, np.random.default_rng(6)
    draws = [
        len(set.intersection(*(set(rng.choice(total, size, replace=False)) for size in sizes))) for _ in range(100)
    ]
    assert expected_intersection(sizes, total) == pytest.approx(60)
    assert np.mean(draws) == pytest.approx(60, abs=4 * np.std(draws) / 10)


def test_epoch_reaching_is_the_first_epoch_at_the_share_of_the_final_accuracy():
    assert epoch_reaching([1, 2, 4, 8], [0.2, 0.73, 0.6, 0.8]) == 2
    assert epoch_reaching([1, 2, 4, 8], [0.2, 0.73, 0.6, 0.8], share=0.95) == 8
    assert math.isnan(epoch_reaching([1, 2], [0.2, np.nan]))
