import math

import numpy as np
import pandas as pd
import pytest
from fake_runs import write_run, write_study
from scipy import stats

from samlib import PROJECT
from samlib.analysis.results import (
    NotMeasured,
    at_chosen_rho,
    chosen_rho,
    estimates,
    found_path,
    load,
    mix_name,
    mix_order,
    trainings,
)
from samlib.config import UserError
from samlib.study import Study

GRID = {"mix": ["sgd", "sam", "scale2x0.5"], "rho": [0.1, 0.2], "seed": [0, 1, 2], "data_fraction": [0.1, 1.0]}


def accuracy(config) -> float:
    """By hand: SAM gains (1 + seed) / 100 at ρ 0.1, the same less 0.1 at 0.2; SGD's depends on seed and data alone."""
    value = 0.8 + 0.1 * config.data_fraction - 0.01 * config.seed
    if config.mix == "sam":
        value += (1 + config.seed) / 100 - 0.1 * (config.rho == 0.2)
    return value


@pytest.fixture
def results(tmp_path):
    study = Study.load(write_study(tmp_path / "s.yaml", {"main": GRID, "other": {"mix": "sam", "rho": 0.1, "seed": 9}}))
    for config in study.configs():
        if config.mix == "scale2x0.5" and config.seed == 2:
            continue  # missing
        failed = config.mix == "sam" and config.rho == 0.2 and config.seed == 1
        numbers = (
            dict.fromkeys(("test_accuracy", "eval_train_accuracy")) if failed else {"test_accuracy": accuracy(config)}
        )
        rows = {
            "sharpness": [
                {"epoch": e, "measure": "random", "labels": "trained", "logits": "raw", "setting": 0.05, "value": e}
                for e in (1, 2)
            ]
        }
        write_run(tmp_path / "runs", config, rows, "diverged" if failed else "done", **numbers)
    return load(study, tmp_path / "runs")


def test_a_difference_is_the_paired_t_test_at_the_same_rho_and_setting(results):
    gain = results.differences("sam", "sgd", by=("rho", "data_fraction"))
    reference = stats.ttest_1samp([0.01, 0.02, 0.03], 0).confidence_interval(0.95)
    e = gain[0.1, 1.0]
    assert (e.value, e.low, e.high, e.n) == pytest.approx((0.02, reference.low, reference.high, 3))
    assert str(e) == "+2.0 ± 2.5 points (n=3)" and set(gain.index) == {(r, d) for r in (0.1, 0.2) for d in (0.1, 1.0)}


def test_a_diverged_or_a_missing_partner_is_left_out_and_counted(results):
    assert results.differences("sam", "sgd", by=("rho", "data_fraction"))[0.2, 1.0].n == 2
    assert results.differences("sam", "sgd", by=("rho", "data_fraction"))[0.2, 1.0].left_out == 1
    saner = results.differences("scale2x0.5", "sam", by=("rho", "data_fraction"))
    a, b = saner[0.1, 0.1], saner[0.2, 0.1]
    assert (a.n, a.left_out, a.missing) == (2, 1, 1)  # seed 2 is missing
    assert (b.n, b.left_out, b.missing) == (1, 2, 1)  # and seed 1 of SAM diverged
    assert str(b).endswith("(n=1, 1 missing, 1 left out)") and str(a).endswith("n=2, 1 missing)")
    turned = results.pairs("sam", "scale2x0.5").query("data_fraction == 0.1 and rho == 0.1")  # it is the partner there
    assert list(turned.sort_values("seed").status) == ["done", "done", "missing"]


def test_the_same_training_twice_is_one_run(results):
    study = results.runs("main").query("mix == 'sgd'")
    assert len(study) == 12 and len(trainings(study)) == 6
    means = estimates(trainings(study), "test_accuracy", ("mix", "data_fraction"))
    reference = stats.ttest_1samp([0.9, 0.89, 0.88], 0).confidence_interval(0.95)
    e = means["sgd", 1.0]  # whose two ρ are one training
    assert (e.n, e.value, e.low) == pytest.approx((3, 0.89, reference.low))


def test_regimes_are_never_pooled_into_one_interval(results):
    with pytest.raises(NotMeasured, match="differ in data_fraction"):
        results.differences("sam", "sgd", by=("rho",))


def test_a_run_that_has_no_partner_in_the_plan_is_none_of_the_pairs(results):
    assert set(results.pairs("sam", "sgd").seed) == {0, 1, 2}


def test_an_accuracys_resolution_is_one_test_image(results):
    frame = results.pairs("scale2x0.5", "sgd").query("data_fraction == 1")
    assert estimates(frame, "difference", ("rho",))[0.1].half == pytest.approx(1 / 1000)


def test_runs_keep_the_diverged_ones_and_name_what_is_missing(results):
    runs = results.runs("main")
    assert len(runs) == 32 and (runs.status == "diverged").sum() == 2
    assert runs.test_accuracy[runs.status == "diverged"].isna().all() and runs.gap.max() < 0.5
    assert results.planned("main").status.eq("missing").sum() == 4
    state = results.state
    assert state.startswith("33 of 37 runs are finished; 2 diverged: digits-") and "; 4 missing: " in state


def test_partners_may_differ_in_what_is_named_and_in_what_is_measured(tmp_path):
    grids = {
        "a": {"mix": "sam", "seed": [0, 1, 2], "epochs": 5},
        "b": {"mix": "sgd", "seed": [0, 1, 2], "epochs": 10, "eval_every": 5},
    }
    study = Study.load(write_study(tmp_path / "s.yaml", grids))
    for config in study.configs():
        write_run(tmp_path / "runs", config, test_accuracy=0.9 if config.mix == "sam" else 0.8)
    results = load(study, tmp_path / "runs")
    assert results.pairs("sam", "sgd").empty
    assert results.pairs("sam", "sgd", but=("epochs",)).difference.tolist() == pytest.approx([0.1] * 3)
    assert len(results.pairs({"mix": "sam", "epochs": 5}, {"mix": "sgd", "epochs": 10})) == 3


def test_a_run_with_two_different_partners_is_refused(results):
    with pytest.raises(ValueError, match="holds too much"):
        results.pairs("sam", "sgd", but=("seed",))


def test_a_table_carries_its_runs_fields_and_sharpness_is_of_the_last_epoch(results):
    rows = results.table("sharpness", "other")
    assert rows[["mix", "rho", "seed"]].drop_duplicates().values.tolist() == [["sam", 0.1, 9]]
    last = results.sharpness("main")
    assert (last.epoch == 2).all() and last.index.is_unique and set(last.kind) == {"random directions"}
    at = results.pairs("sam", "scale2x0.5", "random directions", "main")
    assert at.difference.eq(0).all() and len(at) == 6  # of eight of one radius, two of SAM's diverged


def test_a_diverged_run_has_no_sharpness(results):
    diverged = results.planned().query("status == 'diverged'").index
    assert len(diverged) == 2 and not results.sharpness().index.isin(diverged).any()
    assert results.means("random directions", ("mix", "rho", "data_fraction"), "main")["sam", 0.2, 1.0].n == 2


def test_a_table_is_read_from_disk_once_and_callers_get_copies(results, monkeypatch):
    first = results.table("sharpness")
    first["value"] = 0
    monkeypatch.setattr("samlib.analysis.results.load_table", None)
    assert results.table("sharpness").value.max() > 0 and len(results.table("sharpness", "other")) == 2


def test_each_mix_is_taken_at_the_rho_that_is_chosen_in_its_regime(results):
    runs = results.planned("main").assign(
        status="done", validation_accuracy=lambda f: (f.rho == 0.1 + 0.1 * (f.mix == "sam")) * 1.0
    )
    best = at_chosen_rho(runs).query("mix != 'sgd'").groupby("mix").rho.unique()
    assert best["sam"].tolist() == [0.2] and best["scale2x0.5"].tolist() == [0.1]
    assert (at_chosen_rho(runs).mix == "sgd").sum() == (runs.mix == "sgd").sum()


def test_what_no_run_has_is_said_in_a_sentence(results, tmp_path):
    with pytest.raises(NotMeasured, match="has the table 'noise'"):
        results.table("noise")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has none of the 37 runs"):
        load(results.study, tmp_path / "empty")
    with pytest.raises(UserError, match="there is no grid 'x'"):
        load(results.study, tmp_path / "runs", "x")


def test_relative_paths_are_the_callers_and_else_the_projects(results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(load("s.yaml", "runs", ["other"]).runs()) == 1
    assert found_path("studies/quick.yaml") == PROJECT / "studies/quick.yaml"


def swept(*rows) -> pd.DataFrame:
    """Runs of SAM: (seed, ρ, accuracy on held-out images); None: it diverged."""
    frame = pd.DataFrame(rows, columns=["seed", "rho", "validation_accuracy"]).astype(float)
    return frame.assign(mix="sam", status=np.where(frame.validation_accuracy.isna(), "diverged", "done"))


def test_rho_is_chosen_on_held_out_training_images_alone():
    frame = swept((0, 0.1, 0.8), (1, 0.1, 0.8), (0, 0.2, 0.82), (1, 0.2, 0.8))
    frame["test_accuracy"] = [0.9, 0.9, 0.1, 0.1]
    assert chosen_rho(frame) == 0.2
    assert math.isnan(chosen_rho(frame.assign(validation_accuracy=np.nan)))
    assert chosen_rho(frame[frame.rho == 0.1].assign(validation_accuracy=np.nan)) == 0.1
    assert math.isnan(chosen_rho(frame, "scale2x0.5"))
    tied = swept((0, 0.1, 0.3), (1, 0.1, 0.2), (2, 0.1, 0.1), (0, 0.2, 0.1), (1, 0.2, 0.2), (2, 0.2, 0.3))
    assert chosen_rho(tied) == 0.1 and chosen_rho(tied.iloc[::-1]) == 0.1  # their means differ in the last bit


def test_a_rho_of_which_a_run_diverged_is_not_chosen():
    frame = swept((0, 0.1, 0.7), (1, 0.1, 0.7), (0, 0.2, 0.9), (1, 0.2, None))
    assert chosen_rho(frame) == 0.1 and chosen_rho(frame[frame.rho == 0.2]) == 0.2  # its only one


def test_rhos_are_compared_on_the_seeds_that_all_of_them_have():
    easy = (2, 0.2, 0.99)  # a seed that helps whoever has it
    frame = swept((0, 0.1, 0.8), (1, 0.1, 0.8), (0, 0.2, 0.75), (1, 0.2, 0.75), easy)
    assert chosen_rho(frame) == 0.1 and chosen_rho(pd.concat([frame, swept((2, 0.1, 0.1))])) == 0.2
    assert chosen_rho(swept((0, 0.1, 0.8), (1, 0.2, 0.9))) == 0.2  # none in common


def test_the_caption_names_dataset_flips_model_rho_and_seeds(results):
    shown = "made-up digits; 10, 100 % of the training images; resnet18 of width 64; ρ = 0.1, 0.2; 2 to 3 seeds"
    assert results.caption("main", note="every ρ shown") == f"{shown}; every ρ shown"


def test_a_grid_that_is_not_there_says_that_a_parameter_may_be_empty(results):
    with pytest.raises(UserError, match="there is no grid 'geometry'; the grids are .* is empty where there is none"):
        load(results.study, results.root, ["geometry"])


def test_saner_has_its_name_everywhere():
    assert mix_name("scale2x0.5") == "SANER" and mix_name("shuffled-scale2x0.5") == "SANER, shuffled"
    mixes = ["gain1x2", "checkpoint12", "checkpoint1", "shuffled-checkpoint1", "scale2x0.5", "sam", "sgd"]
    ordered = ["sgd", "sam", "scale2x0.5", "checkpoint1", "shuffled-checkpoint1", "checkpoint12", "gain1x2"]
    assert sorted(mixes, key=mix_order) == ordered
