"""The ledger outside a notebook: the README's table and numbers, a study as markdown, its notebooks as one page."""

import re
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from html import escape
from pathlib import Path

import nbformat
import pandas as pd

from samlib import PROJECT
from samlib.analysis import regimes
from samlib.analysis.claim import claims, columns, ledger, overall, repeated
from samlib.analysis.results import NotMeasured, Results, load
from samlib.analysis.stats import NOT_MEASURED, Estimate
from samlib.analysis.tables import SHAPES, markdown
from samlib.config import UserError
from samlib.runs import write_atomic
from samlib.study import Study, relative

STUDIES = {
    "quick": "studies/quick.yaml", "digits": "studies/digits*.yaml", "laptop": "studies/laptop/*.yaml",
    "paper": "studies/paper/*.yaml",
}  # fmt: skip
# The claims of the README's table, at most ten.
HEADLINES = (
    "sam_beats_sgd", "sam_beats_sgd_with_augmentation", "sam_beats_shorter_sgd", "gain_grows_with_noise",
    "over_60_percent_in_checkpoint1", "flatter_and_better", "flatter_and_better_than_shorter_sgd",
    "checkpoint1_contributes_most", "learning_rate_not_direction", "checkpoint2_carries_the_flips",
)  # fmt: skip
TABLE = re.compile(r"(<!-- findings -->\n).*?(<!-- /findings -->)", re.DOTALL)
NUMBER = re.compile(r"(<!-- (?P<column>\w+) (?P<claim>\w+)(?:: (?P<comparison>[^>]*?))? -->)[^<]*(<!-- / -->)")
TABLES = {
    "Accuracy": regimes.accuracy,
    "SAM and SANER minus SGD": regimes.tally,
    "Against what else helps SGD": regimes.rivals,
    "Sharpness minus SGD's": regimes.sharpness_differences,
    "SAM minus SGD of fewer epochs": regimes.beside_shorter,
    "Sharpness and the generalization gap": regimes.gap_correlations,
    "ρ": regimes.sweep,
    "Learning rates": regimes.rates,
    "Augmentation": regimes.augmentation,
    "Batch size": regimes.batch_means,
}
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{max-width: 60rem; margin: 0 auto; padding: 0 1rem 4rem; font: 16px/1.5 system-ui, sans-serif; color: #222}}
img {{max-width: 100%; height: auto}} pre {{white-space: pre-wrap; font-size: 13px}} h1 {{line-height: 1.2}}
section {{border-top: 3px solid #222; margin-top: 3rem}} a {{color: #0050a0}} .anchor-link, .jp-InputPrompt,
.jp-OutputPrompt, .prompt {{display: none}} .jp-OutputArea-output, .output {{overflow-x: auto}}
</style></head><body><h1>{title}</h1><p>{about}</p><nav><ul>{index}</ul></nav>
{sections}
</body></html>
"""


def readme_table(found: Mapping[str, list[Results]]) -> str:
    """The headline claims as markdown, a column a study: verdict, and what was measured."""
    ledgers = {name: ledger(parts) for name, parts in found.items()}
    of, rows = {c.name: c for c in claims()}, []
    for item in (of[name] for name in HEADLINES):
        row = {"claim": item.words + f"; its number: {item.documented}" * bool(item.documented)}
        for column, table in ledgers.items():
            said = table.loc[item.name]
            measured = "" if said.verdict == NOT_MEASURED else f"<br>{said.measured}"
            row[column] = f"{SHAPES[said.verdict]} **{said.verdict}**{measured}"
        rows.append(row | {"read": f"[{item.notebook}](runs/published/quick/{item.notebook}.ipynb)"})
    return markdown(pd.DataFrame(rows)) + "\n"


def readme_number(found: Mapping[str, list[Results]], column: str, claim: str, comparison: str | None) -> str:
    """What one comparison of a claim measured in a column, or the claim's verdict where none is named; of `repeated`, a
    number of its row. A comparison that ends in "; no unit" is an estimate without it, and in "; short" without n, too.

    Raises UserError where there is no such column, claim or comparison.
    """
    if claim == "repeated" and column in (counts := repeated(found)).index and comparison in counts:
        return str(counts.loc[column, comparison])
    named = [c for c in claims() if c.name == claim]
    if column not in found or not named:
        there = ", ".join(found)
        raise UserError(f"README: there is no claim {claim!r} with a column {column!r}; the columns are {there}")
    findings = named[0].findings(*found[column])
    if comparison is None:
        return overall(findings, named[0].every)
    comparison, _, form = comparison.partition("; ")
    said = {f.comparison: f.measured for f in findings}
    if comparison not in said:  # studies that agree by now are told apart no more
        comparison = re.sub(r" \([\w-]+\)$", "", comparison)
    if comparison not in said:
        raise UserError(f"README: {claim} has no comparison {comparison!r}; it has {', '.join(said)}")
    measured = said[comparison]
    if form in ("short", "no unit") and isinstance(measured, Estimate):
        return measured.format(n=form == "no unit").replace(f" {measured.unit}", "")
    return str(measured)


def readme(text: str, found: Mapping[str, list[Results]]) -> str:
    """The README with its table, between `<!-- findings -->` and `<!-- /findings -->`, and its numbers, between
    `<!-- column claim: comparison -->` and `<!-- / -->`, as the results have them."""
    text = TABLE.sub(lambda m: m[1] + readme_table(found) + m[2], text)
    return NUMBER.sub(lambda m: m[1] + readme_number(found, m["column"], m["claim"], m["comparison"]) + m[5], text)


def write_readme(project: Path = PROJECT) -> None:
    """Puts what the published runs say into the project's README."""
    path, found = project / "README.md", columns(STUDIES, project / "runs/published")
    write_atomic(path, readme(path.read_text(encoding="utf-8"), found).encode())


def report(study: Study, root: str | Path) -> str:
    """A study's claims and tables as markdown. Raises UserError where none of its runs is finished."""
    results = load(study, root)
    said = ledger(results)
    parts = [f"# {study.title}", f"Data: {study.dataset}. {results.state}."]
    parts += ["## Claims", markdown(said[said.verdict != NOT_MEASURED])]
    by = ("mix", "rho", *regimes.REGIME)
    of_grids = {f"Test accuracy, grid {grid}": partial(Results.means, by=by, grid=grid) for grid in study.grids}
    for title, function in (TABLES | of_grids).items():
        with suppress(NotMeasured):
            parts += [f"## {title}", markdown(function(results))]
    return "\n\n".join(parts)


def write_html(study: Study, root: Path, out: Path) -> str:
    """One page of a study's executed notebooks, sources left out, that needs no other file; returns where it is. Its
    index names those that were not executed, or failed when they were last.

    Raises UserError where no notebook of the study is executed.
    """
    from nbconvert import HTMLExporter  # takes a second to import

    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_input_prompt=True)
    exporter.exclude_output_prompt = True
    sections, index = [], []
    for name in sorted(analysis.notebook for analysis in study.notebooks):
        path = Path(root) / study.name / f"{name}.ipynb"
        if (failed := path.with_suffix(".failed.ipynb").exists()) or not path.exists():
            index.append(f"<li>{name}: {'failed when it was last executed' if failed else 'not executed'}</li>")
            continue
        notebook = nbformat.read(path, 4)
        title = next(iter(re.findall(r"^# (.+)$", notebook.cells[0].source, re.MULTILINE)), path.stem)
        body, _ = exporter.from_notebook_node(notebook)
        sections.append(f'<section id="{path.stem}">{body}</section>')
        index.append(f'<li><a href="#{path.stem}">{escape(title)}</a></li>')
    if not sections:
        raise UserError(f"{relative(Path(root) / study.name)}: no executed notebook; `python -m samlib run` makes them")
    about = f"Data: {escape(study.dataset)}."
    page = PAGE.format(title=escape(study.title), about=about, index="".join(index), sections="\n".join(sections))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page.encode())
    return relative(out)
