"""Forked kernels: what a notebook sees of them, and what happens when they cannot be had."""

import os
import sys
from pathlib import Path

import nbformat
import psutil
import pytest

from samlib import kernels
from samlib.execute import execute

CODE = """
import os, sys
ready = "samlib.train" in sys.modules
import matplotlib.pyplot as plt
plt.plot([1, 2])
plt.show()
sys.stdout.write(f"{value} {os.getpid()} {os.getppid()} {ready} {os.getcwd()}")
"""


@pytest.fixture
def executed(tmp_path):
    """Executes a notebook that says who executes it: its parameter, pid, parent's pid, whether imports were there."""
    cells = [
        nbformat.v4.new_code_cell("value = 1", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(CODE),
        nbformat.v4.new_code_cell("import os\nassert os.environ['SAMLIB_TEST'] == 'here'"),
    ]
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    source, output = tmp_path / "source.ipynb", tmp_path / "output.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), source)

    def call(value: int) -> list[str]:
        assert execute(str(source), str(output), {"value": value}, str(tmp_path)) is None
        outputs = [o for cell in nbformat.read(output, 4).cells for o in cell.get("outputs", [])]
        assert any("image/png" in o.get("data", {}) for o in outputs)
        return "".join(o["text"] for o in outputs if o.output_type == "stream").split(maxsplit=4)

    return call


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux alone")
def test_kernels_are_forks_of_one_process_that_has_the_imports(executed, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMLIB_TEST", "here")
    first, second = executed(2), executed(3)
    assert first[0] == "2" and second[0] == "3" and first[1] != second[1]
    assert first[2] == second[2] and first[3] == second[3] == "True"
    assert Path(first[4].strip()) == tmp_path
    origin = psutil.Process(int(first[2]))
    assert origin.ppid() == os.getpid() and origin.num_threads() == 1  # else a fork would not be safe
    assert not origin.children()
    origin.kill()
    third = executed(4)
    assert third[0] == "4" and third[2] != first[2] and third[3] == "True"


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux alone")
def test_imports_that_fail_are_the_notebooks_to_report(executed, monkeypatch, capfd):
    kernels.stop()
    monkeypatch.setenv("SAMLIB_TEST", "here")
    code = "import sys; sys.modules['PIL.Image'] = None; from samlib import kernels; kernels.main()"
    monkeypatch.setattr(kernels, "ORIGIN", ["-c", code])
    value, _, parent, ready, _ = executed(6)
    assert (value, int(parent), ready) == ("6", os.getpid(), "False")
    assert "Traceback" not in capfd.readouterr().err


def test_without_forks_kernels_are_started_as_jupyter_starts_them(executed, monkeypatch):
    def fails(*_: object) -> int:
        raise OSError("no process can be had")

    monkeypatch.setenv("SAMLIB_TEST", "here")
    monkeypatch.setattr(kernels, "fork", fails)
    value, _, parent, ready, _ = executed(5)
    assert (value, int(parent), ready) == ("5", os.getpid(), "False")
