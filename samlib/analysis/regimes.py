"""The first document's tables, by data fraction and label noise, and Experiment 4's large batches.

They read a study's grids by name: `regimes`, `twice` (SGD, twice the epochs), `sweep` or `rho`, `augmented`, `batch`.
Where `regimes` has a mix at several ρ, each regime's is the one that is best on its held-out training images.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from samlib.analysis.results import (
    REGIME,
    NotMeasured,
    Results,
    chosen_rho,
    estimates,
    in_order,
    mix_name,
    mix_order,
    pairs,
    trainings,
)
from samlib.analysis.stats import Estimate, correlation_over_seeds, expected_by_chance, sign_count

SHARPNESS = ["measure", "labels", "logits", "setting"]
VALUES = ("test_accuracy", "eval_train_accuracy", "memorized", "memorized_chance", "corrected")


def grid(results: Results, *names: str) -> str:
    """The first of these grids that is loaded and has finished runs; raises NotMeasured where there is none."""
    for name in names:
        if name in results.grids and len(results.runs(name)):
            return name
    raise NotMeasured(f"{results.study.title!r} has no finished runs of a grid {' or '.join(map(repr, names))}")


def chosen(results: Results, name: str = "regimes") -> pd.DataFrame:
    """The planned runs of a grid: SGD's, and of each other mix those of its chosen ρ in their regime."""
    runs = trainings(results.planned(grid(results, name)))
    best = {mix: chosen_rho(runs, mix, REGIME) for mix in set(runs.mix) - {"sgd"}}
    keep = [r.mix == "sgd" or best[r.mix].get((r.data_fraction, r.noise_fraction)) == r.rho for r in runs.itertuples()]
    return runs[keep]


def mixes(runs: pd.DataFrame) -> list[str]:
    """All but SGD, in order."""
    return [mix for mix in in_order(runs.mix) if mix != "sgd"]


def gains(runs: pd.DataFrame, value: str = "test_accuracy", by: tuple = REGIME, **options: tuple) -> pd.DataFrame:
    """Each mix minus SGD, paired by seed: a row a regime, a column a mix."""
    found = {mix: estimates(pairs(runs, mix, "sgd", value, **options), "difference", by) for mix in mixes(runs)}
    return pd.DataFrame({f"{mix_name(mix)} − SGD": of_mix for mix, of_mix in found.items() if len(of_mix)})


def accuracy(results: Results) -> pd.DataFrame:
    """Final numbers of each mix in each regime; of several ρ, the chosen one."""
    runs = chosen(results)
    runs = runs.assign(rho=runs.rho.mask(runs.mix == "sgd"))
    values = [value for value in VALUES if runs[value].notna().any()]
    there = {value: runs[runs.noise_fraction > 0] if value in VALUES[2:] else runs for value in values}
    table = pd.DataFrame({value: estimates(there[value], value, (*REGIME, "mix", "rho")) for value in values})
    return table.loc[sorted(table.index, key=lambda key: (*key[:2], mix_order(key[2])))]


def differences(results: Results) -> pd.DataFrame:
    """Each mix minus SGD at the end of training, and what the runs have memorized less."""
    runs = chosen(results)
    memorized = gains(runs[runs.noise_fraction > 0], "memorized").add_suffix(", memorized")
    return gains(runs).join(memorized)


def tally(results: Results) -> pd.DataFrame:
    """In how many regimes a mix is above SGD, how many intervals exclude zero, and how many would by chance alone."""
    rows = {}
    for name, column in gains(chosen(results)).items():
        found = [e for e in column if not np.isnan(e.value)]
        judged = [e for e in found if e.n > 1]
        rows[name] = {
            "regimes above zero": sign_count(found), "intervals above zero": sum(e.low > 0 for e in judged),
            "below": sum(e.high < 0 for e in judged), "by chance alone": expected_by_chance(len(judged)),
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("difference")


def interaction(results: Results, over: str, mix: str = "sam") -> pd.Series:
    """How much a mix's gain over SGD is larger with each label noise than with none, or with each data fraction than
    with all data, paired by seed, by regime. over: the field of REGIME that varies."""
    (other,) = set(REGIME) - {over}
    found = pairs(chosen(results), mix, "sgd")
    at_base = found[over] == (0 if over == "noise_fraction" else 1)
    base, rest = found[at_base].set_index([other, "seed"]).difference, found[~at_base]
    plain = base.reindex(pd.MultiIndex.from_frame(rest[[other, "seed"]])).to_numpy()
    return estimates(rest.assign(difference=rest.difference - plain), "difference", REGIME)


def rivals(results: Results) -> pd.DataFrame:
    """Each mix's gain beside what cheaper means give SGD: stopping where it is best on held-out images, or twice the
    epochs, which is as many gradient evaluations."""
    runs = chosen(results)
    sgd, stopped = runs.mix == "sgd", runs.stopped_test_accuracy
    tables = {"last epoch": gains(runs)}
    if stopped.notna().any():
        tables["SGD stopped early"] = gains(runs.assign(test_accuracy=stopped.where(sgd, runs.test_accuracy)))
        tables["both stopped early"] = gains(runs.assign(test_accuracy=stopped))
    if "twice" in results.grids:
        longer = results.planned("twice")
        tables["SGD of twice the epochs"] = gains(pd.concat([runs[~sgd], longer[longer.mix == "sgd"]]), but=("epochs",))
    table = pd.concat({name: table.stack() for name, table in tables.items() if len(table)}, axis=1)
    return table.rename_axis([*REGIME, "difference"]).map(lambda e: e if isinstance(e, Estimate) else Estimate())


def sharpness(results: Results) -> pd.DataFrame:
    """The chosen runs' sharpness on the labels trained on, a row a run and measure: `kind`, `value`, `gap`; ascent
    sharpness at the radius that all runs share."""
    rows = results.last("sharpness", grid(results, "regimes"))
    rows = rows[rows.index.isin(chosen(results).index) & (rows.labels == "trained") & (rows.status == "done")]
    shared = rows.probe_rho.astype(float).fillna(rows.rho)
    rows = rows[(rows.measure != "ascent") | (rows.setting == shared)]
    return rows.assign(kind=rows.measure + ", " + rows.logits + " logits")


def sharpness_differences(results: Results) -> pd.DataFrame:
    """Each mix's sharpness minus SGD's: a row a measure and regime; below zero is flatter."""
    return gains(sharpness(results), "value", ("kind", *REGIME), also=tuple(SHARPNESS))


def gap_correlations(results: Results) -> pd.DataFrame:
    """Correlation of each sharpness with the generalization gap: over a seed's runs, and less the means of each regime;
    the intervals hold those with any one regime left out. n: seeds."""
    rows = sharpness(results)
    rows = rows.assign(regime=[*zip(rows.data_fraction, rows.noise_fraction, strict=True)])
    means = rows.groupby(["kind", "seed", "regime"])[["value", "gap"]].transform("mean")
    found = {}
    for kind, part in rows.groupby("kind"):
        within = part.assign(**(part[["value", "gap"]] - means[rows.kind == kind]))
        both = {"over all regimes": part, "within regimes": within}
        found[kind] = {name: correlation_over_seeds(p, "value", "gap", over="regime") for name, p in both.items()}
    return pd.DataFrame.from_dict(found, orient="index").rename_axis("sharpness")


def sweep(results: Results) -> pd.DataFrame:
    """Each mix over ρ: held-out accuracy, by which one is chosen, test accuracy and memorized flips."""
    runs = trainings(results.planned(grid(results, "sweep", "rho")))
    runs, best = runs[runs.mix != "sgd"], {mix: chosen_rho(runs, mix).get("") for mix in mixes(runs)}
    values = [v for v in ("validation_accuracy", "test_accuracy", "memorized") if runs[v].notna().any()]
    table = pd.DataFrame({v: estimates(runs, v, ("mix", "rho")) for v in values})
    return table.assign(chosen=["✔" if best[mix] == rho else "" for mix, rho in table.index])


def augmentation(results: Results) -> pd.DataFrame:
    """Test accuracy and training accuracy of the mixes with the documents' augmentation and without it."""
    runs = pd.concat([chosen(results, "augmented"), chosen(results)])
    shared = runs.groupby(list(REGIME)).augment.transform("nunique") > 1
    runs = runs[shared].assign(augment=runs.augment.map({True: "with", False: "without"}))
    by = (*REGIME, "augment")
    means = {(mix_name(mix), v): estimates(runs[runs.mix == mix], v, by)
             for mix in in_order(runs.mix) for v in ("test_accuracy", "eval_train_accuracy")}  # fmt: skip
    columns = {(name, "test_accuracy"): column for name, column in gains(runs, by=by).items()}
    return pd.DataFrame(means | columns)


def batches(results: Results) -> pd.DataFrame:
    """The planned runs of the grid `batch`, with means over training of each: `loss`, the training loss over the
    evaluations, and `norm`, the gradient's norm over the probes."""
    name = grid(results, "batch")
    runs = trainings(results.planned(name))
    loss = results.table("metrics", name).groupby("run").eval_train_loss.mean()
    probes = results.table("probes", name)
    norm = probes[probes.rho == probes.rho_run].groupby("run").grad_norm.mean()
    ended = runs.status == "done"
    return runs.assign(loss=loss.where(ended), norm=norm.where(ended))


def batch_means(results: Results) -> pd.DataFrame:
    """What each setting of batch size and rate ends with, and its means over training."""
    runs = batches(results).sort_values(["batch_size", "lr"])
    values = ("test_accuracy", "eval_train_accuracy", "mean training loss", "mean gradient norm")
    runs = runs.rename(columns={"loss": values[2], "norm": values[3]})
    return pd.DataFrame({value: estimates(runs, value, ("batch_size", "lr")) for value in values})


def batch_differences(results: Results, value: str) -> Iterator[tuple]:
    """(comparison, Estimate, kind): each larger batch minus the smallest at its rate ("larger"), and each larger batch
    at a higher rate minus itself at the smallest batch's ("faster")."""
    runs = batches(results)
    settings = sorted({*zip(runs.batch_size, runs.lr, strict=True)})
    (small, rate), *others = settings
    for size, lr in others:
        base, kind = ((small, rate), "larger") if lr == rate else ((size, rate), "faster")
        a, b = ({"batch_size": s, "lr": r} for s, r in ((size, lr), base))
        found = estimates(pairs(runs, a, b, value), "difference", ("batch_size",))
        for estimate in found if size > small else ():
            yield f"batch {size}, rate {lr:g}, minus batch {base[0]}, rate {base[1]:g}", estimate, kind
