"""The second document's quantities as tables, chance levels beside them, from the rows that runs keep.

A function that takes Results returns rows, one a measurement, of the runs that did not diverge; `by_setting` makes them
Estimates over seeds, and `table` shows them. Shares are fractions: those of checkpoints are of the active parameters,
since no other can be in one, those of inactive ones are of all.
"""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

from samlib import PROJECT
from samlib.analysis.results import REGIME, SEEDS, NotMeasured, Results, chosen_rho, mix_name, mix_order, trainings
from samlib.analysis.stats import correlation_over_seeds, lift, mean_interval
from samlib.probes import BINS, CHECKPOINTS, RATIO_EDGES

SETTING = ("mix", "rho", *REGIME)  # SGD's rho is the radius that it is probed at
DOCUMENT = {  # its shares at the start and at the end of training
    "checkpoint1": (0.60, 0.60), "checkpoint2": (0.40, 0.20), "checkpoint3": (0.03, 0.10), "checkpoint4": (0.03, 0.06),
}  # fmt: skip
RATIOS = dict(zip(BINS, (f"ratio from {edge:g}" for edge in (1, *RATIO_EDGES)), strict=True))  # |g'| / |g|
LAGS = np.array([1, 2, 5, 10, 20, 50, *(k * 10**e for e in range(2, 6) for k in (1, 2, 5))])  # steps
REFERENCE = PROJECT / "notebooks/reference/flatness_thresholds.csv"


def grids(results: Results, notebook: str) -> list[str]:
    """The loaded grids that the study reads in this notebook; all loaded ones where it names none of them."""
    read = [(a.grid, *a.parameters.values()) for a in results.study.notebooks if a.notebook[:2] == notebook]
    return [grid for grid in results.grids if grid in sum(read, ())] or list(results.grids)


def rows(results: Results, name: str, notebook: str = "02") -> pd.DataFrame:
    """A table's rows with the fields of SETTING, `seed`, `setting`, SETTING in words, and `radius`, the table's own ρ.

    Raises NotMeasured where no run has it, or where runs of one setting and seed differ in something else.
    """
    grid = grids(results, notebook)
    frame, runs = results.table(name, grid, (*SETTING, "seed", "steps_per_epoch", "probe_every")), results.runs(grid)
    if "rho_run" in frame:
        frame = frame.rename(columns={"rho": "radius", "rho_run": "rho"})
    runs = trainings(runs[(runs.status == "done") & runs.index.isin(frame.run)])
    if runs.empty or runs.duplicated([*SETTING, *SEEDS]).any():
        raise NotMeasured(f"{name}: its runs diverged, or differ in more than mix, ρ, regime and seed: read one grid")
    frame = frame[frame.run.isin(runs.index)].reset_index(drop=True)
    fields = list(zip(*(frame[field] for field in SETTING), strict=True))
    units = [(k, unit) for k, unit in ((2, "of the data"), (3, "flipped")) if len({f[k] for f in fields}) > 1]
    names = {
        f: ", ".join([mix_name(f[0]), f"ρ = {f[1]:g}", *(f"{100 * f[k]:g} % {unit}" for k, unit in units)])
        for f in sorted(set(fields), key=lambda f: (mix_order(f[0]), *f[1:]))
    }
    return frame.assign(setting=pd.Categorical([names[f] for f in fields], list(names.values())))


def by_setting(
    frame: pd.DataFrame, value: str | Callable, also: Iterable[str] = (), unit: str = "%", signed: bool = False
) -> pd.Series:
    """The mean over a setting's runs, an Estimate by setting and `also`. value: a column, or a number from one run's
    rows."""
    keys, found = ["setting", *also], {}
    for (*key, _), part in frame.groupby([*keys, "run"], observed=True):
        number = value(part) if callable(value) else part[value].mean()
        found.setdefault(tuple(key) if len(key) > 1 else key[0], []).append(number)
    estimates = pd.Series({key: mean_interval(n, unit=unit, signed=signed) for key, n in found.items()}, dtype=object)
    return estimates.rename_axis(keys)


def ends(part: pd.DataFrame, column: str) -> tuple[float, float]:
    """A run's means over the first and the last tenth of its steps."""
    done = (part.step - part.step.min()) / max(1, np.ptp(part.step))
    return part[column][done <= 0.1].mean(), part[column][done >= 0.9].mean()


def shares(results: Results) -> pd.DataFrame:
    """Each `probe_every`-th step's probe at the run's own radius: checkpoints, the bins as shares of checkpoint 1,
    `length` = ‖g'‖ / ‖g‖, and `at`, in epochs."""
    frame = rows(results, "probes")
    frame = frame[(frame.radius == frame.rho) & (frame.step % frame.probe_every.clip(1) == 0)]
    frame = frame.assign(**frame[list(BINS)].div(frame.checkpoint1, axis=0), of_all=frame.checkpoint1)
    frame = frame.assign(**frame[list(CHECKPOINTS[1:])].div(1 - frame.inactive, axis=0))
    return frame.assign(at=frame.step / frame.steps_per_epoch, length=frame.grad_norm_sam / frame.grad_norm)


def tenths(results: Results) -> pd.DataFrame:
    """`shares` of the first and the last tenth of the steps alone, `part` in words."""
    frame = shares(results)
    done = frame.step / frame.groupby("run").step.transform("max")
    frame["part"] = np.select([done <= 0.1, done >= 0.9], ["first tenth", "last tenth"], "")
    return frame[frame.part != ""]


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
    frame = frame.assign(about=about, lift=lift(frame.overlap, frame.chance))
    return frame.assign(share=frame.overlap / frame.reference_size, by_chance=frame.chance / frame.reference_size)


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


def last(frame: pd.DataFrame) -> pd.DataFrame:
    """Each run's rows at its last measured epoch."""
    return frame[frame.epoch == frame.groupby("run").epoch.transform("max")]


def thresholds(results: Results) -> pd.DataFrame:
    """Project 1: of checkpoint 1 the share above its threshold, and by chance within layers; `done`, of training; the
    document's row that is nearest to it."""
    frame, theirs = rows(results, "thresholds", "03"), pd.read_csv(REFERENCE)
    frame = frame.assign(done=frame.epoch / frame.groupby("run").epoch.transform("max"))
    near = theirs.iloc[[(theirs.epoch / theirs.epoch.max() - done).abs().argmin() for done in frame.done]]
    frame["their_share"] = near.percent_of_checkpoint1_above.to_numpy() / 100
    frame["their_threshold"] = near.threshold.to_numpy()
    frame["document"] = [f"{row.percent_of_checkpoint1_above} %, {row.threshold:.1e}" for row in near.itertuples()]
    frame = frame.assign(share=frame.above / frame.checkpoint1, by_chance=frame.chance / frame.checkpoint1)
    return frame.assign(lift=lift(frame.above, frame.chance))


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
    all by the commonest; `gain`: of those that this misses; `own`: the radius nearest to the run's ρ."""
    frame = last(rows(results, "prediction", "03"))
    away = np.log(frame.radius / frame.rho).abs()
    frame = frame.assign(own=away == away.groupby(frame.run).transform("min"))
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
    common = share.dropna(axis=1).reindex(columns=[*share.dropna(axis=1).columns, np.nan]).iloc[:, 0]
    found = found.assign(own=[share.loc[run, rho] for run, rho in found.rho.items()], common=common, radius=common.name)
    found = found.join(results.runs()[["status", "test_accuracy", "validation_accuracy"]]).reset_index()
    best = {key: chosen_rho(part, key[0])[""] for key, part in found.groupby(["mix", *REGIME])}
    keys = zip(found.mix, found.data_fraction, found.noise_fraction, strict=True)
    return found.assign(chosen=np.where(found.rho == [best[key] for key in keys], "chosen", ""))


def correlations(results: Results) -> pd.DataFrame:
    """Checkpoint 1's share against test accuracy over the ρ of each seed: Estimates over seeds, the second's interval
    wide enough for any one ρ left out."""
    found, words = {}, {"own": "at the run's own ρ", "common": "at one common radius"}
    for (mix, *regime), part in sweep(results).groupby(["mix", *REGIME], sort=False):
        for share, method in ((s, m) for s in words for m in ("pearson", "spearman")):
            key = (mix_name(mix), *(f"{100 * x:g} %" for x in regime), words[share], method.title())
            whole = correlation_over_seeds(part, share, "test_accuracy", over=None, method=method)
            left = correlation_over_seeds(part, share, "test_accuracy", method=method)
            left = left if part.rho.nunique() > 3 else "too few ρ"
            found[key] = {"over all ρ": whole, "with any one ρ left out": left}
    return pd.DataFrame(found).T.rename_axis(["rule", *REGIME, "checkpoint 1", "correlation"])


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


# What `table` shows: of which rows, split by what, which columns, in which unit (None: words, as they are).
TABLES = {
    "shares": (tenths, ("part",), dict.fromkeys((*DOCUMENT, "inactive"), "%")),
    "ratios": (tenths, ("part",), dict.fromkeys(BINS, "%")),
    "lengths": (tenths, ("part",), {"grad_norm": "", "length": "", "cosine": ""}),
    "kinds": (lambda r: kinds(r).query("epoch >= 0.75 * epoch.max()"), ("kind",), dict.fromkeys(CHECKPOINTS, "%")),
    "lifts": (lifts, ("batch", "about"), {"lift": "", "share": "%"}),
    "running": (running, ("batch", "later"), {"share": "%", "by_chance": "%"}),
    "resting": (lambda r: last(resting(r)), (), dict.fromkeys(("significant", "beyond", "moving"), "%")
                | {"gradient": "", "detectable": ""}),
    "thresholds": (thresholds, ("epoch",), {"share": "%", "by_chance": "%", "threshold": "", "document": None}),
    "diagonals": (diagonals, ("checkpoint",), {"mean": ""}),
    "sharper": (diagonals, (), {"sharper": "", "spearman": ""}),
    "predictions": (lambda r: predictions(r).query("own"), ("activation",), dict.fromkeys(("right", "constant"), "%")),
    "sweep": (sweep, (), dict.fromkeys(("own", "common", "validation_accuracy", "test_accuracy"), "%")
              | {"chosen": None}),
    "correlations": (correlations, (), {}),
    "leaving": (lambda r: leaving(r)[lambda f: f.radius.rank(method="dense") % 3 == 1], ("radius",),
                dict.fromkeys(("share", "survival", "newcomers"), "%")),
}  # fmt: skip
WORDS = {c: c.replace("checkpoint", "checkpoint ") for c in CHECKPOINTS} | RATIOS | {
    "grad_norm": "‖g‖", "length": "‖g'‖ / ‖g‖", "cosine": "cosine of g and g'", "about": "steps later, about",
    "later": "steps later", "by_chance": "by chance", "significant": "gradient differs from zero",
    "beyond": "the same beyond chance", "moving": "would move by 1 % in an epoch", "gradient": "median |gradient|",
    "detectable": "least gradient that differs", "document": "the document's",
    "mean": "mean diagonal entry",
    "sharper": "checkpoint 1 over the others", "spearman": "Spearman with |g|", "right": "predicted right",
    "constant": "the commonest code", "own": "checkpoint 1, own ρ", "common": "checkpoint 1, common radius",
    "test_accuracy": "test accuracy", "validation_accuracy": "held-out training images", "chosen": "ρ",
}  # fmt: skip


def table(results: Results, name: str) -> pd.DataFrame:
    """One of TABLES: Estimates, a row a setting, part of training and the like. Raises NotMeasured."""
    function, also, units = TABLES[name]
    frame = function(results)
    if not units:
        return frame
    words = frame.groupby(["setting", *also], observed=True).first()
    found = {c: words[c] if unit is None else by_setting(frame, c, also, unit) for c, unit in units.items()}
    found = pd.DataFrame(found).rename_axis(["setting", *also])
    found = found.unstack("setting", sort=False) if also and len(units) < 4 else found
    return found.rename(columns=WORDS).rename_axis([WORDS.get(level, level) for level in found.index.names])
