"""How a notebook shows a figure or a table of what may not have been measured, and one look for every table."""

from collections.abc import Callable
from html import escape
from typing import Any

import pandas as pd
from IPython.display import HTML, Image

from samlib.analysis.figures import save, show
from samlib.analysis.results import NotMeasured, mix_name
from samlib.analysis.stats import CONTRADICTED, HOLDS, NOT_MEASURED, UNDECIDED

# A verdict by its word and a shape, so that it is read without colours too.
SHAPES = {HOLDS: "✔", CONTRADICTED: "✘", UNDECIDED: "?", NOT_MEASURED: "–"}
SHARES = ("data_fraction", "noise_fraction")
WORDS = {
    "data_fraction": "data", "noise_fraction": "flipped labels", "mix": "update", "rho": "ρ", "batch_size": "batch",
    "lr": "learning rate", "test_accuracy": "test accuracy", "eval_train_accuracy": "training accuracy",
    "stopped_test_accuracy": "test accuracy, stopped early", "validation_accuracy": "held-out accuracy",
    "memorized": "flips memorized", "memorized_chance": "by chance", "corrected": "flips corrected",
    "documented": "its number", "test_loss": "test loss", "eval_train_loss": "training loss",
}  # fmt: skip
STYLE = (
    "<style>.samlib{border-collapse:collapse;font-size:13px}.samlib th,.samlib td{text-align:left;vertical-align:top;"
    "padding:3px 9px;border-bottom:1px solid #ccc;white-space:normal;max-width:21em;min-width:3em}</style>"
)


def word(name: Any) -> str:
    """A column or index level as a table names it."""
    return WORDS.get(name, str(name).replace("_", " "))


def cell(value: Any, name: Any = "") -> str:
    """A cell's text: shares in percent, mixes by name, verdicts with their shape, the rest as it prints itself."""
    if name in SHARES and isinstance(value, float):
        return f"{100 * value:g} %"
    if name == "mix" and isinstance(value, str):
        return mix_name(value)
    if isinstance(value, float):
        return "–" if pd.isna(value) else f"{value:.3g}"
    return f"{SHAPES[value]} {value}" if isinstance(value, str) and value in SHAPES else str(value)


def cells(table: pd.DataFrame | pd.Series) -> pd.DataFrame:
    """The table as text under readable names, its index as columns first; where it has no named index, without it."""
    table = table.to_frame(table.name or "value") if isinstance(table, pd.Series) else table
    table = table.reset_index() if any(table.index.names) and table.index.names != ["name"] else table
    text = {name: [cell(v, name) for v in table[name]] for name in table}
    return pd.DataFrame(text).rename(columns=lambda n: " · ".join(map(word, n)) if isinstance(n, tuple) else word(n))


def table(content: Any, *arguments: Any) -> HTML:
    """A table, or what a function returns of the arguments; where that raises NotMeasured, its sentence."""
    try:
        text = cells(content(*arguments) if callable(content) else content)
    except NotMeasured as error:
        return HTML(f"<p>Not measured: {escape(str(error))}.</p>")
    html = text.to_html(index=False, border=0, classes="samlib", justify="left", max_rows=None)
    return HTML(STYLE + html)


def draw(function: Callable, results: Any, name: str, folder: Any, **options: Any) -> Image | HTML:
    """`show(save(function(results), name, folder))`; where that raises NotMeasured, its sentence and no figure."""
    try:
        return show(save(function(results, **options), name, folder))
    except NotMeasured as error:
        return HTML(f"<p>Not measured: {escape(str(error))}.</p>")


def markdown(table: pd.DataFrame | pd.Series) -> str:
    """The same table as markdown."""
    text = cells(table).map(lambda t: t.replace("|", "\\|").replace("\n", " "))
    rows = [list(text.columns), ["---"] * text.shape[1], *text.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
