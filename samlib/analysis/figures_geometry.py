"""The figures of the second document's notebooks, 02 to 04: Results in, a described Figure out; raise NotMeasured."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from samlib.analysis import figures, geometry
from samlib.analysis.figures import look, panel_title
from samlib.analysis.results import Results
from samlib.probes import BINS
from samlib.sam import checkpoint_codes

PANELS = 4  # settings that have a panel of their own, at most
CHANCE = {"color": figures.GREY, "linestyle": ":", "linewidth": 1.2, "marker": "", "label": None}
SEEDS = "lines: means over the seeds, bands: from the least to the greatest"


def finished(
    figure: Figure, results: Results, frame: pd.DataFrame, alt: str, note: str = "", seeds: str = SEEDS
) -> Figure:
    longest = max((len(label) for axes in figure.axes for label in axes.get_legend_handles_labels()[1]), default=1)
    figures.legend(figure, columns=min(5, 110 // (longest + 7)))
    note = f"{note}; {seeds}" if note else seeds
    return figures.describe(figure, alt, results.caption(runs=results.runs().loc[frame.run.unique()], note=note))


def plain(axes: Axes, ticks: Any) -> None:
    """A logarithmic x axis with these ticks, as plain numbers."""
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def curve(axes: Axes, frame: pd.DataFrame, x: str, y: str, scale: float = 100, **style: Any) -> None:
    """The mean over runs by x, and their range, but for what has no label: chance."""
    over = (scale * frame.groupby([x, "run"])[y].mean()).groupby(level=0).agg(["mean", "min", "max"])
    axes.plot(over.index, over["mean"], markevery=max(1, len(over) // 8), **style)
    if style["label"]:
        axes.fill_between(over.index, over["min"], over["max"], color=style["color"], alpha=0.15, linewidth=0)


def looks(frame: pd.DataFrame) -> list[tuple[pd.DataFrame, dict]]:
    """Each setting's rows and look: its mix's, in another colour and line for a mix that was there before."""
    found, seen = [], []
    for setting, part in frame.groupby("setting", observed=True):
        mix, k = part.mix.iloc[0], seen.count(part.mix.iloc[0])
        other = {"color": figures.OTHERS[len(seen) % 4], "linestyle": (0, (k + 1, 1))} if k else {}
        found.append((part, look(mix, label=setting, **other)))
        seen.append(mix)
    return found


def lines(
    panels: dict[str, tuple[pd.DataFrame, str, str]], x: str, xlabel: str, scale: float = 1, sharey: bool = False
) -> tuple[Figure, np.ndarray]:
    """A panel a title: of its rows the column y, and the column of its chance level ("": none); a line a setting."""
    figure, [row] = figures.figure(1, len(panels), height=3.2, sharey=sharey)
    for axes, (title, (frame, y, chance)) in zip(row, panels.items(), strict=True):
        for part, style in looks(frame):
            curve(axes, part, x, y, scale, **style)
            if chance:
                curve(axes, part, x, chance, scale, **style | CHANCE | {"color": style["color"]})
        panel_title(axes, title)
        axes.set_xlabel(xlabel)
    return figure, row


def by_batch(frame: pd.DataFrame, y: str, chance: str = "") -> dict[str, tuple[pd.DataFrame, str, str]]:
    titles = {"same": "the same images", "other": "other images"}
    return {title: (frame[frame.batch == batch], y, chance) for batch, title in titles.items()}


def shown(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of as many settings as have a panel of their own, the first ones."""
    return frame[frame.setting.isin(list(frame.setting.unique().sort_values())[:PANELS])]


def panels_of(frame: pd.DataFrame, ylabel: str, **options: Any) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A panel a setting, with its rows. options: of Axes.set."""
    parts = list(frame.groupby("setting", observed=True))
    figure, [panels] = figures.figure(1, len(parts), height=3.4, sharey=True)
    for axes, (setting, _) in zip(panels, parts, strict=True):
        panel_title(axes, setting)
        axes.set(**options)
    panels[0].set_ylabel(ylabel)
    return figure, [(axes, part) for axes, (_, part) in zip(panels, parts, strict=True)]


def one_dimension(radius: float = 0.6) -> Figure:
    """The checkpoints on L(w) = w² / 10 − cos 2w, computed at w and w + ρ sign(g)."""
    w = np.linspace(-6, 6, 4801)
    slope = 0.2 * w + 2 * np.sin(2 * w)
    there = w + radius * np.sign(slope)
    codes = checkpoint_codes(*map(torch.from_numpy, (slope, 0.2 * there + 2 * np.sin(2 * there)))).numpy()
    figure, [[axes]] = figures.figure(height=2.6)
    for code in range(1, 5):
        loss = np.where(codes == code, 0.1 * w**2 - np.cos(2 * w), np.nan)
        axes.plot(w, loss, **look(f"checkpoint{code}", linestyle="-", linewidth=3, markevery=60))
    axes.set(xlabel="w", ylabel="loss L(w)")
    figures.legend(figure)
    alt = "A loss of one weight: checkpoint 1 at the bottom of its valleys, 2 above, 3 and 4 by its hilltops"
    return figures.describe(figure, alt, f"L(w) = w² / 10 − cos 2w, ρ = {radius:g}: computed, not trained")


def shares(results: Results) -> Figure:
    frame = shown(geometry.shares(results))
    figure, panels = panels_of(frame, "% of the active parameters", xlabel="epoch")
    for axes, part in panels:
        for name in (*geometry.DOCUMENT, "inactive"):
            curve(axes, part, "at", name, **look(name))
            if name in geometry.DOCUMENT:
                theirs, ends = 100 * np.array(geometry.DOCUMENT[name]), [part["at"].min(), part["at"].max()]
                axes.plot(ends, theirs, **figures.DOCUMENT | {"color": look(name)["color"]})
        axes.set_ylim(bottom=0)
    alt = "Shares of the four checkpoints over training, a panel a setting, beside the document's at start and end"
    return finished(figure, results, frame, alt, "hollow diamonds: the document's; inactive: % of all")


def kinds(results: Results) -> Figure:
    frame = shown(geometry.kinds(results))
    parts, names = list(frame.groupby("setting", observed=True)), sorted(frame.kind.unique())
    figure, grid = figures.figure(len(parts), len(names), height=1 + 1.9 * len(parts), sharex=True, sharey=True)
    for (row, column), axes in np.ndenumerate(grid):
        setting, part = parts[row]
        for name in geometry.DOCUMENT:
            curve(axes, part[part.kind == names[column]], "epoch", name, **look(name))
        panel_title(axes, f"{setting}: {names[column]}")
        axes.set_xlabel("epoch" if row == len(parts) - 1 else "")
    figure.supylabel("% of the active parameters", fontsize=9)
    return finished(figure, results, frame, "Shares of the checkpoints over training by kind of layer, a row a setting")


def lifts(results: Results) -> Figure:
    frame = geometry.lifts(results)
    figure, panels = lines(by_batch(frame, "lift"), "about", "steps later", sharey=True)
    panels[0].set_ylabel("overlap over chance (lift)")
    for axes in panels:
        axes.axhline(1, **CHANCE)
        plain(axes, [lag for lag in geometry.LAGS if str(lag)[0] != "5" and lag <= frame.about.max()])
    alt = "Overlap of checkpoint 1 with that of later steps over chance within layers, on the same and on other images"
    return finished(figure, results, frame, alt, "dotted: chance")


def running(results: Results) -> Figure:
    frame = geometry.running(results)
    figure, panels = lines(by_batch(frame, "share", "by_chance"), "later", "steps later", 100, sharey=True)
    panels[0].set(yscale="log", ylabel="left of the first set, %")
    alt = "What has been in checkpoint 1 at every step since, on the same and on other images, beside chance"
    return finished(figure, results, frame, alt, "dotted: chance within layers")


def ratios(results: Results) -> Figure:
    frame = shown(geometry.shares(results))
    figure, panels = panels_of(frame, "% of checkpoint 1", xlabel="epoch", ylim=(0, 100))
    colors = figures.plt.get_cmap("viridis")(np.linspace(0, 1, len(BINS)))
    for axes, part in panels:
        mean = 100 * part.groupby(part["at"].round())[list(BINS)].mean()
        axes.stackplot(mean.index, mean.T, labels=geometry.RATIOS.values(), colors=colors, edgecolor="white", lw=0.4)
    alt = "Checkpoint 1 by the ratio of the two gradients' sizes over training, stacked, a panel a setting"
    return finished(figure, results, frame, alt, seeds="means over the seeds")


def lengths(results: Results) -> Figure:
    frame = geometry.shares(results)
    parts = {geometry.WORDS[name]: (frame, name, "") for name in ("grad_norm", "length", "cosine")}
    figure, panels = lines(parts, "at", "epoch")
    panels[0].set_yscale("log")
    panels[1].axhline(1, **CHANCE)
    return finished(figure, results, frame, "Norm of g, ratio of the norms of g' and g, and their cosine over training")


def resting(results: Results) -> Figure:
    frame = geometry.last(geometry.rows(results, "convergence")).query("checkpoint > 0")
    parts = {"mean gradient differs from zero, %": (frame, "significant", "chance")}
    parts["would move by 1 % in an epoch, %"] = (frame, "moving", "")
    figure, panels = lines(parts, "checkpoint", "checkpoint", 100)
    for axes in panels:
        axes.axhline(60, color=figures.DOCUMENT["color"], linestyle="--", linewidth=1, label="the document: 60 %")
        axes.set(xticks=range(1, 5), ylim=(0, 100))
    alt = "By checkpoint, at the end: the share whose mean gradient differs from zero, and the share that moves"
    return finished(figure, results, frame, alt, "dotted: by chance")


def thresholds(results: Results) -> Figure:
    frame = geometry.thresholds(results)
    frame[["done", "share", "by_chance"]] *= 100
    parts = {"share of checkpoint 1 above its threshold, %": (frame, "share", "by_chance")}
    figure, panels = lines(parts | {"threshold, |g|": (frame, "threshold", "")}, "done", "training done, %")
    theirs = frame.drop_duplicates("done").sort_values("done")
    panels[0].plot(theirs.done, 100 * theirs.their_share, **figures.DOCUMENT, label="the document")
    panels[1].plot(theirs.done, theirs.their_threshold, **figures.DOCUMENT)
    panels[1].set_yscale("log")
    alt = "The share of checkpoint 1 above its threshold, and the threshold, beside the document's and chance"
    return finished(figure, results, frame, alt, "dotted: chance within layers")


def diagonals(results: Results) -> Figure:
    frame = shown(geometry.diagonals(results))
    figure, panels = panels_of(frame, "diagonal entry of the Hessian", xlabel="checkpoint")
    names = {"q05": "whislo", "q25": "q1", "median": "med", "q75": "q3", "q95": "whishi", "mean": "mean"}
    style = {"showfliers": False, "showmeans": True, "medianprops": {"color": look("sam")["color"]}}
    style["meanprops"] = {"marker": "D", "markerfacecolor": "black", "markeredgecolor": "black"}
    for axes, part in panels:
        boxes = part.groupby("checkpoint")[list(names)].mean().rename(columns=names).to_dict("index")
        axes.bxp([box | {"label": str(code)} for code, box in boxes.items()], **style)
        axes.set_yscale("log")
    alt = "Quantiles and mean of the Hessian's diagonal by checkpoint at the end of training, a panel a setting"
    note = "boxes: quartiles, whiskers: 5 and 95 %, diamond: mean"
    return finished(figure, results, frame, alt, note, "means over the seeds")


def predictions(results: Results) -> Figure:
    frame = shown(geometry.predictions(results))
    figure, panels = panels_of(frame, "codes predicted right, %", xlabel="radius ρ", xscale="log", ylim=(0, 101))
    for axes, part in panels:
        for activation, mix, name in (("relu", "checkpoint1", "ReLU"), ("softplus", "checkpoint3", "softplus")):
            rows, style = part[part.activation == activation], look(mix, label=name)
            curve(axes, rows, "radius", "right", **style)
            chance = CHANCE | {"color": style["color"], "label": f"the commonest code, {name}"}
            curve(axes, rows, "radius", "constant", **style | chance)
        axes.axvline(part.rho.iloc[0], color="black", linewidth=0.8)
    alt = "Checkpoints that the second-order expansion predicts over the radius, with ReLU and with softplus"
    return finished(figure, results, frame, alt, "vertical: the run's ρ")


def sweep(results: Results) -> Figure:
    frame = geometry.sweep(results)
    figure, [[share, accuracy, both]] = figures.figure(1, 3, height=3.2)
    several = frame[list(geometry.REGIME)].drop_duplicates().shape[0] > 1
    for k, ((mix, _, noise), part) in enumerate(frame.groupby(["mix", *geometry.REGIME], sort=False)):
        style, bare = look(mix), {"linestyle": "", "label": None}
        if several:
            style |= {"color": figures.OTHERS[k % 4], "label": f"{style['label']}, {100 * noise:g} % flipped"}
        curve(share, part, "rho", "own", **style)
        curve(accuracy, part, "rho", "test_accuracy", **style)
        if part.common.notna().any():
            curve(share, part, "rho", "common", **style | {"markerfacecolor": "none", "label": ""})
            both.plot(100 * part.common, 100 * part.test_accuracy, **style | bare | {"markerfacecolor": "none"})
        both.plot(100 * part.own, 100 * part.test_accuracy, **style | bare)
        best = 100 * part[part.chosen == "chosen"].groupby("rho").test_accuracy.mean()
        accuracy.plot(best, color=style["color"], marker="o", markersize=13, markerfacecolor="none", linestyle="")
    for axes, label in ((share, "checkpoint 1, % of the active"), (accuracy, "test accuracy, %")):
        plain(axes, sorted(frame.rho.unique()))
        axes.set(xlabel="ρ", ylabel=label)
    both.set(xlabel="checkpoint 1, % of the active", ylabel="test accuracy, %")
    alt = "Checkpoint 1's share over ρ, test accuracy over ρ, and one against the other, by rule"
    note = "filled: at the run's own ρ, hollow: at one common radius; ring: the ρ chosen on held-out training images"
    return finished(figure, results, frame, alt, note)


def leaving(results: Results) -> Figure:
    frame = geometry.leaving(results)
    titles = ("in checkpoint 1, % of the active", "never left it, % of the first", "outside before, % of its members")
    names = zip(titles, ("share", "survival", "newcomers"), strict=True)
    figure, panels = lines({title: (frame, name, "") for title, name in names}, "radius", "radius ρ", 100)
    for axes in panels:
        axes.set(xscale="log", ylim=(0, 100))
    alt = "Fixed weights over the radius: checkpoint 1's share, how many never left it, how many are new in it"
    return finished(figure, results, frame, alt, "one batch, after the last epoch")
