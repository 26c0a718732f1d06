"""Studies: what a file may say, which runs follow from it, and how they are executed, stopped and taken up again."""

import json
import math
import os
import re
import resource
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from samlib import PROJECT, study
from samlib.__main__ import main
from samlib.batch import estimate, runner
from samlib.batch.publish import publish
from samlib.config import RunConfig, UserError
from samlib.data import load_source
from samlib.runs import Run
from samlib.study import Study, read_fields

# Stands in for 01_train: notes that it was executed, and does what the test wants of that seed.
STUB = """
import json, os, signal, sys
from pathlib import Path
from samlib.config import RunConfig, UserError
seed = config["seed"]
folder = Path(root, RunConfig.parse(config).run_id)
with open(folder / "kernels.csv", "a") as file:
    file.write(f"{os.getpid()}\\n")
executed = len((folder / "kernels.csv").read_text().split())
if seed == 7:
    raise ValueError("first line\\nseven is too many")
if seed == 8:
    raise UserError("seed: eight is refused")
if seed == 9 and executed == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if seed == 10:
    os.kill(os.getpid(), signal.SIGKILL)
print(f"{folder} is being written by a stub: waiting for it", file=sys.stderr)
(folder / "config.json").write_text(json.dumps({"run_id": folder.name, "config": config}))
(folder / "summary.json").write_text(json.dumps({"status": "diverged" if seed == 11 else "done"}))
"""
ANALYSIS = """
from pathlib import Path
from samlib.study import Study
print(Path(study).name, grid, colour, len(list(Path(root).glob("*/summary.json"))), "runs", overrides)
drawn = Path(figures, Study.load(study, overrides).name)
drawn.mkdir(parents=True, exist_ok=True)
(drawn / "02_count.svg").write_text("<svg/>")
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
    parameters = 'study = ""\nroot = ""\ngrid = ""\nfigures = ""\ncolour = "red"\noverrides = {}'
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
    assert (loaded.name, loaded.title, loaded.dataset) == ("small", "Regimes", "scikit-learn digits, 8x8")
    assert loaded.missing(tmp_path / "runs", "again") == [extra[1]]


GRID = "title: T\ngrids: {g: %s}\n"
NOTEBOOK = "title: T\ngrids: {g: {seed: 1}}\nnotebooks: %s\n"
BAD = {
    "empty": ("", "found no study; it is a mapping"),
    "blank comment": ("# nothing\n", "found no study"),
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
    "a bomb of aliases": (
        "a: &a [x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcd", "bcde", strict=True)),
        "aliases",
    ),
    "merge": ("title: T\ngrids: {g: {<<: {seed: 1}}}", "grid 'g': <<: a list holds"),
    "deep": ("title: T\ngrids: " + "[" * 5000, "not a YAML file"),
    "control character": ("title: \x01", "not a YAML file"),
    "unknown top key": ("titel: T\ngrids: {g: {seed: 1}}", "titel: there is no such field"),
    "no title": ("grids: {g: {seed: 1}}", "title: .*field required"),
    "no grids": ("title: T", "grids: .*field required"),
    "title is a list": ("title: [T]\ngrids: {g: {seed: 1}}", "title: found"),
    "dataset is a number": ("title: T\ndataset: 3\ngrids: {g: {seed: 1}}", "dataset: found"),
    "base is a list": ("title: T\nbase: [1]\ngrids: {g: {seed: 1}}", "base: found"),
    "base has an unknown field": ("title: T\nbase: {learning_rate: 1}\ngrids: {g: {}}", "base: learning_rate"),
    "base has a list": ("title: T\nbase: {seed: [1, 2]}\ngrids: {g: {}}", "base: seed"),
    "grids is a list": ("title: T\ngrids: [{seed: 1}]", "grids: found"),
    "grids is empty": ("title: T\ngrids: {}", "grids: .*at least 1 item"),
    "grid is nothing": (GRID % "", "grid 'g': found nothing"),
    "grid is a number": (GRID % "3", "grid 'g': found 3"),
    "grid is an empty list": (GRID % "[]", "grid 'g': it is empty"),
    "grid of texts": (GRID % "[sgd, sam]", "grid 'g': found 'sgd'"),
    "grid named as a path": ("title: T\ngrids: {../g: {seed: 1}}", "grids.../g.*: found '../g'; .*pattern"),
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
    "quoted number": (GRID % '{seed: "5"}', "grid 'g': seed: found '5'; .*integer"),
    "octal": (GRID % "{seed: 010}", "grid 'g': seed: found '010'"),
    "sexagesimal": (GRID % "{epochs: [1:00]}", "grid 'g': epochs: found '1:00'"),
    "underscores": (GRID % "{seed: 1_000}", "grid 'g': seed: found '1_000'"),
    "hexadecimal": (GRID % "{seed: 0x10}", "grid 'g': seed: found '0x10'"),
    "leading zeros": (GRID % "{lr: 00.1}", "grid 'g': lr: found '00.1'"),
    "yes": (GRID % "{augment: yes}", "grid 'g': augment: found 'yes'"),
    "a number as truth value": (GRID % "{augment: 1}", "grid 'g': augment: found 1"),
    "a list field with text": (GRID % "{persistence_lags: [1, 02]}", "grid 'g': persistence_lags"),
    "a date": (GRID % "{seed: 2024-01-01}", "grid 'g': seed"),
    "a boolean": (GRID % "{seed: yes}", "grid 'g': seed"),
    "huge number": (GRID % ("{seed: " + "9" * 30 + "}"), "grid 'g': seed"),
    "digits without end": (GRID % ("{seed: " + "9" * 9000 + "}"), "not a YAML file"),
    "too many runs": (GRID % ("{seed: %s, epochs: %s}" % ((list(range(1, 200)),) * 2)), "grid 'g': it has 39,601 runs"),
    "notebooks is a mapping": (NOTEBOOK % "{notebook: 02_count}", "notebooks: found"),
    "a notebook is a text": (NOTEBOOK % "[02_count]", "notebooks.0: found '02_count'"),
    "a notebook without a name": (NOTEBOOK % "[{grid: g}]", "notebook: .*field required"),
    "a notebook with an unknown key": (NOTEBOOK % "[{notebook: 02_count, gird: g}]", "gird: there is no such field"),
    "a notebook elsewhere": (NOTEBOOK % "[{notebook: ../secret}]", "notebook: found '../secret'"),
    "a notebook of another grid": (NOTEBOOK % "[{notebook: 02_count, grid: h}]", "no grid 'h'"),
    "a notebook twice": (NOTEBOOK % "[{notebook: 02_count}, {notebook: 02_count}]", "twice"),
    "parameters in a list": (NOTEBOOK % "[{notebook: 02_count, parameters: [1]}]", "parameters: found"),
    "a parameter of the study": (NOTEBOOK % "[{notebook: 02_count, parameters: {root: x}}]", "'root' is given"),
    "no such notebook": (NOTEBOOK % "[{notebook: 03_none}]", "03_none: there is no such notebook"),
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
    assert loaded.grids_of(both) == ["a", "c"] and loaded.grids_of(all_of_them) == ["a", "b", "c"]
    part = loaded.only(["b"])
    assert [config.seed for config in part.configs()] == [2] and part.notebooks == [all_of_them]
    assert loaded.only(["c", "b"]).notebooks == loaded.notebooks and loaded.only(["a"]).name == loaded.name


def test_a_grid_alone_is_run_where_one_is_named(tmp_path, stubs, capsys):
    path = write_study(
        tmp_path,
        """
        title: Two
        base: {dataset: digits, epochs: 1}
        grids: {first: {seed: [0, 1]}, second: {seed: [0, 2]}}
        notebooks: [{notebook: 02_count, grid: second}]
        """,
    )
    root = tmp_path / "runs"
    assert main(["run", str(path), "--root", str(root), "--grid", "first"]) == 0
    assert "runs done: 2 of 2" in capsys.readouterr().out and not (root / "small").exists()
    assert main(["status", str(path), "--root", str(root)]) == 0
    assert "second: runs done: 1 of 2" in capsys.readouterr().out
    assert main(["run", str(path), "--root", str(root), "--grid", "third"]) == 2
    assert "there is no grid 'third'; the grids are first, second" in capsys.readouterr().err
    assert main(["run", "--set", "dataset=digits", "--root", str(root), "--grid", "first"]) == 2
    assert capsys.readouterr().err == "samlib: --grid: it is of a study; name the study's file\n"


def test_a_study_is_run_seed_by_seed_and_of_a_seed_the_longest_first(tmp_path):
    grids = "grids: {g: {seed: [1, 0], mix: [sgd, sam], epochs: [2, 1]}}"
    configs = Study.load(write_study(tmp_path, f"title: T\nbase: {{dataset: digits}}\n{grids}")).configs()
    order = [(c.seed, c.mix, c.epochs) for c in runner.unfinished(configs, tmp_path / "runs")]
    one = [("sam", 2), ("sgd", 2), ("sam", 1), ("sgd", 1)]
    assert order == [(seed, *kind) for seed in (0, 1) for kind in one]


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
        (["run"], "name a study file, or one run"),
        (["run", "x.yaml", "--set", "seed=1"], "x.yaml: cannot be read"),
        (["run", "--set", "seed=1", "--set", "seed=2"], "give each field once"),
        (["run", "--set", "seed=010"], "seed: found '010'"),
        (["run", "--set", "epochs=1:00"], "epochs: found '1:00'"),
        (["run", "--set", "epochs=1", "--scheduler", ""], "--scheduler: it is empty"),
        (["run", "studies/quick.yaml", "--set", "mix=sam"], "the grid sets it itself"),
        (["run", "studies/quick.yaml", "--set", "sede=1"], "--set: sede: there is no such field"),
        (["status", "studies/quick.yaml", "--set", "augment=yes"], "--set: augment: found 'yes'"),
        (["run", "--set", "mix"], "found 'mix'"),
        (["run", "--set", "seed=1", "seed=2"], "give each field once"),
        (["run", "--set", "sede=1"], "sede: there is no such field"),
        (["run", "--set", "mix=[sgd, sam]"], "mix: found"),
        (["run", "--set", "mix=!!python/name:os.system"], "not a YAML"),
        (["run", "--set", "noise_fraction=1.0"], "noise_fraction: found 1.0"),
        (["status", "none.yaml"], "none.yaml: cannot be read"),
        (["publish", "none.yaml"], "none.yaml: cannot be read"),
    ],
)
def test_bad_arguments_are_refused_with_status_2(arguments, said, tmp_path, capsys):
    root = ["--root", str(tmp_path)]
    assert main([*arguments, *root]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("workers", ["0", "-1", "two", "1e9", "²"])
def test_a_wrong_number_of_workers_is_refused(workers, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "x.yaml", "--workers", workers])
    assert stop.value.code == 2 and "number from 1" in capsys.readouterr().err


def test_a_study_is_executed_once_reports_failures_and_goes_on(tmp_path, stubs, capsys):
    path, root = seeds_study(tmp_path, 7, 0, 8, 11), tmp_path / "runs"
    assert main(["run", str(path), "--root", str(root), "--workers", "1"]) == 1
    out, err = capsys.readouterr()
    seven, zero, eight, eleven = (root / config.run_id for config in Study.load(path).configs())
    assert f"failed: {seven.name}: ValueError: seven is too many (see {seven}/train.failed.ipynb)" in err
    assert f"failed: {eight.name}: seed: eight is refused (see {eight}/train.failed.ipynb)" in err
    assert "Traceback" not in err and "runs done: 2 of 4, diverged: 1" in out
    assert f"{zero} is being written by a stub: waiting for it" in err  # which a run says to its notebook
    assert str(root / "small" / "02_count.ipynb") in out
    assert [len(kernels(folder)) for folder in (seven, zero, eight, eleven)] == [1, 1, 1, 1]  # nothing is tried again
    assert output_of(root / "small" / "02_count.ipynb") == "small.yaml seeds blue 2 runs {}\n"
    assert {p.name for p in zero.iterdir()} == {"config.json", "summary.json", "train.ipynb", "kernels.csv"}

    path = seeds_study(tmp_path, 0, 11)  # the study without the two: its runs are there, the notebook is redone
    before = (zero / "train.ipynb").stat().st_mtime_ns
    assert main(["run", str(path), "--root", str(root)]) == 0
    assert (zero / "train.ipynb").stat().st_mtime_ns == before and len(kernels(zero)) == 1
    begin = time.monotonic()
    assert main(["run", str(path), "--root", str(root)]) == 0  # now nothing is left to do
    assert time.monotonic() - begin < 2
    figures = root / "figures"
    assert not runner.stale_analyses(Study.load(path), root, figures)
    os.utime(stubs / "02_count.ipynb")
    assert len(runner.stale_analyses(Study.load(path), root, figures)) == 1

    assert main(["status", str(path), "--root", str(root)]) == 0
    out = capsys.readouterr().out
    assert "seeds: runs done: 2 of 2, diverged: 1" in out and f"diverged: {eleven.name}" in out


def test_without_training_what_is_finished_gets_its_notebooks_and_nothing_else_is_started(tmp_path, stubs, capsys):
    path, root = seeds_study(tmp_path, 0), tmp_path / "runs"
    assert main(["run", str(path), "--root", str(root), "--no-notebooks"]) == 0
    path = seeds_study(tmp_path, 0, 11)
    zero, eleven = (root / config.run_id for config in Study.load(path).configs())
    (zero / "train.ipynb").unlink()  # as samlib.train leaves a run
    assert main(["run", str(path), "--root", str(root), "--no-training"]) == 0
    assert "runs done: 1 of 2" in capsys.readouterr().out
    assert (zero / "train.ipynb").exists() and not eleven.exists()
    assert output_of(root / "small" / "02_count.ipynb") == "small.yaml seeds blue 1 runs {}\n"
    before = (root / "small" / "02_count.ipynb").stat().st_mtime_ns
    assert main(["run", str(path), "--root", str(root), "--no-training"]) == 0  # and now there is nothing to do
    assert (root / "small" / "02_count.ipynb").stat().st_mtime_ns == before
    assert main(["run", str(path), "--root", str(root), "--no-training", "--dry-run"]) == 2
    assert "leave --no-training out" in capsys.readouterr().err


def test_a_notebook_that_failed_is_told_apart_from_one_of_before(tmp_path, stubs, capsys):
    path, root = seeds_study(tmp_path, 0), tmp_path / "runs"
    assert main(["run", str(path), "--root", str(root)]) == 0
    notebook(stubs / "02_count.ipynb", 'study = ""\nroot = ""\ngrid = ""\nfigures = ""\noverrides = {}', "1 / 0")
    capsys.readouterr()
    assert main(["run", str(path), "--root", str(root)]) == 1
    out, err = capsys.readouterr()
    assert "02_count" in err and "02_count.ipynb" not in out
    assert main(["status", str(path), "--root", str(root)]) == 0
    assert "02_count.ipynb: failed, see 02_count.failed.ipynb" in capsys.readouterr().out


def test_figures_that_were_deleted_are_drawn_again(tmp_path, stubs):
    path, root = seeds_study(tmp_path, 0), tmp_path / "runs"
    assert main(["run", str(path), "--root", str(root)]) == 0
    figure = root / "figures" / "small" / "02_count.svg"
    figure.unlink()
    assert main(["run", str(path), "--root", str(root)]) == 0
    assert figure.exists() and len(kernels(root / Study.load(path).configs()[0].run_id)) == 1


def published_in(clone: Path) -> set[str]:
    return {str(p.relative_to(clone)) for p in clone.rglob("*") if p.is_file()}


def test_publish_copies_finished_runs_names_stale_notebooks_and_drops_tables_that_are_gone(tmp_path, stubs):
    path, root, clone = seeds_study(tmp_path, 0, 11), tmp_path / "runs", tmp_path / "clone"
    assert main(["run", str(path), "--root", str(root)]) == 0
    zero, eleven = (root / config.run_id for config in Study.load(path).configs())
    for name in ("state.pt", "weights.pt", "lock", ".train.1.ipynb"):
        (zero / name).touch()
    path = seeds_study(tmp_path, 0, 11, 7)
    missing, stale = publish(Study.load(path), root, root / "figures", clone)
    assert [config.seed for config in missing] == [7] and stale == ["02_count"]  # one of its runs is missing
    kept = ("config.json", "kernels.csv", "summary.json", "train.ipynb")
    both = {f"runs/published/{run.name}/{name}" for run in (zero, eleven) for name in kept}
    both |= {"runs/published/small/02_count.ipynb", "figures/small/02_count.svg"}
    assert published_in(clone) == both

    (zero / "kernels.csv").rename(zero / "probes.csv")
    study = Study.load(seeds_study(tmp_path, 0, 11))
    os.utime(root / "small" / "02_count.ipynb")
    assert publish(study, root, root / "figures", clone) == ([], [])
    assert published_in(clone) == both - {f"runs/published/{zero.name}/kernels.csv"} | {
        f"runs/published/{zero.name}/probes.csv"
    }
    unchanged = (clone / "runs/published" / zero.name / "probes.csv").stat().st_ino
    os.utime(zero / "summary.json", (time.time() + 60,) * 2)
    assert publish(study, root, root / "figures", clone) == ([], ["02_count"])
    assert (clone / "runs/published" / zero.name / "probes.csv").stat().st_ino == unchanged


def test_publishing_on_a_full_disk_leaves_every_published_file_as_it_was_or_whole(tmp_path, stubs, monkeypatch):
    path, root, clone = seeds_study(tmp_path, 0), tmp_path / "runs", tmp_path / "clone"
    assert main(["run", str(path), "--root", str(root)]) == 0
    study = Study.load(path)
    publish(study, root, root / "figures", clone)
    before = {name: (clone / name).read_bytes() for name in published_in(clone)}
    (root / study.configs()[0].run_id / "train.ipynb").write_bytes(b"x" * 100_000)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(UserError, match=r"train.ipynb: its 100,000 bytes could not be written"):
            publish(study, root, root / "figures", clone)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {name: (clone / name).read_bytes() for name in published_in(clone)} == before


def test_a_set_study_has_its_own_runs_notebooks_and_figures_and_says_its_own_data(tmp_path, stubs, capsys):
    path, root = seeds_study(tmp_path, 0), tmp_path / "runs"
    assert main(["run", str(path), "--root", str(root)]) == 0
    plain = (root / "small" / "02_count.ipynb").read_bytes()
    fields = ["--set", "epochs=2", "--set", "image_size=16", "lr=0.05"]
    assert main(["run", str(path), "--root", str(root), *fields]) == 0
    study = Study.load(path, {"epochs": 2, "image_size": 16, "lr": 0.05})
    assert study == Study.load(
        path, {"lr": 0.05, "image_size": 16, "epochs": 2, "dataset": "digits"}
    )  # digits as it is
    assert re.fullmatch("small-[0-9a-f]{8}", study.name) and study.dataset == "scikit-learn digits, 16x16"
    assert [(c.epochs, c.image_size, c.lr) for c in study.configs()] == [(2, 16, 0.05)] and not study.missing(root)
    assert (root / "small" / "02_count.ipynb").read_bytes() == plain
    said = output_of(root / study.name / "02_count.ipynb")
    assert said == f"small.yaml seeds blue 2 runs {study.overrides}\n"  # which is given as the parameter `overrides`
    assert (root / "figures" / study.name / "02_count.svg").exists()
    capsys.readouterr()
    assert main(["status", str(path), "--root", str(root), *fields]) == 0
    assert f"{root / study.name}/02_count.ipynb: executed" in capsys.readouterr().out
    assert main(["run", str(path), "--root", str(root), *fields, "--dry-run"]) == 0
    assert "runs: 1, done: 1, to do: 0" in capsys.readouterr().out
    clone = tmp_path / "clone"
    publish(study, root, root / "figures", clone)
    assert f"runs/published/{study.name}/02_count.ipynb" in published_in(clone)


def test_the_data_are_named_by_what_is_set():
    path = PROJECT / "studies" / "laptop" / "data-regimes.yaml"
    assert Study.load(path).dataset == "CIFAR-10 (JPEG re-encoding), 16x16"
    assert Study.load(path, {"threads": 2}).dataset == "CIFAR-10 (JPEG re-encoding), 16x16"
    given = {"dataset": "cifar10", "root": "data"}
    assert Study.load(path, given).dataset == "CIFAR-10, 16x16" and Study.load(path, given).overrides == given
    assert Study.load(path, {"root": "/own"}).dataset == "images of /own, 16x16"


def test_a_relative_root_of_data_means_the_callers_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_fields(["root=mine", "seed=1"]) == {"root": str(tmp_path / "mine"), "seed": 1}
    monkeypatch.chdir(PROJECT)
    assert read_fields(["root=data"]) == {"root": "data"}


def test_data_that_are_missing_stop_a_study_once_before_anything_starts(tmp_path, stubs, capsys):
    text = f"title: T\nbase: {{dataset: imagefolder, root: {tmp_path}/none}}\ngrids: {{g: {{seed: [0, 1, 2]}}}}"
    path, root = write_study(tmp_path, text), tmp_path / "runs"
    assert main(["run", str(path), "--root", str(root)]) == 2
    error = capsys.readouterr().err
    assert error.count("none/train' is not a folder") == 1 and len(error.splitlines()) == 1 and not root.exists()


@pytest.mark.faults
def test_a_killed_kernel_costs_a_retry_and_three_of_them_the_run(tmp_path, stubs, capsys):
    path, root = seeds_study(tmp_path, 9, 10, 0), tmp_path / "runs"
    assert main(["run", str(path), "--root", str(root), "--workers", "1"]) == 1
    nine, ten, zero = (root / config.run_id for config in Study.load(path).configs())
    assert [len(kernels(folder)) for folder in (nine, ten, zero)] == [2, 3, 1]
    error = capsys.readouterr().err
    assert f"{nine.name}: the kernel of train.ipynb died (attempt 1 of 3)" in error
    assert f"failed: {ten.name}: its kernel died 3 times" in error and "Traceback" not in error
    assert not any(psutil.pid_exists(kernel) for folder in (nine, ten) for kernel in kernels(folder)[:1])
    assert not [p for p in root.rglob(".*") if p.is_file()]


def test_a_summary_that_is_none_is_one_sentence_in_every_command(tmp_path, stubs, capsys):
    path, root = seeds_study(tmp_path, 0), tmp_path / "runs"
    assert main(["run", str(path), "--root", str(root)]) == 0
    capsys.readouterr()
    (summary,) = root.glob("*/summary.json")
    for text in ("{}", '{"status": "done", "test_accuracy": "high"}', "[1]", "not JSON"):
        summary.write_text(text)
        for command in ("run", "status", "publish"):
            assert (
                main([command, str(path), "--root", str(root), *(["--no-notebooks"] if command == "run" else [])]) == 2
            )
            error = capsys.readouterr().err
            assert str(summary) in error and len(error.splitlines()) == 1, (command, text, error)


def test_a_dry_run_says_what_it_would_do_and_does_nothing(tmp_path, stubs, capsys, monkeypatch):
    path, root = seeds_study(tmp_path, 0, 1), tmp_path / "runs"
    first, second = Study.load(path).configs()
    run = Run(first, root)
    with run.lock():
        run.write_config("data")
        run.finish({"status": "done"})
    (run.folder / "train.ipynb").touch()
    monkeypatch.setattr(estimate, "estimated_seconds", lambda configs: (3600.0 * len(configs), ["no data"]))
    before = sorted(root.rglob("*"))
    assert main(["run", str(path), "--root", str(root), "--dry-run", "--workers", "4"]) == 0
    out = capsys.readouterr().out
    assert f"done   {first.run_id}" in out and f"to do  {second.run_id}" in out
    assert (
        "runs: 2, done: 1, to do: 1" in out
        and "about 60 minutes, workers: 1 " in out
        and "not estimated: no data" in out
    )
    assert sorted(root.rglob("*")) == before


def test_the_estimate_is_steps_and_evaluations_times_the_measured_step(monkeypatch):
    monkeypatch.setattr(estimate, "seconds_per_step", lambda config: 0.5 * config.passes)
    config = RunConfig(dataset="digits", mix="sam", data_fraction=0.1, batch_size=10, epochs=20, eval_every=10)
    seconds, notes = estimate.estimated_seconds([config, config])
    source = load_source(config)
    train, test = 0.1 * len(source.labels), len(source.test_labels)
    training = 20 * math.ceil(train / 10) * 1.0  # epochs, steps an epoch, seconds
    evaluation = 2 * (train + test) * 0.05 / 3  # evaluations, images, seconds a pass
    assert seconds == pytest.approx(2 * (training + evaluation + estimate.NOTEBOOK_SECONDS)) and not notes
    absent = RunConfig(dataset="imagefolder", root="/nowhere")
    assert "nowhere" in estimate.estimated_seconds([absent])[1][0]


def test_the_estimate_of_a_step_is_a_positive_time():
    assert 0 < estimate.seconds_per_step(RunConfig(dataset="digits", model="resnet6", width=4, mix="sam"), 1) < 10


@pytest.mark.parametrize(
    "fields", [{"model": "resnet34", "width": 512}, {"batch_size": 1_000_000}, {"image_size": 512}]
)
def test_a_dry_run_allocates_no_more_than_the_machine_has(fields, monkeypatch):
    def fails(config):
        raise AssertionError("a step was tried")

    monkeypatch.setattr(estimate, "seconds_per_step", fails)
    free = psutil.virtual_memory()._replace(available=2**31)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    config = RunConfig(dataset="digits", **{"model": "resnet18", "width": 64, "stem": "cifar", **fields})
    seconds, (note,) = estimate.estimated_seconds([config])
    assert seconds == 0 and "GiB, which is not tried" in note


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
    assert str(tmp_path) not in json.dumps(nbformat.read(executed, 4).metadata["papermill"]["output_path"])


def test_digits_asks_quicks_questions_of_seeds_that_quick_has_not():
    quick, digits = (Study.load(PROJECT / f"studies/{name}.yaml") for name in ("quick", "digits"))
    of = [
        {c.model_copy(update={"seed": 0}).run_id for grid in ("twice", "shorter") for c in study.configs(grid)}
        for study in (quick, digits)
    ]
    assert of[0] == of[1] and len(of[0]) == 9 and digits.dataset == quick.dataset
    assert not {c.seed for c in digits.configs()} & {c.seed for c in quick.configs()}
