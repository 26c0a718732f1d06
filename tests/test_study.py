"""Studies: what a file may say, which runs follow from it, and how they are executed, stopped and taken up again."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from samlib import PROJECT, runner, study
from samlib.__main__ import main
from samlib.config import RunConfig, UserError
from samlib.data import load_source
from samlib.runs import Run
from samlib.study import Study

# Stands in for 01_train, without its imports: notes that it was executed, and does what the test wants of that seed.
STUB = """
import json, os, psutil, signal, time
from pathlib import Path
class UserError(ValueError): pass
seed = config["seed"]
(folder,) = Path(root).glob(f"*-s{seed}-*")
with open(folder / "kernels.csv", "a") as file:
    file.write(f"{os.getpid()}\\n")
executed = len((folder / "kernels.csv").read_text().split())
if seed == 7:
    raise ValueError("first line\\nseven is too many")
if seed == 8:
    raise UserError("seed: eight is refused")
if seed == 9 and executed == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if seed in (10, 12) and executed == 1:
    parent = psutil.Process().parent()
    forked = "samlib.kernels" in parent.cmdline()
    (parent.parent() if forked and seed == 10 else parent).kill()
    time.sleep(600)
(folder / "config.json").write_text(json.dumps({"config": config}))
(folder / "summary.json").write_text(json.dumps({"status": "diverged" if seed == 11 else "done"}))
"""
ANALYSIS = """
from pathlib import Path
print(Path(study).name, grid, colour, len(list(Path(root).glob("*/summary.json"))), "runs")
"""


def notebook(path: Path, parameters: str, code: str) -> None:
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(code)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """A folder with a training notebook that trains nothing and an analysis notebook that counts runs."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    notebook(folder / "01_train.ipynb", 'config = {}\nroot = ""', STUB)
    parameters = 'study = ""\nroot = ""\ngrid = ""\nfigures = ""\ncolour = "red"'
    notebook(folder / "02_count.ipynb", parameters, ANALYSIS)
    monkeypatch.setattr(study, "NOTEBOOKS", folder)
    monkeypatch.setattr(runner, "NOTEBOOKS", folder)
    return folder


def write_study(tmp_path: Path, text: str, name: str = "small.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def seeds_study(tmp_path: Path, *seeds: int) -> Path:
    notebooks = "notebooks:\n  - {notebook: 02_count, grid: seeds, parameters: {colour: blue}}"
    return write_study(
        tmp_path,
        f"title: Seeds\nbase: {{dataset: digits, epochs: 1}}\ngrids:\n  seeds: {{seed: {list(seeds)}}}\n{notebooks}",
    )


def kernels(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "kernels.csv").read_text().split()]


def output_of(path: Path) -> str:
    return "".join(o.get("text", "") for c in nbformat.read(path, 4).cells for o in c.get("outputs", []))


def test_a_grid_is_the_product_of_its_lists_with_fields_that_go_together(tmp_path):
    loaded = Study.load(
        write_study(
            tmp_path,
            """
            title: Regimes
            base: {dataset: digits, model: resnet10, probe_every: 5}
            grids:
              regimes:
                mix: [sgd, sam]
                regime: [{data_fraction: 0.1, epochs: 60}, {data_fraction: 1, epochs: 20}]
                rho: 0.1
                persistence_steps: [0, 7]
              extra:
                - {mix: sgd, seed: [0, 1]}
                - {mix: checkpoint134, persistence_steps: [[0], [1]]}
              again: {mix: sgd, seed: 1}
            """,
        )
    )
    common = {"dataset": "digits", "model": "resnet10", "probe_every": 5}
    regimes = [
        RunConfig(**common, mix=mix, rho=0.1, data_fraction=fraction, epochs=epochs, persistence_steps=(0, 7))
        for mix in ("sgd", "sam")
        for fraction, epochs in ((0.1, 60), (1.0, 20))
    ]
    extra = [RunConfig(**common, seed=seed) for seed in (0, 1)]
    extra += [RunConfig(**common, mix="checkpoint134", persistence_steps=(step,)) for step in (0, 1)]
    assert loaded.configs("regimes") == regimes
    assert loaded.configs("extra") == extra
    assert loaded.configs() == regimes + extra  # `again` is one of them
    assert (loaded.name, loaded.title, loaded.dataset) == ("small", "Regimes", "digits")
    assert loaded.missing(tmp_path / "runs", "again") == [extra[1]]


GRID = "title: T\ngrids: {g: %s}\n"
NOTEBOOK = "title: T\ngrids: {g: {seed: 1}}\nnotebooks: %s\n"
BAD = {
    "empty": ("", "mapping"),
    "blank comment": ("# nothing\n", "mapping"),
    "a text": ("hello", "mapping"),
    "a list": ("[1, 2]", "mapping"),
    "not YAML": ("title: [1, 2", "not a YAML file"),
    "tabs": ("title:\n\t- 1", "not a YAML file"),
    "two documents": ("title: T\n---\ntitle: U", "not a YAML file"),
    "python tag": ("title: !!python/object/apply:os.system ['touch harm']", "not a YAML file"),
    "python name": (GRID % "{seed: !!python/name:os.system }", "not a YAML file"),
    "own tag": ("title: !mine T\ngrids: {g: {seed: 1}}", "not a YAML file"),
    "key twice": ("title: T\ntitle: U\ngrids: {g: {seed: 1}}", "line 2.*'title' is there twice"),
    "field twice": (GRID % "{seed: 1, seed: 2}", "'seed' is there twice"),
    "key is a number": ("title: T\ngrids: {1: {seed: 1}}", "'1' is not text"),
    "key is a list": ("title: T\ngrids: {[a]: {seed: 1}}", "not text"),
    "aliases": ("title: T\nbase: &b {seed: 1}\ngrids: {g: *b}", "aliases"),
    "merge": ("title: T\ngrids: {g: {<<: {seed: 1}}}", "not text"),
    "deep": ("title: T\ngrids: " + "[" * 5000, "not a YAML file"),
    "control character": ("title: \x01", "not a YAML file"),
    "unknown top key": ("titel: T\ngrids: {g: {seed: 1}}", "no key 'titel'"),
    "no title": ("grids: {g: {seed: 1}}", "'title' is missing"),
    "no grids": ("title: T", "'grids' is missing"),
    "title is a list": ("title: [T]\ngrids: {g: {seed: 1}}", "title: found"),
    "dataset is a number": ("title: T\ndataset: 3\ngrids: {g: {seed: 1}}", "dataset: found"),
    "base is a list": ("title: T\nbase: [1]\ngrids: {g: {seed: 1}}", "base: found"),
    "base has an unknown field": ("title: T\nbase: {learning_rate: 1}\ngrids: {g: {}}", "base: learning_rate"),
    "base has a list": ("title: T\nbase: {seed: [1, 2]}\ngrids: {g: {}}", "base: seed"),
    "grids is a list": ("title: T\ngrids: [{seed: 1}]", "grids: found"),
    "grids is empty": ("title: T\ngrids: {}", "grids: there is none"),
    "grid is nothing": (GRID % "", "grid 'g': found nothing"),
    "grid is a number": (GRID % "3", "grid 'g': found 3"),
    "grid is an empty list": (GRID % "[]", "grid 'g': it is empty"),
    "grid of texts": (GRID % "[sgd, sam]", "grid 'g': found 'sgd'"),
    "grid named as a path": ("title: T\ngrids: {../g: {seed: 1}}", "grid '../g'"),
    "unknown field": (GRID % "{sede: 1}", "grid 'g': sede: there is no such field"),
    "unknown field in a list": (GRID % "{sede: [1, 2]}", "grid 'g': sede"),
    "unknown field in a mapping": (GRID % "{both: [{sede: 1}]}", "grid 'g': sede"),
    "a mapping outside a list": (GRID % "{both: {seed: 1}}", "grid 'g': both"),
    "an empty list": (GRID % "{seed: []}", "grid 'g': seed: the list is empty"),
    "values and mappings": (GRID % "{seed: [1, {seed: 2}]}", "grid 'g': seed: a list holds either"),
    "a field set twice": (GRID % "{seed: [1, 2], both: [{seed: 3}]}", "grid 'g': seed: it is set by both"),
    "wrong value": (GRID % "{mix: [sgd, adam]}", "grid 'g': mix"),
    "wrong type": (GRID % "{epochs: [1, many]}", "grid 'g': epochs"),
    "out of range": (GRID % "{data_fraction: [0.5, 1.5]}", "grid 'g': data_fraction: found 1.5"),
    "not a number": (GRID % "{rho: .nan}", "grid 'g': rho"),
    "infinite": (GRID % "{rho: .inf}", "grid 'g': rho"),
    "nothing": (GRID % "{seed: null}", "grid 'g': seed: found None"),
    "1e-3 is text": (GRID % "{lr: [1e-3]}", "grid 'g': lr: YAML reads '1e-3' as text: write 1.0e-3"),
    "quoted number": (GRID % '{seed: "5"}', "grid 'g': seed: YAML reads '5' as text: write 5"),
    "a date": (GRID % "{seed: 2024-01-01}", "grid 'g': seed"),
    "a boolean": (GRID % "{seed: yes}", "grid 'g': seed"),
    "huge number": (GRID % ("{seed: " + "9" * 30 + "}"), "grid 'g': seed"),
    "digits without end": (GRID % ("{seed: " + "9" * 9000 + "}"), "not a YAML file"),
    "too many runs": (GRID % ("{seed: %s, epochs: %s}" % ((list(range(1, 200)),) * 2)), "grid 'g': it has 39,601 runs"),
    "notebooks is a mapping": (NOTEBOOK % "{notebook: 02_count}", "notebooks: found"),
    "a notebook is a text": (NOTEBOOK % "[02_count]", "notebooks: found"),
    "a notebook without a name": (NOTEBOOK % "[{grid: g}]", "'notebook' is missing"),
    "a notebook with an unknown key": (NOTEBOOK % "[{notebook: 02_count, gird: g}]", "no key 'gird'"),
    "a notebook elsewhere": (NOTEBOOK % "[{notebook: ../secret}]", "notebook: found '../secret'"),
    "a notebook of another grid": (NOTEBOOK % "[{notebook: 02_count, grid: h}]", "no grid 'h'"),
    "a notebook twice": (NOTEBOOK % "[{notebook: 02_count}, {notebook: 02_count}]", "twice"),
    "parameters in a list": (NOTEBOOK % "[{notebook: 02_count, parameters: [1]}]", "parameters: found"),
    "a parameter of the study": (NOTEBOOK % "[{notebook: 02_count, parameters: {root: x}}]", "'root' is given"),
    "no such notebook": (NOTEBOOK % "[{notebook: 03_none}]", "03_none: there is no such notebook"),
    "no such parameter": (NOTEBOOK % "[{notebook: 02_count, parameters: {color: 1}}]", "no parameter 'color'"),
    "not an analysis": (NOTEBOOK % "[{notebook: 01_train}]", "no parameter 'study'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_study_is_refused_in_one_line_before_anything_starts(case, tmp_path, stubs, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, said = BAD[case]
    path = write_study(tmp_path, text)
    assert main(["run", str(path), "--root", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and len(error) < 2000 and str(path) in error
    assert re.search(said, error), error
    assert not (tmp_path / "runs").exists() and not (tmp_path / "harm").exists()


def test_a_notebook_reads_its_grid_and_those_that_its_parameters_name(tmp_path):
    grids = "grids: {a: {seed: [0, 1]}, b: {seed: 2}, c: {seed: 3}}"
    notebooks = "[{notebook: x, grid: a, parameters: {more: c, n: 1}}, {notebook: y}]"
    loaded = Study.load(write_study(tmp_path, f"title: T\n{grids}\nnotebooks: {notebooks}"))
    both, all_of_them = loaded.notebooks
    assert [config.seed for config in loaded.read_by(both)] == [0, 1, 3]
    assert [config.seed for config in loaded.read_by(all_of_them)] == [0, 1, 2, 3]


def test_a_study_file_that_cannot_be_read_or_named_is_refused(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "folder.yaml").mkdir()
    write_study(tmp_path, "title: T\ngrids: {g: {seed: 1}}", "two words.yaml")
    for name in ("binary.yaml", "folder.yaml", "none.yaml", "nul\0.yaml", "two words.yaml"):
        with pytest.raises(UserError, match=name.split("\0")[0].removesuffix(".yaml")):
            Study.load(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "name either a study file or one run"),
        (["run", "x.yaml", "--set", "seed=1"], "name either"),
        (["run", "--set", "mix"], "found 'mix'"),
        (["run", "--set", "seed=1", "seed=2"], "give each field once"),
        (["run", "--set", "sede=1"], "sede: there is no such field"),
        (["run", "--set", "lr=1e-3"], "write 1.0e-3"),
        (["run", "--set", "mix=[sgd, sam]"], "mix: found"),
        (["run", "--set", "mix=!!python/name:os.system"], "not a YAML"),
        (["run", "--set", "noise_fraction=1.0"], "noise_fraction: found 1.0"),
        (["status", "none.yaml"], "none.yaml: cannot be read"),
        (["publish", "none.yaml"], "none.yaml: cannot be read"),
    ],
)
def test_bad_arguments_are_refused_with_status_2(arguments, said, tmp_path, capsys):
    root = ["--root", str(tmp_path)] if arguments[0] == "run" else []
    assert main([*arguments, *root]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("workers", ["0", "-1", "two", "1e9", "²"])
def test_a_wrong_number_of_workers_is_refused(workers, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "x.yaml", "--workers", workers])
    assert stop.value.code == 2 and "number from 1" in capsys.readouterr().err


def test_an_address_where_no_scheduler_answers_is_refused(tmp_path, stubs, capsys):
    for address in ("nonsense", "tcp://127.0.0.1:x"):
        assert main(["run", str(seeds_study(tmp_path, 0)), "--root", str(tmp_path), "--scheduler", address]) == 2
        error = capsys.readouterr().err
        assert "--scheduler" in error and len(error.strip().splitlines()) == 1


def test_a_study_is_executed_once_reports_failures_and_goes_on(tmp_path, stubs, capsys):
    path, root = seeds_study(tmp_path, 7, 0, 8, 11), tmp_path / "runs"
    assert main(["run", str(path), "--root", str(root), "--workers", "2"]) == 1
    out, err = capsys.readouterr()
    seven, zero, eight, eleven = (root / config.run_id for config in Study.load(path).configs())
    assert f"failed: {seven.name}: ValueError: seven is too many (see {seven}/train.failed.ipynb)" in err
    assert f"failed: {eight.name}: seed: eight is refused (see {eight}/train.failed.ipynb)" in err
    assert "Traceback" not in err and "2 of 4 runs are done, 1 of them diverged" in out
    assert str(root / "small" / "02_count.ipynb") in out
    assert [len(kernels(folder)) for folder in (seven, zero, eight, eleven)] == [1, 1, 1, 1]  # nothing is tried again
    assert output_of(root / "small" / "02_count.ipynb") == "small.yaml seeds blue 2 runs\n"
    assert (
        "'blue'" in (root / "small" / "02_count.ipynb").read_text()
        or "blue" in (root / "small" / "02_count.ipynb").read_text()
    )
    assert {p.name for p in zero.iterdir()} == {"config.json", "summary.json", "train.ipynb", "kernels.csv"}

    path = seeds_study(tmp_path, 0, 11)  # the study without the two: its runs are there, the notebook is redone
    before = (zero / "train.ipynb").stat().st_mtime_ns
    assert main(["run", str(path), "--root", str(root)]) == 0
    assert (zero / "train.ipynb").stat().st_mtime_ns == before and len(kernels(zero)) == 1
    begin = time.monotonic()
    assert main(["run", str(path), "--root", str(root)]) == 0  # now nothing is left to do
    assert time.monotonic() - begin < 2
    assert not runner.stale_analyses(Study.load(path), root, root)
    os.utime(stubs / "02_count.ipynb")
    assert len(runner.stale_analyses(Study.load(path), root, root)) == 1

    assert main(["status", str(path), "--root", str(root)]) == 0
    out = capsys.readouterr().out
    assert "seeds: 2 of 2 runs are done" in out and f"diverged: {eleven.name}" in out

    (root / "figures" / "small").mkdir(parents=True)
    (root / "figures" / "small" / "02_count.png").touch()
    (zero / "state.pt").touch()
    path = seeds_study(tmp_path, 0, 11, 7)
    missing = runner.publish(Study.load(path), root, root / "figures", tmp_path / "clone")
    assert [config.seed for config in missing] == [7]
    published = {str(p.relative_to(tmp_path / "clone")) for p in (tmp_path / "clone").rglob("*") if p.is_file()}
    kept = ("config.json", "kernels.csv", "summary.json", "train.ipynb")
    assert published == {f"runs/published/{run.name}/{name}" for run in (zero, eleven) for name in kept} | {
        "runs/published/small/02_count.ipynb",
        "figures/small/02_count.png",
    }


def test_a_killed_kernel_and_a_killed_worker_cost_a_retry_and_no_kernel_outlives_its_worker(tmp_path, stubs):
    """Of its own kernel (9), its worker (10), and the process that its worker's kernels are forked from (12)."""
    path, root = seeds_study(tmp_path, 9, 10, 12, 0), tmp_path / "runs"
    assert main(["run", str(path), "--root", str(root), "--workers", "2"]) == 0
    nine, ten, twelve, zero = (root / config.run_id for config in Study.load(path).configs())
    assert [len(kernels(folder)) for folder in (nine, ten, twelve, zero)] == [2, 2, 2, 1]
    assert not any(psutil.pid_exists(kernel) for folder in (ten, twelve) for kernel in kernels(folder))
    assert not list(root.glob("*/.*.ipynb"))


def test_a_dry_run_says_what_it_would_do_and_does_nothing(tmp_path, stubs, capsys, monkeypatch):
    path, root = seeds_study(tmp_path, 0, 1), tmp_path / "runs"
    first, second = Study.load(path).configs()
    run = Run(first, root)
    with run.lock():
        run.write_config()
        run.finish({"status": "done"})
    (run.folder / "train.ipynb").touch()
    monkeypatch.setattr(runner, "estimated_seconds", lambda configs: (3600.0 * len(configs), ["no data"]))
    before = sorted(root.rglob("*"))
    assert main(["run", str(path), "--root", str(root), "--dry-run", "--workers", "4"]) == 0
    out = capsys.readouterr().out
    assert f"done   {first.run_id}" in out and f"to do  {second.run_id}" in out
    assert "1 done, 1 to do" in out and "about 1 hours" in out and "not estimated: no data" in out
    assert sorted(root.rglob("*")) == before


def test_the_estimate_is_steps_and_evaluations_times_the_measured_step(monkeypatch):
    import samlib.train

    monkeypatch.setattr(samlib.train, "seconds_per_step", lambda config: 0.5 * config.passes)
    config = RunConfig(dataset="digits", mix="sam", data_fraction=0.1, batch_size=10, epochs=20, eval_every=10)
    seconds, notes = runner.estimated_seconds([config, config])
    source = load_source(config)
    train, test = 0.1 * len(source.labels), len(source.test_labels)
    training = 20 * math.ceil(train / 10) * 1.0  # epochs, steps an epoch, seconds
    evaluation = 2 * (train + test) * 0.05 / 3  # evaluations, images, seconds a pass
    assert seconds == pytest.approx(2 * (training + evaluation + runner.NOTEBOOK_SECONDS)) and not notes
    absent = RunConfig(dataset="imagefolder", root="/nowhere")
    assert "nowhere" in runner.estimated_seconds([absent])[1][0]


def started(root: Path, process: subprocess.Popen, count: int) -> None:
    """Waits until so many trainings have written their first state."""
    deadline = time.monotonic() + 180
    while len(list(root.glob("*/state.pt"))) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def below(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def kernels_below(process: subprocess.Popen) -> list[psutil.Process]:
    """The kernels' processes: forks, or Jupyter's own."""

    def is_kernel(p: psutil.Process) -> bool:
        forked = "samlib.kernels" in p.cmdline() and "samlib.kernels" in p.parent().cmdline()
        return forked or "ipykernel_launcher" in p.cmdline()

    return [p for p in below(process) if is_kernel(p)]


LONG = "base: {dataset: digits, model: resnet10, width: 4, batch_size: 64, state_seconds: 0.2, epochs: 100000}"


@pytest.mark.faults
@pytest.mark.parametrize("how", ["Ctrl-C", "Ctrl-C of this process alone", "SIGKILL"])
def test_an_interrupted_study_stops_in_seconds_and_leaves_no_process(how, tmp_path):
    root = tmp_path / "runs"
    path = write_study(tmp_path, f"title: T\n{LONG}\ngrids: {{g: {{seed: [0, 1, 2]}}}}")
    command = [sys.executable, "-m", "samlib", "run", str(path), "--root", str(root), "--workers", "2"]
    with open(tmp_path / "stderr", "w") as stderr:
        process = subprocess.Popen(command, cwd=PROJECT, stderr=stderr, start_new_session=True)
    try:
        started(root, process, 2)
        processes = below(process)
        assert len(kernels_below(process)) == 2
        begin = time.monotonic()
        if how == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGKILL if how == "SIGKILL" else signal.SIGINT)
        status = process.wait(30)
        gone, alive = psutil.wait_procs(processes, timeout=30)
        assert not alive and time.monotonic() - begin < 30  # 1 s on an idle machine
        if how != "SIGKILL":
            error = (tmp_path / "stderr").read_text()
            assert status == 130 and "started ones resume: python -m samlib run" in error and "Traceback" not in error
    finally:
        for leftover in [*below(process)] if process.poll() is None else []:
            leftover.kill()
        process.kill()


@pytest.mark.faults
def test_a_worker_killed_by_sigkill_takes_its_kernel_along_and_its_run_resumes(tmp_path):
    root = tmp_path / "runs"
    text = LONG.replace("100000", "60")
    path = write_study(tmp_path, f"title: T\n{text}\ngrids: {{g: {{seed: [0, 1]}}}}")
    command = [sys.executable, "-m", "samlib", "run", str(path), "--root", str(root), "--workers", "2"]
    process = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        started(root, process, 2)
        kernel = kernels_below(process)[0]
        worker = kernel.parent().parent() if "samlib.kernels" in kernel.cmdline() else kernel.parent()
        assert "multiprocessing.spawn" in " ".join(worker.cmdline())
        worker.kill()
        kernel.wait(4)
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0 and "Traceback" not in error
    finally:
        if process.poll() is None:
            for leftover in [*below(process), process]:
                leftover.kill()
    alone = tmp_path / "alone"
    from samlib.train import train

    for config in Study.load(path).configs():
        resumed, whole = Run(config, root), train(config, alone, progress=False)
        times = ["seconds"]
        assert resumed.table("metrics").drop(columns=times).equals(whole.table("metrics").drop(columns=times))
        assert json.loads((resumed.folder / "summary.json").read_text())["status"] == "done"


@pytest.mark.faults
def test_two_commands_on_one_study_train_every_run_once(tmp_path, stubs):
    root = tmp_path / "runs"
    shutil.copy(PROJECT / "notebooks" / "01_train.ipynb", stubs / "01_train.ipynb")
    text = LONG.replace("100000", "10")
    path = write_study(tmp_path, f"title: T\n{text}\ngrids: {{g: {{seed: [0, 1, 2]}}}}")
    command = [sys.executable, "-m", "samlib", "run", str(path), "--root", str(root), "--workers", "1"]
    both = [subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(600) for process in both] == [0, 0]
    runs = [Run(config, root) for config in Study.load(path).configs()]
    assert all(run.done and (run.folder / "train.ipynb").exists() for run in runs)
    assert all(run.table("metrics").epoch.is_unique for run in runs)
    assert not list(root.glob("*/.*.ipynb"))


def test_one_run_by_set_goes_through_its_notebook(tmp_path, capsys):
    fields = ["dataset=digits", "model=resnet10", "width=4", "mix=sam", "data_fraction=0.2", "epochs=2", "eval_every=1"]
    fields += ["noise_fraction=0.2", "probe_every=1", "batch_size=64"]
    assert main(["run", "--root", str(tmp_path), "--set", *fields]) == 0
    out = capsys.readouterr().out
    (folder,) = [p for p in tmp_path.iterdir() if p.is_dir()]
    assert str(folder / "train.ipynb") in out
    executed = folder / "train.ipynb"
    assert executed.stat().st_size < 60_000
    text = executed.read_text()
    assert "image/png" in text and "memorized" in text and '"output_type": "error"' not in text
