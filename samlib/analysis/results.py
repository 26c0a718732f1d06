"""load(study) -> Results: the one way in which notebooks, claims and reports read runs. Accuracies are fractions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from samlib import PROJECT
from samlib.analysis.stats import mean_interval
from samlib.config import RunConfig, UserError
from samlib.runs import load_runs, load_table
from samlib.study import Study, relative

PUBLISHED = PROJECT / "runs/published"
CONTROLS = ("shuffled", "rescaled", "length")  # prefixes of a mix, see samlib.sam.Mix
REGIME = ("data_fraction", "noise_fraction")
SEEDS = ("seed", "data_seed")
# Fields that say what is measured, how often and with what resources, not what is trained.
MEASURED = tuple(
    name for name in RunConfig.model_fields
    if name.endswith("_every") or name.startswith(("persistence_", "scan_"))
) + ("probe_rho", "measure_samples", "state_seconds", "keep_weights", "threads", "graph", "device")  # fmt: skip
# What an accuracy is a share of: one image is its resolution.
COUNTED = {
    "test_accuracy": "test_images", "stopped_test_accuracy": "test_images", "gap": "test_images",
    "train_accuracy": "train_images", "eval_train_accuracy": "train_images",
    "validation_accuracy": "validation_images", "memorized": "flipped", "corrected": "flipped",
    "memorized_chance": "flipped",
}  # fmt: skip
LOSSES = ("eval_train_loss", "validation_loss", "test_loss")
NAMED = 4  # missing or diverged runs told by name, at most


class NotMeasured(UserError):
    """What a table function or a claim needs is in none of the runs; the message says what, and what makes it."""


@dataclass
class Results:
    """The finished runs of a study's grids, under one root, and their tables; frames are the caller's own copies."""

    study: Study
    root: Path
    grids: tuple[str, ...]
    _runs: pd.DataFrame = field(repr=False)
    _tables: dict[str, pd.DataFrame] = field(default_factory=dict, repr=False)

    def ids(self, grid: str | Iterable[str] | None = None) -> list[str]:
        """The ids of the runs that the grid should have, done or not; of all loaded grids where none is named."""
        return list(dict.fromkeys(run for name in self._names(grid) for run in self._plan[name]))

    @cached_property
    def _plan(self) -> dict[str, dict[str, dict[str, Any]]]:
        """By grid and run id, the configurations."""
        return {
            name: {c.run_id: c.model_dump(mode="json") for c in configs} for name, configs in self.study.grids.items()
        }

    def _names(self, grid: str | Iterable[str] | None) -> list[str]:
        return [grid] if isinstance(grid, str) else list(self.grids if grid is None else grid)

    def runs(self, grid: str | Iterable[str] | None = None) -> pd.DataFrame:
        """One row a finished run, indexed by run id: its configuration and its summary, and `gap`, its accuracy on the
        training labels minus that on the test set. A diverged run's `status` says so, and its final numbers are NaN."""
        return self._runs.reindex([run for run in self.ids(grid) if run in self._runs.index])

    def planned(self, grid: str | Iterable[str] | None = None) -> pd.DataFrame:
        """`runs`, and a row for each that is not finished: its configuration, `status` "missing" and no numbers."""
        rows = {run: values for name in self._names(grid) for run, values in self._plan[name].items()}
        frame = pd.DataFrame(list(rows.values()), index=pd.Index(rows, name="run"))
        frame = frame.join(self._runs[self._runs.columns.difference(frame.columns, sort=False)])
        return frame.assign(status=frame.status.fillna("missing"))

    def table(
        self,
        name: str,
        grid: str | Iterable[str] | None = None,
        fields: Sequence[str] = ("mix", "rho", *REGIME, "seed"),
    ) -> pd.DataFrame:
        """The rows of one table (see samlib.runs.TABLES) of all these runs: `run`, the table's columns, and `fields` of
        each run's configuration; a field that the table has itself (`rho` in `probes`) comes as `rho_run`.

        Raises NotMeasured where no run has it.
        """
        if name not in self._tables:
            self._tables[name] = load_table(name, self.root, self._runs.index)
        rows = self._tables[name]
        rows = rows[rows.run.isin(self.ids(grid))]
        if name == "sharpness":  # an older version's says nothing of logits, and cannot be compared
            rows = rows[rows.reindex(columns=["logits"]).logits.notna()]
        if rows.empty:
            where = relative(self.study.path)
            raise NotMeasured(f"no finished run of {where} has the table {name!r}; its configuration asks for none")
        about = self._runs[list(fields)].rename(columns={f: f"{f}_run" for f in fields if f in rows})
        return rows.join(about, on="run").reset_index(drop=True)

    def last(self, name: str, grid: str | Iterable[str] | None = None) -> pd.DataFrame:
        """The rows of a table at each run's last measured epoch, beside the run's configuration and summary (a column
        that both have is the table's), indexed by run: what `pairs` compares sharpness and curvature by."""
        rows = self.table(name, grid, fields=())
        rows = rows[rows.epoch == rows.groupby("run").epoch.transform("max")].set_index("run")
        runs = self.runs(grid)
        return runs[runs.columns.difference(rows.columns, sort=False)].join(rows, how="inner")

    def pairs(
        self,
        a: Any,
        b: Any,
        value: str = "test_accuracy",
        grid: str | Iterable[str] | None = None,
        but: Sequence[str] = (),
    ) -> pd.DataFrame:
        """`pairs` of the runs of a grid: a row a run of the kind a, beside its partner of the kind b."""
        return pairs(self.planned(grid), a, b, value, but)

    def differences(
        self, a: Any, b: Any, value: str = "test_accuracy", by: Sequence[str] = ("rho",),
        grid: str | Iterable[str] | None = None, but: Sequence[str] = (),
    ) -> pd.Series:  # fmt: skip
        """a minus b, an Estimate by each combination of `by`."""
        return estimates(self.pairs(a, b, value, grid, but), "difference", by)

    def means(
        self, value: str = "test_accuracy", by: Sequence[str] = ("mix", "rho"), grid: str | Iterable[str] | None = None
    ) -> pd.Series:
        """The mean of a column of `planned`, an Estimate by each combination of `by`; SGD's ρ is NaN."""
        frame = trainings(self.planned(grid))
        return estimates(frame.assign(rho=frame.rho.mask(frame.mix == "sgd")), value, by)

    @property
    def missing(self) -> list[str]:
        return [run for run in self.ids() if run not in self._runs.index]

    @property
    def diverged(self) -> list[str]:
        return list(self._runs.index[self._runs.status == "diverged"])

    @property
    def state(self) -> str:
        """How many runs there are, and which diverged or are missing, in a line."""
        total = len(self.ids())
        parts = [f"{len(self._runs)} of {total} runs are finished"]
        for word, runs in (("diverged", self.diverged), ("missing", self.missing)):
            if runs:
                more = f" and {len(runs) - NAMED} more" if len(runs) > NAMED else ""
                parts.append(f"{len(runs)} {word}: {', '.join(runs[:NAMED])}{more}")
        return "; ".join(parts)

    def caption(self, grid: str | Iterable[str] | None = None, runs: pd.DataFrame | None = None, note: str = "") -> str:
        """What stands under a figure: dataset, how much of it, flips, model, ρ and the number of seeds.

        runs: only these of `runs`. note: what comes after it, how ρ was chosen, say."""
        runs = self.runs(grid) if runs is None else runs
        rhos = runs[runs.mix != "sgd"].groupby("mix").rho.agg(_listed)
        each = [f"{rhos[mix]} for {mix_name(mix)}" for mix in in_order(rhos.index)]
        if rhos.nunique() == 1 or len(rhos) > 3:
            each = [_listed(runs.rho[runs.mix != "sgd"])]
        parts = [
            self.study.dataset,
            f"{_listed(100 * runs.data_fraction)} % of the training images",
            f"{_listed(100 * runs.noise_fraction)} % of the labels flipped" if runs.noise_fraction.any() else "",
            " and ".join(
                f"{m} of width {w}" for m, w in runs[["model", "width"]].drop_duplicates().itertuples(index=False)
            ),
            f"ρ = {' and '.join(each)}" if len(rhos) else "",
            f"{runs.seed.nunique()} seed{'s' * (runs.seed.nunique() != 1)}",
            note,
        ]
        return "; ".join(part for part in parts if part)


def load(
    study: str | Path | Study,
    root: str | Path = PUBLISHED,
    grids: str | Iterable[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Results:
    """The finished runs of a study's grids (all where none is named) under a root.

    A relative path is taken from the caller's folder, or else from the project's. overrides: of the study's fields, as
    in Study.load. Raises UserError for a study, grid or root that is not there, and where none of the runs is.
    """
    if not isinstance(study, Study):
        path = found_path(study)
        study = Study.load(path, overrides) if overrides else Study.load(path)
    root = found_path(root)
    names = tuple(study.grids) if grids is None else (grids,) if isinstance(grids, str) else tuple(grids)
    configs = [config for name in names for config in study.configs(name)]
    ids = list(dict.fromkeys(config.run_id for config in configs))
    runs = load_runs(root, ids)
    if runs.empty:
        raise NotMeasured(
            f"{relative(root)} has none of the {len(ids)} runs of {relative(study.path)} ({', '.join(names)}); "
            f"`python -m samlib run {relative(study.path)}` trains them into runs/local"
        )
    results = Results(study, root, names, _numbers(runs))
    return results


def found_path(path: str | Path) -> Path:
    """The path from the caller's folder where it is there, else from the project's."""
    path = Path(path)
    return path.resolve() if path.is_absolute() or path.exists() else PROJECT / path


def _numbers(runs: pd.DataFrame) -> pd.DataFrame:
    """Final numbers as floats, NaN where a run diverged or an older run lacks them."""
    for name in (*COUNTED, *COUNTED.values(), *LOSSES, "gradient_evaluations", "steps_per_epoch", "parameters"):
        runs[name] = pd.to_numeric(runs[name]) if name in runs else np.nan
    runs["gap"] = runs.eval_train_accuracy - runs.test_accuracy
    return runs


def pairs(
    frame: pd.DataFrame, a: Any, b: Any, value: str = "test_accuracy", but: Sequence[str] = (), also: Sequence[str] = ()
) -> pd.DataFrame:
    """The rows of kind a with the columns `a` and `b`, the value of each and of its partner, `difference` and
    `resolution`; NaN where one of the two diverged or is not finished.

    frame: Results.planned, or Results.last with also=("measure", "labels", "logits", "setting"). a, b: a mix, or the
    fields that make the kind: {"batch_size": 1024, "lr": 0.2}. Partners agree, the seed included, in all of the
    configuration but what a and b name, MEASURED, `but`, a mix's warm-up, and the ρ where b is SGD, which has none. A
    row of kind a for which the frame has no partner is none of the pairs. Raises ValueError where one has several that
    are not the same training: `but` then holds too much.
    """
    kinds = [{"mix": kind} if isinstance(kind, str) else dict(kind) for kind in (a, b)]
    named = {*but, *kinds[0], *kinds[1]}
    sides = [trainings(frame[np.logical_and.reduce([frame[k] == v for k, v in kind.items()])], also) for kind in kinds]
    free = named | ({"mix_warmup"} if "mix" in named else set())
    free |= {"rho"} if any(len(side) and (side.mix == "sgd").all() for side in sides) else set()
    keys = [_keys(side, free, also) for side in sides]
    partners = sides[1][value].astype(float).set_axis(keys[1])
    if partners.index.has_duplicates:
        raise ValueError(f"{kinds[0]} has several partners {kinds[1]}: `but` holds too much, or `also` too little")
    rows = sides[0].assign(a=sides[0][value].astype(float), b=partners.reindex(keys[0]).to_numpy())
    rows = rows[keys[0].isin(partners.index)]
    counted = COUNTED.get(value)
    resolution = 1 / rows[counted].where(rows[counted] > 0) if counted else 0.0
    return rows.assign(difference=rows.a - rows.b, resolution=resolution, value=value)


def trainings(frame: pd.DataFrame, also: Sequence[str] = ()) -> pd.DataFrame:
    """One row a training: of runs that differ in what they measure alone, or of SGD's in a ρ that it does not use, the
    first that is finished. A study may train the same thing twice, and that is no second run."""
    sgd = frame.mix == "sgd"
    keys = _keys(frame.assign(rho=frame.rho.mask(sgd)), set(), also)
    first = ~pd.Series(keys).iloc[np.argsort(frame.status.eq("missing"), kind="stable")].duplicated()
    return frame[first.sort_index().to_numpy()]


def _keys(frame: pd.DataFrame, free: set[str], also: Sequence[str]) -> pd.Index:
    """All of the configuration but `free` and MEASURED, and the columns `also`, as one text a row."""
    names = [name for name in (*RunConfig.model_fields, *also) if name not in free and name not in MEASURED]
    return pd.Index([str(key) for key in zip(*(frame[name] for name in names), strict=True)], dtype=object)


def estimates(frame: pd.DataFrame, value: str, by: Sequence[str], unit: str | None = None) -> pd.Series:
    """mean_interval of a column by each combination of `by`, with its resolution. unit: None: that of the column.

    Raises NotMeasured where an estimate would have a seed twice: what else its rows differ in is no noise.

    frame: of `pairs` (value "difference", "a" or "b"), or of Results.runs.
    """
    of = frame["value"].iloc[0] if value in ("difference", "a", "b") and len(frame) else value
    signed, share = value == "difference", of in COUNTED
    if unit is None:
        unit = "points" if share and signed else "%" if share else "nats" if of in LOSSES else ""
    found = {}
    for key, part in frame.groupby(list(by), sort=True, dropna=False):
        if part.duplicated(list(SEEDS)).any():
            settings = [f for f in RunConfig.model_fields if f not in (*SEEDS, *MEASURED)]
            differ = [f for f in settings if part[f].astype(str).nunique() > 1] or ["what they measure"]
            raise NotMeasured(
                f"runs of one seed differ in {', '.join(differ)}: name it in `by`, or read one grid alone"
            )
        if "resolution" in part:
            resolution = float(np.nanmax([*part.resolution, 0.0]))
        else:
            resolution = float((1 / part[COUNTED[of]].where(lambda x: x > 0)).max()) if share else 0.0
        found[key] = mean_interval(part[value].astype(float), np.nan_to_num(resolution), unit, signed)
    names = list(by)
    index = (
        pd.MultiIndex.from_tuples(found, names=names)
        if found
        else pd.MultiIndex.from_arrays([[]] * len(names), names=names)
    )
    index = index.get_level_values(0) if len(names) == 1 else index
    return pd.Series(list(found.values()), index=index, dtype=object)


def chosen_rho(runs: pd.DataFrame, mix: str = "sam", by: Sequence[str] = ()) -> pd.Series:
    """The ρ whose runs of this mix have the best mean accuracy on held-out training images, by `by` (else under "");
    NaN where none is held out and there are several. A ρ that is the only one needs no choice. Never the test set."""
    of_mix, found = runs[(runs.mix == mix) & (runs.status == "done")], {}
    for key, part in of_mix.groupby(list(by)) if by else [("", of_mix)]:
        means = part.groupby("rho").validation_accuracy.mean().dropna()
        only = part.rho.iloc[0] if part.rho.nunique() == 1 else np.nan
        found[key[0] if isinstance(key, tuple) and len(key) == 1 else key] = means.idxmax() if len(means) else only
    return pd.Series(found, dtype=float)


def mix_name(mix: str) -> str:
    """A mix as every reader sees it.

    >>> [mix_name(m) for m in ("sgd", "checkpoint134", "scale2x0.5", "shuffled-scale2x0.5", "length-sam", "gain1x2")]
    ['SGD', 'checkpoint 1+3+4', 'SANER', 'SANER, shuffled', "SGD at SAM's length", 'SGD, 1 × 2']
    """
    control, dash, rest = mix.partition("-")
    if dash and control in CONTROLS:
        name = mix_name(rest)
        words = {
            "shuffled": f"{name}, shuffled",
            "rescaled": f"{name} at SGD's length",
            "length": f"SGD at {name}'s length",
        }
        return words[control]
    fixed = {"sgd": "SGD", "sam": "SAM", "scale2x0.5": "SANER", "magnitude": "SAM's sizes, SGD's signs"}
    fixed |= {"direction": "SGD's sizes, SAM's signs"}
    if mix in fixed:
        return fixed[mix]
    if mix.startswith("checkpoint"):
        return "checkpoint " + "+".join(mix.removeprefix("checkpoint"))
    kind = "SAM" if mix.startswith("scale") else "SGD"
    return f"{kind}, {mix.removeprefix('scale').removeprefix('gain').replace('x', ' × ')}"


def mix_order(mix: str) -> tuple:
    """SGD, SAM, SANER, the checkpoint subsets by size, then the other rules, each followed by its controls."""
    control, dash, rest = mix.partition("-")
    base, place = (rest, 1 + CONTROLS.index(control)) if dash and control in CONTROLS else (mix, 0)
    first = ("sgd", "sam", "scale2x0.5")
    if base in first:
        return 0, first.index(base), "", place
    return (1, len(base), base, place) if base.startswith("checkpoint") else (2, 0, base, place)


def in_order(mixes: Iterable[str]) -> list[str]:
    """The mixes, each once, in the order of every table and figure."""
    return sorted(set(mixes), key=mix_order)


def _listed(values: pd.Series) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(values)))
