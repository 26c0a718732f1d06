"""Tables of the checkpoint ablation: every update against SGD, SAM and its controls, over ρ, beside the document's."""

from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pandas as pd

from samlib import PROJECT
from samlib.analysis.results import (
    REGIME,
    NotMeasured,
    Results,
    chosen_rho,
    estimates,
    in_order,
    mix_order,
    pairs,
    trainings,
)
from samlib.analysis.stats import Estimate

DOCUMENT = PROJECT / "notebooks/reference/checkpoint_ablation.csv"  # CIFAR-100, one run a cell
SHARPNESS = {  # of the loss on the labels trained on: the measure and the logits
    "random directions": ("random", "raw"),
    "random directions, normalized logits": ("random", "normalized"),
    "ascent": ("ascent", "raw"),
    "ascent, normalized logits": ("ascent", "normalized"),
}
CELL, SETTING = ("mix", "rho"), (*REGIME, "rho", "augment")


def sharpness(results: Results, name: str, grid: str | list[str] | None = None) -> pd.DataFrame:
    """One of SHARPNESS at the end of each run, `value` in nats; the ascent at the radius that all runs have in common
    (probe_rho), or at the run's own. Raises NotMeasured."""
    rows, (measure, logits) = results.last("sharpness", grid), SHARPNESS[name]
    common = pd.to_numeric(rows.probe_rho).fillna(rows.rho)
    of = (rows.measure == measure) & (rows.logits == logits) & (rows.labels == "trained")
    return rows[of & ((rows.setting == common) | (measure == "random"))]


def paired(results: Results, a: str, b: str, value: str, grid: str | list[str] | None = None) -> pd.DataFrame:
    """`pairs` of two updates in an accuracy or in one of SHARPNESS; of an ascent, at equal radii alone."""
    if value not in SHARPNESS:
        return results.pairs(a, b, value, grid)
    return pairs(sharpness(results, value, grid), a, b, "value", also=("setting",))


def differences(results: Results, value: str, baseline: str = "sgd", grid: str | None = None) -> pd.Series:
    """Each update minus the baseline, paired by seed at the same ρ (SGD has none): an Estimate by mix and ρ."""
    mixes = [mix for mix in results.runs(grid).mix.unique() if mix not in ("sgd", baseline)]
    rows = [pair for mix in mixes if len(pair := paired(results, mix, baseline, value, grid))]
    if not rows:
        raise NotMeasured(f"no finished run has a partner with the update {baseline}")
    return ordered(estimates(pd.concat(rows), "difference", CELL, "nats" if value in SHARPNESS else None))


def levels(results: Results, value: str, grid: str | list[str] | None = None) -> pd.Series:
    """The mean of an accuracy or of one of SHARPNESS: an Estimate by mix and ρ, which for SGD is NaN."""
    if value not in SHARPNESS:
        return ordered(results.means(value, CELL, grid))
    rows = trainings(sharpness(results, value, grid), also=("setting",))
    return ordered(estimates(rows.assign(rho=rows.rho.mask(rows.mix == "sgd")), "value", CELL, "nats"))


def ordered(table: pd.Series | pd.DataFrame) -> pd.Series | pd.DataFrame:
    """A table by mix and ρ, in the order of mixes, then of ρ."""
    keys = [(mix_order(mix), np.nan_to_num(rho)) for mix, rho in table.index]
    return table.iloc[sorted(range(len(keys)), key=keys.__getitem__)]


def shown_rho(results: Results, grid: str | None = None) -> float:
    """The ρ of a figure at one: the only one, else the one that SAM's held-out accuracy chooses, or the commonest."""
    runs = results.runs(grid)
    chosen, others = chosen_rho(runs).get("", np.nan), runs[runs.mix != "sgd"]
    return float((others if len(others) else runs).rho.mode()[0] if np.isnan(chosen) else chosen)


def accuracy(results: Results, grid: str | None = None) -> pd.DataFrame:
    """Final accuracies, and the test accuracy minus SGD's and SAM's: a row a mix and ρ."""
    names = ("test_accuracy", "eval_train_accuracy", "memorized", "memorized_chance")
    table = {name: levels(results, name, grid) for name in names}
    for mix in ("sgd", "sam"):
        with suppress(NotMeasured):
            table[f"minus {mix.upper()}"] = differences(results, "test_accuracy", mix, grid)
    return ordered(pd.DataFrame(table))


def sharpness_levels(results: Results, grid: str | None = None) -> pd.DataFrame:
    """Each of SHARPNESS: a row a mix and ρ."""
    return ordered(pd.DataFrame({name: levels(results, name, grid) for name in SHARPNESS}))


def rho_choice(results: Results, grid: str | list[str] | None = None) -> pd.DataFrame:
    """Held-out accuracy by ρ and the ρ that it chooses: a row an update that was trained at several."""
    runs, held_out = results.runs(grid), results.means("validation_accuracy", CELL, grid)
    swept = in_order(mix for mix, rhos in runs[runs.mix != "sgd"].groupby("mix").rho if rhos.nunique() > 1)
    if not swept:
        raise NotMeasured("each update was trained at one ρ, which was not chosen among others")
    table = held_out.unstack("rho").loc[swept].dropna(axis=1, how="all").rename(columns=lambda rho: f"ρ = {rho:g}")
    return table.assign(chosen=[f"{chosen_rho(runs, mix)['']:g}" for mix in swept])


def document() -> pd.DataFrame:
    """The document's test accuracies, fractions by mix and ρ: the mean where a cell has two, NaN where it is open."""
    cells = pd.read_csv(DOCUMENT).groupby(["update", "rho"]).test_accuracy_percent.mean() / 100
    return cells.rename_axis(["mix", "rho"]).unstack("rho")


def beside_document(results: Results, grid: str | None = None) -> pd.DataFrame:
    """Test accuracy minus SGD's, a row an update: the document's, a column a ρ, and ours. `as coded`: what its
    published code applies where that is not what it names."""
    said = (document() - document().loc["sgd"]).drop("sgd")
    said = said.map(lambda x: Estimate(x, n=1, unit="points", signed=True)).rename(
        columns=lambda r: f"document, ρ = {r:g}"
    )
    ours = differences(results, "test_accuracy", grid=grid).unstack("rho").rename(columns=lambda r: f"here, ρ = {r:g}")
    table = said.join(ours, how="outer").fillna("").rename_axis("mix")
    table.insert(0, "as coded", ["checkpoint 2+3" if mix == "checkpoint14" else "" for mix in table.index])
    return table.loc[in_order(table.index)]


def by_setting(rows: pd.DataFrame, value: str) -> Iterator[tuple[str, Estimate]]:
    """The difference of `paired` rows in each setting that they hold, with the setting in words."""
    found = estimates(rows, "difference", SETTING, "nats" if value in SHARPNESS else None)
    for (*where, augment), estimate in found.items():
        yield words(*where) + ", augmented" * augment, estimate


def words(data: float, noise: float, rho: float) -> str:
    """A setting, as findings name it."""
    return f"{100 * data:g} % of the data, {100 * noise:g} % flipped, ρ = {rho:g}"
