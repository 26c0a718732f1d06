"""Tables of the checkpoint ablation: every update against SGD, SAM and its controls, over ρ, beside the document's."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial

import numpy as np
import pandas as pd

from samlib import PROJECT
from samlib.analysis.results import (
    AT_EQUAL,
    Grids,
    NotMeasured,
    Results,
    chosen_rho,
    configurations,
    estimates,
    held_out,
    mix_order,
    once,
    pairs,
    setting_name,
    trainings,
)  # fmt: skip
from samlib.analysis.stats import Estimate

DOCUMENT = PROJECT / "notebooks/reference/checkpoint_ablation.csv"  # CIFAR-100, one run a cell
ACCURACIES = ("test_accuracy", "eval_train_accuracy", "memorized", "memorized_chance")
TITLES = {"fits_at_equal": "clean labels fitted", "test_at_equal": "test accuracy"}  # of AT_EQUAL
CELL, SETTING = ("mix", "rho"), ("data_fraction", "noise_fraction", "rho", "augment")


def paired(results: Results, value: str, grid: Grids = None, baseline: str = "sgd") -> pd.DataFrame:
    """The `pairs` of each update and the baseline, of one seed and at the same ρ (SGD has none); a value of AT_EQUAL is
    that above SGD which memorizes as much."""
    mixes = [mix for mix in results.runs(grid).mix.unique() if mix not in ("sgd", baseline)]
    of = partial(pairs_at_equal, results) if value in AT_EQUAL else results.pairs
    rows = [pair for mix in mixes if len(pair := of(mix, baseline, value, grid))]
    if not rows:
        raise NotMeasured(f"no finished run has a partner with the update {baseline}")
    return pd.concat(rows)


def fitted(results: Results, grid: Grids = None) -> pd.DataFrame:
    """`planned` with `fits`, the share of the clean labels that a run fits: (training accuracy − flipped · memorized) /
    (1 − flipped), NaN where no label is flipped. Raises NotMeasured where none is in any run."""
    rows = results.planned(grid)
    rows = rows.astype(dict.fromkeys(("memorized", "eval_train_accuracy", "test_accuracy"), float))
    flipped = rows.flipped.where(rows.flipped > 0) / rows.train_images
    rows = rows.assign(fits=(rows.eval_train_accuracy - flipped * rows.memorized) / (1 - flipped))
    if rows.fits.isna().all():
        raise NotMeasured("no finished run has flipped labels")
    return rows


def memorizing(as_much: float, curve: pd.DataFrame) -> pd.Series:
    """A row between two neighbouring rows of a curve, the last two of which the first memorizes as much or less and the
    second as much or more: linear, or their mean where both memorize as much; NaN where there are none."""
    m = curve.memorized.to_numpy()
    found = np.flatnonzero((m[:-1] <= as_much) & (as_much <= m[1:]))
    if not len(found):
        return pd.Series(np.nan, curve.columns)
    low, high = curve.iloc[found[-1]], curve.iloc[found[-1] + 1]
    step = high.memorized - low.memorized
    return low + (high - low) * ((as_much - low.memorized) / step if step else 0.5)


@once
def at_equal(results: Results, grid: Grids = None) -> pd.DataFrame:
    """`fitted` with AT_EQUAL: how far a run's accuracies are above those of SGD that memorizes as much.

    That is SGD of the same seed and of as many epochs or fewer, between two neighbouring numbers of epochs (see
    `memorizing`; the last two, since short trainings may memorize less with an epoch more); NaN where there are none,
    and zero of SGD itself, where it has several. All are compared at their ends, where the learning rate is zero: a run
    that memorizes as much on its way still gains from its fall. Raises NotMeasured where no run has any."""
    rows = fitted(results, grid).assign(**dict.fromkeys(AT_EQUAL, np.nan))
    keys, known = configurations(rows, {"mix", "mix_warmup", "rho", "epochs"}), rows.fits.notna()
    for _, alike in rows[known].groupby(keys[known]):
        sgd = alike[alike.mix == "sgd"].drop_duplicates("epochs").sort_values("epochs")
        for run, row in alike.iterrows():
            curve = sgd.loc[sgd.epochs <= row.epochs, ["memorized", *AT_EQUAL.values()]]
            partner = row if row.mix == "sgd" else memorizing(row.memorized, curve)
            for name, column in AT_EQUAL.items() if len(curve) > 1 else ():
                rows.loc[run, name] = row[column] - partner[column]
    if rows[[*AT_EQUAL]].isna().all(axis=None):
        raise NotMeasured("no run memorizes as much as one of SGD of fewer epochs")
    return rows


def pairs_at_equal(results: Results, a: str, b: str, value: str, grid: Grids = None) -> pd.DataFrame:
    """`pairs` of one of AT_EQUAL, of the runs of a that were not trained for fewer epochs; SGD's own is zero."""
    rows = at_equal(results, grid)
    longest = rows.epochs.groupby(configurations(rows, {"epochs", "rho"})).transform("max")
    return pairs(rows[(rows.mix != a) | (rows.epochs == longest)], a, b, value)


def differences(results: Results, value: str, grid: Grids = None, baseline: str = "sgd") -> pd.Series:
    """Each update minus the baseline: an Estimate of `paired` by mix and ρ."""
    return estimates(paired(results, value, grid, baseline), "difference", CELL)


def table(results: Results, grid: Grids = None, names: Iterable[str] = ACCURACIES) -> pd.DataFrame:
    """Levels of accuracies or of SHARPNESS, of the first also the differences to SGD and SAM: a row a mix and ρ."""
    first, *_ = names
    found = {name: results.means(name, CELL, grid) for name in names}
    for mix in ("sgd", "sam"):
        with suppress(NotMeasured):
            found[f"{first} minus {mix.upper()}"] = differences(results, first, grid, mix)
    rows = pd.DataFrame(found)
    return rows.loc[sorted(rows.index, key=lambda key: (mix_order(key[0]), np.nan_to_num(key[1])))]


def at_equal_table(results: Results, grid: Grids = None) -> pd.DataFrame:
    """AT_EQUAL above SGD's, and that minus its shuffled control's: a row a mix and ρ that has any."""
    found = {f"{title} minus SGD's": differences(results, value, grid) for value, title in TITLES.items()}
    mixes = results.runs(grid).mix.unique()
    for value, title in TITLES.items():
        rows = [p for mix in mixes if len(p := pairs_at_equal(results, mix, f"shuffled-{mix}", value, grid))]
        if rows:
            found[f"{title} minus its shuffled control's"] = estimates(pd.concat(rows), "difference", CELL)
    rows = pd.DataFrame(found)
    rows = rows[[any(isinstance(e, Estimate) and e.n for e in row) for row in rows.to_numpy()]]
    return rows.loc[sorted(rows.index, key=lambda key: (mix_order(key[0]), np.nan_to_num(key[1])))]


def shown_rho(results: Results, grid: Grids = None) -> float:
    """The ρ of a figure at one: the only one, else the one that SAM's held-out accuracy chooses, or the commonest."""
    runs = results.runs(grid)
    chosen, others = chosen_rho(runs), runs[runs.mix != "sgd"]
    return float((others if len(others) else runs).rho.mode()[0] if np.isnan(chosen) else chosen)


def swept(results: Results, grid: Grids = None) -> list[str]:
    """The updates that were trained at several ρ; raises NotMeasured where there is none."""
    runs = results.runs(grid)
    found = [mix for mix, rhos in runs[runs.mix != "sgd"].groupby("mix").rho if rhos.nunique() > 1]
    if not found:
        raise NotMeasured("each update was trained at one ρ, which was not chosen among others")
    return sorted(found, key=mix_order)


def rho_choice(results: Results, grid: Grids = None) -> pd.DataFrame:
    """Held-out accuracy by ρ, over the seeds that all ρ have, and the ρ that it chooses: a row an update that was
    trained at several."""
    mixes, runs = swept(results, grid), trainings(results.runs(grid))
    rows = pd.concat(part[part.seed.isin(held_out(runs, mix).index)] for mix, part in runs.groupby("mix"))
    found = estimates(rows, "validation_accuracy", CELL).unstack("rho").loc[mixes]
    found = found.dropna(axis=1, how="all").rename(columns="ρ = {:g}".format)
    return found.assign(chosen=[f"{chosen_rho(runs, mix):g}" for mix in mixes])


def document() -> pd.DataFrame:
    """The document's test accuracies, fractions by mix and ρ: the mean where a cell has two, NaN where it is open."""
    cells = pd.read_csv(DOCUMENT).groupby(["update", "rho"]).test_accuracy_percent.mean() / 100
    return cells.rename_axis(["mix", "rho"]).unstack("rho")


def beside_document(results: Results, grid: Grids = None) -> pd.DataFrame:
    """Test accuracy minus SGD's, a row an update: the document's, a column a ρ, and ours. `as coded`: what its
    published code applies where that is not what it names."""
    said = (document() - document().loc["sgd"]).drop("sgd").rename(columns="document, ρ = {:g}".format)
    said = said.map(lambda x: Estimate(x, n=1, unit="points", signed=True))
    ours = differences(results, "test_accuracy", grid).unstack("rho").rename(columns="here, ρ = {:g}".format)
    found = said.join(ours, how="outer").fillna("").rename_axis("mix")
    found.insert(0, "as coded", ["checkpoint 2+3" if mix == "checkpoint14" else "" for mix in found.index])
    return found.loc[sorted(found.index, key=mix_order)]


def by_setting(rows: pd.DataFrame) -> Iterator[tuple[str, Estimate]]:
    """The difference of `pairs` in each setting that they hold, with the setting in words."""
    found = estimates(rows, "difference", SETTING)
    for (*where, augment), estimate in found.items():
        yield setting_name(*where) + ", augmented" * augment, estimate
