"""Estimates with intervals, the rule that turns one into a verdict, and chance levels.

Student's t throughout: a bootstrap misleads at n = 3. n counts what is independent, runs of different seeds or pairs of
them, never probes, epochs or layers of one run.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

VERDICTS = HOLDS, CONTRADICTED, UNDECIDED, NOT_MEASURED = "holds", "contradicted", "undecided", "not measured"
LEVEL = 0.95
UPPER = (1 + LEVEL) / 2  # the quantile of a two-sided interval's upper end
LEAST = 3  # runs or pairs that a verdict needs
MARGIN = 0.01  # "no worse than", "about equal" of accuracies: one point, where a claim's rule names no other


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval: NaN bounds where n is too small to have one, a NaN value where n is 0.

    unit: "%" (a fraction, shown in percent), "points" (a difference of fractions), "of" (a share of n things counted),
    or what stands after the number as it is ("nats", "").
    """

    value: float = np.nan
    low: float = np.nan
    high: float = np.nan
    n: int = 0
    unit: str = ""
    signed: bool = False  # shown with its sign: differences and correlations
    left_out: int = 0  # runs or pairs without a value: they diverged, or are not finished, or tie
    missing: int = 0  # those of them that are not finished
    note: str = ""  # why there is no interval, where it is not n

    @property
    def half(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2

    def excludes(self, value: float = 0.0) -> bool:
        """Whether the interval excludes a value; never where there is no interval."""
        return bool(self.low > value or self.high < value)

    def __str__(self) -> str:
        """The one way in which an estimate is shown.

        >>> print(Estimate(0.012, 0.004, 0.020, 3, "points", signed=True))
        +1.2 ± 0.8 points (n=3)
        >>> print(Estimate(0.95, n=1, unit="%"), "|", Estimate(0.6, 0.2, 0.8, 4, signed=True), "|", Estimate())
        95.0 % (n=1) | +0.600 (+0.200 to +0.800, n=4) | –
        """
        return self.format()

    def format(self, n: bool = True) -> str:
        """One digit after the point for percent and points, two where the interval is narrower than that, and three
        significant ones otherwise. n: whether it is shown."""
        if np.isnan(self.value):
            return "–" if not self.left_out else f"– ({', '.join(self._absent)})"
        scale = 100 if self.unit in ("%", "points", "of") else 1
        digits = 2 if 0 < scale * self.half < 0.05 else 1
        if scale == 1:
            size = max((abs(x) for x in (self.value, self.half) if x and np.isfinite(x)), default=1)
            digits = int(np.clip(2 - np.floor(np.log10(size)), 0, 6))

        def shown(x: float, sign: str = "+" if self.signed else "") -> str:
            return f"{scale * x:{sign}.{digits}f}".replace("-", "−")

        even = self.unit != "of" and abs(self.high + self.low - 2 * self.value) < 1e-9
        unit = {"": "", "of": " %"}.get(self.unit, f" {self.unit}")
        notes = [f"{shown(self.low)} to {shown(self.high)}{unit}"] * (not even and not np.isnan(self.half))
        notes += [f"n={self.n}"] * (n and self.unit != "of") + self._absent * n
        notes += [self.note] * bool(n and self.note)
        text = shown(self.value) + f" ± {shown(self.half, '')}" * even + unit
        if self.unit == "of":
            text = f"{self.value * self.n:.0f} of {self.n}"
        return f"{text} ({', '.join(notes)})" if notes else text

    @property
    def _absent(self) -> list[str]:
        left_out = self.left_out - self.missing
        return [f"{self.missing} missing"] * (self.missing > 0) + [f"{left_out} left out"] * (left_out > 0)


def mean_interval(values: Iterable[float], resolution: float = 0.0, unit: str = "", signed: bool = False) -> Estimate:
    """The mean of the values, NaN ones apart, which count as `left_out`; t interval, mean ± t_{n-1} s / sqrt(n).

    resolution: of one value, 1 / test images for an accuracy; the half-width is never below it, since runs that agree
    to the last image say nothing finer than an image. No interval for n = 1, no value for n = 0.
    """
    x = np.asarray(list(values), dtype=float)
    left_out, x = int(np.isnan(x).sum()), x[~np.isnan(x)]
    if not len(x):
        return Estimate(unit=unit, signed=signed, left_out=left_out)
    mean, half = float(x.mean()), np.nan
    if len(x) > 1:
        half = max(float(stats.t.ppf(UPPER, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5), resolution)
    return Estimate(mean, mean - half, mean + half, len(x), unit, signed, left_out)


def sign_count(differences: Iterable[Estimate]) -> Estimate:
    """In how many regimes a difference is above zero, with the exact binomial interval (Clopper and Pearson, 1934);
    exact zeros and what is not measured are left out.

    Its interval excludes a half exactly where the two-sided sign test at 5 % rejects: from six of six on.
    """
    values = np.array([e.value for e in differences])
    above, below = int((values > 0).sum()), int((values < 0).sum())
    n, left_out = above + below, len(values) - above - below
    if not n:
        return Estimate(unit="of", left_out=left_out)
    low, high = stats.binomtest(above, n).proportion_ci(LEVEL, "exact")
    return Estimate(above / n, float(low), float(high), n, "of", left_out=left_out)


def decide(
    estimate: Estimate,
    *,
    above: float | None = None,
    below: float | None = None,
    within: float | tuple[float, float] | None = None,
) -> str:
    """The verdict on "it is above (below) this", or "within ± this", or "between these two", from the interval alone.

    It holds where the whole interval lies there, is contradicted where none of it does, and is undecided where the
    interval holds both, or n is below LEAST. "No worse than" is `above=-margin`. Give exactly one of the three.
    """
    if sum(x is not None for x in (above, below, within)) != 1:
        raise ValueError("decide needs exactly one of above, below and within")
    if np.isnan(estimate.value):
        return NOT_MEASURED
    low, high = (-np.inf if above is None else above), (np.inf if below is None else below)
    if within is not None:
        low, high = within if isinstance(within, tuple) else (-within, within)
    if estimate.n < LEAST or np.isnan(estimate.half):
        return UNDECIDED
    if low < estimate.low and estimate.high < high:
        return HOLDS
    return CONTRADICTED if estimate.high < low or estimate.low > high else UNDECIDED


def expected_by_chance(intervals: int) -> float:
    """How many of so many 95 % intervals exclude the truth on average: what to print beside many of them."""
    return (1 - LEVEL) * intervals


def correlation_over_seeds(
    frame: pd.DataFrame, x: str, y: str, over: str | None = "rho", method: str = "pearson"
) -> Estimate:
    """Each `seed`'s correlation of x and y over its runs, and their mean with a t interval: n is the number of seeds.

    over: the field that the runs of a seed differ in; the interval is widened until it holds those with any one of its
    values left out, so that what one ρ carries is not shown. Where that leaves fewer than three runs a seed, as below
    four ρ, there is no interval, and the note says "too few ρ". None: nothing is left out. Seeds where x or y is
    constant, or that have fewer than three runs, are left out.
    """

    def by_seed(rows: pd.DataFrame) -> Estimate:
        groups = [part for _, part in rows.dropna(subset=[x, y]).groupby("seed")]
        values = [g[x].corr(g[y], method) if len(g) > 2 else np.nan for g in groups]
        found = mean_interval(values, signed=True)
        return replace(found, low=max(found.low, -1.0), high=min(found.high, 1.0)) if found.n > 1 else found

    whole = by_seed(frame)
    if over is None or np.isnan(whole.value):
        return whole
    parts = [by_seed(frame[frame[over] != value]) for value in frame[over].unique()]
    if any(np.isnan(e.value) for e in parts):
        return replace(whole, low=np.nan, high=np.nan, note=f"too few {'ρ' if over == 'rho' else over + 's'}")
    bounds = [e for e in (whole, *parts) if e.n > 1] or [whole]
    return replace(whole, low=min(e.low for e in bounds), high=max(e.high for e in bounds))
