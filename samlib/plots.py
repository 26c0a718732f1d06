"""Every figure of the notebooks, in one style. Functions take tables, return a Figure and compute layout only."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
