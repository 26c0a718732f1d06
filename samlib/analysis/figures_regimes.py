"""Figures of the notebooks 05 and 07: data regimes, and large batches."""

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from samlib.analysis import regimes
from samlib.analysis.figures import GREY, describe, figure, legend, look, panel_title
from samlib.analysis.results import REGIME, NotMeasured, Results, estimates, in_order, mix_name
from samlib.analysis.stats import Estimate

FIELDS = ("seed", "data_seed", "test_images", "flipped")  # of a run, that an interval needs
NAMES = {"test_accuracy": "test accuracy, %", "memorized": "flipped labels memorized, %"}
CHOSEN = "ρ: that of the best accuracy on held-out training images, or the only one; mean and 95 % interval over seeds"


def named(regime: tuple) -> str:
    return f"{100 * regime[0]:g} % of the data, {100 * regime[1]:g} % flipped"


def band(axes: Axes, x: Iterable, found: list[Estimate], scale: float = 1, **style: object) -> None:
    """The means as a line, their intervals as a band; scale: 0: the estimates are of logarithms."""
    parts = (np.array([getattr(e, name) for e in found]) for name in ("value", "low", "high"))
    value, low, high = (scale * part if scale else np.exp(part) for part in parts)
    axes.plot(x, value, **style)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def curves(results: Results, value: str = "test_accuracy") -> Figure:
    """One value over the epochs, a panel a regime, for each mix. value: of NAMES."""
    runs = regimes.chosen(results)
    runs = runs[(runs.status == "done") & ((runs.noise_fraction > 0) | (value != "memorized"))]
    rows = results.table("metrics", regimes.grid(results, "regimes"), (*FIELDS, "mix", *REGIME))
    rows = rows[rows.run.isin(runs.index)]
    if rows.empty:
        raise NotMeasured(f"no run of {results.study.title!r} has flipped labels")
    sizes, noises = (sorted(rows[name].unique()) for name in REGIME)
    drawn, axes = figure(len(sizes), len(noises), 0.7 + 2.1 * len(sizes), sharey=True)
    for (size, noise), part in rows.groupby(list(REGIME)):
        panel = axes[sizes.index(size), noises.index(noise)]
        panel_title(panel, named((size, noise)))
        for mix in in_order(part.mix):
            found = estimates(part[part.mix == mix], value, ("epoch",))
            band(panel, found.index, list(found), 100, **look(mix, markevery=max(1, len(found) // 6)))
            if value == "memorized" and "memorized_chance" in part:
                chance = part[part.mix == mix].groupby("epoch").memorized_chance.mean()
                panel.plot(chance.index, 100 * chance, ":", color=look(mix)["color"], linewidth=0.9)
    from_zero = value == "memorized"
    least = 0 if from_zero else 100 * rows.groupby([*REGIME, "mix", "epoch"])[value].mean().min() - 3
    for panel in axes[-1]:
        panel.set(xlabel="epoch", ylim=(least, 101))
    drawn.supylabel(NAMES[value], fontsize=9)
    legend(drawn)
    note = "; dotted: what a network that knows nothing of the flips would predict" if from_zero else ""
    alt = f"{NAMES[value]} over the epochs of {', '.join(map(mix_name, in_order(rows.mix)))}. A panel a data regime."
    return describe(drawn, alt, results.caption(runs=runs, note=CHOSEN + note))


def heatmap(results: Results) -> Figure:
    """Each mix minus SGD in test accuracy, data size by label noise; bold where the interval excludes zero."""
    runs = regimes.chosen(results)
    table = regimes.gains(runs)
    if table.empty:
        raise NotMeasured(f"no regime of {results.study.title!r} has a pair of runs")
    sizes, noises = (sorted(runs[name].unique()) for name in REGIME)
    values = 100 * table.map(lambda e: getattr(e, "value", np.nan)).abs().max().max()
    drawn, axes = figure(1, table.shape[1], 1.2 + 0.75 * len(sizes), width=1.5 + 1.6 * len(noises) * table.shape[1])
    for panel, (name, column) in zip(axes[0], table.items(), strict=True):
        found = [[column.get((size, noise), Estimate()) for noise in noises] for size in sizes]
        shades = np.array([[100 * getattr(e, "value", np.nan) for e in row] for row in found])
        image = panel.imshow(shades, cmap="PuOr_r", vmin=-values, vmax=values, aspect="auto")
        for (i, j), shade in np.ndenumerate(shades):
            e, dark = found[i][j], abs(shade) > 0.6 * values
            text = "–" if np.isnan(shade) else e.format(n=False).replace(" points", "") + f"\nn={e.n}"
            style = {"weight": "bold" if e.excludes() else "normal", "color": "white" if dark else "black"}
            panel.text(j, i, text, ha="center", va="center", fontsize=9, **style)
        panel.set_xticks(range(len(noises)), [f"{100 * n:g} %" for n in noises])
        panel.set_yticks(range(len(sizes)), [f"{100 * s:g} %" for s in sizes])
        panel.set(xlabel="labels flipped", ylabel="data")
        panel.grid(False)
        panel_title(panel, f"{name}, points of test accuracy")
    drawn.colorbar(image, ax=axes, label="points", pad=0.01)
    note = f"bold: the 95 % interval excludes zero. {CHOSEN.split(';')[0]}"
    alt = f"{' and '.join(table)} in test accuracy. A cell a regime: data size by label noise."
    return describe(drawn, alt, results.caption(runs=runs, note=note))


def rivals(results: Results) -> Figure:
    """Each mix's gain over SGD, over SGD stopped early and over SGD of twice the epochs, in each regime."""
    table = regimes.rivals(results)
    names = list(dict.fromkeys(table.index.get_level_values("difference")))
    cells = sorted({key[:2] for key in table.index}, reverse=True)
    drawn, axes = figure(1, len(names), 1.4 + 0.55 * len(cells), sharex=True, sharey=True)
    for panel, name in zip(axes[0], names, strict=True):
        panel.axvline(0, color=GREY, linewidth=1)
        for k, (rival, marker) in enumerate(zip(table, "os^D", strict=False)):
            found = [table[rival].get((*cell, name), Estimate()) for cell in cells]
            dots(panel, found, np.arange(len(cells)) + 0.27 - 0.18 * k, 100, fmt=marker, color=f"C{k}", label=rival)
        panel.set(xlabel="points of test accuracy", yticks=range(len(cells)), yticklabels=map(named, cells))
        panel_title(panel, name)
    legend(drawn)
    note = "early stopping: at the epoch that is best on held-out training images"
    alt = f"{' and '.join(names)} in test accuracy at the end, and against SGD stopped early or trained twice as long."
    return describe(drawn, alt, results.caption("regimes", note=note))


def dots(panel: Axes, found: list[Estimate], y: Iterable, scale: float = 1, **style: object) -> None:
    """Means with their intervals, across."""
    value, half = (scale * np.array([getattr(e, name) for e in found]) for name in ("value", "half"))
    panel.errorbar(value, y, xerr=half, markersize=5, linewidth=1.2, capsize=2, linestyle="", **style)


def sharpness(results: Results) -> Figure:
    """Sharpness and the generalization gap: a panel a measure, a point a run, a line from mix to mix of one regime."""
    rows = regimes.sharpness(results)
    kinds = sorted(rows.kind.unique(), reverse=True)
    drawn, axes = figure(1, len(kinds), 3.0, sharey=True)
    for panel, kind in zip(axes[0], kinds, strict=True):
        part = rows[rows.kind == kind]
        for _, cell in part.groupby(list(REGIME)):
            means = cell.groupby("mix")[["value", "gap"]].mean().loc[in_order(cell.mix)]
            panel.plot(means.value, 100 * means.gap, color=GREY, linewidth=0.8, zorder=1)
        for mix in in_order(part.mix):
            of_mix = part[part.mix == mix]
            panel.plot(of_mix.value, 100 * of_mix.gap, **look(mix, linestyle="", markersize=4, alpha=0.8))
        panel.set_xscale("symlog", linthresh=max(1e-4, part.value.abs().quantile(0.1)))
        panel.set_xlabel("nats")
        panel_title(panel, kind)
    axes[0, 0].set_ylabel("gap, points")
    legend(drawn)
    note = "gap: accuracy on the training labels minus that on the test set; a line: one regime's means"
    alt = "Sharpness against the generalization gap, a point a run. A line joins the means of a regime's mixes."
    return describe(drawn, alt, results.caption("regimes", note=note))


def sweep(results: Results) -> Figure:
    """Each mix over ρ: held-out accuracy, by which ρ is chosen, test accuracy and memorized flips."""
    table = regimes.sweep(results)
    name, values = regimes.grid(results, "sweep", "rho"), [c for c in table if c != "chosen"]
    drawn, axes = figure(1, len(values), 2.9)
    words = NAMES | {"validation_accuracy": "accuracy on held-out training images, %"}
    for panel, value in zip(axes[0], values, strict=True):
        for mix in in_order(table.index.get_level_values("mix")):
            part = table.xs(mix, level="mix")
            y, half = (100 * np.array([getattr(e, of) for e in part[value]]) for of in ("value", "half"))
            panel.errorbar(part.index, y, yerr=half, capsize=2, **look(mix))
            at = (part.chosen != "").to_numpy()
            panel.plot(part.index[at], y[at], "o", markersize=12, markerfacecolor="none", color=GREY)
        panel.set(xscale="log", xlabel="ρ", ylim=(0, None))
        rhos = sorted(table.index.get_level_values("rho").unique())
        panel.set_xticks(rhos, [f"{rho:g}" for rho in rhos])
        panel.minorticks_off()
        panel_title(panel, words[value])
    legend(drawn)
    note = "ringed: the ρ that the held-out images choose, whose labels are flipped as the others are"
    alt = "Accuracy and memorized labels over ρ, for each mix. The ρ that held-out training images choose is ringed."
    return describe(drawn, alt, results.caption(name, note=note))


def batches(results: Results) -> Figure:
    """Experiment 4 over the epochs: training loss, gradient norm and test accuracy of each batch size and rate."""
    name = regimes.grid(results, "batch")
    by = ("batch_size", "lr_run", *FIELDS)
    metrics = results.table("metrics", name, ("batch_size", "lr", *FIELDS))
    probes = results.table("probes", name, ("batch_size", "lr", "rho", *FIELDS)).query("rho == rho_run")
    probes = probes.groupby(["run", "epoch", *by], dropna=False).grad_norm.mean().reset_index()
    panels = {"training loss, nats": (metrics, "eval_train_loss", 0)}
    panels |= {"gradient norm, mean of an epoch": (probes, "grad_norm", 0)}
    panels |= {"test accuracy, %": (metrics, "test_accuracy", 100)}
    drawn, axes = figure(1, 3, 2.9)
    for panel, (title, (rows, value, scale)) in zip(axes[0], panels.items(), strict=True):
        for k, ((size, lr), part) in enumerate(rows.groupby(["batch_size", "lr_run"])):
            part = part if scale else part.assign(**{value: np.log(part[value])})
            found, words = estimates(part, value, ("epoch",)), f"batch {size}, rate {lr:g}"
            style = {"color": f"C{k}", "linestyle": ("-", "--", "-.", ":")[k % 4], "marker": "os^D"[k % 4]}
            band(panel, found.index, list(found), scale, label=words, markersize=4, markevery=0.2, **style)
        panel.set(xlabel="epoch", yscale="linear" if scale else "log")
        if scale:
            panel.set_ylim(100 * rows.test_accuracy.min() - 3, 101)
        panel_title(panel, title)
    legend(drawn)
    alt = "Training loss, gradient norm and test accuracy over the epochs. A line a batch size and learning rate."
    return describe(
        drawn,
        alt,
        results.caption(name, note="mean, on logarithmic axes the geometric one, and 95 % interval over seeds"),
    )
