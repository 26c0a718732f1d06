"""The README's findings are what the published runs give, and nothing else."""

import pytest

from samlib import PROJECT
from samlib.analysis.findings import HEADER, findings, write_findings


def test_the_readme_states_what_the_published_runs_give():
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    between = readme.split("<!-- findings -->\n")[1].split("<!-- /findings -->")[0]
    if not any((PROJECT / "runs/published").glob("*/summary.json")):
        pytest.skip("no run is published")
    assert between == findings()


def test_nothing_published_finds_nothing(tmp_path):
    (tmp_path / "quick").mkdir()
    (tmp_path / "quick" / "05_data_regimes.ipynb").write_text("{}")
    assert findings(tmp_path).startswith(HEADER + "\n\n")


def test_only_the_text_between_the_markers_is_replaced(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- findings -->\nold\n<!-- /findings -->\nafter\n")
    write_findings(readme, root=tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n<!-- findings -->\n" + HEADER) and text.endswith("<!-- /findings -->\nafter\n")
    assert "old" not in text
