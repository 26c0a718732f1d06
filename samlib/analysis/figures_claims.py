"""Figures of 09, of all studies: flipped labels and what helps, flatness and gain, and which checkpoint does it.

They take the columns of `claim.columns`; studies whose runs are not of that kind are left out."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from samlib.analysis import ablation, figures, figures_regimes, regimes
from samlib.analysis.figures import GREY, look
from samlib.analysis.figures_ablation import at
from samlib.analysis.results import NotMeasured, Results, estimates, in_order, mix_name, setting_name
from samlib.analysis.stats import Estimate

LEVELS = {
    "SGD": look("sgd"), "SGD of fewer epochs": look("sgd", fillstyle="none"), "SAM": look("sam"),
    "SGD with augmentation": look("sgd", marker="^", fillstyle="none"),
    "SGD, clean labels": look("sgd", color=GREY, marker="|", markersize=12),
    "SGD with augmentation, clean labels": look("sgd", color=GREY, marker="x", markersize=6),
}  # fmt: skip


def each_study(found: Mapping[str, list[Results]]) -> Iterator[Results]:
    """The studies of all columns, each once, as the first column that has it."""
    first = {}
    for results in (results for parts in found.values() for results in parts):
        first.setdefault(results.study.path, results)
    yield from first.values()


def point(axes: Axes, e: Estimate, y: float, style: dict) -> None:
    """An estimate with its interval, in percent or points."""
    half = None if np.isnan(e.half) else 100 * e.half
    axes.errorbar(100 * e.value, y, xerr=half, **style | {"linestyle": "", "capsize": 2.5, "elinewidth": 1.1})


def counted(sizes: set[int]) -> str:
    return f"n={min(sizes)}" + f" to {max(sizes)}" * (len(sizes) > 1)


def datasets(studies: Iterable[Results]) -> str:
    return "; ".join(f"{results.study.name}: {results.study.dataset}" for results in studies)


def rivals(found: Mapping[str, list[Results]]) -> Figure:
    """Test accuracy at each study's strongest label noise, a row a data size: SGD, SGD of fewer epochs, SAM, SGD with
    augmentation, and SGD with clean labels. Raises NotMeasured where no study has flipped labels and SAM."""
    rows, shown, seen = {}, {}, set()
    for results in each_study(found):
        with suppress(NotMeasured):
            table = regimes.levels(results)
            augmented = ", augmented" * bool(regimes.chosen(results).augment.all())
            for (size, noise), row in table[table.index.get_level_values(1) == table.index.levels[1].max()].iterrows():
                there = row[[e.n > 0 for e in row]]
                if {"SGD", "SAM"} <= {*there.index} and (own := str([*row[["SGD", "SAM"]]])) not in seen:
                    seen.add(own)  # studies may share runs
                    name = f"{results.study.name}: {100 * size:g} % of the data{augmented}, {100 * noise:g} % flipped"
                    rows[f"{name} ({counted({e.n for e in there})})"] = there
                    shown[results.study.name] = results
    if not rows:
        raise NotMeasured("no study has finished runs of SGD and SAM with flipped labels")
    drawn, [[axes]] = figures.figure(height=1.6 + 0.45 * len(rows))
    for y, row in enumerate(rows.values()):
        for k, (name, style) in enumerate(LEVELS.items()):
            if name in row:
                point(axes, row[name], y + 0.13 * (k - 2.5), style | {"label": name})
        if y % 2:
            axes.axhspan(y - 0.5, y + 0.5, color=GREY, alpha=0.12, linewidth=0, zorder=0)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="test accuracy at the end, %")
    axes.grid(False, axis="y")
    figures.legend(drawn, columns=3)
    caption = (
        datasets(shown.values())
        + ". Means and 95 % intervals over seeds; of several ρ, and of several numbers of epochs where these are "
    )
    caption += "fewer, the one that is best on held-out training images"
    alt = "Test accuracy with flipped labels of SGD and SAM, beside what else helps SGD."
    return figures.describe(drawn, alt, caption)


def flatness(found: Mapping[str, list[Results]]) -> Figure:
    """SAM's gain over SGD of fewer epochs against its flatness beside that, at each study's strongest label noise: a
    point a study and data size, see figures_regimes.quadrants. Raises NotMeasured where no study has any."""
    parts, shown = [], []
    for results in each_study(found):
        with suppress(NotMeasured):
            rows = figures_regimes.flat_and_better(results)
            rows = rows[rows.shorter & (rows.noise_fraction == rows.noise_fraction.max())]
            label = [setting_name(*at) for at in zip(rows.data_fraction, rows.noise_fraction, strict=True)]
            shown += [results] * bool(len(rows))
            parts.append(
                rows.assign(
                    study=results.study.name,
                    label=[f"{results.study.name}: {at} (n={e.n})" for at, e in zip(label, rows.better, strict=True)],
                )
            )
    rows = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    rows = rows[~rows.astype(str).duplicated(["kind", "flat", "better"])] if parts else rows  # studies may share runs
    if rows.empty:
        raise NotMeasured("no study has the sharpness of SAM and of SGD of fewer epochs")
    shown = [results for results in shown if results.study.name in set(rows.study)]
    at = pd.factorize(rows.label)[0]
    rows = rows.assign(color=[f"C{k % 10}" for k in at], marker=["osD^vPX*"[k % 8] for k in at])
    return figures_regimes.quadrants(rows, f"{datasets(shown)}. Paired by seed, {counted({e.n for e in rows.better})}")


def checkpoints(found: Mapping[str, list[Results]]) -> Figure:
    """A panel a study with an ablation: test accuracy above SGD's of SAM, and of the updates whose checkpoints are
    shuffled in a control, with it. Raises NotMeasured where no study has such a control."""
    panels, studies, own = {}, [], ""  # by title; what has a ρ of its own
    for results in each_study(found):
        with suppress(NotMeasured):
            grid = regimes.grid(results, "ablation")
            rho, rows = ablation.shown_rho(results, grid), ablation.paired(results, "test_accuracy", grid)
            rows = at(rho, rows, "difference")
            of = estimates(rows, "difference", ("mix",))
            if any(mix.startswith("shuffled-") for mix in of.index):
                panels[f"{results.study.name}\nρ = {rho:g}"] = of
                studies.append(results)
                other = rows[(rows.rho != rho) & ~rows.mix.str.startswith("shuffled-")].groupby("mix").rho.first()
                own += "".join(f"; {mix_name(mix)} at ρ = {r:g} ({results.study.name})" for mix, r in other.items())
    if not panels:
        raise NotMeasured("no study has finished runs of a checkpoint and of its shuffled control")
    mixes = in_order({"sam"} | {mix for of in panels.values() for mix in of.index if f"shuffled-{mix}" in of})
    drawn, [row] = figures.figure(1, len(panels), height=1.5 + 0.32 * len(mixes), sharey=True)
    for axes, (title, of) in zip(row, panels.items(), strict=True):
        for y, mix in enumerate(mixes):
            for shown, above in ((mix, -0.12), (f"shuffled-{mix}", 0.16)):
                if shown in of:
                    point(axes, of[shown], y + above, look(shown))
        axes.axvline(0, **look("sgd", marker="", linewidth=1))
        if "sam" in of:
            axes.axvline(100 * of["sam"].value, **look("sam", marker="", linewidth=1))
        axes.set_title(f"{title} ({counted({of[m].n for k in mixes for m in (k, f'shuffled-{k}') if m in of})})")
        axes.set_xlabel("points above SGD")
    row[0].set_yticks(range(len(mixes)), [mix_name(mix) for mix in mixes])
    row[0].set_ylim(len(mixes) - 0.4, -0.6)
    caption = f"{datasets(studies)}. Test accuracy minus SGD's, paired by seed, mean and 95 % interval. Filled: SAM's "
    caption += (
        "gradient for the parameters of that checkpoint, SGD's for the others (SANER: SAM's, checkpoint 2's halved); "
    )
    caption += f"hollow: the same with as many random parameters of each layer. Dashed: SAM{own}"
    return figures.describe(drawn, "Each checkpoint alone beside as many random parameters, above SGD.", caption)
