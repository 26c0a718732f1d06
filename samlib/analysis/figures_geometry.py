"""The figures of the second document's notebooks, 02 to 04: Results in, a described Figure out; raise NotMeasured."""

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from samlib.analysis import figures, geometry
from samlib.analysis.figures import CHANCE, Lines, lines, look, rho_axis
from samlib.analysis.results import Results
from samlib.probes import BINS
from samlib.sam import checkpoint_codes

PANELS = 4  # settings that have a panel of their own, at most


def settings(frame: pd.DataFrame, y: str, chance: str = "") -> Lines:
    """A line a setting, dotted its chance level; its mix's look, in another colour where the mix was there before."""
    seen = []
    for setting, part in frame.groupby("setting", observed=True):
        mix, k = part.mix.iloc[0], seen.count(part.mix.iloc[0])
        other = {"color": figures.OTHERS[len(seen) % 4], "linestyle": (0, (k + 1, 1))} if k else {}
        seen.append(mix)
        style = look(mix, label=setting, **other)
        yield part, y, style
        if chance:
            yield part, chance, style | CHANCE | {"color": style["color"]}


def by_batch(frame: pd.DataFrame, y: str, chance: str = "") -> dict[str, Lines]:
    titles = {"same": "the same images", "other": "other images"}
    return {title: settings(frame[frame.batch == batch], y, chance) for batch, title in titles.items()}


def parts(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each setting that has a panel of its own, the first ones."""
    return dict(list(frame.groupby("setting", observed=True))[:PANELS])


def checkpoints(frame: pd.DataFrame, *also: str) -> Lines:
    return [(frame, name, look(name)) for name in (*geometry.DOCUMENT, *also)]


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
    alt = "A loss of one weight: checkpoint 1 at the bottom of its valleys, 2 above, 3 and 4 by its hilltops"
    figures.legend(figure)
    return figures.describe(figure, alt, f"L(w) = w² / 10 − cos 2w, ρ = {radius:g}: computed, not trained")


def shares(results: Results) -> Figure:
    found = parts(geometry.shares(results))
    panels = {setting: checkpoints(part, "inactive") for setting, part in found.items()}
    alt = "Shares of the four checkpoints over training, a panel a setting, beside the document's at start and end"
    note = "hollow diamonds: the document's; inactive: % of all"
    figure = lines(results, panels, "at", "epoch", alt, note, ylim=(0, None))
    figure.axes[0].set_ylabel("% of the active parameters")
    for axes, part in zip(figure.axes, found.values(), strict=True):
        for name, theirs in geometry.DOCUMENT.items():
            ends, color = [part["at"].min(), part["at"].max()], look(name)["color"]
            axes.plot(ends, 100 * np.array(theirs), **figures.DOCUMENT | {"color": color})
    return figure


def kinds(results: Results) -> Figure:
    found = parts(geometry.kinds(results))
    panels = {f"{s}: {kind}": checkpoints(p) for s, part in found.items() for kind, p in part.groupby("kind")}
    alt = "Shares of the checkpoints over training by kind of layer, a row a setting"
    figure = lines(results, panels, "epoch", "epoch", alt, rows=len(found), ylim=(0, None))
    figure.supylabel("% of the active parameters", fontsize=9)
    return figure


def lifts(results: Results) -> Figure:
    frame = geometry.lifts(results)
    alt = "Overlap of checkpoint 1 with that of later steps over chance within layers, on the same and on other images"
    figure = lines(results, by_batch(frame, "lift"), "about", "steps later", alt, "dotted: chance", scale=1)
    figure.axes[0].set_ylabel("overlap over chance (lift)")
    for axes in figure.axes:
        axes.axhline(1, **CHANCE)
        rho_axis(axes, [lag for lag in geometry.LAGS if str(lag)[0] != "5" and lag <= frame.about.max()], "steps later")
    return figure


def running(results: Results) -> Figure:
    panels = by_batch(geometry.running(results), "share", "by_chance")
    alt = "What has been in checkpoint 1 at every step since, on the same and on other images, beside chance"
    figure = lines(results, panels, "later", "steps later", alt, "dotted: chance within layers", yscale="log")
    figure.axes[0].set_ylabel("left of the first set, %")
    return figure


def ratios(results: Results) -> Figure:
    colors = figures.plt.get_cmap("viridis")(np.linspace(0, 0.95, len(BINS)))
    names = zip(map(geometry.WORDS.get, BINS), colors, "osD^vPX", strict=True)
    looks = [{"label": name, "color": color, "marker": marker} for name, color, marker in names]
    found = parts(geometry.shares(results).assign(at=lambda rows: rows["at"].round()))
    panels = {s: [(part, *of) for of in zip(BINS, looks, strict=True)] for s, part in found.items()}
    alt = "Checkpoint 1 by the ratio of the two gradients' sizes over training, a panel a setting"
    figure = lines(results, panels, "at", "epoch", alt, ylim=(0, None))
    figure.axes[0].set_ylabel("% of checkpoint 1")
    return figure


def thresholds(results: Results) -> Figure:
    frame = geometry.thresholds(results)
    frame[["done", "share", "by_chance"]] *= 100
    panels = {"share of checkpoint 1 above its threshold, %": settings(frame, "share", "by_chance")}
    panels["threshold, |g|"] = settings(frame, "threshold")
    alt = "The share of checkpoint 1 above its threshold, and the threshold, beside the document's and chance"
    note = "hollow diamonds: the document's; dotted: chance within layers"
    figure = lines(results, panels, "done", "training done, %", alt, note, scale=1, sharey=False)
    theirs = frame.drop_duplicates("done").sort_values("done")
    figure.axes[0].plot(theirs.done, 100 * theirs.their_share, **figures.DOCUMENT)
    figure.axes[1].plot(theirs.done, theirs.their_threshold, **figures.DOCUMENT)
    figure.axes[1].set_yscale("log")
    return figure


def predictions(results: Results) -> Figure:
    found, panels = parts(geometry.predictions(results)), {}
    for setting, part in found.items():
        panels[setting] = []
        for name, mix, words in (("relu", "checkpoint1", "ReLU"), ("softplus", "checkpoint3", "softplus")):
            rows, style = part[part.activation == name], look(mix, label=words)
            panels[setting] += [(rows, "right", style)]
            panels[setting] += [(rows, "constant", style | CHANCE | {"color": style["color"]})]
    alt = "Checkpoints that the second-order expansion predicts over the radius, with ReLU and with softplus"
    note = "vertical: the run's ρ; dotted: the commonest code"
    figure = lines(results, panels, "radius", "radius ρ", alt, note, xscale="log", ylim=(0, 101))
    figure.axes[0].set_ylabel("codes predicted right, %")
    for axes, part in zip(figure.axes, found.values(), strict=True):
        axes.axvline(part.rho.iloc[0], color="black", linewidth=0.8)
    return figure


def sweep(results: Results) -> Figure:
    frame = geometry.sweep(results)
    several, hollow = len(frame[list(geometry.REGIME)].drop_duplicates()) > 1, {"markerfacecolor": "none"}
    found = []
    for k, ((mix, _, noise), part) in enumerate(frame.groupby(["mix", *geometry.REGIME], sort=False)):
        style = look(mix)
        if several:
            style |= {"color": figures.OTHERS[k % 4], "label": f"{style['label']}, {100 * noise:g} % flipped"}
        found.append((part, style))
    share, accuracy, both = "checkpoint 1, % of the active", "test accuracy, %", "one against the other"
    panels = {share: [(part, "own", style) for part, style in found], both: []}
    panels[share] += [(p, "common", s | CHANCE | {"color": s["color"]}) for p, s in found if p.common.notna().any()]
    panels[accuracy] = [(part, "test_accuracy", style) for part, style in found]
    alt = "Checkpoint 1's share over ρ, test accuracy over ρ, and one against the other, by rule"
    note = "dotted, hollow: at one common radius; ring: the ρ chosen on held-out training images"
    figure = lines(results, {p: panels[p] for p in (share, accuracy, both)}, "rho", "ρ", alt, note, sharey=False)
    for part, style in found:
        best = 100 * part[part.chosen == "chosen"].groupby("rho").test_accuracy.mean()
        ring = hollow | {"color": style["color"], "marker": "o", "markersize": 13, "linestyle": ""}
        figure.axes[1].plot(best.index, best, **ring)
        for of, face in (("own", {}), ("common", hollow)):
            points = style | {"linestyle": "", "label": None} | face
            figure.axes[2].plot(100 * part[of], 100 * part.test_accuracy, **points)
    for axes in figure.axes[:2]:
        rho_axis(axes, sorted(frame.rho.unique()))
    low, high = figure.axes[1].get_ylim()
    figure.axes[1].set_ylim(max(low, 0), min(high, 103))
    figure.axes[2].set(xlabel=share, ylabel=accuracy)
    return figure


def leaving(results: Results) -> Figure:
    frame = geometry.leaving(results)
    panels = {"in checkpoint 1, % of the active": "share", "never left it, % of the first": "survival"}
    panels = {title: settings(frame, y) for title, y in (panels | {"new in it, % of its members": "newcomers"}).items()}
    alt = "Fixed weights over the radius: checkpoint 1's share, how many never left it, how many are new in it"
    note = "one batch, after the last epoch"
    return lines(results, panels, "radius", "radius ρ", alt, note, xscale="log", ylim=(0, 100))
