"""What all figures share: style, one look a mix, caption, alternative text, and the one way to save and to show.

A figure function takes a Results and returns a Figure; the modules figures_* hold them. `lines` draws most of them: a
panel a title, in each some columns over x.
"""

import re
import textwrap
from collections.abc import Iterable
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import PIL.Image
import seaborn as sns
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy import stats

from samlib.analysis.results import Results, mix_name
from samlib.analysis.stats import UPPER
from samlib.config import UserError
from samlib.mix import CONTROLS

WIDTH = 9.0  # inches: the most that a notebook shows at its full size
SMALLEST = 8.0  # points
DPI = 110
FEW = 8
GREY = "#555555"
# One look a meaning, everywhere: colour (Okabe and Ito's palette), line and marker, each telling the mixes apart alone.
LOOKS = {
    "sgd": ("#000000", "-", "o"),
    "sam": ("#D55E00", "--", "s"),
    "scale2x0.5": ("#009E73", "-.", "^"),
    "checkpoint1": ("#0072B2", (0, (5, 1)), "D"),
    "checkpoint2": ("#56B4E9", ":", "v"),
    "checkpoint3": ("#E69F00", (0, (3, 1, 1, 1)), "P"),
    "checkpoint4": ("#CC79A7", (0, (1, 1)), "X"),
    "checkpoint134": ("#7A5195", (0, (8, 2, 2, 2)), "<"),
    "magnitude": ("#8C6D31", (0, (4, 1, 1, 1, 1, 1)), "h"),  # SAM's sizes with SGD's signs
    "direction": ("#3182BD", (0, (2, 1)), "H"),
    "gain1x2": ("#637939", (0, (6, 2, 1, 2)), "p"),
    "scale2x0": ("#843C39", (0, (1, 3)), "8"),
    "inactive": ("#999999", "-", "."),
}
OTHERS = ("#8C6D31", "#637939", "#843C39", "#3182BD")
CHANCE = {"color": GREY, "linestyle": ":", "linewidth": 1.2, "marker": "", "label": None}
DOCUMENT = {"color": "#009E73", "marker": "D", "markerfacecolor": "none", "linestyle": ""}  # a document's own number

Lines = Iterable[tuple[pd.DataFrame, str, dict]]  # of rows a column, and its look


def look(mix: str, **changes: Any) -> dict[str, Any]:
    """Colour, line and marker of a mix (or "inactive"), as keywords of Axes.plot and Axes.errorbar, with its name as
    `label`. A control looks like its mix with a thin line and markers that are hollow where checkpoints are shuffled,
    and half full where a length is another's."""
    control, _, rest = mix.partition("-")
    base = rest if control in CONTROLS else mix
    color, line, marker = LOOKS.get(base) or (OTHERS[sum(map(ord, base)) % len(OTHERS)], "-", "h")
    label = mix_name(mix) if mix != "inactive" else mix
    found = {"color": color, "linestyle": line, "marker": marker, "label": label, "markersize": 5, "linewidth": 1.6}
    half = {"shuffled": "none", "rescaled": "bottom", "length": "right"}
    own = {"fillstyle": half[control], "markerfacecoloralt": "white", "linewidth": 0.8} if base != mix else {}
    return found | own | changes


def figure(rows: int = 1, columns: int = 1, height: float = 3.2, width: float = WIDTH, **options: Any) -> tuple:
    """A figure in the style of all and its axes, (rows, columns) always. height, width: inches, at most WIDTH wide."""
    sns.set_theme(context="paper", style="whitegrid")
    sizes = dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize", "legend.title_fontsize"), SMALLEST)
    sizes |= {"font.size": 9, "axes.labelsize": 9, "axes.titlesize": 9, "figure.titlesize": 10}
    plt.rcParams.update(sizes | {"figure.dpi": DPI, "savefig.dpi": DPI, "figure.constrained_layout.use": True})
    plt.rcParams.update({"svg.hashsalt": "samlib", "axes.titlelocation": "left", "legend.frameon": False})
    return plt.subplots(rows, columns, figsize=(min(width, WIDTH), height), squeeze=False, **options)


def describe(figure: Figure, alt: str, caption: str = "") -> Figure:
    """Gives the figure its alternative text, a sentence that says what is to be seen, and a caption line under it: the
    dataset, n, ρ and how it was chosen (Results.caption)."""
    figure.set_label(" ".join(alt.split()))
    if caption:
        text = textwrap.fill(caption, int(16 * figure.get_figwidth()))
        figure.supxlabel(text, x=0.01, ha="left", fontsize=SMALLEST, color=GREY)
    return figure


def rho_axis(axes: Axes, ticks: Iterable[float], label: str = "ρ") -> None:
    """A logarithmic x axis with these ticks alone, as plain numbers."""
    axes.set(xscale="log", xlabel=label)
    axes.set_xticks(list(ticks), [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def legend(figure: Figure, axes: Axes | None = None, columns: int = 4) -> None:
    """One legend for all panels, above them; each label once, in the order of mixes. axes: those to look at, or all."""
    found = {}
    for panel in [axes] if axes is not None else figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        figure.legend(found.values(), found.keys(), loc="outside upper left", ncols=columns, frameon=False)


def curve(axes: Axes, frame: pd.DataFrame, x: str, y: str, scale: float = 100, **style: Any) -> None:
    """The mean over runs by x, and its 95 % interval, but for what has no label: chance. A band, or bars where x has no
    more than FEW values: a band shows nothing at a point whose neighbours have one run."""
    over = (scale * frame.groupby([x, "run"])[y].mean()).groupby(level=0).agg(["mean", "sem", "count"])
    axes.plot(over.index, over["mean"], **{"markevery": max(1, len(over) // 8)} | style)
    if style["label"] is not None and (over["count"] > 1).any():
        half = stats.t.ppf(UPPER, over["count"] - 1) * over["sem"]
        if len(over) <= FEW:
            axes.errorbar(over.index, over["mean"], half, fmt="none", ecolor=style["color"], elinewidth=1, capsize=2.5)
        else:
            ends = over["mean"] - half, over["mean"] + half
            axes.fill_between(over.index, *ends, color=style["color"], alpha=0.15, lw=0)


def lines(
    results: Results, panels: dict[str, Lines], x: str, xlabel: str, alt: str, note: str = "", scale: float = 100,
    rows: int = 1, sharex: bool | str = "col", sharey: bool | str = True, **options: Any,
) -> Figure:  # fmt: skip
    """Panels in rows, each with its `curve`s. options: of Axes.set, for all panels."""
    drawn, grid = figure(rows, len(panels) // rows, 1.2 + 2.0 * rows, sharex=sharex, sharey=sharey)
    shown = set()
    for axes, (title, content) in zip(grid.flat, panels.items(), strict=True):
        for frame, y, style in content:
            curve(axes, frame, x, y, scale, **style)
            shown |= set(frame.run)
        axes.set_title(title)
        axes.set(**options)
    for axes in grid[-1]:
        axes.set_xlabel(xlabel)
    longest = max((len(label) for axes in drawn.axes for label in axes.get_legend_handles_labels()[1]), default=1)
    legend(drawn, columns=min(5, 110 // (longest + 7)))
    note = f"{note}; lines: means over seeds, bands or bars: 95 % intervals".removeprefix("; ")
    runs = results.runs()
    return describe(drawn, alt, results.caption(runs=runs[runs.index.isin(shown)], note=note))


def png(figure: Figure) -> bytes:
    """The figure in 256 colours: a third of the usual size, and no difference to be seen.

    Pillow's default, by medians, makes one colour of two where a figure has many."""
    full, small = BytesIO(), BytesIO()
    figure.savefig(full, format="png", dpi=DPI)
    few = PIL.Image.open(full).convert("RGB").quantize(256, PIL.Image.Quantize.MAXCOVERAGE, kmeans=1)
    few.save(small, "PNG", optimize=True, dpi=(DPI, DPI))
    return small.getvalue()


def svg(figure: Figure) -> bytes:
    """The figure with its alternative text as the SVG's <title> and <desc>, the same bytes for the same figure."""
    content, alt = BytesIO(), figure.get_label()
    figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    about = f"<title>{escape(alt.split('. ')[0])}</title>\n <desc>{escape(alt)}</desc>"
    text = content.getvalue().decode()
    return re.sub(r"(<svg [^>]*)>", lambda tag: f'{tag[1]} role="img">\n {about}', text, count=1).encode()


def save(figure: Figure, name: str, folder: str | Path) -> Figure:
    """Writes `folder/name.svg` and `folder/name.png` and returns the figure; a relative folder is the caller's.

    Raises UserError where it cannot be written, ValueError where `describe` gave no alternative text.
    """
    if not figure.get_label():
        raise ValueError(f"{name}: a figure needs alternative text")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, content in (("svg", svg(figure)), ("png", png(figure))):
            (folder / f"{name}.{suffix}").write_bytes(content)
    except OSError as error:
        raise UserError(f"{folder / name}: the figure cannot be written ({error.strerror})") from None
    return figure


def show(figure: Figure, content: bytes | None = None) -> Image:
    """The figure as a notebook's one picture of it, at its own size and with its alternative text; closes it.

    content: its `png`, where that is there already."""
    content = content or png(figure)
    plt.close(figure)
    return Image(content, format="png", alt=figure.get_label(), width=int(96 * figure.get_figwidth()))


def faults(figure: Figure) -> list[str]:
    """What a reader could not read: text below SMALLEST points, text off the frame, a figure wider than WIDTH."""
    figure.canvas.draw()
    found = [] if figure.get_figwidth() <= WIDTH else [f"it is {figure.get_figwidth()} inches wide"]
    axes = [axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]
    ticks = {text for axis in axes for text in axis.get_ticklabels(which="both")}  # some beyond the limits, never drawn
    for text in figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible()):
        if not (words := text.get_text().strip()):
            continue
        if text.get_fontsize() < SMALLEST:
            found.append(f"{words!r} has {text.get_fontsize():g} points")
        box, frame = text.get_window_extent(), figure.bbox.padded(1)
        if text not in ticks and not (frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)):
            found.append(f"{words!r} is off the frame")
    return found
