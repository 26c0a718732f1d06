"""Claims of the first document, when SAM beats SGD by data size and label noise, and of the second's Experiment 4."""

from collections.abc import Iterable, Iterator

import pandas as pd

from samlib.analysis import regimes
from samlib.analysis.claim import Finding, claim
from samlib.analysis.results import Results
from samlib.analysis.stats import CONTRADICTED, HOLDS, NOT_MEASURED, UNDECIDED, Estimate, decide, sign_count

DATA = {"subject": "regimes", "notebook": "05_data_regimes"}
BATCH = {"subject": "geometry", "notebook": "07_large_batch"}
FORET = DATA | {"document": "Foret et al. 2021"}
OURS = DATA | {"document": "asked here"}
GAIN = "test accuracy, SAM minus SGD, paired by seed"
ABOVE = "the 95 % interval lies above zero"


def named(regime: tuple) -> str:
    return f"{100 * regime[0]:g} % of the data, {100 * regime[1]:g} % flipped"


def each(column: pd.Series, **rule: float) -> Iterator[Finding]:
    """A finding a regime that has a pair of runs."""
    for regime, estimate in column.items():
        if estimate.n:
            yield Finding(named(regime[-2:]), estimate, decide(estimate, **rule))


def of_sam(table: pd.DataFrame) -> pd.Series:
    return table["SAM − SGD"].dropna() if "SAM − SGD" in table else pd.Series(dtype=object)


def clean(results: Results, size: float) -> pd.Series:
    gain = of_sam(regimes.gains(regimes.chosen(results)))
    return gain[[key == (size, 0) for key in gain.index]]


@claim(
    **DATA, quote="when Sharpness-Aware Minimization (SAM) provides a generalization benefit over SGD",
    rule=f"{GAIN}, each regime: {ABOVE}",
)  # fmt: skip
def sam_beats_sgd(results: Results) -> Iterator[Finding]:
    yield from each(of_sam(regimes.gains(regimes.chosen(results))), above=0)


@claim(
    **DATA, quote="(In our words) In most regimes SAM is ahead of SGD",
    rule="how many regimes have SAM above SGD: the sign test at 5 % rejects a half, which takes six of six",
)  # fmt: skip
def sam_beats_sgd_in_most_regimes(results: Results) -> Iterator[Finding]:
    signs = sign_count(of_sam(regimes.gains(regimes.chosen(results))))
    yield Finding("regimes with SAM above SGD", signs, decide(signs, above=0.5))


@claim(
    **DATA, quote="(In our words) All data, clean labels: SAM is ahead of SGD",
    rule=f"{GAIN}, all data, no flips: {ABOVE}",
)  # fmt: skip
def sam_beats_sgd_on_all_clean_data(results: Results) -> Iterator[Finding]:
    yield from each(clean(results, 1.0), above=0)


@claim(
    **DATA, quote="(In our words) 10 % of the data, clean labels: SAM loses to SGD",
    documented="−6.5 points, one run",
    rule=f"{GAIN}, 10 % of the data, no flips: the 95 % interval lies below zero",
)  # fmt: skip
def sam_loses_at_ten_percent_clean(results: Results) -> Iterator[Finding]:
    yield from each(clean(results, 0.1), below=0)


@claim(
    **DATA, quote="the interaction between dataset size and label noise (read as: noisy labels make SAM's gain larger)",
    rule=f"SAM's gain in {GAIN.split(',')[0]}, with flipped labels minus with none, same data, paired by seed: {ABOVE}",
)  # fmt: skip
def gain_grows_with_noise(results: Results) -> Iterator[Finding]:
    yield from each(regimes.interaction(results, "noise_fraction"), above=0)


@claim(
    **DATA, quote="the interaction between dataset size and label noise (read as: scarce data makes SAM's gain larger)",
    rule=f"SAM's gain in test accuracy, with a part of the data minus with all, same noise, paired by seed: {ABOVE}",
)  # fmt: skip
def gain_grows_as_data_shrinks(results: Results) -> Iterator[Finding]:
    yield from each(regimes.interaction(results, "data_fraction"), above=0)


@claim(
    **DATA, quote="When Do Flat Minima Help?",
    rule="a regime in which SAM ends both flatter (random directions, normalized logits) and better: both 95 % "
    "intervals exclude zero; contradicted where one lies on the other side",
)  # fmt: skip
def flatter_and_better(results: Results) -> Iterator[Finding]:
    flat = of_sam(regimes.sharpness_differences(results))
    for regime, gain in of_sam(regimes.gains(regimes.chosen(results))).items():
        change = flat.get(("random, normalized logits", *regime), Estimate())
        verdicts = [decide(change, below=0), decide(gain, above=0)]
        worst = (NOT_MEASURED, CONTRADICTED, UNDECIDED, HOLDS)
        verdict = next(word for word in worst if word in verdicts)
        yield Finding(named(regime), f"sharpness {change.format(n=False)} nats, accuracy {gain}", verdict)


@claim(
    **FORET, quote="seeks parameters that lie in neighborhoods having uniformly low loss",
    rule="sharpness at the end on the labels trained on, normalized logits, SAM minus SGD, paired by seed, by random "
    "directions and by ascent: the 95 % interval lies below zero",
)  # fmt: skip
def sam_ends_flatter(results: Results) -> Iterator[Finding]:
    for (kind, *regime), estimate in of_sam(regimes.sharpness_differences(results)).items():
        if "normalized" in kind:
            yield Finding(f"{kind.split(',')[0]}, {named(regime)}", estimate, decide(estimate, below=0))


def correlations(results: Results) -> Iterable[tuple[str, Estimate]]:
    for kind, row in regimes.gap_correlations(results).iterrows():
        yield f"{kind}, within regimes", row["within regimes"]


@claim(
    **DATA, quote="(In our words) The flatter of two networks has the smaller generalization gap",
    rule="correlation within regimes of sharpness and gap, each seed's own, and with any one regime left out: the 95 % "
    "interval over seeds lies above zero",
)  # fmt: skip
def sharper_has_the_larger_gap(results: Results) -> Iterator[Finding]:
    for name, estimate in correlations(results):
        yield Finding(name, estimate, decide(estimate, above=0))


@claim(
    **DATA, document="Andriushchenko et al. 2023", quote="sharpness does not correlate well with generalization",
    rule="the same correlation: its interval lies within ± 0.3",
)  # fmt: skip
def sharpness_and_gap_do_not_correlate(results: Results) -> Iterator[Finding]:
    for name, estimate in correlations(results):
        yield Finding(name, estimate, decide(estimate, within=0.3))


@claim(
    **FORET, quote="SAM natively provides robustness to label noise",
    rule="flipped labels memorized, SAM minus SGD, paired by seed, noisy regimes: the 95 % interval below zero",
)  # fmt: skip
def sam_memorizes_fewer_flips(results: Results) -> Iterator[Finding]:
    runs = regimes.chosen(results)
    yield from each(of_sam(regimes.gains(runs[runs.noise_fraction > 0], "memorized")), below=0)


def against(results: Results, rival: str) -> Iterator[Finding]:
    table = regimes.rivals(results)
    if rival in table and "SAM − SGD" in table.index.get_level_values("difference"):
        yield from each(
            table[rival].xs("SAM − SGD", level="difference").loc[lambda x: x.map(lambda e: e.n > 0)], above=0
        )


@claim(
    **FORET, quote="Efficiently Improving Generalization",
    rule=f"test accuracy, SAM minus SGD of twice the epochs, as many gradient evaluations, paired by seed: {ABOVE}",
)  # fmt: skip
def sam_beats_sgd_at_equal_cost(results: Results) -> Iterator[Finding]:
    yield from against(results, "SGD of twice the epochs")


@claim(
    **OURS, quote="SAM's gain is more than early stopping gives SGD",
    rule="test accuracy, SAM's last epoch minus SGD's epoch that is best on held-out training images, paired by seed: "
    + ABOVE,
)  # fmt: skip
def sam_beats_sgd_stopped_early(results: Results) -> Iterator[Finding]:
    yield from against(results, "SGD stopped early")


@claim(
    **OURS, quote="SAM beats SGD with the document's augmentation as well",
    rule=f"{GAIN}, crops and flips as in the document, each regime: {ABOVE}",
)  # fmt: skip
def sam_beats_sgd_with_augmentation(results: Results) -> Iterator[Finding]:
    name = regimes.grid(results, "augmented", "regimes")
    runs = regimes.chosen(results, name)
    yield from each(of_sam(regimes.gains(runs[runs.augment])), above=0)


claim(
    **DATA, name="mixed_precision_is_as_good",
    quote="SGD: Uses Automatic Mixed Precision … SAM: Uses FP32 to ensure stability with the custom two-step update",
    not_measured="mixed precision is a GPU's; here both have one precision. studies/paper/precision.yaml compares them",
)  # fmt: skip
claim(
    **DATA, name="hours_on_an_a100",
    quote="This takes approximately 4-5 hours on an NVIDIA A100 GPU",
    documented="4-5 hours",
    not_measured="hours are a machine's; benchmarks/ measures ratios between implementations on one machine",
)  # fmt: skip


def batch(results: Results, value: str, kind: str, **rule: float) -> Iterator[Finding]:
    for name, estimate, of_kind in regimes.batch_differences(results, value):
        if of_kind == kind:
            yield Finding(name, estimate, decide(estimate, **rule))


@claim(
    **BATCH, quote="The gradient norm with batch size 1024 was lower than with batch size 256",
    rule="gradient norm, mean over training, larger minus smallest batch, same rate, paired by seed: the 95 % interval "
    "lies below zero",
)  # fmt: skip
def larger_batches_have_smaller_gradients(results: Results) -> Iterator[Finding]:
    yield from batch(results, "norm", "larger", below=0)


@claim(
    **BATCH, quote="… hinting slower learning with a higher batch size",
    rule=f"training loss, mean over the same epochs, larger minus smallest batch, same rate, paired by seed: {ABOVE}",
)  # fmt: skip
def larger_batches_learn_more_slowly(results: Results) -> Iterator[Finding]:
    yield from batch(results, "loss", "larger", above=0)


@claim(
    **BATCH, quote="Does large batch training lower generalization due to low learning rates?",
    rule="test accuracy, larger minus smallest batch, same rate, paired by seed: the 95 % interval lies below zero",
)  # fmt: skip
def larger_batches_generalize_worse(results: Results) -> Iterator[Finding]:
    yield from batch(results, "test_accuracy", "larger", below=0)


@claim(
    **BATCH, quote="Increasing the learning rate in the batch size 1024 experiment improved test accuracy",
    rule=f"test accuracy, large batch at the higher rate minus at the lower, paired by seed: {ABOVE}",
)  # fmt: skip
def a_higher_rate_helps_large_batches(results: Results) -> Iterator[Finding]:
    yield from batch(results, "test_accuracy", "faster", above=0)
