"""What the second document claims of the geometry, as tables: from the rows that runs keep, chance levels beside them.

Shares are fractions. Sources of the claims: the document "Geometry SAM"; its tables are in notebooks/reference/.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from samlib.config import UserError
from samlib.probes import BINS, CHECKPOINTS
from samlib.runs import load_runs, load_table
from samlib.sam import checkpoint_codes
from samlib.analysis.old_stats import correlation, expected_intersection, within_correlation
from samlib.study import Study, relative

# The field of a configuration that makes a table.
MADE_BY = dict.fromkeys(("probes", "layers"), "probe_every") | dict.fromkeys(
    ("overlaps", "intersections"), "persistence_steps"
)
MADE_BY |= dict.fromkeys(("hessian", "diagonal", "prediction", "convergence"), "curvature_every")
MADE_BY |= {"thresholds": "threshold_every", "scan": "scan_every", "sharpness": "sharpness_every"}


def load(
    path: str | Path, root: str | Path, grid: str, tables: tuple[str, ...], run: int | None = None
) -> tuple[Study, pd.DataFrame, dict[str, pd.DataFrame]]:
    """The study, the finished runs of its grid (or only its `run`-th, from 0), and their tables by name.

    Raises UserError that says what is missing, and which study makes it: the runs, or a table of one of them.
    """
    study = Study.load(path)
    shown, configs = relative(study.path), study.configs(grid)
    if run is not None:
        if not 0 <= run < len(configs):
            raise UserError(f"run: found {run}; the grid {grid!r} of {shown} has the runs 0 to {len(configs) - 1}")
        configs = configs[run : run + 1]
    runs = load_runs(root, [config.run_id for config in configs])
    if runs.empty:
        wanted = f"the run {configs[0].run_id}" if len(configs) == 1 else f"any of the {len(configs)} runs"
        raise UserError(f"{root} lacks {wanted} of the grid {grid!r}; `python -m samlib run {shown}` makes it")
    found = {name: load_table(name, root, runs.index) for name in tables}
    for name, table in found.items():
        if lacking := sorted(set(runs.index[runs.status == "done"]) - set(table.run)) or table.empty:
            field = MADE_BY[name]
            makers = [g for g in study.grids if any(getattr(c, field) for c in study.grids[g])]
            maker = f"the grid {makers[0]!r} of {shown}" if makers else "the grid 'geometry' of studies/quick.yaml"
            who = lacking[0] if isinstance(lacking, list) else runs.index[0]
            raise UserError(f"{who} has no table {name!r}: its {field} is not set, or it diverged; {maker} makes one")
    return study, runs, found


def source(study: Study, runs: pd.DataFrame) -> str:
    """The caption of a figure on these runs: the dataset honestly, how much of it, the model, how many runs."""
    first, rhos = runs.iloc[0], ", ".join(f"{rho:g}" for rho in sorted(runs.rho.unique()))
    noise = f" with {100 * first.noise_fraction:g} % of the labels flipped" if first.noise_fraction else ""
    many = "one run" if len(runs) == 1 else f"n = {len(runs)} runs"
    return (
        f"{study.dataset}, {100 * first.data_fraction:g} % of the training images{noise}; {first.model} of width "
        f"{first.width}; {first.mix}, ρ = {rhos}, batch {first.batch_size}; {many}"
    )


def of_active(probes: pd.DataFrame) -> pd.DataFrame:
    """The probes with checkpoints and ratio bins as shares of the active parameters instead of all."""
    columns = [*CHECKPOINTS[1:], *BINS]
    return probes.assign(**probes[columns].div(1 - probes.inactive, axis=0))


def by_kind(layers: pd.DataFrame) -> pd.DataFrame:
    """Shares by kind of layer: the checkpoints of the kind's active parameters, inactive of all of them."""
    counts = layers.groupby(["epoch", "kind"], as_index=False)[["parameters", *CHECKPOINTS]].sum()
    return layer_shares(counts)


def layer_shares(counts: pd.DataFrame) -> pd.DataFrame:
    """Counts as shares: the checkpoints of the active parameters (NaN where there are none), inactive of all."""
    active = counts.parameters - counts.inactive
    shares = counts[list(CHECKPOINTS[1:])].div(active.where(active > 0), axis=0)
    return counts.assign(active=active, inactive=counts.inactive / counts.parameters, **shares)


def reference_steps(table: pd.DataFrame, wanted: int | None, owner: str) -> list[int]:
    """The reference steps to show: all, or the one wanted. Raises UserError where that was never probed."""
    steps = sorted(int(step) for step in table.reference_step.unique())
    if wanted is not None and wanted not in steps:
        raise UserError(
            f"reference_step: step {wanted} was no reference of {owner}, its references are {steps}; "
            f"a study whose persistence_steps hold {wanted} makes it"
        )
    return steps if wanted is None else [wanted]


def persistence(overlaps: pd.DataFrame) -> pd.DataFrame:
    """Experiment 2: the overlap as a share of the reference set and of all parameters; its chance level; the lift.

    Chance: two independent random sets of these sizes among the active parameters, since the others cannot be members.
    """
    expected = overlaps.reference_size * overlaps["size"] / overlaps.active
    return overlaps.assign(
        share=overlaps.overlap / overlaps.reference_size,
        share_of_all=overlaps.overlap / overlaps.parameters,
        expected_share=expected / overlaps.reference_size,
        lift=overlaps.overlap / expected,
    )


def lift_of_layers(layers: pd.DataFrame, references: list[int]) -> pd.DataFrame:
    """The lift that two sets have when they are independent within every layer but layers differ in their shares.

    From the layers' counts at the last probed epoch start up to each reference, against every later one.
    """
    frame, rows = layer_shares(layers), []
    members = frame.pivot_table(index="step", columns="layer", values="checkpoint1", aggfunc="first")
    active = frame.pivot_table(index="step", columns="layer", values="active", aggfunc="first")
    for reference in references:
        start = members.index[members.index <= reference].max()
        for step in members.index[members.index > reference]:
            both = (members.loc[start] * members.loc[step] * active.loc[step]).sum()
            sizes = [(members.loc[s] * active.loc[step]).sum() for s in (start, step)]
            lift = both * active.loc[step].sum() / (sizes[0] * sizes[1])
            rows.append({"reference_step": reference, "step": step, "lift": lift})
    return pd.DataFrame(rows, columns=["reference_step", "step", "lift"])


def running_intersection(intersections: pd.DataFrame) -> pd.DataFrame:
    """Experiment 3: the running intersection as a share of its first set, and the same for independent random sets.

    Independent sets of shares p_1..p_k of the active parameters share p_1 p_2 ... p_k of them: p^k for one share p.
    """
    parts = []
    for _, rows in intersections.sort_values("steps").groupby("reference_step"):
        active = rows.active.mean()
        expected = [expected_intersection(rows["size"].iloc[: k + 1], active) for k in range(len(rows))]
        first = rows["size"].iloc[0]
        parts.append(rows.assign(share=rows.intersection / first, expected_share=np.array(expected) / first))
    return pd.concat(parts, ignore_index=True)


def at_rest(convergence: pd.DataFrame) -> pd.DataFrame:
    """By epoch, over the active parameters: the share that moves, and the share whose gradient differs from zero.

    `not_at_zero` corrects the share of significant gradients for the 5 % that chance gives: (s - 0.05) / 0.95, a lower
    bound, since a test of eight pieces misses small gradients.
    """
    rows = []
    for epoch, part in convergence[convergence.checkpoint > 0].groupby("epoch"):
        n = part.parameters.sum()
        moving, significant = ((part[c] * part.parameters).sum() / n for c in ("moving", "significant"))
        corrected = max(0.0, (significant - 0.05) / 0.95)
        row = {"epoch": epoch, "lr": part.lr.iloc[0], "active": n, "moving": moving, "significant": significant}
        rows.append(row | {"not_at_zero": corrected})
    return pd.DataFrame(rows)


def thresholds_with_chance(thresholds: pd.DataFrame) -> pd.DataFrame:
    """Project 1: the share of checkpoint 1 above its threshold; chance k / active, and k / N as the document counts."""
    share, chance = thresholds.above / thresholds.checkpoint1, thresholds.checkpoint1 / thresholds.active
    return thresholds.assign(
        share=share, chance=chance, chance_of_all=thresholds.checkpoint1 / thresholds.parameters, lift=share / chance
    )


def checkpoint1_by_run(runs: pd.DataFrame, probes: pd.DataFrame) -> pd.DataFrame:
    """A row a run that did not diverge: rho, seed, test accuracy, checkpoint 1's share (last probe; last quarter)."""
    rows = []
    for run, part in probes.sort_values("step").groupby("run"):
        late = part.checkpoint1[part.step >= 0.75 * part.step.max()]
        rows.append({"run": run, "last": part.checkpoint1.iloc[-1], "last_quarter": late.mean(), "probes": len(late)})
    kept = runs.loc[runs.status == "done", ["rho", "seed", "test_accuracy"]]
    table = kept.join(pd.DataFrame(rows).set_index("run"), how="inner")
    if table.empty:
        raise UserError(f"all of the {len(runs)} runs diverged: there is no test accuracy to compare; lower rho or lr")
    return table


def correlations(table: pd.DataFrame, share: str) -> pd.DataFrame:
    """Project 3: checkpoint 1's share (a column of checkpoint1_by_run) against test accuracy, with 95 % intervals.

    Over all runs; over the means of each rho (n: how many rhos); and within rho, the rhos' means taken away.
    """
    means = table.groupby("rho")[[share, "test_accuracy"]].mean()
    found = {
        ("all runs", "Pearson"): correlation(table[share], table.test_accuracy),
        ("all runs", "Spearman"): correlation(table[share], table.test_accuracy, "spearman"),
        ("across ρ", "Pearson"): correlation(means[share], means.test_accuracy),
        ("across ρ", "Spearman"): correlation(means[share], means.test_accuracy, "spearman"),
        ("within ρ", "Pearson"): within_correlation(table[share], table.test_accuracy, table.rho),
    }
    rows = [
        {"runs": a, "method": b, "r": e.value, "low": e.low, "high": e.high, "n": e.n} for (a, b), e in found.items()
    ]
    return pd.DataFrame(rows)


def leaving(scan: pd.DataFrame) -> pd.DataFrame:
    """From the scan, by epoch and kind of layer ("all" too): checkpoint 1's share of the active parameters, and the
    survival of those in it at the smallest rho.

    `left` is the share that leaves between the rho before and this one; `newcomers` the share of this rho's members
    that were outside at some smaller rho: none, if each parameter had its own threshold.
    """
    columns = ["parameters", "inactive", "checkpoint1", "still"]
    counts = pd.concat([scan, scan.assign(kind="all")]).groupby(["epoch", "kind", "rho"], as_index=False)[columns].sum()
    first = counts.groupby(["epoch", "kind"]).still.transform("first")
    survival = counts.still / first
    before = survival.groupby([counts.epoch, counts.kind]).shift()
    return counts.assign(
        share=counts.checkpoint1 / (counts.parameters - counts.inactive),
        survival=survival,
        left=(before - survival).fillna(0.0),
        newcomers=1 - counts.still / counts.checkpoint1.where(counts.checkpoint1 > 0),
    )


def leaving_quantiles(table: pd.DataFrame, levels: tuple[float, ...] = (0.1, 0.5, 0.9)) -> pd.DataFrame:
    """The rho of the grid by which these shares have left checkpoint 1, by epoch and kind; NaN beyond the grid."""
    rows = []
    for (epoch, kind), part in table.groupby(["epoch", "kind"]):
        gone = {q: part.rho[part.survival <= 1 - q + 1e-9].min() for q in levels}
        rows.append({"epoch": epoch, "kind": kind, "members": int(part.still.iloc[0]), **gone})
    return pd.DataFrame(rows)


def one_dimensional(w: np.ndarray, rho: float) -> pd.DataFrame:
    """The checkpoints on L(w) = w^2 / 10 - cos(2 w), with several minima: loss, g, g' at w + rho sign(g), code."""

    def slope(x: np.ndarray) -> np.ndarray:
        return 0.2 * x + 2 * np.sin(2 * x)

    g = slope(w)
    g_sam = slope(w + rho * np.sign(g))
    code = checkpoint_codes(torch.from_numpy(g), torch.from_numpy(g_sam)).numpy()
    return pd.DataFrame({"w": w, "loss": 0.1 * w**2 - np.cos(2 * w), "g": g, "g_sam": g_sam, "code": code})


def rank_correlation_of_active(r: float, inactive: float) -> float:
    """Spearman's r among the active parameters, from r over all of them, where the inactive are zero in both.

    A share d of common zeros is one block of ties below all others: it gives 1 - (1 - d)^3 / (1 - d^3) by itself.
    """
    rest = (1 - inactive) ** 3 / (1 - inactive**3) if inactive < 1 else 0.0
    return 1 - (1 - r) / rest if rest else float("nan")


def beside_document(thresholds: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """A table of thresholds_with_chance, and beside each epoch the document's row at the same share of training."""
    theirs = reference.epoch / reference.epoch.max()
    nearest = [(theirs - share).abs().idxmin() for share in thresholds.epoch / thresholds.epoch.max()]
    columns = {"epoch": "their_epoch", "threshold": "their_threshold", "percent_of_checkpoint1_above": "their_percent"}
    return thresholds.reset_index(drop=True).join(reference.loc[nearest].reset_index(drop=True).rename(columns=columns))


def at_rho(table: pd.DataFrame, rho: float) -> pd.DataFrame:
    """The rows of a table over a grid of rho (`prediction`, say) at the one nearest to this rho, by epoch."""
    grid = table.rho.unique()
    return table[table.rho == grid[abs(grid - rho).argmin()]].sort_values("epoch")


def reach(prediction: pd.DataFrame, right: float = 0.9) -> pd.Series:
    """By epoch: the largest rho up to which, from the smallest on, the expansion gets this share of the codes right."""
    held = prediction.sort_values("rho").groupby("epoch").right.transform(lambda part: (part >= right).cummin())
    return prediction.rho.where(held.astype(bool)).groupby(prediction.epoch).max()
