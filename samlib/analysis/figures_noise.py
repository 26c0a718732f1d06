"""Figures of label noise: which checkpoint carries the flipped labels, and which update memorizes them."""

import numpy as np
from matplotlib.figure import Figure

from samlib.analysis import ablation, figures, noise
from samlib.analysis.figures import look
from samlib.analysis.figures_ablation import TITLES, at_shown_rho, caption, dots, over_rho
from samlib.analysis.results import NotMeasured, Results, mix_name

PANELS = (
    "flips' share of |g|, %",
    "of it beyond chance",
    "flips set direction,\nbeyond chance",
    "growth from g to g',\nflips' over clean's",
)


def probes(results: Results, grid: str | None = None) -> Figure:
    """Over training, a row for SAM and for SGD, a line a checkpoint: the PANELS."""
    rows = noise.probe(results, grid)
    mixes = [mix for mix in ("sam", "sgd") if (rows.mix == mix).any()]
    if not mixes:
        raise NotMeasured("no finished run of SAM or SGD has noise probes")
    figure, axes = figures.figure(len(mixes), 4, height=1.2 + 2.0 * len(mixes), sharex=True, sharey="col")
    for row, mix in zip(axes, mixes, strict=True):
        for code, of_code in rows[rows.mix == mix].groupby("checkpoint"):
            line = of_code.groupby("epoch").mean(numeric_only=True)
            if code == 0:
                row[0].plot(line.index, 100 * line.images, ":", color=figures.GREY, label="share of the images flipped")
                continue
            curves = [100 * line.of_g, *(100 * (line[x] - line[f"{x}_chance"]) for x in ("of_g", "sets"))]
            curves.append(line.flipped_grows / line.clean_grows)
            for ax, curve in zip(row, curves, strict=True):
                style = look(f"checkpoint{code}", markevery=max(1, len(line) // 6), markersize=4, linewidth=1.2)
                ax.plot(line.index, curve, **style)
        for ax, level in zip(row[1:], (0, 0, 1), strict=True):
            ax.axhline(level, color=figures.GREY, linewidth=1)
        row[0].set_ylabel(mix_name(mix))
    for ax, title in zip(axes[0], PANELS, strict=True):
        figures.panel_title(ax, title)
    for column in (0, 1):  # which few parameters of checkpoint 3, where flips and clean images cancel, would stretch
        shown = [
            y for ax in axes[:, column] for line in ax.lines if "3" not in line.get_label() for y in line.get_ydata()
        ]
        axes[0, column].set_ylim(np.nanmin(shown) - 5, np.nanmax(shown) + 5)
    for ax in axes[-1]:
        ax.set_xlabel("epoch")
    figures.legend(figure, columns=5)
    alt = "What images with flipped labels bring to the gradient over training, by checkpoint, and beyond chance."
    note = "chance: as many random active parameters of the same kinds of layer; checkpoint 3 may leave the frame"
    runs = results.runs(grid)
    runs = runs[runs.index.isin(rows.run[rows.mix.isin(mixes)])]
    return figures.describe(figure, alt, results.caption(runs=runs, note=note))


def memorized_dots(results: Results, grid: str | None = None) -> Figure:
    """Test accuracy and memorized labels of every update, beside what chance memorizes, and training accuracy."""
    rho = ablation.shown_rho(results, grid)
    panels = {
        title: at_shown_rho(ablation.levels(results, value, grid), rho)
        for value, title in TITLES.items()
        if value not in ablation.SHARPNESS
    }
    if not len(panels["flips memorized"]):
        raise NotMeasured("no finished run was trained on flipped labels")
    chance = at_shown_rho(ablation.levels(results, "memorized_chance", grid), rho)
    alt = "Test accuracy, flipped labels memorized and training accuracy of every update, beside its controls."
    return dots(
        panels, alt, caption(results, grid, "mean and 95 % interval over seeds; grey ticks: by chance alone"), chance
    )


def memorized_over_rho(results: Results, grids: list[str]) -> Figure:
    alt = "Test accuracy, memorized labels and training accuracy over ρ for SGD, SAM and SANER."
    return over_rho(results, grids, ("test_accuracy", "memorized", "eval_train_accuracy"), alt)
