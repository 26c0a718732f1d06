"""Figures of the checkpoint ablation: every update beside SGD, SAM and its controls, and over ρ."""

import textwrap
from contextlib import suppress

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from samlib.analysis import ablation, figures
from samlib.analysis.figures import look
from samlib.analysis.results import NotMeasured, Results, in_order, mix_name
from samlib.analysis.stats import Estimate, expected_by_chance

TITLES = {"test_accuracy": "test accuracy", "memorized": "flips memorized", "eval_train_accuracy": "training accuracy"}
TITLES |= {name: textwrap.fill(f"sharpness, {name}", 24) for name in ablation.SHARPNESS}


def drawn(e: Estimate) -> tuple[float, float]:
    """Value and half-width, 0 where there is no interval; shares in percent."""
    scale = 100 if e.unit in ("%", "points") else 1
    return scale * e.value, scale * np.nan_to_num(e.half)


def dots(panels: dict[str, pd.Series], alt: str, caption: str, chance: pd.Series | None = None) -> Figure:
    """A row an update, a panel a quantity: its Estimates by mix. SAM's value is carried down as a line; n stands
    beside an update with fewer runs. Limits are around the means: an interval much wider than their range is cut off.
    chance: Estimates that are ticks in the second panel."""
    mixes = in_order(mix for found in panels.values() for mix in found.index)
    n = {mix: max(found[mix].n for found in panels.values() if mix in found) for mix in mixes}
    figure, axes = figures.figure(1, len(panels), height=1.2 + 0.23 * len(mixes), sharey=True)
    for ax, (title, found) in zip(axes[0], panels.items(), strict=True):
        for mix, e in found.items():
            value, half = drawn(e)
            style = look(mix, linestyle="", capsize=2.5, elinewidth=1.1)
            ax.errorbar(value, mixes.index(mix), xerr=half or None, **style)
        values = [drawn(e)[0] for e in found]
        if found.iloc[0].signed:
            ax.axvline(0, color=look("sgd")["color"], linewidth=1)
            values.append(0)
        if "sam" in found:
            ax.axvline(drawn(found["sam"])[0], color=look("sam")["color"], linestyle="--", linewidth=1, zorder=1)
        if chance is not None and ax is axes[0, 1]:
            ticks = [drawn(e)[0] for e in chance]
            ax.plot(ticks, [mixes.index(mix) for mix in chance.index], "|", color=figures.GREY, markersize=12)
        room = 0.5 * np.ptp(values) or 1.0
        ax.set_xlim(max(min(values) - room, ax.get_xlim()[0]), min(max(values) + room, ax.get_xlim()[1]))
        figures.panel_title(ax, title)
        ax.set_xlabel(found.iloc[0].unit)
    labels = [mix_name(mix) + f" (n={n[mix]})" * (n[mix] < max(n.values())) for mix in mixes]
    axes[0, 0].set_yticks(range(len(mixes)), labels)
    axes[0, 0].set_ylim(len(mixes) - 0.5, -0.5)
    return figures.describe(figure, alt, caption)


def at_shown_rho(found: pd.Series, rho: float) -> pd.Series:
    """Of Estimates by mix and ρ those at one ρ and SGD's, that are measured, by mix."""
    keep = [not np.isnan(e.value) and (mix == "sgd" or at == rho) for (mix, at), e in found.items()]
    return found[keep].droplevel("rho")


def caption(results: Results, grid: str | None, note: str) -> str:
    """Results.caption of the runs at `shown_rho`."""
    runs = results.runs(grid)
    return results.caption(runs=runs[(runs.rho == ablation.shown_rho(results, grid)) | (runs.mix == "sgd")], note=note)


def difference_dots(results: Results, grid: str | None, values: tuple[str, ...], alt: str) -> Figure:
    """The differences to SGD, paired by seed, at one ρ; a panel a quantity that is measured."""
    rho = ablation.shown_rho(results, grid)
    found = {v: at_shown_rho(ablation.differences(results, v, grid=grid), rho) for v in values}
    panels = {TITLES[value]: estimates for value, estimates in found.items() if len(estimates)}
    if not panels:
        raise NotMeasured("no finished run has an SGD partner")
    intervals = sum(not np.isnan(e.half) for estimates in panels.values() for e in estimates)
    note = "minus SGD's, paired by seed: mean and 95 % interval, which may leave the frame"
    note += f"; by chance alone {expected_by_chance(intervals):.1f} of the {intervals} intervals would exclude zero"
    return dots(panels, alt, caption(results, grid, note))


def accuracy_dots(results: Results, grid: str | None = None) -> Figure:
    alt = "Test accuracy, memorized labels and training accuracy of every update minus SGD's, beside its controls."
    return difference_dots(results, grid, ("test_accuracy", "memorized", "eval_train_accuracy"), alt)


def sharpness_dots(results: Results, grid: str | None = None) -> Figure:
    alt = "Sharpness at the end of every update minus SGD's, four measures, beside its controls; left is flatter."
    return difference_dots(results, grid, tuple(ablation.SHARPNESS), alt)


def over_rho(results: Results, grids: list[str], values: tuple[str, ...], alt: str) -> Figure:
    """Quantities over ρ, a line an update that was trained at several, SGD as a band; dotted, what chance memorizes."""
    runs = results.runs(grids)
    mixes = in_order(mix for mix, rhos in runs[runs.mix != "sgd"].groupby("mix").rho if rhos.nunique() > 1)
    if not mixes:
        raise NotMeasured("no update was trained at several ρ")
    levels = {}
    for value in values:
        with suppress(NotMeasured):
            levels[value] = ablation.levels(results, value, grids)
    figure, axes = figures.figure(1, len(levels), height=3.4)
    for ax, (value, found) in zip(axes[0], levels.items(), strict=True):
        chance = ablation.levels(results, "memorized_chance", grids) if value == "memorized" else None
        for place, mix in enumerate(mixes):
            line = found[found.index.get_level_values("mix") == mix].droplevel("mix")
            if line.empty:
                continue
            means, halves = zip(*map(drawn, line), strict=True)
            x = line.index.to_numpy() * 1.02 ** (place - len(mixes) / 2)  # intervals beside each other
            ax.errorbar(x, means, yerr=halves, **look(mix, capsize=2.5, elinewidth=0.8))
            if chance is not None:
                line = [drawn(e)[0] for e in chance.xs(mix, level="mix")]
                ax.plot(x, line, color=look(mix)["color"], linestyle=":", linewidth=1)
        if "sgd" in found.index.get_level_values("mix"):
            level, half = drawn(found.xs("sgd", level="mix").iloc[0])
            ax.axhline(level, **look("sgd", marker=""))
            ax.axhspan(level - half, level + half, color=look("sgd")["color"], alpha=0.1, linewidth=0)
        ticks = sorted(runs.rho[runs.mix.isin(mixes)].unique())
        ax.set_xscale("log")
        ax.set_xticks(ticks, [f"{rho:g}" for rho in ticks])
        ax.set_xticks([], minor=True)
        ax.set(xlabel="ρ", ylabel=found.iloc[0].unit)
        figures.panel_title(ax, TITLES[value])
    figures.legend(figure, columns=6)
    note = "mean and 95 % interval over seeds" + "; dotted: memorized by chance alone" * ("memorized" in values)
    return figures.describe(figure, alt, results.caption(runs=runs[runs.mix.isin(["sgd", *mixes])], note=note))


def accuracy_over_rho(results: Results, grids: list[str]) -> Figure:
    alt = "Test accuracy, training accuracy and sharpness over ρ, for SGD, SAM and its variants."
    values = ("test_accuracy", "eval_train_accuracy", "random directions, normalized logits")
    return over_rho(results, grids, values, alt)
