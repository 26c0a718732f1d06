"""What trains on a GPU trains without Jupyter, papermill, Dask and curvlinops: machines with a GPU often lack them."""

import json
import os
import re
import subprocess
import sys
import tarfile

import pytest

from benchmarks import gpu
from benchmarks.measure import Row
from samlib import PROJECT

ABSENT = (
    "papermill", "nbformat", "nbclient", "jupyter_client", "jupyterlab", "ipykernel", "ipywidgets", "IPython", "dask",
    "distributed", "curvlinops", "backpack",
)  # fmt: skip
# A sitecustomize, in all processes: importing one of them fails as where it is not installed.
BLOCK = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""
TINY = {"dataset": "digits", "model": "resnet6", "stem": "cifar", "width": 4, "epochs": 1, "device": "cpu"}
MEASURES = {
    "probe_every": 5,
    "persistence_steps": (0,),
    "sharpness_every": 1,
    "noise_fraction": 0.2,
    "noise_every": 1,
    "measure_samples": 32,
}


@pytest.fixture
def without(tmp_path):
    """Python in a process from whose sight, and its children's, they are hidden, and a GPU where there is one."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)

    return run


def test_they_are_hidden(without):
    code = f"""
import importlib
for name in {ABSENT}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(error.name)
"""
    assert tuple(without("-c", code).stdout.split()) == ABSENT


def test_sgd_and_sam_train_and_are_measured_without_these_and_import_nothing_slow(without, tmp_path):
    code = f"""
import sys
from samlib.config import RunConfig
from samlib.train import train
for mix in ("sgd", "sam"):
    run = train(RunConfig(mix=mix, **{TINY | MEASURES}), sys.argv[1], progress=False)
    print(run.summary["status"], *sorted(run.rows))
print(sorted({{"torchvision", "sklearn", "scipy.stats"}} & set(sys.modules)))
"""
    result = without("-c", code, str(tmp_path / "runs"))
    assert result.returncode == 0, result.stderr
    *lines, slow = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["done", "done"] and slow == "[]"
    assert all({"metrics", "probes", "noise", "sharpness"} <= set(line.split()) for line in lines)


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "tiny.yaml"
    fields = ", ".join(f"{name}: {value}" for name, value in TINY.items() if name not in ("dataset", "device"))
    grid = "{seed: [1, 0], data_fraction: [0.02, 1.0]}"  # 20 images make no batch of 64 and more
    path.write_text(f"title: Tiny\nbase: {{{fields}, batch_size: 64, drop_last: true}}\ngrids:\n  grid: {grid}\n")
    return path


@pytest.fixture
def session(without, tmp_path):
    where = ["--out", str(tmp_path / "out"), "--root", str(tmp_path / "runs")]
    fields = ["--set", "dataset=digits", "device=cpu"]
    return lambda *arguments: without("-m", "benchmarks.gpu_session", *where, *arguments, *fields)


@pytest.mark.faults
def test_a_session_tells_each_failure_goes_on_seed_by_seed_and_brings_finished_runs_back(session, study, tmp_path):
    result = session("benchmark", f"{study}:grid")
    assert result.returncode == 1 and not result.stderr, result.stderr
    told = result.stdout.splitlines()
    assert "FAILED" in told[0] and "no CUDA device" in told[0]
    runs = [line for line in told if "digits-resnet6" in line]
    assert [re.search(r"-s(\d)-", line)[1] for line in runs] == ["1", "1", "0", "0"]
    failed = [line for line in runs if "FAILED" in line]
    assert len(failed) == 2 and all("-d0.02-" in line and "batch_size: 64" in line for line in failed)
    assert told[-1].endswith("2 of 4 done, 2 failed, 0 left when time was over")
    with tarfile.open(tmp_path / "out/runs.tar.gz") as tar:
        names = tar.getnames()
    folders = {name.split("/")[0] for name in names}
    assert len(folders) == 2 and all(
        f"{folder}/{file}" in names for folder in folders for file in ("summary.json", "metrics.csv")
    )
    assert not any(name.endswith((".pt", ".tmp", ".lock")) for name in names)

    again = session(f"{study}:grid", "--finished", str(tmp_path / "runs"), "--root", str(tmp_path / "other"))
    assert again.stdout.splitlines()[-1].endswith("0 of 2 done, 2 failed, 0 left when time was over")

    absent = session(f"{study}:grid", "--finished", str(tmp_path / "nothing"))
    assert absent.returncode == 2 and "is not a folder of runs" in absent.stderr


def test_a_benchmark_whose_time_ends_leaves_the_rows_that_it_has(monkeypatch, tmp_path):
    def rows(*_):
        yield Row("first", [0.5], "times", 1, True)
        yield Row("second", [2.0, 4.0, 3.0], "minutes")
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "need_cuda", lambda: None)
    monkeypatch.setattr(gpu, "in_order", rows)
    with pytest.raises(KeyboardInterrupt):
        gpu.measure_all(quick=False, folder=tmp_path / "out")
    found = json.loads((tmp_path / "out/gpu.json").read_text())
    assert [(row["what"], row["median"], row["met"]) for row in found["rows"]] == [
        ("first", 0.5, False),
        ("second", 3.0, None),
    ]
    text = (tmp_path / "out/gpu.md").read_text()
    assert "| second | 3 (2 to 4, n=3) minutes |" in text and "not at its end: rows are missing" in text


def test_a_session_stops_when_its_time_is_over_and_says_what_is_left(session, study):
    result = session(f"{study}:grid", "--minutes", "0")
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1].endswith("0 of 4 done, 0 failed, 4 left when time was over")
