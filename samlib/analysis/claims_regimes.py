"""Claims of the first document, when SAM beats SGD by data size and label noise, and of the second's Experiment 4."""

from collections.abc import Callable, Iterator

import pandas as pd

from samlib.analysis import regimes
from samlib.analysis.claim import ASKED, READ_AS, Finding, claim
from samlib.analysis.results import Results, once, setting_name
from samlib.analysis.stats import CONTRADICTED, HOLDS, NOT_MEASURED, UNDECIDED, Estimate, decide, sign_count

DATA = {"subject": "regimes", "notebook": "05_data_regimes"}
BATCH = {"subject": "geometry", "notebook": "07_large_batch"}
FORET = "Foret et al. 2021"
GAIN = "test accuracy, SAM minus SGD, paired by seed"
ABOVE, BELOW = (f"the 95 % interval lies {side} zero" for side in ("above", "below"))


def of_sam(table: pd.DataFrame) -> pd.Series:
    found = table.get("SAM − SGD", pd.Series(dtype=object))
    return found[[isinstance(e, Estimate) and e.n + e.left_out > 0 for e in found]]


@once
def gain(results: Results, *roles: str, data: float | None = None, augment: bool | None = None) -> pd.Series:
    """SAM's by regime (see regimes.chosen); data: only that of this much of it and clean labels; augment: only of such
    runs."""
    runs = regimes.chosen(results, *roles)
    runs = runs if data is None else runs[(runs.data_fraction == data) & (runs.noise_fraction == 0)]
    return of_sam(regimes.gains(runs if augment is None else runs[runs.augment == augment]))


def memorized(results: Results) -> pd.Series:
    return of_sam(regimes.gains(regimes.chosen(results).query("noise_fraction > 0"), "memorized"))


def flatter(results: Results) -> pd.Series:
    """SAM's sharpness minus SGD's, of normalized logits."""
    table = of_sam(regimes.sharpness_differences(results))
    return table[["normalized" in kind for kind, *_ in table.index]]


def augmented(results: Results) -> pd.Series:
    return gain(results, "augmented", "regimes", augment=True)


def within_regimes(results: Results) -> pd.Series:
    return regimes.gap_correlations(results)["within regimes"].rename("{}, within regimes".format)


def over(rival: str) -> Callable[[Results], pd.Series]:
    def sams(results: Results) -> pd.Series:
        table = regimes.rivals(results)
        return of_sam(table[rival].unstack("difference")) if rival in table else pd.Series(dtype=object)

    return sams


def each(
    name: str, quote: str, rule: str, column: Callable[[Results], pd.Series], document: str = "", every: bool = False,
    **verdict: float,
) -> None:  # fmt: skip
    """A claim on Estimates, a finding each: by regime, by kind of sharpness and regime, or by what it is, in words."""

    def judged(results: Results) -> Iterator[Finding]:
        for at, e in column(results).items():
            *kind, where = (at,) if isinstance(at, str) else (*at[:-2], setting_name(*at[-2:]))
            if e.n:
                yield Finding(where, e, decide(e, **verdict), what="".join(kind))

    claim(**DATA, name=name, quote=quote, rule=rule, document=document, every=every)(judged)


INTERACTION = "the interaction between dataset size and label noise" + READ_AS
each("sam_beats_sgd", "when Sharpness-Aware Minimization (SAM) provides a generalization benefit over SGD",
     f"{GAIN}, each regime: {ABOVE}", gain, above=0)  # fmt: skip

each("sam_beats_sgd_in_most_regimes", "In most regimes SAM is ahead of SGD (in our words)",
     "how many regimes have SAM above SGD: the sign test at 5 % rejects a half, which takes six of six",
     lambda results: pd.Series({"regimes with SAM above SGD": sign_count(gain(results))}), above=0.5)  # fmt: skip
each("sam_beats_sgd_on_all_clean_data", "All data, clean labels: SAM is ahead of SGD (in our words)",
     f"{GAIN}, all data, no flips: {ABOVE}", lambda results: gain(results, data=1.0), above=0)  # fmt: skip
each("sam_loses_at_ten_percent_clean", "10 % of the data, clean labels: SAM loses to SGD (in our words)",
     f"{GAIN}, 10 % of the data, no flips: {BELOW}", lambda results: gain(results, data=0.1), below=0)  # fmt: skip
each("gain_grows_with_noise", INTERACTION + "SAM's gain grows with noisier labels",
     f"SAM's gain with flipped labels minus with none, same data, paired by seed: {ABOVE}",
     lambda results: regimes.interaction(results, "noise_fraction"), above=0)  # fmt: skip
each("gain_grows_as_data_shrinks", INTERACTION + "SAM's gain grows with scarcer data",
     f"SAM's gain with a part of the data minus with all, same noise, paired by seed: {ABOVE}",
     lambda results: regimes.interaction(results, "data_fraction"), above=0)  # fmt: skip


def both(regime: tuple[float, float], flat: Estimate, better: Estimate, what: str = "") -> Finding:
    """Whether a regime has the one below zero and the other above."""
    verdicts = [decide(flat, below=0), decide(better, above=0)]
    verdict = next(word for word in (NOT_MEASURED, CONTRADICTED, UNDECIDED, HOLDS) if word in verdicts)
    said = f"sharpness {flat.format(n=flat.n != better.n)}, accuracy {better}"
    return Finding(setting_name(*regime), said, verdict, what=what)


@claim(
    **DATA, quote="When Do Flat Minima Help?",
    rule="a regime in which SAM ends both flatter (random directions, normalized logits) and better: both 95 % "
    "intervals exclude zero; contradicted where one lies on the other side",
)  # fmt: skip
def flatter_and_better(results: Results) -> Iterator[Finding]:
    flat = flatter(results)
    for regime, better in gain(results).items():
        yield both(regime, flat.get(("random directions, normalized logits", *regime), Estimate()), better)


@claim(
    **DATA, quote="Flat minima help: beside SGD of fewer epochs SAM ends flatter, and better", document=ASKED,
    rule="sharpness of normalized logits, by random directions and by ascent, and test accuracy, SAM minus SGD of its "
    "number of epochs that is best on held-out training images (made after the first numbers): both 95 % intervals "
    "exclude zero; contradicted where one lies on the other side", every=True,
)  # fmt: skip
def flatter_and_better_than_shorter_sgd(results: Results) -> Iterator[Finding]:
    table = regimes.beside_shorter(results)
    for kind in (name for name in table if "normalized" in name):
        for regime, flat in table[kind].items():
            if flat.n:
                yield both(regime, flat, table.test_accuracy[regime], kind)


each("sam_ends_flatter", "SAM looks for weights in whose whole neighbourhood the loss is low (in our words)",
     "sharpness at the end on the labels trained on, normalized logits, SAM minus SGD, paired by seed, by random "
     f"directions and by ascent: {BELOW}", flatter, FORET, every=True, below=0)  # fmt: skip

each("sharper_has_the_larger_gap", "The flatter of two networks has the smaller generalization gap (in our words)",
     "correlation within regimes of sharpness and gap, each seed's own, and with any one regime left out: the 95 % "
     "interval over seeds lies above zero", within_regimes, above=0)  # fmt: skip
each("sharpness_and_gap_do_not_correlate",
     "Sharpness is not a good sign of how well a network generalizes (in our words)",
     "the same correlation: its interval lies within ± 0.3", within_regimes, "Andriushchenko et al. 2023",
     within=0.3)  # fmt: skip
each("sam_memorizes_fewer_flips", "SAM by itself is robust to label noise (in our words)",
     f"flipped labels memorized, SAM minus SGD, paired by seed, noisy regimes: {BELOW}", memorized, FORET,
     below=0)  # fmt: skip
each("sam_beats_sgd_at_equal_cost", "SAM improves generalization efficiently (in our words)",
     f"test accuracy, SAM minus SGD of twice the epochs, as many gradient evaluations, paired by seed: {ABOVE}",
     over("SGD of twice the epochs"), FORET, above=0)  # fmt: skip
each("sam_beats_sgd_stopped_early", "SAM's gain is more than early stopping gives SGD",
     "test accuracy, SAM's last epoch minus SGD's epoch that is best on held-out training images, paired by seed: "
     + ABOVE, over("SGD stopped early"), ASKED, above=0)  # fmt: skip
each("sam_beats_shorter_sgd", "SAM's gain is more than a shorter training gives SGD",
     "test accuracy, SAM minus SGD of its number of epochs, as many or fewer, that is best on held-out training "
     f"images, paired by seed (added after the first numbers): {ABOVE}",
     over("SGD of fewer epochs"), ASKED, above=0)  # fmt: skip
each("sam_beats_sgd_both_of_fewer_epochs", "SAM's gain is more than a shorter training gives, its own chosen as well",
     "test accuracy, SAM minus SGD, each of its number of epochs, as many or fewer, and SAM at its ρ, that are best on "
     f"held-out training images, paired by seed (added after the first numbers): {ABOVE}",
     over("both of fewer epochs"), ASKED, above=0)  # fmt: skip
each("sam_beats_sgd_each_at_its_own_rate", "SAM's gain is more than a learning rate and a training of its own give SGD",
     "test accuracy, SAM minus SGD, each of its learning rate and number of epochs, as many or fewer, and SAM at its "
     f"ρ, that are best on held-out training images, paired by seed (the rule before its runs): {ABOVE}",
     over("each at its own learning rate"), ASKED, above=0)  # fmt: skip
each("sam_beats_sgd_with_augmentation", "SAM beats SGD with the document's augmentation as well",
     f"{GAIN}, crops and flips as in the document, each regime: {ABOVE}", augmented, ASKED, above=0)  # fmt: skip
each("sam_beats_sgd_with_crops_and_flips", "SAM's gain is more than augmentation gives SGD",
     "test accuracy, SAM without augmentation minus SGD with crops and flips, paired by seed (added after the first "
     f"numbers): {ABOVE}", over("SGD with augmentation"), ASKED, above=0)  # fmt: skip
claim(
    **DATA, name="mixed_precision_is_as_good",
    quote="SGD: Uses Automatic Mixed Precision … SAM: Uses FP32 to ensure stability with the custom two-step update",
    not_measured="mixed precision is a GPU's; here both have one precision. studies/paper/precision.yaml compares them",
)  # fmt: skip
claim(
    **DATA, name="hours_on_an_a100", quote="This takes approximately 4-5 hours on an NVIDIA A100 GPU",
    documented="4-5 hours",
    not_measured="hours are a machine's; benchmarks/ measures ratios between implementations on one machine",
)  # fmt: skip


def batch(name: str, quote: str, rule: str, value: str, kind: str, **verdict: float) -> None:
    """A claim on the differences between batches of a kind, larger or faster, in a value."""

    def judged(results: Results) -> Iterator[Finding]:
        for comparison, e, of_kind in regimes.batch_differences(results, value):
            if of_kind == kind:
                yield Finding(comparison, e, decide(e, **verdict))

    claim(**BATCH, name=name, quote=quote, rule=rule)(judged)


LARGER = "larger minus smallest batch, same rate, paired by seed"
batch("larger_batches_have_smaller_gradients",
      "The gradient norm with batch size 1024 was lower than with batch size 256",
      f"gradient norm, mean over training, {LARGER}: {BELOW}", "norm", "larger", below=0)  # fmt: skip
batch("larger_batches_learn_more_slowly", "… hinting slower learning with a higher batch size",
      f"training loss, mean over the same epochs, {LARGER}: {ABOVE}", "loss", "larger", above=0)  # fmt: skip
batch("larger_batches_generalize_worse", "Does large batch training lower generalization due to low learning rates?",
      f"test accuracy, {LARGER}: {BELOW}", "test_accuracy", "larger", below=0)  # fmt: skip
batch("a_higher_rate_helps_large_batches",
      "Increasing the learning rate in the batch size 1024 experiment improved test accuracy",
      f"test accuracy, large batch at the higher rate minus at the lower, paired by seed: {ABOVE}", "test_accuracy",
      "faster", above=0)  # fmt: skip
