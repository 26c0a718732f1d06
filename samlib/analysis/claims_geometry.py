"""The second document's claims on checkpoints: how many, whether they stay, whether they are flat, what ρ does to them.

A finding is a setting of SAM: its ρ and regime; n counts its runs. "Above 60 %" is of the whole 95 % interval.
"""

from collections.abc import Callable, Iterator

import pandas as pd

from samlib.analysis import geometry
from samlib.analysis.claim import Finding, claim
from samlib.analysis.geometry import ENDS, by_setting
from samlib.analysis.results import NotMeasured, Results, mix_name
from samlib.analysis.stats import correlation_over_seeds, decide
from samlib.probes import BINS

FACTOR = 1.5  # two shares agree within it
RUN = ["setting", "mix", "run"]
LIFT = 1.1  # above chance: by this factor
WITHIN = f"within a factor {FACTOR:g} of the document's"


def of_sam(rows: pd.DataFrame) -> pd.DataFrame:
    if (rows.mix != "sam").all():
        raise NotMeasured("no run of SAM measured it")
    return rows[rows.mix == "sam"]


def each(
    value: str | Callable, what: str = "", unit: str = "%", beside: str | Callable = "", words: str = "by chance",
    **rule: object,
) -> Callable[[pd.DataFrame], Iterator[Finding]]:  # fmt: skip
    """Of SAM's rows a finding a setting: the mean over its runs of a number from each (see by_setting), judged by
    `decide`, in its note the words and another such number."""

    def findings(frame: pd.DataFrame) -> Iterator[Finding]:
        others = by_setting(frame, beside, unit="medians" if callable(beside) else "%") if beside else {}
        signed = unit == "points" or 0 in rule.values()
        for setting, e in by_setting(frame, value, unit=unit, signed=signed).items():
            note = f"{words} {others[setting]}" if beside else ""
            yield Finding(setting, e, decide(e, **rule), note, what)

    return findings


def says(notebook: str, name: str, quote: str, rule: str, rows: Callable, *numbers: Callable, documented: str = ""):
    """The claim of that name: what each of `numbers` (of `each`) finds in SAM's rows, of which a setting needs all."""

    def findings(results: Results) -> Iterator[Finding]:
        frame = of_sam(rows(results))
        for number in numbers:
            yield from number(frame)

    claim("geometry", notebook=notebook, name=name, quote=quote, rule=rule, documented=documented, every=True)(findings)


def end(column: str, k: int) -> Callable[[pd.DataFrame], float]:
    """Of a run: the mean over the first (k = 0) or last (1) tenth of its training."""
    return lambda run: run[column][run.part == ENDS[k]].mean()


def rise(column: str) -> Callable[[pd.DataFrame], float]:
    return lambda run: end(column, 1)(run) - end(column, 0)(run)


def growth(column: str) -> Callable[[pd.DataFrame], float]:
    return lambda run: end(column, 1)(run) / end(column, 0)(run)


def near(share: float) -> dict[str, tuple[float, float]]:
    return {"within": (share / FACTOR, share * FACTOR)}


def from_to(name: str) -> list[Callable]:
    document = zip(ENDS, geometry.DOCUMENT[name], strict=True)
    return [each(end(name, k), words, **near(share)) for k, (words, share) in enumerate(document)]


def shares(results: Results) -> pd.DataFrame:
    frame = geometry.shares(results)
    return frame.assign(both=frame.checkpoint3 + frame.checkpoint4, large=frame[list(BINS[2:])].sum(axis=1))


def at_the_end(results: Results) -> pd.DataFrame:
    """Each reference step's overlap with the last probed step, of other images."""
    frame = geometry.lifts(results).query("batch == 'other'")
    return frame[frame.lag == frame.groupby(["run", "reference_step"]).lag.transform("max")]


def changes(results: Results) -> pd.DataFrame:
    """A row a run: how much the share that moves, less that whose gradient differs from zero, has risen."""
    frame = geometry.resting(results).sort_values("epoch")
    if frame.epoch.nunique() < 2:
        raise NotMeasured("convergence was measured after one epoch alone")
    runs = frame.assign(apart=frame.moving - frame.beyond).groupby(RUN, observed=True).apart
    return (runs.last() - runs.first()).reset_index()


def activations(results: Results) -> pd.DataFrame:
    """A row a run: `gain` with ReLU and with softplus at the radius nearest to its ρ."""
    frame = geometry.nearest(geometry.predictions(results))
    return frame.pivot_table("gain", RUN, "activation", observed=True).reset_index()


def over_rho(x: str, y: str, method: str = "pearson", **rule: float) -> Callable[[Results], Iterator[Finding]]:
    """A finding a regime: SAM's correlation over ρ, mean over seeds."""

    def findings(results: Results) -> Iterator[Finding]:
        for (mix, _, noise), part in of_sam(geometry.sweep(results)).groupby(["mix", *geometry.REGIME], sort=False):
            found = correlation_over_seeds(part, x, y, method=method)
            words = f"{mix_name(mix)}, {part.rho.nunique()} ρ" + (f", {100 * noise:g} % flipped" if noise else "")
            yield Finding(words, found, decide(found, **rule), "n: independent seeds")

    return findings


# fmt: off
HERE = "02_geometry"
says(HERE, "over_60_percent_in_checkpoint1", "during training, over 60 % of parameters belong to checkpoint1",
     "the share that nine tenths of a run's probes exceed, of the active parameters and of all: above 60 %", shares,
     each(lambda run: run.checkpoint1.quantile(0.1), "of the active", above=0.6),
     each(lambda run: run.of_all.quantile(0.1), "of all", above=0.6), documented="over 60 %")
RARE = ("the number of parameters associated with checkpoint3 and checkpoint4 is initially very low, at around 3%, but "
        "increases to 10 % and 6 % respectively in the later stages")
for _name, _quote, _numbers in (
    ("checkpoint2", "checkpoint2 starts at around 40 % in the early stage and decreases to 20 % in the later stage",
     "40 → 20 %"),
    ("checkpoint3", RARE, "checkpoint 3: 3 → 10 %"), ("checkpoint4", RARE, "checkpoint 4: 3 → 6 %"),
):
    says(HERE, f"share_of_{_name}", _quote, f"first and last tenth of training, of the active: {WITHIN}", shares,
         *from_to(_name), documented=_numbers)
says(HERE, "checkpoint1_predominates", "The geometry is predominantly characterized by checkpoint1",
     "its share of the active parameters, mean over training: above 50 %", shares, each("checkpoint1", above=0.5))
says(HERE, "checkpoints_3_and_4_increase",
     "multiple minima regions, indicated by an increase in checkpoint3 and checkpoint4",
     "share of 3 and 4, last tenth of training minus first: above zero", shares,
     each(rise("both"), unit="points", above=0))
says(HERE, "checkpoint1_does_not_decrease", "Surprisingly, the number of checkpoint1 parameters does not decrease",
     "share, last tenth of training minus first: above −2 points, the margin of “not”", shares,
     each(rise("checkpoint1"), unit="points", above=-0.02))
says(HERE, "small_ratios_are_the_most_at_first", "At first, the parameters belong to checkpoint1.1 which have the "
     "ratio < 1.2 are highest, but then decrease fast",
     f"of seven bins, its lead over the next in the first tenth: above 0; last over first: below 1 / {FACTOR:g}",
     shares, each(lambda run: end("bin1", 0)(run) - max(end(name, 0)(run) for name in BINS[1:]), "lead at first",
                  "points", above=0),
     each(growth("bin1"), "last over first", "", below=1 / FACTOR))
says(HERE, "ratios_increase",
     "In the later stage, almost the parameters belong to checkpoint1.1 has the ratio increase fast",
     f"share of ratios from 1.5 on in checkpoint 1, last tenth of training over first: above {FACTOR:g}", shares,
     each(growth("large"), unit="", above=FACTOR))
says(HERE, "two_thirds_are_there_at_the_end", "an overlap of about 4 × 10^6 parameters with later steps, maintaining "
     "around 4 × 10^6 (or 40%) even at the final step",
     f"share of a step's set that is in the last probe's: {WITHIN}", at_the_end, each("share", **near(4 / 6)),
     documented="4 of 6 million")
says(HERE, "overlap_is_more_than_chance",
     "This indicates that 40% of parameters require a higher learning rate than the initial one",
     f"it may if that overlap is more than chance within layers: lift above {LIFT:g}", at_the_end,
     each("lift", unit="", above=LIFT), documented="4 of 11 million")
says(HERE, "few_stay_for_five_steps", "Are the same 4 × 10^6 parameters consistent over many steps? … No. After just 5 "
     "steps, the overlap reduced to 10^5",
     "share of a step's set that is in each of the next five steps': below 10 %",
     lambda results: geometry.running(results).query("later == 5 and batch == 'other'"),
     each("share", beside="by_chance", below=0.1), documented="0.1 of 6 million")
says(HERE, "parameters_do_not_converge", "60% of parameters do not converge even after 200 epochs",
     "active parameters whose mean gradient over the training set differs from zero, beyond chance; and that would "
     "move by 1 % in an epoch: both above 60 %, at the end", lambda results: geometry.last(geometry.resting(results)),
     each("beyond", "gradient differs", beside=lambda run: (run.detectable / run.gradient).iloc[0],
          words="none is seen below", above=0.6),
     each("moving", "moves", above=0.6), documented="60 %")
says(HERE, "decay_stops_what_has_not_converged", "potentially due to learning rate decay",
     "from the first measured epoch to the last, the share that moves, less that whose gradient differs from zero, "
     "falls: below zero", changes, each("apart", unit="points", below=0))

HERE = "03_flatness_thresholds"
says(HERE, "checkpoints_are_curvature", "the effectiveness of this metric in depicting the local convex minima",
     "of the codes that calling all by the commonest misses, the second-order expansion gets right at the run's ρ: "
     "above 75 %", activations, each("relu", beside="softplus", words="with softplus in place of ReLU", above=0.75))
says(HERE, "over_60_percent_exceed_the_threshold",
     "over 60% of parameters have a gradient magnitude exceeding the threshold",
     "share of checkpoint 1 that nine tenths of a run's measurements exceed: above 60 %",
     lambda results: geometry.thresholds(results).groupby(RUN, observed=True)[["share", "by_chance"]].quantile(0.1)
     .reset_index(), each("share", beside="by_chance", above=0.6), documented="59 to 80 %")
says(HERE, "checkpoint1_has_large_gradients",
     "This percentage represents the proportion of parameters in checkpoint1 that are in flat minima",
     f"it may if it is more than chance within layers: lift, mean over training, above {LIFT:g}", geometry.thresholds,
     each("lift", unit="", above=LIFT))
says(HERE, "gradients_grow", "There is an observable trend of increasing gradient magnitude in the later stages",
     "Spearman's correlation of threshold and epoch in each run: above zero", geometry.thresholds,
     each(lambda run: run.epoch.corr(run.threshold, "spearman"), unit="", above=0))
says(HERE, "large_gradients_are_flat",
     "Our hypothesis is that a higher gradient magnitude corresponds to higher flatness",
     "Spearman's correlation of |g| and the Hessian's exact diagonal, active parameters, at the end: below zero",
     geometry.diagonals, each("spearman", unit="", below=0))
says(HERE, "checkpoint1_is_sharp", "most parameters in checkpoint1 reside in a sharp region",
     "its mean entry of the exact diagonal over that of the other active parameters, at the end: above 1",
     geometry.diagonals, each("sharper", unit="", above=1))

HERE = "04_rho_vs_checkpoint1"
says(HERE, "parameters_have_thresholds",
     "because each parameter have their own threshold of not escaping attractor",
     "on fixed weights, of checkpoint 1 at the run's ρ the share that was outside it at a smaller one: below 10 %",
     lambda results: geometry.nearest(geometry.leaving(results)), each("newcomers", below=0.1))
claim("geometry", notebook=HERE, name="checkpoint1_falls_with_rho",
      quote="the high increasing perturbation radius ρ means the decreasing of checkpoint1",
      rule="Spearman's correlation of ρ and the share at it, last quarter: below zero, and with any one ρ left out",
      )(over_rho("rho", "own", "spearman", below=0))
claim("geometry", notebook=HERE, name="checkpoint1_goes_with_accuracy",
      quote="The number of ratio > 1, which is checkpoint1 are higher, the generalization of SAM is higher?",
      rule="Pearson's correlation of the share at a run's own ρ and test accuracy: above zero, and with any ρ left out",
      )(over_rho("own", "test_accuracy", above=0))
claim("geometry", notebook=HERE, name="checkpoint1_at_one_radius_goes_with_accuracy",
      quote="The best case: The number of checkpoint1 have a correlation with generalization",
      rule="the same at one common radius, so that the share tells the weights apart and not ρ itself",
      )(over_rho("common", "test_accuracy", above=0))

for _name, _quote, _reason in (
    ("ridge", "a significant number of parameters remain on the ridge of the landscape",
     "a reading of checkpoint 1's share; where checkpoint 1 lies on a loss of one weight is drawn in 02"),
    ("diagonal_shape", "the shape of this approximation differed from the gradient",
     "a difficulty of one implementation; here the exact diagonal, of the gradient's shape, is measured in 03"),
    ("preconditioning", "Why preconditioning H(w) is not … for deep learning especially over-parameterized setting?",
     "a question without a number"),
    ("ire", "Results of this project give intuition for IRE", "an intuition for another method, not built here"),
):
    claim("geometry", name=_name, quote=_quote, not_measured=_reason)
