"""runs/published: what a study stands on, copied out of what is run here."""

from pathlib import Path

from samlib import PROJECT
from samlib.batch.runner import stale_analyses
from samlib.config import RunConfig
from samlib.runs import Run, write_atomic
from samlib.study import Study

RUN_FILES = ("config.json", "*.csv", "train.ipynb", "summary.json")  # no weights, no states


def publish(study: Study, root: Path, figures: Path, project: Path = PROJECT) -> tuple[list[RunConfig], list[str]]:
    """Copies the finished runs of a study, its executed notebooks and figures to runs/published and figures/<study>.

    Every file is replaced whole; a table that a run no longer has goes. Returns the runs that are not done, and the
    notebooks that are missing or older than what they read. Raises UserError where a run's files are not a run's.
    """
    published = project / "runs" / "published"
    missing = study.missing(root)
    for config in study.configs():
        if config in missing:
            continue
        Run(config, root).summary  # noqa: B018  which raises where it is none
        source, target = root / config.run_id, published / config.run_id
        for name in {p.name for folder in (source, target) for pattern in RUN_FILES for p in folder.glob(pattern)}:
            _copy(source / name, target / name)
    for analysis in study.notebooks:
        name = Path(study.name, f"{analysis.notebook}.ipynb")
        if (root / name).exists():
            _copy(root / name, published / name)
    drawn = figures / study.name
    for path in sorted(drawn.rglob("*")) if drawn.is_dir() else []:
        if path.is_file():
            _copy(path, project / "figures" / study.name / path.relative_to(drawn))
    return missing, [task.notebook for task in stale_analyses(study, root, figures)]


def _copy(source: Path, target: Path) -> None:
    """The target holds what the source does, or is gone where there is no source; left alone where it does already."""
    if not source.exists():
        target.unlink(missing_ok=True)
        return
    content = source.read_bytes()
    if not target.exists() or target.read_bytes() != content:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, content)
