"""Finished runs that never ran: their folders with the numbers that a test needs."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from samlib.config import RunConfig


def write_run(
    root: Path, config: RunConfig, tables: dict[str, list[dict]] | None = None, status: str = "done", **summary: Any
) -> None:
    """A run's folder; summary: numbers of summary.json beside plausible ones, None for a diverged run's."""
    folder = root / config.run_id
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"run_id": config.run_id, "config": config.changed()}))
    facts = {"status": status, "test_images": 1000, "train_images": 500, "flipped": 0, "steps_per_epoch": 4}
    (folder / "summary.json").write_text(json.dumps(facts | {"eval_train_accuracy": 1.0} | summary))
    for name, rows in (tables or {}).items():
        pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)


def write_study(path: Path, grids: dict[str, Any], base: dict[str, Any] | None = None) -> Path:
    content = {"title": "A study", "dataset": "made-up digits", "base": {"dataset": "digits", **(base or {})}}
    path.write_text(yaml.safe_dump(json.loads(json.dumps(content | {"grids": grids}))))  # copies, or YAML would alias
    return path
