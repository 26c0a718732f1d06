"""How a notebook shows a figure or a table of what may not have been measured, and one look for every table."""

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML, Image

from samlib.analysis.claim import DOCUMENTS, claims, ledger
from samlib.analysis.figures import save, show
from samlib.analysis.results import NotMeasured, Results, mix_name
from samlib.analysis.stats import CONTRADICTED, HOLDS, NOT_MEASURED, UNDECIDED

# A verdict by its word and a shape, so that it is read without colours too.
SHAPES = {HOLDS: "✔", CONTRADICTED: "✘", UNDECIDED: "?", NOT_MEASURED: "○"}
SHARES = ("data_fraction", "noise_fraction")
WORDS = {
    "data_fraction": "data", "noise_fraction": "flipped labels", "mix": "update", "rho": "ρ", "batch_size": "batch",
    "lr": "learning rate", "test_accuracy": "test accuracy", "eval_train_accuracy": "training accuracy",
    "stopped_test_accuracy": "test accuracy, stopped early", "validation_accuracy": "held-out accuracy",
    "memorized": "flips memorized", "memorized_chance": "by chance", "corrected": "flips corrected",
    "documented": "its number", "test_loss": "test loss", "eval_train_loss": "training loss",
}  # fmt: skip
# A verdict's frame, in the ledger of all claims: told apart in grey, and by the shape where styles are stripped.
FRAMES = {
    HOLDS: "background:#222;color:#fff;border:1px solid #222", CONTRADICTED: "border:2px solid #222;color:#222",
    UNDECIDED: "border:1px dashed #777;color:#444", NOT_MEASURED: "border:1px solid transparent;color:#888",
}  # fmt: skip
LEDGER = ("claim", "comparison", "verdict", "measured", "n", "note", "rule")
STYLE = """<style>
.samlib {border-collapse: collapse; font-size: 13px; table-layout: auto !important}
.samlib th, .samlib td {text-align: left !important; vertical-align: top; padding: 3px 9px;
  border-bottom: 1px solid #ccc; white-space: normal}
.samlib th {border-bottom: 2px solid #222}
.claims {width: 100%} .claims td {line-height: 1.35} .claims small {color: #555}
.claims .subject {font-size: 15px; padding-top: 16px}
.claims .v {padding: 0 7px; border-radius: 9px; white-space: nowrap}
</style>"""


def word(name: Any) -> str:
    """A column or index level as a table names it."""
    return WORDS.get(name, str(name).replace("_", " "))


def cell(value: Any, name: Any = "") -> str:
    """A cell's text: shares in percent, mixes by name, verdicts with their shape, the rest as it prints itself."""
    if isinstance(value, float):
        share = f"{100 * value:g} %" if name in SHARES else f"{value:.3g}"
        return "–" if pd.isna(value) else share
    if isinstance(value, str) and name == "mix":
        return mix_name(value)
    return f"{SHAPES[value]} {value}" if isinstance(value, str) and value in SHAPES else str(value)


def of_ledger(table: pd.DataFrame) -> pd.DataFrame:
    """A ledger's columns that are shown and not empty: a claim once, with its source and its number."""
    titles = {title for title, _ in DOCUMENTS.values()}
    source = table.document.where(~table.document.isin(titles), "")
    number = ("Its number: " + table.documented).where(table.documented != "", "")
    about = (source + " " + number).str.strip()
    table = table.assign(claim=table.claim + (" (" + about + ")").where(about != "", ""))
    again = {column: table[column].mask(table.index.duplicated(), "") for column in ("claim", "rule")}
    table = table.assign(**again)[[column for column in LEDGER if column in table]]
    return table.loc[:, (table != "").any()].reset_index(drop=True)


def cells(table: pd.DataFrame | pd.Series) -> pd.DataFrame:
    """The table as text under readable names, its index as columns first; where it has no named index, without it."""
    table = table.to_frame(table.name or "value") if isinstance(table, pd.Series) else table
    if table.index.names == ["name"]:
        table = of_ledger(table)
    elif any(table.index.names):
        table = table.reset_index()
    names = [[part for part in (name if isinstance(name, tuple) else (name,)) if part] for name in table]
    text = {", ".join(map(word, n)): [cell(v, n[0]) for v in table.iloc[:, k]] for k, n in enumerate(names)}
    return pd.DataFrame(text)


def not_measured(error: NotMeasured) -> HTML:
    return HTML(f"<p>Not measured: {escape(str(error))}.</p>")


def table(content: Any, *arguments: Any) -> HTML:
    """A table, or what a function returns of the arguments; where that raises NotMeasured, its sentence."""
    try:
        text = cells(content(*arguments) if callable(content) else content)
    except NotMeasured as error:
        return not_measured(error)
    shortest = 16 if "rule" in text else 34  # of what may be broken into lines
    text = text.map(lambda of: of if len(of) > shortest else of.replace(" ", "\xa0"))
    return HTML(STYLE + text.to_html(index=False, border=0, classes="samlib", justify="left", max_rows=None))


def draw(function: Callable, results: Any, name: str, folder: Any, **options: Any) -> Image | HTML:
    """Saves and shows function(results); where that raises NotMeasured, its sentence and no figure."""
    try:
        figure = save(function(results, **options), name, folder)
        return show(figure, Path(folder, f"{name}.png").read_bytes())
    except NotMeasured as error:
        plt.close("all")  # what it had begun
        return not_measured(error)


def markdown(table: pd.DataFrame | pd.Series) -> str:
    """The same table as markdown."""
    text = cells(table).map(lambda t: t.replace("|", "\\|").replace("\n", " "))
    rows = [list(text), ["---"] * text.shape[1], *text.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def claims_page(found: Mapping[str, list[Results]]) -> HTML:
    """The ledger of all claims: a row a claim under its subject's document, a column a study (claim.columns)."""
    ledgers = {name: ledger(parts) for name, parts in found.items()}
    head = "".join(f'<th style="width:{48 // max(1, len(ledgers))}%">{escape(name)}</th>' for name in ledgers)
    rows = [f'<th style="width:30%">claim</th><th style="width:22%">rule</th>{head}']
    for subject, (title, link) in DOCUMENTS.items():
        heading = f'<a href="{link}">{escape(title)}</a>'
        rows.append(f'<th class="subject" colspan="{2 + len(ledgers)}">{heading}</th>')
        for item in claims(subject=subject):
            source = f"{item.document}. " if item.document != title else ""
            number = f"Its number: {item.documented}. " if item.documented else ""
            about = source + number + (f"See {item.notebook}." if item.notebook else "")
            row = [(escape(item.words), about), ("", item.rule or "none: it cannot be measured here")]
            for said in (table.loc[item.name] for table in ledgers.values()):
                more = f"; n = {said.n}" if said.n and "n=" not in said.measured else ""
                aside = said.verdict == NOT_MEASURED and not item.reason  # what a column lacks: on pointing at it
                look = f'style="{FRAMES[said.verdict]}"' + f' title="{escape(said.measured)}"' * aside
                badge = f'<span class="v" {look}>{SHAPES[said.verdict]} {said.verdict}</span>'
                row.append((badge, "" if aside else said.measured + more))
            rows.append("".join(f"<td>{text}<br><small>{escape(small)}</small></td>" for text, small in row))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return HTML(f'{STYLE}<table class="samlib claims">{body}</table>')
