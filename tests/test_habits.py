"""What keeps the repository clean: notebooks without outputs, hooks and CI that check the same, a citation."""

import os
import re
import shutil
import subprocess
import tomllib

import nbformat
import pytest
import yaml

from samlib import PROJECT

KERNEL = {"name": "python", "version": "3.11.7", "codemirror_mode": {"name": "ipython", "version": 3}}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A repository with one notebook of ours, and the hooks installed as CONTRIBUTING says."""
    if not shutil.which("git"):
        pytest.skip("git is not installed here")
    folder = tmp_path_factory.mktemp("original")
    (folder / "notebooks").mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements.lock", ".gitattributes", ".pre-commit-config.yaml"):
        shutil.copy2(PROJECT / name, folder)
    shutil.copy(PROJECT / "notebooks/01_train.ipynb", folder / "notebooks")
    (folder / ".venv").symlink_to(PROJECT / ".venv")
    git(folder, "init", "--quiet")
    git(folder, "config", "user.email", "a@b.c")
    git(folder, "config", "user.name", "A")
    assert run(folder, "make", "strip", "hooks").returncode == 0
    git(folder, "add", "notebooks", ".pre-commit-config.yaml", ".gitattributes")
    return folder


@pytest.fixture
def clone(original, tmp_path):
    return shutil.copytree(original, tmp_path / "clone", symlinks=True)


def run(folder, *command: str) -> subprocess.CompletedProcess:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "GIT_"))}
    plain |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    return subprocess.run(command, cwd=folder, env=plain, capture_output=True, text=True)


def git(folder, *arguments: str) -> str:
    result = run(folder, "git", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def execute_and_save(path) -> None:
    """What Jupyter writes after Run All: outputs, counts, widgets and what the kernel says of itself."""
    notebook = nbformat.read(path, 4)
    notebook.metadata |= {"language_info": KERNEL, "widgets": {"application/vnd.jupyter.widget-state+json": {}}}
    for count, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
        cell.execution_count = count + 1
        cell.outputs = [nbformat.v4.new_output("stream", text="42\n")]
        cell.metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
    nbformat.write(notebook, path)


def test_a_notebook_that_was_executed_and_saved_leaves_no_diff_in_git(clone):
    path = clone / "notebooks/01_train.ipynb"
    execute_and_save(path)
    assert git(clone, "diff") == ""
    notebook = nbformat.read(path, 4)
    notebook.cells[1].source += "\nmine: int = 1  # a change of the source"
    nbformat.write(notebook, path)
    added = [line for line in git(clone, "diff").splitlines() if line[:1] == "+" and line[:3] != "+++"]
    assert any("mine: int" in line for line in added) and len(added) <= 2


def test_a_notebook_committed_with_outputs_is_refused_by_make_lint(clone):
    assert run(clone, "make", "lint").returncode == 0
    execute_and_save(clone / "notebooks/01_train.ipynb")
    assert run(clone, "make", "lint").returncode == 0  # the filter keeps the outputs out
    git(clone, "config", "--unset", "filter.nbstripout.clean")
    git(clone, "add", "notebooks")
    result = run(clone, "make", "lint")
    assert result.returncode != 0 and "01_train.ipynb carries outputs" in result.stderr


def test_the_hooks_let_a_clean_commit_pass_and_stop_one_that_lint_refuses(clone):
    git(clone, "commit", "--quiet", "-m", "notebooks")
    (clone / "wrong.py").write_text("import os\n")
    git(clone, "add", "wrong.py")
    result = run(clone, "git", "commit", "-m", "wrong")
    assert result.returncode != 0 and "F401" in result.stdout + result.stderr


@pytest.mark.parametrize("uid, allowed", [("0", True), ("1000", False)])
def test_make_lab_listens_on_this_machine_alone_and_lets_root_in_only_where_it_is_root(tmp_path, uid, allowed):
    (tmp_path / "id").write_text(f"#!/bin/sh\necho {uid}\n")
    (tmp_path / "id").chmod(0o755)
    command = run(PROJECT, "env", f"PATH={tmp_path}:{os.environ['PATH']}", "make", "--dry-run", "lab").stdout
    assert "--ip=127.0.0.1 --notebook-dir=." in command and "token" not in command
    assert ("--allow-root" in command) == allowed


def test_ci_and_the_hooks_check_the_same():
    workflow = yaml.safe_load((PROJECT / ".github/workflows/ci.yml").read_text())
    assert {"run": ".ci/run"} in workflow["jobs"]["run"]["steps"]
    hooks = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    called = (PROJECT / ".ci/run").read_text().splitlines()
    assert "make lint" in called and "make test-browser" in called
    assert "make --silent lint" in [hook["entry"] for hook in hooks]


def test_the_citation_names_what_the_study_stands_on():
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert (PROJECT / "LICENSE").read_text().startswith(f"{project['license']} License")
    named = {entry.get("url") or entry["repository-code"] for entry in citation["references"]}
    assert {"https://github.com/rdavislee/sam_analysis", "https://github.com/lhchau/geometry-sam"} <= named
    arxiv = {re.sub(r".*/", "", url) for url in named if "arxiv" in url}
    assert arxiv == {"2010.01412", "2411.17132", "2302.07011"}
