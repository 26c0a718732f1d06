"""The second document's quantities as tables, chance levels beside them, from the rows that runs keep.

A function that takes Results returns rows, one a measurement, of the runs that did not diverge; `by_setting` makes them
Estimates over seeds, and `table` shows them. Shares are fractions: those of checkpoints are of the active parameters,
since no other can be in one, those of inactive ones are of all.
"""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

from samlib import PROJECT
from samlib.analysis.results import (
    REGIME,
    SEEDS,
    NotMeasured,
    Results,
    at_chosen_rho,
    mix_name,
    mix_order,
    once,
    trainings,
)
from samlib.analysis.stats import mean_interval
from samlib.probes import BINS, CHECKPOINTS, RATIO_EDGES

SETTING = ("mix", "rho", *REGIME)  # SGD's rho is the radius that it is probed at
ENDS = ("first tenth", "last tenth")  # of a run's steps
DOCUMENT = {  # its shares at the start and at the end of training
    "checkpoint1": (0.60, 0.60), "checkpoint2": (0.40, 0.20), "checkpoint3": (0.03, 0.10), "checkpoint4": (0.03, 0.06),
}  # fmt: skip
LAGS = np.array([1, 2, 5, 10, 20, 50, *(k * 10**e for e in range(2, 6) for k in (1, 2, 5))])  # steps
REFERENCE = PROJECT / "notebooks/reference/flatness_thresholds.csv"


def grids(results: Results, notebook: str) -> list[str]:
    """The loaded grids that the study reads in this notebook; all, where it names none of them."""
    read = sum(((a.grid, *a.parameters.values()) for a in results.study.notebooks if a.notebook[:2] == notebook), ())
    return [grid for grid in results.grids if grid in read] or list(results.grids)


@once
def rows(results: Results, name: str, notebook: str = "02") -> pd.DataFrame:
    """A table's rows, of `grids`, with the fields of SETTING, `seed`, `setting`, SETTING in words, and `radius`, the
    table's own ρ.

    Raises NotMeasured where no run has it, or where runs of one setting and seed differ in something else.
    """
    grid = grids(results, notebook)
    frame, runs = results.table(name, grid, (*SETTING, "seed", "steps_per_epoch", "probe_every")), results.runs(grid)
    if "rho_run" in frame:
        frame = frame.rename(columns={"rho": "radius", "rho_run": "rho"})
    runs = trainings(runs[(runs.status == "done") & runs.index.isin(frame.run)])
    if runs.empty or runs.duplicated([*SETTING, *SEEDS]).any():
        raise NotMeasured(f"{name}: its runs diverged, or differ in more than mix, ρ, regime and seed: read one grid")
    runs = runs.sort_values(list(SETTING), key=lambda x: x.map(mix_order) if x.name == "mix" else x)
    setting = runs.mix.map(mix_name) + runs.rho.map(", ρ = {:g}".format)
    for field, words in zip(REGIME, (", {:.3g} % of the data", ", {:.3g} % flipped"), strict=True):
        setting += (100 * runs[field]).map(words.format) if runs[field].nunique() > 1 else ""
    frame = frame[frame.run.isin(runs.index)].reset_index(drop=True)
    return frame.assign(setting=pd.Categorical(frame.run.map(setting), setting.unique()))


def by_setting(
    frame: pd.DataFrame, value: str | Callable, also: Iterable[str] = (), unit: str = "%", signed: bool = False
) -> pd.Series:
    """The mean over a setting's runs, an Estimate by setting and `also`. value: a column, or a number from one run's
    rows."""
    keys = ["setting", *also]
    groups = frame.groupby([*keys, "run"], observed=True)
    runs = groups.apply(value, include_groups=False) if callable(value) else groups[value].mean()
    return runs.groupby(keys, observed=True).agg(mean_interval, unit=unit, signed=signed)


def last(frame: pd.DataFrame) -> pd.DataFrame:
    """Each run's rows at its last measured epoch."""
    return frame[frame.epoch == frame.groupby("run").epoch.transform("max")]


def nearest(frame: pd.DataFrame) -> pd.DataFrame:
    """Each run's rows at the radius nearest to its ρ."""
    away = np.log(frame.radius / frame.rho).abs()
    return frame[away == away.groupby(frame.run).transform("min")]


@once
def shares(results: Results) -> pd.DataFrame:
    """Each `probe_every`-th step's probe at the run's own radius: checkpoints, the bins as shares of checkpoint 1,
    `length` = ‖g'‖ / ‖g‖, `at`, in epochs, and `part`, of ENDS or ""."""
    frame = rows(results, "probes")
    frame = frame[(frame.radius == frame.rho) & (frame.step % frame.probe_every.clip(1) == 0)]
    frame = frame.assign(**frame[list(BINS)].div(frame.checkpoint1, axis=0), of_all=frame.checkpoint1)
    frame = frame.assign(**frame[list(CHECKPOINTS[1:])].div(1 - frame.inactive, axis=0))
    done = frame.step / frame.groupby("run").step.transform("max")
    frame["part"] = np.select([done <= 0.1, done >= 0.9], ENDS, "")
    return frame.assign(at=frame.step / frame.steps_per_epoch, length=frame.grad_norm_sam / frame.grad_norm)


def kinds(results: Results) -> pd.DataFrame:
    """Checkpoints by kind of layer, run and epoch."""
    keys = ["setting", "mix", "run", "kind", "epoch"]
    sums = rows(results, "layers").groupby(keys, observed=True)[["parameters", *CHECKPOINTS]].sum()
    active = sums.parameters - sums.inactive
    shown = sums[list(CHECKPOINTS[1:])].div(active.where(active > 0), axis=0)
    return shown.assign(inactive=sums.inactive / sums.parameters).reset_index()


def lifts(results: Results) -> pd.DataFrame:
    """Experiment 2: of a step's checkpoint 1 the share that is in a later one's, and its lift over chance within
    layers; `about`: the nearest of LAGS."""
    frame = rows(results, "overlaps")
    about = LAGS[np.abs(np.log(frame.lag.to_numpy()[:, None] / LAGS)).argmin(1)]
    lift = frame.overlap / frame.chance.where(frame.chance > 0)
    return frame.assign(about=about, lift=lift, share=frame.overlap / frame.reference_size)


def running(results: Results) -> pd.DataFrame:
    """Experiment 3: of a step's checkpoint 1 the share that has been in it at every step since, and by chance."""
    frame = rows(results, "intersections").sort_values("steps")
    first = frame.groupby(["run", "reference_step", "batch"]).intersection.transform("first")
    return frame.assign(share=frame.intersection / first, by_chance=frame.chance / first, later=frame.steps - 1)


def resting(results: Results) -> pd.DataFrame:
    """A row a run and measured epoch, over the active parameters: the share whose mean gradient differs from zero, and
    `beyond` the c = 5 % of chance, (s - c) / (1 - c); the share that moves; medians, mean over checkpoints."""
    frame = rows(results, "convergence").query("checkpoint > 0 and parameters > 0")
    keys, names = ["setting", "mix", "run", "epoch"], ["significant", "chance", "moving", "gradient", "detectable"]
    weighted = frame[names].mul(frame.parameters, axis=0).join(frame[[*keys, "parameters"]])
    sums = weighted.groupby(keys, observed=True).sum()
    found = sums[names].div(sums.parameters, axis=0)
    return found.assign(beyond=(found.significant - found.chance) / (1 - found.chance)).reset_index()


def thresholds(results: Results) -> pd.DataFrame:
    """Project 1: of checkpoint 1 the share above its threshold, and by chance within layers; `done`, of training; the
    document's row that is nearest to it."""
    frame, theirs = rows(results, "thresholds", "03"), pd.read_csv(REFERENCE)
    frame = frame.assign(done=frame.epoch / frame.groupby("run").epoch.transform("max"))
    near = theirs.iloc[[(theirs.epoch / theirs.epoch.max() - done).abs().argmin() for done in frame.done]]
    frame["their_share"] = near.percent_of_checkpoint1_above.to_numpy() / 100
    frame["their_threshold"] = near.threshold.to_numpy()
    lift = frame.above / frame.chance.where(frame.chance > 0)
    return frame.assign(share=frame.above / frame.checkpoint1, by_chance=frame.chance / frame.checkpoint1, lift=lift)


def diagonals(results: Results) -> pd.DataFrame:
    """The Hessian's exact diagonal by checkpoint at the last epoch; `sharper`: checkpoint 1's mean entry over that of
    the other active parameters; `spearman` with |g|."""
    frame = last(rows(results, "diagonal", "03")).query("checkpoint > 0 and parameters > 0")
    total = frame["mean"] * frame.parameters
    sums = pd.DataFrame({"total": total, "n": frame.parameters}).groupby([frame.run, frame.checkpoint == 1]).sum()
    mean = (sums.total / sums.n).unstack()
    return frame.assign(sharper=frame.run.map(mean[True] / mean[False]))


def predictions(results: Results) -> pd.DataFrame:
    """The share of codes that g + ρ H g / ‖g‖ gets right at the last epoch, by radius and activation, beside calling
    all by the commonest; `gain`: of those that this misses."""
    frame = last(rows(results, "prediction", "03"))
    return frame.assign(gain=(frame.right - frame.constant) / (1 - frame.constant))


def sweep(results: Results) -> pd.DataFrame:
    """A row a run of the mixes with several ρ: checkpoint 1 over the last quarter of training, at its `own` radius and
    at the `common` one that all are probed at (NaN: none); accuracies; whether its ρ is the `chosen` one."""
    frame = rows(results, "probes", "04").query("mix != 'sgd'")
    frame = frame[frame.groupby("mix").rho.transform("nunique") > 1]
    if frame.empty:
        raise NotMeasured("no rule was trained with several ρ and probed")
    frame = frame[frame.step >= 0.75 * frame.groupby("run").step.transform("max")]
    share = (frame.checkpoint1 / (1 - frame.inactive)).groupby([frame.run, frame.radius]).mean().unstack()
    found = frame.groupby("run")[[*SETTING, "seed", "setting"]].first()
    shared = list(share.dropna(axis=1))
    found = found.assign(own=[share.loc[run, rho] for run, rho in found.rho.items()])
    found = found.assign(common=share[shared[0]] if shared else np.nan, radius=shared[0] if shared else np.nan)
    found = found.join(results.runs()[["status", "test_accuracy", "validation_accuracy"]]).reset_index()
    best = at_chosen_rho(trainings(results.planned(grids(results, "04"))))  # where those that diverged are too
    settings = pd.MultiIndex.from_frame(found[[*SETTING]]).isin(pd.MultiIndex.from_frame(best[[*SETTING]]))
    return found.assign(chosen=np.where(settings, "chosen", ""))


def leaving(results: Results) -> pd.DataFrame:
    """Fixed weights after the last epoch, by radius: the share in checkpoint 1; `survival`, of those in it at the least
    radius the share that is in it at every one so far; `newcomers`, of those in it the share that was not at a smaller
    one, which is none where each parameter has a threshold of its own."""
    keys = ["setting", "mix", "run", "rho", "radius"]
    columns = ["parameters", "inactive", "checkpoint1", "still"]
    sums = last(rows(results, "scan", "04")).groupby(keys, observed=True)[columns].sum().reset_index()
    first = sums.groupby("run").still.transform("first")
    share = sums.checkpoint1 / (sums.parameters - sums.inactive)
    return sums.assign(share=share, survival=sums.still / first, newcomers=1 - sums.still / sums.checkpoint1)


# What `table` shows: of which rows, split by what, which columns as shares, and which as plain numbers.
TABLES = {
    "shares": (lambda r: shares(r).query("part != ''"), ["part"], [*DOCUMENT, "inactive"], []),
    "ratios": (lambda r: shares(r).query("part != ''"), ["part"], list(BINS), ["length", "cosine"]),
    "kinds": (lambda r: kinds(r).query("epoch >= 0.75 * epoch.max()"), ["kind"], list(CHECKPOINTS), []),
    "lifts": (lifts, ["batch", "about"], ["share"], ["lift"]),
    "resting": (lambda r: last(resting(r)), [], ["significant", "beyond", "moving"], ["gradient", "detectable"]),
    "thresholds": (thresholds, ["epoch"], ["share", "by_chance"], ["threshold"]),
    "diagonals": (diagonals, ["checkpoint"], [], ["mean", "median"]),
    "sharper": (diagonals, [], [], ["sharper", "spearman"]),
    "predictions": (lambda r: nearest(predictions(r)), ["activation"], ["right", "constant"], []),
    "sweep": (sweep, ["chosen"], ["own", "common", "validation_accuracy", "test_accuracy"], []),
    "leaving": (lambda r: leaving(r)[lambda f: f.radius.rank(method="dense") % 3 == 1], ["radius"],
                ["share", "survival", "newcomers"], []),
}  # fmt: skip
WORDS = {c: c.replace("checkpoint", "checkpoint ") for c in CHECKPOINTS} | {
    name: f"ratio from {edge:g}" for name, edge in zip(BINS, (1, *RATIO_EDGES), strict=True)
} | {
    "length": "‖g'‖ / ‖g‖", "cosine": "cosine of g and g'", "about": "steps later, about",
    "significant": "gradient differs from zero", "beyond": "the same beyond chance",
    "moving": "would move by 1 % in an epoch", "gradient": "median |gradient|",
    "detectable": "least gradient that differs", "sharper": "checkpoint 1's mean entry over the others'",
    "spearman": "Spearman with |g|", "right": "predicted right", "constant": "the commonest code",
    "own": "checkpoint 1, own ρ", "common": "checkpoint 1, common radius",
}  # fmt: skip


def table(results: Results, name: str) -> pd.DataFrame:
    """One of TABLES: Estimates, a row a setting, part of training and the like. Raises NotMeasured."""
    function, also, shares, numbers = TABLES[name]
    frame = function(results)
    units = dict.fromkeys(shares, "%") | dict.fromkeys(numbers, "")
    found = pd.DataFrame({column: by_setting(frame, column, also, unit) for column, unit in units.items()})
    found = found.unstack("setting", sort=False) if also and len(units) < 4 else found
    return found.rename(columns=WORDS).rename_axis([WORDS.get(level, level) for level in found.index.names])
