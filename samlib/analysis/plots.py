"""Every figure of the notebooks, in one style. Functions take tables, return a Figure and compute layout only."""

from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import seaborn as sns
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from samlib.analysis.ablation import mix_order
from samlib.config import UserError

# One colour a meaning, everywhere (the Okabe-Ito palette: told apart by colour-blind readers too).
COLORS = {
    "sgd": "#000000",
    "sam": "#D55E00",
    "inactive": "#999999",
    "checkpoint1": "#0072B2",
    "checkpoint2": "#56B4E9",
    "checkpoint3": "#E69F00",
    "checkpoint4": "#CC79A7",
    "document": "#009E73",
}


def style() -> None:
    """Sets the style of all figures; call it once, at the top of a notebook."""
    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.85)
    plt.rcParams.update({"figure.dpi": 80, "savefig.dpi": 120, "figure.constrained_layout.use": True})


def save(figure: Figure, folder: str | Path, name: str) -> Figure:
    """Writes `folder/name.png` and returns the figure. Raises UserError where the folder cannot be written."""
    path = Path(folder) / f"{name}.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"{path}: the figure cannot be written ({error.strerror})") from None
    return figure


def caption(axes: Axes, text: str) -> None:
    """The dataset and n, small, above the right corner."""
    axes.set_title(text, loc="right", fontsize=8, color="#555555")


def points_with_interval(axes: Axes, x: pd.Series, mean: pd.Series, low: pd.Series, high: pd.Series, **style) -> None:
    """Means with their intervals as error bars; a NaN interval (n = 1) is drawn as a point alone."""
    spread = [(mean - low).fillna(0), (high - mean).fillna(0)]
    axes.errorbar(x, mean, yerr=spread, capsize=3, marker="o", **style)


# The checkpoint ablation and large batches (06, 07).


def mix_name(mix: str) -> str:
    """As it is written in figures and tables: SGD, SAM, checkpoint 1+3."""
    if mix.startswith("checkpoint"):
        return "checkpoint " + "+".join(mix.removeprefix("checkpoint"))
    return mix.upper() if mix in ("sgd", "sam") else mix.replace("x", " × ")


def _mix_color(mix: str) -> str:
    return COLORS.get(mix, "#555555")


def _mix_rows(axes: Axes, mixes: list[str]) -> None:
    axes.set_yticks(range(len(mixes)), [mix_name(mix) for mix in mixes])
    axes.set_ylim(len(mixes) - 0.5, -0.5)


def _frame_points(axes: Axes, values: pd.Series, keep: float | None = None) -> None:
    """x limits that hold the points; an interval may run out of the frame (two seeds make wide ones)."""
    low, high = values.min(), values.max()
    low, high = (low, high) if keep is None else (min(low, keep), max(high, keep))
    margin = 0.35 * (high - low) or 1.0
    axes.set_xlim(low - margin, high + margin)


def difference_dots(table: pd.DataFrame, pairs: pd.DataFrame, cells: pd.DataFrame, dataset: str) -> Figure:
    """Every mix's test accuracy minus SGD's, a panel a rho: mean with 95 % t interval, the pairs as ticks.

    table: `differences(...)`; pairs: `pairs(...)`, fractions; cells: `document_cells(...)`, drawn as diamonds.
    """
    mixes, rhos = list(dict.fromkeys(table.sort_values("mix", key=lambda c: c.map(mix_order)).mix)), table.rho.unique()
    width = min(2.0 + 5.0 / max(1, len(rhos) / 2) * len(rhos), 13)
    figure, panels = plt.subplots(
        1, len(rhos), figsize=(max(width, 6.5), 1.4 + 0.27 * len(mixes)), sharey=True, sharex=True, squeeze=False
    )
    said = cells[cells.rho.isin(rhos) & cells.mix.isin(mixes) & cells.to_sgd.notna()]
    for axes, rho in zip(panels[0], rhos, strict=True):
        axes.axvline(0, color=COLORS["sgd"], lw=1)
        for mix, mean, low, high, n, left_out in table.loc[
            table.rho == rho, ["mix", "mean", "low", "high", "n", "left_out"]
        ].itertuples(index=False):
            y, color = mixes.index(mix), _mix_color(mix)
            seeds = 100 * pairs.loc[(pairs.rho == rho) & (pairs.mix == mix), "difference"].dropna()
            axes.plot(seeds, [y] * len(seeds), "|", color=color, ms=9, mew=1.6, zorder=4)
            if n:
                spread = [[100 * (mean - low)], [100 * (high - mean)]] if n > 1 else None
                axes.errorbar(100 * mean, y, xerr=spread, fmt="o", color=color, capsize=3, ms=6, elinewidth=0.8)
            if left_out:
                place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom", "color": "#B00000"}
                axes.annotate(f"{left_out} left out", (0.99, y), size=7, **place)
        here = said[said.rho == rho]
        axes.plot(
            100 * here.to_sgd, [mixes.index(m) for m in here.mix], "D", mfc="none", color=COLORS["document"], ms=6
        )
        axes.set_title(f"ρ = {rho:g}", loc="left", fontsize=9)
        axes.grid(axis="y", visible=False)
    _mix_rows(panels[0, 0], mixes)
    _frame_points(panels[0, 0], pd.concat([100 * pairs.difference, 100 * said.to_sgd]), keep=0)
    names = {"o": "here, mean and 95 % interval", "|": "one seed", "D": "the document (CIFAR-100, one run)"}
    keys = [Line2D([], [], ls="", marker=m, color=COLORS["document"] if m == "D" else "#555555") for m in names]
    keys[2].set_markerfacecolor("none")
    if said.empty:
        keys.pop()
    figure.legend(
        keys, list(names.values())[: len(keys)], loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    panels[0, len(rhos) // 2].set_xlabel("test accuracy − SGD's, points")
    figure.suptitle(f"{dataset}; n = {_range(table.n)}", x=0.99, ha="right", fontsize=8, color="#555555")
    return figure


def _range(n: pd.Series) -> str:
    n = n[n > 0]
    return "0" if n.empty else f"{n.min()}" if n.min() == n.max() else f"{n.min()} to {n.max()}"


def sharpness_dots(sharp: pd.DataFrame, tables: dict[tuple[str, str], pd.DataFrame], dataset: str) -> Figure:
    """Sharpness at the end by mix, a panel a measure and labels; a colour a rho; dots are runs, rings their mean.

    sharp: `with_sharpness(...)`; tables: `means(...)` of each (measure, labels).
    """
    mixes = sorted(sharp.mix.unique(), key=mix_order)
    rhos = sorted(sharp.rho.unique())
    palette = dict(zip(rhos, sns.color_palette("viridis", len(rhos)), strict=True)) if len(rhos) > 1 else {}
    figure, panels = plt.subplots(
        1, len(tables), figsize=(min(2 + 2.8 * len(tables), 13), 1.3 + 0.27 * len(mixes)), sharey=True, squeeze=False
    )
    for axes, ((measure, labels), table) in zip(panels[0], tables.items(), strict=True):
        rows = sharp[(sharp.measure == measure) & (sharp.labels == labels)]
        alike = sharp.loc[sharp.measure == measure, "sharpness"]
        if alike.min() > 0 and alike.max() > 30 * alike.min():
            axes.set_xscale("log")
        else:
            axes.set_xlim(min(0, 1.1 * alike.min()), 1.08 * alike.max())
        for (mix, rho), runs in rows.groupby(["mix", "rho"]):
            offset = 0.12 * (rhos.index(rho) - (len(rhos) - 1) / 2)
            color = palette.get(rho, _mix_color(mix))
            y = mixes.index(mix) + offset
            axes.plot(runs.sharpness, [y] * len(runs), ".", color=color, alpha=0.6, ms=6)
            mean = table.loc[(table.mix == mix) & ((table.rho == rho) | table.rho.isna()), "mean"]
            axes.plot(mean, [y] * len(mean), "o", mfc="none", color=color, ms=8)
        axes.set(xlabel=f"{measure} sharpness (loss)")
        axes.set_title(f"{labels} labels", loc="left", fontsize=9)
        axes.grid(axis="y", visible=False)
    _mix_rows(panels[0, 0], mixes)
    if palette:
        keys = [Line2D([], [], ls="", marker="o", color=palette[rho]) for rho in rhos]
        figure.legend(keys, [f"ρ = {rho:g}" for rho in rhos], loc="outside lower center", ncols=len(rhos), fontsize=8)
    figure.suptitle(dataset, x=0.99, ha="right", fontsize=8, color="#555555")
    return figure


def batch_colors(settings: list[tuple[int, float]]) -> dict[tuple[int, float], str]:
    """A colour a (batch size, learning rate), the smallest batch black."""
    return dict(zip(settings, ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"] * 9, strict=False))


def batch_curves(frame: pd.DataFrame, table: pd.DataFrame, value: str, label: str, dataset: str) -> Figure:
    """A value over training, by epoch and by update: a thin line a run, a thick one the (geometric) mean of a setting.

    frame: the runs; table: their rows, with `run`, `epoch` (done, may be a fraction), `step` and the value.
    """
    settings = sorted(set(zip(frame.batch_size, frame.lr, strict=True)))
    colors = batch_colors(settings)
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.4), sharey=True)
    positive = (table[value] > 0).all()
    for axes, x in zip(panels, ("epoch", "step"), strict=True):
        for setting in settings:
            ids = frame.index[(frame.batch_size == setting[0]) & (frame.lr == setting[1])]
            rows = table[table.run.isin(ids)].dropna(subset=[value])
            for _, run in rows.groupby("run"):
                axes.plot(run[x], run[value], color=colors[setting], lw=0.6, alpha=0.45)
            mean = rows.groupby(x)[value].agg(lambda v: np.exp(np.log(v).mean()) if positive else v.mean())
            name = f"batch {setting[0]}, lr {setting[1]:g} (n={rows.run.nunique()})"
            axes.plot(mean.index, mean, color=colors[setting], lw=2, label=name)
        axes.set(xlabel={"epoch": "epochs", "step": "updates"}[x])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if positive:
        panels[0].set_yscale("log")
        decades = np.log10(table[value].max() / table[value].min())
        panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
        panels[0].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        panels[0].yaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel(label)
    panels[0].legend(fontsize=8)
    caption(panels[1], dataset)
    return figure


def batch_accuracy(frame: pd.DataFrame, table: pd.DataFrame, dataset: str) -> Figure:
    """Final test accuracy by setting: the runs as ticks, the mean with its 95 % t interval.

    table: batch_size, lr and an estimate's columns, fractions.
    """
    settings = list(zip(table.batch_size, table.lr, strict=True))
    colors = batch_colors(settings)
    figure, axes = plt.subplots(figsize=(7, 1.1 + 0.4 * len(settings)))
    for y, (row, setting) in enumerate(zip(table.itertuples(), settings, strict=True)):
        runs = frame[(frame.batch_size == setting[0]) & (frame.lr == setting[1])].test_accuracy.astype(float).dropna()
        axes.plot(100 * runs, [y] * len(runs), "|", color=colors[setting], ms=9, mew=1.6, zorder=4)
        spread = [[100 * (row.mean - row.low)], [100 * (row.high - row.mean)]] if row.n > 1 else None
        axes.errorbar(100 * row.mean, y, xerr=spread, fmt="o", color=colors[setting], capsize=3, elinewidth=0.8)
        if row.left_out:
            axes.annotate(f"{row.left_out} diverged", (0.01, y), xycoords=("axes fraction", "data"), size=7)
    axes.set_yticks(range(len(settings)), [f"batch {b}, lr {lr:g}" for b, lr in settings])
    axes.set_ylim(len(settings) - 0.5, -0.5)
    axes.set(xlabel="final test accuracy, %")
    axes.grid(axis="y", visible=False)
    _frame_points(axes, 100 * frame.test_accuracy.astype(float).dropna())
    axes.set_xlim(right=min(axes.get_xlim()[1], 101))
    caption(axes, f"{dataset}; n = {_range(table.n)}")
    return figure


# The second document: which gradients SAM changes, and how (notebooks 02 to 04)

NAMES = {f"checkpoint{code}": f"checkpoint {code}" for code in range(1, 5)} | {"inactive": "inactive"}
KINDS = {"all": "#000000", "convolution": "#0072B2", "batchnorm": "#E69F00", "linear": "#009E73"}


def shown(figure: Figure) -> Image:
    """The figure as a notebook shows it: a PNG of 64 colours, a third of the usual size; closes the figure."""
    full, small = BytesIO(), BytesIO()
    figure.savefig(full, dpi=figure.dpi)
    plt.close(figure)
    PIL.Image.open(full).convert("RGB").quantize(64).save(small, "PNG", optimize=True)
    return Image(small.getvalue(), format="png")


def _source(figure: Figure, text: str) -> None:
    """The dataset, the run and n, small, under the figure."""
    figure.supxlabel(text, fontsize=8, color="#555555", x=0.99, ha="right")


def _outside(figure: Figure, axes: Axes, columns: int) -> None:
    """One legend for all panels, above them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)


def plot_one_dimensional(table: pd.DataFrame, rho: float) -> Figure:
    """A table of geometry.one_dimensional: the loss coloured by checkpoint, and an example of each, enlarged."""
    figure, grid = plt.subplot_mosaic([["loss"] * 4, ["1", "2", "3", "4"]], figsize=(10, 5.6), height_ratios=[1.1, 1])
    axes = grid["loss"]
    run = (table.code != table.code.shift()).cumsum()
    for _, part in table.groupby(run):
        code = part.code.iloc[0]
        after = table.iloc[part.index[0] : part.index[-1] + 2]
        axes.plot(after.w, after.loss, color=COLORS[f"checkpoint{code}"] if code else COLORS["inactive"], lw=4)
    for code in range(1, 5):
        axes.plot([], [], color=COLORS[f"checkpoint{code}"], lw=4, label=f"checkpoint {code}")
    axes.set(xlabel="w", ylabel="loss L(w)")
    _outside(figure, axes, 4)
    near = table[table.w.between(-3, 3)]
    for code in range(1, 5):
        axes = grid[str(code)]
        axes.set_title(f"checkpoint {code}", color=COLORS[f"checkpoint{code}"])
        stretches = [part for _, part in near.groupby(run) if part.code.iloc[0] == code]
        if not stretches:
            axes.text(0.5, 0.5, "does not occur", ha="center", transform=axes.transAxes)
            continue
        stretch = max(stretches, key=len)
        row = stretch.iloc[len(stretch) // 2]
        far = row.w + rho * (1 if row.g > 0 else -1)
        part = table[table.w.between(min(row.w, far) - 0.8, max(row.w, far) + 0.8)]
        axes.plot(part.w, part.loss, color="#555555", lw=1.5)
        for w, slope, name, color in ((row.w, row.g, "g", COLORS["sgd"]), (far, row.g_sam, "g'", COLORS["sam"])):
            height = part.loss.iloc[(part.w - w).abs().argmin()]
            axes.plot([w - 0.35, w + 0.35], [height - 0.35 * slope, height + 0.35 * slope], color=color, lw=2)
            axes.plot([w], [height], "o", color=color, label=f"{name} = {slope:+.2f}")
        axes.legend(fontsize=8, handlelength=1, loc="best")
        axes.set(xlabel="w", xticklabels=[], yticklabels=[])
    return figure


def plot_fractions(of_all: pd.DataFrame, of_active: pd.DataFrame, document: dict, factor: float, source: str) -> Figure:
    """The shares over training (column `at`: epochs), of all and of active parameters; the document's claims as bands.

    document: a share that is to be exceeded, or a pair for the first and the last tenth, shown with its factor.
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for axes, table, title in zip(panels, (of_all, of_active), ("of all parameters", "of the active"), strict=True):
        tenth = max(1, len(table) // 10)
        spans = [(table["at"].iloc[0], table["at"].iloc[tenth - 1]), (table["at"].iloc[-tenth], table["at"].iloc[-1])]
        for name, claim in document.items():
            if isinstance(claim, float):
                axes.axhspan(100 * claim, 100, color=COLORS[name], alpha=0.08, lw=0)
                continue
            for (left, right), share in zip(spans, claim, strict=True):
                low, high = 100 * share / factor, 100 * share * factor
                axes.fill_between([left, right], low, high, color=COLORS[name], alpha=0.25, lw=0)
        for name in (*document, *(["inactive"] if table is of_all else [])):
            axes.plot(table["at"], 100 * table[name], color=COLORS[name], lw=1.4, label=NAMES[name])
        axes.set(title=title, xlabel="epoch", ylim=(0, 100))
    panels[0].set_ylabel("share in %")
    _outside(figure, panels[0], 5)
    _source(figure, source)
    return figure


def plot_kinds(table: pd.DataFrame, source: str) -> Figure:
    """A table of geometry.by_kind: a panel a kind of layer, the checkpoints as shares of its active parameters."""
    kinds = [kind for kind in KINDS if kind in set(table.kind)]
    figure, panels = plt.subplots(1, len(kinds), figsize=(11, 3.6), sharey=True, squeeze=False)
    for axes, kind in zip(panels[0], kinds, strict=True):
        part = table[table.kind == kind]
        for code in range(1, 5):
            name = f"checkpoint{code}"
            axes.plot(part.epoch, 100 * part[name], color=COLORS[name], marker=".", label=NAMES[name])
        axes.set(title=f"{kind}: {part.parameters.iloc[-1]:,} parameters", xlabel="epoch", ylim=(0, 100))
    panels[0][0].set_ylabel("share of the active in %")
    _outside(figure, panels[0][0], 4)
    _source(figure, source)
    return figure


def plot_layers(table: pd.DataFrame, source: str) -> Figure:
    """A table of geometry.layer_shares: checkpoint 1 by layer and epoch, and beside it the inactive, by layer."""
    order = list(dict.fromkeys(table.layer))
    shares = table.pivot(index="layer", columns="epoch", values="checkpoint1").loc[order]
    inactive = table.groupby("layer").inactive.min().loc[order]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.6 + 0.19 * len(order)), width_ratios=[3, 1], sharey=True, layout="constrained"
    )
    mesh = left.pcolormesh(shares.columns, range(len(order)), 100 * shares, cmap="viridis", vmin=0, vmax=100)
    figure.colorbar(mesh, ax=left, label="checkpoint 1, % of the active", location="left", pad=0.02)
    left.set(xlabel="epoch", title="checkpoint 1 by layer")
    left.set_yticks(range(len(order)), order, fontsize=7)
    left.tick_params(labelleft=True)
    left.invert_yaxis()
    right.barh(range(len(order)), 100 * inactive, color=COLORS["inactive"])
    right.set(xlabel="% of the layer", xlim=(0, 100), title="inactive, at least")
    for axes in (left, right):
        axes.grid(axis="y", visible=False)
    _source(figure, source)
    return figure


def plot_ratio_bins(probes: pd.DataFrame, edges: tuple[float, ...], source: str) -> Figure:
    """Project 2: the seven bins of |g'| / |g| within checkpoint 1 over training (column `at`: epochs), and medians."""
    bounds = ["1", *(f"{edge:g}" for edge in edges), "∞"]
    figure, axes = plt.subplots(figsize=(9, 4.2))
    colors = plt.get_cmap("viridis")([k / 6.5 for k in range(7)])
    for k in range(7):
        share = 100 * probes[f"bin{k + 1}"] / probes.checkpoint1
        axes.plot(probes["at"], share, color=colors[k], lw=0.6, alpha=0.35)
        middle = share.rolling(max(3, len(share) // 10), center=True, min_periods=1).median()
        axes.plot(probes["at"], middle, color=colors[k], lw=2, label=f"{bounds[k]} ≤ ratio < {bounds[k + 1]}")
    axes.set(xlabel="epoch", ylabel="share of checkpoint 1 in %", ylim=(0, None))
    figure.legend(loc="outside right upper", frameon=False)
    _source(figure, source)
    return figure


def plot_norms(probes: pd.DataFrame, source: str) -> Figure:
    """The norms of g and g', their ratio, and the cosine between them, over training (column `at`: epochs)."""
    figure, (norms, ratio, cosine) = plt.subplots(1, 3, figsize=(11, 3.5))
    norms.plot(probes["at"], probes.grad_norm, color=COLORS["sgd"], lw=1.2, label="‖g‖")
    norms.plot(probes["at"], probes.grad_norm_sam, color=COLORS["sam"], lw=1.2, label="‖g'‖")
    norms.set(title="norms", yscale="log", xlabel="epoch", ylabel="gradient norm")
    norms.legend()
    ratio.plot(probes["at"], probes.grad_norm_sam / probes.grad_norm, color=COLORS["sam"], lw=1.2)
    ratio.axhline(1, color=COLORS["sgd"], lw=1, ls="--")
    ratio.set(title="‖g'‖ / ‖g‖", xlabel="epoch")
    cosine.plot(probes["at"], probes.cosine, color=COLORS["sam"], lw=1.2)
    cosine.set(title="cosine of g and g'", xlabel="epoch", ylim=(min(0, probes.cosine.min()), 1.02))
    _source(figure, source)
    return figure


def plot_persistence(table: pd.DataFrame, layers: pd.DataFrame, document: float, source: str) -> Figure:
    """Experiment 2, a table of geometry.persistence: how much of each set is found again, with chance; lift.

    layers: a table of geometry.lift_of_layers, what the layers' own shares explain; document: its share.
    """
    references = sorted(table.reference_step.unique())
    figure, panels = plt.subplots(2, len(references), figsize=(11, 5.6), sharex=True, sharey="row", squeeze=False)
    for (above, below), reference in zip(panels.T, references, strict=True):
        part = table[table.reference_step == reference]
        above.axhline(100 * document, color=COLORS["document"], lw=1, ls=":", label="the document")
        above.plot(part.step, 100 * part.share, color=COLORS["checkpoint1"], lw=2.2, label="in both")
        above.plot(part.step, 100 * part.expected_share, color=COLORS["sgd"], lw=1, ls="--", label="chance")
        above.set(title=f"set of step {reference} ({part.reference_size.iloc[0]:,})", ylim=(0, 100))
        below.axhline(1, color=COLORS["sgd"], lw=1, ls="--")
        below.plot(part.step, part["lift"], color=COLORS["checkpoint1"], lw=1.4, label="measured")
        rest = layers[layers.reference_step == reference]
        below.plot(rest.step, rest["lift"], color=COLORS["checkpoint3"], lw=1.4, label="layers' shares alone")
        below.set(xlabel="later step")
    panels[0][0].set_ylabel("share of the set in %")
    panels[1][0].set_ylabel("lift over chance")
    panels[1][-1].legend(fontsize=8)
    spread = max(0.1, 1.1 * (table["lift"] - 1).abs().max())
    panels[1][0].set_ylim(1 - spread, 1 + spread)
    _outside(figure, panels[0][0], 3)
    _source(figure, source)
    return figure


def plot_running_intersection(table: pd.DataFrame, source: str) -> Figure:
    """Experiment 3, a table of geometry.running_intersection: what is left of each set, and of independent ones."""
    references = sorted(table.reference_step.unique())
    figure, panels = plt.subplots(1, len(references), figsize=(11, 3.6), sharey=True, squeeze=False)
    for axes, reference in zip(panels[0], references, strict=True):
        part = table[table.reference_step == reference]
        axes.plot(part.steps - 1, 100 * part.share, color=COLORS["checkpoint1"], marker="o", label="in every set since")
        axes.plot(part.steps - 1, 100 * part.expected_share, color=COLORS["sgd"], ls="--", label="independent, $p^k$")
        axes.set(title=f"from step {reference}", xlabel="steps later", yscale="log")
    panels[0][0].set_ylabel("share of the first set in %")
    _outside(figure, panels[0][0], 2)
    _source(figure, source)
    return figure


def plot_convergence(table: pd.DataFrame, source: str) -> Figure:
    """The table `convergence`: by checkpoint, what moves, what has a gradient that differs from zero, and the sizes."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.6))
    titles = {
        "moving": "would move by over 1 % an epoch",
        "significant": "gradient differs from zero",
        "relative_update": "median |update| / |weight| a step",
    }
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        for code in range(1, 5):
            part = table[table.checkpoint == code]
            scale = 1 if column == "relative_update" else 100
            name = f"checkpoint{code}"
            axes.plot(part.epoch, scale * part[column], color=COLORS[name], marker="o", label=NAMES[name])
        axes.set(title=title, xlabel="epoch")
        if column == "relative_update":
            axes.set_yscale("log")
        else:
            axes.set(ylim=(-2, 100), ylabel="share of the checkpoint in %")
            axes.axhline(60, color=COLORS["document"], ls=":", label="the document: 60 %")
    chance = panels[1].axhline(5, color=COLORS["sgd"], ls="--", lw=1, label="chance: 5 %")
    panels[1].legend(handles=[chance], fontsize=8)
    _outside(figure, panels[0], 5)
    _source(figure, source)
    return figure


def plot_thresholds(table: pd.DataFrame, reference: pd.DataFrame, source: str) -> Figure:
    """Project 1, a table of geometry.thresholds_with_chance, beside the document's, over the share of training."""
    figure, (share, lift, size) = plt.subplots(1, 3, figsize=(11, 3.8))
    progress, theirs = 100 * table.epoch / table.epoch.max(), 100 * reference.epoch / reference.epoch.max()
    document = {"color": COLORS["document"], "lw": 1.2, "marker": ".", "label": "the document"}
    share.plot(progress, 100 * table.share, color=COLORS["checkpoint1"], marker="o", label="measured")
    share.plot(progress, 100 * table.chance, color=COLORS["sgd"], ls="--", label="chance: k / active")
    share.plot(progress, 100 * table.chance_of_all, color=COLORS["inactive"], ls="--", label="chance: k / N")
    share.plot(theirs, reference.percent_of_checkpoint1_above, **document)
    share.set(title="share of checkpoint 1 above", ylabel="share in %", ylim=(0, 100))
    lift.plot(progress, table["lift"], color=COLORS["checkpoint1"], marker="o")
    lift.axhline(1, color=COLORS["sgd"], ls="--", lw=1)
    lift.set(title="lift over k / active", ylim=(min(0.9, table["lift"].min()), max(1.2, table["lift"].max() + 0.02)))
    size.plot(progress, table.threshold, color=COLORS["checkpoint1"], marker="o")
    size.plot(theirs, reference.threshold, **document)
    size.set(title="threshold: the k-th largest |g|", yscale="log", ylabel="|g|")
    for axes in (share, lift, size):
        axes.set_xlabel("training done in %")
    _outside(figure, share, 4)
    _source(figure, source)
    return figure


def plot_diagonal(table: pd.DataFrame, source: str) -> Figure:
    """The table `diagonal`: quantiles of the Hessian's diagonal by checkpoint, and its estimate's own error."""
    epochs = sorted(table.epoch.unique())
    figure, panels = plt.subplots(1, len(epochs), figsize=(11, 4), squeeze=False)
    for axes, epoch in zip(panels[0], epochs, strict=True):
        part = table[(table.epoch == epoch) & (table.checkpoint > 0)].dropna(subset=["median"])
        boxes = [
            {"med": r.median, "q1": r.q25, "q3": r.q75, "whislo": r.q05, "whishi": r.q95, "label": str(r.checkpoint)}
            for r in part.itertuples()
        ]
        drawn = axes.bxp(boxes, showfliers=False, patch_artist=True, medianprops={"color": "white"})
        for box, code in zip(drawn["boxes"], part.checkpoint, strict=True):
            box.set_facecolor(COLORS[f"checkpoint{code}"])
        places = range(1, len(part) + 1)
        axes.errorbar(
            places, part["mean"], yerr=2 * part.standard_error, fmt="D", color="black", ms=4, label="mean ± 2 se"
        )
        axes.plot(places, part.noise, "_", color=COLORS["sam"], ms=18, mew=2, label="median error of one entry")
        axes.plot(places, -part.noise, "_", color=COLORS["sam"], ms=18, mew=2)
        axes.set(title=f"epoch {epoch}", xlabel="checkpoint")
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    panels[0][0].set_ylabel("diagonal entry of the Hessian")
    _outside(figure, panels[0][0], 2)
    _source(figure, source)
    return figure


def plot_prediction(table: pd.DataFrame, rho: float, source: str) -> Figure:
    """The table `prediction`: how many codes the second-order expansion gets right; rho: the run's own."""
    figure, axes = plt.subplots(figsize=(8, 4))
    epochs = sorted(table.epoch.unique())
    for k, epoch in enumerate(epochs):
        part, color = table[table.epoch == epoch], plt.get_cmap("viridis")(k / max(1, len(epochs)))
        axes.plot(part.rho, 100 * part.right, color=color, marker=".", label=f"epoch {epoch}")
        axes.plot(part.rho, 100 * part.constant, color=color, ls="--", lw=1)
    axes.plot([], [], color="black", ls="--", lw=1, label="all called\nthe commonest code")
    axes.axvline(rho, color=COLORS["sam"], lw=1, label=f"the run's ρ = {rho:g}")
    axes.set(xscale="log", xlabel="ρ", ylabel="codes predicted right in %", ylim=(0, 101))
    figure.legend(loc="outside right upper", frameon=False)
    _source(figure, source)
    return figure


def plot_rho_vs_checkpoint1(table: pd.DataFrame, source: str) -> Figure:
    """Project 3, a table of geometry.checkpoint1_by_run: checkpoint 1 and test accuracy over rho, and together."""
    figure, (share, accuracy, both) = plt.subplots(1, 3, figsize=(11, 3.9))
    rhos = sorted(table.rho.unique())
    for k, rho in enumerate(rhos):
        part, color = table[table.rho == rho], plt.get_cmap("viridis")(k / max(1, len(rhos)))
        share.plot(part.rho, 100 * part.last_quarter, "o", color=color)
        accuracy.plot(part.rho, 100 * part.test_accuracy, "o", color=color)
        both.plot(100 * part.last_quarter, 100 * part.test_accuracy, "o", color=color, label=f"ρ = {rho:g}")
    means = table.groupby("rho")[["last_quarter", "test_accuracy"]].mean() * 100
    share.plot(means.index, means.last_quarter, color="#777777", lw=1, zorder=0)
    accuracy.plot(means.index, means.test_accuracy, color="#777777", lw=1, zorder=0)
    share.set(xscale="log", xlabel="ρ", ylabel="checkpoint 1, last quarter, % of all")
    accuracy.set(xscale="log", xlabel="ρ", ylabel="final test accuracy in %")
    both.set(xlabel="checkpoint 1, last quarter, % of all", ylabel="final test accuracy in %")
    for axes in (share, accuracy):
        axes.set_xticks(rhos, [f"{rho:g}" for rho in rhos])
        axes.minorticks_off()
    _outside(figure, both, len(rhos))
    _source(figure, source)
    return figure


def plot_leaving(table: pd.DataFrame, rho: float, source: str) -> Figure:
    """The scan, a table of geometry.leaving: checkpoint 1 and survival over rho, and where it is left, by kind."""
    epochs = sorted(table.epoch.unique())
    figure, panels = plt.subplots(len(epochs), 3, figsize=(11, 0.8 + 3.2 * len(epochs)), squeeze=False, sharex=True)
    titles = ("in checkpoint 1 at this ρ", "and at every smaller ρ", "left between two ρ")
    for row, epoch in zip(panels, epochs, strict=True):
        for kind, color in KINDS.items():
            part = table[(table.epoch == epoch) & (table.kind == kind)]
            style = {"color": color, "lw": 2 if kind == "all" else 1.3, "label": kind}
            row[0].plot(part.rho, 100 * part.share, **style)
            row[1].plot(part.rho, 100 * part.survival, **style)
            row[2].step(part.rho, 100 * part.left, where="mid", **style)
        for axes, title in zip(row, titles, strict=True):
            axes.axvline(rho, color=COLORS["sam"], lw=1, ls=":")
            axes.set(xscale="log", title=f"epoch {epoch}: {title}")
        for axes, label in zip(row, ("% of the active", "% of the first", "% of the first"), strict=True):
            axes.set(ylabel=label)
        row[0].set_ylim(0, 100)
        row[1].set_ylim(0, 102)
    for axes in panels[-1]:
        axes.set_xlabel("ρ")
    _outside(figure, panels[0][0], 4)
    _source(figure, source)
    return figure


# Data regimes (05): SGD and SAM by data fraction and label noise. Accuracies are in percent.

REGIME_MIXES = {
    "sgd": ("SGD", COLORS["sgd"], "-"),
    "sam": ("SAM", COLORS["sam"], "-"),
    "twice": ("SGD, twice the epochs", COLORS["document"], "--"),
}


def _percent(fraction: float) -> str:
    return f"{100 * fraction:g} %"


def _n_of(numbers: pd.Series) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def _plain_log(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def regime_heatmap(differences: pd.Series, dataset: str, mark: str) -> Figure:
    """SAM - SGD in points, data fraction across and noise down; differences: Estimates by (data, noise).

    Each cell: mean, half the 95 % t interval, n, and `mark` where the interval excludes zero; grey where there is none.
    """
    table = differences.unstack("data_fraction").sort_index(ascending=False)  # (noise, data), Estimates
    means = table.map(lambda e: e.mean if e.n else np.nan).astype(float)
    limit = 1.4 * max(means.abs().fillna(0).to_numpy().max(), 0.5)
    figure, axes = plt.subplots(figsize=(2.2 + 1.9 * table.shape[1], 1.3 + 0.95 * table.shape[0]))
    axes.set_facecolor("#DDDDDD")
    image = axes.pcolormesh(means, cmap="PuOr_r", vmin=-limit, vmax=limit, edgecolors="white", linewidth=2)
    for (row, column), estimate in np.ndenumerate(table.to_numpy()):
        words = "no pair"
        if estimate.n:
            interval = "one pair: no interval" if np.isnan(estimate.half) else f"± {estimate.half:.1f}"
            words = f"{estimate.mean:+.1f}{' ' + mark if estimate.excludes_zero else ''}\n{interval}\nn = {estimate.n}"
        light = not estimate.n or abs(estimate.mean) < 0.55 * limit
        axes.text(column + 0.5, row + 0.5, words, ha="center", va="center", color="black" if light else "white", size=9)
    axes.set_xticks(np.arange(table.shape[1]) + 0.5, map(_percent, table.columns))
    axes.set_yticks(np.arange(table.shape[0]) + 0.5, map(_percent, table.index))
    axes.set(xlabel="training data", ylabel="label noise")
    axes.grid(False)
    figure.colorbar(image, label="SAM − SGD, points", pad=0.02)
    caption(axes, f"{dataset}; final test accuracy")
    return figure


def _runs_of(cell: pd.DataFrame, mixes: list[str]) -> str:
    """How many finished runs a panel holds; one number a mix, in the legend's order, where they differ."""
    done = cell[cell.status == "done"]
    counts = [str(done.run[done.mix == mix].nunique()) for mix in mixes]
    return "n = " + (counts[0] if len(set(counts)) == 1 else " / ".join(counts))


def regime_curves(
    curves: pd.DataFrame, values: dict[str, str], label: str, dataset: str, x: str = "epoch", xlabel: str = "epochs"
) -> Figure:
    """A panel a regime, noise down and data across: thin lines are runs, thick ones the mean over finished runs.

    curves: rows of evaluations with run, mix, status, the regime, x and the values; values: column to its line style;
    a run that diverged ends in a cross and is in no mean.
    """
    noises, sizes = sorted(curves.noise_fraction.unique()), sorted(curves.data_fraction.unique())
    used = [mix for mix in REGIME_MIXES if (curves.mix == mix).any()]
    shape = (len(noises), len(sizes))
    figure, grid = plt.subplots(
        *shape, figsize=(max(1.0 + 2.7 * shape[1], 5), 1.0 + 1.6 * shape[0]), sharex="col", sharey="row", squeeze=False
    )
    for (row, column), axes in np.ndenumerate(grid):
        cell = curves[(curves.noise_fraction == noises[row]) & (curves.data_fraction == sizes[column])]
        for mix, (_, color, dash) in REGIME_MIXES.items():
            part = cell[cell.mix == mix]
            for column_name, line in values.items():
                line = dash if len(values) == 1 else line
                for _, run in part.groupby("run"):
                    axes.plot(run[x], run[column_name], color=color, lw=0.6, alpha=0.5, ls=line)
                    if run.status.iloc[-1] == "diverged":
                        axes.plot(run[x].iloc[-1], run[column_name].iloc[-1], "x", color=color, ms=8, mew=2)
                mean = part[part.status == "done"].groupby(x)[column_name].mean()
                axes.plot(mean.index, mean, color=color, lw=1.8, ls=line)
        axes.set_title(f"{_percent(sizes[column])} data, {_percent(noises[row])} noise", loc="left", fontsize=8)
        caption(axes, _runs_of(cell, used))
    for axes in grid[-1]:
        axes.set_xlabel(xlabel)
    keys = [Line2D([], [], color=REGIME_MIXES[m][1], ls=REGIME_MIXES[m][2] if len(values) == 1 else "-") for m in used]
    names = [REGIME_MIXES[m][0] for m in used]
    if len(values) > 1:
        keys += [Line2D([], [], color="#777777", ls=line) for line in values.values()]
        names += list(values)
    figure.legend(keys, names, loc="outside lower center", ncols=len(keys), fontsize=8, frameon=False)
    figure.supylabel(label, size=10)
    figure.suptitle(dataset, x=0.99, ha="right", size=8, color="#555555")
    return figure


def regime_scatter(runs: pd.DataFrame, sharpness: str, label: str, dataset: str) -> Figure:
    """Sharpness against the generalization gap, a point a run; right, less their regime's means."""
    runs = runs.dropna(subset=[sharpness, "gap"])
    sizes, noises = sorted(runs.data_fraction.unique()), sorted(runs.noise_fraction.unique())
    size_of = dict(zip(sizes, np.linspace(25, 110, len(sizes)), strict=True))
    marker_of = dict(zip(noises, "os^DvP*X" * len(noises), strict=False))
    within = runs[["data_fraction", "noise_fraction", "mix", sharpness, "gap"]].copy()
    group = within.groupby(["data_fraction", "noise_fraction"])[[sharpness, "gap"]]
    within[[sharpness, "gap"]] -= group.transform("mean")
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.9))
    for axes, frame in zip(panels, (runs, within), strict=True):
        for (size, noise, mix), part in frame.groupby(["data_fraction", "noise_fraction", "mix"]):
            style = {"s": size_of[size], "marker": marker_of[noise], "color": REGIME_MIXES[mix][1]}
            axes.scatter(part[sharpness], part.gap, alpha=0.75, linewidths=0, **style)
        axes.axhline(0, color="#999999", lw=0.8)
    if (runs[sharpness] > 0).all():
        panels[0].set_xscale("log")
        _plain_log(panels[0].xaxis)
    panels[1].axvline(0, color="#999999", lw=0.8)
    panels[0].set(xlabel=label, ylabel="training − test accuracy, points")
    panels[1].set(xlabel=f"{label}, less its regime's mean", ylabel="gap less its regime's mean, points")
    dot = {"ls": "", "marker": "o"}
    keys = [Line2D([], [], color=REGIME_MIXES[mix][1], **dot) for mix in ("sgd", "sam")]
    keys += [Line2D([], [], color="#777777", ls="", marker=marker_of[noise]) for noise in noises]
    keys += [Line2D([], [], color="#777777", ms=size_of[size] ** 0.5, **dot) for size in sizes]
    names = ["SGD", "SAM", *(f"{_percent(n)} noise" for n in noises), *(f"{_percent(s)} of the data" for s in sizes)]
    figure.legend(keys, names, loc="outside lower center", ncols=len(keys), fontsize=8, frameon=False)
    caption(panels[1], f"{dataset}; {len(runs)} runs")
    return figure


def regime_scaling(runs: pd.DataFrame, table: pd.DataFrame, dataset: str) -> Figure:
    """Final test accuracy against the training images, a panel a noise level; table: Estimates by regime and mix."""
    noises = sorted(runs.noise_fraction.unique())
    figure, panels = plt.subplots(1, len(noises), figsize=(1 + 3.1 * len(noises), 3.3), sharey=True, squeeze=False)
    images = runs.groupby("data_fraction").train_images.first()
    for axes, noise in zip(panels[0], noises, strict=True):
        for shift, mix in ((0.97, "sgd"), (1.03, "sam")):
            name, color, _ = REGIME_MIXES[mix]
            part = runs[(runs.noise_fraction == noise) & (runs.mix == mix)]
            axes.plot(part.train_images * shift, part.test_accuracy, ".", color=color, alpha=0.5, ms=5)
            column = table.xs((noise, name), level=["noise_fraction", "mix"])["test_accuracy"]
            column = column[[e.n > 0 for e in column] & images.reindex(column.index).notna().to_numpy()]
            x, bounds = images[column.index] * shift, pd.DataFrame(list(column), index=column.index)
            if len(column):
                points_with_interval(axes, x, bounds["mean"], bounds["low"], bounds["high"], color=color, ms=6, lw=1.5)
        axes.set(xscale="log", xlabel="training images", xlim=(images.min() / 1.5, images.max() * 1.5))
        axes.set_xticks(images.dropna(), [f"{n:,.0f}\n{_percent(f)}" for f, n in images.dropna().items()], minor=False)
        axes.minorticks_off()
        axes.set_title(f"{_percent(noise)} noise", loc="left", fontsize=9)
    _frame_values(panels[0, 0], runs.test_accuracy.dropna())
    panels[0, 0].set_ylabel("final test accuracy, %")
    keys = [Line2D([], [], color=REGIME_MIXES[mix][1], marker="o") for mix in ("sgd", "sam")]
    panels[0, 0].legend(keys, ["SGD", "SAM"], fontsize=8, loc="lower right")
    caption(panels[0, -1], f"{dataset}; {_n_of(pd.Series([e.n for e in table['test_accuracy'] if e.n]))}")
    return figure


def _frame_values(axes: Axes, values: pd.Series) -> None:
    """y limits that hold the runs; an interval may leave the frame (two seeds make wide ones)."""
    margin = 0.25 * (values.max() - values.min()) or 1.0
    axes.set_ylim(values.min() - margin, values.max() + margin)


def _regime_names(axes: Axes, cells: list[tuple[float, float]]) -> None:
    axes.set_xticks(range(len(cells)), [f"{_percent(size)}\n{_percent(noise)}" for size, noise in cells])
    axes.set_xlim(-0.6, len(cells) - 0.4)
    axes.grid(axis="x", visible=False)


def regime_stopping(runs: pd.DataFrame, dataset: str) -> Figure:
    """By regime and run, an arrow from the best epoch's test accuracy to the last one's."""
    cells = sorted(set(zip(runs.data_fraction, runs.noise_fraction, strict=True)))
    figure, axes = plt.subplots(figsize=(2 + 0.95 * len(cells), 3.4))
    for i, (size, noise) in enumerate(cells):
        part = runs[(runs.data_fraction == size) & (runs.noise_fraction == noise)].dropna(subset=["test_accuracy"])
        for side, mix in ((-1, "sgd"), (1, "sam")):
            some = part[part.mix == mix]
            for k, run in enumerate(some.itertuples()):
                x, color = i + side * (0.1 + 0.07 * k), REGIME_MIXES[mix][1]
                axes.plot([x, x], [run.best_test_accuracy, run.test_accuracy], color=color, lw=1.2)
                axes.plot(x, run.best_test_accuracy, "o", mfc="none", color=color, ms=6)
                axes.plot(x, run.test_accuracy, "o", color=color, ms=4)
    _regime_names(axes, cells)
    axes.set(xlabel="regime: training data, label noise", ylabel="test accuracy, %")
    keys = [Line2D([], [], color=REGIME_MIXES[mix][1], lw=2) for mix in ("sgd", "sam")]
    keys += [Line2D([], [], color="#777777", ls="", marker="o", mfc=fill) for fill in ("none", "#777777")]
    figure.legend(
        keys, ["SGD", "SAM", "best epoch", "last epoch"], loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    caption(axes, f"{dataset}; each pair of circles is one run")
    return figure


def regime_sharpness(runs: pd.DataFrame, measures: dict[str, str], dataset: str) -> Figure:
    """Each sharpness measure by regime and optimizer: a dot a run, a bar their mean; logarithmic where positive."""
    cells = sorted(set(zip(runs.data_fraction, runs.noise_fraction, strict=True)))
    columns = min(len(measures), 2)
    rows = -(-len(measures) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(5.4 * columns, 0.6 + 2.3 * rows), sharex=True, squeeze=False)
    for axes, (measure, label) in zip(grid.flat, measures.items(), strict=False):
        for i, (size, noise) in enumerate(cells):
            for side, mix in ((-0.15, "sgd"), (0.15, "sam")):
                here = (runs.data_fraction == size) & (runs.noise_fraction == noise) & (runs.mix == mix)
                values, color = runs.loc[here, measure].dropna(), REGIME_MIXES[mix][1]
                axes.plot([i + side] * len(values), values, ".", color=color, alpha=0.6)
                if len(values):
                    axes.hlines(values.mean(), i + side - 0.11, i + side + 0.11, color=color, lw=2)
        if (runs[measure].dropna() > 0).all():
            axes.set_yscale("log")
            _plain_log(axes.yaxis)
        _regime_names(axes, cells)
        axes.set_title(label, loc="left", fontsize=9)
    for axes in grid.flat[len(measures) :]:
        axes.axis("off")
    for axes in grid[-1]:
        axes.set_xlabel("regime: training data, label noise")
    keys = [Line2D([], [], color=REGIME_MIXES[mix][1], marker=".") for mix in ("sgd", "sam")]
    figure.legend(keys, ["SGD", "SAM"], loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    caption(grid[0, -1], dataset)
    return figure


def regime_correlations(table: pd.DataFrame, dataset: str) -> Figure:
    """Correlations with their 95 % intervals, a row a measure, both columns of `regimes.correlations`."""
    figure, axes = plt.subplots(figsize=(7.5, 1.2 + 0.42 * len(table)))
    for shift, (column, color) in zip((-0.12, 0.12), zip(table, ("#777777", "#0072B2"), strict=True), strict=True):
        for i, e in enumerate(table[column]):
            spread = None if np.isnan(e.half) else [[e.mean - e.low], [e.high - e.mean]]
            style = {"color": color, "capsize": 3, "label": None if i else column}
            axes.errorbar(e.mean, i + shift, xerr=spread, fmt="o", **style)
    axes.set_yticks(range(len(table)), table.index)
    axes.set(ylim=(len(table) - 0.5, -0.5), xlim=(-1.03, 1.03), xlabel="correlation with the generalization gap")
    axes.axvline(0, color="#999999", lw=0.8)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    caption(axes, f"{dataset}; {_n_of(pd.Series([e.n for e in table.to_numpy().flat]))} runs")
    return figure
