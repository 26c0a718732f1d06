"""Tables of the checkpoint ablation: every update against SGD, SAM and its controls, over ρ, beside the document's."""

from collections.abc import Iterable, Iterator
from contextlib import suppress

import numpy as np
import pandas as pd

from samlib import PROJECT
from samlib.analysis.results import (
    Grids,
    NotMeasured,
    Results,
    chosen_rho,
    estimates,
    held_out,
    mix_order,
    setting_name,
    trainings,
)  # fmt: skip
from samlib.analysis.stats import Estimate

DOCUMENT = PROJECT / "notebooks/reference/checkpoint_ablation.csv"  # CIFAR-100, one run a cell
ACCURACIES = ("test_accuracy", "eval_train_accuracy", "memorized", "memorized_chance")
CELL, SETTING = ("mix", "rho"), ("data_fraction", "noise_fraction", "rho", "augment")


def paired(results: Results, value: str, grid: Grids = None, baseline: str = "sgd") -> pd.DataFrame:
    """The `pairs` of each update and the baseline, of one seed and at the same ρ (SGD has none)."""
    mixes = [mix for mix in results.runs(grid).mix.unique() if mix not in ("sgd", baseline)]
    rows = [pair for mix in mixes if len(pair := results.pairs(mix, baseline, value, grid))]
    if not rows:
        raise NotMeasured(f"no finished run has a partner with the update {baseline}")
    return pd.concat(rows)


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
