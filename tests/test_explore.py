"""00_explore: SAM on two weights against a loop by hand, runs beside each other against their tables, and in batch."""

import ast

import nbformat
import numpy as np
import papermill
import pytest
from fake_runs import write_run
from ipywidgets import FloatSlider

from samlib import PROJECT
from samlib.analysis import figures
from samlib.analysis.figures_explore import LR, START, STEPS, Explorer, beside, path, plane, runs_below
from samlib.config import RunConfig, UserError
from samlib.probes import BINS

NOTEBOOK = PROJECT / "notebooks/00_explore.ipynb"
PARAMETERS = papermill.inspect_notebook(NOTEBOOK)


def slope(w1: float, w2: float) -> tuple[float, float]:
    """The gradient of (w2 - w1^2 / 2)^2 / 2 + (w1 - 1)^2 / 20, by hand."""
    return -w1 * (w2 - w1**2 / 2) + (w1 - 1) / 10, w2 - w1**2 / 2


def checkpoint(g: float, g_sam: float) -> int:
    if g == 0 or g_sam == 0:
        return 0
    if g * g_sam > 0:
        return 1 if abs(g_sam) >= abs(g) else 2
    return 3 if abs(g_sam) >= abs(g) else 4


@pytest.mark.parametrize("rho", [0.0, 0.1, 0.4, 1.0])
def test_the_path_and_its_checkpoints_are_those_of_a_loop_by_hand(rho):
    w1, w2 = START
    for step, row in path(rho).iterrows():
        assert (row.w1, row.w2) == pytest.approx((w1, w2), rel=1e-9)
        g = slope(w1, w2)
        length = np.hypot(*g)
        g_sam = slope(w1 + rho * g[0] / length, w2 + rho * g[1] / length)
        assert [row.checkpoint_w1, row.checkpoint_w2] == [checkpoint(*pair) for pair in zip(g, g_sam, strict=True)], (
            step
        )
        w1, w2 = w1 - LR * g_sam[0], w2 - LR * g_sam[1]
    assert step == STEPS - 1


def test_at_the_notebooks_rho_each_weight_meets_all_four_checkpoints_and_at_zero_only_the_first():
    rho = float(PARAMETERS["rho"]["default"])
    for codes in (path(rho).checkpoint_w1, path(rho).checkpoint_w2):
        assert set(codes) == {1, 2, 3, 4}
    assert (path(0.0).filter(like="checkpoint") == 1).all(axis=None)


def test_every_rho_of_the_slider_stays_on_the_map():
    figure = plane(0.0)
    (x0, x1), (y0, y1) = figure.axes[0].get_xlim(), figure.axes[0].get_ylim()
    for rho in np.arange(0, 1.01, 0.05):
        p = path(rho)
        assert p.w1.between(x0, x1).all() and p.w2.between(y0, y1).all()


def probed(step: int, rho: float, ratios: list[float]) -> dict:
    return {"step": step, "epoch": 0, "rho": rho, "checkpoint1": sum(ratios)} | dict(zip(BINS, ratios, strict=True))


def layer(step: int, name: str, counts: list[int]) -> dict:
    names = ("inactive", "checkpoint1", "checkpoint2", "checkpoint3", "checkpoint4")
    return {"step": step, "layer": name, "parameters": sum(counts), **dict(zip(names, counts, strict=True))}


EARLY, LATE, OTHER = [0.1] * 5 + [0.0, 0.0], [0.2, 0.1, 0.1, 0.0, 0.0, 0.0, 0.1], [0.3] + [0.0] * 6


@pytest.fixture
def root(tmp_path):
    """SAM with probes at steps 0 and 50 of 100, at its own radius and at another; and SGD without probes."""
    metrics = [{"epoch": k, "step": 50 * k, "test_accuracy": 0.4 * k, "eval_train_accuracy": 0.5 * k} for k in (1, 2)]
    tables = {
        "metrics": metrics,
        "probes": [probed(0, 0.2, EARLY), probed(0, 0.1, OTHER), probed(50, 0.2, LATE), probed(50, 0.1, OTHER)],
        "layers": [layer(0, "conv", [0, 8, 0, 0, 0]), layer(0, "fc", [4, 0, 0, 0, 0])]
        + [layer(50, "conv", [1, 2, 3, 1, 1]), layer(50, "fc", [0, 1, 0, 0, 3])],
    }
    sam = RunConfig(dataset="digits", mix="sam", rho=0.2, probe_every=50)
    write_run(tmp_path, RunConfig(dataset="digits", mix="sgd"), {"metrics": metrics}, steps=100)
    write_run(tmp_path, sam, tables, steps=100)
    return tmp_path


def test_runs_with_probes_come_first_and_a_folder_without_runs_is_named(root, tmp_path):
    assert list(runs_below(root).mix) == ["sam", "sgd"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no finished run"):
        runs_below(tmp_path / "empty")


@pytest.mark.parametrize("done, step, ratios", [(0.0, 0, EARLY), (0.49, 0, EARLY), (0.5, 50, LATE), (1.0, 50, LATE)])
def test_the_ratios_are_the_last_probes_at_the_runs_own_radius_as_shares_of_checkpoint_1(root, done, step, ratios):
    runs = runs_below(root)
    panel = beside(runs, done, first=runs.index[0]).axes[2]
    heights = [bar.get_height() for bar in panel.patches]
    assert heights == pytest.approx([100 * share / sum(ratios) for share in ratios])
    assert panel.get_title(loc="left") == f"step {step}"


def test_the_layers_bars_are_their_shares_and_fill_the_layer(root):
    runs = runs_below(root)
    panel = beside(runs, 1.0, first=runs.index[0]).axes[1]
    bars = {(container.get_label(), k): bar for container in panel.containers for k, bar in enumerate(container)}
    conv, fc = (12.5, 25, 37.5, 12.5, 12.5), (0, 25, 0, 0, 75)  # inactive, checkpoints 1 to 4
    for name, *shares in zip(("inactive", *(f"checkpoint {k}" for k in range(1, 5))), conv, fc, strict=True):
        assert [bars[name, k].get_width() for k in (0, 1)] == pytest.approx(shares)
    assert [bars["inactive", k].get_x() + bars["inactive", k].get_width() for k in (0, 1)] == pytest.approx([100, 100])
    assert [label.get_text() for label in panel.get_yticklabels()] == ["conv", "fc"]


def test_a_run_without_probes_shows_its_curves_and_says_what_it_lacks(root):
    runs = runs_below(root)
    figure = beside(runs, 1.0, first=runs.index[0], second=runs.index[1])
    curves, layers, ratios = figure.axes[3:]
    assert list(curves.lines[0].get_ydata()) == pytest.approx([40, 80])
    assert layers.get_xlabel() == ratios.get_xlabel() == "not measured in this run"
    assert figures.faults(figure) == [] and figures.faults(plane(0.4)) == []


def test_a_moved_control_changes_the_figure_and_where_there_is_no_kernel_its_picture_stands():
    slider = FloatSlider(value=0.1, min=0, max=1)
    explorer = Explorer(plane, rho=slider)
    before = explorer.page.value
    slider.value = 0.7
    assert "ρ = 0.7" in explorer.page.value and "ρ = 0.1" in before
    data, about = explorer._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "image/png"} <= data.keys()
    assert data["image/png"] in explorer.page.value and "ρ = 0.7" in about["image/png"]["alt"]


def test_executed_in_batch_it_shows_a_picture_for_each_of_its_three_sections(root, tmp_path):
    parameters = {"root": str(root), "rho": 0.25, "done": 0.5}
    quiet = {"progress_bar": False, "log_output": False}
    papermill.execute_notebook(NOTEBOOK, tmp_path / "out.ipynb", parameters, **quiet)
    cells = nbformat.read(tmp_path / "out.ipynb", 4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert {output.output_type for output in outputs} == {"execute_result"}
    alts = [output.metadata["image/png"]["alt"] for output in outputs]
    assert len(alts) == 3 and "ρ = 0.25" in alts[0] and "50%" in alts[1]
    sam, sgd = runs_below(root).index
    assert alts[1].endswith(sam) and alts[2].endswith(f"{sam} and {sgd}")


def test_the_notebook_holds_calls_alone_and_thirty_lines_of_them_at_most():
    cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    assert all("hide-input" in cell.metadata.tags for cell in cells)
    assert sum(len(cell.source.splitlines()) for cell in cells) <= 30
    kinds = {type(node) for cell in cells for node in ast.walk(ast.parse(cell.source))}
    assert not kinds & {ast.FunctionDef, ast.Lambda, ast.JoinedStr}
