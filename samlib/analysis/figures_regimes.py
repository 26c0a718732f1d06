"""Figures of the notebooks 05 and 07: data regimes, and large batches."""

from contextlib import suppress
from itertools import product

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from samlib.analysis import regimes
from samlib.analysis.figures import CHANCE, GREY, describe, figure, legend, lines, look, rho_axis
from samlib.analysis.results import (
    REGIME,
    SHARPNESS,
    NotMeasured,
    Results,
    in_order,
    mix_name,
    setting_name,
    trainings,
)
from samlib.analysis.stats import LEAST, Estimate

NAMES = {
    "test_accuracy": "test accuracy, %",
    "memorized": "flipped labels memorized, %",
    "validation_accuracy": "accuracy on held-out training images, %",
}
CHOSEN = "ρ: that of the best accuracy on held-out training images, or the only one"


def finished(runs: pd.DataFrame) -> pd.DataFrame:
    return runs[runs.status != "missing"]


def curves(results: Results, value: str = "test_accuracy") -> Figure:
    """One value over the epochs, a panel a regime, for each mix. value: of NAMES."""
    runs, flips = regimes.chosen(results), value == "memorized"
    runs = runs[(runs.status == "done") & ((runs.noise_fraction > 0) | (not flips))]
    rows = results.table("metrics", regimes.grid(results, "regimes"), ("mix", *REGIME))
    rows = rows[rows.run.isin(runs.index)]
    if rows.empty:
        raise NotMeasured(f"no run of {results.study.title!r} has flipped labels")
    regimes_drawn = product(*(sorted(rows[name].unique()) for name in REGIME))  # one that was not run has no panel
    panels = {setting_name(*regime): [] for regime in regimes_drawn}
    for regime, part in rows.groupby(list(REGIME)):
        mixes = [(part[part.mix == mix], look(mix)) for mix in in_order(part.mix)]
        panels[setting_name(*regime)] = [(of_mix, value, style) for of_mix, style in mixes]
        if flips and "memorized_chance" in part:
            panels[setting_name(*regime)] += [
                (of_mix, "memorized_chance", CHANCE | {"color": style["color"]}) for of_mix, style in mixes
            ]
    means = 100 * rows.groupby([*REGIME, "mix", "epoch"])[value].mean()
    least, most = (0, 101) if flips else (means.min() - 3, min(means.max() + 5, 101))
    alt = f"{NAMES[value]} over the epochs of {', '.join(map(mix_name, in_order(rows.mix)))}. A panel a data regime."
    note = CHOSEN + "; dotted: what a network that knows nothing of the flips would predict" * flips
    shape = {"rows": rows.data_fraction.nunique(), "sharex": False, "ylim": (least, most)}
    drawn = lines(results, panels, "epoch", "epoch", alt, note, **shape)
    drawn.supylabel(NAMES[value], fontsize=9)
    for axes in [axes for axes in drawn.axes if not axes.lines]:
        axes.remove()
    return drawn


def heatmap(results: Results) -> Figure:
    """Each mix minus SGD in test accuracy, data size by label noise; bold where the interval excludes zero."""
    runs = regimes.chosen(results)
    table = regimes.gains(runs)
    if table.empty:
        raise NotMeasured(f"no regime of {results.study.title!r} has a pair of runs")
    grids = {name: column.unstack("noise_fraction", fill_value=Estimate()) for name, column in table.items()}
    decidable = table.map(lambda e: abs(e.value) if e.n >= LEAST else np.nan)
    most, (rows, columns) = 100 * np.nan_to_num(decidable.max().max()) or 1, [*grids.values()][0].shape
    drawn, axes = figure(1, len(grids), 1.2 + 0.75 * rows, width=1.5 + 1.6 * columns * len(grids))
    for panel, (name, cells) in zip(axes[0], grids.items(), strict=True):
        text = cells.map(lambda e: f"{e.format(n=False)}\nn={e.n}".replace(" points", "") if e.n else "–")
        style = {"cmap": "PuOr_r", "vmin": -most, "vmax": most, "annot_kws": {"fontsize": 9}, "fmt": ""}
        style["cbar_kws"] = {"label": "points"}
        colour = cells.map(lambda e: 100 * e.value if e.n >= LEAST or not e.n else 0)
        sns.heatmap(colour, annot=text, ax=panel, cbar=panel is axes[0, -1], **style)
        measured = [e for e in cells.to_numpy().flat if e.n]  # seaborn leaves out the cells without a number
        for label, e in zip(panel.texts, measured, strict=True):
            label.set_weight("bold" if e.excludes() else "normal")
        panel.grid(False)  # which would show where no cell is
        panel.set_xticklabels([f"{100 * noise:g} %" for noise in cells.columns])
        panel.set_yticklabels([f"{100 * size:g} %" for size in cells.index], rotation=0)
        panel.set(xlabel="labels flipped", ylabel="data")
        panel.set_title(f"{name}, points of test accuracy")
    alt = f"{' and '.join(table)} in test accuracy. A cell a regime: data size by label noise."
    note = f"bold: the 95 % interval excludes zero; no colour: fewer than three pairs. {CHOSEN}"
    return describe(drawn, alt, results.caption(runs=finished(runs), note=note))


def number_of_epochs(runs: pd.DataFrame, rate: bool = False) -> str:
    """That of SGD, or of a mix with its ρ, in each regime, and the learning rate."""
    first = [(setting_name(*at), of) for at, of in runs.groupby(list(REGIME)).first().iterrows()]
    found = []
    for where, of in first:
        at = [f"a rate of {of.lr:g}"] * rate + [f"ρ = {of.rho:g}"] * (of.mix != "sgd")
        found.append(" at ".join([str(of.epochs), *[" and ".join(at)] * bool(at)]) + f" ({where})")
    return "; ".join(found)


def rivals(results: Results) -> Figure:
    """Each mix's gain over SGD, and over each of `regimes.rivals`."""
    table = regimes.rivals(results)
    names = list(dict.fromkeys(table.index.get_level_values("difference")))
    cells = sorted({key[:2] for key in table.index}, reverse=True)
    height = max(1.2, max(0.55, 0.11 * table.shape[1]) * len(cells))
    drawn, axes = figure(1, len(names), 1.4 + height, sharex=True, sharey=True)
    for panel, name in zip(axes[0], names, strict=True):
        panel.axvline(0, color=GREY, linewidth=1)
        for k, (rival, marker) in enumerate(zip(table, "os^vDPX", strict=False)):
            found = [table[rival].get((*cell, name), Estimate()) for cell in cells]
            value, half = 100 * np.array([(e.value, e.half) for e in found]).T
            style = {"fmt": marker, "color": f"C{k}", "label": rival, "markersize": 5, "linewidth": 1.2, "capsize": 2}
            above = min(0.18, 0.8 / table.shape[1]) * ((table.shape[1] - 1) / 2 - k)
            panel.errorbar(value, np.arange(len(cells)) + above, xerr=half, linestyle="", **style)
        for k in range(0, len(cells), 2):  # a band a regime
            panel.axhspan(k - 0.5, k + 0.5, color=GREY, alpha=0.12, linewidth=0, zorder=0)
        panel.grid(False, axis="y")
        panel.set(xlabel="points of test accuracy", yticks=range(len(cells)), ylim=(-0.5, len(cells) - 0.5))
        panel.set_yticklabels([setting_name(*cell) for cell in cells])
        panel.set_title(name)
    legend(drawn)
    alt = f"{' and '.join(names)} at the end, and against SGD stopped early, of fewer or more epochs, or augmented."
    note = "when it stops: best on held-out training images" * ("SGD stopped early" in table)
    if "SGD of fewer epochs" in table:
        note += ", as is the number of fewer epochs: " + number_of_epochs(regimes.shorter(results))
    if "both of fewer epochs" in table:
        note += "; SAM's: " + number_of_epochs(regimes.shorter(results, "sam"))
    if "each at its own learning rate" in table:
        sgd, sam = (number_of_epochs(regimes.own_rate(results, mix), rate=True) for mix in ("sgd", "sam"))
        note += f"; epochs of each at its own learning rate: SGD's {sgd}; SAM's {sam}"
    note = f"{note}. {CHOSEN}".removeprefix(". ")
    return describe(drawn, alt, results.caption(runs=finished(regimes.chosen(results)), note=note))


def flat_and_better(results: Results) -> pd.DataFrame:
    """SAM minus SGD, and minus SGD of fewer epochs (`shorter`): a row a regime and `kind` (normalized logits alone),
    with the Estimates `flat`, of sharpness, and `better`, of test accuracy, of as many pairs as a verdict needs. Raises
    NotMeasured where there is none."""
    own = regimes.sharpness_differences(results).get("SAM − SGD", pd.Series(dtype=object)).unstack("kind")
    found = {False: own.assign(test_accuracy=regimes.gains(regimes.chosen(results)).get("SAM − SGD"))}
    with suppress(NotMeasured):
        found[True] = regimes.beside_shorter(results)
    rows = [
        {"kind": kind, "shorter": shorter, **dict(zip(REGIME, at, strict=True)), "flat": of[kind], "better": better}
        for shorter, table in found.items()
        for at, of in table.iterrows()
        for kind in (kind for kind in table if "normalized" in kind)
        if (better := of["test_accuracy"]).n >= LEAST and isinstance(of[kind], Estimate) and of[kind].n >= LEAST
    ]
    if not rows:
        raise NotMeasured(f"no regime of {results.study.title!r} has the sharpness of {LEAST} pairs of SAM and SGD")
    return pd.DataFrame(rows)


def quadrants(rows: pd.DataFrame, note: str) -> Figure:
    """A panel a kind of `flat_and_better`, a point a row with its `label`, `color` and `marker`; where both SGDs are
    there, hollow for that of fewer epochs. Left of zero is flatter, above it better."""
    both, sgd = rows.shorter.nunique() > 1, "SGD of fewer epochs" if rows.shorter.all() else "SGD"
    kinds = [kind for kind in SHARPNESS if kind in set(rows.kind)]
    drawn, [panels] = figure(1, len(kinds), 4.2, sharey=True)
    for panel, kind in zip(panels, kinds, strict=True):
        for row in rows[rows.kind == kind].itertuples():
            style = {"color": row.color, "marker": row.marker, "label": row.label, "elinewidth": 0.8, "markersize": 6}
            style |= {"markerfacecolor": "white"} if both and row.shorter else {}
            ends = {"xerr": row.flat.half, "yerr": 100 * row.better.half, "capsize": 2}
            panel.errorbar(row.flat.value, 100 * row.better.value, **ends, **style, linestyle="")
        panel.axhline(0, color=GREY, linewidth=1)
        panel.axvline(0, color=GREY, linewidth=1)
        panel.xaxis.set_major_locator(MaxNLocator(6))
        panel.set(title=kind.removesuffix(", normalized logits"), xlabel=f"sharpness, nats: SAM minus {sgd}")
    panels[0].set_ylabel(f"test accuracy, points:\nSAM minus {sgd}")
    legend(drawn, columns=2 if rows.label.str.len().max() > 40 else 3)
    alt = "SAM minus SGD, and minus SGD of fewer epochs: test accuracy against sharpness."
    about = "hollow: minus SGD of fewer epochs; " * both + "left of zero: flatter, above: better; 95 % intervals; "
    about += "random directions of 5 % of each tensor's norm, ascent of one radius, logits normalized"
    return describe(drawn, alt, f"{note}; {about}. {CHOSEN}")


def sharpness(results: Results) -> Figure:
    """SAM's gain against its flatness, a point a regime: `quadrants`."""
    rows = flat_and_better(results)
    looks = [sorted(set(rows[name])) for name in REGIME]
    rows["label"] = [setting_name(*at) for at in zip(rows.data_fraction, rows.noise_fraction, strict=True)]
    rows["color"] = [f"C{looks[0].index(data)}" for data in rows.data_fraction]
    rows["marker"] = ["osD^"[looks[1].index(noise) % 4] for noise in rows.noise_fraction]
    runs = finished(regimes.chosen(results).query("mix in ('sgd', 'sam')"))
    names = [setting_name(*at) for at in zip(runs.data_fraction, runs.noise_fraction, strict=True)]
    return quadrants(rows, results.caption(runs=runs[pd.Index(names).isin(rows.label)]))


def sweep(results: Results) -> Figure:
    """Each mix over ρ: held-out accuracy, by which ρ is chosen, test accuracy and memorized flips."""
    table, name = regimes.sweep(results), regimes.grid(results, "sweep", "rho")
    runs = trainings(results.runs(name))
    ringed = table[table.chosen != ""].reset_index()
    return over(results, runs[runs.mix != "sgd"], "rho", "ρ", ringed)


def rates(results: Results) -> Figure:
    """SGD and SAM over their learning rate, each with the number of epochs, and ρ, that is best there."""
    table = regimes.rates(results)
    ringed = table[table.chosen != ""].reset_index()
    note = "at each rate the number of epochs, and SAM's ρ, that the held-out images choose"
    return over(results, finished(regimes.at_each_rate(results)), "lr", "learning rate", ringed, note)


def over(results: Results, runs: pd.DataFrame, x: str, label: str, ringed: pd.DataFrame, note: str = "") -> Figure:
    """Each mix over what is chosen, ρ or a learning rate: HELD_OUT, and a ring around what held-out images choose."""
    runs, values = runs.reset_index(names="run"), [v for v in regimes.HELD_OUT if v in ringed]
    mixes = {mix: runs[runs.mix == mix] for mix in in_order(runs.mix)}
    panels = {NAMES[value]: [(part, value, look(mix)) for mix, part in mixes.items()] for value in values}
    alt = f"Accuracy and memorized labels over {label}, for each mix. What held-out training images choose is ringed."
    note = f"ringed: what the held-out images choose, whose labels are flipped as the others are; {note}"
    drawn = lines(results, panels, x, label, alt, note.removesuffix("; "), sharey=False)
    for panel, value in zip(drawn.axes, values, strict=True):
        panel.set_ylim(np.clip(panel.get_ylim(), -2, 103))
        rho_axis(panel, sorted(runs[x].unique()), label)
        y = [100 * e.value for e in ringed[value]]
        panel.plot(ringed[x], y, "o", markersize=12, markerfacecolor="none", color=GREY)
    return drawn


def batches(results: Results) -> Figure:
    """Experiment 4 over the epochs: training loss, gradient norm and test accuracy of each batch size and rate."""
    name, by = regimes.grid(results, "batch"), ["batch_size", "lr_run"]
    metrics = results.table("metrics", name, ("batch_size", "lr"))
    metrics = metrics.assign(test_accuracy=100 * metrics.test_accuracy)
    probes = results.table("probes", name, ("batch_size", "lr", "rho")).query("rho == rho_run")
    panels = {"training loss, nats": (metrics, "eval_train_loss"), NAMES["test_accuracy"]: (metrics, "test_accuracy")}
    panels |= {"gradient norm, mean of an epoch": (probes, "grad_norm")}
    for title, (rows, value) in panels.items():
        panels[title] = []
        for k, ((size, lr), part) in enumerate(rows.groupby(by)):
            style = {"color": f"C{k}", "linestyle": ("-", "--", "-.", ":")[k % 4], "marker": "os^D"[k % 4]}
            panels[title].append((part, value, style | {"label": f"batch {size}, rate {lr:g}", "markersize": 4}))
    alt = "Training loss, gradient norm and test accuracy over the epochs. A line a batch size and learning rate."
    drawn = lines(results, panels, "epoch", "epoch", alt, scale=1, sharey=False)
    for axes in drawn.axes[::2]:  # accuracies are far from zero, and near each other
        axes.set_ylim(bottom=0)
    return drawn
