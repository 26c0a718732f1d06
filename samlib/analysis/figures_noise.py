"""The figure of label noise: which checkpoint carries the flipped labels."""

from matplotlib.figure import Figure

from samlib.analysis import figures, noise
from samlib.analysis.figures import lines, look
from samlib.analysis.results import Results, in_order, mix_name


def probes(results: Results, grid: str | None = None) -> Figure:
    """Over training, a row for SAM and for SGD, a line a checkpoint: the flipped images' share of |g| and, beyond
    chance, that of the parameters whose direction they set, in percent; and how much more their part grows, in percent
    of the clean part's growth."""
    rows = noise.probe(results, grid)
    rows = rows.assign(more=rows.sets - rows.sets_chance, growth=rows.flipped_grows / rows.clean_grows)
    titles = {"of_g": "flips' share of |g|, %", "more": "direction set by flips, over chance"}
    titles |= {"growth": "growth of flips' part, % of clean's"}
    mixes, panels = in_order(rows.mix), {}
    for mix in mixes:
        of_mix = rows[rows.mix == mix]
        for value, title in titles.items():
            parts = [(of_mix[of_mix.checkpoint == k], value, look(f"checkpoint{k}", markersize=4)) for k in range(1, 5)]
            panels[f"{mix_name(mix)}: {title}"] = parts
    alt = "What images with flipped labels bring to the gradient over training, by checkpoint, and beyond chance."
    note = "chance: as many random active parameters of the same kinds of layer; grey: share of the images flipped, "
    note += "chance, equal growth; checkpoint 3 may leave the frame"
    figure = lines(results, panels, "epoch", "epoch", alt, note, rows=len(mixes), sharey="col")
    for k, axes in enumerate(figure.axes):
        axes.axhline((100 * rows.images.mean(), 0, 100)[k % 3], color=figures.GREY, linewidth=1)
    # few parameters are in checkpoint 3, where flips and clean images cancel: their share would stretch the panel
    means = 100 * rows[rows.checkpoint.isin([1, 2, 4])].groupby(["mix", "checkpoint", "epoch"]).of_g.mean()
    figure.axes[0].set_ylim(means.min() - 10, means.max() + 10)
    return figure
