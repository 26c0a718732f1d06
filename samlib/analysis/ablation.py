"""Tables of the checkpoint ablation and of large batches: from runs to paired differences, with interval and n."""

import numpy as np
import pandas as pd

from samlib.config import RunConfig
from samlib.analysis.old_stats import Estimate, mean_interval, paired_difference

ESTIMATE, NOTHING = list(Estimate._fields), Estimate(np.nan, np.nan, np.nan, 0)


def mix_order(mix: str) -> tuple:
    """SGD, SAM, the checkpoint subsets by size, then the other rules: the order of every table and figure."""
    if mix in ("sgd", "sam"):
        return 0, 0, mix == "sam", ""
    return (1, len(mix), 0, mix) if mix.startswith("checkpoint") else (2, 0, 0, mix)


def pair_key(frame: pd.DataFrame, but: tuple[str, ...] = ("mix", "rho")) -> pd.Series:
    """Every field of the configuration `but` these, the seed included, as one text: what two paired runs share."""
    rows = frame[[name for name in RunConfig.model_fields if name not in but]].itertuples(index=False)
    return pd.Series([str(tuple(row)) for row in rows], index=frame.index, dtype=str)


def estimate(values: pd.Series) -> Estimate:
    """mean_interval of the values that are there; NaN ones (diverged, or without a partner) count as `left_out`."""
    kept = values.astype(float).dropna()
    return (mean_interval(kept) if len(kept) else NOTHING)._replace(left_out=len(values) - len(kept))


def _estimates(frame: pd.DataFrame, value: str) -> pd.DataFrame:
    rows = [(*cell, *estimate(values)) for cell, values in frame.groupby(["mix", "rho"], dropna=False)[value]]
    rows.sort(key=lambda row: (np.nan_to_num(row[1], nan=-1), mix_order(row[0])))
    return pd.DataFrame(rows, columns=["mix", "rho", *ESTIMATE])


def means(frame: pd.DataFrame, value: str = "test_accuracy") -> pd.DataFrame:
    """The value's estimate by mix and rho (for SGD NaN: it has none); `left_out` counts the diverged runs."""
    sgd = frame[frame.mix == "sgd"].assign(pair=pair_key, rho=np.nan).drop_duplicates("pair")
    return _estimates(pd.concat([sgd, frame[frame.mix != "sgd"]]), value)


def pairs(frame: pd.DataFrame, value: str = "test_accuracy", baseline: str = "sgd") -> pd.DataFrame:
    """One row a run that is not SGD: `difference`, its value minus that of the baseline run with the same other fields
    (the rho too, unless it is SGD, which has none; and `setting`, how the value was measured, where there is such a
    column); NaN where one of the two is missing or diverged."""
    frame = frame.assign(pair=pair_key)
    on = ["pair", *(["setting"] if "setting" in frame else []), *(["rho"] if baseline != "sgd" else [])]
    base = frame[frame.mix == baseline].drop_duplicates(on)[[*on, value]]
    rows = frame[~frame.mix.isin(["sgd", baseline])]
    rows = rows.merge(base, on=on, how="left", suffixes=("", "_baseline"), validate="many_to_one")
    return rows.assign(difference=rows[value].astype(float) - rows[f"{value}_baseline"].astype(float))


def differences(frame: pd.DataFrame, value: str = "test_accuracy", baseline: str = "sgd") -> pd.DataFrame:
    """The estimate of `pairs` by mix and rho, in the value's own unit."""
    return _estimates(pairs(frame, value, baseline), "difference")


def pick(table: pd.DataFrame, mix: str, rho: float) -> Estimate:
    """One cell of such a table; n = 0 where it has none."""
    found = table[(table.mix == mix) & (table.rho.isna() if np.isnan(rho) else table.rho == rho)]
    return Estimate(*next(found[ESTIMATE].itertuples(index=False))) if len(found) else NOTHING


def verdict(difference: Estimate, sign: int = 1) -> str:
    """Of a claim that the difference has this sign: it holds or is contradicted where the interval says so."""
    if difference.excludes_zero:
        return "holds" if difference.mean * sign > 0 else "contradicted"
    return "undecided" if difference.n else "not measured"


def document_cells(reference: pd.DataFrame) -> pd.DataFrame:
    """The document's table as read (rho, update, test_accuracy_percent), one row a cell: rho, mix, `values` (fractions:
    two where it gives two, none where it leaves the cell open), `to_sgd` (their mean minus SGD's at the same rho)."""
    cells = reference.rename(columns={"update": "mix"}).groupby(["rho", "mix"], sort=False).test_accuracy_percent
    cells = cells.agg(lambda x: tuple(x.dropna() / 100)).rename("values").reset_index()
    mean = cells["values"].map(lambda v: np.mean(v) if v else np.nan)
    sgd = cells.rho.map(mean[cells.mix == "sgd"].set_axis(cells.rho[cells.mix == "sgd"]))
    return cells.assign(to_sgd=mean - sgd)


def with_sharpness(frame: pd.DataFrame, sharpness: pd.DataFrame) -> pd.DataFrame:
    """The finished runs beside their sharpness at the last epoch: a row a run, `measure`, `labels` and `setting`."""
    if sharpness.empty:
        return frame.iloc[:0].assign(measure="", labels="", setting=np.nan, sharpness=np.nan)
    last = sharpness[sharpness.epoch == sharpness.groupby("run").epoch.transform("max")].set_index("run")
    last = last[["measure", "labels", "setting", "value"]].rename(columns={"value": "sharpness"})
    return frame[frame.status == "done"].join(last, how="inner")


def batch_difference(frame: pd.DataFrame, value: str, a: tuple, b: tuple) -> Estimate:
    """The paired difference, (batch size, learning rate) a minus b, between runs that share all but these and how
    often they are probed and evaluated."""
    setting = [str(pair) for pair in zip(frame.batch_size.tolist(), frame.lr.tolist(), strict=True)]
    sides = frame.assign(setting=setting, pair=pair_key(frame, ("batch_size", "lr", "probe_every", "eval_every")))
    return paired_difference(sides, value, "setting", str(a), str(b), ["pair"])


def batch_learning(frame: pd.DataFrame, probes: pd.DataFrame, metrics: pd.DataFrame) -> pd.DataFrame:
    """The frame with columns that say how each run learned; NaN where it diverged or the rows are not there.

    `first_norm`, `mean_norm`: log10 of the mini-batch gradient's norm, at step 0 and as mean over the probes.
    `loss_by_epoch`, `loss_by_step`: the mean training loss (unaugmented) over the epochs, and over the updates, that
    all runs have in common, interpolated linearly between evaluations; `log_loss_by_...`: the mean of its log10.
    """
    done, frame = frame.index[frame.status == "done"], frame.assign(first_norm=np.nan, mean_norm=np.nan)
    if len(probes):
        probes = probes[probes.run.isin(done)].set_index("run")
        frame["first_norm"] = np.log10(probes.grad_norm[probes.step == 0])
        frame["mean_norm"] = np.log10(probes.grad_norm).groupby("run").mean()
    curves = {run: rows for run, rows in metrics.groupby("run") if run in done} if len(metrics) else {}
    for x in ("epoch", "step"):
        ends = [(rows[x].min(), rows[x].max()) for rows in curves.values()] or [(0, 0)]
        low, high = max(a for a, _ in ends), min(b for _, b in ends)
        grid = np.linspace(low, high, 101) if low <= high else np.array([np.nan])
        for name, scale in ((f"loss_by_{x}", np.asarray), (f"log_loss_by_{x}", np.log10)):
            mean = {run: np.interp(grid, rows[x], scale(rows.eval_train_loss)).mean() for run, rows in curves.items()}
            frame[name] = pd.Series(mean, dtype=float)
    return frame
