"""The ledger outside a notebook: the README's table and numbers, a study as markdown, its notebooks as one page."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from html import escape
from pathlib import Path

import nbformat

from samlib import PROJECT
from samlib.analysis import regimes
from samlib.analysis.claim import Claim, claims, columns, ledger, measured
from samlib.analysis.results import NotMeasured, Results, load
from samlib.analysis.stats import NOT_MEASURED
from samlib.analysis.tables import SHAPES, markdown
from samlib.config import UserError
from samlib.runs import write_atomic
from samlib.study import Study, relative

STUDIES = {"quick": "studies/quick.yaml", "laptop": "studies/laptop/*.yaml", "paper": "studies/paper/*.yaml"}
# The claims of the README's table, at most ten.
HEADLINES = (
    "sam_beats_sgd", "sam_loses_at_ten_percent_clean", "gain_grows_with_noise", "sam_beats_sgd_at_equal_cost",
    "flatter_and_better", "over_60_percent_in_checkpoint1", "checkpoint1_contributes_most",
    "learning_rate_not_direction", "checkpoint2_carries_the_flips", "saner_beats_sam",
)  # fmt: skip
TABLE = re.compile(r"(<!-- findings -->\n).*?(<!-- /findings -->)", re.DOTALL)
NUMBER = re.compile(r"(<!-- (?P<column>\w+) (?P<claim>\w+)(?:: (?P<comparison>[^>]*?))? -->)[^<]*(<!-- / -->)")
TABLES = {
    "Accuracy": regimes.accuracy,
    "SAM and SANER minus SGD": regimes.tally,
    "Against stopping early and twice the epochs": regimes.rivals,
    "Sharpness minus SGD's": regimes.sharpness_differences,
    "Sharpness and the generalization gap": regimes.gap_correlations,
    "ρ": regimes.sweep,
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
    lines = [["claim", *ledgers, "read"], ["---"] * (len(ledgers) + 2)]
    for item in [c for name in HEADLINES for c in claims() if c.name == name]:
        cells = [table.loc[item.name] for table in ledgers.values()]
        quote = item.quote if item.quote.startswith("(") else f"“{item.quote}”"
        number = f"; its number: {item.documented}" if item.documented else ""
        said = ["" if c.verdict == NOT_MEASURED else f"<br>{c.measured}" for c in cells]
        verdicts = [f"{SHAPES[c.verdict]} **{c.verdict}**{text}" for c, text in zip(cells, said, strict=True)]
        read = f"[{item.notebook}](notebooks/{item.notebook}.ipynb)" if item.notebook else ""
        lines.append([quote + number, *verdicts, read])
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines) + "\n"


def readme_number(found: Mapping[str, list[Results]], column: str, claim: str, comparison: str | None) -> str:
    """What one comparison of a claim measured in a column, or the claim's verdict where none is named.

    Raises UserError where there is no such column, claim or comparison.
    """
    of: dict[str, Claim] = {c.name: c for c in claims()}
    if column not in found or claim not in of:
        there = ", ".join(found)
        raise UserError(f"README: there is no claim {claim!r} with a column {column!r}; the columns are {there}")
    if comparison is None:
        return ledger(found[column]).loc[claim, "verdict"]
    findings = {f.comparison: str(f.measured) for f in measured(of[claim], found[column])}
    if comparison not in findings:
        raise UserError(f"README: {claim} has no comparison {comparison!r}; it has {', '.join(findings)}")
    return findings[comparison]


def readme(text: str, found: Mapping[str, list[Results]]) -> str:
    """The README with its table, between `<!-- findings -->` and `<!-- /findings -->`, and its numbers, between
    `<!-- column claim: comparison -->` and `<!-- / -->`, as the results have them."""
    text = TABLE.sub(lambda m: m[1] + readme_table(found) + m[2], text)
    return NUMBER.sub(lambda m: m[1] + readme_number(found, m["column"], m["claim"], m["comparison"]) + m[5], text)


def write_readme(project: Path = PROJECT) -> None:
    """Puts what the published runs say into the project's README."""
    path = project / "README.md"
    text = path.read_text(encoding="utf-8")
    found = columns(STUDIES, project / "runs/published")
    write_atomic(path, readme(text, found).encode())


def report(study: Study, root: str | Path) -> str:
    """A study's claims and tables as markdown. Raises UserError where none of its runs is finished."""
    results = load(study, root)
    said = ledger(results)
    said = said[said.measured.ne("") & said.verdict.ne("not measured")]
    parts = [f"# {study.title}", f"Data: {study.dataset}. {results.state}.", "## Claims", markdown(said)]
    for title, function in TABLES.items():
        parts += _measured(title, function, results)
    for grid in study.grids:
        about = {"value": "test_accuracy", "by": ("mix", "rho", *regimes.REGIME), "grid": grid}
        parts += _measured(f"Test accuracy, grid {grid}", partial(Results.means, **about), results)
    return "\n\n".join(parts)


def _measured(title: str, function: Callable, results: Results) -> list[str]:
    try:
        return [f"## {title}", markdown(function(results))]
    except NotMeasured:
        return []


def write_html(study: Study, root: Path, out: Path) -> str:
    """One page of a study's executed notebooks, sources left out, that needs no other file; returns where it is.

    Raises UserError where no notebook of the study is executed.
    """
    from nbconvert import HTMLExporter  # takes a second to import

    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_input_prompt=True)
    exporter.exclude_output_prompt = True
    sections, index = [], []
    for path in sorted((Path(root) / study.name).glob("[0-9]*.ipynb")):
        if path.stem.endswith(".failed"):
            continue
        notebook = nbformat.read(path, 4)
        title = next(iter(re.findall(r"^# (.+)$", notebook.cells[0].source, re.MULTILINE)), path.stem)
        body, _ = exporter.from_notebook_node(notebook)
        sections.append(f'<section id="{path.stem}">{body}</section>')
        index.append(f'<li><a href="#{path.stem}">{escape(title)}</a></li>')
    if not sections:
        raise UserError(f"{relative(Path(root) / study.name)}: no executed notebook; `python -m samlib run` makes them")
    about = escape(f"Data: {study.dataset}.")
    page = PAGE.format(title=escape(study.title), about=about, index="".join(index), sections="\n".join(sections))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page.encode())
    return relative(out)
