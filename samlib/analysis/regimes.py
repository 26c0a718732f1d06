"""The first document's tables, by data fraction and label noise, and Experiment 4's large batches.

They read a study's grids by role (see `grid`): "regimes", "twice" (SGD, twice the epochs), "shorter" (fewer),
"sweep" or "rho", "rates" (other learning rates), "augmented", "ablation", "batch". Where "regimes" has a mix at several
ρ, each regime's is the one that is best on its held-out training images.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
import pandas as pd

from samlib.analysis.results import (
    REGIME,
    NotMeasured,
    Results,
    at_chosen_rho,
    chosen_rho,
    estimates,
    held_out,
    in_order,
    mix_name,
    mix_order,
    once,
    pairs,
    trainings,
)
from samlib.analysis.stats import Estimate, correlation_over_seeds, expected_by_chance, sign_count

VALUES = ("test_accuracy", "eval_train_accuracy", "memorized", "memorized_chance", "corrected")
HELD_OUT = ("validation_accuracy", "test_accuracy", "memorized")  # what chooses, and what stands beside it


ROLES = {  # of the grid of a notebook
    "05_data_regimes": "regimes", "06_checkpoint_ablation": "ablation", "07_large_batch": "batch",
}  # fmt: skip


def grid(results: Results, *roles: str) -> str:
    """The loaded grid of the first of these roles that has finished runs; raises NotMeasured where there is none.

    It is the one that was named when the results were loaded, else that of the study's own notebooks (see ROLES), else
    that whose name is the role.
    """
    of_study = {}
    for analysis in (a for a in results.study.notebooks if a.notebook in ROLES):
        of_study |= {ROLES[analysis.notebook]: analysis.grid} if analysis.grid else {}
        of_study |= analysis.parameters
    for role in roles:
        name = (of_study | results.named).get(role, role)
        if name in results.grids and len(results.runs(name)):
            return name
    raise NotMeasured(f"{results.study.title!r} has no finished runs of a grid {' or '.join(map(repr, roles))}")


@once
def chosen(results: Results, *roles: str) -> pd.DataFrame:
    """The planned runs of the grid of a role (regimes): SGD's, and of each other mix those of its chosen ρ in their
    regime."""
    return at_chosen_rho(trainings(results.planned(grid(results, *roles or ("regimes",)))))


def gains(
    runs: pd.DataFrame, value: str = "test_accuracy", by: Sequence[str] = REGIME, **options: Sequence[str]
) -> pd.DataFrame:
    """Each mix minus SGD, paired by seed: a row a regime, a column a mix; an empty Estimate where a regime has none of
    it. options: of `pairs`."""
    mixes = [mix for mix in in_order(runs.mix) if mix != "sgd"]
    found = {mix: estimates(pairs(runs, mix, "sgd", value, **options), "difference", by) for mix in mixes}
    table = pd.DataFrame({f"{mix_name(mix)} − SGD": of_mix for mix, of_mix in found.items() if len(of_mix)})
    return table.map(lambda e: e if isinstance(e, Estimate) else Estimate())


def accuracy(results: Results) -> pd.DataFrame:
    """Final numbers of each mix in each regime; of several ρ, the chosen one."""
    runs = chosen(results)
    runs = runs.assign(rho=runs.rho.mask(runs.mix == "sgd"))
    there = {v: runs[runs.noise_fraction > 0] if v in VALUES[2:] else runs for v in VALUES if runs[v].notna().any()}
    table = pd.DataFrame({v: estimates(rows, v, (*REGIME, "mix", "rho")) for v, rows in there.items()})
    return table.loc[sorted(table.index, key=lambda key: (*key[:2], mix_order(key[2])))]


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


def interaction(results: Results, over: str) -> pd.Series:
    """How much SAM's gain over SGD is larger with each label noise than with none, or with each data fraction than
    with all data, paired by seed, by regime. over: the field of REGIME that varies."""
    (other,) = set(REGIME) - {over}
    found = pairs(chosen(results), "sam", "sgd")
    at_base = found[over] == (0 if over == "noise_fraction" else 1)
    base, rest = found[at_base].set_index([other, "seed"]).difference, found[~at_base]
    plain = base.reindex(pd.MultiIndex.from_frame(rest[[other, "seed"]])).to_numpy()
    return estimates(rest.assign(difference=rest.difference - plain), "difference", REGIME)


def best(results: Results, mix: str, runs: pd.DataFrame, *fields: str) -> pd.DataFrame:
    """Of these runs a mix's with that number of epochs, as many as the regime's own or fewer, learning rate and ρ which
    are best on held-out images, over the seeds that all have: in each regime where one of the fields varies, if any is
    named. Raises NotMeasured where there is none."""
    longest, found = chosen(results).groupby(list(REGIME)).epochs.max(), []
    for regime, part in runs[runs.mix == mix].groupby(list(REGIME)):
        part = trainings(part[part.epochs <= longest.get(regime, 0)])
        part = part.assign(setting=part.groupby(["epochs", "lr"] + ["rho"] * (mix != "sgd")).ngroup())
        accuracies = held_out(part, mix, "setting").mean().round(9)
        if not fields or (part.loc[part.setting.isin(accuracies.index), [*fields]].nunique() > 1).any():
            found.append(part[part.setting == accuracies.idxmax()].drop(columns="setting"))
    if not found:
        words = " and ".join({"epochs": "number of epochs", "lr": "learning rate"}.get(f, "ρ") for f in fields)
        raise NotMeasured(f"in each regime {mix_name(mix)} of {results.study.title!r} has one {words}")
    return pd.concat(found)


@once
def shorter(results: Results, mix: str = "sgd") -> pd.DataFrame:
    """The `best` over numbers of epochs, and ρ. Unlike a long run that is stopped, each ends with its learning rate at
    zero."""
    return best(results, mix, results.planned([grid(results, role) for role in ("regimes", "shorter")]), "epochs")


def of_all_rates(results: Results) -> pd.DataFrame:
    """The candidates of `own_rate`; raises NotMeasured where there is no grid of rates."""
    grids = [grid(results, "rates"), grid(results, "regimes")]
    for roles in (("shorter",), ("sweep", "rho")):
        with suppress(NotMeasured):
            grids.append(grid(results, *roles))
    return results.planned(grids)


@once
def own_rate(results: Results, mix: str = "sgd") -> pd.DataFrame:
    """The `best` over learning rates, numbers of epochs and ρ."""
    return best(results, mix, of_all_rates(results), "lr")


@once
def at_each_rate(results: Results) -> pd.DataFrame:
    """SGD's and SAM's runs of that number of epochs, and ρ, which is `best` at their learning rate, where there are
    several; `chosen`: whether the rate is the best."""
    rows, own = of_all_rates(results), pd.concat([own_rate(results, mix) for mix in ("sgd", "sam")])
    by_rate = rows[rows.mix.isin(own.mix)].groupby(["mix", "lr"])
    found = pd.concat([best(results, mix, part) for (mix, _), part in by_rate])
    chosen_rates = own.groupby([*REGIME, "mix"]).lr.first()
    rates = chosen_rates.reindex(pd.MultiIndex.from_frame(found[[*REGIME, "mix"]])).to_numpy()
    return found.assign(chosen=found.lr == rates, rho=found.rho.mask(found.mix == "sgd"))[~np.isnan(rates)]


def rates(results: Results) -> pd.DataFrame:
    """`at_each_rate`: a row a regime, mix and rate, with its number of epochs and ρ."""
    runs, by = at_each_rate(results), (*REGIME, "mix", "lr", "epochs", "rho", "chosen")
    table = pd.DataFrame({v: estimates(runs, v, by) for v in HELD_OUT if runs[v].notna().any()})
    table = table.reset_index("chosen").assign(chosen=lambda of: of.pop("chosen").map({True: "✔", False: ""}))
    return table.loc[sorted(table.index, key=lambda key: (*key[:2], mix_order(key[2]), *key[3:]))]


def twice(results: Results) -> pd.DataFrame:
    """SGD's planned runs of twice the epochs. Raises NotMeasured where there is no such grid."""
    return trainings(results.planned(grid(results, "twice")).query("mix == 'sgd'"))


def augmented(results: Results) -> pd.DataFrame:
    """SGD's planned runs with augmentation. Raises NotMeasured where there are none, or the regimes have it, too."""
    runs = trainings(results.planned(grid(results, "augmented")).query("mix == 'sgd' and augment"))
    if runs.empty or chosen(results).augment.any():
        raise NotMeasured(f"{results.study.title!r} has no runs of SGD with augmentation beside others without")
    return runs


@once
def rivals(results: Results) -> pd.DataFrame:
    """Each mix's gain beside what other means give SGD: stopping where it is best on held-out images, fewer epochs
    (and what both have at fewer, and each at its own learning rate), twice as many, which is as many gradient
    evaluations, or augmentation."""
    runs = chosen(results)
    sgd, stopped = runs.mix == "sgd", runs.stopped_test_accuracy
    tables = {"last epoch": gains(runs)}
    if stopped.notna().any():
        tables["SGD stopped early"] = gains(runs.assign(test_accuracy=stopped.where(sgd, runs.test_accuracy)))
        tables["both stopped early"] = gains(runs.assign(test_accuracy=stopped))
    with suppress(NotMeasured):
        tables["SGD of fewer epochs"] = gains(pd.concat([runs[~sgd], shorter(results)]), but=("epochs",))
        tables["both of fewer epochs"] = gains(pd.concat([shorter(results, "sam"), shorter(results)]), but=("epochs",))
    with suppress(NotMeasured):
        both = pd.concat([own_rate(results, "sam"), own_rate(results)])
        tables["each at its own learning rate"] = gains(both, but=("epochs", "lr"))
    for name, rival, field in (("of twice the epochs", twice, "epochs"), ("with augmentation", augmented, "augment")):
        with suppress(NotMeasured):
            tables[f"SGD {name}"] = gains(pd.concat([runs[~sgd], rival(results)]), but=(field,))
    table = pd.concat({name: table.stack() for name, table in tables.items() if len(table)}, axis=1)
    return table.rename_axis([*REGIME, "difference"]).map(lambda e: e if isinstance(e, Estimate) else Estimate())


@once
def levels(results: Results) -> pd.DataFrame:
    """Test accuracy of SGD, of what else helps it, and of SAM: a row a regime with flipped labels, an empty Estimate
    where a regime has none of it. Raises NotMeasured where SGD has none."""
    runs = chosen(results)
    found = {"SGD": runs[runs.mix == "sgd"], "SAM": runs[runs.mix == "sam"]}
    with suppress(NotMeasured):
        found["SGD of fewer epochs"] = shorter(results)
    with suppress(NotMeasured):
        found["SGD with augmentation"] = augmented(results)
    table = pd.DataFrame({n: estimates(rows, "test_accuracy", REGIME) for n, rows in found.items() if len(rows)})
    if "SGD" not in table:
        raise NotMeasured(f"{results.study.title!r} has no runs of SGD by regime")
    for name in ("SGD", "SGD with augmentation"):
        if name in table:
            clean = [table[name].get((data, 0.0)) for data, _ in table.index]
            table[f"{name}, clean labels"] = pd.Series(clean, table.index, dtype=object)
    return table.query("noise_fraction > 0").map(lambda e: e if isinstance(e, Estimate) else Estimate())


@once
def sharpness(results: Results) -> pd.DataFrame:
    """Results.sharpness of the chosen runs: a row a run and kind."""
    rows = results.sharpness(grid(results, "regimes"))
    return rows[rows.index.isin(chosen(results).index)]


@once
def sharpness_differences(results: Results) -> pd.DataFrame:
    """Each mix's sharpness minus SGD's, in nats: a row a kind and regime; below zero is flatter."""
    return gains(sharpness(results), "value", ("kind", *REGIME))


@once
def beside_shorter(results: Results) -> pd.DataFrame:
    """SAM minus SGD of fewer epochs (see `shorter`), by regime: test accuracy, and each sharpness in nats. Raises
    NotMeasured where there is no such pair."""
    own = chosen(results)
    runs = pd.concat([own[own.mix == "sam"], shorter(results)])
    rows = results.sharpness([grid(results, role) for role in ("regimes", "shorter")])
    rows = rows[rows.index.isin(runs.index)]
    found = {"test_accuracy": gains(runs, but=("epochs",))}
    found |= {kind: gains(of_kind, "value", but=("epochs",)) for kind, of_kind in rows.groupby("kind")}
    columns = {name: table.squeeze("columns") for name, table in found.items() if len(table)}
    if not columns:
        raise NotMeasured(f"SAM of {results.study.title!r} has no partner among SGD's runs of fewer epochs")
    return pd.DataFrame(columns).map(lambda e: e if isinstance(e, Estimate) else Estimate())


@once
def gap_correlations(results: Results) -> pd.DataFrame:
    """Correlation of each sharpness with the generalization gap: over a seed's runs, and less the means of each regime;
    the intervals hold those with any one regime left out. n: seeds."""
    rows = sharpness(results)
    rows = rows.assign(regime=[*zip(rows.data_fraction, rows.noise_fraction, strict=True)])
    means = rows.groupby(["kind", "seed", "regime"])[["value", "gap"]].transform("mean")
    frames = {"over all regimes": rows, "within regimes": rows.assign(**(rows[["value", "gap"]] - means))}
    found = {
        name: {
            kind: correlation_over_seeds(part, "value", "gap", over="regime") for kind, part in frame.groupby("kind")
        }
        for name, frame in frames.items()
    }
    return pd.DataFrame(found).rename_axis("sharpness")


def sweep(results: Results) -> pd.DataFrame:
    """Each mix over ρ: held-out accuracy, by which one is chosen, test accuracy and memorized flips."""
    runs = trainings(results.planned(grid(results, "sweep", "rho")))
    runs = runs[runs.mix != "sgd"]
    table = pd.DataFrame({v: estimates(runs, v, ("mix", "rho")) for v in HELD_OUT if runs[v].notna().any()})
    return table.assign(chosen=["✔" if chosen_rho(runs, mix) == rho else "" for mix, rho in table.index])


def augmentation(results: Results) -> pd.DataFrame:
    """Test accuracy and training accuracy of the mixes with the documents' augmentation and without it."""
    runs = pd.concat([chosen(results, "augmented"), chosen(results)])
    shared = runs.groupby(list(REGIME)).augment.transform("nunique") > 1
    runs = runs[shared].assign(augment=runs.augment.map({True: "with", False: "without"}))
    by, table = (*REGIME, "augment"), {}
    for mix in in_order(runs.mix):
        table |= {(mix_name(mix), v): estimates(runs[runs.mix == mix], v, by) for v in VALUES[:2]}
    return pd.DataFrame(table | {(name, VALUES[0]): column for name, column in gains(runs, by=by).items()})


@once
def batches(results: Results) -> pd.DataFrame:
    """The planned runs of the grid of batches, with means over training of each: `loss`, the training loss over the
    evaluations, and `norm`, the gradient's norm over the probes; NaN where a run diverged."""
    name = grid(results, "batch")
    runs = trainings(results.planned(name))
    probes = results.table("probes", name).query("rho == rho_run")
    means = {"loss": results.table("metrics", name).groupby("run").eval_train_loss.mean()}
    means |= {"norm": probes.groupby("run").grad_norm.mean()}
    return runs.join(pd.DataFrame(means)[lambda of: runs.status.reindex(of.index) == "done"])


def batch_means(results: Results) -> pd.DataFrame:
    """What each setting of batch size and rate ends with, and its means over training."""
    names = {"loss": "mean training loss", "norm": "mean gradient norm"}
    values = (*VALUES[:2], *names)
    found = {names.get(v, v): estimates(batches(results), v, ("batch_size", "lr")) for v in values}
    return pd.DataFrame(found)


def batch_differences(results: Results, value: str) -> Iterator[tuple[str, Estimate, str]]:
    """(comparison, Estimate, kind): each larger batch minus the smallest at its rate ("larger"), and each larger batch
    at a higher rate minus itself at the smallest batch's ("faster")."""
    runs = batches(results)
    (small, rate), *others = sorted({*zip(runs.batch_size, runs.lr, strict=True)})
    for size, lr in others:
        base, kind = ((small, rate), "larger") if lr == rate else ((size, rate), "faster")
        a, b = ({"batch_size": s, "lr": r} for s, r in ((size, lr), base))
        for estimate in estimates(pairs(runs, a, b, value), "difference", ("batch_size",)) if size > small else ():
            yield f"batch {size}, rate {lr:g}, minus batch {base[0]}, rate {base[1]:g}", estimate, kind
