"""The first document's tables, by data fraction and label noise: means and paired differences, each an Estimate.

Accuracies and shares are in percent, their differences in percentage points. A run that is missing or diverged has no
final numbers (NaN): it is counted in an estimate's `left_out`, never averaged.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from samlib.config import RunConfig, UserError
from samlib.runs import load_runs, load_table
from samlib.analysis.old_stats import (
    Estimate,
    correlation,
    epoch_reaching,
    mean_interval,
    paired_difference,
    within_correlation,
)
from samlib.study import Study

CELL = ["data_fraction", "noise_fraction"]  # a regime
DIFFERENCE = "SAM − SGD"
NAMES = {"sgd": "SGD", "sam": "SAM"}
NOTHING = Estimate(np.nan, np.nan, np.nan, 0)
SEEDS = ("seed", "data_seed")
# Fields that say what is measured, how often and with what resources, not what is trained.
MEASURED = (
    "eval_every", "probe_every", "persistence_steps", "persistence_window", "threshold_every", "sharpness_every",
    "curvature_every", "scan_every", "scan_rhos", "measure_samples", "state_seconds", "keep_weights",
    "threads", "graph",
)  # fmt: skip
PERCENT = (
    "train_accuracy", "eval_train_accuracy", "test_accuracy", "best_test_accuracy", "memorized", "corrected",
)  # fmt: skip
SHARPNESS = ("random_trained", "random_true", "ascent_trained", "ascent_true", "eigenvalue1", "trace")
SPEED = ("early", "middle", "final", "epoch_90")


def grid_runs(study: Study, root: str | Path, grid: str | None = None) -> pd.DataFrame:
    """One row a run of the grid, finished or not: configuration, status (done, diverged or missing), final numbers.

    Beside those of `load_runs`, with PERCENT in percent: gap = training - test accuracy on unaugmented images, against
    the labels trained on and the true ones; the last sharpness of each measure; `pair`, equal for runs that differ in
    the mix alone; and `cost_pair`, equal for runs that differ in the mix, the epochs and what is measured.
    """
    configs = study.configs(grid)
    rows = [{"run": c.run_id, **c.model_dump(mode="json"), "seed": c.seed} for c in configs]
    runs, results = pd.DataFrame(rows).set_index("run"), load_runs(root, [c.run_id for c in configs])
    columns = [*PERCENT, "test_loss", "best_epoch", "train_images", "flipped", "gradient_evaluations", "diverged_step"]
    runs = runs.join(results.reindex(columns=["status", *columns]))
    runs["status"] = runs["status"].fillna("missing")
    runs[columns] = runs[columns].astype(float)
    runs[list(PERCENT)] *= 100
    runs.loc[runs.status != "done", [*PERCENT, "test_loss", "best_epoch"]] = np.nan
    runs["gap"] = runs.eval_train_accuracy - runs.test_accuracy
    runs = runs.join(_last_sharpness(root, runs.index[runs.status == "done"]).reindex(columns=list(SHARPNESS)))
    for measure in ("random", "ascent"):  # on clean data they are the same labels
        runs[f"{measure}_true"] = runs[f"{measure}_true"].fillna(
            runs[f"{measure}_trained"].where(runs.noise_fraction == 0)
        )
    runs["pair"] = _key(configs, ("mix",))
    runs["cost_pair"] = _key(configs, ("mix", "epochs", *MEASURED))
    return runs


def _key(configs: Sequence[RunConfig], without: Sequence[str]) -> list[str]:
    return [json.dumps({k: v for k, v in c.model_dump(mode="json").items() if k not in without}) for c in configs]


def _last_sharpness(root: str | Path, ids: Sequence[str]) -> pd.DataFrame:
    """The last value of every measure, one row a run and one column a measure, as in SHARPNESS."""
    parts = []
    for name, label in (("sharpness", ["measure", "labels"]), ("hessian", ["quantity"])):
        table = load_table(name, root, ids)
        if len(table):
            table["column"] = table[label].agg("_".join, axis=1)
            parts.append(table.groupby(["run", "column"])["value"].last().unstack())
    return pd.concat(parts, axis=1) if parts else pd.DataFrame()


def check_regimes(runs: pd.DataFrame, where: str) -> None:
    """Raises UserError unless the runs are SGD and SAM over data fractions and noise, one setting a regime."""
    if set(runs.mix) != set(NAMES):
        raise UserError(f"{where} has the mixes {', '.join(sorted(set(runs.mix)))}; a grid of regimes has sgd and sam")
    for cell, part in runs.groupby([*CELL, "mix"]):
        others = [c for c in RunConfig.model_fields if c not in SEEDS and part[c].astype(str).nunique() > 1]
        if others:
            raise UserError(f"{where}: runs of one regime {cell} differ in {', '.join(others)}; give it one setting")


def with_curves(runs: pd.DataFrame, root: str | Path) -> pd.DataFrame:
    """The metrics of the finished and the diverged runs, PERCENT in percent, beside a run's regime and status."""
    metrics = load_table("metrics", root, runs.index)
    if metrics.empty:
        raise UserError(f"{root}: no run of this grid has an evaluation; `python -m samlib run STUDY` trains them")
    here = [name for name in PERCENT if name in metrics]
    metrics[here] *= 100
    return metrics.join(runs[[*CELL, *SEEDS, "mix", "epochs", "status"]], on="run")


def with_speed(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """`runs` with SPEED: test accuracy at the first evaluation after a tenth and half of the epochs and at the end,
    and the first evaluated epoch with at least 90 % of the final accuracy."""
    rows = {}
    for run, part in curves[curves.status == "done"].groupby("run"):
        epochs, accuracy = part.epoch.to_numpy(), part.test_accuracy.to_numpy()
        at = [accuracy[np.argmax(epochs >= share * epochs[-1])] for share in (0.1, 0.5, 1)]
        rows[run] = [*at, epoch_reaching(epochs, accuracy)]
    return runs.join(pd.DataFrame.from_dict(rows, orient="index", columns=list(SPEED), dtype=float))


def mean_of(values: pd.Series) -> Estimate:
    """The mean and its interval over what is there; n = 0 where nothing is."""
    used = values.dropna()
    estimate = mean_interval(used) if len(used) else NOTHING
    return estimate._replace(left_out=len(values) - len(used))


def summary(runs: pd.DataFrame, values: Sequence[str], by: Sequence[str] = CELL) -> pd.DataFrame:
    """Rows: each group of `by`, times SGD, SAM and their paired difference; columns: the values; cells: Estimates."""
    rows = {}
    for cell, part in runs.groupby(list(by)):
        for mix, name in NAMES.items():
            rows[*cell, name] = {value: mean_of(part.loc[part.mix == mix, value]) for value in values}
        difference = {value: paired_difference(part, value, "mix", "sam", "sgd", ["pair"]) for value in values}
        rows[*cell, DIFFERENCE] = difference
    return _frame(rows, [*by, "mix"])


def pooled(runs: pd.DataFrame, value: str) -> pd.DataFrame:
    """SAM - SGD by label noise over the pairs of all data fractions, each pair counted as independent."""
    table = summary(runs, [value], ["noise_fraction"])
    return table.xs(DIFFERENCE, level="mix", drop_level=False)


def _frame(rows: dict[tuple, dict[str, Estimate]], names: Sequence[str]) -> pd.DataFrame:
    index = (
        pd.MultiIndex.from_tuples(rows, names=names)
        if len(names) > 1
        else pd.Index([k[0] for k in rows], name=names[0])
    )
    return pd.DataFrame(list(rows.values()), index=index)


def scaling(runs: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy by data fraction, and what each step to more data adds over pairs of one seed; rows: noise, mix."""
    rows, sizes = {}, sorted(runs.data_fraction.unique())
    for (noise, mix), part in runs.groupby(["noise_fraction", "mix"], sort=False):
        of_size = {
            f"{100 * size:g} %": mean_of(part.loc[part.data_fraction == size, "test_accuracy"]) for size in sizes
        }
        part = part.assign(data_seed=part.data_seed.fillna(part.seed))
        for a, b in zip(sizes, sizes[1:], strict=False):
            step = paired_difference(part, "test_accuracy", "data_fraction", b, a, list(SEEDS))
            of_size[f"{100 * a:g} % → {100 * b:g} %"] = step
        rows[noise, NAMES[mix]] = of_size
    return _frame(rows, ["noise_fraction", "mix"]).sort_index(level=0, sort_remaining=False)


def early_stopping(runs: pd.DataFrame, by: Sequence[str] = CELL) -> pd.DataFrame:
    """By regime: SAM's gain; what stopping at the epoch that is best on the test set would add to SGD; what is left."""
    rows = {}
    for cell, part in runs.groupby(list(by)):
        sgd = part[part.mix == "sgd"]
        mixed = part.assign(value=part.best_test_accuracy.where(part.mix == "sgd", part.test_accuracy))
        rows[cell] = {
            "gain": paired_difference(part, "test_accuracy", "mix", "sam", "sgd", ["pair"]),
            "stopped": mean_of(sgd.best_test_accuracy - sgd.test_accuracy),
            "left": paired_difference(mixed, "value", "mix", "sam", "sgd", ["pair"]),
            "both": paired_difference(part, "best_test_accuracy", "mix", "sam", "sgd", ["pair"]),
        }
    return _frame(rows, by)


def equal_cost(runs: pd.DataFrame, twice: pd.DataFrame, by: Sequence[str] = CELL) -> pd.DataFrame:
    """By regime: SGD, SAM, SGD with twice the epochs, and SAM - SGD for the same epochs and for the same cost."""
    both = pd.concat([runs, twice[twice.mix == "sgd"].assign(mix="twice")])
    rows = {}
    for cell, part in both[both.data_fraction.isin(runs.data_fraction.unique())].groupby(list(by)):
        means = {mix: mean_of(part.loc[part.mix == mix, "test_accuracy"]) for mix in ("sgd", "sam", "twice")}
        for name, other in (("same_epochs", "sgd"), ("same_cost", "twice")):
            means[name] = paired_difference(part, "test_accuracy", "mix", "sam", other, ["cost_pair"])
        rows[cell] = means
    return _frame(rows, by)


class Signs(NamedTuple):
    """How many of n differences are above and below zero; `shown`: with an interval that excludes zero."""

    n: int
    above: int
    below: int
    shown_above: int
    shown_below: int


def signs(differences: Iterable[Estimate]) -> Signs:
    there = [e for e in differences if e.n]
    above, below = sum(e.mean > 0 for e in there), sum(e.mean < 0 for e in there)
    return Signs(len(there), above, below, sum(e.low > 0 for e in there), sum(e.high < 0 for e in there))


def verdict(accuracy: Estimate, sharpness: Estimate) -> str:
    """The rule: SAM - SGD in test accuracy and in sharpness; each counts only where its interval excludes zero."""
    if np.isnan(accuracy.half):
        return "undecided: fewer than two pairs"
    words = ["flatter" if sharpness.high < 0 else "sharper" if sharpness.low > 0 else ""]
    words.append("better" if accuracy.low > 0 else "worse" if accuracy.high < 0 else "")
    return " and ".join(word for word in words if word) or "no difference shown"


def verdicts(runs: pd.DataFrame, sharpness: str = "random_trained") -> pd.Series:
    """`verdict` of every regime."""
    differences = summary(runs, ["test_accuracy", sharpness]).xs(DIFFERENCE, level="mix")
    return differences.apply(lambda row: verdict(row.test_accuracy, row[sharpness]), axis=1)


def correlations(runs: pd.DataFrame, measures: Sequence[str], value: str = "gap") -> pd.DataFrame:
    """Pearson's correlation of each measure with the value over finished runs; and less each regime's means."""
    rows = {}
    for measure in measures:
        used = runs.dropna(subset=[measure, value])
        x, y = used[measure], used[value]
        within = within_correlation(x, y, used.groupby(CELL).ngroup()) if len(used) else NOTHING
        rows[measure] = {"all runs": correlation(x, y), "within regimes": within}
    return pd.DataFrame(list(rows.values()), index=pd.Index(rows, name="measure"))
