"""Claims: a document's sentence, a rule fixed before the numbers, and a function from results to findings."""

import pkgutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pandas as pd

import samlib.analysis
from samlib import PROJECT
from samlib.analysis.results import PUBLISHED, NotMeasured, Results, load
from samlib.analysis.stats import CONTRADICTED, HOLDS, NOT_MEASURED, UNDECIDED, Estimate

DOCUMENTS = {
    "regimes": ("When Do Flat Minima Help?", "https://github.com/rdavislee/sam_analysis"),
    "geometry": ("Geometry SAM", "https://github.com/lhchau/geometry-sam"),
    "noise": ("SANER", "https://arxiv.org/abs/2411.17132"),
}


@dataclass(frozen=True)
class Finding:
    """What a claim's function says of one comparison. measured: an Estimate, or words where that is not enough."""

    comparison: str
    measured: Estimate | str
    verdict: str
    note: str = ""


@dataclass(frozen=True)
class Claim:
    name: str
    subject: str  # of DOCUMENTS
    quote: str
    rule: str
    notebook: str | None
    document: str
    documented: str | None  # the document's number
    function: Callable[[Results], Iterable[Finding]] | None
    reason: str  # why it cannot be measured here, where it cannot

    def findings(self, results: Results) -> list[Finding]:
        """At least one; "not measured" with the reason where the results lack what the claim is about."""
        if self.function is None:
            return [Finding("", "", NOT_MEASURED, self.reason)]
        try:
            found = list(self.function(results))
        except NotMeasured as error:
            return [Finding("", "", NOT_MEASURED, str(error))]
        return found or [Finding("", "", NOT_MEASURED, f"no runs of {results.study.title!r} are of this kind")]


_registry: dict[str, Claim] = {}


def claim(
    subject: str, *, quote: str, rule: str = "", notebook: str | None = None, document: str | None = None,
    documented: str | None = None, not_measured: str | None = None, name: str = "",
) -> Callable:  # fmt: skip
    """Registers a function of Results that returns findings as the claim of that name.

    `not_measured`: the reason why this one cannot be measured here; then it has no function, and `name` names it.
    """

    def register(function: Callable | None) -> Callable | None:
        key = name or function.__name__
        if key in _registry and (function is None or _registry[key].function.__module__ != function.__module__):
            raise ValueError(f"there are two claims {key!r}")
        _registry[key] = Claim(
            key,
            subject,
            quote,
            rule,
            notebook,
            document or DOCUMENTS[subject][0],
            documented,
            function,
            not_measured or "",
        )
        return function

    if not_measured:
        register(None)
    return register


def claims(notebook: str | None = None, subject: str | None = None) -> list[Claim]:
    """Every claim of the modules samlib.analysis.claims_*, in their order, or those of one notebook or subject."""
    for module in pkgutil.iter_modules(samlib.analysis.__path__):
        if module.name.startswith("claims_"):
            import_module(f"samlib.analysis.{module.name}")
    chosen = [c for c in _registry.values() if notebook in (None, c.notebook) and subject in (None, c.subject)]
    return sorted(chosen, key=lambda c: list(DOCUMENTS).index(c.subject))


def overall(findings: Iterable[Finding]) -> str:
    """A claim's verdict from its findings: holds (is contradicted) where more than half of those measured do (are) and
    none says the opposite; not measured where none is; else undecided."""
    verdicts = [f.verdict for f in findings if f.verdict != NOT_MEASURED]
    for word, opposite in ((HOLDS, CONTRADICTED), (CONTRADICTED, HOLDS)):
        if 2 * verdicts.count(word) > len(verdicts) and opposite not in verdicts:
            return word
    return UNDECIDED if verdicts else NOT_MEASURED


def in_short(findings: list[Finding]) -> str:
    """What was measured, of one finding as it stands, of several their range and how many have which verdict."""
    measured = [f for f in findings if f.verdict != NOT_MEASURED]
    if len(measured) < 2:
        return str(measured[0].measured) if measured else next((f.note for f in findings if f.note), "")
    words = {HOLDS: "hold", CONTRADICTED: "contradicted", UNDECIDED: "undecided"}
    counts = [f"{sum(f.verdict == v for f in measured)} {word}" for v, word in words.items()]
    text = f"{len(measured)} comparisons: {', '.join(c for c in counts if c[0] != '0')}"
    found = [f.measured for f in measured if isinstance(f.measured, Estimate)]
    if len(found) < len(measured) or len({(e.unit, e.signed) for e in found}) > 1:
        return text
    least, most = (pick(found, key=lambda e: e.value) for pick in (min, max))
    return f"{least.format(n=False)} to {most.format(n=False)}; {text}"


def counted(findings: Iterable[Finding]) -> str:
    """The n of the estimates: one number, or the least and the most."""
    sizes = sorted({f.measured.n for f in findings if isinstance(f.measured, Estimate) and f.measured.n})
    return "" if not sizes else f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def measured(item: Claim, results: Iterable[Results]) -> list[Finding]:
    """The findings of several studies together; those that are not measured only where none is."""
    found = [finding for part in results for finding in item.findings(part)]
    return [f for f in found if f.verdict != NOT_MEASURED] or found[:1]


def ledger(
    results: Results | Iterable[Results], notebook: str | None = None, subject: str | None = None, brief: bool = False
) -> pd.DataFrame:
    """With a notebook, a row a finding of its claims: document, claim, documented, rule, comparison, measured, verdict,
    note. Without, or in brief, a row a claim: document, claim, documented, rule, measured, n, verdict, notebook.

    results: of one study, or of several, whose findings count together. Indexed by the claim's name.
    """
    results, rows = [results] if isinstance(results, Results) else list(results), []
    whole = notebook is not None and not brief
    for item in claims(notebook, subject):
        found = measured(item, results) if len(results) > 1 else item.findings(results[0])
        head = {"name": item.name, "document": item.document, "claim": item.quote}
        head |= {"documented": item.documented or "", "rule": item.rule}
        if whole:
            rows += [
                head | {"comparison": f.comparison, "measured": str(f.measured), "verdict": f.verdict, "note": f.note}
                for f in found
            ]
        else:
            row = {"measured": in_short(found), "n": counted(found), "verdict": overall(found)}
            rows.append(head | row | {"notebook": item.notebook or ""})
    extra = ("comparison", "measured", "verdict", "note") if whole else ("measured", "n", "verdict", "notebook")
    return pd.DataFrame(rows, columns=["name", "document", "claim", "documented", "rule", *extra]).set_index("name")


def columns(studies: Mapping[str, Results | str], root: str | Path = PUBLISHED) -> dict[str, list[Results]]:
    """The results behind each column of the ledger of all claims. studies: a column's name, and its results, or the
    pattern of its studies' files below the project. Studies without a run under the root are left out."""
    found = {name: [part] for name, part in studies.items() if isinstance(part, Results)}
    for name, pattern in studies.items():
        for path in sorted(PROJECT.glob(pattern)) if isinstance(pattern, str) else ():
            with suppress(NotMeasured):
                found.setdefault(name, []).append(load(path, root))
    return {name: parts for name, parts in found.items() if parts}


def read_from(found: Mapping[str, list[Results]]) -> pd.DataFrame:
    """What each column stands on: a row a study, its data, and how many of its runs are finished."""
    rows = [(name, r.study.title, r.study.dataset, f"{len(r.runs())} of {len(r.ids())}", len(r.diverged))
            for name, parts in found.items() for r in parts]  # fmt: skip
    return pd.DataFrame(rows, columns=["column", "study", "data", "runs", "diverged"])
