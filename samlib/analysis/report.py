"""A study's tables as markdown, for reading without a notebook: `python -m samlib report STUDY`."""

from pathlib import Path

import numpy as np
import pandas as pd

from samlib.analysis import regimes
from samlib.config import RunConfig, UserError
from samlib.analysis.regimes import CELL, DIFFERENCE
from samlib.analysis.old_stats import Estimate
from samlib.study import Study

MARK = "★"  # after a difference whose interval excludes zero
# Column: what it is called, and its digits after the point (None: three significant ones).
LABELS = {
    "test_accuracy": ("test accuracy, %", 1), "eval_train_accuracy": ("training accuracy, %", 1),
    "best_test_accuracy": ("best epoch's test accuracy, %", 1), "gap": ("generalization gap, points", 1),
    "memorized": ("flipped labels memorized, %", 1), "corrected": ("flipped labels corrected, %", 1),
    "random_trained": ("random-direction sharpness, nats", None), "ascent_trained": ("ascent sharpness, nats", None),
    "random_true": ("random, true labels, nats", None), "ascent_true": ("ascent, true labels, nats", None),
    "eigenvalue1": ("largest Hessian eigenvalue", None), "trace": ("Hessian trace", None),
    "early": ("early (10 % of epochs), %", 1), "middle": ("middle (50 %), %", 1), "final": ("final, %", 1),
    "epoch_90": ("epoch that reaches 90 % of the final", 1), "data_fraction": ("data", None),
    "noise_fraction": ("label noise", None), "mix": ("optimizer", None), "sgd": ("SGD, %", 1), "sam": ("SAM, %", 1),
    "twice": ("SGD, twice the epochs, %", 1), "gain": ("SAM − SGD, final", 1),
    "stopped": ("SGD: best over final", 1), "left": ("SAM final − SGD best", 1), "both": ("SAM best − SGD best", 1),
    "same_epochs": ("SAM − SGD, same epochs", 1), "same_cost": ("SAM − SGD, same gradient evaluations", 1),
}  # fmt: skip


def percent(fraction: float) -> str:
    return f"{100 * fraction:g} %"


def text(estimate: Estimate, digits: int | None = 1, difference: bool = False) -> str:
    """An estimate as a table shows it: mean ± half the interval (n), MARK where a difference's interval excludes 0."""
    if estimate.n == 0:
        return "–"
    if digits is None:
        sizes = [abs(v) for v in (estimate.mean, estimate.half) if v and not np.isnan(v)]
        digits = int(np.clip(2 - np.floor(np.log10(max(sizes, default=1))), 0, 6))
    mark = f" {MARK}" if difference and estimate.excludes_zero else ""
    return estimate.format(1, digits, signed=difference) + mark


def bounds(correlation: Estimate) -> str:
    """A correlation with the ends of its interval, which is not symmetric, and MARK where that excludes zero."""
    if np.isnan(correlation.mean):
        return f"not defined (n={correlation.n})"
    if np.isnan(correlation.half):
        return f"{correlation.mean:+.2f} (n={correlation.n}, no interval)"
    mark = f" {MARK}" if correlation.excludes_zero else ""
    return f"{correlation.mean:+.2f} ({correlation.low:+.2f} to {correlation.high:+.2f}, n={correlation.n}){mark}"


def markdown(table: pd.DataFrame) -> str:
    """A table of estimates as a markdown table; difference rows and columns are signed and marked."""
    names = [*table.index.names, *table.columns]
    lines = ["| " + " | ".join(LABELS.get(name, (name,))[0] for name in names) + " |", "|---" * len(names) + "|"]
    for index, row in table.iterrows():
        keys = index if isinstance(index, tuple) else (index,)
        cells = [percent(key) if name in CELL else str(key) for name, key in zip(table.index.names, keys, strict=True)]
        for column, value in row.items():
            label, digits = LABELS.get(column, (column, 1))
            difference = DIFFERENCE in keys or "−" in label or "→" in label
            cells.append(text(value, digits, difference) if isinstance(value, Estimate) else str(value))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_setting(runs: pd.DataFrame) -> pd.DataFrame:
    """Final test accuracy by whatever the runs vary in, but for the seeds and what is measured; cells: Estimates."""
    fields = [f for f in RunConfig.model_fields if f not in (*regimes.SEEDS, *regimes.MEASURED)]
    varying = [f for f in fields if runs[f].astype(str).nunique() > 1] or ["mix"]
    rows = {}
    for setting, part in runs.assign(**runs[varying].astype(object)).groupby(varying, sort=False, dropna=False):
        rows[setting] = {name: regimes.mean_of(part[name]) for name in ("test_accuracy", "eval_train_accuracy")}
    return pd.DataFrame(list(rows.values()), index=pd.MultiIndex.from_tuples(rows, names=varying))


def regime_tables(study: Study, root: str | Path, grid: str, twice: str | None) -> dict[str, pd.DataFrame]:
    """The first document's tables and those beyond it, by title. Raises UserError where the grid is of another kind."""
    runs = regimes.grid_runs(study, root, grid)
    regimes.check_regimes(runs, f"{study.name}: grid {grid!r}")
    runs = regimes.with_speed(runs, regimes.with_curves(runs, root))
    measured = [name for name in regimes.SHARPNESS if runs[name].notna().any()]
    tables = {
        "Accuracy": regimes.summary(runs, ["test_accuracy", "eval_train_accuracy", "best_test_accuracy"]),
        "SAM − SGD over all data sizes": regimes.pooled(runs, "test_accuracy"),
        "Sharpness and generalization gap": regimes.summary(runs, ["gap", *measured]),
        "Speed": regimes.summary(runs, list(regimes.SPEED)),
        "Scaling with data": regimes.scaling(runs),
        "Early stopping": regimes.early_stopping(runs),
    }
    if runs.noise_fraction.any():
        noisy = runs[runs.noise_fraction > 0]
        tables["Flipped training labels, at the end"] = regimes.summary(noisy, ["memorized", "corrected"])
    if twice is not None:
        tables["Equal cost"] = regimes.equal_cost(runs, regimes.grid_runs(study, root, twice))
    return tables


NAMED = 8  # missing runs told by name, at most


def state(runs: pd.DataFrame) -> str:
    """In words: how many runs are done, and by name those that diverged or are missing (the first, where many are)."""
    counts = runs.status.value_counts()
    lines = [f"{counts.get('done', 0)} of {len(runs)} runs are done."]
    for status in ("diverged", "missing"):
        some = runs.index[runs.status == status]
        if len(some):
            lines += ["", f"{len(some)} {status}, in no mean below:", ""]
            named = some if status == "diverged" or len(some) <= NAMED else some[: NAMED - 1]
            lines += [f"- {run}" for run in named]
            if len(named) < len(some):
                lines.append(f"- and {len(some) - len(named)} more, which `python -m samlib status` names")
    return "\n".join(lines)


def report(study: Study, root: str | Path = "runs/local", grid: str | None = None) -> str:
    """The tables of one grid, or of all, of a study as markdown. Raises UserError for an unknown grid or root."""
    parts = [
        f"# {study.title}",
        f"Data: {study.dataset}. Each cell: mean ± half of the 95 % t interval (n runs, or pairs of one seed); a "
        f"single run has no interval; {MARK}: a difference whose interval excludes zero.",
    ]
    partners = {a.grid: a.parameters.get("twice") for a in study.notebooks if a.notebook == "05_data_regimes"}
    for name in study.grids if grid is None else [grid]:
        runs = regimes.grid_runs(study, root, name)
        parts += [f"## Grid {name}", state(runs)]
        if not (runs.status == "done").any():
            continue
        try:
            regimes.check_regimes(runs, name)
            tables = regime_tables(study, root, name, partners.get(name)) if runs[CELL].nunique().max() > 1 else None
        except UserError:  # a grid of another kind
            tables = None
        for title, table in (tables or {"Accuracy": by_setting(runs)}).items():
            parts += [f"### {title}", markdown(table)]
    return "\n\n".join(parts)
