"""Analysis notebooks read like a paper: no code but calls, no number in prose, sources that a report can hide."""

import ast
import re
import subprocess
import sys

import nbformat
import pytest

from samlib import PROJECT
from samlib.analysis.claim import claims

ANALYSES = [p for p in sorted((PROJECT / "notebooks").glob("0[2-9]_*.ipynb"))]
LINES = 25  # of code, in a cell
each = pytest.mark.parametrize("path", ANALYSES, ids=lambda p: p.stem)


def code(path) -> list:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


@each
def test_no_notebook_defines_a_function_or_builds_a_sentence(path):
    for cell in code(path):
        kinds = {type(node) for node in ast.walk(ast.parse(cell.source))}
        assert not kinds & {ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.JoinedStr}, cell.source
        assert not re.search(r"\bMarkdown\(|\.format\(|chdir", cell.source), cell.source
        assert len(cell.source.splitlines()) <= LINES


@each
def test_every_source_can_be_hidden_and_one_cell_holds_the_parameters(path):
    tags = [cell.metadata.get("tags", []) for cell in code(path)]
    assert all("hide-input" in t for t in tags) and sum("parameters" in t for t in tags) == 1
    (cell,) = [cell for cell in code(path) if "parameters" in cell.metadata.tags]
    lines = cell.source.splitlines()
    names = {line.target.id: ast.unparse(line.value) for line in ast.parse(cell.source).body}  # annotated, all of them
    assert {"study", "root", "figures", "overrides"} <= set(names) and names["root"] == "'runs/published'"
    assert all("  # " in line for line in lines), "each says what it is"


@each
def test_the_ledger_comes_first_and_its_claims_are_of_this_notebook(path):
    if path.stem == "09_claims":
        return
    first = next(k for k, cell in enumerate(code(path)) if "ledger(" in cell.source)
    assert first <= 3 and f'"{path.stem}"' in code(path)[first].source and claims(path.stem)


@each
def test_it_is_short_and_its_cells_have_stable_ids(path):
    notebook = nbformat.read(path, 4)
    assert len(notebook.cells) <= 24 and all(re.fullmatch(r"[a-z]+-\d+", cell.id) for cell in notebook.cells)
    total = sum(len([line for line in c.source.splitlines() if line.strip()]) for p in ANALYSES for c in code(p))
    assert total <= 400


@each
def test_prose_states_no_number_that_a_run_can_change(path):
    prose = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
    assert not re.search(r"\d ?(points|nats)\b|\bn ?= ?\d|±|\d\.\d+ ?%", prose)


def test_papermill_executes_it_from_any_folder_and_unknown_parameters_are_refused(tmp_path):
    notebook = str(PROJECT / "notebooks/05_data_regimes.ipynb")
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", notebook, "out.ipynb", "-p", "colour", "red"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode and "colour: the notebook has no such parameter" in result.stderr
