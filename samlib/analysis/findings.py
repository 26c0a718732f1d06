"""What the published runs say, as the README's table: one row a question and study, computed, with its rule and n."""

import re
from pathlib import Path

from samlib import PROJECT
from samlib.analysis import ablation, geometry, regimes
from samlib.analysis.claims import interval, percent, start_and_end
from samlib.config import UserError
from samlib.analysis.report import MARK, text
from samlib.analysis.old_stats import Estimate
from samlib.study import Study

HEADER = "| asked | on | found | read |\n|---|---|---|---|"
MARKERS = re.compile(r"(<!-- findings -->\n).*(<!-- /findings -->)", re.DOTALL)


def _regimes(study: Study, root: Path, grid: str) -> str:
    runs = regimes.grid_runs(study, root, grid)
    table = regimes.summary(runs, ["test_accuracy"]).xs(regimes.DIFFERENCE, level="mix")
    cells = [e for e in table.test_accuracy if e.n]
    signs = regimes.signs(cells)
    pooled = regimes.pooled(runs, "test_accuracy")
    noise = "; ".join(
        f"{percent(key[0] if isinstance(key, tuple) else key)} noise {text(row.test_accuracy, 1, True)}"
        for key, row in pooled.iterrows()
    )
    return (
        f"SAM − SGD, final test accuracy in points over all data sizes: {noise}. Of {len(cells)} regimes SAM is above "
        f"in {signs.above} and below in {signs.below} ({max(e.n for e in cells)} seed(s) each)"
    )


def _geometry(study: Study, root: Path, grid: str) -> str:
    _, _, tables = geometry.load(study.path, root, grid, ("probes",), 0)
    probes = tables["probes"]
    active = geometry.of_active(probes)
    shares = []
    for name in ("checkpoint1", "checkpoint2", "checkpoint3", "checkpoint4"):
        first, last = start_and_end(active[name])
        shares.append(f"{name[-1]}: {percent(first)} → {percent(last)}")
    dead = percent(probes.inactive.mean())
    n = f"{dead} inactive; one run, {len(probes)} probes"
    return f"shares of active parameters over training, {', '.join(shares)} ({n})"


def _thresholds(study: Study, root: Path, grid: str) -> str:
    _, _, tables = geometry.load(study.path, root, grid, ("thresholds",), 0)
    table = geometry.thresholds_with_chance(tables["thresholds"])
    return (
        f"{percent(table.share.mean())} of checkpoint 1 exceed the threshold, by chance "
        f"{percent(table.chance.mean())} would (lift {table['lift'].mean():.2f}; {len(table)} epochs of one run)"
    )


def _rho(study: Study, root: Path, grid: str) -> str:
    _, runs, tables = geometry.load(study.path, root, grid, ("probes",))
    table = geometry.checkpoint1_by_run(runs, tables["probes"])
    rows = geometry.correlations(table, "last_quarter").set_index(["runs", "method"])

    def show(kind: str) -> str:
        row = rows.loc[(kind, "Pearson")]
        return interval(Estimate(row.r, row.low, row.high, int(row.n)))

    return f"correlation of checkpoint 1's share with test accuracy {show('all runs')}; within ρ {show('within ρ')}"


def _ablation(study: Study, root: Path, grid: str) -> str:
    frame = study.runs(root, grid)
    frame = frame.assign(test_accuracy=100 * frame.test_accuracy.astype(float))
    table = ablation.differences(frame)
    low, mid = table[table["n"] > 0].rho.min(), []
    for mix in ("sam", "checkpoint1", "checkpoint2", "checkpoint3", "checkpoint4"):
        cell = ablation.pick(table, mix, low)
        if cell.n:
            mid.append(f"{mix} {text(cell, 1, True)}")
    return f"test accuracy minus SGD's, in points, at ρ = {low:g}: {'; '.join(mid)}"


def _batch(study: Study, root: Path, grid: str) -> str:
    frame = study.runs(root, grid)
    frame = frame.assign(test_accuracy=100 * frame.test_accuracy.astype(float))
    small, *large = sorted({(c.batch_size, c.lr) for c in study.configs(grid)})
    parts = [
        f"batch {b}, lr {lr:g}: {text(ablation.batch_difference(frame, 'test_accuracy', (b, lr), small), 1, True)}"
        for b, lr in large
    ]
    return f"test accuracy minus that of batch {small[0]}, lr {small[1]:g}, in points: {'; '.join(parts)}"


FOUND = {
    "02_geometry": ("How do gradients change at the ascent point?", _geometry),
    "03_flatness_thresholds": ("Has checkpoint 1 the large gradients?", _thresholds),
    "04_rho_vs_checkpoint1": ("Does a larger checkpoint 1 generalize better?", _rho),
    "05_data_regimes": ("When does SAM beat SGD?", _regimes),
    "06_checkpoint_ablation": ("Which checkpoint does the work?", _ablation),
    "07_large_batch": ("Do large batches learn too slowly?", _batch),
}


def findings(root: str | Path = PROJECT / "runs/published", studies: Path = PROJECT / "studies") -> str:
    """A markdown table: a row for each executed notebook under the root whose runs are there, real images first."""
    root, rows = Path(root), []
    for path in sorted(studies.rglob("*.yaml"), key=lambda p: (p.stem == "quick", str(p))):
        study = Study.load(path)
        for analysis in study.notebooks:
            notebook = root / study.name / f"{analysis.notebook}.ipynb"
            if analysis.notebook not in FOUND or not notebook.exists():
                continue
            if study.runs(root, analysis.grid).empty:  # published under an earlier configuration
                continue
            asked, found = FOUND[analysis.notebook]
            try:
                said = found(study, root, analysis.grid)
            except UserError as error:
                said = f"not to be said yet: {error}"
            link = f"[{analysis.notebook}](runs/published/{study.name}/{analysis.notebook}.ipynb)"
            rows.append((analysis.notebook, f"| {asked} | {study.dataset} | {said} | {link} |"))
    rows.sort(key=lambda row: row[0])  # stable: within a notebook the order above
    return "\n".join([HEADER, *(row for _, row in rows)]) + f"\n\n{MARK}: the interval excludes zero.\n"


def write_findings(readme: Path = PROJECT / "README.md", **where: Path) -> None:
    """Puts the table between the README's markers."""
    text_before = readme.read_text(encoding="utf-8")
    table = findings(**where)
    readme.write_text(MARKERS.sub(lambda m: m[1] + table + m[2], text_before), encoding="utf-8")
