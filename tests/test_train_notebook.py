"""01_train: what its parameters mean, by hand, injected by papermill, and from a study's configuration."""

import json
import subprocess
import sys
from io import BytesIO

import nbformat
import pandas as pd
import PIL.Image
import pytest

from samlib import PROJECT
from samlib.analysis.figures import LOOKS
from samlib.analysis.figures_run import CHECKPOINTS, final_numbers, training_curves
from samlib.config import RunConfig, UserError
from samlib.notebook import folder, run_config
from samlib.train import train

NOTEBOOK = PROJECT / "notebooks/01_train.ipynb"
(CELL,) = (c.source for c in nbformat.read(NOTEBOOK, 4).cells if "parameters" in c.metadata.get("tags", []))


def injected(**values) -> str:
    return "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in values.items()) + "\n"


def executed(*cells: str) -> RunConfig:
    """The configuration after these cells, in a namespace such as a kernel's."""
    namespace = {"In": ["", *cells]}
    for cell in cells:
        exec(cell, namespace)
    return run_config(namespace)


def test_by_default_it_trains_the_digits_that_ship_with_scikit_learn():
    config = executed(CELL)
    assert (config.dataset, config.model, config.eval_every) == ("digits", "resnet6", 1)
    assert RunConfig().dataset == "cifar10" and RunConfig().eval_every == 10  # the first document's, as they were


def test_every_parameter_is_a_field_of_the_configuration_and_annotated_with_its_type():
    fields = executed(CELL).model_dump()
    for line in CELL.splitlines():
        name, _, rest = line.partition(": ")
        kind, _, comment = rest.partition(" = ")
        assert name in ("config", "root", "data") or type(fields[name]).__name__ == kind
        assert "  # " in comment


def test_an_injected_parameter_stands_above_the_cells_own():
    assert executed(CELL, injected(mix="sgd", seed=3)) == executed(CELL).model_copy(update={"mix": "sgd", "seed": 3})


def test_any_field_can_be_injected_by_its_name():
    assert executed(CELL, injected(momentum=0.5)) == executed(CELL).model_copy(update={"momentum": 0.5})


def test_where_a_configuration_is_injected_only_what_is_injected_beside_it_counts():
    given = {"dataset": "digits", "mix": "sgd", "seed": 5}
    assert executed(CELL, injected(config=given, root="runs/local")) == RunConfig(**given)
    assert executed(CELL, injected(config={}, root="runs/local")) == RunConfig()
    assert executed(CELL, injected(config=given, seed=7)) == RunConfig(**given | {"seed": 7})


def test_by_hand_config_holds_more_fields_and_none_is_silently_dropped():
    assert executed(CELL.replace("config: dict = {}", "config: dict = {'momentum': 0.5}")).momentum == 0.5
    with pytest.raises(UserError, match="config: epochs is a parameter of the notebook"):
        executed(CELL.replace("config: dict = {}", "config: dict = {'epochs': 50}"))


def test_what_was_injected_before_the_parameters_were_executed_again_is_forgotten():
    assert executed(CELL, injected(seed=3), CELL) == executed(CELL)
    assert executed(CELL, "note: str = 'mine'", "x = 1", injected(seed=3)).seed == 3


@pytest.mark.parametrize(
    "values, words",
    [
        ({"rhoo": 0.1}, "rhoo: the notebook has no such parameter; it has .*rho"),
        ({"config": 3}, "configuration: found 3"),
        ({"config": {"rhoo": 3}}, "rhoo"),
        ({"rho": "much"}, "rho: found 'much'"),
    ],
)
def test_a_parameter_that_is_not_one_or_has_no_such_value_is_refused_in_a_sentence(values, words):
    with pytest.raises(UserError, match=words):
        executed(CELL, injected(**values))


def test_without_the_parameters_the_sentence_says_what_to_do():
    with pytest.raises(UserError, match="run the notebook from its top"):
        run_config({"In": ["", "x = ("]})


def test_a_folder_that_is_named_means_the_callers_and_else_the_projects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder("mine", "runs/local").resolve() == tmp_path / "mine"
    assert folder(2024, "runs/local").resolve() == tmp_path / "2024"
    assert folder("", "runs/local") == PROJECT / "runs/local"


def test_the_datas_folder_means_the_callers_and_names_one_run_wherever_it_is_called(tmp_path, monkeypatch):
    pictures = injected(config={"dataset": "imagefolder", "root": "pictures"})
    monkeypatch.chdir(tmp_path)
    assert executed(CELL, pictures).root == str(tmp_path / "pictures")
    monkeypatch.chdir(PROJECT / "notebooks")
    assert executed(CELL, pictures.replace("pictures'", "../data/pictures'")).root == "data/pictures"
    monkeypatch.chdir(PROJECT)
    assert executed(CELL, pictures.replace("pictures'", "data/pictures'")).root == "data/pictures"


def test_the_datas_folder_is_a_parameter_and_else_the_projects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = injected(dataset="imagefolder", data="pictures")
    assert executed(CELL, own).root == str(tmp_path / "pictures")
    assert executed(CELL, injected(config={"dataset": "imagefolder"}, data=2024)).root == str(tmp_path / "2024")
    assert executed(CELL, injected(dataset="imagefolder", data="studies/laptop")).root == "studies/laptop"
    (tmp_path / "studies/laptop").mkdir(parents=True)
    assert executed(CELL, injected(dataset="imagefolder", data="studies/laptop")).root == str(
        tmp_path / "studies/laptop"
    )


def papermill(cwd, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_papermill_trains_what_it_is_told_where_it_is_called(tmp_path):
    told = ["-p", "mix", "sam", "-p", "rho", "0.1", "-p", "seed", "3", "-p", "epochs", "3", "-p", "root", "here"]
    result = papermill(tmp_path, str(NOTEBOOK), "out.ipynb", *told, "-p", "data_fraction", "0.2", "-p", "width", "4")
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "here").iterdir()
    config = json.loads((run / "config.json").read_text())["config"]
    assert (config["mix"], config["rho"], config["seed"], config["epochs"]) == ("sam", 0.1, 3, 3)
    assert list(pd.read_csv(run / "metrics.csv").epoch) == [1, 2, 3]
    outputs = [o for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", [])]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 1 and run.name in pictures[0].metadata["image/png"]["alt"]
    assert (tmp_path / "out.ipynb").stat().st_size < 60_000  # a study keeps one a run


def test_papermill_with_an_unknown_parameter_stops_with_a_sentence_and_trains_nothing(tmp_path):
    result = papermill(tmp_path, str(NOTEBOOK), "out.ipynb", "-p", "rhoo", "0.1", "-p", "root", "here")
    assert result.returncode != 0 and not (tmp_path / "here").exists()
    outputs = [o for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", [])]
    (error,) = (o for o in outputs if o.output_type == "error")
    assert error.ename == "UserError" and error.traceback == [f"UserError: {error.evalue}"]
    assert error.evalue.startswith("rhoo: the notebook has no such parameter") and error.evalue in result.stderr


def test_papermill_explains_the_parameters(tmp_path):
    help = papermill(tmp_path, "--help-notebook", str(NOTEBOOK)).stdout
    assert "rho: float (default 0.2)        radius of SAM's ascent step" in help


SMALL = RunConfig(
    dataset="digits", model="resnet6", stem="cifar", width=4, batch_size=64, epochs=2, data_fraction=0.2, augment=False,
    noise_fraction=0.4, eval_every=1, probe_every=2, mix="sam", device="cpu",
)  # fmt: skip


def test_the_final_numbers_are_those_of_the_last_row_of_the_metrics(tmp_path):
    run = train(SMALL, tmp_path, progress=False)
    last, numbers = run.table("metrics").iloc[-1], final_numbers(run).value
    assert numbers["test accuracy"] == f"{100 * last.test_accuracy:.2f} %"
    assert numbers["flipped labels memorized"].startswith(f"{100 * last.memorized:.2f} % of ")
    shares = [float(text.split()[0]) for name, text in numbers.items() if name.startswith("parameters in checkpoint")]
    assert len(shares) == 4 and 40 < sum(shares) <= 100.02  # the others are inactive


def test_a_run_that_diverged_says_where_and_is_drawn_all_the_same(tmp_path):
    wild = {"lr": 1000.0, "weight_decay": 1.0, "epochs": 20, "eval_every": 20}
    run = train(SMALL.model_copy(update=wild), tmp_path, progress=False)
    numbers = final_numbers(run).value
    assert numbers["status"] == "diverged" and "test accuracy" not in numbers
    assert int(numbers["step of the first loss that was not finite"].replace(",", "")) == run.summary["diverged_step"]
    picture = PIL.Image.open(BytesIO(training_curves(run).data))
    assert picture.format == "PNG" and picture.width > 500


def test_a_checkpoint_has_one_colour_in_all_figures():
    assert CHECKPOINTS == {k: LOOKS[f"checkpoint{k}"][0] for k in range(1, 5)}
