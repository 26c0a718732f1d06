"""Figures of 06 and 08: every update beside SGD, SAM and its controls, at one ρ, and over ρ."""

import textwrap
from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from samlib.analysis import ablation, figures
from samlib.analysis.figures import CHANCE, LOOKS, SMALLEST, lines, look, rho_axis
from samlib.analysis.results import (
    AT_EQUAL,
    SHARPNESS,
    Grids,
    NotMeasured,
    Results,
    configurations,
    estimates,
    in_order,
    mix_name,
    plural,
    trainings,
)
from samlib.analysis.stats import expected_by_chance

TITLES = {"test_accuracy": "test accuracy", "memorized": "flips memorized", "eval_train_accuracy": "training accuracy"}
TITLES |= ablation.TITLES | {name: textwrap.fill(f"sharpness, {name}", 24) for name in SHARPNESS}


def at(rho: float, rows: pd.DataFrame, value: str) -> pd.DataFrame:
    """The rows that have a value: of each mix at one ρ, or at its own where it has only one."""
    rows = rows[rows[value].notna()]
    rhos = rows.rho.mask(rows.mix == "sgd").groupby(rows.mix)
    return rows[(rows.rho == rho) | (rhos.transform("nunique") < 2)]


def dots(results: Results, values: Iterable[str], grid: Grids = None, minus_sgd: bool = False) -> Figure:
    """A row an update, a panel a value: its level at one ρ, or at its own where it was trained at another alone, with
    what chance memorizes as a tick, or its difference to SGD; below it each seed's own. SAM's value is carried down as
    a line, where it has all seeds; n stands beside an update with fewer runs. Limits are around the seeds: an interval
    much wider than their range is cut off, and an update far from all others stands at the edge as a number."""
    rho, panels = ablation.shown_rho(results, grid), {}
    for value in values:
        rows = ablation.paired(results, value, grid) if minus_sgd else trainings(results.of(value, grid))
        rows = at(rho, rows.assign(shown=rows.difference if minus_sgd else rows[value].astype(float)), "shown")
        if len(rows):
            panels[value] = rows, estimates(rows, "difference" if minus_sgd else value, ("mix",))
    if not panels:
        raise NotMeasured(f"no finished run at ρ = {rho:g} has {' or '.join(TITLES[value] for value in values)}")
    mixes = in_order(mix for _, found in panels.values() for mix in found.index)
    n = {mix: max(found[mix].n for _, found in panels.values() if mix in found) for mix in mixes}
    figure, [row] = figures.figure(1, len(panels), height=1.2 + 0.26 * len(mixes), sharey=True)
    for axes, (value, (rows, found)) in zip(row, panels.items(), strict=True):
        unit = found.iloc[0].unit
        scale = 100 if unit in ("%", "points") else 1
        for mix, e in found.items():
            style, y = look(mix, linestyle="", capsize=2.5, elinewidth=1.1), mixes.index(mix)
            axes.errorbar(scale * e.value, y, xerr=None if np.isnan(e.half) else scale * e.half, **style)
            own = scale * rows.shown[rows.mix == mix]
            axes.plot(own, [y + 0.32] * len(own), ".", color=style["color"], markersize=3.5, alpha=0.6)
        if minus_sgd:
            axes.axvline(0, color=look("sgd")["color"], linewidth=1)
        if "sam" in found and n["sam"] == max(n.values()):
            axes.axvline(scale * found["sam"].value, color=look("sam")["color"], linestyle="--", linewidth=1, zorder=1)
        if value == "memorized" and not minus_sgd:
            chance = 100 * rows.memorized_chance.astype(float).groupby(rows.mix).mean()
            axes.plot(chance, [mixes.index(mix) for mix in chance.index], "|", color=figures.GREY, markersize=12)
        seeds = np.array([scale * x for x in rows.shown] + [0] * minus_sgd)
        ends = np.quantile(seeds, [0.1, 0.9])
        reach = 3 * np.ptp(ends) or np.inf
        seeds = seeds[(seeds >= ends[0] - reach) & (seeds <= ends[1] + reach)]
        wide = 3 * scale * np.median([np.nan_to_num(e.half) for e in found])  # the frame cuts off only what is wider
        room, (low, high) = max(0.5 * np.ptp(seeds), wide) or 1.0, axes.get_xlim()
        if unit == "%":
            low, high = max(low, -2), min(high, 102)  # an interval may promise more than there is
        low, high = axes.set_xlim(max(min(seeds) - room, low), min(max(seeds) + room, high))
        for mix, e in found.items():
            if not low <= scale * e.value <= high:
                left, number = scale * e.value < low, f"{scale * e.value:+.0f}".replace("-", "−")
                edge, text = (low, f" ← {number}") if left else (high, f"{number} → ")
                axes.text(edge, mixes.index(mix), text, ha="left" if left else "right", va="center", fontsize=SMALLEST)
        axes.set_title(TITLES[value])
        axes.set_xlabel(unit + " above SGD which memorizes as much" * (value in AT_EQUAL))
    runs = results.runs(grid)
    rhos = runs[runs.mix != "sgd"].groupby("mix").rho.unique()
    own = {mix: of[0] for mix, of in rhos.items() if len(of) == 1 and of[0] != rho}
    labels = [mix_name(mix) + (f", ρ = {own[mix]:g}" if mix in own else "") for mix in mixes]
    labels = [label + f" (n={n[m]})" * (n[m] < max(n.values())) for label, m in zip(labels, mixes, strict=True)]
    row[0].set_yticks(range(len(mixes)), labels)
    row[0].set_ylim(len(mixes) - 0.4, -0.6)
    note = "mean and 95 % interval over seeds, below it each seed"
    equal = set(panels) <= {*AT_EQUAL}
    if minus_sgd:
        intervals = sum(not np.isnan(e.half) for _, found in panels.values() for e in found)
        partner = "that of SGD of its seed which memorizes as much" if equal else "SGD's, paired by seed"
        note = f"minus {partner}: {note}; an interval may leave the frame; by chance alone "
        note += f"{expected_by_chance(intervals):.1f} of {plural(intervals, 'interval')} would exclude zero"
    elif "memorized" in panels:
        note += "; grey ticks: by chance alone"
    sgd = " minus SGD" * minus_sgd + " that memorizes as much" * equal
    alt = f"Every update{sgd}, beside its controls: {', '.join(map(TITLES.get, panels))}"
    runs = runs[(runs.rho == rho) | runs.mix.isin(["sgd", *own])]
    return figures.describe(figure, alt, results.caption(runs=runs, note=note))


def over_rho(
    results: Results, grids: Grids, values: Iterable[str] = ("test_accuracy", "eval_train_accuracy")
) -> Figure:
    """Accuracies over ρ, a line an update that was trained at several; below, where there are others than SAM, minus
    SAM's at the same ρ."""
    mixes, runs = ablation.swept(results, grids), trainings(results.runs(grids)).reset_index(names="run")
    rhos, panels = sorted(runs.rho[runs.mix.isin(mixes)].unique()), {}
    sgd = pd.concat(runs[runs.mix == "sgd"].assign(rho=rho) for rho in rhos)  # which has no ρ
    rows = {"sgd": sgd} | {mix: runs[runs.mix == mix] for mix in mixes}
    for value in values:
        found = panels[f"{TITLES[value]}, %"] = [(part, value, look(mix)) for mix, part in rows.items() if len(part)]
        if value == "memorized":
            found += [(p, "memorized_chance", s | CHANCE | {"color": s["color"]}) for p, _, s in found]
    others = [mix for mix in mixes if mix != "sam"]
    for value in values if others else ():
        pairs = {mix: results.pairs(mix, "sam", value, grids) for mix in others}
        panels[f"{TITLES[value]} minus SAM's, points"] = [
            (part.reset_index(names="run"), "difference", look(mix)) for mix, part in pairs.items() if len(part)
        ]
    alt = f"Over ρ, by update: {' and '.join(map(TITLES.get, values))}." + " Below, minus SAM's." * bool(others)
    note = "dotted: memorized by chance alone; below: paired by seed" if "memorized" in values else "paired by seed"
    figure = lines(results, panels, "rho", "ρ", alt, note, rows=1 + bool(others), sharey=False)
    for axes in figure.axes:
        rho_axis(axes, rhos, "")
    levels = len(figure.axes) // (1 + bool(others))
    for axes in figure.axes[:levels]:
        axes.set_ylim(max(0, axes.get_ylim()[0]), min(102, axes.get_ylim()[1]))
    for axes in figure.axes[levels:]:
        axes.axhline(0, **look("sam", marker=""))
    for axes in figure.axes[-levels:]:
        axes.set_xlabel("ρ")
    return figure


def labels_fitted(results: Results, grids: Grids) -> Figure:
    """Against the flips that it memorizes, a point a run at any ρ: its test accuracy, and how many of the clean labels
    it fits (see `ablation.fitted`). SGD's runs of all lengths are joined by a line a seed; updates and controls without
    a look of their own are grey."""
    rows = trainings(ablation.fitted(results, grids))
    rows = rows[(rows.status == "done") & rows.fits.notna()]
    alike = pd.Series(configurations(rows, {"mix", "mix_warmup", "rho", "epochs"}), rows.index)
    longest = rows.epochs == rows.epochs.groupby(alike).transform("max")
    drawn, [row] = figures.figure(1, 2, height=4.6)
    panels = {"test accuracy, %": "test_accuracy", "clean labels fitted, %": "fits"}
    shown = [mix for mix in LOOKS if mix not in ("gain1x2", "scale2x0")]
    others = {"color": "#BBBBBB", "linestyle": "", "marker": ".", "markersize": 5, "label": "other updates, controls"}
    for axes, (title, y) in zip(row, panels.items(), strict=True):
        for mix in sorted(in_order(rows.mix), key=shown.__contains__):  # those in front
            of = rows[(rows.mix == mix) & longest]
            axes.plot(100 * of.memorized, 100 * of[y], **look(mix, linestyle="") if mix in shown else others)
        style = look("sgd", markerfacecolor="white", label="SGD of fewer epochs", linewidth=0.7)
        for _, of in rows.sort_values("epochs").groupby(alike):
            of = of[of.mix == "sgd"]
            if len(of) > 1:
                axes.plot(100 * of.memorized, 100 * of[y], zorder=1, **style)
        frame = 100 * rows[y][rows.fits > rows.fits[rows.mix == "sgd"].min() / 2]  # what does not train lies below it
        axes.set(title=title, xlabel="flips memorized, %", ylim=(frame.min() - 2, frame.max() + 2))
    figures.legend(drawn, columns=4)
    alt = "Test accuracy, and the share of the clean labels that is fitted, against flips memorized: a point a run."
    note = "a point a run at its end, of every update and ρ that trains; lines: SGD of one seed, by number of epochs"
    return figures.describe(drawn, alt, results.caption(runs=rows, note=note))
