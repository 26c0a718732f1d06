"""Estimates with intervals (Student's t, Fisher's z: bootstrap misleads at n = 3), and chance levels."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats


class Estimate(NamedTuple):
    """A value with its confidence interval; NaN bounds where n is too small to have one."""

    mean: float
    low: float
    high: float
    n: int
    left_out: int = 0  # pairs that could not be used: one of the two is missing or diverged

    @property
    def value(self) -> float:
        """The estimate itself: `mean` under the name that suits a correlation."""
        return self.mean

    @property
    def half(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes zero; never where there is no interval."""
        return bool(self.low > 0 or self.high < 0)

    def format(self, scale: float = 100, digits: int = 1, signed: bool = False) -> str:
        """In words, times `scale` (100: a fraction as percent).

        >>> Estimate(0.012, 0.004, 0.020, 3).format(signed=True)
        '+1.2 ± 0.8 (n=3)'
        >>> Estimate(0.012, float("nan"), float("nan"), 1).format()
        '1.2 (n=1)'
        """
        value = f"{scale * self.mean:{'+' if signed else ''}.{digits}f}"
        interval = "" if np.isnan(self.half) else f" ± {scale * self.half:.{digits}f}"
        return f"{value}{interval} (n={self.n})"


def mean_interval(values: Iterable[float], level: float = 0.95) -> Estimate:
    """The mean and its t interval, mean ± t_{n-1} s / sqrt(n); no interval for n = 1.

    Raises ValueError on NaN (a diverged run must be left out by name, never silently averaged) and on no values.
    """
    x = np.asarray(list(values), dtype=float)  # (n,)
    if len(x) == 0:
        raise ValueError("mean_interval needs at least one value, got none")
    if np.isnan(x).any():
        raise ValueError(f"{np.isnan(x).sum()} of {len(x)} values are NaN: leave diverged or missing runs out first")
    if len(x) == 1:
        return Estimate(float(x[0]), np.nan, np.nan, 1)
    half = stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return Estimate(float(x.mean()), float(x.mean() - half), float(x.mean() + half), len(x))


def paired_difference(
    frame: pd.DataFrame, value: str, factor: str, a: object, b: object, pair: Sequence[str], level: float = 0.95
) -> Estimate:
    """The mean of value[factor = a] - value[factor = b] over pairs that share the columns `pair` (the seed, say).

    Pairs with either side missing or NaN are left out, and counted in `left_out`; no pair at all gives NaN and n = 0.
    Raises ValueError where one side of a pair has several runs: `pair` then lacks a column.
    """
    pair = list(pair)
    sides = [frame.loc[frame[factor] == x].set_index(pair)[value].astype(float) for x in (a, b)]
    for x, side in zip((a, b), sides, strict=True):
        if side.index.has_duplicates:
            raise ValueError(f"several runs with {factor}={x!r} share one {pair}: name what tells them apart")
    both = pd.concat(sides, axis=1, join="outer", keys=["a", "b"])  # (pairs, 2), NaN where a side is missing
    difference = (both["a"] - both["b"]).dropna()
    estimate = Estimate(np.nan, np.nan, np.nan, 0) if difference.empty else mean_interval(difference, level)
    return estimate._replace(left_out=len(both) - len(difference))


def correlation(
    x: Iterable[float], y: Iterable[float], method: str = "pearson", level: float = 0.95, spent: int = 0
) -> Estimate:
    """Pearson's or Spearman's correlation with Fisher's z interval, atanh(r) ± 1.96 sqrt(variance).

    The variance is 1 / (n - 3 - spent), for Spearman (1 + r^2 / 2) times that (Bonett and Wright, 2000); `spent` counts
    degrees of freedom that went into x and y before. No interval for n < 4, no value where x or y is constant.
    Raises ValueError on NaN and on unequal lengths.
    """
    x, y = np.asarray(list(x), dtype=float), np.asarray(list(y), dtype=float)  # (n,)
    if method not in ("pearson", "spearman"):
        raise ValueError(f"method is {method!r}: use 'pearson' or 'spearman'")
    if len(x) != len(y) or np.isnan(x).any() or np.isnan(y).any():
        raise ValueError(f"{len(x)} and {len(y)} values, or NaN among them: leave diverged or missing runs out first")
    n = len(x)
    if n < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Estimate(np.nan, np.nan, np.nan, n)
    if method == "spearman":
        x, y = stats.rankdata(x), stats.rankdata(y)
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    if n - 3 - spent <= 0 or abs(r) > 1 - 1e-15:
        return Estimate(r, np.nan, np.nan, n)
    variance = (1 + (method == "spearman") * r**2 / 2) / (n - 3 - spent)
    z, half = np.arctanh(r), stats.norm.ppf((1 + level) / 2) * np.sqrt(variance)
    return Estimate(r, float(np.tanh(z - half)), float(np.tanh(z + half)), n)


def within_correlation(
    x: Iterable[float], y: Iterable[float], group: Iterable[object], level: float = 0.95
) -> Estimate:
    """Pearson's correlation of x and y after each group's means are taken away: is it more than the groups' own order?

    The groups' means cost degrees of freedom: the variance of Fisher's z is 1 / (n - 3 - (groups - 1)).
    """
    frame = pd.DataFrame({"x": list(x), "y": list(y), "group": list(group)})
    values, grouped = frame[["x", "y"]].to_numpy(float), frame.groupby("group")[["x", "y"]]
    inner = values - grouped.transform("mean").to_numpy(float)  # (n, 2)
    inner[:, np.ptp(inner, axis=0) < 1e-12 * np.abs(values).max(axis=0)] = 0  # constant in each group, but for rounding
    return correlation(inner[:, 0], inner[:, 1], level=level, spent=grouped.ngroups - 1)


def chance_share(size: float, total: float) -> float:
    """The share of any set that a random set of `size` out of `total` holds by chance: size / total."""
    return size / total


def expected_overlap(size_a: float, size_b: float, total: float) -> float:
    """How many members two independent random sets share on average (the hypergeometric mean)."""
    return size_a * size_b / total


def lift(overlap: float, size_a: float, size_b: float, total: float) -> float:
    """The overlap over its chance level: 1 is chance. NaN where a set is empty."""
    expected = np.asarray(expected_overlap(size_a, size_b, total), dtype=float)
    return np.divide(overlap, expected, out=np.full_like(expected, np.nan), where=expected > 0)[()]


def expected_intersection(sizes: Iterable[float], total: float) -> float:
    """How many members all of several independent random sets share on average: total * prod(size_i / total)."""
    return total * float(np.prod([size / total for size in sizes]))


def epoch_reaching(epochs: Iterable[float], accuracy: Iterable[float], share: float = 0.9) -> float:
    """The first epoch whose accuracy is at least `share` of the last one's; NaN where the last one is NaN."""
    epochs, accuracy = np.asarray(list(epochs)), np.asarray(list(accuracy), dtype=float)
    reached = accuracy >= share * accuracy[-1]
    return epochs[reached.argmax()].item() if reached.any() else np.nan
