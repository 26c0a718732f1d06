"""The second document's claims on checkpoints: how many, whether they stay, whether they are flat, what ρ does to them.

A finding is a setting of SAM: its ρ and regime; n counts its runs. "Above 60 %" is of the whole 95 % interval.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from samlib.analysis import geometry
from samlib.analysis.claim import Finding, claim
from samlib.analysis.geometry import by_setting, ends
from samlib.analysis.results import NotMeasured, Results, mix_name
from samlib.analysis.stats import UNDECIDED, correlation, correlation_over_seeds, decide
from samlib.probes import BINS

SHARES = {"subject": "geometry", "notebook": "02_geometry"}
FLATNESS = {"subject": "geometry", "notebook": "03_flatness_thresholds"}
RADII = {"subject": "geometry", "notebook": "04_rho_vs_checkpoint1"}
FACTOR = 1.5  # two shares agree within it
LIFT = 1.1  # above chance: by this factor
WITHIN = f"within a factor {FACTOR:g} of the document's"


def of_sam(rows: pd.DataFrame, **columns: Callable | pd.Series) -> pd.DataFrame:
    rows = rows[rows.mix == "sam"]
    if rows.empty:
        raise NotMeasured("no run of SAM measured it")
    return rows.assign(**columns)


def each(
    frame: pd.DataFrame, value: str | Callable, what: str = "", unit: str = "%", signed: bool = False,
    beside: pd.Series | None = None, words: str = "by chance", **rule: object,
) -> Iterator[Finding]:  # fmt: skip
    """A finding a setting: the mean over its runs of a number from each (see by_setting), judged by `decide`; in its
    note the words, and an Estimate from `beside`."""
    for setting, e in by_setting(frame, value, unit=unit, signed=signed).items():
        note = "" if beside is None else f"{words} {beside[setting]}"
        yield Finding(f"{setting}: {what}" if what else setting, e, decide(e, **rule), note)


def near(share: float) -> dict[str, tuple[float, float]]:
    return {"within": (share / FACTOR, share * FACTOR)}


def rise(column: str) -> Callable[[pd.DataFrame], float]:
    """Of a run: the last tenth of its training minus the first."""
    return lambda run: ends(run, column)[1] - ends(run, column)[0]


def growth(column: str) -> Callable[[pd.DataFrame], float]:
    """Of a run: the last tenth of its training over the first."""
    return lambda run: ends(run, column)[1] / ends(run, column)[0]


@claim(
    **SHARES, quote="during training, over 60 % of parameters belong to checkpoint1", documented="over 60 %",
    rule="the share that nine tenths of a run's probes exceed, of the active parameters and of all: above 60 %",
)  # fmt: skip
def over_60_percent_in_checkpoint1(results: Results) -> Iterator[Finding]:
    frame = of_sam(geometry.shares(results))
    yield from each(frame, lambda run: run.checkpoint1.quantile(0.1), "of the active", above=0.6)
    yield from each(frame, lambda run: run.of_all.quantile(0.1), "of all", above=0.6)


def from_to(results: Results, name: str) -> Iterator[Finding]:
    frame = of_sam(geometry.shares(results))
    for k, words in enumerate(("first tenth of training", "last tenth")):
        yield from each(frame, lambda run, k=k: ends(run, name)[k], words, **near(geometry.DOCUMENT[name][k]))


for _name, _quote, _numbers in (
    ("checkpoint2", "starts at around 40 % in the early stage and decreases to 20 % in the later stage", "40 → 20 %"),
    ("checkpoint3", "initially very low, at around 3 %, but increases to 10 % … in the later stages", "3 → 10 %"),
    ("checkpoint4", "initially very low, at around 3 %, but increases to … 6 % … in the later stages", "3 → 6 %"),
):
    claim(
        **SHARES, name=f"share_of_{_name}", quote=f"{_name} … {_quote}", documented=_numbers,
        rule=f"first and last tenth of training, of the active: {WITHIN}",
    )(lambda results, name=_name: from_to(results, name))  # fmt: skip


@claim(
    **SHARES, quote="The geometry is predominantly characterized by checkpoint1",
    rule="its share of the active parameters, mean over training: above 50 %",
)  # fmt: skip
def checkpoint1_predominates(results: Results) -> Iterator[Finding]:
    return each(of_sam(geometry.shares(results)), "checkpoint1", above=0.5)


@claim(
    **SHARES, rule="share of 3 and 4, last tenth of training minus first: above zero",
    quote="multiple minima regions, indicated by an increase in checkpoint3 and checkpoint4",
)  # fmt: skip
def checkpoints_3_and_4_increase(results: Results) -> Iterator[Finding]:
    frame = of_sam(geometry.shares(results), both=lambda rows: rows.checkpoint3 + rows.checkpoint4)
    return each(frame, rise("both"), unit="points", signed=True, above=0)


@claim(
    **SHARES, quote="Surprisingly, the number of checkpoint1 parameters does not decrease",
    rule="share, last tenth of training minus first: above −2 points, the margin of “not”",
)  # fmt: skip
def checkpoint1_does_not_decrease(results: Results) -> Iterator[Finding]:
    return each(of_sam(geometry.shares(results)), rise("checkpoint1"), unit="points", signed=True, above=-0.02)


@claim(
    **SHARES, quote="At first, the parameters … which have the ratio < 1.2 are highest, but then decrease fast",
    rule=f"of seven bins, its lead over the next in the first tenth: above 0; last over first: below 1 / {FACTOR:g}",
)  # fmt: skip
def small_ratios_are_the_most_at_first(results: Results) -> Iterator[Finding]:
    frame = of_sam(geometry.shares(results))
    lead = lambda run: ends(run, "bin1")[0] - max(ends(run, name)[0] for name in BINS[1:])  # noqa: E731
    yield from each(frame, lead, "lead at first", "points", True, above=0)
    yield from each(frame, growth("bin1"), "last over first", "", below=1 / FACTOR)


@claim(
    **SHARES, quote="In the later stage, almost the parameters belong to checkpoint1.1 has the ratio increase fast",
    rule=f"share of ratios from 1.5 on in checkpoint 1, last tenth of training over first: above {FACTOR:g}",
)  # fmt: skip
def ratios_increase(results: Results) -> Iterator[Finding]:
    frame = of_sam(geometry.shares(results), large=lambda rows: rows[list(BINS[2:])].sum(axis=1))
    return each(frame, growth("large"), unit="", above=FACTOR)


def at_the_end(results: Results) -> pd.DataFrame:
    """Each reference step's overlap with the last probed step, of other images."""
    frame = of_sam(geometry.lifts(results)).query("batch == 'other'")
    return frame[frame.lag == frame.groupby(["run", "reference_step"]).lag.transform("max")]


@claim(
    **SHARES, documented="4 of 6 million", rule=f"share of a step's set that is in the last probe's: {WITHIN}",
    quote="an overlap of about 4 × 10^6 parameters with later steps … even at the final step",
)  # fmt: skip
def two_thirds_are_there_at_the_end(results: Results) -> Iterator[Finding]:
    return each(at_the_end(results), "share", **near(4 / 6))


@claim(
    **SHARES, quote="This indicates that 40 % of parameters require a higher learning rate than the initial one",
    documented="4 of 11 million", rule=f"it may if that overlap is more than chance within layers: lift above {LIFT:g}",
)  # fmt: skip
def overlap_is_more_than_chance(results: Results) -> Iterator[Finding]:
    return each(at_the_end(results), "lift", unit="", above=LIFT)


@claim(
    **SHARES, quote="Are the same … parameters consistent over many steps? No. After just 5 steps, … 10^5",
    documented="0.1 of 6 million", rule="share of a step's set that is in each of the next five steps': below 10 %",
)  # fmt: skip
def few_stay_for_five_steps(results: Results) -> Iterator[Finding]:
    frame = of_sam(geometry.running(results)).query("later == 5 and batch == 'other'")
    return each(frame, "share", beside=by_setting(frame, "by_chance"), below=0.1)


@claim(
    **SHARES, quote="60 % of parameters do not converge even after 200 epochs", documented="60 %",
    rule="active parameters whose mean gradient over the training set differs from zero, beyond chance; and that would "
    "move by 1 % in an epoch: both above 60 %, at the end",
)  # fmt: skip
def parameters_do_not_converge(results: Results) -> Iterator[Finding]:
    frame = geometry.last(of_sam(geometry.resting(results)))
    blind = by_setting(frame, lambda run: (run.detectable / run.gradient).iloc[0], unit="medians")
    yield from each(frame, "beyond", "gradient differs", beside=blind, words="none is seen below", above=0.6)
    yield from each(frame, "moving", "moves", above=0.6)


@claim(
    **SHARES, quote="potentially due to learning rate decay",
    rule="from the first measured epoch to the last, the share that moves, less that whose gradient differs from zero, "
    "falls: below zero",
)  # fmt: skip
def decay_stops_what_has_not_converged(results: Results) -> Iterator[Finding]:
    frame = of_sam(geometry.resting(results), apart=lambda rows: rows.moving - rows.beyond).sort_values("epoch")
    if frame.epoch.nunique() < 2:
        raise NotMeasured("convergence was measured after one epoch alone")
    return each(frame, lambda run: run.apart.iloc[-1] - run.apart.iloc[0], unit="points", signed=True, below=0)


@claim(
    **FLATNESS, quote="the effectiveness of this metric in depicting the local convex minima",
    rule="of the codes that calling all by the commonest misses, the second-order expansion gets right at the run's ρ: "
    "above 75 %",
)  # fmt: skip
def checkpoints_are_curvature(results: Results) -> Iterator[Finding]:
    frame = of_sam(geometry.predictions(results)).query("own")
    kinked, smooth = (frame[frame.activation == name] for name in ("relu", "softplus"))
    return each(kinked, "gain", beside=by_setting(smooth, "gain"), words="with softplus in place of ReLU", above=0.75)


@claim(
    **FLATNESS, quote="over 60 % of parameters have a gradient magnitude exceeding the threshold",
    documented="59 to 80 %", rule="share of checkpoint 1 that nine tenths of a run's measurements exceed: above 60 %",
)  # fmt: skip
def over_60_percent_exceed_the_threshold(results: Results) -> Iterator[Finding]:
    frame = of_sam(geometry.thresholds(results))
    chance = by_setting(frame, lambda run: run.by_chance.quantile(0.1))
    return each(frame, lambda run: run.share.quantile(0.1), beside=chance, above=0.6)


@claim(
    **FLATNESS, quote="This percentage represents the proportion of parameters in checkpoint1 that are in flat minima",
    rule=f"it may if it is more than chance within layers: lift, mean over training, above {LIFT:g}",
)  # fmt: skip
def checkpoint1_has_large_gradients(results: Results) -> Iterator[Finding]:
    return each(of_sam(geometry.thresholds(results)), "lift", unit="", above=LIFT)


@claim(
    **FLATNESS, quote="There is an observable trend of increasing gradient magnitude in the later stages",
    rule="Spearman's correlation of threshold and epoch in each run: above zero",
)  # fmt: skip
def gradients_grow(results: Results) -> Iterator[Finding]:
    frame = of_sam(geometry.thresholds(results))
    return each(frame, lambda run: correlation(run.epoch, run.threshold, "spearman").value, "", "", True, above=0)


@claim(
    **FLATNESS, quote="Our hypothesis is that a higher gradient magnitude corresponds to higher flatness",
    rule="Spearman's correlation of |g| and the Hessian's exact diagonal, active parameters, at the end: below zero",
)  # fmt: skip
def large_gradients_are_flat(results: Results) -> Iterator[Finding]:
    return each(of_sam(geometry.diagonals(results)), "spearman", unit="", signed=True, below=0)


@claim(
    **FLATNESS, quote="most parameters in checkpoint1 reside in a sharp region",
    rule="its mean entry of the exact diagonal over that of the other active parameters, at the end: above 1",
)  # fmt: skip
def checkpoint1_is_sharp(results: Results) -> Iterator[Finding]:
    return each(of_sam(geometry.diagonals(results)), "sharper", unit="", above=1)


def over_rho(results: Results, x: str, y: str, method: str = "pearson", **rule: float) -> Iterator[Finding]:
    """A finding a regime: SAM's correlation over ρ, mean over seeds."""
    for (mix, *regime), part in of_sam(geometry.sweep(results)).groupby(["mix", *geometry.REGIME], sort=False):
        found = correlation_over_seeds(part, x, y, method=method)
        words, few = f"{mix_name(mix)}, {part.rho.nunique()} ρ", part.rho.nunique() < 4
        words += f", {100 * regime[1]:g} % flipped" if regime[1] else ""
        note = "too few ρ to leave one out" if few else "n: independent seeds"
        yield Finding(words, found, UNDECIDED if few else decide(found, **rule), note)


@claim(
    **RADII, quote="the high increasing perturbation radius ρ means the decreasing of checkpoint1",
    rule="Spearman's correlation of ρ and the share at it, last quarter: below zero, and with any one ρ left out",
)  # fmt: skip
def checkpoint1_falls_with_rho(results: Results) -> Iterator[Finding]:
    return over_rho(results, "rho", "own", "spearman", below=0)


@claim(
    **RADII, quote="because each parameter have their own threshold of not escaping attractor",
    rule="on fixed weights, of checkpoint 1 at the run's ρ the share that was outside it at a smaller one: below 10 %",
)  # fmt: skip
def parameters_have_thresholds(results: Results) -> Iterator[Finding]:
    frame = of_sam(geometry.leaving(results))
    away = np.log(frame.radius / frame.rho).abs()
    return each(frame[away == away.groupby(frame.run).transform("min")], "newcomers", below=0.1)


@claim(
    **RADII, quote="The number of … checkpoint1 are higher, the generalization of SAM is higher?",
    rule="Pearson's correlation of the share at a run's own ρ and test accuracy: above zero, and with any ρ left out",
)  # fmt: skip
def checkpoint1_goes_with_accuracy(results: Results) -> Iterator[Finding]:
    return over_rho(results, "own", "test_accuracy", above=0)


@claim(
    **RADII, quote="The best case: The number of checkpoint1 have a correlation with generalization",
    rule="the same at one common radius, so that the share tells the weights apart and not ρ itself",
)  # fmt: skip
def checkpoint1_at_one_radius_goes_with_accuracy(results: Results) -> Iterator[Finding]:
    return over_rho(results, "common", "test_accuracy", above=0)


for _name, _quote, _reason in (
    ("ridge", "a significant number of parameters remain on the ridge of the landscape",
     "a reading of checkpoint 1's share; where checkpoint 1 lies on a loss of one weight is drawn in 02"),
    ("diagonal_shape", "the shape of this approximation differed from the gradient",
     "a difficulty of one implementation; here the exact diagonal, of the gradient's shape, is measured in 03"),
    ("preconditioning", "Why preconditioning H(w) is not effective for deep learning", "a question without a number"),
    ("ire", "Results of this project give intuition for IRE", "an intuition for another method, not built here"),
):  # fmt: skip
    claim("geometry", name=_name, quote=_quote, not_measured=_reason)
