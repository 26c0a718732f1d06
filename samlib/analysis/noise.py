"""Tables of label noise by checkpoint: what images with flipped labels bring to g and to g', and SANER at its own ρ."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from samlib.analysis.results import REGIME, NotMeasured, Results, at_chosen_rho, once, pairs
from samlib.analysis.stats import mean_interval
from samlib.probes import NOISE_SUMS

RATIOS = {  # of two sums over parameters, see samlib.probes.noise_rows
    "sets": ("sets_direction", "parameters"),  # the share of the parameters whose direction the flipped images set
    "of_g": ("g_flipped", "g_l1"),  # the share of sum |g| that they bring
    "of_g_sam": ("g_sam_flipped", "g_sam_l1"),  # and that of sum |g'|
    "flipped_grows": ("flipped_sam_l1", "flipped_l1"),  # their part from g to g'
    "clean_grows": ("clean_sam_l1", "clean_l1"),  # and the clean images'
}
COLUMNS = {  # of `by_checkpoint`
    "share": "of the active parameters", "sets": "flips set the direction", "sets_chance": "by chance",
    "of_g": "flips' share of |g|", "of_g_chance": "of it by chance", "of_g_sam": "flips' share of |g'|",
    "flipped_grows": "flips' part, g' over g", "clean_grows": "clean part, g' over g",
}  # fmt: skip
WHERE = [*REGIME, "rho"]


@once
def probe(results: Results, grid: str | None = None, by: Sequence[str] = ()) -> pd.DataFrame:
    """A row a probe of SAM or SGD, checkpoint (0: all active parameters) and `by` (kind, third of training): RATIOS,
    each with its `_chance`, that of as many random active parameters of the same kinds of layer, `share` of the active
    parameters, and `images`, the share of the probed images that are flipped. Raises NotMeasured."""
    rows, sums = results.table("noise", grid, ("mix", *WHERE, "seed")), list(NOISE_SUMS)
    rows = rows[(rows.checkpoint > 0) & rows.mix.isin(["sam", "sgd"])]
    if rows.empty:
        raise NotMeasured("no finished run of SAM or SGD has noise probes")
    thirds = np.ceil(3 * rows.epoch / rows.groupby("run").epoch.transform("max"))
    rows, one = rows.assign(third=thirds.astype(int)), ["run", "mix", *WHERE, "seed", "epoch"]
    kind = rows.groupby([*one, "kind"])[sums].transform("sum")
    chance = kind.mul(rows.parameters / kind.parameters.where(kind.parameters > 0), axis=0).add_suffix("_chance")
    rows = pd.concat([rows, chance], axis=1)
    groups = pd.concat([rows, rows.assign(checkpoint=0)]).groupby([*one, *by, "checkpoint"])
    total, first = groups[[*sums, *chance]].sum(), groups[["flipped", "images"]].first()
    found = {"images": first.flipped / first.images, "share": total.parameters / total.parameters.xs(0, level=-1)}
    for name, (above, below) in RATIOS.items():
        for end in ("", "_chance"):
            found[name + end] = total[above + end] / total[below + end].where(total[below + end] > 0)
    return pd.DataFrame(found).reset_index()


def by_checkpoint(results: Results, grid: str | None = None, by: Sequence[str] = ()) -> pd.DataFrame:
    """COLUMNS of `probe`, without shares of |g| where `by` makes the parts small: the mean over a run's probes and then
    over seeds, a row a mix, ρ, `by` and checkpoint."""
    cell = ["mix", "rho", *by, "checkpoint"]
    names = [name for name in COLUMNS if not (by and name.startswith("of_g"))]
    runs = probe(results, grid, by).groupby([*cell, "run"])[names].mean().groupby(cell)
    found = {COLUMNS[n]: runs[n].agg(mean_interval, unit="" if n.endswith("grows") else "%") for n in names}
    return pd.DataFrame(found).rename(index=lambda code: "all" if code == 0 else code, level="checkpoint")


def beyond_chance(results: Results, name: str, checkpoint: int, mix: str, third: int | None = None) -> pd.Series:
    """One of RATIOS minus its chance level, the mean over each run's probes (of a third): an Estimate by
    data, flips and ρ."""
    rows = probe(results, by=["third"]).query("checkpoint == @checkpoint and mix == @mix")
    rows = rows[rows.third == third] if third else rows
    runs = rows.assign(more=rows[name] - rows[f"{name}_chance"]).groupby([*WHERE, "run"]).more.mean()
    return runs.groupby(WHERE).agg(mean_interval, unit="points", signed=True)


def at_own_rho(results: Results, a: str, b: str, value: str) -> pd.DataFrame:
    """`pairs` of two updates, each at the ρ that its own held-out accuracy chooses in that setting."""
    return pairs(at_chosen_rho(results.planned(), (*REGIME, "augment", "epochs")), a, b, value, but=("rho",))
