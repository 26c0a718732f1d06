"""The tables of a study, against frames made by hand whose numbers can be checked in the head."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from samlib.analysis import regimes
from samlib.config import UserError
from samlib.analysis.regimes import DIFFERENCE
from samlib.analysis.report import NAMED, markdown, report, state, text
from samlib.runs import Run
from samlib.analysis.old_stats import Estimate
from samlib.study import Study

STUDY = """
title: Two regimes
dataset: made by hand
base: {dataset: digits, model: resnet10, epochs: 10, eval_every: 1}
grids:
  regimes:
    seed: [0, 1, 2]
    regime: [{data_fraction: 0.5}, {data_fraction: 1.0, epochs: 20}]
    noise_fraction: [0.0, 0.4]
    mix: [sgd, sam]
  twice:
    seed: [0, 1, 2]
    mix: sgd
    regime: [{data_fraction: 0.5, epochs: 20}, {data_fraction: 1.0, epochs: 40}]
    noise_fraction: [0.0, 0.4]
    eval_every: 2
  rates: {mix: sgd, lr: [0.1, 0.2], seed: [0, 1]}
notebooks:
  - {notebook: 05_data_regimes, grid: regimes, parameters: {twice: twice}}
"""


def accuracy(config):
    """SAM is ahead by 0.01 + 0.01 seed on noisy labels, level on clean ones; twice the epochs add 0.02."""
    gain = (0.01 + 0.01 * config.seed) if config.mix == "sam" and config.noise_fraction else 0
    longer = 0.02 if config.epochs == (20 if config.data_fraction == 0.5 else 40) else 0
    return 0.5 + 0.2 * config.data_fraction + 0.001 * config.seed + gain + longer - 0.1 * config.noise_fraction


def finish(config, root, diverged=False):
    run = Run(config, root)
    run.folder.mkdir(parents=True)
    run.write_config()
    final = accuracy(config)
    steps = range(config.eval_every, config.epochs + 1, config.eval_every)
    for epoch in steps:
        test = final * epoch / config.epochs if epoch < config.epochs else final
        row = {"epoch": epoch, "gradient_evaluations": epoch * 7 * config.passes, "test_accuracy": test}
        run.append("metrics", row | {"memorized": math.nan, "corrected": math.nan})
    for labels, value in {"trained": 0.3 - 0.1 * (config.mix == "sam"), "true": 0.4}.items():
        if labels == "trained" or config.noise_fraction:
            row = {"epoch": config.epochs, "measure": "random", "labels": labels, "setting": 0.05}
            run.append("sharpness", row | {"value": value, "std": 0.01, "n": 10})
    names = ("train_accuracy", "eval_train_accuracy", "test_accuracy", "best_test_accuracy", "memorized", "corrected")
    results = dict.fromkeys(names, None if diverged else final)
    results |= {} if diverged else {"best_test_accuracy": final + 0.01, "eval_train_accuracy": 0.9, "memorized": None}
    status = {"status": "diverged" if diverged else "done", "diverged_step": 3 if diverged else None}
    run.finish(status | results | {"train_images": 100, "gradient_evaluations": 7 * config.epochs * config.passes})


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "two.yaml"
    path.write_text(STUDY)
    return Study.load(path)


@pytest.fixture(scope="module")
def root(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for config in study.configs():
        finish(config, folder)
    return folder


def test_the_summary_is_the_paired_difference_and_its_t_interval(study, root):
    table = regimes.summary(regimes.grid_runs(study, root, "regimes"), ["test_accuracy", "gap", "random_trained"])
    gain = table.loc[(0.5, 0.4, DIFFERENCE), "test_accuracy"]  # 1, 2 and 3 points over three seeds
    half = stats.t.ppf(0.975, 2) * 1 / np.sqrt(3)
    assert (gain.mean, gain.low, gain.high, gain.n) == pytest.approx((2, 2 - half, 2 + half, 3))
    assert table.loc[(0.5, 0.0, DIFFERENCE), "test_accuracy"].mean == pytest.approx(0)
    assert table.loc[(1.0, 0.0, "SGD"), "test_accuracy"].mean == pytest.approx(70.1)
    assert table.loc[(1.0, 0.0, "SGD"), "gap"].mean == pytest.approx(90 - 70.1)
    assert table.loc[(1.0, 0.4, DIFFERENCE), "random_trained"].mean == pytest.approx(-0.1)


def test_on_clean_data_the_true_labels_are_those_trained_on(study, root):
    runs = regimes.grid_runs(study, root, "regimes")
    clean = runs.noise_fraction == 0
    assert (runs.random_true[clean] == runs.random_trained[clean]).all() and (runs.random_true[~clean] == 0.4).all()


def test_missing_and_diverged_runs_are_listed_and_in_no_mean(study, root, tmp_path):
    root, configs = Path(shutil.copytree(root, tmp_path / "runs")), study.configs("regimes")
    noisy = [c for c in configs if (c.data_fraction, c.noise_fraction, c.mix) == (0.5, 0.4, "sam")]
    for config in noisy[:2]:
        shutil.rmtree(root / config.run_id)
    finish(noisy[1], root, diverged=True)
    runs = regimes.grid_runs(study, root, "regimes")
    assert runs.status.to_dict() == {
        c.run_id: "missing" if c is noisy[0] else "diverged" if c is noisy[1] else "done" for c in configs
    }
    table = regimes.summary(runs, ["test_accuracy"])["test_accuracy"]
    gain = table.loc[0.5, 0.4, DIFFERENCE]
    assert gain.mean == pytest.approx(3) and math.isnan(gain.half) and (gain.n, gain.left_out) == (1, 2)
    assert table.loc[0.5, 0.4, "SGD"].n == 3
    lines = report(study, root, "regimes")
    assert "1 missing" in lines and "1 diverged" in lines
    assert all(f"- {config.run_id}" in lines for config in noisy[:2]) and "+3.0 (n=1)" in lines


def test_speed_reads_the_first_evaluation_after_a_tenth_and_half_of_the_epochs(study, root):
    runs = regimes.grid_runs(study, root, "regimes")
    runs = regimes.with_speed(runs, regimes.with_curves(runs, root))
    run = runs[(runs.data_fraction == 1) & (runs.mix == "sgd") & (runs.seed == 0) & (runs.noise_fraction == 0)].iloc[0]
    assert run[list(regimes.SPEED)].to_list() == pytest.approx([7, 35, 70, 18])  # 20 epochs, linear up to 70 %


def test_scaling_pairs_the_seeds_of_two_data_sizes(study, root):
    table = regimes.scaling(regimes.grid_runs(study, root, "regimes"))
    step = table.loc[(0.4, "SAM"), "50 % → 100 %"]
    assert step.mean == pytest.approx(10) and step.half == pytest.approx(0, abs=1e-9) and step.n == 3


def test_early_stopping_compares_sams_last_epoch_with_sgds_best(study, root):
    row = regimes.early_stopping(regimes.grid_runs(study, root, "regimes")).loc[(0.5, 0.4)]
    assert [row[name].mean for name in ("gain", "stopped", "left", "both")] == pytest.approx([2, 1, 1, 2])


def test_equal_cost_pairs_sam_with_sgd_of_twice_the_epochs(study, root):
    runs, twice = (regimes.grid_runs(study, root, grid) for grid in ("regimes", "twice"))
    row = regimes.equal_cost(runs, twice).loc[(1.0, 0.4)]
    assert (row["same_epochs"].mean, row["same_cost"].mean, row["same_cost"].n) == pytest.approx((2, 0, 3))


@pytest.mark.parametrize(
    ("accuracy", "sharpness", "words"),
    [
        ((1, 0.5, 1.5), (-1, -2, -0.1), "flatter and better"),
        ((1, -0.5, 2.5), (-1, -2, -0.1), "flatter"),
        ((-1, -2, -0.5), (1, 0.1, 2), "sharper and worse"),
        ((1, 0.5, 1.5), (0, -1, 1), "better"),
        ((1, -1, 3), (0, -1, 1), "no difference shown"),
        ((1, np.nan, np.nan), (-1, np.nan, np.nan), "undecided: fewer than two pairs"),
    ],
)
def test_a_verdict_counts_a_difference_only_where_its_interval_excludes_zero(accuracy, sharpness, words):
    assert regimes.verdict(Estimate(*accuracy, 3), Estimate(*sharpness, 3)) == words


def test_signs_count_only_what_was_measured():
    missing, single = Estimate(np.nan, np.nan, np.nan, 0), Estimate(2, np.nan, np.nan, 1)
    assert regimes.signs([missing, single, Estimate(1, 0.5, 1.5, 3), Estimate(-1, -2, 0.5, 3)]) == (3, 2, 1, 1, 0)


def test_correlations_within_regimes_forget_the_order_of_the_regimes():
    rng = np.random.default_rng(0)
    cell, inner = np.repeat([0.1, 0.5, 1.0], 6), rng.normal(size=18)
    frame = pd.DataFrame({"data_fraction": cell, "noise_fraction": 0.0, "sharp": -100 * cell + inner})
    row = regimes.correlations(frame.assign(gap=100 * cell + inner), ["sharp"]).loc["sharp"]
    assert row["all runs"].mean < -0.9 and row["within regimes"].mean == pytest.approx(1)


def test_numbers_are_shown_with_n_and_marked_only_as_differences():
    assert text(Estimate(1.25, 0.25, 2.25, 3), 1) == "1.2 ± 1.0 (n=3)"
    assert text(Estimate(1.25, 0.25, 2.25, 3), 1, difference=True) == "+1.2 ± 1.0 (n=3) ★"
    assert text(Estimate(0.00123, np.nan, np.nan, 1), None) == "0.00123 (n=1)"
    assert text(Estimate(np.nan, np.nan, np.nan, 0)) == "–"
    index = pd.MultiIndex.from_tuples([(0.01, 0.4, "SGD")], names=["data_fraction", "noise_fraction", "mix"])
    table = pd.DataFrame({"test_accuracy": [Estimate(50, 49, 51, 2)]}, index=index)
    assert markdown(table).splitlines()[-1] == "| 1 % | 40 % | SGD | 50.0 ± 1.0 (n=2) |"


def test_a_grid_of_another_kind_is_reported_by_what_varies_and_refused_as_regimes(study, root):
    lines = report(study, root, "rates")
    assert "| lr |" in lines and "| 0.2 |" in lines and "(n=2)" in lines and "SAM − SGD |" not in lines
    with pytest.raises(UserError, match="mixes sgd"):
        regimes.check_regimes(regimes.grid_runs(study, root, "rates"), "two: grid 'rates'")


def test_a_report_before_any_run_says_so_and_a_wrong_root_is_refused(study, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "0 of 24 runs are done" in report(study, tmp_path / "empty", "regimes")
    with pytest.raises(UserError, match="not a folder of runs"):
        report(study, tmp_path / "nowhere")


def test_the_whole_report_has_every_table_of_the_first_document(study, root):
    lines = report(study, root)
    for title in ("Accuracy", "Sharpness and generalization gap", "Speed", "Scaling with data", "Equal cost"):
        assert f"### {title}" in lines
    assert json.dumps(lines) and "nan" not in lines


def test_all_diverged_runs_are_named_and_of_many_missing_ones_the_first():
    status = {f"d{k}": "diverged" for k in range(NAMED + 3)} | {f"m{k}": "missing" for k in range(NAMED + 5)}
    words = state(pd.DataFrame({"status": status | {"ok": "done"}}))
    assert words.startswith(f"1 of {2 * NAMED + 9} runs are done.")
    assert [line for line in words.splitlines() if line.startswith("- d")] == [f"- d{k}" for k in range(NAMED + 3)]
    assert [line for line in words.splitlines() if line.startswith("- m")] == [f"- m{k}" for k in range(NAMED - 1)]
    assert words.endswith("- and 6 more, which `python -m samlib status` names")
    few = state(pd.DataFrame({"status": {f"m{k}": "missing" for k in range(NAMED)}}))
    assert few.count("- m") == NAMED and "more" not in few
