"""Claims: a document's sentence, a rule fixed before the numbers, and a function from results to findings."""

import math
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import pandas as pd

import samlib.analysis
from samlib import PROJECT
from samlib.analysis.results import PUBLISHED, NotMeasured, Results, load, plural
from samlib.analysis.stats import (
    CONTRADICTED,
    HOLDS,
    LEAST,
    NOT_MEASURED,
    UNDECIDED,
    Estimate,
    expected_by_chance,
)

DOCUMENTS = {
    "regimes": ("When Do Flat Minima Help?", "https://github.com/rdavislee/sam_analysis"),
    "geometry": ("Geometry SAM", "https://github.com/lhchau/geometry-sam"),
    "noise": ("SANER", "https://arxiv.org/abs/2411.17132"),
}
ASKED = "asked here"  # the document of a claim that none of them makes
PARAPHRASE = "in our words)"  # ends a claim that is told and not quoted
READ_AS = ", read as: "  # stands between a quote and what is measured of it


@dataclass(frozen=True)
class Finding:
    """What a claim's function says of one comparison. where: its setting. measured: an Estimate, or words where that is
    not enough. what: what is compared there, where the claim compares several things."""

    where: str
    measured: Estimate | str
    verdict: str
    note: str = ""
    what: str = ""

    @property
    def comparison(self) -> str:
        return f"{self.what}: {self.where}" if self.what else self.where

    @property
    def shown(self) -> str:
        """What was measured, without the pairs that are left out."""
        return self.measured if isinstance(self.measured, str) else str(replace(self.measured, left_out=0, missing=0))


@dataclass(frozen=True)
class Claim:
    name: str
    subject: str  # of DOCUMENTS
    quote: str
    rule: str
    notebook: str
    document: str
    documented: str  # the document's number
    function: Callable[[Results], Iterable[Finding]] | None
    reason: str  # why it cannot be measured here, where it cannot
    every: bool  # whether its rule joins parts by "and": see `overall`

    @property
    def words(self) -> str:
        """The claim as it is shown: between quotation marks where these are the document's own words."""
        told = self.document == ASKED or PARAPHRASE in self.quote
        said, mark, reading = self.quote.partition(READ_AS)
        return self.quote if told else f"“{said}”{mark}{reading}"

    def findings(self, *studies: Results) -> list[Finding]:
        """Of all studies together, at least one: "not measured" with the reason where they lack what it is about.

        Of a study all or none: what it yields before a NotMeasured is a part of the claim. Studies may share runs, and
        the same comparison of the same measured is one finding; of another measured it has its study in `where`.
        """
        found, once, lacking, key = [], {}, [], f"claim {self.name}"
        for results in studies if self.function else ():
            try:
                if key not in results.computed:  # a page asks for it several times
                    results.computed[key] = list(self.function(results))
                found += [(f, results.study.name) for f in results.computed[key]]
            except NotMeasured as error:
                lacking.append(Finding("", "", NOT_MEASURED, str(error)))
        for f, study in found:
            if f.verdict == NOT_MEASURED:
                lacking.append(f)
            else:
                once.setdefault((f.comparison, f.shown), (f, study))
        reason = self.reason or f"no runs of {' or '.join(repr(r.study.title) for r in studies)} are of this kind"
        times = Counter(comparison for comparison, _ in once)
        return [
            replace(f, where=f"{f.where} ({study})") if times[f.comparison] > 1 else f for f, study in once.values()
        ] or [*lacking, Finding("", "", NOT_MEASURED, reason)][:1]


_registry: dict[str, Claim] = {}


def claim(
    subject: str, *, quote: str, rule: str = "", notebook: str = "", document: str = "", documented: str = "",
    not_measured: str = "", name: str = "", every: bool = False,
) -> Callable:  # fmt: skip
    """Registers a function of Results that returns findings as the claim of that name.

    quote: the document's words, or others that end in PARAPHRASE. not_measured: the reason why it cannot be measured
    here; then it has no function, and `name` names it. every: whether the rule joins parts by "and", see `overall`.
    Raises ValueError where there is another claim of that name.
    """

    def register(function: Callable | None) -> Callable | None:
        key = name or function.__name__
        if key in _registry:
            raise ValueError(f"there are two claims {key!r}")
        source = document or DOCUMENTS[subject][0]
        about = (quote, rule, notebook, source, documented)
        _registry[key] = Claim(key, subject, *about, function, not_measured, every)
        return function

    return register(None) if not_measured else register


def claims(notebook: str | None = None, subject: str | None = None) -> list[Claim]:
    """Every claim of the modules samlib.analysis.claims_*, in their order, or those of one notebook or subject."""
    for module in pkgutil.iter_modules(samlib.analysis.__path__):
        if module.name.startswith("claims_"):
            import_module(f"samlib.analysis.{module.name}")
    chosen = [c for c in _registry.values() if notebook in (None, c.notebook) and subject in (None, c.subject)]
    return sorted(chosen, key=lambda c: list(DOCUMENTS).index(c.subject))


def settled(findings: Iterable[Finding], every: bool = False) -> list[str]:
    """The verdicts of those that are measured. every: all findings of one `where` count as one, which holds where each
    of them does, and is contradicted where any is."""
    found = [f for f in findings if f.verdict != NOT_MEASURED]
    if not every:
        return [f.verdict for f in found]
    parts = [{f.verdict for f in found if f.where == where} for where in dict.fromkeys(f.where for f in found)]
    return [CONTRADICTED if CONTRADICTED in part else HOLDS if part == {HOLDS} else UNDECIDED for part in parts]


def overall(findings: Iterable[Finding], every: bool = False) -> str:
    """A claim's verdict, from those of its findings (see `settled`): holds (is contradicted) where more than half do
    (are) and none says the opposite; not measured where there are none; else undecided."""
    verdicts = settled(findings, every)
    for word, opposite in ((HOLDS, CONTRADICTED), (CONTRADICTED, HOLDS)):
        if 2 * verdicts.count(word) > len(verdicts) and opposite not in verdicts:
            return word
    return UNDECIDED if verdicts else NOT_MEASURED


def in_short(findings: list[Finding], every: bool = False) -> str:
    """What was measured: of one finding as it stands, of several how many (of their settings, see `settled`) have which
    verdict, and where all measure the same thing their range: of those that could be decided, where there are any."""
    if len(findings) < 2:
        return "".join(str(f.measured) or f.note for f in findings)
    verdicts, text = settled(findings, every), plural(len(findings), "comparison")
    if every:
        text = f"{plural(len(verdicts), 'setting')} of {text}"
    counts = {v: verdicts.count(v) for v in (HOLDS, CONTRADICTED, UNDECIDED)}
    text += ": " + ", ".join(f"{n} {'hold' if v == HOLDS and n > 1 else v}" for v, n in counts.items() if n)
    found = [f.measured for f in findings if isinstance(f.measured, Estimate)]
    alike = {(f.what, f.measured.unit, f.measured.signed) for f in findings if isinstance(f.measured, Estimate)}
    if len(found) < len(findings) or len(alike) > 1:
        return text
    ends = [end([e for e in found if e.n >= LEAST] or found, key=lambda e: e.value) for end in (min, max)]
    return f"{' to '.join(dict.fromkeys(e.format(n=False) for e in ends))}; {text}"


def counted(findings: Iterable[Finding]) -> str:
    """The n of the estimates: one number, or the least and the most."""
    sizes = {f.measured.n for f in findings if isinstance(f.measured, Estimate)} - {0}
    return " to ".join(str(n) for n in sorted({min(sizes), max(sizes)})) if sizes else ""


def ledger(results: Results | Iterable[Results], notebook: str | None = None, brief: bool = False) -> pd.DataFrame:
    """With a notebook, a row a finding of its claims: document, claim, documented, rule, comparison, measured, verdict,
    note. Without, or in brief, a row a claim: document, claim, documented, rule, measured, n, verdict, notebook.

    results: of one study, or of several, whose findings count together. Indexed by the claim's name.
    """
    studies, rows = [results] if isinstance(results, Results) else list(results), []
    whole = notebook is not None and not brief
    for item in claims(notebook):
        found, head = item.findings(*studies), [item.name, item.document, item.words, item.documented, item.rule]
        if whole:
            rows += [[*head, f.comparison, str(f.measured), f.verdict, f.note] for f in found]
        else:
            rows.append([*head, in_short(found, item.every), counted(found), overall(found, item.every), item.notebook])
    rest = ("comparison", "measured", "verdict", "note") if whole else ("measured", "n", "verdict", "notebook")
    return pd.DataFrame(rows, columns=["name", "document", "claim", "documented", "rule", *rest]).set_index("name")


def columns(studies: Mapping[str, Results | str], root: str | Path = PUBLISHED) -> dict[str, list[Results]]:
    """The results behind each column of the ledger of all claims. studies: a column's name, and its results, or the
    pattern of its studies' files below the project. Studies without a run under the root are left out."""
    found = {name: [part] for name, part in studies.items() if isinstance(part, Results)}
    for name, pattern in studies.items():
        for path in sorted(PROJECT.glob(pattern), key=lambda path: path.stem) if isinstance(pattern, str) else ():
            with suppress(NotMeasured):
                found.setdefault(name, []).append(load(path, root))
    return {name: parts for name, parts in found.items() if parts}


def by_chance(found: Mapping[str, list[Results]]) -> pd.DataFrame:
    """A row a column: how many of its comparisons have an interval that could decide them, and how many of so many
    exclude the truth by chance alone."""
    rows = []
    for name, parts in found.items():
        measured = [f.measured for c in claims() for f in c.findings(*parts) if isinstance(f.measured, Estimate)]
        decidable = sum(e.n >= LEAST and not math.isnan(e.half) for e in measured)
        rows.append((name, len(measured), decidable, f"{expected_by_chance(decidable):.1f}"))
    names = ["column", "comparisons", "with an interval of three pairs or more", "wrong by chance alone, on average"]
    return pd.DataFrame(rows, columns=names)


def repeated(found: Mapping[str, list[Results]]) -> pd.DataFrame:
    """A row a column of the first one's data: of the comparisons that the first decides, how many it has, too, and
    decides alike, leaves undecided, or decides the other way; and how many it decides that the first does not. Raises
    NotMeasured where no other column is of these data."""
    first, *others = found
    data = {name: {results.study.dataset for results in parts} for name, parts in found.items()}
    of = {
        name: {(c.name, f.comparison): f.verdict for c in claims() for f in c.findings(*found[name])}
        for name in (first, *others)
        if data[name] == data[first]
    }
    decided = {key for key, verdict in of[first].items() if verdict in (HOLDS, CONTRADICTED)}
    rows = {}
    for name in list(of)[1:]:
        again = {key: verdict for key, verdict in of[name].items() if verdict != NOT_MEASURED and key in of[first]}
        pairs = [(of[first][key], verdict) for key, verdict in again.items() if key in decided]
        rows[name] = {
            f"decided by {first}": len(decided), "of these it has": len(pairs),
            "alike": sum(a == b for a, b in pairs), "undecided": sum(b == UNDECIDED for _, b in pairs),
            "the other way": sum(b not in (a, UNDECIDED) for a, b in pairs),
            "decided by it alone": sum(of[first][key] == UNDECIDED and again[key] != UNDECIDED for key in again),
        }  # fmt: skip
    if not rows:
        raise NotMeasured(f"no other column is of the data of {first}")
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("column")


def read_from(found: Mapping[str, list[Results]]) -> pd.DataFrame:
    """What each column stands on: a row a study, its data, and how many of its runs are finished."""
    rows = []
    for name, parts in found.items():
        for results in parts:
            status = results.planned().status
            finished = f"{(status != 'missing').sum()} of {len(status)}"
            rows.append((name, results.study.title, results.study.dataset, finished, (status == "diverged").sum()))
    return pd.DataFrame(rows, columns=["column", "study", "data", "runs", "diverged"])
