"""load(study) -> Results: the one way in which notebooks, claims and reports read runs. Accuracies are fractions."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from samlib import PROJECT
from samlib.analysis.stats import mean_interval
from samlib.config import RunConfig, UserError
from samlib.mix import CONTROLS
from samlib.runs import load_runs, load_table
from samlib.study import Study, relative

PUBLISHED = PROJECT / "runs/published"
REGIME = ("data_fraction", "noise_fraction")
SEEDS = ("seed", "data_seed")
# Fields that say what is measured, how often and with what resources, not what is trained.
MEASURED = tuple(f for f in RunConfig.model_fields if f.endswith("_every") or f.startswith(("persistence_", "scan_")))
MEASURED += ("probe_rho", "measure_samples", "state_seconds", "keep_weights", "threads", "graph", "device")
# What an accuracy is a share of: one image is its resolution.
COUNTED = dict.fromkeys(("test_accuracy", "stopped_test_accuracy", "gap"), "test_images")
COUNTED |= dict.fromkeys(("train_accuracy", "eval_train_accuracy"), "train_images")
COUNTED |= {"validation_accuracy": "validation_images"}
COUNTED |= dict.fromkeys(("memorized", "corrected", "memorized_chance"), "flipped")
AT_EQUAL = {"fits_at_equal": "fits", "test_at_equal": "test_accuracy"}  # and what they compare: ablation.at_equal
SHARPNESS = ("random directions", "random directions, normalized logits", "ascent", "ascent, normalized logits")
LOSSES = ("eval_train_loss", "validation_loss", "test_loss")
NATS = (*LOSSES, *SHARPNESS, "value")  # a column `value` is of Results.sharpness
ALSO = ("kind", "setting")  # of a row of Results.sharpness: what is measured, and at which radius
NAMED = 4  # missing or diverged runs told by name, at most
Grids = str | Iterable[str] | None  # names of a study's grids; None: all that are loaded


class NotMeasured(UserError):
    """What a table function or a claim needs is in none of the runs; the message says what, and what makes it."""


def once(function: Callable) -> Callable:
    """A function of Results whose table is computed once for them and its other arguments; callers get copies."""

    @wraps(function)
    def remembered(results: "Results", *arguments: Any, **options: Any) -> Any:
        key = f"{function.__module__}.{function.__qualname__}{arguments}{options}"
        if key not in results.computed:
            results.computed[key] = function(results, *arguments, **options)
        return results.computed[key].copy()

    return remembered


@dataclass
class Results:
    """The finished runs of a study's grids, under one root, and their tables; frames are the caller's own copies."""

    study: Study
    root: Path
    grids: tuple[str, ...]
    finished: pd.DataFrame = field(repr=False)  # see load_runs
    named: dict[str, str] = field(default_factory=dict)  # grids that are read by a role, "twice" say: see load
    computed: dict[str, Any] = field(default_factory=dict, repr=False)  # see once

    @once
    def planned(self, grid: Grids = None) -> pd.DataFrame:
        """A row a run that the grid should have, indexed by run id: its configuration, `status` ("done", "diverged" or
        "missing"), its summary, and `gap`, its accuracy on the training labels minus that on the test set. Final
        numbers of a run that diverged or is missing are NaN."""
        names = [grid] if isinstance(grid, str) else self.grids if grid is None else grid
        rows = {c.run_id: c.model_dump(mode="json") for name in names for c in self.study.grids[name]}
        frame = pd.DataFrame(list(rows.values()), index=pd.Index(rows, name="run"))
        frame = frame.join(self.finished[self.finished.columns.difference(frame.columns, sort=False)])
        return frame.assign(status=frame.status.fillna("missing"))

    def runs(self, grid: Grids = None) -> pd.DataFrame:
        """`planned` without those that are missing."""
        return self.planned(grid).query("status != 'missing'")

    @once
    def table(self, name: str, grid: Grids = None, fields: Sequence[str] = ("mix", "rho", *REGIME, "seed")):
        """The rows of one table (see samlib.runs.TABLES) of all these runs: `run`, the table's columns, and `fields` of
        each run's configuration; a field that the table has itself (`rho` in `probes`) comes as `rho_run`.

        Raises NotMeasured where no run has it.
        """
        runs, key = self.runs(grid), f"table {name}"
        if key not in self.computed:
            self.computed[key] = load_table(name, self.root, self.finished.index)
        rows = self.computed[key]
        rows = rows[rows.run.isin(runs.index)]
        if name == "sharpness":  # an older version's says nothing of logits, and cannot be compared
            rows = rows[rows.reindex(columns=["logits"]).logits.notna()]
        if rows.empty:
            where = relative(self.study.path)
            raise NotMeasured(f"no finished run of {where} has the table {name!r}; its configuration asks for none")
        about = runs[list(fields)].rename(columns={f: f"{f}_run" for f in fields if f in rows})
        return rows.join(about, on="run").reset_index(drop=True)

    @once
    def sharpness(self, grid: Grids = None) -> pd.DataFrame:
        """Of the runs that did not diverge, indexed by run, a row a `kind`, of SHARPNESS: `value` in nats, at the last
        epoch on the labels trained on, beside the run's configuration and `gap`; the ascent at the radius that all runs
        have in common (probe_rho), or else at the run's own. Raises NotMeasured where no run has it."""
        rows = self.table("sharpness", grid, (*RunConfig.model_fields, "status", "gap")).set_index("run")
        rows = rows[(rows.epoch == rows.groupby("run").epoch.transform("max")) & (rows.status == "done")]
        common = pd.to_numeric(rows.probe_rho).fillna(rows.rho)
        rows = rows[(rows.labels == "trained") & ((rows.measure != "ascent") | (rows.setting == common))]
        kind = rows.measure.replace("random", "random directions")
        return rows.assign(kind=kind + rows.logits.map({"raw": "", "normalized": ", normalized logits"}))

    def of(self, value: str, grid: Grids = None) -> pd.DataFrame:
        """The rows that hold a value: `planned`, or those of one of SHARPNESS, in a column of that name."""
        if value not in SHARPNESS:
            return self.planned(grid)
        return self.sharpness(grid).query("kind == @value").rename(columns={"value": value})

    @once
    def pairs(
        self, a: Any, b: Any, value: str = "test_accuracy", grid: Grids = None, but: Sequence[str] = ()
    ) -> pd.DataFrame:
        """`pairs` of the runs of a grid: a row a run of the kind a, beside its partner of the kind b; of an ascent, at
        equal radii alone. value: a column of `planned`, or one of SHARPNESS."""
        return pairs(self.of(value, grid), a, b, value, but)

    def differences(
        self, a: Any, b: Any, value: str = "test_accuracy", by: Sequence[str] = ("rho",), grid: Grids = None
    ) -> pd.Series:
        """a minus b, an Estimate by each combination of `by`."""
        return estimates(self.pairs(a, b, value, grid), "difference", by)

    def means(self, value: str = "test_accuracy", by: Sequence[str] = ("mix", "rho"), grid: Grids = None) -> pd.Series:
        """The mean of a column of `planned`, or of one of SHARPNESS: an Estimate by each of `by`; SGD's ρ is NaN."""
        frame = trainings(self.of(value, grid))
        return estimates(frame.assign(rho=frame.rho.mask(frame.mix == "sgd")), value, by)

    @property
    def state(self) -> str:
        """How many runs there are, and which diverged or are missing, in a line."""
        status = self.planned().status
        parts = [f"{(status != 'missing').sum()} of {len(status)} runs are finished"]
        for word in ("diverged", "missing"):
            if len(names := status.index[status == word]):
                more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
                parts.append(f"{len(names)} {word}: {', '.join(names[:NAMED])}{more}")
        return "; ".join(parts)

    def caption(self, grid: Grids = None, runs: pd.DataFrame | None = None, note: str = "") -> str:
        """What stands under a figure: dataset, how much of it, flips, model, ρ and the number of seeds.

        runs: only these of `runs`. note: what comes after it, how ρ was chosen, say."""
        runs = self.runs(grid) if runs is None else runs
        data, flips = (_listed(100 * runs[field]) for field in REGIME)
        of_mix = runs[runs.mix != "sgd"].groupby("mix").rho.agg(_listed)
        rhos = " and ".join(f"{of_mix[mix]} for {mix_name(mix)}" for mix in in_order(of_mix.index))
        if of_mix.nunique() < 2 or len(of_mix) > 3:
            rhos = _listed(runs.rho[runs.mix != "sgd"])
        models = " and ".join(sorted(set(runs.model + " of width " + runs.width.astype(str))))
        parts = [self.study.dataset, f"{data} % of the training images"]
        parts += [f"{flips} % of the labels flipped"] * (flips != "0") + [models] + [f"ρ = {rhos}"] * (len(of_mix) > 0)
        seeds = runs.groupby(["mix", "rho", *REGIME, "batch_size", "lr"]).seed.nunique()
        least = f"{seeds.min()} to " if seeds.min() < seeds.max() else ""
        return "; ".join([*parts, least + plural(int(seeds.max()), "seed"), *[note] * bool(note)])


def load(
    study: str | Path | Study,
    root: str | Path = PUBLISHED,
    grids: Grids | Mapping[str, str] = None,
    overrides: Mapping[str, Any] | None = None,
) -> Results:
    """The finished runs of a study's grids (all where none is named) under a root.

    grids: their names; or a name by role, as samlib.analysis.regimes reads them, "" where there is none of it.
    A relative path is taken from the caller's folder, or else from the project's. overrides: of the study's fields, as
    in Study.load. Raises UserError for a study, grid or root that is not there, and where none of the runs is.
    """
    if not isinstance(study, Study):
        study = Study.load(found_path(study), dict(overrides or {}) or None)
    root = found_path(root)
    named = {role: name for role, name in grids.items() if name} if isinstance(grids, Mapping) else {}
    grids = named.values() if isinstance(grids, Mapping) else study.grids if grids is None else grids
    names = (grids,) if isinstance(grids, str) else tuple(dict.fromkeys(grids))
    if absent := [name for name in names if name not in study.grids]:
        raise UserError(
            f"{relative(study.path)}: there is no grid {absent[0]!r}; the grids are {', '.join(study.grids)}; a "
            "parameter of a notebook that names one is empty where there is none"
        )
    ids = list(dict.fromkeys(config.run_id for name in names for config in study.configs(name)))
    runs = load_runs(root, ids)
    if runs.empty:
        raise NotMeasured(
            f"{relative(root)} has none of the {len(ids)} runs of {relative(study.path)} ({', '.join(names)}); "
            f"`python -m samlib run {relative(study.path)}` trains them into runs/local"
        )
    for name in (*COUNTED, *COUNTED.values(), *LOSSES):  # NaN where a run diverged or an older one lacks it
        runs[name] = pd.to_numeric(runs[name]) if name in runs else np.nan
    return Results(study, root, names, runs.assign(gap=runs.eval_train_accuracy - runs.test_accuracy), named)


def found_path(path: str | Path) -> Path:
    """The path from the caller's folder where it is there, else from the project's."""
    path = Path(path)
    return path.resolve() if path.is_absolute() or path.exists() else PROJECT / path


def pairs(frame: pd.DataFrame, a: Any, b: Any, value: str = "test_accuracy", but: Sequence[str] = ()) -> pd.DataFrame:
    """The rows of kind a with the columns `a` and `b`, the value of each and of its partner, `difference` and
    `resolution`; NaN where one of the two diverged or is not finished, and `status` "missing" in the second case.

    frame: Results.planned, or Results.sharpness, whose partners agree in ALSO too. a, b: a mix, or the fields that make
    the kind: {"batch_size": 1024, "lr": 0.2}. Partners agree, the seed included, in all of the configuration but what a
    and b name, MEASURED, `but`, a mix's warm-up, and the ρ where b is SGD, which has none. A row of kind a for which
    the frame has no partner is none of the pairs. Raises ValueError where one has several that are not the same
    training: `but` then holds too much.
    """
    kinds = [{"mix": kind} if isinstance(kind, str) else dict(kind) for kind in (a, b)]
    sides = [trainings(frame[np.logical_and.reduce([frame[k] == v for k, v in kind.items()])]) for kind in kinds]
    free = {*but, *kinds[0], *kinds[1]}
    free |= {"mix_warmup"} if "mix" in free else set()
    free |= {"rho"} if any(len(side) and (side.mix == "sgd").all() for side in sides) else set()
    keys = [configurations(side, free) for side in sides]
    if keys[1].has_duplicates:
        raise ValueError(f"{kinds[0]} has several partners {kinds[1]}: `but` holds too much")
    there = keys[0].isin(keys[1])
    rows, partners = sides[0][there], sides[1].set_axis(keys[1]).loc[keys[0][there]]
    rows = rows.assign(a=rows[value].astype(float), b=partners[value].to_numpy(dtype=float))
    rows = rows.assign(status=rows.status.mask(partners.status.eq("missing").to_numpy(), "missing"))
    resolution = 1 / rows[COUNTED[value]].where(lambda n: n > 0) if value in COUNTED else 0.0
    return rows.assign(difference=rows.a - rows.b, resolution=resolution, value=value)


def trainings(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a training: of runs that differ in what they measure alone, or of SGD's in a ρ that it does not use, the
    first that is finished. A study may train the same thing twice, and that is no second run."""
    keys = pd.Series(configurations(frame.assign(rho=frame.rho.mask(frame.mix == "sgd")), set()))
    first = ~keys.iloc[np.argsort(frame.status.eq("missing"), kind="stable")].duplicated()
    return frame[first.sort_index().to_numpy()]


def configurations(frame: pd.DataFrame, free: set[str]) -> pd.Index:
    """All of the configuration but `free` and MEASURED, and ALSO where the frame has it, as one text a row."""
    names = [name for name in (*RunConfig.model_fields, *ALSO) if name in frame and name not in {*free, *MEASURED}]
    return pd.Index([str(key) for key in frame[names].to_numpy(dtype=object).tolist()], dtype=object)


def estimates(frame: pd.DataFrame, value: str, by: Sequence[str]) -> pd.Series:
    """mean_interval of a column by each combination of `by`, with its unit and its resolution.

    frame: of `pairs` (value "difference", "a" or "b"), or of Results.of. Raises NotMeasured where an estimate
    would have a seed twice: what else its rows differ in is no noise.
    """
    of = frame["value"].iloc[0] if value in ("difference", "a", "b") and len(frame) else value
    signed, share = value == "difference", of in (*COUNTED, *AT_EQUAL)
    unit = "points" if share and signed else "%" if share else "nats" if of in NATS else ""
    if of in COUNTED and "resolution" not in frame:
        frame = frame.assign(resolution=1 / frame[COUNTED[of]].where(lambda n: n > 0))
    found = {}
    for key, part in frame.groupby(list(by), sort=True, dropna=False):
        if part.duplicated(list(SEEDS)).any():
            settings = [f for f in RunConfig.model_fields if f not in (*SEEDS, *MEASURED)]
            differ = [f for f in settings if part[f].astype(str).nunique() > 1] or ["what they measure"]
            raise NotMeasured(
                f"runs of one seed differ in {', '.join(differ)}: name it in `by`, or read one grid alone"
            )
        resolution = np.nan_to_num(part.resolution.max()) if "resolution" in part else 0.0
        estimate = mean_interval(part[value].astype(float), float(resolution), unit, signed)
        found[key] = replace(estimate, missing=int((part.status == "missing").sum()))
    index = pd.MultiIndex.from_frame(pd.DataFrame(list(found), columns=list(by)))
    return pd.Series(list(found.values()), index.get_level_values(0) if len(by) == 1 else index, dtype=object)


def chosen_rho(runs: pd.DataFrame, mix: str = "sam") -> float:
    """The ρ whose runs of this mix have the best mean accuracy on held-out training images, never on the test set.

    The smallest of several that are equally good; NaN where nothing is held out; a mix's only ρ needs no choice.
    """
    rhos = runs.rho[(runs.mix == mix) & (runs.status != "missing")].unique()
    means = held_out(runs, mix).mean().round(9)  # equal ones differ in their last bit
    return float(rhos[0]) if len(rhos) == 1 else float(means.idxmax()) if len(means) else np.nan


def held_out(runs: pd.DataFrame, mix: str, over: str = "rho") -> pd.DataFrame:
    """Accuracies of a mix on held-out training images, a row a seed and a column a ρ (or another field): of the seeds
    that all ρ have, or of all where they have none in common. A ρ of which a run diverged is none."""
    runs = runs[(runs.mix == mix) & (runs.status != "missing")]
    runs = runs[~runs[over].isin(runs[over][runs.status == "diverged"])]
    found = runs.assign(of=runs.validation_accuracy.astype(float)).pivot_table("of", "seed", over)
    shared = found.dropna()
    return shared if len(shared) else found


def at_chosen_rho(runs: pd.DataFrame, by: Sequence[str] = REGIME) -> pd.DataFrame:
    """SGD's rows, and of each other mix those at the ρ that is chosen in their setting."""
    best = {key: chosen_rho(part, key[0]) for key, part in runs.groupby(["mix", *by])}
    keys = runs[["mix", *by]].itertuples(index=False, name=None)
    return runs[(runs.mix == "sgd") | (runs.rho == [best[key] for key in keys])]


def setting_name(data: float, noise: float, rho: float | None = None) -> str:
    """A regime, and a ρ, as findings and figures name it.

    >>> setting_name(0.1, 0.4, 0.05)
    '10 % of the data, 40 % flipped, ρ = 0.05'
    """
    return f"{100 * data:g} % of the data, {100 * noise:g} % flipped" + (f", ρ = {rho:g}" if rho is not None else "")


def mix_name(mix: str) -> str:
    """A mix as every reader sees it.

    >>> [mix_name(m) for m in ("sgd", "checkpoint134", "scale2x0.5", "shuffled-scale2x0.5", "length-sam", "gain1x2")]
    ['SGD', 'checkpoint 1+3+4', 'SANER', 'SANER, shuffled', "SGD at SAM's length", 'SGD, checkpoint 1 × 2']
    >>> mix_name("rescaled-average")  # one that has no words here goes by its own name
    "average at SGD's length"
    """
    control, _, rest = mix.partition("-")
    if control in CONTROLS and rest:
        name = mix_name(rest)
        return {"shuffled": f"{name}, shuffled", "rescaled": f"{name} at SGD's length"}.get(
            control, f"SGD at {name}'s length"
        )
    fixed = {"sgd": "SGD", "sam": "SAM", "scale2x0.5": "SANER", "magnitude": "SAM's sizes, SGD's signs"}
    fixed |= {"direction": "SGD's sizes, SAM's signs"}
    if mix in fixed:
        return fixed[mix]
    if mix.startswith("checkpoint"):
        return "checkpoint " + "+".join(mix.removeprefix("checkpoint"))
    scaled = re.fullmatch(r"(scale|gain)([1-4])x(.+)", mix)
    return f"{'SAM' if scaled[1] == 'scale' else 'SGD'}, checkpoint {scaled[2]} × {scaled[3]}" if scaled else mix


def mix_order(mix: str) -> tuple:
    """SGD, SAM, SANER, the checkpoint subsets by size, then the other rules, each followed by its controls."""
    control, _, rest = mix.partition("-")
    base, place = (rest, 1 + CONTROLS.index(control)) if control in CONTROLS and rest else (mix, 0)
    first = ("sgd", "sam", "scale2x0.5")
    if base in first:
        return 0, first.index(base), "", place
    return (1, len(base), base, place) if base.startswith("checkpoint") else (2, 0, base, place)


def in_order(mixes: Iterable[str]) -> list[str]:
    """The mixes, each once, in the order of every table and figure."""
    return sorted(set(mixes), key=mix_order)


def plural(count: int, noun: str) -> str:
    """
    >>> plural(1, "seed"), plural(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{count} {noun}{'s' * (count != 1)}"


def _listed(values: pd.Series) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(values)))
