"""Kernels that execute one notebook after another: each notebook finds what it would find in a kernel of its own."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from samlib import PROJECT
from samlib.batch import kernels
from samlib.batch.execute import execute
from samlib.config import RunConfig
from samlib.runs import Run

SPEC = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


def write_notebook(path: Path, *cells: str) -> str:
    first = nbformat.v4.new_code_cell("value = 1", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)], metadata=SPEC), path)
    return str(path)


@pytest.fixture
def executed(tmp_path):
    """Executes cells; returns what they printed."""

    def call(*cells: str, value: int = 2) -> str:
        output = tmp_path / "output.ipynb"
        source = write_notebook(tmp_path / "source.ipynb", *cells)
        assert execute(source, str(output), {"value": value}, str(tmp_path)) is None
        outputs = [o for cell in nbformat.read(output, 4).cells for o in cell.get("outputs", [])]
        return "".join(o.get("text", "") for o in outputs)

    return call


# What notebooks change and the next one could see, and what each prints of it.
SEEN = {
    "the namespace": ("leak = 1", "'leak' in globals()"),
    "the environment": ("os.environ['LEAK'] = '1'; del os.environ['HOME']", "sorted(os.environ)"),
    "the folder": ("os.chdir('/')", "os.getcwd()"),
    "the path of modules": ("sys.path.insert(0, '/')", "sys.path"),
    "filters of warnings": ("warnings.simplefilter('error')", "warnings.filters"),
    "matplotlib": ("plt.figure(); plt.rcParams['font.size'] = 3", "plt.get_fignums(), plt.rcParams"),
    "pandas": ("pd.set_option('display.max_rows', 3)", "pd.get_option('display.max_rows')"),
    "torch's threads": ("torch.set_num_threads(2)", "torch.get_num_threads()"),
    "the count of cells": ("1", "get_ipython().execution_count"),
    "the project's modules": ("import samlib.data; samlib.data.PARTS = None", "'samlib.data' in sys.modules"),
    "streams": ("sys.stdout, shown = open(os.devnull, 'w'), sys.stdout", "type(sys.stdout)"),
}  # fmt: skip
IMPORTS = """
import os, sys, warnings
import matplotlib.pyplot as plt, pandas as pd, torch
"""
SHOW = IMPORTS + "\n".join(f"print({name!r}, {seen})" for name, (_, seen) in SEEN.items())


def test_a_notebook_finds_nothing_of_the_one_before_it(executed):
    pid = "\nprint('process', os.getpid())"
    first, one = executed(SHOW).rstrip(), executed(SHOW + pid).rsplit("\n", 2)[1]
    executed(IMPORTS, *(change for change, _ in SEEN.values()))
    second = executed(SHOW + pid)
    assert second.rstrip().split("\n") == [*first.split("\n"), one]  # in the same process


def test_code_that_is_edited_while_a_study_runs_counts_from_the_next_notebook_on(executed, tmp_path):
    code = (
        "import os, samlib; samlib.__path__.insert(0, '.'); import samlib.edited as m; print(os.getpid(), m.x); m.x = 3"
    )
    said = []
    for x in ("1", "20"):  # of another length, so that Python sees that its cache is old
        (tmp_path / "edited.py").write_text(f"x = {x}")
        said += executed(code).split()
    assert said == [said[0], "1", said[0], "20"]


def test_a_notebook_that_fails_costs_its_kernel_and_not_the_next_notebook(executed, tmp_path):
    first = executed("import os; print(os.getpid())")
    source = write_notebook(tmp_path / "fails.ipynb", "raise ValueError('on purpose')")
    assert execute(source, str(tmp_path / "x.ipynb"), {}, str(tmp_path)) == "ValueError: on purpose"
    assert (tmp_path / "x.failed.ipynb").exists() and not (tmp_path / "x.ipynb").exists()
    assert executed("import os; print(os.getpid())") != first
    assert execute(str(tmp_path / "none.ipynb"), str(tmp_path / "x.ipynb"), {}, "/").startswith(
        f"{tmp_path}/none.ipynb"
    )


RUNS = (
    {"mix": "sam", "rho": 0.2, "seed": 1, "probe_every": 4, "threads": 2},
    {"mix": "shuffled-checkpoint1", "noise_fraction": 0.2, "noise_every": 1, "probe_every": 8, "sharpness_every": 2},
)


def train(root: Path, fields: dict) -> Run:
    small = {"dataset": "digits", "model": "resnet6", "stem": "cifar", "width": 4, "epochs": 2, "eval_every": 1}
    config = RunConfig(**small, batch_size=64, augment=False, measure_samples=64, **fields)
    notebook, output = PROJECT / "notebooks" / "01_train.ipynb", root / config.run_id / "train.ipynb"
    assert execute(str(notebook), str(output), {"config": config.changed(), "root": str(root)}, str(PROJECT)) is None
    return Run(config, root)


def outputs(run: Run) -> list:
    """Of the executed notebook: without times, progress bars, and where the run lies."""
    cells = nbformat.read(run.folder / "train.ipynb", 4).cells
    kept = [(cell.get("execution_count"), o) for cell in cells for o in cell.get("outputs", [])]
    kept = [item for item in kept if item[1].get("name") != "stderr" and "widget" not in str(item[1])]
    return [line for line in str(kept).replace(str(run.folder.parent), "").split(",") if "second" not in line]


@pytest.mark.faults
def test_two_runs_in_one_kernel_are_to_the_bit_those_of_two_new_kernels(tmp_path):
    kernels.stop()
    shared = [train(tmp_path / "shared", fields) for fields in (*RUNS, RUNS[0])]
    for fields, one in zip(RUNS, shared, strict=False):
        kernels.stop()
        new = train(tmp_path / "new", fields)
        tables = sorted(path.name for path in new.folder.glob("*.csv"))
        assert tables == sorted(path.name for path in one.folder.glob("*.csv")) and len(tables) >= 3
        for name in tables:
            a, b = (run.table(Path(name).stem).drop(columns="seconds", errors="ignore") for run in (one, new))
            assert a.equals(b), name
        assert outputs(one) == outputs(new) and len(outputs(one)) > 3


def test_a_kernel_is_reached_by_this_user_alone(executed):
    """Its sockets lie in a folder that another user cannot enter, and no channel is a port."""
    executed("1")
    kernel = psutil.Process(kernels._kernels[-1].process.pid)
    below = [kernel, *kernel.children(recursive=True)]
    listening = [c.laddr for p in below for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert len(listening) <= 1  # ipykernel's own, for what subprocesses print, on the loopback and with a secret
    assert all(address.ip == "127.0.0.1" for address in listening)
    sockets = list(Path(kernels.folder()).glob("*-ipc-*"))
    assert len(sockets) >= 5 and Path(kernels.folder()).stat().st_mode & 0o077 == 0
    if os.geteuid() == 0:
        nobody = f"import os, socket; os.setgid(65534); os.setuid(65534); socket.socket(1).connect({str(sockets[0])!r})"
        refused = subprocess.run([sys.executable, "-c", nobody], capture_output=True, text=True)
        assert "PermissionError" in refused.stderr
    with socket.socket(socket.AF_UNIX) as own:
        own.connect(str(sockets[0]))


def test_a_stopped_batch_gets_no_kernel_and_leaves_no_process_and_no_file(executed, tmp_path):
    source = write_notebook(tmp_path / "sleeps.ipynb", "import time; print(value); time.sleep(60)")
    said = []
    arguments = (source, str(tmp_path / "o.ipynb"), {"value": 3}, str(tmp_path), "mine")
    thread = threading.Thread(target=lambda: said.append(execute(*arguments)))
    thread.start()
    while not (busy := [kernel.process.pid for kernel in kernels._kernels if kernel.batch == "mine"]):
        time.sleep(0.05)
    kernels.stop("another")
    assert psutil.pid_exists(*busy)
    kernels.stop("mine")
    thread.join(30)
    assert said == ["stopped"] and not psutil.pid_exists(*busy) and not (tmp_path / "o.ipynb").exists()
    assert execute(*arguments) == "stopped"
    assert executed("print(value)", value=4) == "4\n"  # the others go on
    folder = Path(kernels.folder())
    kernels.stop()
    assert not folder.exists()
    assert not [p for p in psutil.Process().children() if "ipykernel_launcher" in p.cmdline()]


def test_a_full_disk_is_named_with_file_and_size_when_the_notebook_is_what_fails(tmp_path):
    source = write_notebook(tmp_path / "long.ipynb", "print('x' * 200_000)")
    code = (
        "import resource, sys; from samlib.batch.execute import execute\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "print(execute(*sys.argv[1:3], {}, sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, source, str(tmp_path / "o" / "out.ipynb"), str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT).stdout
    assert said.startswith(f"{tmp_path}/o/out.ipynb: its 2") and "bytes could not be written (File too large" in said
    assert not list((tmp_path / "o").iterdir())
